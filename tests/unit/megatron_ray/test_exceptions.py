"""The library's exceptions are the drawn tree, and each has the failure kind drawn there."""

import importlib
import pkgutil
import re
from collections.abc import Iterator

import megatron_ray
from megatron_ray import exceptions
from megatron_ray.exceptions import ErrorKind, MegatronRayError


def subclasses(base: type[MegatronRayError]) -> Iterator[type[MegatronRayError]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def exceptions_of_the_library() -> dict[str, type[MegatronRayError]]:
    for module in pkgutil.walk_packages(megatron_ray.__path__, "megatron_ray."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    by_name = {"MegatronRayError": MegatronRayError}
    for error in subclasses(MegatronRayError):
        if error.__module__.startswith("megatron_ray."):
            by_name[error.__name__] = error
    return by_name


def test_every_exception_is_in_the_drawn_tree_with_its_kind() -> None:
    drawn = re.findall(r"(\w+Error) +([\w.]+)", exceptions.__doc__ or "")
    errors = exceptions_of_the_library()
    assert sorted(name for name, _ in drawn) == sorted(errors)
    kinds = set(ErrorKind)
    for name, place_or_kind in drawn:
        if place_or_kind in kinds:
            assert errors[name].failure_kind == place_or_kind, name
        else:
            assert errors[name].__module__ == f"megatron_ray.{place_or_kind}", name


def test_kinds_are_inherited() -> None:
    errors = exceptions_of_the_library()
    for name in ("ConfigError", "LayoutError", "DataError", "UnusableDataError"):
        assert errors[name].failure_kind is ErrorKind.USER, name
    for name in ("StorageError", "MissingFileError", "CheckpointError"):
        assert errors[name].failure_kind is ErrorKind.STORAGE, name
    assert errors["ScheduleError"].failure_kind is ErrorKind.INTERNAL
    assert errors["NonFiniteLossError"].failure_kind is ErrorKind.NUMERICS
    assert issubclass(errors["ConfigError"], ValueError)
