"""Searches the fastest layout of a job among those that fit into memory.

Tried are tp, pp, vpp, cp, ep, the micro batch size and recomputation, with dp what is
left; model, data and batch stay as they are. Which layouts are legal is decided by
`validation`.

Owns: which layouts are tried, ranking them, and finding the nearest one. Pure. Must not
know: the service, a cluster.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

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
from megatron_ray.planning.microbatch import grad_width_of, num_microbatches, width_of
from megatron_ray.planning.pipeline import bubble_share
from megatron_ray.planning.step_time.estimate import StepTime, precision_on, step_parts
from megatron_ray.planning.step_time.update import UpdateTime, step_update
from megatron_ray.validation import check

_MAX_STAGES = 64
_MAX_CHUNKS = 8
_MAX_CONTEXT_RANKS = 64
_MAX_EXPERT_RANKS = 64
_MIN_TOKENS = 8192
"""Tokens of a sequence on a context-parallel rank; larger cp is not tried."""
_MICRO_BATCHES = (1, 2, 4, 8)
_RECOMPUTE = (
    (RecomputeConfig(),),
    (RecomputeConfig(granularity="selective", modules=("norm", "activation")),),
    (
        RecomputeConfig(granularity="operations", every=2),
        RecomputeConfig(granularity="operations", every=3),
        RecomputeConfig(granularity="operations", save=("attention",)),
    ),
    (RecomputeConfig(granularity="full", method="uniform", num_layers=1),),
)
"""Recompute options from the fastest to those that keep least. Which of those listed
together is faster and which keeps less depends on the products of a layer."""
_MAX_BUBBLE = 0.5
"""Largest share of a step in which the pipeline may be idle."""


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits, with its estimates."""

    config: TrainConfig
    memory: RankMemory
    """Memory of the most loaded rank."""
    time: StepTime

    @property
    def changes(self) -> dict[str, object]:
        """The fields of the layout, by path."""
        parallel = self.config.parallel
        training = self.config.training
        fields: dict[str, object] = {}
        for name in ("tp", "pp", "vpp", "cp", "ep", "dp", "sequence_parallel", "layout"):
            fields[f"parallel.{name}"] = getattr(parallel, name)
        if self.config.model.moe is not None:
            fields["parallel.etp"] = parallel.etp
        fields["training.micro_batch_size"] = training.micro_batch_size
        fields["training.recompute"] = training.recompute.model_dump(exclude_none=True)
        return fields


def suggest(
    config: TrainConfig, world: int, hardware: Hardware, most: int = 10
) -> list[Suggestion]:
    """Returns the fastest legal layouts on `world` ranks that fit, fastest first.

    They are one per choice of degrees, and `most` at most. Empty when none fits, or when
    the device has no figures for the precision.

    Raises ValueError while the vocabulary is not known.
    """
    if config.training.precision not in hardware.efficiencies:
        return []
    candidates = list[tuple[float, TrainConfig]]()
    for layout in _layouts(config, world, hardware):
        candidates.append((_least_time(layout, hardware), layout))
    candidates.sort(key=_seconds)
    fastest = list[Suggestion]()
    for least, layout in candidates:
        # No layout from here on takes less than `least`, so the list is complete.
        if len(fastest) == most and least >= fastest[-1].time.step_s:
            break
        suggestion = _best(layout, world, hardware)
        if suggestion is not None:
            fastest.append(suggestion)
            fastest.sort(key=_step_seconds)
            del fastest[most:]
    return fastest


def nearest(config: TrainConfig, world: int, hardware: Hardware) -> Suggestion | None:
    """Returns the fastest of the layouts that fit and change the fewest degrees.

    None when no layout fits, or when the device has no figures for the precision.
    """
    if config.training.precision not in hardware.efficiencies:
        return None
    # Estimates are expensive, so layouts with more changes are looked at only if needed.
    by_changes: dict[int, list[TrainConfig]] = {}
    for layout in _layouts(config, world, hardware):
        by_changes.setdefault(_num_changes(config, layout), []).append(layout)
    for _, layouts in sorted(by_changes.items()):
        fastest: Suggestion | None = None
        for layout in layouts:
            suggestion = _best(layout, world, hardware)
            if suggestion is None:
                continue
            if fastest is None or suggestion.time.step_s < fastest.time.step_s:
                fastest = suggestion
        if fastest is not None:
            return fastest
    return None


def _num_changes(config: TrainConfig, layout: TrainConfig) -> int:
    changes = 0
    for axis in ("tp", "pp", "vpp", "cp", "ep"):
        changes += getattr(layout.parallel, axis) != getattr(config.parallel, axis)
    return changes


def _seconds(candidate: tuple[float, TrainConfig]) -> float:
    return candidate[0]


