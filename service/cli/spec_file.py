"""Reads job specs from files and applies --set.

Must not know: the service, which validates the spec.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_ray.config.train_config import apply_overrides, read_mapping
from service.cli.failure import CommandError

_STDIN = Path("/dev/stdin")
SpecFile = Annotated[
    Path,
    typer.Argument(
        help="Job spec, a YAML or JSON file; - reads stdin.",
        metavar="SPEC",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a field of the spec, such as training.steps=10. Repeatable.",
        metavar="PATH=VALUE",
    ),
]


def read_spec(path: Path, overrides: Iterable[str] | None) -> dict[str, Any]:
    """Returns the spec with overrides applied.

    Raises CommandError with the file or the override that cannot be read.
    """
    if str(path) == "-":
        path = _STDIN
    try:
        values = read_mapping(path)
    except OSError as error:
        raise CommandError(
            f"cannot read the job spec {path}: {error.strerror}",
            remedy="set SPEC to a YAML or JSON file",
            exit_code=2,
        ) from error
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{path} is not text in UTF-8",
            remedy="save it as UTF-8, in YAML or JSON",
            exit_code=2,
        ) from error
    except ValueError as error:
        raise CommandError(
            str(error),
            remedy="see deploy/jobs/stdlib-tp2.yaml for a valid spec",
            exit_code=2,
        ) from error
    return override(values, overrides)


def override(values: dict[str, Any], overrides: Iterable[str] | None) -> dict[str, Any]:
    """Returns a spec, or a part of one, with overrides applied and paths made absolute.

    Raises CommandError with the override that cannot be read.
    """
    try:
        values = apply_overrides(values, overrides or ())
    except ValueError as error:
        raise CommandError(
            str(error), remedy="for example --set training.steps=10", exit_code=2
        ) from error
    return anchor_paths(values, Path.cwd())


def anchor_paths(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a copy of the spec whose relative paths start at `folder`.

    The service and the ranks run in other folders than the command.
    """
    result = {**spec}
    if "storage" in spec:
        result["storage"] = _anchor_field(spec["storage"], "path", folder)
    if "checkpoint" in spec:
        result["checkpoint"] = _anchor_field(spec["checkpoint"], "start_from", folder)
    # Values of a wrong type are left unchanged; the service reports them.
    if isinstance(spec.get("data"), dict):
        result["data"] = _anchor_data(spec["data"], folder)
    return result


def _anchor_data(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {**_anchor_field(data, "cache", folder)}
    if "tokenizer" in data:
        result["tokenizer"] = _anchor_field(data["tokenizer"], "path", folder)
    for split in ("train", "validation"):
        sources = data.get(split)
        if isinstance(sources, list):
            result[split] = [_anchor_field(source, "path", folder) for source in sources]
    return result


def _anchor_field(group: Any, key: str, folder: Path) -> Any:
    """Returns the group with the path in field `key`, if any, made absolute."""
    if not isinstance(group, dict) or key not in group:
        return group
    path = group[key]
    # URIs, such as s3:// and builtin://, are no paths.
    if not isinstance(path, str) or not path or "://" in path or path.startswith("/"):
        return group
    anchored = (folder / Path(path).expanduser()).absolute()
    # Means nothing to a service; it is followed here, where the folders are.
    if ".." in anchored.parts:
        anchored = anchored.resolve()
    return {**group, key: str(anchored)}
