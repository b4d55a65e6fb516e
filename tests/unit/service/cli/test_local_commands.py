"""Commands that work on this machine: generate, convert, data, down, demo."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.cli.commands.models import generate as generate_module
from service.cli.commands.models import verify as verify_module
from service.cli.failure import CommandError
from service.cli.library import as_arguments
from tests.support.fake_rest_service import FakeService, Run
from workers.protocol.version import code_version


def test_generate_takes_the_newest_checkpoint_of_a_job(
    run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, dict[str, Any]]] = []

    def generated(
        checkpoint: str,
        prompt: str,
        options: dict[str, Any],
        on_text: Callable[[str], None],
    ) -> dict[str, Any]:
        asked.append((checkpoint, prompt, options))
        on_text("(self)")
        on_text(":")
        return {"prompt": prompt, "text": "(self):"}

    monkeypatch.setattr(generate_module, "run_generation", generated)
    page = {
        "data": [
            {"step": 5, "attempt": 1, "path": "/old"},
            {"step": 10, "attempt": 2, "path": "/new"},
        ]
    }
    service.routes["GET /v1/jobs/job-abc/checkpoints"] = (200, page)
    options = ["--seed", "7", "--special-tokens", "<s>", "--special-tokens", "</s>"]
    code, out, _ = run(
        "generate", "job-abc", "--prompt", "def f", *options, "--url", service.url
    )
    assert code == 0
    assert out == "def f(self):\n"
    assert asked[0][:2] == ("/new", "def f")
    assert asked[0][2]["--seed"] == 7
    assert as_arguments(asked[0][2])[-4:] == [
        *("--special-tokens", "<s>"),
        *("--special-tokens", "</s>"),
    ]
    service.routes["GET /v1/jobs/job-abc/checkpoints"] = (200, {"data": []})
    assert (
        "no committed checkpoint yet" in run("generate", "job-abc", "--url", service.url)[2]
    )


def test_a_failed_generation_reports_its_last_error_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate_module, "_MODULE", "service.no_such_module")
    with pytest.raises(CommandError, match=r"No module named service\.no_such_module"):
        generate_module.run_generation("/x", "", {})


def test_convert_imports_and_exports(
    run: Run, service: FakeService, tmp_path: Path
) -> None:
    from tests.support.hf_folders import (
        publish,
    )  # takes seconds that no other test here needs

    publish("llama", tmp_path / "hf")
    code, out, err = run("convert", "import", "hf", "ours")
    assert code == 0, err
    assert "wrote ours: 21 tensors of llama" in out
    assert "megatron-ray submit ours/spec.yaml" in out
    service.routes["GET /v1/jobs/job-abc/checkpoints"] = (
        200,
        {"data": [{"step": 5, "attempt": 1, "path": str(tmp_path / "ours")}]},
    )
    code, out, err = run(
        "convert",
        "export",
        "job-abc",
        "again",
        "--dtype",
        "bf16",
        "--max-shard-size",
        "0.02MB",
        "--json",
        "--url",
        service.url,
    )
    assert code == 0, err
    assert len(json.loads(out)["files"]) > 1
    code, out, err = run("convert", "import", "hf", "ours", "--json")
    assert code == 1
    assert out == ""
    assert "it is there already" in err
    assert run("convert", "export", "ours", "x", "--dtype", "int4")[0] == 2
    assert (
        "use a number and a unit"
        in run("convert", "export", "ours", "x", "--max-shard-size", "many")[2]
    )


def test_data_prepare_checks_the_spec_here(run: Run) -> None:
    code, _, err = run(
        "data", "prepare", "spec.yaml", "--cache", "cache", "--set", "training.stepz=1"
    )
    assert code == 2
    assert "/training/stepz" in err
    code, _, err = run("data", "prepare", "spec.yaml")
    assert code == 2
    assert "--cache" in err
    code, _, err = run("data", "prepare", "spec.yaml", "--cache", "cache", "--json")
    assert code == 2
    assert json.loads(err)["errors"][0]["pointer"] == "/data/train/0/path"


def test_data_prepare(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(
        "\n\n".join(f"document {index} " + "word " * 200 for index in range(50))
    )
    code, out, err = run(
        "data",
        "prepare",
        "spec.yaml",
        "--cache",
        "cache",
        "--json",
        "--set",
        "data.validation_fraction=0",
    )
    assert code == 0, err
    prepared = json.loads(out)
    assert prepared["vocab_size"] >= 257
    assert "corpus.txt: " in prepared["first_document"]
    assert "'d', " in prepared["first_document"]


def test_epochs_are_steps_where_the_data_are_prepared(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(
        "\n\n".join(f"document {index} " + "word " * 200 for index in range(50))
    )
    given = ["spec.yaml", "--set", "training.epochs=3", "--set", "data.cache=cache"]
    plan = ("plan", *given, "--hardware", "CPU")
    assert "the number of steps of training.epochs follows" in run(*plan)[1]
    out = run("data", "prepare", *given)[1]
    assert "training tokens in 1 document," in out
    steps = re.search(r"training\.epochs=3 makes ([\d,]+) steps of", out)
    assert steps is not None
    assert f"{steps[1]} steps of" in run(*plan)[1]


def test_down_when_nothing_is_up(run: Run) -> None:
    code, out, _ = run("down")
    assert code == 0
    assert "nothing is up" in out
    assert json.loads(run("down", "--json")[1])["was_up"] is False


def test_demo_without_its_spec(run: Run) -> None:
    code, _, err = run("demo", "--spec", "nowhere.yaml")
    assert code == 2
    assert "cannot read the job spec nowhere.yaml" in err


def test_a_data_dir_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("up", "--data-dir", "file/below")
    assert code == 1
    assert "cannot write to the data dir" in err
    assert "--data-dir" in err
    code, _, err = run("up", "--detach", "--data-dir", "file/below")
    assert code == 1
    assert "cannot write to the data dir" in err


def test_usage_mistakes_end_with_code_2(run: Run) -> None:
    assert run("submit")[0] == 2
    assert run("nonsense")[0] == 2
    assert run("jobs", "--limit", "0")[0] == 2


def test_commands_without_a_service_refuse_credentials_in_a_uri(run: Run) -> None:
    uri = "s3://KEY:pa/ss@bucket/x?endpoint_override=127.0.0.1:9"
    for arguments in (
        ("data", "prepare", "spec.yaml", "--cache", "c", "--set", f"data.cache={uri}"),
        ("convert", "import", uri, "out"),
        ("convert", "export", uri, "out"),
        ("generate", uri, "--prompt", "x"),
    ):
        code, out, err = run(*arguments)
        assert code == 2, arguments
        assert "the URI contains credentials" in err
        assert "pa/ss" not in out + err


def test_the_version_is_printed_without_a_command(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out) == (0, f"megatron-ray {code_version()}\n")


def test_a_shell_completes_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MEGATRON_RAY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "megatron-ray ch")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = run()
    names = ["checkpoint-now", "checkpoints", "checkpoint"]
    assert (code, out.split()) == (0, names)


def test_damage_of_a_checkpoint_is_listed_and_fails_the_command(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer: dict[str, Any] = {
        "path": "/c",
        "files": 6,
        "bytes": 2**20,
        "damage": [],
        "unchecked": ["data/rank-00000.bin"],
    }
    calls: list[tuple[str, list[str], str]] = []

    def verified(module: str, arguments: list[str], needed: str) -> dict[str, Any]:
        calls.append((module, arguments, needed))
        return answer

    monkeypatch.setattr(verify_module, "run_library", verified)
    code, out, _ = run("checkpoint", "verify", "/c")
    assert code == 0
    assert out == (
        "not checked: data/rank-00000.bin has no digests, only its size is known\n"
        "/c: whole, 6 files, 1.0 MiB\n"
    )
    assert calls == [("megatron_ray.checkpoint.integrity", ["/c"], "damage")]
    answer["damage"] = ["file index.json is missing"]
    code, out, _ = run("checkpoint", "verify", "/c")
    assert code == 1
    assert "damaged: file index.json is missing\n" in out
    assert out.endswith("/c: damaged in 1 places, 6 files, 1.0 MiB\n")
    code, out, _ = run("checkpoint", "verify", "/c", "--json")
    assert code == 1
    assert json.loads(out) == answer
    assert run("checkpoint", "verify", "ftp://x/c")[0] == 2
