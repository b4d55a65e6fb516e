"""Defines the learning-rate schedule.

Must not know: the batch, the length of the run.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config

UNITS = ("steps", "samples", "tokens", "fraction")
"""Units in which the lengths of a schedule are given, each at most in one of them."""
PARTS = ("warmup", "decay", "wsd_decay")
"""Parts of a schedule with a length: the fields `warmup_steps`, `warmup_samples`, ..."""


class ScheduleConfig(Config):
    """Learning rate over steps: linear warm-up to `optimizer.lr`, then a decay.

    Each length is given in one unit only: steps, samples, tokens, or a share of the run.
    """

    kind: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    """Shape of the decay from `optimizer.lr` to `min_lr`. `constant` does not decay;
    `inverse_sqrt` falls with the root of the step; `wsd` (warm-up, stable, decay) stays at
    `optimizer.lr` until the last `wsd_decay_steps`."""
    init_lr: float = Field(default=0.0, ge=0)
    """Learning rate from which the warm-up climbs; at most `optimizer.lr`."""
    warmup_steps: int = Field(default=0, ge=0, le=1 << 40)
    """Steps of linear warm-up. A warm-up longer than the job never reaches
    `optimizer.lr`, which is noted before the start."""
    warmup_samples: int | None = Field(default=None, ge=1, le=1 << 62)
    """Instead of `warmup_steps`: samples of the warm-up, which may end within a step."""
    warmup_tokens: int | None = Field(default=None, ge=1, le=1 << 62)
    """Instead of `warmup_steps`: tokens of the warm-up, rounded up to whole samples of
    seq_length tokens."""
    warmup_fraction: float | None = Field(default=None, gt=0, le=1)
    """Instead of `warmup_steps`: the warm-up as a share of the run's samples."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay; at most `optimizer.lr`."""
    decay_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Step at which the decay ends, counted from step 0 with the warm-up included, and
    after it; then the rate stays at `min_lr`, which may be 0 for at most a tenth of the
    steps. Default: training.steps."""
    decay_samples: int | None = Field(default=None, ge=1, le=1 << 62)
    """Instead of `decay_steps`: samples after which the decay ends, counted from the start
    of the run."""
    decay_tokens: int | None = Field(default=None, ge=1, le=1 << 62)
    """Instead of `decay_steps`: tokens after which the decay ends, rounded up to whole
    samples."""
    decay_fraction: float | None = Field(default=None, gt=0, le=1)
    """Instead of `decay_steps`: share of the run's samples after which the decay ends."""
    wsd_decay_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Steps of the decay of `wsd`. Default: a tenth of `decay_steps`, rounded up."""
    wsd_decay_samples: int | None = Field(default=None, ge=1, le=1 << 62)
    """Instead of `wsd_decay_steps`: samples of the decay of `wsd`."""
    wsd_decay_tokens: int | None = Field(default=None, ge=1, le=1 << 62)
    """Instead of `wsd_decay_steps`: tokens of the decay of `wsd`, rounded up to whole
    samples."""
    wsd_decay_fraction: float | None = Field(default=None, gt=0, le=1)
    """Instead of `wsd_decay_steps`: the decay of `wsd` as a share of the run's samples."""
    wsd_shape: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay of `wsd`, with q from 0 to 1: 2 x 0.5^q - 1, 1 - q,
    (1 + cos(pi q)) / 2, or 1 - sqrt(q)."""

    def length_fields(self, part: str) -> tuple[str, ...]:
        """Returns the fields that give the length of a part; more than one is an error."""
        given = []
        for unit in UNITS:
            # No warm-up is 0 steps.
            if getattr(self, f"{part}_{unit}"):
                given.append(f"{part}_{unit}")
        return tuple(given)

    @property
    def has_shares(self) -> bool:
        """Whether a length that has an effect is a share of the run."""
        fractions = [self.warmup_fraction]
        if self.kind != "constant":
            fractions.append(self.decay_fraction)
        if self.kind == "wsd":
            fractions.append(self.wsd_decay_fraction)
        return fractions.count(None) < len(fractions)

    @property
    def ends_with_the_run(self) -> bool:
        """Whether the rate depends on the number of steps of the run."""
        if self.kind != "constant" and not self.length_fields("decay"):
            return True
        return self.has_shares
