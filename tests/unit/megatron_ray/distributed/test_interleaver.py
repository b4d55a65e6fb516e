"""Two passes that take turns, and what happens when one of them fails."""

from collections.abc import Callable
from threading import get_ident

import pytest
import torch

from megatron_ray.distributed.interleaver import Interleaver, Pass
from megatron_ray.ops.autograd import AutogradFunction


class Log:
    """Notes in which order passes run."""

    def __init__(self) -> None:
        self.interleaver = Interleaver(torch.device("cpu"))
        self.lines: list[str] = []
        self.threads: set[int] = set()

    def counting(self, name: str, switches: int) -> Pass:
        """A pass that is in so many exchanges."""

        def run() -> None:
            for number in range(switches):
                self.lines.append(f"{name}{number}")
                self.interleaver.switch()
            self.lines.append(f"{name}{switches}")

        return self.noted(name, run)

    def noted(self, name: str, run: Callable[[], None]) -> Pass:
        def enter() -> None:
            self.threads.add(get_ident())
            self.lines.append(f"+{name}")

        return Pass(run, enter, lambda: self.lines.append(f"-{name}"))


def test_passes_take_turns() -> None:
    log = Log()
    log.interleaver.run(log.counting("f", 2), log.counting("b", 2))
    assert log.lines == [
        *("+f", "f0", "-f", "+b", "b0", "-b"),
        *("+f", "f1", "-f", "+b", "b1", "-b"),
        *("+f", "f2", "-f", "+b", "b2", "-b"),
    ]
    assert len(log.threads) == 2


@pytest.mark.parametrize(
    ("first", "second", "lines"),
    [
        (0, 0, "+f f0 -f +b b0 -b"),
        (2, 0, "+f f0 -f +b b0 -b +f f1 f2 -f"),
        (0, 2, "+f f0 -f +b b0 b1 b2 -b"),
        (1, 3, "+f f0 -f +b b0 -b +f f1 -f +b b1 b2 b3 -b"),
    ],
)
def test_a_pass_goes_on_alone_when_the_other_has_ended(
    first: int, second: int, lines: str
) -> None:
    log = Log()
    log.interleaver.run(log.counting("f", first), log.counting("b", second))
    assert " ".join(log.lines) == lines


def test_nothing_happens_outside_of_a_pair() -> None:
    log = Log()
    log.counting("f", 2).run_alone()
    assert log.lines == ["+f", "f0", "f1", "f2", "-f"]


def test_gradients_are_enabled_in_both_passes() -> None:
    log = Log()
    enabled: list[bool] = []

    def run() -> None:
        with torch.no_grad():
            log.interleaver.switch()
        enabled.append(torch.is_grad_enabled())

    log.interleaver.run(log.noted("f", run), log.noted("b", run))
    assert enabled == [True, True]


@pytest.mark.parametrize("fails_first", [False, True])
@pytest.mark.parametrize("switches", [0, 1, 2])
def test_the_error_of_one_pass_stops_the_other(fails_first: bool, switches: int) -> None:
    log = Log()
    stopped: list[bool] = []

    def fail() -> None:
        for _ in range(switches):
            log.interleaver.switch()
        raise ConnectionError("rank 3 is gone")

    def go_on() -> None:
        is_stopped = True
        try:
            for _ in range(10):
                log.interleaver.switch()
            is_stopped = False
        finally:
            stopped.append(is_stopped)

    passes = [log.noted("f", fail), log.noted("b", go_on)]
    if not fails_first:
        passes.reverse()
    with pytest.raises(ConnectionError, match="rank 3 is gone"):
        log.interleaver.run(*passes)
    # A pass that has not begun does not begin.
    has_begun = switches > 0 or not fails_first
    assert stopped == [True] * has_begun
    # The next pair is not affected.
    log.lines.clear()
    log.interleaver.run(log.counting("f", 1), log.counting("b", 0))
    assert " ".join(log.lines) == "+f f0 -f +b b0 -b +f f1 -f"


def test_a_backward_pass_can_be_interrupted_in_the_middle() -> None:
    log = Log()

    class Exchange(AutogradFunction[torch.Tensor]):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            log.lines.append("forward")
            log.interleaver.switch()
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            log.lines.append("backward")
            log.interleaver.switch()
            return grad

    def pass_through(x: torch.Tensor) -> torch.Tensor:
        return Exchange.apply(Exchange.apply(x))

    first = torch.ones(3, requires_grad=True)
    loss = pass_through(first).sum()
    second = torch.ones(3, requires_grad=True)
    results: list[torch.Tensor] = []
    log.lines.clear()
    log.interleaver.run(
        log.noted("f", lambda: results.append(pass_through(second).sum())),
        log.noted("b", loss.backward),
    )
    words = [line for line in log.lines if line[0] not in "+-"]
    assert words == ["forward", "backward", "forward", "backward"]
    results[0].backward()
    assert first.grad is not None
    assert second.grad is not None
    assert torch.equal(first.grad, second.grad)
