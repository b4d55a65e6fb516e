"""Rules of model, data and loop.

Owns: lengths, samples, rates, dropout, recomputation, freezing. Pure. Must not know:
ranks.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.layout import LayoutError
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline
from megatron_ray.sharding.parameters import freeze, local_parameters

MOST_SAMPLES = 1 << 31


def samples(config: TrainConfig) -> list[Problem]:
    """The order of samples is an index in memory-mapped files: 12 bytes a sample, built
    before the first step.
    """
    training = config.training
    samples = training.steps * training.global_batch_size
    if samples <= MOST_SAMPLES:
        return []
    text = (
        f"steps x global_batch_size = {training.steps} x {training.global_batch_size} = "
        f"{samples} samples, at most {MOST_SAMPLES}"
    )
    return [
        Problem(
            "/training/steps",
            "too_many_samples",
            text + " can be ordered; lower steps, or use longer sequences",
        )
    ]


def lengths(config: TrainConfig) -> list[Problem]:
    model = config.model
    training = config.training
    found = []
    if model.head_width < 2:
        text = (
            f"hidden_size={model.hidden_size} over "
            f"num_attention_heads={model.num_attention_heads} leaves a head {model.head_width} "
            "wide"
        )
        found.append(
            Problem(
                "/model/num_attention_heads",
                "head_width",
                text + "; use fewer heads, a larger hidden_size, or give head_dim",
            )
        )
    if model.position_embedding == "rope" and model.rotated_width % 2:
        text = (
            f"rotary positions need an even head_dim, not {model.head_width}; change "
            "hidden_size, num_attention_heads or head_dim"
        )
        found.append(Problem("/model/head_dim", "rope_even", text))
    if model.num_attention_heads % model.kv_heads:
        text = (
            f"num_query_groups={model.kv_heads} does not divide "
            f"num_attention_heads={model.num_attention_heads}"
        )
        found.append(Problem("/model/num_query_groups", "groups_divide", text))
    if (
        model.position_embedding == "learned"
        and training.seq_length > model.max_sequence_length
    ):
        text = (
            f"seq_length={training.seq_length} is longer than the "
            f"{model.max_sequence_length} learned positions;"
            " shorten it or raise model.max_sequence_length"
        )
        found.append(Problem("/training/seq_length", "positions", text))
    tokenizer = config.data.tokenizer
    if (
        tokenizer.kind == "bpe"
        and model.vocab_size is not None
        and tokenizer.vocab_size > model.vocab_size
    ):
        text = (
            f"the tokenizer's {tokenizer.vocab_size} tokens do not fit into "
            f"model.vocab_size={model.vocab_size}"
        )
        text += "; lower the first or raise the second"
        found.append(Problem("/data/tokenizer/vocab_size", "vocab_fits", text))
    return found


def schedule(config: TrainConfig) -> list[Problem]:
    schedule = config.schedule
    lr = config.optimizer.lr
    if schedule.min_lr > lr:
        return [
            Problem(
                "/schedule/min_lr",
                "min_lr",
                f"min_lr={schedule.min_lr:g} is above optimizer.lr={lr:g}; lower it",
            )
        ]
    return []


def dropout(config: TrainConfig) -> list[Problem]:
    rate = config.model.attention_dropout
    cp = config.parallel.cp
    if not rate or cp == 1:
        return []
    text = (
        f"attention_dropout={rate:g} does not go with cp={cp}: attention over shared sequences "
        "keeps no probabilities to drop"
    )
    return [
        Problem(
            "/model/attention_dropout",
            "attention_dropout",
            text + "; use 0 (hidden_dropout is free), or cp=1",
        )
    ]


def recompute(config: TrainConfig) -> list[Problem]:
    given = config.training.recompute
    fields = {name: getattr(given, name) for name in ("method", "num_layers", "modules")}
    # Without these words the rest says nothing.
    uses = {"none": (), "selective": ("modules",), "full": ("method", "num_layers")}
    meant_for = {"modules": "selective", "method": "full", "num_layers": "full"}
    found = [
        _recompute_problem(
            name,
            f"{name} is for granularity={meant_for[name]}, not for {given.granularity}; "
            "leave it out, or change granularity",
        )
        for name, value in fields.items()
        if value is not None and name not in uses[given.granularity]
    ]
    if given.granularity == "full":
        remedies = {
            "method": "give uniform or block",
            "num_layers": "say how many layers: 1 recomputes each by itself",
        }
        found += [
            _recompute_problem(name, f"granularity=full needs {name}; {remedy}")
            for name, remedy in remedies.items()
            if fields[name] is None
        ]
        if not found:
            found += _recomputed_layers(config)
    return found + _recomputed_modules(config)


def _recomputed_modules(config: TrainConfig) -> list[Problem]:
    modules = config.training.recompute.chosen_modules
    moe = config.model.moe
    found = []
    if moe is None:
        with_experts = {False}
    elif isinstance(moe.layer_pattern, list):
        with_experts = {bool(entry) for entry in moe.layer_pattern}
    else:
        with_experts = {True, moe.layer_pattern.every == 1}
    for name, experts in (("mlp", False), ("moe", True)):
        if name in modules and experts not in with_experts:
            kind = "have experts" if experts else "are without experts"
            found.append(
                _recompute_problem(
                    "modules",
                    f"{name} is for layers that {kind}, of which the model has none; leave it out",
                )
            )
        if name in modules and "activation" in modules:
            text = (
                f"activation is a part of {name}, which is recomputed whole; leave out one of "
                "the two"
            )
            found.append(_recompute_problem("modules", text))
    return found


def _recomputed_layers(config: TrainConfig) -> list[Problem]:
    wanted = config.training.recompute.num_layers
    try:
        most = max(len(stage.layers) for stage in plan_pipeline(config).contents)
    except LayoutError:
        return []  # reported where it belongs
    if wanted is None or wanted <= most:
        return []
    return [
        _recompute_problem(
            "num_layers",
            f"num_layers={wanted} is more than the {most} layers of the largest stage; lower it",
        )
    ]


def _recompute_problem(name: str, text: str) -> Problem:
    return Problem(f"/training/recompute/{name}", "recompute", text)


def frozen(config: TrainConfig) -> Iterator[Problem]:
    patterns = config.optimizer.freeze
    pointer = "/optimizer/freeze"
    if not patterns:
        return
    model = config.model.model_copy(
        update={"vocab_size": config.model.vocab_size or 2}
    )  # names do not depend on it
    table = local_parameters(model, ParallelDims(), 0)
    names = [part.logical.name for local in table for part in local.parts]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            block = next(name for name in names if name.startswith("layers."))
            text = (
                f"no parameter is called {pattern!r}; names are such as {names[0]!r} and "
                f"{block!r}, and * stands for any characters"
            )
            yield Problem(pointer, "freeze_names", text)
    for local in freeze(table, patterns):
        parts = [part.logical.name for part in local.parts]
        left = [
            name
            for name in parts
            if not any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
        if not local.trainable and left:
            text = (
                f"{', '.join(map(repr, parts))} are one tensor, and "
                f"{', '.join(map(repr, left))} would still be trained; freeze all or none"
            )
            yield Problem(pointer, "freeze_whole", text)
            return
    if not any(local.trainable for local in freeze(table, patterns)):
        yield Problem(
            pointer,
            "freeze_all",
            f"all {len(names)} parameters are frozen, so nothing would be trained; leave some out",
        )