def _step_seconds(suggestion: Suggestion) -> float:
    return suggestion.time.step_s


def _least_time(layout: TrainConfig, hardware: Hardware) -> float:
    """Returns a lower bound of a layout's step time over all micro batch sizes.

    It is that of the first pipeline rank alone, without recomputation and update.
    """
    precision = precision_on(layout, hardware)
    first_rank = RankBuffers(0, 0, (), ())
    least = float("inf")
    for size in _micro_batches(layout):
        parts = step_parts(
            _with_training(layout, micro_batch_size=size),
            hardware,
            precision,
            ranks=[first_rank],
            update=UpdateTime(0, 0, 0, 0),
        )
        least = min(least, parts.step_time(hardware.efficiencies[precision]).step_s)
    return least


def _with_training(config: TrainConfig, **fields: Any) -> TrainConfig:
    training = config.training.model_copy(update=fields)
    return config.model_copy(update={"training": training})


# ---- which layouts are tried


def _layouts(config: TrainConfig, world: int, hardware: Hardware) -> Iterator[TrainConfig]:
    """Yields legal layouts that could fit, with micro batches of one sample.

    Nothing is recomputed in them.
    """
    base = _with_training(config, micro_batch_size=1, recompute=RecomputeConfig())
    dense_bytes, expert_bytes = _least_bytes(config)
    for tp, pp, cp in product(
        _powers_of_two(hardware.node_size),
        _divisors(world, _MAX_STAGES),
        _context_sizes(config),
    ):
        if world % (tp * pp * cp):
            continue
        for vpp, (ep, etp) in product(
            _chunks(config.model.num_layers, pp), _expert_degrees(config)
        ):
            # A cheap test first: most layouts of a large model do not fit.
            least = (dense_bytes / tp + expert_bytes / (ep * (etp or tp))) / pp
            if hardware.memory_bytes is not None and least > hardware.memory_bytes:
                continue
            fields = {
                "tp": tp,
                "pp": pp,
                "vpp": vpp,
                "cp": cp,
                "ep": ep,
                "etp": etp,
                "dp": world // (tp * pp * cp),
                "layout": _layout(config.model, pp * vpp),
            }
            layout = _with_degrees(base, fields)
            if _is_worth_trying(layout, world):
                yield layout


def _with_degrees(config: TrainConfig, fields: dict[str, Any]) -> TrainConfig:
    # Fields that only made sense with the user's own degrees get their defaults.
    defaults = {
        "sequence_parallel": fields["tp"] > 1,
        "schedule": "auto",
        "first_stage_layers": None,
        "last_stage_layers": None,
    }
    parallel = config.parallel.model_copy(update=fields | defaults)
    return config.model_copy(update={"parallel": parallel})


def _is_worth_trying(config: TrainConfig, world: int) -> bool:
    if check.find_problems(config, world):
        return False
    if config.parallel.pp == 1:
        return True
    return bubble_share(plan_pipeline(config), num_microbatches(config)) <= _MAX_BUBBLE


def _least_bytes(config: TrainConfig) -> tuple[float, float]:
    """Returns the least bytes of dense layers and of experts, before they are split.

    Those are weights, and fp32 gradients if all of them are trained. Embeddings are left
    out, so that this is a lower bound; under ZeRO-3 it is 0.
    """
    model = config.model
    if config.parallel.zero == 3:
        return 0.0, 0.0
    num_layers = model.num_layers + model.num_mtp_layers
    matrices = (3 if model.gated else 2) * model.hidden_size
    dense = num_layers * attention_parameters(model)
    experts = 0
    for layer in range(num_layers):
        moe = model.experts_on(layer)
        if moe is None:
            dense += matrices * model.ffn_width
        else:
            experts += moe.num_experts * matrices * model.expert_width
    bytes_per_weight = width_of(config)
    if not config.optimizer.freeze:
        bytes_per_weight += grad_width_of(config)
    return float(dense * bytes_per_weight), float(experts * bytes_per_weight)


