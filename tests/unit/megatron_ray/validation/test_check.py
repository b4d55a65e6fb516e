"""Every cross-field rule gives one problem that names field, numbers and remedy."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation import check, resolution

BASE: dict[str, Any] = {
    "model": {"preset": "gpt-tiny"},
    "data": {"train": [{"path": "builtin://python-stdlib"}]},
    "training": {
        "seq_length": 256,
        "micro_batch_size": 4,
        "global_batch_size": 16,
        "steps": 10,
    },
    "optimizer": {"lr": 1e-3},
}


def config(**groups: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            **BASE,
            **{name: {**BASE.get(name, {}), **fields} for name, fields in groups.items()},
        }
    )


def test_a_good_config_has_no_problem() -> None:
    assert (
        check.find_problems(config(parallel={"tp": 2, "sequence_parallel": True}), 2) == []
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_overlapped_tokens_are_legal_and_have_no_effect_on_one_rank(tp: int) -> None:
    parallel = {"tp": tp, "sequence_parallel": tp > 1, "tp_comm_overlap": True}
    assert check.find_problems(config(parallel=parallel), tp) == []


@pytest.mark.parametrize(
    ("groups", "world", "pointer", "words"),
    [
        (
            {"parallel": {"cp": 3}},
            None,
            "/training/seq_length",
            "cp=3 splits a sequence into 2 x cp = 6 chunks, and seq_length=256 is not a "
            "multiple of that; use 258",
        ),
        (
            {"parallel": {"cp": 256}},
            None,
            "/training/seq_length",
            "cp=256 splits a sequence into 2 x cp = 512 chunks, and seq_length=256 is not a "
            "multiple of that; use 512",
        ),
        (
            {"parallel": {"cp": 4, "tp": 2, "cp_method": "a2a"}},
            None,
            "/parallel/cp_method",
            "num_attention_heads=4 over tp=2 cannot be split over the 4 ranks that "
            "exchange heads; use a multiple of 8, or cp_method=p2p",
        ),
        (
            {"parallel": {"cp": 4, "cp_method": "a2a+p2p"}},
            None,
            "/parallel/hierarchical_cp_sizes",
            "hierarchical_cp_sizes is missing; give how many ranks exchange heads and how "
            "many such groups there are, with product 4",
        ),
        (
            {
                "parallel": {
                    "cp": 4,
                    "cp_method": "a2a+p2p",
                    "hierarchical_cp_sizes": (2, 4),
                }
            },
            None,
            "/parallel/hierarchical_cp_sizes",
            "hierarchical_cp_sizes = 2 x 4 is not cp=4",
        ),
        (
            {"parallel": {"cp": 4, "hierarchical_cp_sizes": (2, 2)}},
            None,
            "/parallel/hierarchical_cp_sizes",
            "hierarchical_cp_sizes needs cp_method=a2a+p2p, not p2p",
        ),
        (
            {"parallel": {"order": "tp-pp-dp"}},
            None,
            "/parallel/order",
            "order=tp-pp-dp must name each of tp, cp, ep, dp, pp once",
        ),
        (
            {"parallel": {"zero_replicas": 2}},
            None,
            "/parallel/zero_replicas",
            "zero_replicas=2 needs zero=3, not 1; leave it out, or use zero=3",
        ),
        (
            {"parallel": {"zero": 0, "dp": 4, "overlap_param_gather": True}},
            None,
            "/parallel/overlap_param_gather",
            "overlap_param_gather needs zero=1, not 0, which gathers no weights after an "
            "update; leave it out, or use zero=1",
        ),
        (
            {"parallel": {"tp": 2, "tp_comm_overlap": True}},
            None,
            "/parallel/tp_comm_overlap",
            "tp_comm_overlap sends the tokens that sequence_parallel splits over tp=2, and "
            "sequence_parallel is false; set it to true, or leave tp_comm_overlap out",
        ),
        (
            {"parallel": {"tp": 2, "tp_symmetric_memory": True}},
            None,
            "/parallel/tp_symmetric_memory",
            "tp_symmetric_memory copies the tokens that tp_comm_overlap sends, which is "
            "false; set it to true, or leave tp_symmetric_memory out",
        ),
        (
            {"parallel": {"zero": 3, "dp": 4, "zero_replicas": 3}},
            None,
            "/parallel/zero_replicas",
            "zero_replicas=3 does not divide dp x cp = 4 x 1; use a divisor of 4",
        ),
        (
            {"parallel": {"pp": 2, "schedule": "zb-h1", "zero": 3}},
            None,
            "/parallel/schedule",
            "schedule=zb-h1 computes weight gradients after zero=3 has freed the block's "
            "weights; use 1f1b, or zero=1",
        ),
        (
            {"parallel": {"ep": 2}},
            None,
            "/parallel/ep",
            "ep=2 needs a model with experts; give model.moe, or leave it out",
        ),
        (
            {"parallel": {"schedule": "zb-v"}},
            None,
            "/parallel/schedule",
            "schedule=zb-v needs pp > 1; raise pp, or leave it out",
        ),
        (
            {"parallel": {"vpp": 2}},
            None,
            "/parallel/vpp",
            "vpp=2 needs pp > 1; raise pp, or leave it out",
        ),
        (
            {"parallel": {"layout": "EttttL"}},
            None,
            "/parallel/layout",
            "layout=EttttL needs pp > 1",
        ),
        (
            {"parallel": {"pp": 3}},
            None,
            "/parallel/pp",
            "4 layers do not divide evenly into 3 stages; nearest: num_layers=3 or 6",
        ),
        (
            {"parallel": {"pp": 2, "vpp": 2, "schedule": "1f1b"}},
            None,
            "/parallel/schedule",
            "schedule=1f1b does not go with vpp=2 chunks per rank; use schedule=interleaved",
        ),
        (
            {"parallel": {"pp": 2, "schedule": "zb-v"}},
            None,
            "/parallel/schedule",
            "schedule=zb-v has two chunks per rank, not vpp=1; use vpp=2",
        ),
        (
            {"parallel": {"pp": 2, "schedule": "interleaved"}},
            None,
            "/parallel/schedule",
            "raise vpp, or use 1f1b",
        ),
        (
            {"parallel": {"pp": 2, "layout": "Ett|t|tL"}},
            None,
            "/parallel/layout",
            "has 3 stages, pp x vpp = 2 x 1 needs 2",
        ),
        (
            {"parallel": {"pp": 2, "layout": "Ett|tL"}},
            None,
            "/parallel/layout",
            "has 3 decoder layers ('t'), the model has 4",
        ),
        (
            {"parallel": {"pp": 2, "layout": "Ett|ttL", "first_stage_layers": 2}},
            None,
            "/parallel/layout",
            "layout defines the contents of every stage; leave out first_stage_layers",
        ),
        (
            {"parallel": {"etp": 4}},
            None,
            "/parallel/etp",
            "etp=4 needs a model with experts; give model.moe, or leave it out",
        ),
        (
            {"parallel": {"tp": 3}},
            None,
            "/parallel/tp",
            "tp=3 does not divide model.num_attention_heads=4; use a tp that divides both",
        ),
        (
            {
                "model": {
                    "num_attention_heads": 12,
                    "num_query_groups": 6,
                    "head_dim": 32,
                    "ffn_hidden_size": 384,
                },
                "parallel": {"tp": 4},
            },
            None,
            "/parallel/tp",
            "tp=4 is neither a multiple nor a divisor of model.num_query_groups=6",
        ),
        (
            {"model": {"ffn_hidden_size": 386}, "parallel": {"tp": 4}},
            None,
            "/parallel/tp",
            "does not divide model.ffn_hidden_size=386",
        ),
        (
            {
                "parallel": {"tp": 2, "sequence_parallel": True},
                "training": {"seq_length": 255},
            },
            None,
            "/training/seq_length",
            "sequence_parallel splits seq_length=255 into tp x cp = 2 x 1 parts; use a "
            "multiple of 2, or turn it off",
        ),
        (
            {"model": {"hidden_size": 8192, "num_attention_heads": 4}},
            None,
            "/model/num_attention_heads",
            "hidden_size=8192 over num_attention_heads=4 leaves heads of width 2048; use more "
            "heads, or give head_dim, at most 1024",
        ),
        (
            {"model": {"head_dim": 31}},
            None,
            "/model/head_dim",
            "rotary positions need an even head_dim, not 31",
        ),
        (
            {"model": {"num_query_groups": 3}},
            None,
            "/model/num_query_groups",
            "num_query_groups=3 does not divide num_attention_heads=4; use one that does",
        ),
        (
            {"model": {"position_embedding": "learned", "max_sequence_length": 128}},
            None,
            "/training/seq_length",
            "seq_length=256 is longer than the 128 learned positions",
        ),
        (
            {"model": {"full_attention_every": 2}},
            None,
            "/model/full_attention_every",
            "full_attention_every=2 exempts layers from the sliding window, and there is "
            "no sliding_window; give one, or leave it out",
        ),
        (
            {"model": {"zero_centered_norm": True, "norm": "layernorm"}},
            None,
            "/model/zero_centered_norm",
            "zero_centered_norm needs norm=rmsnorm, not layernorm; "
            "leave it out, or change norm",
        ),
        (
            {"model": {"mup": {"base_hidden_size": 32}}, "optimizer": {"name": "sgd"}},
            None,
            "/model/mup",
            "mup scales the learning rates of Adam's kind of optimizer, not those of sgd; use "
            "another optimizer.name, or leave mup out",
        ),
        (
            {
                "model": {
                    "position_embedding": "none",
                    "rope_scaling": {"kind": "linear", "factor": 2.0},
                }
            },
            None,
            "/model/rope_scaling",
            "rope_scaling applies to rotary positions, not to position_embedding=none; "
            "leave it out",
        ),
        (
            {
                "model": {
                    "rope_scaling": {
                        "kind": "llama3",
                        "factor": 8.0,
                        "low_freq_factor": 4.0,
                    }
                }
            },
            None,
            "/model/rope_scaling/high_freq_factor",
            "high_freq_factor=4 must be above low_freq_factor=4: between them frequencies "
            "change from unchanged to divided; raise it",
        ),
        (
            {"model": {"rope_scaling": {"kind": "yarn", "factor": 8.0, "beta_fast": 0.5}}},
            None,
            "/model/rope_scaling/beta_fast",
            "beta_fast=0.5 must be above beta_slow=1",
        ),
        (
            {"model": {"vocab_size": 1000}},
            None,
            "/data/tokenizer/vocab_size",
            "the tokenizer's 4096 tokens do not fit into model.vocab_size=1000",
        ),
        (
            {"training": {"steps": 1 << 30}},
            None,
            "/training/steps",
            "steps x global_batch_size = 1073741824 x 16 = 17179869184 samples, at most "
            "2147483648 can be ordered",
        ),
        (
            {
                "training": {
                    "steps": 1 << 28,
                    "rampup_batch_size": {"start": 8, "increment": 8, "samples": 80},
                }
            },
            None,
            "/training/steps",
            "268435456 steps of up to 16 samples = 4294967216 samples, at most 2147483648",
        ),
        (
            {
                "parallel": {"dp": 2},
                "training": {
                    "micro_batch_size": 2,
                    "rampup_batch_size": {"start": 6, "increment": 2, "samples": 80},
                },
            },
            None,
            "/training/rampup_batch_size",
            "start=6 and increment=2 do not lead to global_batch_size=16 in multiples of "
            "micro_batch_size x dp = 2 x 2 samples; use start=8 and increment=4",
        ),
        (
            {"training": {"rampup_batch_size": {"start": 4, "increment": 7, "samples": 9}}},
            None,
            "/training/rampup_batch_size",
            "multiples of micro_batch_size x dp = 4 x 1 samples; use start=4 and increment=4",
        ),
        (
            {
                "training": {
                    "rampup_batch_size": {"start": 16, "increment": 4, "samples": 9}
                }
            },
            None,
            "/training/rampup_batch_size",
            "use start=12 and increment=4",
        ),
        (
            {
                "parallel": {"dp": 4},
                "training": {
                    "micro_batch_size": 4,
                    "rampup_batch_size": {"start": 8, "increment": 8, "samples": 9},
                },
            },
            None,
            "/training/rampup_batch_size",
            "micro_batch_size x dp = 4 x 4 is the whole global_batch_size=16, so no step can "
            "have fewer samples; leave it out, or lower micro_batch_size",
        ),
        (
            {"model": {"attention_dropout": 0.1}, "parallel": {"cp": 2}},
            None,
            "/model/attention_dropout",
            "attention_dropout=0.1 is not supported with cp=2, whose attention keeps no "
            "probabilities to drop; use 0",
        ),
        (
            {"training": {"recompute": {"granularity": "selective", "method": "uniform"}}},
            None,
            "/training/recompute/method",
            "method is for granularity=full, not for selective; "
            "leave it out, or change granularity",
        ),
        (
            {"training": {"recompute": {"granularity": "selective", "num_layers": 2}}},
            None,
            "/training/recompute/num_layers",
            "num_layers is for granularity=full, not for selective",
        ),
        (
            {"training": {"recompute": {"modules": ["norm"]}}},
            None,
            "/training/recompute/modules",
            "modules is for granularity=selective, not for none",
        ),
        (
            {"training": {"recompute": {"granularity": "full", "num_layers": 1}}},
            None,
            "/training/recompute/method",
            "granularity=full needs method; give uniform or block",
        ),
        (
            {"training": {"recompute": {"granularity": "full", "method": "block"}}},
            None,
            "/training/recompute/num_layers",
            "granularity=full needs num_layers; give a number of layers; 1 recomputes each "
            "layer by itself",
        ),
        (
            {
                "training": {
                    "recompute": {"granularity": "full", "method": "block", "num_layers": 3}
                },
                "parallel": {"pp": 2},
            },
            None,
            "/training/recompute/num_layers",
            "num_layers=3 is more than the 2 layers of the largest stage; lower it",
        ),
        (
            {
                "training": {
                    "recompute": {
                        "granularity": "selective",
                        "modules": ["mlp", "activation"],
                    }
                }
            },
            None,
            "/training/recompute/modules",
            "activation is part of mlp, which is recomputed as a whole; leave out one of the "
            "two",
        ),
        (
            {"training": {"recompute": {"granularity": "selective", "modules": ["moe"]}}},
            None,
            "/training/recompute/modules",
            "moe is for layers with experts, and the model has none; leave it out",
        ),
        (
            {
                "training": {
                    "recompute": {
                        "granularity": "full",
                        "method": "block",
                        "num_layers": 1,
                        "save": ["attention"],
                    }
                }
            },
            None,
            "/training/recompute/save",
            "save is for granularity=operations, not for full; leave it out, or change "
            "granularity",
        ),
        (
            {"training": {"recompute": {"every": 2}}},
            None,
            "/training/recompute/every",
            "every is for granularity=operations, not for none",
        ),
        (
            {
                "training": {
                    "recompute": {
                        "granularity": "operations",
                        "save": ["attention"],
                        "every": 2,
                    }
                }
            },
            None,
            "/training/recompute/every",
            "every=2 chooses products, which are not in save; leave it out, or add products "
            "to save",
        ),
        (
            {
                "training": {
                    "recompute": {"granularity": "operations", "save": ["reduce_scatter"]}
                }
            },
            None,
            "/training/recompute/save",
            "reduce_scatter is for sums over tp, and tp=1 has none; leave it out",
        ),
        (
            {
                "training": {
                    "recompute": {"granularity": "operations", "save": ["attention"]}
                },
                "model": {"attention_dropout": 0.1},
            },
            None,
            "/training/recompute/save",
            "attention is always recomputed with attention_dropout=0.1; leave it out",
        ),
        (
            {
                "training": {
                    "recompute": {"granularity": "operations", "save": ["all_to_all"]}
                }
            },
            None,
            "/training/recompute/save",
            "all_to_all is for layers with experts, and the model has none; leave it out",
        ),
        (
            {
                "training": {
                    "recompute": {"granularity": "operations", "save": ["all_to_all"]}
                },
                "model": {"moe": {"num_experts": 4}},
            },
            None,
            "/training/recompute/save",
            "all_to_all is for experts with ep > 1 and dispatcher=alltoall, here is ep=1, "
            "dispatcher=alltoall; leave it out",
        ),
        (
            {"schedule": {"min_lr": 0.1}},
            None,
            "/schedule/min_lr",
            "min_lr=0.1 is above optimizer.lr=0.001; lower it",
        ),
        (
            {"schedule": {"warmup_steps": 10, "decay_steps": 5}},
            None,
            "/schedule/decay_steps",
            "decay_steps=5 is not after warmup_steps=10, so the rate would drop from "
            "optimizer.lr=0.001 to min_lr=0 at once; decay_steps counts from step 0 with the "
            "warm-up included: leave it out to decay until the last step",
        ),
        (
            {"schedule": {"warmup_steps": 5, "decay_steps": 5, "min_lr": 1e-4}},
            None,
            "/schedule/decay_steps",
            "decay_steps=5 is not after warmup_steps=5",
        ),
        (
            {"schedule": {"kind": "linear", "decay_steps": 8}},
            None,
            "/schedule/decay_steps",
            "decay_steps=8 with min_lr=0 leaves a rate of 0 for 3 of training.steps=10; set "
            "min_lr above 0, leave decay_steps out, or lower steps to 8",
        ),
        (
            {"schedule": {"decay_steps": 8, "min_lr": 1e-12}},
            None,
            "/schedule/decay_steps",
            "decay_steps=8 with min_lr=1e-12 leaves a rate of 1e-12 for 3 of training.steps=10",
        ),
        (
            {"training": {"steps": 2, "skip_steps": [2, 1]}},
            None,
            "/training/skip_steps",
            "all of training.steps=2 are left out; keep one",
        ),
        (
            {"optimizer": {"groups": [{"parameters": ["*.bias"], "weight_decay": 0}]}},
            None,
            "/optimizer/groups/0/parameters",
            "no parameter matches '*.bias'; names are such as 'embedding.weight'",
        ),
        (
            {"optimizer": {"groups": [{"parameters": ["embeding.*"], "lr_scale": 2}]}},
            None,
            "/optimizer/groups/0/parameters",
            "no parameter matches 'embeding.*'; did you mean 'embedding.*'?",
        ),
        (
            {"optimizer": {"freeze": ["layers.1.attn.q.weight"]}},
            None,
            "/optimizer/freeze",
            "no parameter matches 'layers.1.attn.q.weight'; did you mean "
            "'layers.*.attention.q.weight'?",
        ),
        (
            {
                "model": {"tie_embeddings": True},
                "optimizer": {"groups": [{"parameters": ["head.*"], "lr_scale": 2}]},
            },
            None,
            "/optimizer/groups/0/parameters",
            "no parameter matches 'head.*'; the head is tied to 'embedding.weight', so name "
            "that",
        ),
        (
            {"optimizer": {"groups": [{"parameters": ["embedding.*"]}]}},
            None,
            "/optimizer/groups/0",
            "the group sets nothing; give weight_decay, lr_scale, beta1, beta2 or eps",
        ),
        (
            {
                "optimizer": {
                    "name": "muon",
                    "groups": [
                        {"parameters": ["*.weight"], "beta1": 0.8},
                        {"parameters": ["*.q.*", "*.down.*"], "lr_scale": 2, "eps": 1e-6},
                    ],
                }
            },
            None,
            "/optimizer/groups/1/eps",
            "the group has nothing but matrices, which muon updates without eps; leave it out",
        ),
        (
            {
                "optimizer": {
                    "freeze": ["embedding.*"],
                    "groups": [{"parameters": ["embedding.*"], "weight_decay": 0}],
                }
            },
            None,
            "/optimizer/groups/0/parameters",
            "all parameters of the group are frozen by optimizer.freeze",
        ),
        (
            {"optimizer": {"freeze": ["layers.0.*", "layers.4.*"]}},
            None,
            "/optimizer/freeze",
            "no parameter matches 'layers.4.*'; names are such as 'embedding.weight' and "
            "'layers.0.attention_norm.weight'",
        ),
        (
            {"optimizer": {"freeze": ["*.q.weight", "*.v.weight"]}},
            None,
            "/optimizer/freeze",
            "are one tensor, and 'layers.0.attention.k.weight' would still be trained; "
            "freeze all or none",
        ),
        (
            {"optimizer": {"freeze": ["*"]}},
            None,
            "/optimizer/freeze",
            "all 39 parameters are frozen, so nothing would be trained",
        ),
        (
            {"training": {"precision": "bf16", "loss_scale": {"constant": 8}}},
            None,
            "/training/loss_scale",
            "loss_scale is for precision=fp16, not for bf16, whose gradients need none; leave "
            "it out, or set precision to fp16",
        ),
        (
            {"training": {"grad_reduce_in_fp32": False}},
            None,
            "/training/grad_reduce_in_fp32",
            "reduces gradients in the type of precision, which is fp32 here; leave it out, or "
            "set precision to bf16",
        ),
        (
            {"training": {"fp32_residual_connection": True}},
            None,
            "/training/fp32_residual_connection",
            "with fp32 everything is fp32 anyway; leave it out",
        ),
        (
            {
                "training": {
                    "precision": "fp16",
                    "loss_scale": {"constant": 8, "growth_interval": 10},
                }
            },
            None,
            "/training/loss_scale/growth_interval",
            "growth_interval is for a dynamic scale, and constant=8 is given; leave one of "
            "them out",
        ),
        (
            {
                "training": {
                    "precision": "fp16",
                    "loss_scale": {"initial_scale": 8, "min_scale": 16},
                }
            },
            None,
            "/training/loss_scale/min_scale",
            "min_scale=16 is above initial_scale=8; lower the first or raise the second",
        ),
        (
            {"parallel": {"dp": 3}},
            None,
            "/training/global_batch_size",
            "global_batch_size=16 is not a multiple of micro_batch_size x dp = 4 x 3",
        ),
        (
            {"parallel": {"tp": 4, "dp": 2}},
            4,
            "/parallel",
            "= 4 x 1 x 1 x 2 = 8 ranks, but there is room for 4; lower a degree or add nodes",
        ),
    ],
)
def test_each_rule(
    groups: dict[str, Any], world: int | None, pointer: str, words: str
) -> None:
    problems = check.find_problems(config(**groups), world)
    assert [problem.pointer for problem in problems] == [pointer]
    assert words in problems[0].detail


def test_an_odd_head_is_refused_even_when_it_is_derived() -> None:
    problems = check.find_problems(
        config(model={"hidden_size": 60, "num_attention_heads": 4})
    )
    assert [problem.code for problem in problems] == ["rope_even"]


@pytest.mark.parametrize(("world", "dp"), [(1, 1), (2, 2), (3, 2), (8, 4), (100, 4)])
def test_auto_dp_is_the_largest_that_fits_and_divides(world: int, dp: int) -> None:
    assert resolution.resolve(config(), world).parallel.dp == dp


def test_sequence_parallel_means_nothing_without_tp() -> None:
    assert not resolution.resolve(
        config(parallel={"sequence_parallel": True}), 4
    ).parallel.sequence_parallel


def test_the_vocabulary_comes_from_the_tokenizer_unless_given() -> None:
    assert resolution.with_vocabulary(config(), 300).model.vocab_size == 300
    assert (
        resolution.with_vocabulary(config(model={"vocab_size": 5000}), 300).model.vocab_size
        == 5000
    )
    with pytest.raises(
        ValueError, match=r"model\.vocab_size=200 is smaller than the tokenizer's 300"
    ):
        resolution.with_vocabulary(config(model={"vocab_size": 200}), 300)


def test_tokens_that_do_not_occur_need_no_row_and_weights_can_get_more() -> None:
    smaller = config(model={"vocab_size": 290})
    assert resolution.with_vocabulary(smaller, 300, 290).model.vocab_size == 290
    started = config(model={"vocab_size": 290}, checkpoint={"start_from": "x"})
    with pytest.raises(
        ValueError, match="set it to 295 or more: rows that the weights lack"
    ):
        resolution.with_vocabulary(started, 300, 295)


def test_a_tokenizer_that_is_taken_from_weights_has_their_size() -> None:
    fields: dict[str, Any] = {
        "model": {"vocab_size": 300},
        "data": {"tokenizer": {"vocab_size": 4096}},
    }
    (problem,) = check.find_problems(config(**fields))
    assert problem.pointer == "/data/tokenizer/vocab_size"
    assert check.find_problems(config(**fields, checkpoint={"start_from": "x"})) == []


def test_a_world_must_be_resolved_before_it_is_counted() -> None:
    with pytest.raises(ValueError, match=r"parallel\.dp is not resolved"):
        resolution.world_size(config())


def latent(**changes: Any) -> dict[str, Any]:
    mla = {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
    }
    return {"preset": "gpt-tiny", "mla": mla} | changes


@pytest.mark.parametrize(
    ("model", "parallel", "pointer", "words"),
    [
        (
            latent(qkv_bias=True, attention_output_bias=True, linear_bias=True),
            {},
            "/model/linear_bias",
            "linear_bias is not supported with mla; leave it out, or leave out mla",
        ),
        (latent(qk_norm=True), {}, "/model/qk_norm", "qk_norm is not supported with mla"),
        (
            latent(sliding_window=64),
            {},
            "/model/sliding_window",
            "sliding_window is not supported with mla",
        ),
        (
            latent(position_embedding="none"),
            {},
            "/model/position_embedding",
            "mla needs rotary positions, not position_embedding=none; use rope",
        ),
        (
            latent(num_query_groups=2),
            {},
            "/model/num_query_groups",
            "mla has a key for each of the 4 query heads, so num_query_groups=2 is not "
            "possible; leave it out",
        ),
        (
            latent(head_dim=48),
            {},
            "/model/head_dim",
            "head_dim=48 is not qk_nope_head_dim + qk_rope_head_dim = 32; leave it out",
        ),
        (
            latent(mla={"v_head_dim": 256}),
            {},
            "/model/mla/v_head_dim",
            "v_head_dim=256 is wider than queries and keys (192), which no attention kernel "
            "supports; use at most 192",
        ),
        (
            latent(num_attention_heads=6, num_query_groups=6),
            {"tp": 4},
            "/parallel/tp",
            "tp=4 does not divide model.num_attention_heads=6",
        ),
        (
            {"preset": "gpt2-tiny", "mtp": {}},
            {},
            "/model/mtp",
            "mtp does not support position_embedding=learned: the tokens that it reads "
            "ahead have no learned positions; use rope, or leave out mtp",
        ),
        (
            {"preset": "gpt-tiny", "mtp": {}},
            {"pp": 2, "layout": "Ett|ttL"},
            "/parallel/layout",
            "has 0 multi-token-prediction layers ('m'), the model has 1",
        ),
        (
            {"preset": "gpt-tiny", "mtp": {}},
            {"pp": 2, "layout": "Ettttm|L"},
            "/parallel/layout",
            "has 'm' before the last stage; put all 'm' beside the loss, as in '|mL'",
        ),
    ],
)
def test_each_rule_of_latent_attention_and_mtp(
    model: dict[str, Any], parallel: dict[str, Any], pointer: str, words: str
) -> None:
    problems = check.find_problems(config(model=model, parallel=parallel))
    assert [problem.pointer for problem in problems] == [pointer]
    assert words in problems[0].detail


@pytest.mark.parametrize(
    ("model", "parallel", "world"),
    [
        (
            latent(mtp={"num_layers": 2}),
            {"tp": 2, "cp": 2, "pp": 2, "layout": "Ett|ttmmL"},
            8,
        ),
        (
            {"preset": "deepseek-tiny"},
            {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True, "pp": 2},
            4,
        ),
    ],
)
def test_latent_attention_and_mtp_go_with_every_axis(
    model: dict[str, Any], parallel: dict[str, Any], world: int
) -> None:
    assert check.find_problems(config(model=model, parallel=parallel), world) == []


def with_experts(
    moe: dict[str, Any], parallel: dict[str, Any], **model: Any
) -> TrainConfig:
    return config(
        model={"preset": "moe-tiny", "moe": {"num_experts": 8} | moe} | model,
        parallel=parallel,
    )


@pytest.mark.parametrize(
    ("moe", "parallel", "pointer", "words"),
    [
        (
            {},
            {"ep": 3},
            "/parallel/ep",
            "ep=3 does not divide model.moe.num_experts=8; use an ep that does",
        ),
        (
            {"ffn_hidden_size": 90},
            {"etp": 4},
            "/parallel/etp",
            "etp=4 does not divide the experts' ffn_hidden_size=90",
        ),
        (
            {"ffn_hidden_size": 90},
            {"tp": 4, "sequence_parallel": True},
            "/parallel/tp",
            "tp=4 does not divide the experts' ffn_hidden_size=90; use an etp that does",
        ),
        (
            {"shared_expert_ffn_hidden_size": 90},
            {"tp": 4, "sequence_parallel": True},
            "/model/moe/shared_expert_ffn_hidden_size",
            "tp=4 does not divide shared_expert_ffn_hidden_size=90; use a multiple of 4",
        ),
        (
            {},
            {"tp": 2},
            "/parallel/sequence_parallel",
            "experts with tp=2 need different tokens on each rank; set sequence_parallel",
        ),
        (
            {"layer_pattern": [0, 1]},
            {},
            "/model/moe/layer_pattern",
            "layer_pattern has 2 entries for num_layers=4; give one per layer",
        ),
        (
            {"top_k": 9},
            {},
            "/model/moe/top_k",
            "top_k=9 is more than num_experts=8; lower it",
        ),
        (
            {"top_k": 1},
            {},
            "/model/moe/pre_softmax",
            "so the router would not learn; set pre_softmax",
        ),
        (
            {"score_function": "sigmoid", "pre_softmax": True},
            {},
            "/model/moe/pre_softmax",
            "pre_softmax has no effect with score_function=sigmoid; leave it out",
        ),
        (
            {"expert_bias": True},
            {},
            "/model/moe/expert_bias",
            "expert_bias needs score_function=sigmoid; set it, or use aux_loss_coeff",
        ),
        (
            {"pad_to_capacity": True},
            {},
            "/model/moe/pad_to_capacity",
            "pad_to_capacity needs a capacity_factor; give one",
        ),
        (
            {"num_groups": 2},
            {},
            "/model/moe/group_top_k",
            "num_groups and group_top_k belong together; give both, or none",
        ),
        (
            {"num_groups": 3, "group_top_k": 1},
            {},
            "/model/moe/num_groups",
            "num_groups=3 does not divide num_experts=8",
        ),
        (
            {"num_groups": 4, "group_top_k": 3},
            {},
            "/model/moe/group_top_k",
            "group_top_k=3 must be at most num_groups=4 and divide top_k=2, and each of "
            "those groups of 2 experts",
        ),
        (
            {"scores_per_group": 2},
            {},
            "/model/moe/scores_per_group",
            "scores_per_group ranks groups, and there are none; leave it out",
        ),
        (
            {"num_groups": 4, "group_top_k": 1, "scores_per_group": 3},
            {},
            "/model/moe/scores_per_group",
            "scores_per_group=3 is more than the 2 experts of a group; lower it",
        ),
        (
            {"num_groups": 4, "group_top_k": 1, "scores_per_group": 2, "top_k": 3},
            {},
            "/model/moe/group_top_k",
            "that many groups of 2 experts must have top_k=3 of them",
        ),
        (
            {},
            {"ep": 2, "dp": 4, "pp": 2, "order": "tp-cp-ep-pp-dp"},
            "/parallel/order",
            "order tp-cp-ep-pp-dp puts the pipeline stages of dense layers and experts on "
            "different ranks",
        ),
        (
            {},
            {"ep": 4, "dp": 2},
            "/parallel/ep",
            "etp x ep = 1 x 4 must divide tp x cp x dp = 1 x 1 x 2; use a dp that is a "
            "multiple of 4, or lower ep or etp",
        ),
    ],
)
def test_each_rule_of_experts(
    moe: dict[str, Any], parallel: dict[str, Any], pointer: str, words: str
) -> None:
    problems = check.find_problems(with_experts(moe, parallel))
    assert [problem.pointer for problem in problems] == [pointer]
    assert words in problems[0].detail


def test_experts_have_no_biases() -> None:
    problems = check.find_problems(with_experts({}, {}, linear_bias=True))
    assert [problem.detail for problem in problems] == [
        "experts have no biases in this version; set linear_bias to false"
    ]
    (problem,) = check.find_problems(with_experts({}, {}, mlp_bias=True))
    assert problem.pointer == "/model/mlp_bias"
    assert problem.detail.startswith("mlp_bias has no effect: every layer has routed")


@pytest.mark.parametrize(
    "moe", [{"layer_pattern": {"every": 2}}, {"shared_expert_ffn_hidden_size": 64}]
)
def test_an_mlp_beside_experts_may_have_biases(moe: dict[str, Any]) -> None:
    assert check.find_problems(with_experts(moe, {}, mlp_bias=True)) == []


def test_groups_may_be_ranked_by_any_number_of_their_scores() -> None:
    groups = {"num_groups": 4, "group_top_k": 3, "scores_per_group": 2, "top_k": 4}
    assert check.find_problems(with_experts(groups, {})) == []


@pytest.mark.parametrize(("world", "dp"), [(1, 4), (4, 4), (7, 4), (100, 4)])
def test_auto_dp_completes_the_grid_of_experts_even_beyond_the_room(
    world: int, dp: int
) -> None:
    assert resolution.resolve(with_experts({}, {"ep": 4}), world).parallel.dp == dp
    assert (
        resolution.resolve(
            with_experts({}, {"ep": 4, "tp": 2, "etp": 1, "sequence_parallel": True}), 2
        ).parallel.dp
        == 2
    )


def test_good_experts_have_no_problem() -> None:
    assert (
        check.find_problems(
            with_experts({"layer_pattern": {"every": 2}}, {"ep": 4, "dp": 4}), 4
        )
        == []
    )
    grouped = {
        "num_groups": 4,
        "group_top_k": 2,
        "score_function": "sigmoid",
        "expert_bias": True,
        "top_k": 4,
    }
    assert (
        check.find_problems(
            with_experts(
                grouped, {"tp": 2, "etp": 1, "ep": 4, "sequence_parallel": True, "dp": 2}
            ),
            4,
        )
        == []
    )


@pytest.mark.parametrize(
    ("groups", "pointer", "words"),
    [
        (
            {"schedule": {"warmup_steps": 100}},
            "/schedule/warmup_steps",
            "warmup_steps=100 is not shorter than training.steps=10: the rate only climbs, to "
            "0.0001 in the last step (optimizer.lr=0.001)",
        ),
        (
            {"schedule": {"min_lr": 1e-3}},
            "/schedule/min_lr",
            "min_lr=0.001 equals optimizer.lr, so the rate does not decay",
        ),
        (
            {"optimizer": {"clip_grad_norm": 1e-9}},
            "/optimizer/clip_grad_norm",
            "clip_grad_norm=1e-09 is not above eps=1e-08",
        ),
        (
            {"schedule": {"decay_steps": 100}},
            "/schedule/decay_steps",
            "decay_steps=100 is beyond training.steps=10: the rate does not come down to "
            "min_lr=0",
        ),
        (
            {"training": {"steps": 100}, "schedule": {"decay_steps": 95}},
            "/schedule/min_lr",
            "the rate is 0 in 6 of 100 steps, since the decay ends at min_lr=0 in step 95",
        ),
        ({"training": {"steps": 1}}, "/schedule/min_lr", "the rate is 0 in 1 of 1 steps"),
        (
            {"schedule": {"kind": "constant", "min_lr": 1e-4}},
            "/schedule/min_lr",
            "min_lr=0.0001 has no effect with kind=constant",
        ),
        (
            {"schedule": {"kind": "constant", "decay_steps": 5}},
            "/schedule/decay_steps",
            "decay_steps=5 has no effect with kind=constant",
        ),
        ({"optimizer": {"lr": 1e-30}}, "/optimizer/lr", "lr=1e-30 is too small"),
        (
            {"optimizer": {"lr": 2.0, "weight_decay": 0.5}},
            "/optimizer/weight_decay",
            "lr x weight_decay = 2 x 0.5 = 1: a step subtracts at least the whole weight",
        ),
        (
            {
                "optimizer": {
                    "lr": 0.1,
                    "weight_decay": 1.0,
                    "groups": [{"parameters": ["head.*"], "lr_scale": 20}],
                }
            },
            "/optimizer/groups/0",
            "lr x weight_decay = 2 x 1 = 2",
        ),
        (
            {
                "optimizer": {
                    "lr": 0.5,
                    "weight_decay": 0.1,
                    "weight_decay_schedule": {"end": 2.5},
                }
            },
            "/optimizer/weight_decay_schedule/end",
            "lr x weight_decay = 0.5 x 2.5 = 1.25",
        ),
        (
            {
                "optimizer": {
                    "lr": 0.5,
                    "weight_decay": 0.1,
                    "switches": [{"step": 2, "lr": 10}],
                }
            },
            "/optimizer/switches/0",
            "lr x weight_decay = 10 x 0.1 = 1",
        ),
        (
            {
                "training": {
                    "rampup_batch_size": {"start": 8, "increment": 8, "samples": 80}
                }
            },
            "/training/rampup_batch_size/samples",
            "samples=80 is not below the run's 80 samples, so no step has "
            "global_batch_size=16 samples",
        ),
        (
            {
                "optimizer": {
                    "name": "muon",
                    "lr": 0.1,
                    "weight_decay": 1.0,
                    "adamw_lr_scale": 20,
                }
            },
            "/optimizer/adamw_lr_scale",
            "lr x weight_decay = 2 x 1 = 2",
        ),
        (
            {"training": {"eval_every_steps": 11}},
            "/training/eval_every_steps",
            "eval_every_steps=11 is beyond training.steps=10: the run is evaluated after its "
            "last step only",
        ),
        (
            {"training": {"eval_every_steps": 5}, "data": {"validation_fraction": 0}},
            "/training/eval_every_steps",
            "eval_every_steps=5, but there is no validation data",
        ),
        (
            {"checkpoint": {"every_steps": 11}},
            "/checkpoint/every_steps",
            "every_steps=11 is beyond training.steps=10: the only checkpoint is that of the "
            "last step",
        ),
        (
            {"data": {"train": [{"path": "a"}, {"path": "b", "weight": 1e-6}]}},
            "/data/train/1/weight",
            "less than one of the run's 160 samples, so b is hardly used",
        ),
        (
            {"training": {"skip_steps": [3, 11]}},
            "/training/skip_steps",
            "step 11 is beyond training.steps=10; steps count from 1",
        ),
        (
            {"training": {"max_skipped_steps": 10}},
            "/training/max_skipped_steps",
            "max_skipped_steps=10 allows all of training.steps=10 to be skipped",
        ),
        (
            {"model": {"mtp": {"loss_coeff": 0}}},
            "/model/mtp/loss_coeff",
            "loss_coeff=0 computes the MTP layers in every step and never trains them",
        ),
        (
            {"model": {"sliding_window": 8, "full_attention_every": 5}},
            "/model/full_attention_every",
            "full_attention_every=5 is beyond num_layers=4",
        ),
    ],
)
def test_what_is_legal_and_without_effect_is_noted(
    groups: dict[str, Any], pointer: str, words: str
) -> None:
    noted = config(**groups)
    assert check.find_problems(noted) == []
    warnings = check.find_warnings(noted)
    assert [warning.pointer for warning in warnings] == [pointer]
    assert words in warnings[0].detail


def test_a_usual_config_has_no_warning() -> None:
    usual = config(
        training={"eval_every_steps": 5},
        schedule={"warmup_steps": 2, "min_lr": 1e-4, "decay_steps": 8},
        checkpoint={"every_steps": 5},
    )
    assert check.find_problems(usual) == []
    assert check.find_warnings(usual) == []
    assert check.find_warnings(config()) == []
