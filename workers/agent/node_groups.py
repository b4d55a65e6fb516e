"""Reads which nodes an autoscaler may give to the cluster.

Owns: the format of the file. Must not know: Ray, who counts the nodes.

Ray's public API does not show what its autoscaler may start, so an admin lists it:

    - {name: gpu-h100, max_nodes: 8, cpus: 96, gpus: 8, accelerator_type: H100}
    - {name: cpu, max_nodes: 4, cpus: 32, labels: {team: data}}
"""

from pathlib import Path

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.parsing.yaml_values import read_yaml
from workers.exceptions import WorkersError
from workers.protocol.wire import NodeGroup


class NodeGroupsError(WorkersError):
    """The file of node groups cannot be used; the message names the entry."""


class _ListedGroup(NodeGroup):
    """A group as the file lists it, without fields that are not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_GROUPS = TypeAdapter(tuple[_ListedGroup, ...])


def read_node_groups(path: Path) -> tuple[NodeGroup, ...]:
    """Returns the groups of a YAML file; none of an empty one. Raises NodeGroupsError."""
    try:
        values = read_yaml(path.read_text("utf-8-sig")) or []
    except OSError as error:
        raise NodeGroupsError(
            f"cannot read the node groups in {path}: {error.strerror}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise NodeGroupsError(f"the node groups in {path} are not valid YAML") from error
    try:
        groups = _GROUPS.validate_python(values)
    except ValidationError as error:
        problems = problems_from_pydantic(error.errors(), values, model=_ListedGroup)
        first = problems[0]
        message = f"the node groups in {path}: {first.pointer} {first.detail}"
        raise NodeGroupsError(message) from error
    names = set()
    for group in groups:
        if group.name in names:
            raise NodeGroupsError(
                f"the node groups in {path}: {group.name} is listed twice"
            )
        names.add(group.name)
    return groups
