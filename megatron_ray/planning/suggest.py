"""Which layout of a job is quickest among those that fit.

Owns: trying layouts, ranking them, naming the nearest one.

What is legal is for `validation` to say; nothing is assumed here but sizes worth
trying. Model, data and batch stay as they are: tried are tp, pp, vpp, cp, ep, micro
batch and recomputation, with dp what is left. Pure. Must not know: the service, a
cluster.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import RecomputeConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline
from megatron_ray.planning.buffers import RankBuffers, distinct_buffers
from megatron_ray.planning.flops import attention_parameters
from megatron_ray.planning.hardware import Hardware
from megatron_ray.planning.memory import RankMemory, state_memory, with_activations
from megatron_ray.planning.microbatch import num_microbatches, width_of
from megatron_ray.planning.pipeline import bubble_share
from megatron_ray.planning.step_time import StepTime, Update, parts_with, step_update
from megatron_ray.validation import check

_DEEPEST = 64
_MOST_CHUNKS = 8
_MOST_EXPERT_RANKS = 64
_SHORTEST_PART = 8192
"""Tokens of a sequence on a context-parallel rank below which cutting it further is not
tried."""
_MICRO_BATCHES = (1, 2, 4, 8)
_RECOMPUTE = (
    RecomputeConfig(),
    RecomputeConfig(granularity="selective", modules=("norm", "activation")),
    RecomputeConfig(granularity="full", method="uniform", num_layers=1),
)
"""From the quickest to the one that keeps least."""
_WORST_BUBBLE = 0.5


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits, with what it comes to."""

    config: TrainConfig
    memory: RankMemory
    """Of its fullest rank."""
    time: StepTime

    @property
    def changes(self) -> dict[str, object]:
        """The fields that say it, by path."""
        parallel = self.config.parallel
        training = self.config.training
        axes = ("tp", "pp", "vpp", "cp", "ep", "dp", "sequence_parallel", "layout")
        found: dict[str, object] = {
            f"parallel.{name}": getattr(parallel, name) for name in axes
        }
        if self.config.model.moe is not None:
            found["parallel.etp"] = parallel.etp
        found["training.micro_batch_size"] = training.micro_batch_size
        found["training.recompute"] = training.recompute.model_dump(exclude_none=True)
        return found


def suggest(
    config: TrainConfig, world: int, hardware: Hardware, most: int = 10
) -> list[Suggestion]:
    """The quickest legal layouts on `world` ranks that fit into the device's memory,
    one per choice of degrees, quickest first. Empty where there is none, and where
    steps cannot be estimated. The vocabulary must be known. Raises ValueError
    otherwise.

    Layouts are looked at in the order of what they take at least, until no other one
    can be among the `most`.
    """
    if config.training.precision not in hardware.efficiencies:
        return []
    best: list[Suggestion] = []
    for least, layout in sorted(
        (
            (_least_time(layout, hardware), layout)
            for layout in _layouts(config, world, hardware)
        ),
        key=itemgetter(0),
    ):
        if len(best) == most and least >= best[-1].time.step_s:
            break
        if (found := _best(layout, world, hardware)) is not None:
            best = sorted([*best, found], key=lambda suggestion: suggestion.time.step_s)[
                :most
            ]
    return best


def nearest(config: TrainConfig, world: int, hardware: Hardware) -> Suggestion | None:
    """The layout that fits and changes the fewest degrees, the quickest of those; None
    where none fits.
    """
    if config.training.precision not in hardware.efficiencies:
        return None
    axes = ("tp", "pp", "vpp", "cp", "ep")
    by_distance: dict[int, list[TrainConfig]] = {}
    for layout in _layouts(config, world, hardware):
        changed = sum(
            getattr(layout.parallel, axis) != getattr(config.parallel, axis)
            for axis in axes
        )
        by_distance.setdefault(changed, []).append(layout)
    for _, layouts in sorted(by_distance.items()):
        found = [
            best
            for layout in layouts
            if (best := _best(layout, world, hardware)) is not None
        ]
        if found:
            return min(found, key=lambda suggestion: suggestion.time.step_s)
    return None


