"""Generates the two reference pages of the documentation while mkdocs builds it.

The job spec's page comes from the docstrings under the config's own fields, the REST page
from the OpenAPI document of the service, so neither can say anything else than the code.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).parents[1]))

from service.app import create_app
from service.settings import Settings
from workers.protocol.job import JobSpec

METHODS = ("get", "post", "patch", "put", "delete")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those found in the folder (mkdocs calls this)."""
    pages = {"job-spec.md": job_spec_page(), "rest-api.md": rest_page(openapi())}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def openapi() -> dict[str, Any]:
    """Returns the document that the service serves at /openapi.json."""
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(Settings(data_dir=Path(folder)))
        return app.openapi()


# ---- the job spec


def job_spec_page() -> str:
    """Returns one table of fields for each part of the job spec."""
    lines = [
        "# Job spec",
        "",
        "A job spec is YAML or JSON. Unknown fields are refused. `--set path.to.field=value`",
        "changes one field on every command that takes a spec. This page is generated from the",
        "configuration classes.",
        "",
    ]
    lines += section("Top level", JobSpec)
    seen: set[type[BaseModel]] = {JobSpec}
    for path, model in nested(JobSpec, ""):
        if model not in seen:
            seen.add(model)
            lines += section(f"`{path}`", model)
    return "\n".join(lines)


def nested(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yields every config class below a model with the dotted path at which it stands."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        for part in models_in(field.annotation):
            yield path, part
            yield from nested(part, f"{path}.")


def models_in(annotation: object) -> list[type[BaseModel]]:
    """Returns the config classes that an annotation names, inside unions and tuples too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    models = []
    for argument in getattr(annotation, "__args__", ()):
        models += models_in(argument)
    return models


def section(title: str, model: type[BaseModel]) -> list[str]:
    """Returns heading, description and table of one config class."""
    lines = [f"## {title}", "", one_line(model.__doc__), ""]
    lines += ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", type_name(field), default(field), one_line(field.description))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def type_name(field: FieldInfo) -> str:
    """Returns a field's type as a reader writes it, with its bounds."""
    if models_in(field.annotation):
        return "group"
    text = str(field.annotation)
    if isinstance(field.annotation, type):
        text = field.annotation.__name__
    text = text.replace("typing.", "")
    bounds = [str(bound) for bound in field.metadata if "=" in str(bound)]
    return f"`{text}`" + (f" {', '.join(bounds)}" if bounds else "")


def default(field: FieldInfo) -> str:
    """Returns a field's default, or that it is required."""
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value, default=str)}`"


def one_line(text: str | None) -> str:
    """Returns a docstring as one line of Markdown."""
    return " ".join((text or "").split())


# ---- the REST API


def rest_page(document: dict[str, Any]) -> str:
    """Returns one section for each route, in the order of their paths."""
    lines = [
        "# REST API",
        "",
        "Errors are `application/problem+json` (RFC 9457) with a stable `code`; wrong fields are",
        "named by JSON pointer. This page is generated from the OpenAPI document that the service",
        "serves at `/openapi.json`.",
        "",
    ]
    for path in sorted(document["paths"]):
        for method in METHODS:
            operation = document["paths"][path].get(method)
            if operation is not None:
                lines += route(method, path, operation)
    lines += ["# Types", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += schema_section(name, schema)
    return "\n".join(lines)


def route(method: str, path: str, operation: dict[str, Any]) -> list[str]:
    """Returns the section of one operation."""
    summary = operation.get("description") or operation.get("summary", "")
    lines = [f"## {method.upper()} {path}", "", one_line(summary), ""]
    parameters = operation.get("parameters", [])
    if parameters:
        lines += ["| parameter | in | meaning |", "| --- | --- | --- |"]
        for item in parameters:
            lines.append(
                f"| `{item['name']}` | {item['in']} | {one_line(item.get('description'))} |"
            )
        lines.append("")
    answers = []
    for status, answer in sorted(operation["responses"].items()):
        answers.append(f"- {status}: {one_line(answer.get('description'))}")
    return [*lines, *answers, ""]


def schema_section(name: str, schema: dict[str, Any]) -> list[str]:
    """Returns the fields of one type, or nothing for a type without fields."""
    properties = schema.get("properties")
    if not properties:
        return []
    lines = [f"## {name}", "", one_line(schema.get("description")), ""]
    lines += ["| field | meaning |", "| --- | --- |"]
    for field, value in properties.items():
        meaning = one_line(value.get("description")).replace("|", "\\|")
        lines.append(f"| `{field}` | {meaning} |")
    return [*lines, ""]
