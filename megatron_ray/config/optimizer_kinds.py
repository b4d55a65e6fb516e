"""Lists the optimizers by name: their numbers, their state, and where their rule is.

Owns: the table. Torch-free, so that specs are read and memory is planned without torch.
Must not know: the arithmetic of an update.

An installed package adds one by an entry point of group `megatron_ray.optimizers`, which
names an `OptimizerKind`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from megatron_ray.config.errors.messages import suggestion

if TYPE_CHECKING:
    from megatron_ray.config.optimizer import OptimizerConfig

ENTRY_POINTS = "megatron_ray.optimizers"
SECOND_MOMENT = "exp_avg_sq"
_BYTES = {"fp32": 4, "bf16": 2}
_RULES = "megatron_ray.optimizer.rules"


@dataclass(frozen=True)
class OptimizerKind:
    """What must be known of an optimizer before anything runs."""

    rule: str
    """`module:function` of the elementwise rule, see `megatron_ray.optimizer.rules`."""
    state: Callable[["OptimizerConfig"], tuple[str, ...]]
    """Names of its tensors, one value per parameter each."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the fields of `optimizer` that it uses beside lr and weight_decay."""
    is_adaptive: bool = True
    """Whether an update's size does not depend on the gradient's, as with Adam: the rates of
    `model.mup` assume it."""
    matrix_state: Callable[["OptimizerConfig"], tuple[str, ...]] | None = None
    """Names of the tensors of matrices, which are updated by Muon; None where the
    rule updates them too."""

    def __post_init__(self) -> None:
        """Raises ValueError for state of matrices without the numbers of their update."""
        if self.matrix_state is not None and not {"momentum", "muon"} <= set(self.numbers):
            raise ValueError("matrix_state needs the numbers momentum and muon")


def _two_moments(config: "OptimizerConfig") -> tuple[str, ...]:
    return "exp_avg", SECOND_MOMENT


def _momentum(config: "OptimizerConfig") -> tuple[str, ...]:
    if config.momentum == 0:
        return ()
    return ("momentum_buffer",)


def _many_moments(config: "OptimizerConfig") -> tuple[str, ...]:
    assert config.aggregated is not None
    names = []
    for index in range(len(config.aggregated)):
        names.append(first_moment(index))
    return (*names, SECOND_MOMENT)


def first_moment(index: int) -> str:
    """Returns the name of one of several first moments: exp_avg, exp_avg_2, ..."""
    if index == 0:
        return "exp_avg"
    return f"exp_avg_{index + 1}"


_ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
_ADOPT = {"beta1": 0.9, "beta2": 0.9999, "eps": 1e-6, "decay": "l2"}
_AGGREGATED = ({"beta": 0.9, "weight": 0.7},)

BUILT_IN: Mapping[str, OptimizerKind] = {
    "adamw": OptimizerKind(f"{_RULES}.adam:adamw", _two_moments, {**_ADAM, "decay": "lr"}),
    "decoupled_adamw": OptimizerKind(
        f"{_RULES}.adam:adamw", _two_moments, {**_ADAM, "decay": "schedule"}
    ),
    "sgd": OptimizerKind(
        f"{_RULES}.sgd:sgd",
        _momentum,
        {"momentum": 0.9, "nesterov": False, "decay": "l2"},
        is_adaptive=False,
    ),
    "adopt": OptimizerKind(f"{_RULES}.adopt:adopt", _two_moments, _ADOPT),
    "qhadamw": OptimizerKind(
        f"{_RULES}.adam:adamw", _two_moments, {**_ADAM, "nu": 0.7, "decay": "schedule"}
    ),
    "qhadopt": OptimizerKind(
        f"{_RULES}.adopt:adopt", _two_moments, {**_ADOPT, "beta1": 0.999, "nu": 0.9}
    ),
    "aggmo_adamw": OptimizerKind(
        f"{_RULES}.adam:adamw",
        _many_moments,
        {"beta2": 0.95, "eps": 1e-8, "aggregated": _AGGREGATED, "decay": "schedule"},
    ),
    "aggmo_adopt": OptimizerKind(
        f"{_RULES}.adopt:adopt",
        _many_moments,
        {
            "beta2": 0.9999,
            "eps": 1e-6,
            "aggregated": ({"beta": 0.999, "weight": 0.9},),
            "decay": "l2",
        },
    ),
    "muon": OptimizerKind(
        f"{_RULES}.adam:adamw",
        _two_moments,
        {
            **_ADAM,
            "momentum": 0.95,
            "nesterov": True,
            "decay": "lr",
            "adamw_lr_scale": 1.0,
            "muon": {},
        },
        matrix_state=_momentum,
        is_adaptive=False,
    ),
}


def state_names(config: "OptimizerConfig", *, of_matrix: bool) -> tuple[str, ...]:
    """Returns the names of the optimizer's tensors for a parameter."""
    kind = optimizer_kind(config.name)
    if of_matrix and kind.matrix_state is not None:
        return kind.matrix_state(config)
    return kind.state(config)


def state_dtype(config: "OptimizerConfig", name: str) -> str:
    """Returns the type of one of the optimizer's tensors."""
    if name == SECOND_MOMENT:
        return config.exp_avg_sq_dtype
    return config.exp_avg_dtype


def state_bytes(config: "OptimizerConfig", *, of_matrix: bool) -> int:
    """Returns the bytes that the optimizer keeps for an element of a parameter."""
    num_bytes = 0
    for name in state_names(config, of_matrix=of_matrix):
        num_bytes += _BYTES[state_dtype(config, name)]
    return num_bytes


def updates_matrices(config: "OptimizerConfig") -> bool:
    """Returns whether matrices are updated whole, and not element by element."""
    return optimizer_kind(config.name).matrix_state is not None


def optimizer_kind(name: str) -> OptimizerKind:
    """Returns an optimizer, built in or of an installed package.

    Raises ValueError for an unknown name.
    """
    kind = BUILT_IN.get(name)
    if kind is not None:
        return kind
    # Read only now, because it opens the metadata of every installed package.
    installed = entry_points(group=ENTRY_POINTS)
    for entry_point in installed.select(name=name):
        loaded = entry_point.load()
        if not isinstance(loaded, OptimizerKind):
            raise ValueError(
                f"the entry point {entry_point.value!r} of optimizer {name!r} is no "
                "OptimizerKind"
            )
        return loaded
    known = sorted({*BUILT_IN, *installed.names})
    hint = suggestion(name, known) or f"known: {', '.join(known)}"
    raise ValueError(f"there is no optimizer {name!r}; {hint}")
