"""The commands of the walk are understood by the programs that they name."""

import itertools
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from service.cli.main import app
from tests.support.manifests import KUBERNETES, OVERLAYS, ROOT, overlay

TEXT = (KUBERNETES / "README.md").read_text()
BLOCK = re.compile(r"^ *```(?:yaml)?\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
# Names that stand for the user's own.
PLACEHOLDERS = {"OVERLAY", "JOB", "JOB.yaml", "IMAGE", "POD", "NAME", "llama.yaml"}


def lines() -> Iterator[str]:
    """Yields the lines of all blocks of code and of all inline code."""
    for block in BLOCK.findall(TEXT):
        yield from block.replace("\\\n", " ").splitlines()
    outside = BLOCK.sub("", TEXT)
    yield from re.findall(r"`([^`]+)`", outside.replace("\n", " "))


def commands(program: str) -> list[list[str]]:
    """Returns the words of every command of a program, without redirections."""
    words_of_all = []
    for line in lines():
        line = line.strip()
        if line.startswith(f"{program} "):
            words = shlex.split(line.partition(" > ")[0].removesuffix("&"))
            words_of_all.append(words[1:])
    return words_of_all


@pytest.mark.parametrize("words", commands("mr"), ids=" ".join)
def test_the_command_line_understands_its_commands(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    command.make_context(words[0], [*words[1:], "--url", "u", "--token", "t"])


def test_all_steps_of_the_walk_use_the_command_line() -> None:
    used = {words[0] for words in commands("mr")}
    assert {"submit", "jobs", "plan", "cluster", "pause", "resume"} <= used


@pytest.mark.parametrize("words", commands("kubectl"), ids=" ".join)
def test_kubectl_is_given_files_and_objects_that_exist(words: list[str]) -> None:
    for option, value in itertools.pairwise(words):
        if option in ("-k", "kustomize", "-f") and value not in PLACEHOLDERS:
            assert (ROOT / value).exists(), value
    names = set()
    for name in OVERLAYS:
        for item in overlay(name).objects:
            names.add(f"{item['kind'].lower()}/{item['metadata']['name']}")
    for word in words:
        kind, _, name = word.partition("/")
        if kind in ("deployment", "raycluster", "service") and name:
            assert word in names or name == "kuberay-operator", word


@pytest.mark.parametrize("words", commands("kubectl"), ids=" ".join)
def test_kubectl_is_asked_in_the_namespace_of_the_manifests(words: list[str]) -> None:
    namespaced = {
        "get",
        "logs",
        "describe",
        "exec",
        "wait",
        "patch",
        "port-forward",
        "create",
    }
    verb = next(word for word in words if not word.startswith("-") and "ray" not in word)
    if verb in namespaced and "clusterqueue" not in words:
        assert words[words.index("-n") + 1] in ("megatron-ray", "kuberay-system")
