"""Generates text from a committed checkpoint, in one process.

Owns: loading a model for inference, the loop over tokens, the command. Must not know:
jobs.

`python -m megatron_ray.inference.generate --checkpoint PATH --prompt TEXT` prints
prompt and continuation. The command uses argparse, because the library must not depend
on typer, which the service's command line uses.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf.published.files import published_end_tokens
from megatron_ray.checkpoint.load import load_into
from megatron_ray.checkpoint.train_state import (
    TOKENIZER,
    read_tokenizer,
    read_train_state,
)
from megatron_ray.config.data import SpecialTokens
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.data_parallel.buffers import FlatBuffers, bind_parameters
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.inference.caches import check_length, empty_caches
from megatron_ray.inference.sampling import Sampling, choose
from megatron_ray.inference.text_pieces import TextPieces
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
from megatron_ray.storage.errors import StorageError

_SEEDS = (-(1 << 63), (1 << 64) - 1)
"""Least and greatest seed of torch's generators."""


@dataclass(frozen=True)
class Generation:
    """A prompt and its continuation."""

    prompt: str
    text: str
    """The continuation, without the prompt."""
    tokens: tuple[int, ...]
    """New tokens, without the end token."""
    finish_reason: Literal["length", "end_of_document"]
    prompt_tokens: tuple[int, ...] = ()
    """Tokens that the model was given: the prompt's, after the token that begins a
    document if the model was trained with one."""


