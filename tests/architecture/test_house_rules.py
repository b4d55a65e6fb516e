"""Budgets, names and documentation that every file keeps to."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_ray.config.base import Config
from workers.protocol.job import JobSpec

ROOT = Path(__file__).parents[2]
PACKAGES = ("service", "workers", "megatron_ray")
FILE_BUDGET = 400
FILE_LIMIT = 450
FUNCTION_BUDGET = 60
FUNCTION_LIMIT = 70
FORBIDDEN_NAMES = (
    "util",
    "utils",
    "common",
    "helper",
    "helpers",
    "manager",
    "managers",
    "misc",
)
TOP_LEVEL = {
    "service",
    "workers",
    "megatron_ray",
    "deploy",
    "tests",
    "pyproject.toml",
    "README.md",
    "Makefile",
    "constraints.txt",
}
LICENCES = ("LICENSE", "LICENCE", "NOTICE")

# Between budget and limit, with the reason why splitting would make it worse. Beyond
# the limit nothing goes.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_keep_to_their_budget() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in source_files()
    }
    assert {name: length for name, length in lengths.items() if length > FILE_LIMIT} == {}
    over = {
        name: length
        for name, length in lengths.items()
        if length > FILE_BUDGET and name not in LONG_FILES
    }
    assert over == {}, "split it, or give a reason in LONG_FILES"
    assert [name for name in LONG_FILES if lengths.get(name, 0) <= FILE_BUDGET] == [], (
        "no longer long: take it off the list"
    )


def test_functions_keep_to_their_budget() -> None:
    lengths = dict(entry for path in source_files() for entry in functions(path))
    assert {
        name: length for name, length in lengths.items() if length > FUNCTION_LIMIT
    } == {}
    over = {
        name: length
        for name, length in lengths.items()
        if length > FUNCTION_BUDGET and name not in LONG_FUNCTIONS
    }
    assert over == {}, "split it, or give a reason in LONG_FUNCTIONS"
    assert [
        name for name in LONG_FUNCTIONS if lengths.get(name, 0) <= FUNCTION_BUDGET
    ] == [], "no longer long: take it off the list"


def test_no_file_is_a_drawer() -> None:
    wrong = [
        path.relative_to(ROOT).as_posix()
        for path in [*source_files(), *(ROOT / "tests").rglob("*.py")]
        if set(re.split(r"[_.]", path.stem)) & set(FORBIDDEN_NAMES)
        or {part.lower() for part in path.parts} & set(FORBIDDEN_NAMES)
    ]
    assert wrong == []


def test_every_module_says_what_it_owns() -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in source_files()
        if path.read_text() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []


def test_tests_are_no_packages() -> None:
    assert [
        path for path in (ROOT / "tests").rglob("__init__.py") if "bench" not in path.parts
    ] == []


def config_models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for nested in nested_models(field.annotation):
            yield from config_models(nested)


def nested_models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [
        model
        for argument in getattr(annotation, "__args__", ())
        for model in nested_models(argument)
    ]


@pytest.mark.parametrize(
    "model",
    sorted(set(config_models(JobSpec)), key=lambda model: model.__name__),
    ids=lambda model: model.__name__,
)
def test_every_config_field_is_documented(model: type[BaseModel]) -> None:
    assert issubclass(model, Config), (
        f"{model.__name__} does not inherit the strict base class"
    )
    assert model.__doc__, f"{model.__name__} has no docstring"
    assert [
        name
        for name, field in model.model_fields.items()
        if not (field.description or "").strip()
    ] == []


def test_top_level_is_fixed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    extra = {
        name
        for name in top
        if name not in TOP_LEVEL and not name.startswith((".", *LICENCES))
    }
    assert extra == set()


def test_readme_commands_exist() -> None:
    targets = set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    )
    named = set(
        re.findall(
            r"\bmake ([a-z]+)\b(?! [a-z])",
            "\n".join(code_of((ROOT / "README.md").read_text())),
        )
    )
    assert {"demo", "test"} <= named, "both commands are the first thing in the README"
    assert named <= targets, f"no such make target: {sorted(named - targets)}"


def test_readme_names_only_files_that_exist() -> None:
    code = "\n".join(code_of((ROOT / "README.md").read_text()))
    named = set(re.findall(r"\b(?:deploy|tests)/[\w./-]+\.(?:yaml|py|json)\b", code))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def code_of(markdown: str) -> list[str]:
    """Lines of code: fenced, indented, or between back-quotes."""
    lines = []
    fenced = False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
        else:
            lines += re.findall(r"`([^`]+)`", line)
    return lines
