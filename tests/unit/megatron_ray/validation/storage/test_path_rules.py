"""Every path of a config is judged by one function: its form, and the places that an
operator allows.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from megatron_ray.config.problem import Problem
from megatron_ray.exceptions import MegatronRayError, redacted
from megatron_ray.storage.errors import StorageError
from megatron_ray.validation.storage.path_rules import (
    Links,
    PathRules,
    form_error,
    path_fields,
    path_problems,
)
from workers.protocol.job import JobSpec

SECRET = "wJalrXUtnFEMI/K7MDENG"
BASE: dict[str, Any] = {
    "model": {"preset": "gpt-tiny"},
    "data": {"train": [{"path": "builtin://python-stdlib"}]},
    "training": {
        "seq_length": 64,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "steps": 1,
    },
    "optimizer": {"lr": 1e-3},
}
FIELDS: dict[str, dict[str, Any]] = {
    "/storage/path": {"storage": {"path": None}},
    "/data/cache": {"data": {**BASE["data"], "cache": None}},
    "/data/train/0/path": {"data": {"train": [{"path": None}]}},
    "/data/validation/0/path": {"data": {**BASE["data"], "validation": [{"path": None}]}},
    "/data/tokenizer/path": {
        "data": {**BASE["data"], "tokenizer": {"kind": "file", "path": None}}
    },
    "/checkpoint/start_from": {"checkpoint": {"start_from": None}},
    "/parallel/local_sgd/rendezvous/path": {
        "parallel": {
            "dp": 1,
            "local_sgd": {
                "groups": 2,
                "sync_every": 1,
                "rendezvous": {"path": None, "group": 0},
            },
        }
    },
}
MALFORMED = [
    f"s3://KEY:{SECRET}@bucket/x",
    "s3://KEY%40bucket/x",
    "s3://bucket/x?endpoint_override=127.0.0.1:9000&scheme=http",
    "s3://bucket/x?region=eu-west-1",
    "gs://bucket/x#fragment",
    "file:///data/x?query",
    "s3://127.0.0.1/x",
    "s3://127.0.0.1:9000/x",
    "s3://127.1/x",
    "s3://169.254.169.254/latest",
    "s3://[fe80::1]/x",
    "s3://localhost/x",
    "s3://sub.localhost./x",
    "s3:///x",
    "s3://",
    "S3://bucket/x",
    "http://169.254.169.254/latest/meta-data",
    "hdfs://namenode:8020/x",
    "abfs://container@account/x",
    "hf://datasets/x",
    "mock://x",
    "file://host/share",
    "file:///data/../etc",
    "file:///data/%2e%2e/etc",
    "file:///data/..%2f..%2fetc",
    "file:///data/%252e%252e/etc",
    "file:///data/..\\etc",
    "file:///data/%00",
    "s3://bucket/../other",
    "s3://bucket/%2E%2E/other",
    "gs://bucket/a/..",
    "/data/a\nb",
]
RELATIVE = ["data/x", "../x", "~/x", "file:data/x", "/data/../etc", "/data/x/.."]


def spec(pointer: str, path: str) -> JobSpec:
    return JobSpec.from_mapping({**BASE, **with_path(FIELDS[pointer], path)})


def with_path(node: Any, path: str) -> Any:
    if node is None:
        return path
    if isinstance(node, dict):
        return {key: with_path(value, path) for key, value in node.items()}
    if isinstance(node, list):
        return [with_path(value, path) for value in node]
    return node


@pytest.mark.parametrize("pointer", FIELDS)
def test_a_malformed_path_is_refused_in_every_field_on_every_road(pointer: str) -> None:
    everywhere = PathRules(("/", "s3://", "gs://"), ("/", "s3://", "gs://"))
    for path in MALFORMED:
        for rules in (None, everywhere):
            (problem,) = path_problems(spec(pointer, path), rules)
            assert problem.pointer == pointer, path
            assert SECRET not in problem.detail
            assert "KEY" not in problem.detail
    for path in RELATIVE:
        (problem,) = path_problems(spec(pointer, path), everywhere)
        assert problem.pointer == pointer, path


@pytest.mark.parametrize("path", ["/data/x", "file:///data/x", "s3://b/x", "gcs://a.b/x"])
def test_well_formed_paths_are_taken(path: str) -> None:
    everywhere = PathRules(("/", "s3://", "gs://"), ("/", "s3://", "gs://"))
    for pointer in FIELDS:
        assert path_problems(spec(pointer, path), everywhere) == []
        assert path_problems(spec(pointer, path)) == []


@pytest.mark.parametrize("path", ["x", "../x", "/a/../x"])
def test_relative_paths_keep_their_meaning_on_the_users_own_machine(path: str) -> None:
    assert form_error(path) is None


def names_a_path(name: str) -> bool:
    return name in ("path", "cache", "start_from") or name.endswith(("_path", "_dir"))


def paths_of(model: type[BaseModel]) -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        if names_a_path(name):
            names.add(f"{model.__name__}.{name}")
        for nested in nested_models(field.annotation):
            names |= paths_of(nested)
    return names


def nested_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    nested = []
    for argument in getattr(annotation, "__args__", ()):
        nested += nested_models(argument)
    return nested


def test_no_field_that_is_a_path_is_left_out() -> None:
    judged = {
        "StorageConfig.path",
        "DataConfig.cache",
        "DataSource.path",
        "TokenizerConfig.path",
        "CheckpointConfig.start_from",
        "RendezvousConfig.path",
    }
    assert paths_of(JobSpec) == judged, (
        "name the new one in validation/storage/path_rules.py"
    )
    for pointer in FIELDS:
        assert [field.pointer for field in path_fields(spec(pointer, "/x"))] == [pointer]


# ---- places


RULES = PathRules(("/corpora", "s3://text/a"), ("/scratch",), "/srv/mr", "/srv/mr/jobs")


@pytest.mark.parametrize(
    ("pointer", "path", "is_open"),
    [
        ("/data/train/0/path", "/corpora/x.txt", True),
        ("/data/train/0/path", "/corpora/**/*.txt", True),
        ("/data/train/0/path", "/corp*/x.txt", False),
        ("/data/train/0/path", "/corporation/x.txt", False),
        ("/data/train/0/path", "/scratch/run/data/x", True),
        ("/data/train/0/path", "s3://text/a/x.txt", True),
        ("/data/train/0/path", "s3://text/ab", False),
        ("/data/train/0/path", "s3://text/%61/x.txt", True),
        ("/data/train/0/path", "gs://text/a/x.txt", False),
        ("/data/train/0/path", "/etc/passwd", False),
        ("/checkpoint/start_from", "/srv/mr/jobs/job-a/checkpoints/step-1", True),
        ("/checkpoint/start_from", "/srv/mr", False),
        ("/data/tokenizer/path", "/srv/mr/tokens.json", False),
        ("/data/tokenizer/path", "/srv//mr/./tokens.json", False),
        ("/data/tokenizer/path", "file:///srv/mr/tokens.json", False),
        ("/data/cache", "/corpora/cache", False),
        ("/data/cache", "/scratch/cache", True),
        ("/storage/path", "/scratch", True),
        ("/storage/path", "s3://text/a/x", False),
        ("/storage/path", "/srv/mr/jobs/job-a", True),
        ("/storage/path", "/srv/mr/jobs", False),
        ("/storage/path", "/srv", False),
    ],
)
def test_places_outside_the_allowed_folders_are_refused(
    pointer: str, path: str, is_open: bool
) -> None:
    problems = path_problems(spec(pointer, path), RULES)
    assert problems == [] or [problem.pointer for problem in problems] == [pointer]
    assert (problems == []) is is_open


def test_the_remedy_names_the_folders_and_the_setting() -> None:
    (problem,) = path_problems(spec("/storage/path", "/etc/x"), RULES)
    assert "use a path below /scratch" in problem.detail
    assert "MEGATRON_RAY_STORAGE_PREFIXES" in problem.detail
    closed = PathRules(data_dir="/srv/mr", jobs_dir="/srv/mr/jobs")
    (problem,) = path_problems(spec("/data/train/0/path", "/etc/x"), closed)
    assert "MEGATRON_RAY_DATA_PREFIXES" in problem.detail
    (problem,) = path_problems(spec("/storage/path", "/srv/mr/logs"), RULES)
    assert "the service's own folder" in problem.detail


def test_the_services_folder_is_closed_where_everything_else_is_open() -> None:
    everywhere = PathRules(("/",), ("/",), "/srv/mr", "/srv/mr/jobs")
    for pointer in FIELDS:
        for path in ("/srv/mr", "/srv/mr/service.db", "/srv/mr/logs"):
            assert path_problems(spec(pointer, path), everywhere) != []
        assert path_problems(spec(pointer, "/srv/other"), everywhere) == []


@pytest.mark.parametrize("pointer", FIELDS)
def test_links_are_followed_where_the_files_are(pointer: str, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    closed = tmp_path / "closed"
    data_dir = tmp_path / "service"
    for folder in (allowed / "inside", closed, data_dir / "jobs"):
        folder.mkdir(parents=True)
    (allowed / "out").symlink_to(closed)
    (allowed / "own").symlink_to(data_dir)
    (allowed / "in").symlink_to(allowed / "inside")
    rules = PathRules(
        (str(allowed),), (str(allowed),), str(data_dir), str(data_dir / "jobs")
    )
    # The wire carries them as JSON.
    rules = PathRules.from_mapping(asdict(rules))
    for name in ("out", "out/x", "own/tokens.json"):
        path = str(allowed / name)
        assert path_problems(spec(pointer, path), rules) == []
        (problem,) = path_problems(spec(pointer, path), rules, Links(os.path.realpath))
        assert problem.pointer == pointer
        assert str(closed) not in problem.detail
    path = str(allowed / "in" / "x")
    assert path_problems(spec(pointer, path), rules, Links(os.path.realpath)) == []


# ---- secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot open s3://KEY:{SECRET}@b/x: no", "cannot open s3://...: no"),
        ("'s3://KEY:pw@b/x' is wrong", "'s3://...' is wrong"),
        ("at s3://b/x?token=pw, then", "at s3://b/x, then"),
        ("https://h:443/x#pw", "https://h:443/x"),
        ("use file://, s3:// or gs://.", "use file://, s3:// or gs://."),
        ("s3:/KEY:pw@b/x", "s3:/..."),
        ("a/b: c", "a/b: c"),
    ],
)
def test_messages_repeat_no_secret_of_a_uri(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert Problem("/x", "code", text).detail == shown
    assert str(MegatronRayError(text)) == shown
    assert "pw" not in str(StorageError("open", "s3://KEY:pw@b/x?pw", text))
