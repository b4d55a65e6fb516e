"""Makes the callbacks of a run.

Owns: which class is which field of `callbacks`, and the limits of what installed ones
report. Must not know: steps.
"""

import re
from collections.abc import Callable
from importlib import import_module

from megatron_ray.config.callbacks.installed import callback_kind
from megatron_ray.config.callbacks.monitors import InstalledCallbackConfig
from megatron_ray.config.problem import ConfigError
from megatron_ray.training.callbacks.activation_monitor import ActivationMonitor
from megatron_ray.training.callbacks.optimizer_monitor import OptimizerMonitor
from megatron_ray.training.callbacks.protocol import Callback, CallbackContext
from megatron_ray.training.callbacks.runner import CallbackRunner, NamedCallback
from megatron_ray.training.callbacks.unigram_monitor import UnigramMonitor
from megatron_ray.validation.parameters.monitored import MAX_NUMBERS

_NAME = re.compile(r"[A-Za-z0-9_.\-]+(?:/[A-Za-z0-9_.\-]+)*")
_MAX_NAME_CHARS = 256


def make_callbacks(context: CallbackContext) -> CallbackRunner:
    """Returns the callbacks of the config; every rank makes the same ones.

    Raises ConfigError when an installed one cannot be made, or reports too much.
    """
    config = context.config.callbacks
    callbacks = list[NamedCallback]()

    def add(name: str, callback: Callback) -> None:
        callbacks.append(NamedCallback(name, config.intervals[name], callback))

    if config.optimizer is not None:
        add("optimizer", OptimizerMonitor(context, config.optimizer))
    if config.activations is not None:
        add("activations", ActivationMonitor(context, config.activations))
    if config.unigram is not None:
        add("unigram", UnigramMonitor(context))
    for name, installed in config.installed.items():
        callbacks.append(_installed(name, installed, context))
    _check_names(callbacks)
    return CallbackRunner(callbacks, context.mesh.step_group, context.mesh.device)


def _installed(
    name: str, config: InstalledCallbackConfig, context: CallbackContext
) -> NamedCallback:
    kind = callback_kind(name)
    callback = _load(name, kind.callback)(context, kind.parse(config.options))
    if not isinstance(callback, Callback):
        raise ConfigError(
            f"{_pointer(name)}: {kind.callback} made {type(callback).__name__}, which is no "
            "megatron_ray.training.callbacks.protocol.Callback"
        )
    return NamedCallback(name, config.every_steps, callback, is_installed=True)


def _load(name: str, path: str) -> Callable[..., object]:
    """Imports what makes an installed callback. Raises ConfigError when it cannot."""
    module, _, attribute = path.partition(":")
    try:
        make: Callable[..., object] = getattr(import_module(module), attribute)
    except Exception as error:
        raise ConfigError(
            f"{_pointer(name)}: {path} cannot be imported: {type(error).__name__}: {error}; "
            "repair its package, which every node needs"
        ) from error
    return make


def _check_names(callbacks: list[NamedCallback]) -> None:
    """Raises ConfigError for names that cannot be stored, or too many."""
    taken = set[str]()
    for entry in callbacks:
        pointer = f"/callbacks/{entry.field}"
        for name in entry.names:
            if _NAME.fullmatch(name) is None or len(name) > _MAX_NAME_CHARS:
                raise ConfigError(
                    f"{pointer}: it has a number {name!r}; names are letters, digits, _ . - "
                    f"and / between words, at most {_MAX_NAME_CHARS} characters"
                )
            if name in taken:
                raise ConfigError(f"{pointer}: there are two numbers {name!r}")
            taken.add(name)
    if len(taken) > MAX_NUMBERS:
        raise ConfigError(
            f"/callbacks: all callbacks together report {len(taken)} numbers a step, at "
            f"most {MAX_NUMBERS} are possible; leave some out"
        )


def _pointer(name: str) -> str:
    return f"/callbacks/installed/{name}"
