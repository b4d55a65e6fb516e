"""transformers' DeepSeek-V3 judges latent attention, the grouped router and shared
experts, and, with a layer put together here from plain torch around its block, the
multi-token prediction.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import BatchMaker
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.inference.generate import generate_tokens
from megatron_ray.inference.sampling import Sampling
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.training.session import build
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.hf_names import (
    deepseek_block,
    deepseek_logical,
    fill,
    perturb,
)
from tests.support.parity import make_mesh
from tests.support.ranks import run_ranks

VOCABULARY = 211
SEQUENCE = 24
BATCH = 3
END = 7
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
CASES: dict[str, dict[str, Any]] = {
    "experts": {"q_lora_rank": 24, "yarn": True, "dense": 1, "bias": True},
    "dense": {"q_lora_rank": None, "yarn": False, "dense": 2, "bias": False},
}
# Not the eps of the latents' norms, which no key of config.json changes.
EPS = 1e-4
IMPLEMENTATIONS: dict[str, Any] = {
    "attn_implementation": "sdpa",
    "experts_implementation": "eager",  # the others know no float64
}


def judge(case: dict[str, Any], seed: int = 1) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=2,
        n_routed_experts=16,
        routed_scaling_factor=2.5,
        kv_lora_rank=16,
        q_lora_rank=case["q_lora_rank"],
        qk_rope_head_dim=8,
        v_head_dim=12,
        qk_nope_head_dim=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        first_k_dense_replace=case["dense"],
        max_position_embeddings=128,
        rms_norm_eps=EPS,
        attention_bias=case["bias"],
        rope_parameters={"rope_theta": 10000.0}
        | (YARN if case["yarn"] else {"rope_type": "default"}),
        **IMPLEMENTATIONS,
    )
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config)
    perturb(model)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.normal_(0, 0.2)
    model.eval()
    return model


def config_of(case: dict[str, Any], **changes: Any) -> TrainConfig:
    model: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "vocab_size": VOCABULARY,
        "norm_eps": EPS,
        "qkv_bias": case["bias"],
        "attention_output_bias": case["bias"],
        "mla": {
            "q_lora_rank": case["q_lora_rank"],
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
        },
    }
    if case["yarn"]:
        model["rope_scaling"] = {"kind": "yarn"} | {
            name: value for name, value in YARN.items() if name != "rope_type"
        }
    if case["dense"] < 2:
        model["moe"] = {
            "num_experts": 16,
            "top_k": 4,
            "ffn_hidden_size": 48,
            "layer_pattern": [0, 1],
            "score_function": "sigmoid",
            "scaling_factor": 2.5,
            "num_groups": 4,
            "group_top_k": 2,
            "expert_bias": True,
            "shared_expert_ffn_hidden_size": 96,
        }
    return TrainConfig.from_mapping(
        {
            "model": model | changes.get("model", {}),
            "parallel": {"dp": 1} | changes.get("parallel", {}),
            "data": {"train": [{"path": "unused"}]},
            "training": {
                "seq_length": SEQUENCE,
                "micro_batch_size": BATCH,
                "global_batch_size": BATCH,
                "steps": 1,
            }
            | changes.get("training", {}),
            "optimizer": {"lr": 1e-3},
        }
    )


def ours(
    config: TrainConfig, mesh: ParallelMesh, reference: nn.Module
) -> tuple[ParallelModel, ShardedOptimizer]:
    model, optimizer = build(config, mesh, initialise=False)
    state = reference.state_dict()
    fill(model, optimizer, logical(state, config))
    for name, bias in model.expert_biases.items():
        layer = name.split(".")[1]
        prefix = (
            f"model.layers.{layer}."
            if name.startswith("layers.")
            else f"mtp.{layer}.block."
        )
        bias.value.copy_(state[f"{prefix}mlp.gate.e_score_correction_bias"])
    return model, optimizer


def logical(state: dict[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    tensors = deepseek_logical(state, config.model)
    for depth in range(config.model.num_mtp_layers):
        prefix = f"mtp.{depth}."
        names = {
            "embedding_norm": "enorm",
            "hidden_norm": "hnorm",
            "projection": "eh_proj",
            "final_norm": "norm",
        }
        tensors |= {
            f"{prefix}{name}.weight": state[f"{prefix}{part}.weight"]
            for name, part in names.items()
        }
        tensors |= deepseek_block(
            state,
            config.model,
            f"{prefix}block.",
            f"{prefix}block.",
            config.model.moe is not None,
        )
    return tensors


def relative(measured: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    wide = reference.double()
    return float((measured.double() - wide).norm() / max(float(wide.norm()), floor))


def worst_gradient(
    optimizer: ShardedOptimizer, module: nn.Module, config: TrainConfig
) -> dict[str, float]:
    """Largest distance of this rank's boxes, of routers and of all others."""
    named = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    expected = logical(named, config)
    measured = optimizer.sharded_gradients()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    worst = {"router": 0.0, "other": 0.0}
    for name, entry in measured.items():
        for box in entry.boxes:
            part = expected[name]
            for dim, (offset, size) in enumerate(
                zip(box.box.offset, box.box.size, strict=True)
            ):
                part = part.narrow(dim, offset, size)
            kind = "router" if "router" in name else "other"
            worst[kind] = max(worst[kind], relative(box.tensor, part, 1e-8 * largest))
    return worst


