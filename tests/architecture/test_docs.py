"""The documentation builds, its examples run, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs/pages").rglob("*.md")),
]
ON_GITHUB = [*PAGES[:2], ROOT / "deploy/README.md"]
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
# A path of the repository, not of a storage (`attempts/NNNN.json`) or of a user.
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|yaml|md|toml)")
FOLDER = re.compile(r"(?:megatron_ray|workers|service|tests|docs|deploy)(?:/[\w.-]+)*/")
MADE_BY_USERS = {"qwen3/spec.yaml"}


def quoted(page: Path) -> list[str]:
    """Returns what stands between back-quotes, outside of fenced blocks."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    missing = []
    for text in quoted(page):
        for word in text.split():
            is_path = PATH.fullmatch(word) or FOLDER.fullmatch(word)
            if is_path and word not in MADE_BY_USERS and not (ROOT / word).exists():
                missing.append(word)
    assert missing == []


@pytest.mark.parametrize("page", ON_GITHUB, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_outside_of_the_pages_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    relative = [link for link in links if "://" not in link]
    assert relative
    assert [link for link in relative if not (page.parent / link).exists()] == []


def test_the_tour_has_a_line_for_every_folder() -> None:
    tree = (ROOT / "docs/pages/code-tour.md").read_text().split("## The tree")[1]
    missing = []
    for package in ("megatron_ray", "workers", "service"):
        for folder in (ROOT / package).rglob("*/"):
            is_code = any(folder.glob("[a-z]*.py")) and folder.name != "versions"
            if is_code and f" {folder.name}/ " not in tree:
                missing.append(str(folder.relative_to(ROOT)))
    assert missing == []


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", "docs/mkdocs.yml"]
    result = subprocess.run(
        [*command, "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "HOME": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for page in ("index.html", "job-spec/index.html", "rest-api/index.html"):
        assert (tmp_path / "site" / page).exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 5000)
    program = (
        f"import pathlib, runpy; main = runpy.run_path({str(example)!r})['main']; "
        f"main(pathlib.Path({str(tmp_path)!r}), {str(corpus)!r}, steps=2)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "step=2" in result.stdout
