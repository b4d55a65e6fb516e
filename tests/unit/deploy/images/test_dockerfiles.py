"""Images are made of pinned packages, and run as a user who may do little."""

import re
import shlex
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.support.manifests import ROOT, overlay

IMAGES = ROOT / "deploy/images"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(name: str) -> list[tuple[str, str]]:
    """Returns the instructions of a Dockerfile in order, with their arguments."""
    text = (IMAGES / name / "Dockerfile").read_text().replace("\\\n", " ")
    rows = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            word, _, rest = line.strip().partition(" ")
            rows.append((word, rest))
    return rows


def pins() -> dict[str, str]:
    """Returns the version of every pinned package by its normalized name."""
    versions = {}
    for line in (IMAGES / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            versions[normalized(name)] = version
    return versions


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_dependencies_are_pinned_within_their_bounds() -> None:
    versions = pins()
    declared = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["postgres"],
    ]
    for text in declared:
        requirement = Requirement(text)
        version = versions[normalized(requirement.name)]
        assert requirement.specifier.contains(version), text


def test_torch_and_ray_are_those_of_the_constraints() -> None:
    versions = pins()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if name in ("torch", "ray"):
            assert versions[name] == version


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_whatever_is_copied_exists_and_is_not_ignored(name: str) -> None:
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for word, rest in instructions(name):
        if word == "COPY" and "--from" not in rest:
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in allowed


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_last_stage_runs_as_the_user_of_the_manifests(name: str) -> None:
    rows = instructions(name)
    users = [rest for word, rest in rows if word == "USER"]
    context = overlay("dev").pod("ray-head").spec["securityContext"]
    assert users == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    last_stage = max(index for index, (word, _) in enumerate(rows) if word == "FROM")
    assert ("COPY", "--from=build /opt/venv /opt/venv") in rows[last_stage:]
    # Manifests start python and ray by name.
    assert any("PATH=/opt/venv/bin:$PATH" in rest for _, rest in rows[last_stage:])


def test_both_images_have_one_python() -> None:
    bases = set()
    for name in ("cpu", "gpu"):
        bases.add(next(rest for word, rest in instructions(name) if word == "ARG"))
    assert len(bases) == 1