def _least_time(layout: TrainConfig, hardware: Hardware) -> float:
    """Seconds below which no micro batch of a layout stays: nothing recomputed, the
    first pipeline rank alone, no update.
    """
    precision = layout.training.precision
    found = []
    first = RankBuffers(0, 0, (), ())
    for size in _micro_batches(layout):
        training = layout.training.model_copy(update={"micro_batch_size": size})
        parts = parts_with(
            layout.model_copy(update={"training": training}),
            hardware,
            precision,
            Update(0, 0, 0),
            [first],
        )
        found.append(parts.step_time(hardware.efficiencies[precision]).step_s)
    return min(found)


# ---- what is tried


def _layouts(config: TrainConfig, world: int, hardware: Hardware) -> Iterator[TrainConfig]:
    """Degrees that could fit at all and that validation takes, with micro batches of
    one and nothing recomputed.
    """
    training = config.training.model_copy(
        update={"micro_batch_size": 1, "recompute": RecomputeConfig()}
    )
    dense, of_experts = _least_bytes(config)
    room = hardware.memory_bytes
    for tp, pp, cp in product(
        _powers(hardware.node_size), _divisors(world, _DEEPEST), _context(config)
    ):
        if world % (tp * pp * cp):
            continue
        for vpp, (ep, etp) in product(
            _chunks(config.model.num_layers, pp), _expert_degrees(config)
        ):
            if (
                room is not None
                and (dense / tp + of_experts / (ep * (etp or tp))) / pp > room
            ):
                continue
            layout = _layout(config.model, pp * vpp)
            fields = {
                "tp": tp,
                "pp": pp,
                "vpp": vpp,
                "cp": cp,
                "ep": ep,
                "etp": etp,
                "dp": world // (tp * pp * cp),
                "layout": layout,
            }
            fields |= {
                "sequence_parallel": tp > 1,
                "schedule": "auto",
                "first_stage_layers": None,
                "last_stage_layers": None,
            }
            tried = config.model_copy(
                update={
                    "parallel": config.parallel.model_copy(update=fields),
                    "training": training,
                }
            )
            if _worth_trying(tried, world):
                yield tried


def _worth_trying(config: TrainConfig, world: int) -> bool:
    if check.find_problems(config, world):
        return False
    return (
        config.parallel.pp == 1
        or bubble_share(plan_pipeline(config), num_microbatches(config)) <= _WORST_BUBBLE
    )


