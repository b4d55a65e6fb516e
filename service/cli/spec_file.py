"""Job specs from files.

Owns: reading, --set, relative paths. Must not know: the service, which validates.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_ray.config.train_config import apply_overrides, read_mapping
from service.cli.failure import CommandError

SpecFile = Annotated[
    Path, typer.Argument(help="Job spec, YAML or JSON.", metavar="SPEC", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="path.to.field=value over the spec; may be repeated.",
        metavar="PATH=VALUE",
    ),
]


def read_spec(path: Path, overrides: Iterable[str] | None) -> dict[str, Any]:
    """The spec with overrides applied. Raises Failure naming file or override."""
    try:
        values = read_mapping(path)
    except OSError as error:
        raise CommandError(
            f"cannot read the job spec {path}: {error.strerror}",
            remedy="name a YAML or JSON file",
            exit_code=2,
        ) from error
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{path} is not text", remedy="name a YAML or JSON file", exit_code=2
        ) from error
    except (ValueError, RecursionError) as error:
        raise CommandError(
            str(error),
            remedy="see deploy/jobs/stdlib-tp2.yaml for a spec that works",
            exit_code=2,
        ) from error
    _require_json(values, path)
    try:
        values = apply_overrides(values, overrides or ())
    except ValueError as error:
        raise CommandError(
            str(error), remedy="for example --set training.steps=10", exit_code=2
        ) from error
    _require_json(values, "--set")
    return anchor_paths(values, Path.cwd())


def _require_json(values: dict[str, Any], source: Path | str) -> None:
    """YAML has dates, infinities and loops, which no request can carry."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CommandError(
            f"{source} holds a value that JSON cannot: {error}",
            remedy="write a number, or quote it",
            exit_code=2,
        ) from error


def anchor_paths(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths mean what they mean where the command runs: the service and the
    ranks run in other folders.
    """

    def anchored(path: Any) -> Any:
        if not isinstance(path, str) or not path or "://" in path or path.startswith("/"):
            return path
        return str((folder / Path(path).expanduser()).absolute())

    def in_group(group: Any, key: str) -> Any:
        return (
            {**group, key: anchored(group[key])}
            if isinstance(group, dict) and key in group
            else group
        )

    result = {**spec}
    if "storage" in spec:
        result["storage"] = in_group(spec["storage"], "path")
    if "checkpoint" in spec:
        result["checkpoint"] = in_group(spec["checkpoint"], "start_from")
    data = spec.get("data")
    if isinstance(data, dict):
        data = in_group(data, "cache")
        if "tokenizer" in data:
            data = {**data, "tokenizer": in_group(data["tokenizer"], "path")}
        for split in ("train", "validation"):
            if isinstance(data.get(split), list):
                data = {**data, split: [in_group(source, "path") for source in data[split]]}
        result["data"] = data
    return result
