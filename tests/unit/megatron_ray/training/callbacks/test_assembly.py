"""Callbacks of installed packages report beside ours; broken ones are refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from megatron_ray.config.problem import ConfigError
from megatron_ray.training.callbacks import runner
from tests.support.installed_callback import install
from tests.support.parity import LLAMA
from tests.support.watched_run import EVERY, run_watched, watched_config


def test_an_installed_callback_reports_under_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    growth = EVERY | {"options": {"least": 1e-9}}
    config = watched_config(
        LLAMA, callbacks={"installed": {"growth": growth}, "unigram": {"every_steps": 2}}
    )
    numbers = run_watched(0, 1, config).numbers
    assert list(numbers[1]) == ["growth/share", "growth/elements"]
    assert next(iter(numbers[2])) == "unigram_entropy"
    assert 0.1 < numbers[1]["growth/share"] < 0.9
    assert numbers[1]["growth/elements"] > 50_000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "lost",
            "no_such_package.callbacks:Lost cannot be imported: ModuleNotFoundError: No "
            "module named 'no_such_package'; repair its package, which every node needs",
        ),
        ("no_callback", "made int, which is no megatron_ray.training.callbacks.protocol"),
        ("two_of_a_name", "there are two numbers 'two_of_a_name/same'"),
        ("bad_name", "it has a number 'bad_name/with, comma'; names are letters"),
        ("too_many", "report 3000 numbers a step, at most 2048 are possible"),
    ],
)
def test_callbacks_that_cannot_be_used_are_refused(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    config = watched_config(LLAMA, callbacks={"installed": {name: {}}})
    with pytest.raises(ConfigError) as caught:
        run_watched(0, 1, config)
    assert words in str(caught.value)
    assert str(caught.value).startswith("/callbacks")


@pytest.mark.parametrize(
    ("due", "reductions"),
    [
        ({}, []),
        ({"unigram": EVERY, "optimizer": EVERY}, ["SUM"]),
        ({"unigram": EVERY, "optimizer": EVERY, "activations": EVERY}, ["SUM", "MAX"]),
        ({"unigram": {"every_steps": 7}, "optimizer": {"every_steps": 7}}, []),
    ],
    ids=["none", "sums", "maxima", "not due"],
)
def test_all_numbers_of_a_step_are_reduced_together(
    due: dict[str, Any], reductions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def all_reduce(tensor: Tensor, group: Any, op: Any) -> Tensor:
        calls.append(op)
        return tensor

    monkeypatch.setattr(runner, "collectives", SimpleNamespace(all_reduce=all_reduce))
    run_watched(0, 1, watched_config(LLAMA, callbacks=due, steps=1))
    assert calls == [getattr(dist.ReduceOp, name) for name in reductions]
