"""Judges every path of a config: its form, and the places that an operator allows.

Owns: the fields that are paths, the form of paths and URIs, open and closed places. Opens
nothing; where the files are, `Links` are followed.

A URI consists of scheme, bucket and path. Endpoints, regions and credentials belong to
the operator (environment of the agent and the service), so that no config sends a
request to an address, or a secret, of its own.
"""

import ipaddress
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

from megatron_ray.config.data import DataSource
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig

Use = Literal["read", "write"]
BUILTIN = "builtin"
_BUCKET_SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
_SCHEMES = ("file", *_BUCKET_SCHEMES)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NUMBERS = re.compile(r"[0-9.]+")
_WILDCARDS = re.compile(r"[*?\[]")
_MAX_SHOWN_CHARS = 80
_PREFIX_SETTINGS: dict[Use, str] = {
    "read": "MEGATRON_RAY_DATA_PREFIXES",
    "write": "MEGATRON_RAY_STORAGE_PREFIXES",
}


@dataclass(frozen=True)
class PathRules:
    """The places of a deployment that its specs may name."""

    data_prefixes: tuple[str, ...] = ()
    """Folders and URIs that specs may read."""
    storage_prefixes: tuple[str, ...] = ()
    """Folders and URIs that specs may write, and read."""
    data_dir: str | None = None
    """The service's own folder, which is closed to specs."""
    jobs_dir: str | None = None
    """The folder in it with the jobs' files, which is open."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "PathRules":
        """Returns the rules that `dataclasses.asdict` turned into a mapping."""
        return cls(
            tuple(values["data_prefixes"]),
            tuple(values["storage_prefixes"]),
            values["data_dir"],
            values["jobs_dir"],
        )


@dataclass(frozen=True)
class PathField:
    """One path in a config."""

    pointer: str
    path: str
    use: Use


@dataclass(frozen=True)
class Links:
    """How links are followed; by default they are not, for want of the files."""

    resolve: Callable[[str], str] = posixpath.normpath
    """Returns an absolute local path without links."""
    targets: Callable[[str], Iterable[str]] = lambda place: ()
    """Returns the places that links at or below a local place lead to."""


UNSEEN = Links()


def path_problems(
    config: TrainConfig, rules: PathRules | None = None, links: Links = UNSEEN
) -> list[Problem]:
    """Returns a problem for each path of a config that must not be opened.

    Without `rules` only the form is judged: on the user's own machine the operating system
    decides what may be opened, and relative paths have a meaning.
    """
    problems = []
    for field in path_fields(config):
        error = form_error(field.path, is_shared=rules is not None)
        if error is None and rules is not None:
            error = _place_error(field, rules, links)
        if error is not None:
            code, detail = error
            problems.append(Problem(field.pointer, code, detail))
    return problems


def path_fields(config: TrainConfig) -> Iterator[PathField]:
    """Yields every path of a config."""
    if config.storage is not None:
        yield PathField("/storage/path", config.storage.path, "write")
    if config.data.cache:
        yield PathField("/data/cache", config.data.cache, "write")
    yield from _source_fields("/data/train", config.data.train)
    yield from _source_fields("/data/validation", config.data.validation)
    if config.data.tokenizer.path:
        yield PathField("/data/tokenizer/path", config.data.tokenizer.path, "read")
    local_sgd = config.parallel.local_sgd
    if local_sgd is not None and local_sgd.rendezvous is not None:
        pointer = "/parallel/local_sgd/rendezvous/path"
        yield PathField(pointer, local_sgd.rendezvous.path, "write")
    if config.checkpoint.start_from:
        yield PathField("/checkpoint/start_from", config.checkpoint.start_from, "read")


def _source_fields(pointer: str, sources: tuple[DataSource, ...]) -> Iterator[PathField]:
    for number, source in enumerate(sources):
        if not source.path.startswith(f"{BUILTIN}://"):
            yield PathField(f"{pointer}/{number}/path", source.path, "read")


# ---- form


def form_error(path: str, *, is_shared: bool = False) -> tuple[str, str] | None:
    """Returns the code and the detail of what is wrong with a path's form, or None.

    A shared path means the same for every process of a cluster, so it is absolute.
    """
    shown = repr(path[:_MAX_SHOWN_CHARS])
    if _CONTROL.search(path):
        return "bad_path", "the path contains control characters, such as NUL; remove them"
    if "://" in path:
        return _uri_error(path)
    if is_shared and not path.startswith("/"):
        detail = (
            f"{shown} is relative, and nodes share no working directory; use an absolute path "
            "or a URI, or leave it out"
        )
        return "absolute", detail
    # Elsewhere `..` starts at the folder of the command.
    if is_shared and _has_traversal(path):
        return "absolute", f"{shown} contains '..'; write the path without it"
    return None


def _uri_error(uri: str) -> tuple[str, str] | None:
    # The URI is never repeated: it may contain a secret anywhere.
    scheme, _, rest = uri.partition("://")
    host = rest.partition("/")[0]
    # A secret may contain a slash itself, and then ends behind what looks like the host.
    if "@" in unquote(host) or (":" in host and "@" in rest):
        detail = (
            "the URI contains credentials; write it without them: those of the agent's "
            "environment are used"
        )
        return "bad_uri", detail
    if "?" in rest or "#" in rest:
        detail = (
            "the URI has a query or a fragment (? or #); write scheme, bucket and path only: "
            "endpoint and region are those of the agent's environment"
        )
        return "bad_uri", detail
    if scheme not in _SCHEMES:
        known = ", ".join(f"{known}://" for known in _SCHEMES)
        detail = (
            f"the scheme {scheme[:_MAX_SHOWN_CHARS]!r} is not supported; use a path or one of "
            f"{known}"
        )
        return "bad_uri", detail
    if _has_traversal(rest):
        return "bad_uri", "the URI contains '..'; write it without"
    if _CONTROL.search(unquote(rest)):
        return "bad_path", "the path contains control characters, such as NUL; remove them"
    if scheme == "file":
        return _file_uri_error(host, rest)
    return _bucket_error(scheme, host)


def _file_uri_error(host: str, rest: str) -> tuple[str, str] | None:
    path = unquote(rest.removeprefix(host))
    if host not in ("", "localhost") or not path.startswith("/"):
        detail = (
            "a file URI has three slashes and an absolute path, as in file:///data/jobs"
        )
        return "bad_uri", detail
    return None


def _bucket_error(scheme: str, host: str) -> tuple[str, str] | None:
    if _BUCKET.fullmatch(host) and not _is_address(host):
        return None
    detail = (
        f"no name of a bucket follows {scheme}://; write {scheme}://bucket/path: the "
        "endpoint is that of the agent's environment"
    )
    return "bad_uri", detail


def _is_address(host: str) -> bool:
    """Returns whether a host is this machine or an IP address in any notation."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    # 127.1 is an address too, where a name of digits alone is a bucket's.
    if "." in name and _NUMBERS.fullmatch(name):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _has_traversal(path: str) -> bool:
    # Until nothing changes: what decodes once here may be decoded again elsewhere.
    decoded = unquote(path)
    while decoded != path:
        path = decoded
        decoded = unquote(path)
    return ".." in re.split(r"[/\\]", decoded)