def draw(seed: int = 2) -> np.ndarray:
    return torch.randint(
        0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed)
    ).numpy()


def distances(
    rank: int, world_size: int, layouts: dict[str, dict[str, Any]]
) -> list[dict[str, float]]:
    """Of logits, loss and gradients on one rank of each case's layout."""
    return [
        _distances(rank, world_size, CASES[case], parallel)
        for case, parallel in layouts.items()
    ]


def _distances(
    rank: int, world_size: int, case: dict[str, Any], parallel: dict[str, Any]
) -> dict[str, float]:
    reference = judge(case)
    config = config_of(case, parallel=parallel)
    mesh = make_mesh(rank, world_size, config)
    model, optimizer = ours(config, mesh, reference)
    batch = BatchMaker(mesh.device)(draw())
    expected = reference(input_ids=batch.tokens_BS, use_cache=False).logits
    with torch.no_grad():
        logits = model.module.logits(batch.tokens_BS, batch.position_ids)
    loss = nn.functional.cross_entropy(
        expected.reshape(-1, VOCABULARY), batch.labels_BS.reshape(-1)
    )
    loss.backward()
    own = forward_backward(model, mesh, [batch])
    scale_and_clip(
        optimizer,
        reduce_step(model, optimizer, mesh, own, batch.num_tokens),
        clip_grad_norm=0,
    )
    measured = {
        "logits": relative(logits, expected.detach()),
        "loss": abs(float(own) / batch.num_tokens - float(loss.detach())),
    }
    return measured | worst_gradient(optimizer, reference, config)


ALLOWED = {"logits": 5e-6, "loss": 1e-5, "router": 2e-5, "other": 1e-5}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case: str) -> None:
    (measured,) = distances(0, 1, {case: {}})
    assert all(measured[kind] <= ALLOWED[kind] for kind in ALLOWED), measured


@pytest.mark.parallel
def test_two_tensor_parallel_ranks_give_the_logits_and_gradients_of_transformers() -> None:
    layouts = {
        "experts": {"tp": 2, "sequence_parallel": True, "zero": 0},
        "dense": {"tp": 2, "zero": 0},
    }
    for rank in run_ranks(distances, 2, layouts):
        for measured in rank:
            assert all(measured[kind] <= ALLOWED[kind] for kind in ALLOWED), measured


