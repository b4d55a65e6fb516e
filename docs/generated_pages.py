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
from service.http.errors import PROBLEM_TYPES
from service.http.openapi import INTERNAL_CODES, operations
from service.settings import Settings
from workers.protocol.job import JobSpec


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
        meaning = one_line(field.description)
        lines.append(table_row(f"`{name}`", type_name(field), default(field), meaning))
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
    """Returns one section for each tag with its operations, then the errors and types."""
    lines = ["# REST API", "", document["info"]["description"], ""]
    lines += [
        "This page is generated from the OpenAPI document that the service serves at",
        "`/openapi.json`; a client can be generated from it too.",
        "",
    ]
    for tag in document["tags"]:
        lines += [f"## {tag['name'].capitalize()}", "", tag["description"], ""]
        for path, method, operation in operations(document):
            if operation["tags"] == [tag["name"]]:
                lines += route(method, path, operation)
    lines += errors_section()
    lines += ["## Types", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += schema_section(name, schema)
    return "\n".join(lines)


def route(method: str, path: str, operation: dict[str, Any]) -> list[str]:
    """Returns the section of one operation."""
    lines = [f"### {method.upper()} {path}", "", operation["description"], ""]
    parameters = operation.get("parameters", [])
    if parameters:
        lines += ["| parameter | in | type | meaning |", "| --- | --- | --- | --- |"]
        for item in parameters:
            # All may be left out but those of the path, so "or null" would be noise.
            kind = schema_type(item["schema"]).removesuffix(" or null")
            meaning = one_line(item["description"])
            lines.append(table_row(f"`{item['name']}`", item["in"], kind, meaning))
        lines.append("")
    body = operation.get("requestBody")
    if body is not None:
        content = body["content"]["application/json"]
        lines += [f"Body: {schema_type(content['schema'])}", ""]
        lines += example(content)
    statuses = []
    for status, answer in operation["responses"].items():
        if "$ref" in answer:
            statuses.append(status)
            continue
        lines += success(status, answer)
    return [*lines, f"Errors: {', '.join(statuses)}", ""]


def success(status: str, answer: dict[str, Any]) -> list[str]:
    """Returns what an answer other than an error has."""
    contents = answer.get("content", {})
    lines = [f"Answer {status}", ""]
    for media_type, content in contents.items():
        schema = content.get("schema", {})
        lines = [f"Answer {status}: {schema_type(schema)}, `{media_type}`", ""]
        lines += example(content)
    return lines


def example(content: dict[str, Any]) -> list[str]:
    """Returns a body's example, folded."""
    if "example" not in content:
        return []
    text = json.dumps(content["example"], indent=2)
    folded = ['??? example "Example"', "", "    ```json"]
    folded += [f"    {line}" for line in text.splitlines()]
    return [*folded, "    ```", ""]


def errors_section() -> list[str]:
    """Returns the table of all error codes that users meet."""
    lines = ["## Errors", ""]
    lines += [
        "`type` of a problem is `urn:megatron-ray:problem:` and its code.",
        "",
        "| code | status | title |",
        "| --- | --- | --- |",
    ]
    for code, kind in PROBLEM_TYPES.items():
        if code not in INTERNAL_CODES:
            lines.append(table_row(f"`{code}`", str(kind.status), kind.title))
    return [*lines, ""]


def schema_section(name: str, schema: dict[str, Any]) -> list[str]:
    """Returns the fields or the values of one type."""
    lines = [f"### {name}", "", one_line(schema.get("description")), ""]
    if "enum" in schema:
        values = ", ".join(f"`{value}`" for value in schema["enum"])
        return [*lines, f"One of {values}.", ""]
    lines += ["| field | type | meaning |", "| --- | --- | --- |"]
    for field, value in schema.get("properties", {}).items():
        meaning = one_line(value.get("description"))
        lines.append(table_row(f"`{field}`", schema_type(value), meaning))
    return [*lines, ""]


def schema_type(schema: dict[str, Any]) -> str:
    """Returns a schema's type as a reader writes it, with links to other types."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf"):
        if union in schema:
            kinds = dict.fromkeys(schema_type(part) for part in schema[union])
            return " or ".join(kinds)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {schema_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def table_row(*cells: str) -> str:
    """Returns one row of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
