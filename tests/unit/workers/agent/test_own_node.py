"""The agent notices that its own node of Ray has died."""

import pytest

from workers.agent.agent import require_alive
from workers.protocol.wire import NodeInfo


def node(name: str, *, alive: bool = True) -> NodeInfo:
    return NodeInfo(node_id=name, address="10.0.0.1", alive=alive, cpus=0, gpus=0)


def test_an_agent_whose_own_node_has_died_is_cut_off_from_ray() -> None:
    with pytest.raises(ConnectionError, match=r"own node at 10\.0\.0\.1 has died"):
        require_alive((node("other"), node("own", alive=False)), "own")


def test_deaths_of_other_nodes_leave_the_agent_as_it_is() -> None:
    require_alive((node("other", alive=False), node("own")), "own")


def test_a_node_that_ray_does_not_list_yet_is_no_death() -> None:
    require_alive((), "own")
