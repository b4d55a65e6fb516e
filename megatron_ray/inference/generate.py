"""Generates text from a committed checkpoint, in one process.

Owns: loading a model for inference, the sampler with its cache, the command. Must not
know: jobs.

`python -m megatron_ray.inference.generate --checkpoint PATH --prompt TEXT` prints
prompt and continuation. The command uses argparse, because the library must not depend
on typer, which the service's command line uses.

Shapes: V vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.load import load_into
from megatron_ray.checkpoint.train_state import TOKENIZER, read_train_state
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.data_parallel.buffers import FlatBuffers, bind_parameters
from megatron_ray.distributed.device import free_memory_bytes
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.attention import KeyValueCache
from megatron_ray.models.gpt import GPT
from megatron_ray.parallelize.parallelize import allocate_expert_biases, build_model
from megatron_ray.sharding.buckets import plan_buckets
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import local_parameters
from megatron_ray.sharding.sharded_state import (
    ShardedTensor,
    TensorBox,
    whole_tensor,
)
from megatron_ray.storage.errors import MissingFileError, StorageError
from megatron_ray.storage.storage import open_storage

_CACHE_SHARE = 0.9
"""Share of the free memory that keys and values may take."""
_SEEDS = (-(1 << 63), (1 << 64) - 1)
"""Least and greatest seed of torch's generators."""


@dataclass(frozen=True)
class Generation:
    """A prompt and its continuation."""

    prompt: str
    text: str
    """The continuation, without the prompt."""
    tokens: tuple[int, ...]
    """Number of new tokens, without the token that ends a document."""
    finish_reason: Literal["length", "end_of_document"]


@dataclass(frozen=True)
class Sampling:
    """The parameters of sampling the next token.

    Raises ValueError for values that exclude all tokens.
    """

    temperature: float = 1.0
    """0: greedy decoding."""
    top_k: int | None = None
    """Sample from this many most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens with at least this total
    probability (nucleus sampling, Holtzman et al. 2019)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be between 0 and 1")


def load_model(checkpoint_path: str, device: str = "cpu") -> tuple[GPT, Tokenizer]:
    """Returns the trained model in fp32 on one device, and its tokenizer.

    The checkpoint may have been saved under any layout. Raises StorageError
    (CheckpointError when the checkpoint cannot be loaded), ValueError when its config
    is invalid.
    """
    train_state = read_train_state(checkpoint_path, 0)
    if "config" not in train_state:
        raise CheckpointError(
            "load",
            checkpoint_path,
            "it does not say which model it holds (no config in its train state)",
        )
    config = TrainConfig.from_mapping(train_state["config"])
    # The model of one rank: checkpoints are resharded as they are read.
    mesh = ParallelMesh.single(device)
    model = build_model(config.model, mesh, ParallelismConfig(), dtype=torch.float32)
    plan = plan_buckets(
        local_parameters(config.model, mesh.dims, 0), 1, config.parallel.bucket_elements
    )
    weights = torch.zeros(plan.num_elements, device=mesh.device)
    # Without a backward pass the buffer of gradients stays empty.
    buffers = FlatBuffers(plan, weights, torch.empty(0))
    views = buffers.views(weights)
    bind_parameters(model, views)
    state = _model_state([placed.parameter for placed in plan.placed], views)
    for name, bias in allocate_expert_biases(model, mesh.device).items():
        state[f"model/{name}"] = whole_tensor(bias.value)
    load_into(checkpoint_path, state)
    model.requires_grad_(False)
    return model, _load_tokenizer(checkpoint_path, train_state.get("end_of_document"))


def _model_state(
    table: Sequence[LocalParameter], views: dict[str, Tensor]
) -> dict[str, ShardedTensor]:
    """Returns the local memory of each logical parameter of a checkpoint.

    A local parameter may fuse several logical ones, each a range of its rows.
    """
    state = dict[str, ShardedTensor]()
    for local in table:
        for part in local.parts:
            memory = views[local.name].narrow(0, part.start, part.box.size[0])
            state[f"model/{part.logical.name}"] = ShardedTensor(
                part.logical.shape, [TensorBox(part.box, memory)]
            )
    return state


def _load_tokenizer(checkpoint_path: str, end_of_document: int | None) -> Tokenizer:
    try:
        text = open_storage(checkpoint_path).read_bytes(TOKENIZER).decode("utf-8")
    except MissingFileError as error:
        raise CheckpointError(
            "load",
            checkpoint_path,
            f"it holds no {TOKENIZER}, so its tokens cannot be turned into text",
        ) from error
    return Tokenizer.from_json(text, end_of_document)


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Generation:
    """Continues `prompt` until a document ends or there are `max_new_tokens`.

    An empty prompt begins a new document. The same seed gives the same text. Raises
    ValueError for wrong sampling values and for more tokens than learned positions or
    than memory has room for.
    """
    start = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    tokens = generate_tokens(
        model,
        start,
        max_new_tokens,
        Sampling(temperature, top_k, top_p),
        seed,
        stop=tokenizer.end_of_document,
        vocabulary=tokenizer.vocab_size,
    )
    finish_reason: Literal["length", "end_of_document"] = "length"
    if tokens and tokens[-1] == tokenizer.end_of_document:
        finish_reason = "end_of_document"
        tokens = tokens[:-1]
    # Some tokenizers drop a leading space when decoding, so the continuation is the text
    # beyond the decoded prompt.
    decoded_prompt = tokenizer.decode(start)
    decoded = tokenizer.decode(start + tokens)
    if prompt and decoded.startswith(decoded_prompt):
        text = decoded[len(decoded_prompt) :]
    else:
        text = tokenizer.decode(tokens)
    return Generation(prompt, text, tuple(tokens), finish_reason)


@torch.no_grad()
def generate_tokens(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    *,
    stop: int,
    vocabulary: int,
) -> list[int]:
    """Returns new token ids, up to and including the first `stop`.

    Ids from `vocabulary` on are padding of the embedding and never chosen.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        raise ValueError(f"seed={seed} must be between {_SEEDS[0]} and {_SEEDS[1]}")
    _check_length(model, len(prompt), max_new_tokens)
    # Allocated once, for the longest possible continuation.
    caches = _empty_caches(model, len(prompt) + max_new_tokens)
    device = caches[0].keys.device
    # On the CPU, so that all devices draw the same numbers.
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    num_cached = 0
    # The first pass processes the whole prompt, later ones a single token.
    while len(tokens) < len(prompt) + max_new_tokens:
        inputs = torch.tensor([tokens[num_cached:]], device=device)
        positions = torch.arange(num_cached, len(tokens), device=device)[None]
        hidden = model.hidden(inputs, positions, caches)
        logits: Tensor = model.head.logits(hidden[-1:])  # type: ignore[operator]
        num_cached = len(tokens)
        token = choose(logits[0, :vocabulary].float().cpu(), sampling, generator)
        tokens.append(token)
        if token == stop:
            break
    return tokens[len(prompt) :]


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Returns one token id; consumes one random number unless temperature is 0."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # fp64, and a stable sort, so that all devices choose the same.
    ranked, ids = (logits_V.double() / sampling.temperature).sort(
        descending=True, stable=True
    )
    # `None` keeps all tokens.
    probabilities = ranked[: sampling.top_k].softmax(0)
    if sampling.top_p is not None:
        # Mass of the more likely tokens: a token is kept if that mass is below top_p.
        more_likely = probabilities.cumsum(0) - probabilities
        num_kept = max(1, int((more_likely < sampling.top_p).sum()))
        probabilities = probabilities[:num_kept]
    # Instead of normalizing again, the drawn number is scaled.
    cumulative = probabilities.cumsum(0)
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, drawn, right=True))
    # Rounding may place the drawn number at the end.
    return int(ids[min(index, len(cumulative) - 1)])


