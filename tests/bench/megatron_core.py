"""megatron-core 0.16.1 as a contestant: its GPTModel by the local layer spec, its
distributed data parallelism, sharded optimizer and schedules, on CPU with gloo. bf16 is
Megatron's: bf16 parameters, fp32 main parameters and gradient buffers.

With `compiled` those of its fusions that torch compiles are on: SwiGLU, residual and
dropout, cross entropy. What is CUDA only is off: fused scores, fused norms,
accumulation in the product, and attention by Transformer Engine.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)

from tests.bench import megatron_core_on_cpu  # noqa: E402

megatron_core_on_cpu.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from tests.bench import reference  # noqa: E402
from tests.bench.contestants import Step, Terms  # noqa: E402


def program(terms: Terms, rank: int, *, compiled: bool) -> Step:
    """Builds everything; torch.distributed is initialised."""
    parallel_state.initialize_model_parallel(terms.tp, terms.pp)
    megatron_core_on_cpu.patch_random()
    tensor_parallel.model_parallel_cuda_manual_seed(reference.SEED)
    init_num_microbatches_calculator(
        rank, None, reference.GLOBAL_BATCH, terms.micro_batch, terms.dp
    )
    config = _config(terms, compiled)
    model = _model(config, terms)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=reference.LEARNING_RATE,
            min_lr=reference.LEARNING_RATE,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-8,
            clip_grad=1.0,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    for group in optimizer.param_groups:
        group["lr"] = reference.LEARNING_RATE
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return _step(terms, rank, model, optimizer)


def _config(terms: Terms, compiled: bool) -> TransformerConfig:
    dtype = torch.bfloat16 if terms.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=reference.LAYERS,
        hidden_size=reference.HIDDEN,
        num_attention_heads=reference.HEADS,
        ffn_hidden_size=reference.FFN,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=terms.tp,
        pipeline_model_parallel_size=terms.pp,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=compiled,
        bias_dropout_fusion=compiled,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=compiled,
        cross_entropy_fusion_impl="native",
        use_cpu_initialization=True,
        attention_backend=AttnBackend.local,
    )


def _model(config: TransformerConfig, terms: Terms) -> DistributedDataParallel:
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=config.normalization),
        vocab_size=reference.VOCABULARY,
        max_sequence_length=reference.SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=10000,
    )
    whole = _megatron_names(reference.weights())
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
            if match:  # numbered from zero in every stage
                name = f"{model.decoder.layers[int(match[1])].layer_number - 1}.{match[2]}"
            parameter.copy_(_part(name, whole[name], tp_rank, terms.tp))
    wrapped = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True
        ),
        module=Float16Module(config, model) if config.bf16 else model,
    )
    wrapped.broadcast_params()
    return wrapped


def _megatron_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors; layers as `<number>.<rest>`.

    Rows of the fused projection go head by head: query, key, value.
    """
    renamed = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    for layer in range(reference.LAYERS):
        prefix = f"model.layers.{layer}."
        heads = [
            state[f"{prefix}self_attn.{name}_proj.weight"].view(
                reference.HEADS, -1, reference.HIDDEN
            )
            for name in "qkv"
        ]
        renamed |= {
            f"{layer}.self_attention.linear_qkv.weight": torch.cat(heads, dim=1).reshape(
                -1, reference.HIDDEN
            ),
            f"{layer}.self_attention.linear_proj.weight": state[
                prefix + "self_attn.o_proj.weight"
            ],
            f"{layer}.mlp.linear_fc1.weight": torch.cat(
                [state[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            ),
            f"{layer}.mlp.linear_fc2.weight": state[prefix + "mlp.down_proj.weight"],
            f"{layer}.input_layernorm.weight": state[prefix + "input_layernorm.weight"],
            f"{layer}.pre_mlp_layernorm.weight": state[
                prefix + "post_attention_layernorm.weight"
            ],
        }
    return renamed


def _part(name: str, whole: Tensor, tp_rank: int, tp: int) -> Tensor:
    """A rank's rows, or columns of what comes second in attention and MLP; gate and up
    are cut each.
    """
    if "norm" in name:
        return whole
    if "linear_fc1" in name:
        return torch.cat([half.chunk(tp)[tp_rank] for half in whole.chunk(2)])
    return whole.chunk(tp, dim=1 if re.search("linear_proj|linear_fc2", name) else 0)[
        tp_rank
    ]


def _step(terms: Terms, rank: int, model: DistributedDataParallel, optimizer: Any) -> Step:
    positions = torch.arange(reference.SEQUENCE).unsqueeze(0).expand(terms.micro_batch, -1)
    mask = torch.triu(
        torch.ones(reference.SEQUENCE, reference.SEQUENCE), diagonal=1
    ).bool()[None, None]
    forward_backward = get_forward_backward_func()

    def loss_function(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.float().mean()
        return loss, {
            "loss": loss.detach().clone()
        }  # the schedule divides the loss in place

    def forward_step(
        microbatches: Iterator[Tensor], model: nn.Module
    ) -> tuple[Tensor, object]:
        part = next(microbatches)
        return model(part[:, :-1], positions, mask, labels=part[:, 1:]), loss_function

    def step(rows: np.ndarray, exact: bool) -> tuple[float, float] | None:
        microbatches = [torch.from_numpy(part) for part in terms.microbatches(rows, rank)]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        output = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=[model],
            num_microbatches=len(microbatches),
            seq_length=reference.SEQUENCE,
            micro_batch_size=terms.micro_batch,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        if not parallel_state.is_pipeline_last_stage():
            return None
        loss = torch.stack([part["loss"] for part in output]).mean()
        if terms.dp > 1:
            dist.all_reduce(loss)
            loss /= terms.dp
        return float(loss), float(norm)

    return step
