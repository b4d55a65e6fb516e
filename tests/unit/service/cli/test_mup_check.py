"""`megatron-ray mup check`: what it trains, prints and draws."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.cli.commands.models import mup as mup_module
from tests.support.fake_rest_service import Run

SPEC: dict[str, Any] = {
    "name": "wide",
    "model": {"preset": "gpt-tiny"},
    "optimizer": {"lr": 0.002},
    "data": {"train": [{"path": "/corpus"}]},
    "training": {
        "seq_length": 32,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "steps": 5,
    },
}


def answer(growth: float) -> dict[str, Any]:
    coordinates = [{"name": "logits", "changes": [0.1, 0.1 * 2**growth], "growth": growth}]
    return {
        "widths": [64, 128],
        "steps": 5,
        "mup": coordinates,
        "standard": [{"name": "logits", "changes": [0.1, 0.4], "growth": 2.0}],
        "is_flat": growth < 0.4,
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of the library's command, whose check is flat below three steps."""
    calls: list[list[str]] = []

    def run_library(module: str, arguments: Sequence[str], needed: str) -> dict[str, Any]:
        assert (module, needed) == ("megatron_ray.training.coordinate_check", "mup")
        calls.append(list(arguments))
        return answer(0.0 if arguments[3] < "3" else 0.9)

    monkeypatch.setattr(mup_module, "run_library", run_library)
    return calls


def test_a_flat_check_is_printed_and_drawn(
    run: Run, calls: list[list[str]], tmp_path: Path
) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(SPEC))
    plot = tmp_path / "mup.svg"
    options = ["--steps", "2", "--seeds", "1", "--plot", str(plot)]
    widths = ["--width", "128", "--width", "64"]
    code, out, err = run("mup", "check", str(spec), *options, *widths)
    assert code == 0, err
    (arguments,) = calls
    fields = json.loads(arguments[1])
    assert fields["model"]["hidden_size"] == 128
    assert fields["optimizer"]["lr"] == 0.002
    assert arguments[2:] == ["--steps", "2", "--seeds", "1", "--widths", "64", "128"]
    assert "logits" in out
    assert "+2.00" in out
    assert "muP is flat" in out
    root = ET.fromstring(plot.read_text())
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2
    # Equal changes are equally high.
    narrow, wide = (lines[0].get("points") or "").split()
    assert narrow.split(",")[1] == wide.split(",")[1]


def test_a_check_that_is_not_flat_fails(run: Run, calls: list[list[str]]) -> None:
    code, out, _ = run("mup", "check", "--json")
    assert code == 1
    assert json.loads(out)["is_flat"] is False
    assert calls[0][1] == "{}"
    assert calls[0][-4:] == ["64", "128", "256", "512"]
    code, out, _ = run("mup", "check")
    assert code == 1
    assert "muP is not flat" in out


def test_mistakes_are_refused(run: Run, calls: list[list[str]]) -> None:
    code, _, err = run("mup", "check", "--width", "64")
    assert (code, "one width shows no growth" in err) == (2, True)
    code, _, err = run("mup", "check", "--set", "optimizer.lr=1")
    assert (code, "--set needs a SPEC" in err) == (2, True)
    assert calls == []
