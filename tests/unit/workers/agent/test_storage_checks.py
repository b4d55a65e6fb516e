"""When a node's access to the storage is checked."""

from pathlib import Path
from typing import Any

import pytest

from workers.agent import checks
from workers.agent.checks import StorageChecks
from workers.decisions.cluster_growth import NODE_GROUP_LABEL
from workers.protocol.wire import NodeInfo


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes that were checked, in this order; a check is done at once."""
    nodes: list[str] = []

    def on_node(node_id: str, *_: Any) -> str:
        nodes.append(node_id)
        return node_id

    monkeypatch.setattr(checks, "on_node", on_node)
    monkeypatch.setattr(checks, "is_done", lambda call: True)
    monkeypatch.setattr(checks, "result", lambda call: not call.startswith("blind"))
    # Every check is due again at once.
    monkeypatch.setattr(checks, "_REPEAT_S", 0.0)
    monkeypatch.setattr(checks, "_RETRY_S", 0.0)
    return nodes


def node(name: str, group: str | None = None) -> NodeInfo:
    labels = {} if group is None else {NODE_GROUP_LABEL: group}
    return NodeInfo(node_id=name, address=name, labels=labels)


def test_a_node_that_an_autoscaler_removes_when_idle_is_not_kept_by_checks(
    tmp_path: Path, checked: list[str]
) -> None:
    storage = StorageChecks(str(tmp_path), ["gpu"])
    nodes = [node("fixed"), node("grown", "gpu"), node("other", "cpu")]
    for _ in range(3):
        storage.update(nodes)
    assert checked.count("fixed") == 3
    assert checked.count("other") == 3
    assert checked.count("grown") == 1
    assert storage.results() == {"fixed": True, "grown": True, "other": True}


def test_it_is_checked_until_it_reads_the_storage(
    tmp_path: Path, checked: list[str]
) -> None:
    storage = StorageChecks(str(tmp_path), ["gpu"])
    for _ in range(3):
        storage.update([node("blind", "gpu")])
    assert checked == ["blind", "blind", "blind"]
