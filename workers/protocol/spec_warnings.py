"""Lists what a user should know about a valid spec before its job starts.

Owns: where such warnings come from. Torch- and Ray-free. Must not know: where they are
shown.
"""

from megatron_ray.checkpoint.hf.families.registry import export_warnings
from megatron_ray.config.problem import Problem
from megatron_ray.validation import check
from workers.protocol.job import JobSpec


def spec_warnings(spec: JobSpec) -> list[Problem]:
    """Returns what is legal in a spec and may not be intended."""
    return [*check.find_warnings(spec), *export_warnings(spec.model)]


def export_notes(spec: JobSpec) -> list[str]:
    """Returns why checkpoints of a job cannot be exported, as notes of a plan.

    A plan lists the other warnings itself.
    """
    notes = []
    for warning in export_warnings(spec.model):
        notes.append(f"warning: {warning.pointer}: {warning.detail}")
    return notes
