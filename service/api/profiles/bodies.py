"""Defines the bodies of the public API about profiles.

Owns: their fields and descriptions. Must not know: tables, how ranks are profiled.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from megatron_ray.config.training import STEPS_PATTERN
from service.api.models import Body
from service.jobs.reports.profiles import ProfileStatus


class ProfileRequest(Body):
    """Which coming steps are to be profiled, and by which ranks."""

    steps: str = Field(pattern=STEPS_PATTERN)
    """First and last step, such as `10-12`, or a single one; at most 20."""
    ranks: tuple[Annotated[int, Field(ge=0, lt=1 << 20)], ...] = Field(
        default=(0,), min_length=1, max_length=64
    )
    """Ranks that record them."""


class _Part(Body):
    """Base of the parts of a profile, as a rank reported them."""

    # A newer rank may add fields.
    model_config = ConfigDict(extra="ignore")


class Operator(_Part):
    """One operator in all profiled steps of a rank."""

    name: str
    """Name in torch, such as `aten::mm`."""
    calls: int
    """Number of calls."""
    seconds: float
    """Time of its own, without that of operators it calls; on the GPU where there is one."""
    share: float
    """Share of that of all operators, 0 to 1."""


class RankProfile(_Part):
    """What one rank has recorded."""

    rank: int
    """Number of the rank."""
    files: tuple[str, ...] = ()
    """Names of its files in the folder: the trace and the memory."""
    seconds: float = 0.0
    """Time of the steps, with the cost of recording them."""
    operators: tuple[Operator, ...] = ()
    """The ten most expensive operators."""
    problem: str | None = None
    """Why there are no files."""


class Profile(Body):
    """Steps of a job that some ranks have profiled, or are to profile."""

    object: Literal["job.profile"] = "job.profile"
    """Kind of this object."""
    id: str
    """Id of the profile."""
    job_id: str
    """Id of the job."""
    number: int
    """Number of the request within the job; 0 for that of the spec, `training.profile`."""
    attempt: int
    """Attempt whose steps these are."""
    created_at: datetime
    """When it was requested; that of the spec, when its first rank reported it."""
    status: ProfileStatus
    """`pending` until every rank has reported; then `written` if there are any files,
    otherwise `failed`."""
    first_step: int
    """First profiled step."""
    last_step: int
    """Last profiled step."""
    ranks: tuple[int, ...]
    """Ranks that profile them."""
    folder: str
    """Path or URI of the folder that the files are written to."""
    reports: tuple[RankProfile, ...]
    """What the ranks have reported so far."""
