"""Plans a job in this process, from its spec alone.

Owns: the checks and estimates that need neither a service nor a cluster. Must not know:
how a plan is printed.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ray.planning.answers import estimates, without_cluster
from megatron_ray.planning.hardware import Hardware, hardware_named
from megatron_ray.validation import check, resolution
from service.cli.failure import CommandError
from service.cli.spec_parsing import parse_spec, problems_failure
from workers.decisions.elasticity import elastic_problems
from workers.protocol.job import JobSpec
from workers.protocol.spec_warnings import export_notes


def make_plan(
    values: Mapping[str, Any], hardware: str | None, ranks: int | None
) -> dict[str, Any]:
    """Returns the plan of a spec, with the fields of the service's plans.

    Raises CommandError when the spec cannot run anywhere.
    """
    device = _device(hardware)
    spec = _with_length(_checked(values, device, ranks))
    return without_cluster.make_plan(spec, device, ranks, export_notes(spec))


def make_suggestions(
    values: Mapping[str, Any], hardware: str | None, ranks: int | None
) -> dict[str, Any]:
    """Returns the fastest layouts of a spec, with the fields of the service's answer.

    Raises CommandError when the spec cannot run anywhere, or no device is named.
    """
    device = _device(hardware)
    if device is None:
        raise CommandError(
            "no device to suggest layouts for", remedy="set --hardware, such as H100"
        )
    if ranks is not None and ranks > estimates.MAX_RANKS:
        raise CommandError(f"--ranks {ranks}: at most {estimates.MAX_RANKS}", exit_code=2)
    # The number of ranks is that of the layouts, not that of the spec's own degrees.
    spec = _checked(values, device, None)
    return without_cluster.make_suggestions(spec, device, ranks)


def _with_length(spec: JobSpec) -> JobSpec:
    """Fills in the steps of a number of epochs when this machine has the prepared data."""
    cache = spec.data_cache
    if spec.training.epochs is None or cache is None:
        return spec
    # Imported here: no other plan needs pyarrow and tokenizers.
    from megatron_ray.data.prepared_length import num_prepared_tokens

    num_tokens = num_prepared_tokens(spec.data, cache)
    if num_tokens is None:
        return spec
    resolved = resolution.with_length(spec, num_tokens)
    assert isinstance(resolved, JobSpec)
    return resolved


def _device(name: str | None) -> Hardware | None:
    if name is None:
        return None
    device = hardware_named(name)
    if device is None:
        raise CommandError(without_cluster.unknown_hardware(name), exit_code=2)
    return device


def _checked(
    values: Mapping[str, Any], device: Hardware | None, ranks: int | None
) -> JobSpec:
    spec = parse_spec(values)
    problems = [*check.find_problems(spec, ranks), *elastic_problems(spec)]
    problems = problems or estimates.size_problems(without_cluster.fewest_ranks(spec))
    if problems:
        raise problems_failure("the job spec is invalid", problems)
    resources = spec.resources
    if device is not None and resources.accelerator == "auto":
        accelerator = "cpu"
        if device.device.type == "cuda":
            accelerator = "gpu"
        resources = resources.model_copy(update={"accelerator": accelerator})
    return spec.model_copy(update={"resources": resources})
