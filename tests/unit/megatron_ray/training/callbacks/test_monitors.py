"""Each number of a monitor equals a plain computation in double precision; a run without
monitors is the same to the bit and has no hook.
"""

from collections.abc import Iterator
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.models.gpt import GPT
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.training.callbacks.assembly import make_callbacks
from megatron_ray.training.callbacks.protocol import CallbackContext
from megatron_ray.training.callbacks.runner import CallbackRunner
from megatron_ray.training.session import build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.parity import GPT2, LLAMA
from tests.support.watched_run import (
    ALL,
    EVERY,
    make_loader,
    run_watched,
    watched_config,
    with_callbacks,
)

EXPERTS = LLAMA | {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48}}


def wide(state: ShardedState, prefix: str = "") -> dict[str, np.ndarray]:
    """Whole tensors in double precision, as copies."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            parts = [box.tensor.detach().double().flatten() for box in tensor.boxes]
            tensors[name.removeprefix(prefix)] = torch.cat(parts).numpy()
    return tensors


def norm(tensors: dict[str, np.ndarray], names: list[str]) -> float:
    return float(np.linalg.norm(np.concatenate([tensors[name] for name in names])))


def plain_norms(
    before: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    after: ShardedState,
    names: list[str],
) -> dict[str, float]:
    """The numbers of a scope with these parameters."""
    new = wide(after, "model/")
    updates = {name: new[name] - before[name] for name in names}
    first = wide(after, "optimizer/exp_avg/")
    second = wide(after, "optimizer/exp_avg_sq/")
    return {
        "grad_norm": norm(gradients, names),
        "weight_norm": norm(before, names),
        "update_norm": norm(updates, names),
        # Biases are zero in the beginning.
        "update_ratio": norm(updates, names) / (norm(before, names) or 1e-300),
        "exp_avg_norm": norm(first, names),
        "exp_avg_sq_norm": norm(second, names),
    }


def layer_of(name: str) -> str:
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "layers" else first


def groups_of(name: str) -> str:
    if name.endswith("norm.weight"):
        return "groups.1"
    return "groups.0" if name.startswith("embedding") else "others"


SCOPES = {
    "model": lambda name: "model",
    "layer": layer_of,
    "parameter": lambda name: name,
    "group": groups_of,
}


@pytest.mark.parametrize("by", SCOPES)
def test_norms_of_each_scope(by: str) -> None:
    config = watched_config(
        EXPERTS if by == "layer" else GPT2, callbacks={"optimizer": EVERY | {"by": by}}
    )
    groups = [{"parameters": ["embedding.*"], "lr_scale": 0.5}]
    groups.append({"parameters": ["*norm.weight"], "lr_scale": 2.0})
    fields = config.model_dump()
    fields["optimizer"] |= {"groups": groups, "clip_grad_norm": 0.01}
    config = TrainConfig.from_mapping(fields)
    mesh = ParallelMesh.single()
    model, optimizer = build(config, mesh)
    callbacks = make_callbacks(CallbackContext(config, mesh, model, optimizer))
    loader = make_loader(config, mesh)
    for step in (1, 2):
        batches = loader.step((step - 1) * 8)
        callbacks.begin_step(step, batches)
        loss = forward_backward(model, mesh, batches)
        tokens = sum(batch.num_tokens for batch in batches)
        sums = reduce_step(model, optimizer, mesh, loss, tokens)
        before = wide(optimizer.sharded_state(), "model/")
        gradients = wide(optimizer.sharded_gradients())
        gradients = {name: values / tokens for name, values in gradients.items()}
        callbacks.after_backward(sums)
        scale_and_clip(optimizer, sums, config.optimizer.clip_grad_norm)
        optimizer.step(1e-3, sums.skip)
        measured = numbers_of(callbacks)
        for name, value in measured.items():
            measured[name] = min(value, 1e200)
        members: dict[str, list[str]] = {}
        for name in before:
            members.setdefault(SCOPES[by](name), []).append(name)
        expected = {}
        for scope, names in members.items():
            state = optimizer.sharded_state()
            for metric, value in plain_norms(before, gradients, state, names).items():
                expected[f"{metric}/{scope}"] = min(value, 1e200)
        assert measured == pytest.approx(expected, rel=1e-6)


def numbers_of(callbacks: CallbackRunner) -> dict[str, float]:
    monitored = callbacks.after_update()
    assert monitored is not None
    return dict(zip(monitored.names, monitored.values.tolist(), strict=True))


def test_chosen_metrics_of_chosen_parameters_need_no_copy() -> None:
    chosen = {"metrics": ["grad_norm"], "parameters": ["layers.1.*"]}
    config = watched_config(LLAMA, callbacks={"optimizer": EVERY | chosen})
    assert list(run_watched(0, 1, config).numbers[1]) == ["grad_norm/layers.1"]
    assert config.callbacks.optimizer is not None
    assert not config.callbacks.optimizer.compares_weights


def test_muons_matrices_have_their_own_state() -> None:
    config = watched_config(LLAMA, callbacks={"optimizer": EVERY})
    fields = config.model_dump()
    fields["optimizer"] = {"name": "muon", "lr": 1e-3}
    numbers = run_watched(0, 1, TrainConfig.from_mapping(fields)).numbers[2]
    assert numbers["momentum_buffer_norm/layers.0"] > 0
    # Norms are updated by AdamW.
    assert numbers["exp_avg_sq_norm/layers.0"] > 0
    assert "momentum_buffer_norm/embedding" not in numbers


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16", "grad_reduce_in_fp32": False},
    "fp16": {"precision": "fp16", "loss_scale": {"initial_scale": 2.0**10}},
}


@pytest.mark.parametrize("model", [LLAMA, GPT2, EXPERTS], ids=["llama", "gpt2", "experts"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_whole_models_norm_is_that_of_the_step(
    model: dict[str, Any], precision: str
) -> None:
    config = watched_config(model, callbacks={"optimizer": EVERY | {"by": "model"}})
    fields = config.model_dump()
    fields["training"] |= PRECISIONS[precision]
    run = run_watched(0, 1, TrainConfig.from_mapping(fields))
    measured = [numbers["grad_norm/model"] for numbers in run.numbers.values()]
    assert measured == pytest.approx(run.grad_norms, rel=1e-7)


def test_a_step_that_is_left_out_has_no_update() -> None:
    config = watched_config(LLAMA, callbacks={"optimizer": EVERY | {"by": "model"}})
    fields = config.model_dump()
    fields["training"] |= {"skip_steps": [2]}
    numbers = run_watched(0, 1, TrainConfig.from_mapping(fields)).numbers
    assert numbers[1]["update_norm/model"] > 0
    assert numbers[2]["update_norm/model"] == numbers[2]["update_ratio/model"] == 0
    assert numbers[2]["exp_avg_norm/model"] == numbers[1]["exp_avg_norm/model"]


class Plain:
    """Keeps what goes through a model, for plain computations."""

    def __init__(self, module: GPT) -> None:
        self.hidden: dict[str, list[Tensor]] = {}
        self.logits: dict[str, list[float]] = {}
        for index, block in module.layers.items():
            block.register_forward_hook(self.keep(f"layers.{index}"))
            attention: Any = block.attention
            attention.core.register_forward_pre_hook(self.attend(f"layers.{index}"))
        module.layers["0"].register_forward_pre_hook(self.keep_input)
        module.final_norm.register_forward_hook(self.keep("final_norm"))

    def keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.hidden.setdefault(name, []).append(output.detach().double())

        return hook

    def keep_input(self, module: nn.Module, inputs: Any) -> None:
        self.keep("embedding")(module, inputs, inputs[0])

    def attend(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            q, k, _, packed = inputs
            repeated = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            logits = q.double() @ repeated.transpose(-1, -2) / q.shape[-1] ** 0.5
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
            if packed is not None:
                documents = packed.documents_BS
                seen = seen & (documents[:, :, None] == documents[:, None])[:, None]
            self.logits.setdefault(name, []).append(
                float(logits[seen.expand_as(logits)].max())
            )

        return hook

    def numbers(self) -> dict[str, float]:
        numbers = {}
        for name, outputs in self.hidden.items():
            values = torch.cat(outputs)
            numbers[f"activation_rms/{name}"] = float(values.square().mean().sqrt())
            numbers[f"activation_max/{name}"] = float(values.abs().max())
        for name, logits in self.logits.items():
            numbers[f"attention_logit_max/{name}"] = max(logits)
        return numbers


@pytest.mark.parametrize("separates", [False, True])
@pytest.mark.parametrize("granularity", ["none", "full", "selective", "operations"])
def test_activations_of_each_layer(separates: bool, granularity: str) -> None:
    config = watched_config(
        GPT2, callbacks={"activations": EVERY}, separate_documents=separates
    )
    fields = config.model_dump()
    fields["training"]["recompute"] = {"granularity": granularity}
    if granularity == "full":
        fields["training"]["recompute"] |= {"method": "uniform", "num_layers": 1}
    config = TrainConfig.from_mapping(fields)
    run = run_watched(0, 1, config)
    mesh = ParallelMesh.single()
    model, _ = build(watched_config(GPT2, callbacks={}), mesh)
    plain = Plain(model.module)
    with torch.no_grad():
        for batch in make_loader(config, mesh).step(0):
            model.module(batch, ForwardMode.EVAL)
    assert run.numbers[1] == pytest.approx(plain.numbers(), rel=1e-6)


def test_attention_logits_may_be_left_out() -> None:
    monitor = EVERY | {"attention_logits": False}
    run = run_watched(0, 1, watched_config(LLAMA, callbacks={"activations": monitor}))
    metrics = {name.partition("/")[0] for name in run.numbers[1]}
    assert metrics == {"activation_rms", "activation_max"}


def test_the_unigram_entropy_is_that_of_all_labels_so_far() -> None:
    config = watched_config(
        LLAMA,
        callbacks={"unigram": {"every_steps": 2}},
        steps=4,
        separate_documents=True,
    )
    run = run_watched(0, 1, config)
    assert list(run.numbers) == [2, 4]
    loader = make_loader(config, ParallelMesh.single())
    counts = np.zeros(config.model.vocabulary)
    for step in range(1, 5):
        for batch in loader.step((step - 1) * 8):
            labels = batch.labels_BS[batch.loss_mask_BS == 1].numpy()
            counts += np.bincount(labels, minlength=counts.size)
        if step not in run.numbers:
            continue
        total = counts.sum()
        entropy = -sum(count / total * log(count / total) for count in counts if count)
        assert run.numbers[step] == pytest.approx(
            {
                "unigram_entropy": entropy,
                "unigram_normalized_loss": run.losses[step - 1] - entropy,
                "unigram_tokens": total,
            },
            rel=1e-12,
        )


def hooks_of(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        yield from part._forward_hooks.values()
        yield from part._forward_pre_hooks.values()
        yield from part._backward_hooks.values()


def test_without_monitors_nothing_is_registered_and_with_them_no_bit_changes() -> None:
    off = watched_config(EXPERTS, callbacks={}, steps=3)
    every_second = {name: one | {"every_steps": 2} for name, one in ALL.items()}
    on = with_callbacks(off, **every_second)
    plain = run_watched(0, 1, off)
    watched = run_watched(0, 1, on)
    assert plain.numbers == {}
    assert list(watched.numbers) == [2]
    assert watched.losses == plain.losses
    assert watched.grad_norms == plain.grad_norms
    for (name, _, values), (_, _, same) in zip(watched.weights, plain.weights, strict=True):
        assert np.array_equal(values, same), name


def test_hooks_are_there_in_due_steps_only() -> None:
    config = watched_config(LLAMA, callbacks={"activations": {"every_steps": 2}})
    mesh = ParallelMesh.single()
    model, optimizer = build(config, mesh)
    module = model.module
    own = len(list(hooks_of(module)))
    callbacks = make_callbacks(CallbackContext(config, mesh, model, optimizer))
    batches = make_loader(config, mesh).step(0)
    counts = []
    for step in (1, 2):
        callbacks.begin_step(step, batches)
        loss = forward_backward(model, mesh, batches)
        counts.append(len(list(hooks_of(module))) - own)
        sums = reduce_step(model, optimizer, mesh, loss, 1)
        callbacks.after_backward(sums)
        counts.append(len(list(hooks_of(module))) - own)
        callbacks.after_update()
    assert counts[0] == counts[1] == counts[3] == 0
    assert counts[2] > 0