def _check_length(model: GPT, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises ValueError for more tokens than learned positions or than fit into memory."""
    limit = None
    capacity = ""
    rest = ""
    if model.config.position_embedding == "learned":
        limit = model.config.max_sequence_length
        capacity = f"the model has learned {limit} positions"
        rest = "positions that the model has learned"
    fitting = _tokens_in_memory(model)
    if fitting is not None and (limit is None or fitting < limit):
        limit = fitting
        capacity = f"the free memory has room for {limit}"
        rest = "tokens that the free memory has room for"
    if limit is None or prompt_tokens + max_new_tokens <= limit:
        return
    if prompt_tokens >= limit:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens, {capacity}; shorten the prompt"
        )
    raise ValueError(
        f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones need more than the "
        f"{limit} {rest}; ask for at most {limit - prompt_tokens} new tokens"
    )


def _tokens_in_memory(model: GPT) -> int | None:
    """Returns how many tokens the caches can hold; None where free memory is unknown."""
    like = next(model.parameters())
    free_bytes = free_memory_bytes(like.device)
    if free_bytes is None:
        return None
    config = model.config
    width = 2 * config.num_layers * config.kv_heads * config.head_width
    return int(free_bytes * _CACHE_SHARE) // (width * like.element_size())


def _empty_caches(model: GPT, capacity: int) -> list[KeyValueCache]:
    config = model.config
    like = next(model.parameters())
    shape = (1, config.kv_heads, capacity, config.head_width)
    caches = list[KeyValueCache]()
    for _ in range(config.num_layers):
        caches.append(KeyValueCache(like.new_zeros(shape), like.new_zeros(shape)))
    return caches


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ray.inference.generate",
        description="Generate text from a checkpoint.",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="path or URI of a committed checkpoint"
    )
    parser.add_argument(
        "--prompt", default="", help="text to continue; empty starts a new document"
    )
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 is greedy decoding"
    )
    parser.add_argument("--top-k", type=int, help="sample from this many tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample from tokens with this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object: prompt, text, tokens, finish_reason",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    A user's error becomes one line on stderr.
    """
    options = _parse(arguments)
    try:
        model, tokenizer = load_model(options.checkpoint, _device(options.device))
        generation = generate(
            model,
            tokenizer,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
    except (StorageError, ValueError) as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"error: {message}\n")
        return 1
    output = generation.prompt + generation.text
    if options.json:
        output = json.dumps(asdict(generation))
    sys.stdout.write(f"{output}\n")
    return 0


def _device(name: str) -> str:
    """Returns the device to use, where `auto` is the GPU if there is one."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


if __name__ == "__main__":
    sys.exit(main())