def load_model(
    checkpoint_path: str,
    device: str = "cpu",
    special_tokens_in_text: SpecialTokens | None = None,
) -> tuple[GPT, Tokenizer]:
    """Returns the trained model in fp32 on one device, and its tokenizer.

    `special_tokens_in_text` are those that prompts may contain, by default those of the
    model's training data. The checkpoint may have been saved under any layout.

    Raises StorageError (CheckpointError when the checkpoint cannot be loaded), ValueError
    when its config is invalid.
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
    tokenizer = _load_tokenizer(
        checkpoint_path,
        train_state,
        special_tokens_in_text or config.data.tokenizer.special_tokens_in_text,
    )
    return model, tokenizer


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


def _load_tokenizer(
    checkpoint_path: str,
    train_state: Mapping[str, Any],
    special_tokens_in_text: SpecialTokens,
) -> Tokenizer:
    """Returns the tokenizer with the tokens around documents that the model knows."""
    text = read_tokenizer(checkpoint_path)
    if text is None:
        raise CheckpointError(
            "load",
            checkpoint_path,
            f"it holds no {TOKENIZER}, so its tokens cannot be turned into text",
        )
    tokenizer = Tokenizer.from_json(
        text,
        train_state.get("end_of_document"),
        train_state.get("begin_of_document"),
        special_tokens_in_text,
    )
    # A published model may have more end tokens, such as that of a turn in a chat.
    published = published_end_tokens(checkpoint_path)
    if tokenizer.end_of_document in published:
        tokenizer.end_tokens |= published
    return tokenizer


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
    """Continues `prompt` until an end token or there are `max_new_tokens`.

    The prompt is the beginning of a document; an empty one begins a new one. The same
    seed gives the same text.

    Raises ValueError for wrong sampling values and for more tokens than learned positions
    or than memory has room for.
    """
    sampling = Sampling(temperature, top_k, top_p)
    *_, generation = generate_pieces(
        model, tokenizer, prompt, max_new_tokens, sampling, seed
    )
    assert isinstance(generation, Generation)
    return generation


def generate_pieces(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[str | Generation]:
    """Yields the continuation in pieces, as they are generated, then the whole of it.

    The pieces together are its text. Raises as `generate` does, before the first piece.
    """
    start = tokenizer.encode_prompt(prompt)
    _check_rows(model, tokenizer, start)
    pieces = TextPieces(tokenizer, start)
    tokens = list[int]()
    finish_reason: Literal["length", "end_of_document"] = "length"
    for token in iterate_tokens(
        model,
        start,
        max_new_tokens,
        sampling,
        seed,
        stop=tokenizer.end_tokens,
        # A model may lack rows for special tokens that never occurred.
        vocabulary=min(tokenizer.vocab_size, model.config.vocabulary),
    ):
        if token in tokenizer.end_tokens:
            finish_reason = "end_of_document"
            break
        tokens.append(token)
        piece = pieces.add(token)
        if piece:
            yield piece
    # Some tokenizers drop a leading space when decoding, so the continuation is the text
    # beyond the decoded prompt.
    decoded_prompt = tokenizer.decode(start)
    decoded = tokenizer.decode(start + tokens)
    if prompt and decoded.startswith(decoded_prompt):
        text = decoded[len(decoded_prompt) :]
    else:
        text = tokenizer.decode(tokens)
    # Bytes of a character that was never completed.
    if text.startswith(pieces.text) and text != pieces.text:
        yield text[len(pieces.text) :]
    yield Generation(prompt, text, tuple(tokens), finish_reason, tuple(start))


def _check_rows(model: GPT, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
    """Raises ValueError for a special token that the model was never trained on."""
    largest = max(prompt)
    if largest >= model.config.vocabulary:
        raise ValueError(
            f"the prompt has token {largest} ({tokenizer.name_of(largest)!r}), the model rows "
            f"for {model.config.vocabulary}; leave that token out"
        )


def generate_tokens(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    *,
    stop: Collection[int],
    vocabulary: int,
) -> list[int]:
    """Returns new token ids; see `iterate_tokens`."""
    return list(
        iterate_tokens(
            model,
            prompt,
            max_new_tokens,
            sampling,
            seed,
            stop=stop,
            vocabulary=vocabulary,
        )
    )


@torch.no_grad()
def iterate_tokens(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    *,
    stop: Collection[int],
    vocabulary: int,
) -> Iterator[int]:
    """Yields new token ids, up to and including the first of `stop`.

    Ids from `vocabulary` on are padding of the embedding and never chosen.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        raise ValueError(f"seed={seed} must be between {_SEEDS[0]} and {_SEEDS[1]}")
    check_length(model, len(prompt), max_new_tokens)
    # Allocated once, for the longest possible continuation.
    caches = empty_caches(model, len(prompt) + max_new_tokens)
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
        logits: Tensor = model.head.logits(model.head_input(hidden[-1:]))  # type: ignore[operator]
        num_cached = len(tokens)
        token = choose(logits[0, :vocabulary].float().cpu(), sampling, generator)
        tokens.append(token)
        yield token
        if token in stop:
            break


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
    parser.add_argument(
        "--special-tokens",
        action="append",
        metavar="none|all|NAME",
        help="special tokens recognised in the prompt, repeatable; default: as in training",
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
        "--stream",
        action="store_true",
        help="with --json: one JSON string per line as text is generated, then the object",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object: prompt, text, tokens, finish_reason, prompt_tokens",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    A user's error becomes one line on stderr.
    """
    options = _parse(arguments)
    try:
        model, tokenizer = load_model(
            options.checkpoint,
            _device(options.device),
            _special_tokens(options.special_tokens),
        )
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        pieces = generate_pieces(
            model,
            tokenizer,
            options.prompt,
            options.max_new_tokens,
            sampling,
            options.seed,
        )
        _print_pieces(pieces, options)
    except (StorageError, ValueError) as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"error: {message}\n")
        return 1
    return 0


def _print_pieces(pieces: Iterator[str | Generation], options: argparse.Namespace) -> None:
    """Prints the text as it is generated, or JSON."""
    # The first piece comes before the prompt is printed, so that an error prints nothing.
    output = options.prompt
    if options.json:
        output = ""
    for piece in pieces:
        if isinstance(piece, Generation):
            end = ""
            if options.json:
                end = json.dumps(asdict(piece))
            sys.stdout.write(f"{output}{end}\n")
        elif not options.json:
            sys.stdout.write(output + piece)
        elif options.stream:
            sys.stdout.write(json.dumps(piece) + "\n")
        else:
            continue
        sys.stdout.flush()
        output = ""


def _special_tokens(values: list[str] | None) -> SpecialTokens | None:
    """Returns the special tokens of the option, None where it is not given."""
    if values is None:
        return None
    if values == ["all"]:
        return "all"
    if values == ["none"]:
        return "none"
    return tuple(values)


def _device(name: str) -> str:
    """Returns the device to use, where `auto` is the GPU if there is one."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


if __name__ == "__main__":
    sys.exit(main())
