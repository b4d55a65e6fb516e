"""The environment: torchrun's variables, tokens from files, gloo's interface."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.local_stack.ray_head import may_raise_priority
from workers.rank.environment import (
    AGENT_TOKEN,
    AGENT_TOKEN_FILE,
    InterfaceError,
    ProcessEnvironmentError,
    RankEnv,
    agent_token,
    choose_interface,
    interface_of,
    prepare_process,
    set_visible_gpu,
)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_torchrun_variables_round_trip() -> None:
    env = RankEnv.from_environ(TORCHRUN)
    assert env == RankEnv(3, 4, 1, 2, 1, "10.0.0.1", 29500)
    assert RankEnv.from_environ(env.to_environ()) == env


def test_without_torchrun_there_is_one_rank() -> None:
    assert RankEnv.from_environ({}) == RankEnv(0, 1, 0, 1)
    assert "MASTER_ADDR" not in RankEnv(0, 1, 0, 1).to_environ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"RANK": "x"}, "RANK='x' is not a whole number; start ranks with torchrun"),
        ({"RANK": "4"}, "RANK=4 is outside WORLD_SIZE=4"),
        (
            {"LOCAL_RANK": None},
            "LOCAL_RANK is not set although others of torchrun's variables are",
        ),
    ],
)
def test_half_an_environment_is_refused(change: dict[str, str | None], text: str) -> None:
    values = {
        key: value for key, value in {**TORCHRUN, **change}.items() if value is not None
    }
    with pytest.raises(ProcessEnvironmentError, match=text):
        RankEnv.from_environ(values)


def test_token_from_file_before_environment(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    assert agent_token(tmp_path / "token", {}) == "secret"
    assert (
        agent_token(None, {AGENT_TOKEN_FILE: str(tmp_path / "token"), AGENT_TOKEN: "other"})
        == "secret"
    )
    assert agent_token(None, {AGENT_TOKEN: " other "}) == "other"
    with pytest.raises(ProcessEnvironmentError, match="no agent token: give --token-file"):
        agent_token(None, {})
    with pytest.raises(
        ProcessEnvironmentError,
        match=r"cannot read the agent's token file .*: No such file",
    ):
        agent_token(tmp_path / "none", {})


def test_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("127.0.0.2") == "lo", "another address of the same interface"
    assert interface_of("::1") == "lo"
    assert interface_of("203.0.113.77") is None
    assert interface_of("2001:db8::77") is None
    assert interface_of("a-host-name") is None


def test_a_chosen_interface_is_that_of_gloo_and_nccl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    choose_interface(None)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    choose_interface("lo")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    message = r"/network/interface: node \S+ has no network interface 'ib9'; it has .*lo"
    with pytest.raises(InterfaceError, match=message):
        choose_interface("ib9")


def test_threads_are_set_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setenv("MKL_NUM_THREADS", "9")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    prepare_process(2, "127.0.0.1")
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true", "an operator's own choice wins"


def test_the_gpu_of_an_order_is_the_only_one_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    set_visible_gpu(6)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


PRIORITIES = """
import os, threading
from workers.rank.environment import lower_priority, raise_priority
def priority():
    return os.getpriority(os.PRIO_PROCESS, 0)
go, done, other = threading.Event(), threading.Event(), []
def wait():
    go.wait()
    other.append(priority())
    done.set()
before = priority()
lower_priority()
threading.Thread(target=wait).start()
lowered = priority()
raise_priority()
go.set()
done.wait()
print(before, lowered, priority(), other[0])
"""


def test_a_process_that_steps_back_and_comes_forward() -> None:
    """In a process of its own, whose priority it changes."""
    output = subprocess.run(
        [sys.executable, "-c", PRIORITIES], check=True, capture_output=True, text=True
    ).stdout
    before, lowered, raised, other = map(int, output.split())
    assert lowered == min(19, before + 10)
    assert raised == other == (0 if may_raise_priority() else lowered), (
        "all threads, those that were there before too"
    )