def _powers_of_two(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _context_sizes(config: TrainConfig) -> list[int]:
    """Returns the given cp, and sizes that leave enough tokens on each rank."""
    # The sizes of a hierarchy are given for one cp.
    if config.parallel.hierarchical_cp_sizes is not None:
        return [config.parallel.cp]
    most = max(1, config.training.seq_length // _MIN_TOKENS)
    sizes = _powers_of_two(min(most, _MAX_CONTEXT_RANKS))
    return sorted({config.parallel.cp, *sizes})


def _chunks(num_layers: int, pp: int) -> list[int]:
    if pp == 1:
        return [1]
    return list(range(1, min(_MAX_CHUNKS, num_layers // pp) + 1))


def _layout(model: ModelConfig, stages: int) -> str | None:
    """Returns a layout string for stages of unequal numbers of layers, if one helps.

    None where layers divide evenly. Otherwise embedding, head and each MTP layer count
    as one layer, if that divides evenly and the last stage has room for them.
    """
    num_mtp = model.num_mtp_layers
    # Megatron's rule for embedding and head (account_for_embedding_in_pipeline_split).
    per_stage, rest = divmod(model.num_layers + num_mtp + 2, stages)
    if model.num_layers % stages == 0 or stages == 1:
        return None
    if rest or per_stage <= num_mtp:
        return None
    middle = ""
    if stages > 2:
        middle = f"({'t' * per_stage}|)*{stages - 2}"
    first = "E" + "t" * (per_stage - 1)
    last = "t" * (per_stage - 1 - num_mtp) + "m" * num_mtp + "L"
    return f"{first}|{middle}{last}"


def _expert_degrees(config: TrainConfig) -> list[tuple[int, int | None]]:
    """Returns (ep, etp) to try: experts are whole on a rank unless etp is set."""
    moe = config.model.moe
    if moe is None:
        return [(1, None)]
    etp = config.parallel.etp or 1
    sizes = _powers_of_two(min(moe.num_experts, _MAX_EXPERT_RANKS))
    return [(ep, etp) for ep in sizes if moe.num_experts % ep == 0]


# ---- estimates of a layout


def _best(layout: TrainConfig, world: int, hardware: Hardware) -> Suggestion | None:
    """Returns the fastest micro batch size, each with as little recomputation as fits."""
    dims = ParallelDims.of(layout.parallel).of_group
    memory_limit = hardware.memory_bytes
    ranks = distinct_buffers(layout, dims, plan_pipeline(layout))
    states = list[tuple[int, RankMemory]]()
    for buffers in ranks:
        state = state_memory(layout, dims, buffers)
        if memory_limit is not None and state.total_bytes > memory_limit:
            return None
        states.append((buffers.pp_rank, state))
    # Weights, gradients and the update depend on neither micro batch nor recomputation.
    update = step_update(layout, hardware, ranks)
    fastest: Suggestion | None = None
    for size in _micro_batches(layout):
        config = _with_training(layout, micro_batch_size=size)
        for fitting in _least_recomputation(config, states, world, hardware):
            suggestion = _timed(*fitting, hardware, update, ranks)
            if fastest is None or suggestion.time.step_s < fastest.time.step_s:
                fastest = suggestion
    return fastest


def _micro_batches(layout: TrainConfig) -> list[int]:
    assert layout.parallel.dp != "auto"
    samples = layout.training.batch_sizes.divisor // layout.parallel.dp
    return [size for size in _MICRO_BATCHES if samples % size == 0]


def _least_recomputation(
    layout: TrainConfig,
    states: Sequence[tuple[int, RankMemory]],
    world: int,
    hardware: Hardware,
) -> list[tuple[TrainConfig, RankMemory]]:
    """Returns the configs with the least recomputation that fit, and their memory.

    `states` are pairs of pipeline rank and memory without activations.
    """
    # Less recomputation is faster, so the first options that fit are the best.
    for options in _RECOMPUTE:
        fitting = []
        for recompute in options:
            config = _with_training(layout, recompute=recompute)
            memory = _fullest(config, states, hardware)
            limit = hardware.memory_bytes
            if limit is not None and memory.total_bytes > limit:
                continue
            if not check.find_problems(config, world):
                fitting.append((config, memory))
        if fitting:
            return fitting
    return []


def _fullest(
    config: TrainConfig, states: Sequence[tuple[int, RankMemory]], hardware: Hardware
) -> RankMemory:
    """Returns the memory of the most loaded rank, with activations."""
    pipeline = plan_pipeline(config)
    ranks = []
    for pp_rank, state in states:
        ranks.append(with_activations(config, pipeline, state, pp_rank, hardware.device))
    return max(ranks, key=lambda memory: memory.total_bytes)


def _timed(
    config: TrainConfig,
    memory: RankMemory,
    hardware: Hardware,
    update: UpdateTime,
    ranks: Sequence[RankBuffers],
) -> Suggestion:
    precision = precision_on(config, hardware)
    parts = step_parts(config, hardware, precision, ranks=ranks, update=update)
    return Suggestion(config, memory, parts.step_time(hardware.efficiencies[precision]))


def degrees(parallel: ParallelismConfig) -> str:
    """Returns the degrees above one as text, such as `tp=8 dp=4`."""
    words = []
    for axis in ("tp", "pp", "vpp", "cp", "ep", "dp"):
        size = getattr(parallel, axis)
        if size != 1:
            words.append(f"{axis}={size}")
    return " ".join(words) or "one rank"