def _least_bytes(config: TrainConfig) -> tuple[float, float]:
    """(of attention and MLPs, of experts): weights and the fp32 gradients of what is
    trained, before they are cut over ranks; nothing under ZeRO-3.
    """
    model = config.model
    if config.parallel.zero == 3:
        return 0.0, 0.0
    matrices = (3 if model.gated else 2) * model.hidden_size
    mixtures = [
        model.experts_on(layer) for layer in range(model.num_layers + model.num_mtp_layers)
    ]
    dense = (
        len(mixtures) * attention_parameters(model)
        + mixtures.count(None) * matrices * model.ffn_width
    )
    experts = sum(
        moe.num_experts * matrices * model.expert_width
        for moe in mixtures
        if moe is not None
    )
    each = width_of(config) + (0 if config.optimizer.freeze else 4)
    return float(dense * each), float(experts * each)


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _context(config: TrainConfig) -> list[int]:
    """As given, and what leaves long enough parts of a sequence."""
    longest = max(1, config.training.seq_length // _SHORTEST_PART)
    return (
        sorted({config.parallel.cp, *_powers(min(longest, 64))})
        if config.parallel.hierarchical_cp_sizes is None
        else [config.parallel.cp]
    )


def _chunks(num_layers: int, pp: int) -> list[int]:
    if pp == 1:
        return [1]
    return [vpp for vpp in range(1, _MOST_CHUNKS + 1) if pp * vpp <= num_layers]


def _layout(model: ModelConfig, stages: int) -> str | None:
    """None where layers divide evenly; else embedding, head and layers that predict
    further tokens count as a layer each, where that divides and the last stage has room
    for those.
    """
    further = model.num_mtp_layers
    each, left = divmod(model.num_layers + further + 2, stages)
    if model.num_layers % stages == 0 or left or each <= further or stages == 1:
        return None
    middle = f"({'t' * each}|)*{stages - 2}" if stages > 2 else ""
    return f"E{'t' * (each - 1)}|{middle}{'t' * (each - 1 - further)}{'m' * further}L"


def _expert_degrees(config: TrainConfig) -> list[tuple[int, int | None]]:
    """(ep, etp): experts dealt out, each whole unless the job says otherwise."""
    moe = config.model.moe
    if moe is None:
        return [(1, None)]
    return [
        (ep, config.parallel.etp or 1)
        for ep in _powers(min(moe.num_experts, _MOST_EXPERT_RANKS))
        if moe.num_experts % ep == 0
    ]


# ---- what it comes to


def _best(layout: TrainConfig, world: int, hardware: Hardware) -> Suggestion | None:
    """The quickest micro batch, each with as little recomputation as fits."""
    dims = ParallelDims.of(layout.parallel)
    room = hardware.memory_bytes
    kinds = distinct_buffers(layout, dims, plan_pipeline(layout))
    states = [(held.pp_rank, state_memory(layout, dims, held)) for held in kinds]
    if room is not None and max(state.total_bytes for _, state in states) > room:
        return None
    update = step_update(layout, hardware, kinds)
    found = list[Suggestion]()
    for size in _micro_batches(layout):
        fitting = _fitting(layout, size, states, world, hardware)
        if fitting is not None:
            found.append(_timed(*fitting, hardware, update, kinds))
    return min(found, key=lambda suggestion: suggestion.time.step_s, default=None)


def _micro_batches(layout: TrainConfig) -> list[int]:
    assert layout.parallel.dp != "auto"
    each = layout.training.global_batch_size // layout.parallel.dp
    return [size for size in _MICRO_BATCHES if each % size == 0]


def _fitting(
    layout: TrainConfig,
    size: int,
    states: Sequence[tuple[int, RankMemory]],
    world: int,
    hardware: Hardware,
) -> tuple[TrainConfig, RankMemory] | None:
    """With the least recomputation that fits."""
    pipeline = plan_pipeline(layout)
    room = hardware.memory_bytes
    for recompute in _RECOMPUTE:
        training = layout.training.model_copy(
            update={"micro_batch_size": size, "recompute": recompute}
        )
        config = layout.model_copy(update={"training": training})
        whole = [
            with_activations(config, pipeline, state, pp_rank, hardware.device)
            for pp_rank, state in states
        ]
        fullest = max(whole, key=lambda memory: memory.total_bytes)
        if (room is None or fullest.total_bytes <= room) and not check.find_problems(
            config, world
        ):
            return config, fullest
    return None


def _timed(
    config: TrainConfig,
    memory: RankMemory,
    hardware: Hardware,
    update: Update,
    kinds: Sequence[RankBuffers],
) -> Suggestion:
    precision = config.training.precision
    time = parts_with(config, hardware, precision, update, kinds).step_time(
        hardware.efficiencies[precision]
    )
    return Suggestion(config, memory, time)


def degrees(parallel: ParallelismConfig) -> str:
    """Degrees above one, for people."""
    sizes = {
        axis: getattr(parallel, axis) for axis in ("tp", "pp", "vpp", "cp", "ep", "dp")
    }
    return (
        " ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        or "one rank"
    )
