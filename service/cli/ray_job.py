"""Writes the RayJob of a job whose cluster is made for it alone.

Owns: name, entrypoint and number of nodes in a template of the operators'. Pure but for
reading the template. Must not know: the service, Kubernetes' API, what else a template
contains.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from megatron_ray.validation import resolution
from service.cli.failure import CommandError
from workers.protocol.job import JobSpec

# KubeRay appends to it, and names of pods have at most 63 characters.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")
_QUANTITY = re.compile(r"([0-9.]+)(m?)")
Json = dict[str, Any]


def render(template: Path, spec: JobSpec) -> str:
    """Returns the manifest of a RayJob for this job.

    Raises CommandError for a template that contains no RayJob, and for a job that a
    cluster of such nodes cannot run.
    """
    ray_job = _read(template)
    name = spec.cluster
    if _NAME.fullmatch(name) is None:
        raise CommandError(
            f"/cluster: {name!r} cannot be the name of a RayJob: at most 47 lower-case letters, "
            "digits and dashes, a letter first",
            remedy="name one that the service allows, such as --set cluster=rayjob-1",
            exit_code=2,
        )
    # The template's own name stands for the cluster wherever the entrypoint names it.
    previous = ray_job["metadata"]["name"]
    ray_job["metadata"]["name"] = name
    ray_job["spec"]["entrypoint"] = ray_job["spec"]["entrypoint"].replace(previous, name)
    group = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    nodes = _num_nodes(spec, group)
    for field in ("replicas", "minReplicas", "maxReplicas"):
        group[field] = nodes
    text: str = yaml.safe_dump(ray_job, sort_keys=False, width=100)
    return text


def _read(template: Path) -> Json:
    """Returns the one RayJob of a file. Raises CommandError."""
    try:
        documents = list(yaml.safe_load_all(template.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"cannot read the template {template}: {error}") from error
    ray_jobs = []
    for document in documents:
        if isinstance(document, dict) and document.get("kind") == "RayJob":
            ray_jobs.append(document)
    if len(ray_jobs) != 1:
        raise CommandError(
            f"{template} contains {len(ray_jobs)} RayJobs, expected one",
            remedy="see deploy/kubernetes/rendered/rayjob-template.yaml for a valid template",
            exit_code=2,
        )
    return ray_jobs[0]


def _num_nodes(spec: JobSpec, group: Json) -> int:
    """Returns how many nodes of a group the job needs. Raises CommandError."""
    if spec.parallel.dp == "auto":
        raise CommandError(
            "/parallel/dp: auto takes what a cluster has, and this one is made for the job",
            remedy="name the number of replicas, such as --set parallel.dp=2",
            exit_code=2,
        )
    tp = spec.parallel.tp
    ranks_per_node = _ranks_per_node(spec, group)
    groups_per_node = ranks_per_node // tp
    if groups_per_node == 0:
        raise CommandError(
            f"/parallel/tp: {tp} ranks must share a node, and a node of the template's group "
            f"{group['groupName']!r} has room for {ranks_per_node}",
            remedy="lower tp, or use a template with larger nodes",
            exit_code=2,
        )
    return math.ceil(resolution.world_size(spec) // tp / groups_per_node)


def _ranks_per_node(spec: JobSpec, group: Json) -> int:
    """Returns the ranks that one node has room for, by the resources that KubeRay gives to Ray."""
    resources = group["template"]["spec"]["containers"][0].get("resources", {})
    limits = resources.get("limits", {})
    options = group.get("rayStartParams", {})
    gpus = options.get("num-gpus", limits.get("nvidia.com/gpu", 0))
    cpus = options.get(
        "num-cpus", limits.get("cpu", resources.get("requests", {}).get("cpu", 0))
    )
    ranks = math.floor(math.ceil(_quantity(cpus)) / spec.resources.cpus_per_rank)
    has_gpus = _quantity(gpus) > 0
    if spec.resources.accelerator == "gpu" or (
        spec.resources.accelerator == "auto" and has_gpus
    ):
        return min(ranks, int(_quantity(gpus)))
    return ranks


def _quantity(value: str | float) -> float:
    """Returns a number of Kubernetes, as in 8 or 500m. Raises CommandError."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise CommandError(
            f"the template has {value!r} where a number of CPUs or GPUs stands"
        )
    if match[2]:
        return float(match[1]) / 1000
    return float(match[1])
