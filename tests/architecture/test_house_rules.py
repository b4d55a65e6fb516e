"""Budgets, names and documentation that every file keeps to."""

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_ray.config.base import Config
from tests.architecture.measures import GOALS, measure
from workers.protocol.job import JobSpec

ROOT = Path(__file__).parents[2]
PACKAGES = ("service", "workers", "megatron_ray")
FILE_BUDGET = 450
FILES_IN_A_FOLDER = 14
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
    "docs",
    "tests",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "Makefile",
    "constraints.txt",
}
LICENCES = ("LICENSE", "LICENCE", "NOTICE")

# Prose that hides what happens: only persons do what these verbs mean.
BANNED_WORDS = (
    "nobody",
    "somebody",
    "whoever",
    "hears",
    "heard",
    "hear",
    "tells",
    "told",
    "says",
    "said",
    "wants",
    "wanted",
    "wishes",
)
# Local names that say nothing of what they hold.
BANNED_NAMES = {"found", "held", "told", "heard", "said", "theirs", "wanted"}


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_files_keep_to_their_budget() -> None:
    lengths = {}
    for path in source_files():
        lengths[path.relative_to(ROOT).as_posix()] = len(path.read_text().splitlines())
    over = {name: length for name, length in lengths.items() if length > FILE_BUDGET}
    assert over == {}, "split it by meaning"


def test_folders_hold_few_files() -> None:
    files = Counter(path.parent for path in source_files() if path.name != "__init__.py")
    over = {
        str(folder): count for folder, count in files.items() if count > FILES_IN_A_FOLDER
    }
    assert over == {}, "fold it"


def test_the_tree_reads_as_well_as_the_anchors() -> None:
    values = measure([ROOT / package for package in PACKAGES])
    short = {name: value for name, value in values.items() if not GOALS[name].holds(value)}
    assert short == {}, "see tests/architecture/measures.py"


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_docstrings_and_comments_use_plain_words(package: str) -> None:
    banned = re.compile(rf"\b({'|'.join(BANNED_WORDS)})\b", re.IGNORECASE)
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for line, text in prose_of(path):
            match = banned.search(text)
            if match:
                wrong.append(f"{path.relative_to(ROOT)}:{line} {match[0]}")
    assert wrong == []


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_local_names_say_what_they_hold(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and node.id in BANNED_NAMES:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.id}")
    assert wrong == []


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the docstrings and comments of a file with their first lines."""
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, node.value.value


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


def test_unit_tests_lie_where_their_source_lies() -> None:
    unit = ROOT / "tests" / "unit"
    strays = []
    for path in unit.rglob("test_*.py"):
        folder = path.parent.relative_to(unit)
        if not (ROOT / folder).is_dir():
            strays.append(folder.as_posix())
    assert strays == []


def test_what_covers_what_names_files_that_exist() -> None:
    text = (ROOT / "tests" / "README.md").read_text()
    named = re.findall(r"`((?:unit|parallel|integration|support)/[\w./]*)`", text)
    sources = re.findall(
        r"^\| `((?:megatron_ray|workers|service)[\w./]*)`", text, re.MULTILINE
    )
    missing = [name for name in named if not (ROOT / "tests" / name).exists()]
    missing += [name for name in sources if not (ROOT / name).exists()]
    assert missing == []


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


CONFIG_MODELS = sorted(set(config_models(JobSpec)), key=lambda model: model.__name__)


@pytest.mark.parametrize("model", CONFIG_MODELS, ids=lambda model: model.__name__)
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