# ---- places


def place_of(path: str) -> str:
    """Returns one spelling of a well-formed path, so that equal places compare equal.

    That is an absolute local path, or a URI without doubled slashes and escapes.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        return _normalized(path)
    plain = unquote(rest)
    if scheme == "file":
        return _normalized(plain.removeprefix("localhost"))
    scheme = _BUCKET_SCHEMES.get(scheme, scheme)
    return f"{scheme}://{_normalized(plain).lstrip('/')}"


def is_below(place: str, prefix: str) -> bool:
    """Returns whether a place is a prefix itself or below it."""
    if place == prefix:
        return True
    return place.startswith(prefix.rstrip("/") + "/")


def _normalized(path: str) -> str:
    # POSIX lets two leading slashes mean something else, and normpath keeps them.
    return "/" + posixpath.normpath(path).lstrip("/")


def _place_error(
    field: PathField, rules: PathRules, links: Links
) -> tuple[str, str] | None:
    named = place_of(field.path)
    fixed = named
    if field.use == "read":
        # A pattern matches below its last folder without a wildcard.
        fixed = _fixed_part(named)
    prefixes = rules.storage_prefixes
    if field.use == "read":
        prefixes = (*rules.data_prefixes, *prefixes)
    open_places = [_resolved(_prefix_place(prefix), links) for prefix in prefixes]
    if rules.jobs_dir is not None:
        open_places.append(_resolved(rules.jobs_dir, links))
    for place in _places(named, fixed, "/" in open_places, links):
        if _is_private(place, field.use, rules, links):
            detail = (
                f"{named[:_MAX_SHOWN_CHARS]!r} is, or leads to, the service's own folder; "
                "use another one, or leave it out"
            )
            return "not_allowed", detail
        if not any(is_below(place, open_place) for open_place in open_places):
            return "not_allowed", _outside(field, named, prefixes)
    return None


def _places(named: str, fixed: str, is_all_open: bool, links: Links) -> Iterator[str]:
    """Yields every place that a path stands for: its own, and those that links lead to."""
    yield _resolved(named, links)
    if fixed != named:
        yield _resolved(fixed, links)
    # One after the other: what a closed link leads to is not looked at.
    if "://" not in fixed and not is_all_open:
        yield from links.targets(fixed)


def _outside(field: PathField, named: str, prefixes: tuple[str, ...]) -> str:
    """Returns why a place is refused; a link's target is not shown."""
    setting = _PREFIX_SETTINGS[field.use]
    remedy = f"ask the operator to add its folder to {setting}"
    if prefixes:
        remedy = f"use a path below {', '.join(prefixes)}, or {remedy}"
    shown = repr(named[:_MAX_SHOWN_CHARS])
    return f"{shown} is, or leads to, a place that jobs may not {field.use}; {remedy}"


def _is_private(place: str, use: Use, rules: PathRules, links: Links) -> bool:
    if rules.data_dir is None:
        return False
    data_dir = _resolved(rules.data_dir, links)
    # A job that writes around the service's folder could write into it.
    if use == "write" and is_below(data_dir, place):
        return True
    if not is_below(place, data_dir):
        return False
    if rules.jobs_dir is None:
        return True
    jobs_dir = _resolved(rules.jobs_dir, links)
    # The folder of all jobs is not that of one.
    return not is_below(place, jobs_dir) or (use == "write" and place == jobs_dir)


def _resolved(place: str, links: Links) -> str:
    if "://" in place:
        return place
    return _normalized(links.resolve(place))


def _prefix_place(prefix: str) -> str:
    scheme, separator, rest = prefix.partition("://")
    # A scheme alone stands for all of its buckets.
    if separator and not rest:
        return f"{_BUCKET_SCHEMES.get(scheme, scheme)}://"
    return place_of(prefix)


def _fixed_part(place: str) -> str:
    """Returns the part of a pattern before its first wildcard, which is a folder."""
    fixed = []
    for part in place.split("/"):
        if _WILDCARDS.search(part):
            break
        fixed.append(part)
    return "/".join(fixed) or "/"