class MTPTargets(nn.Module):
    """What the published checkpoint has beside a block: enorm, hnorm, eh_proj and the
    norm of its shared head.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = (
            nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        without = config.first_k_dense_replace == config.num_hidden_layers
        self.block = DeepseekV3DecoderLayer(
            config, 0 if without else config.num_hidden_layers
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.04)
        for bias in self.buffers():
            nn.init.normal_(bias, 0.0, 0.2)


def mtp_losses(
    reference: DeepseekV3ForCausalLM, tokens: Tensor, ends: bool, depths: int
) -> list[Tensor]:
    """[sum of the loss over the tokens that have a label] of the next token and of each
    MTP depth; no label is taken from beyond the sample or from another document.
    """
    base = reference.model
    mtp_layers = reference.mtp
    assert isinstance(mtp_layers, nn.ModuleList)
    length = tokens.shape[1] - 1
    documents = torch.zeros_like(tokens)
    if ends:
        documents[:, 1:] = (tokens[:, :-1] == END).cumsum(1)
    seen = (documents[:, :-1, None] == documents[:, None, :-1]) & torch.ones(
        length, length, dtype=torch.bool
    ).tril()
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[
        :, None
    ]
    words = base.embed_tokens(tokens)
    positions = torch.arange(length)[None]
    angles = base.rotary_emb(words, positions)
    hidden = words[:, :-1]
    for layer in base.layers:
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=angles, position_ids=positions
        )
    states = [base.norm(hidden)]
    for depth in range(depths):
        part = mtp_layers[depth]
        assert isinstance(part, MTPTargets)
        # Places without such a token are filled with the last one; nothing that counts
        # sees them.
        ahead = words[:, torch.arange(length).add(depth + 1).clamp(max=length)]
        joined = part.eh_proj(torch.cat([part.enorm(ahead), part.hnorm(states[-1])], -1))
        states.append(
            part.norm(
                part.block(
                    joined,
                    attention_mask=mask,
                    position_embeddings=angles,
                    position_ids=positions,
                )
            )
        )
    losses = []
    for depth, state in enumerate(states):
        logits = reference.lm_head(state)
        total = torch.zeros((), dtype=torch.float64)
        for row in range(len(tokens)):
            for place in range(length - depth):
                target = place + depth + 1
                if documents[row, place] == documents[row, target]:
                    total = total - logits[row, place].log_softmax(-1)[tokens[row, target]]
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("ends", "case"),
    [(False, "experts"), (True, "dense")],
    ids=["experts", "dense-documents"],
)
def test_mtp_layers_have_the_gradients_of_a_float64_reference(
    ends: bool, case: str
) -> None:
    mtp = {"num_layers": 2, "loss_coeff": 0.6}
    config = config_of(CASES[case], model={"mtp": mtp})
    reference = judge(CASES[case])
    reference.mtp = nn.ModuleList([MTPTargets(reference.config) for _ in range(2)])
    samples = draw()
    if ends:
        samples[0, [3, 4, 9]] = samples[1, [SEQUENCE - 2]] = samples[2, [0, SEQUENCE]] = END
    mesh = ParallelMesh.single()
    model, optimizer = ours(config, mesh, reference)
    batch = BatchMaker(
        mesh.device, end_of_document=END if ends else None, num_mtp_layers=2
    )(samples)

    next_token, *later_tokens = mtp_losses(
        reference.double(), torch.from_numpy(samples), ends, 2
    )
    ((next_token + 0.6 / 2 * torch.stack(later_tokens).sum()) / batch.num_tokens).backward()
    own = forward_backward(model, mesh, [batch])
    scale_and_clip(
        optimizer,
        reduce_step(model, optimizer, mesh, own, batch.num_tokens),
        clip_grad_norm=0,
    )
    assert abs(float(own) - float(next_token.detach())) <= 1e-5 * float(own), (
        "what is reported is the next token's loss"
    )
    worst = worst_gradient(optimizer, reference, config)
    assert worst["other"] <= 1e-5, worst
    assert worst["router"] <= 2e-5, worst


def bf16_distances(seed: int) -> tuple[float, float]:
    """Squared distances of the gradients to float64's: ours in bf16, and transformers'
    under autocast.
    """
    case = CASES["dense"] | {"yarn": True, "q_lora_rank": 24}
    config = config_of(case, training={"precision": "bf16"})
    reference = judge(case, seed)
    mesh = ParallelMesh.single()
    model, optimizer = ours(config, mesh, reference)
    batch = BatchMaker(mesh.device)(draw(seed))

    def gradients(module: nn.Module, autocast: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = module(input_ids=batch.tokens_BS, use_cache=False).logits
        wide = logits.float() if autocast else logits
        nn.functional.cross_entropy(
            wide.reshape(-1, VOCABULARY), batch.labels_BS.reshape(-1)
        ).backward()
        return logical(
            {
                name: parameter.grad
                for name, parameter in module.named_parameters()
                if parameter.grad is not None
            },
            config,
        )

    truth = gradients(copy.deepcopy(reference).double(), False)
    autocast = gradients(reference, True)
    loss = forward_backward(model, mesh, [batch])
    scale_and_clip(
        optimizer,
        reduce_step(model, optimizer, mesh, loss, batch.num_tokens),
        clip_grad_norm=0,
    )
    own = {
        name: entry.boxes[0].tensor for name, entry in optimizer.sharded_gradients().items()
    }
    total = sum(float(gradient.square().sum()) for gradient in truth.values())
    ours_, others = (
        sum(
            float((measured[name].double() - gradient).square().sum())
            for name, gradient in truth.items()
        )
        / total
        for measured in (own, autocast)
    )
    return ours_, others


def test_bf16_is_as_close_to_float64_as_autocast() -> None:
    measured = [bf16_distances(seed) for seed in range(8)]
    own, autocast = (sum(distances) ** 0.5 for distances in zip(*measured, strict=True))
    assert own <= 1.3 * autocast, own / autocast


@pytest.mark.parametrize("case", CASES)
def test_cached_generation_goes_on_as_the_whole_sequence_would(case: str) -> None:
    config = config_of(CASES[case])
    reference = judge(CASES[case])
    model, _ = ours(config, ParallelMesh.single(), reference)
    model.module.eval()
    prompt = draw()[0, :6].tolist()
    new = generate_tokens(
        model.module, prompt, 8, Sampling(temperature=0), 0, stop=(), vocabulary=VOCABULARY
    )
    tokens = torch.tensor([prompt + new])
    with torch.no_grad():
        expected = reference(input_ids=tokens, use_cache=False).logits[0, 5:-1].argmax(-1)
    assert new == expected.tolist()
