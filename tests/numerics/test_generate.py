"""The sampler: equal to the uncached forward, reproducible, clear about what it
refuses; and the command on a real checkpoint.
"""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron_ray.checkpoint.directory import CheckpointError, commit
from megatron_ray.checkpoint.writer import CheckpointWriter
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.inference.generate import (
    generate,
    generate_tokens,
    load_model,
    main,
)
from megatron_ray.inference.sampling import Sampling, choose
from megatron_ray.models.gpt import GPT
from megatron_ray.training.session import build
from tests.support.parity import GPT2_FIELDS
from tests.support.tokenizer_files import byte_tokenizer

LLAMA: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 300,
    "max_sequence_length": 64,
    "vocab_multiple": 64,
    "init_std": 0.3,
}
GPT2 = LLAMA | GPT2_FIELDS


# A prompt longer than the window, and a text longer than what positions were made for.
WINDOWED = LLAMA | {
    "sliding_window": 7,
    "full_attention_every": 2,
    "qk_norm": True,
    "qkv_bias": True,
    "rope_scaling": {
        "kind": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
    },
}
GEMMA = LLAMA | {
    "sliding_window": 5,
    "num_query_groups": 1,
    "head_dim": 12,
    "activation": "geglu_tanh",
    "zero_centered_norm": True,
    "embedding_scale": 32**0.5,
    "tie_embeddings": True,
    "rope_scaling": {
        "kind": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
    },
}
MODELS = {"llama": LLAMA, "gpt2": GPT2, "windowed": WINDOWED, "gemma": GEMMA}


def config(model: dict[str, Any], precision: str = "fp32") -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": model,
            "parallel": {"dp": 1, "sequence_parallel": False},
            "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
            "training": {
                "seq_length": 16,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "steps": 1,
                "precision": precision,
            },
            "optimizer": {"lr": 0.001},
        }
    )


def checkpoint(
    folder: Path,
    model: dict[str, Any],
    *,
    precision: str = "fp32",
    tokenizer: bool = True,
    **changed: Any,
) -> str:
    settings = config(model, precision)
    _, optimizer = build(settings, ParallelMesh.single())
    writer = CheckpointWriter(ParallelMesh.single(), "sync", lambda _: None)
    state = {
        "format_version": 1,
        "step": 1,
        "config": settings.model_dump(mode="json"),
        "end_of_document": 256,
    } | changed
    files = {"tokenizer.json": Tokenizer.of_bytes().to_json().encode()} if tokenizer else {}
    writer.save(1, str(folder), optimizer.sharded_state(), state, files)
    writer.close()
    commit(str(folder), {}, [])
    return str(folder)


def uncached(
    model: GPT, prompt: list[int], count: int, sampling: Sampling, seed: int
) -> list[int]:
    """Every token from a forward over everything before it."""
    tokens = list(prompt)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(count):
            logits = model.logits(torch.tensor([tokens]), torch.arange(len(tokens))[None])
            tokens.append(choose(logits[0, -1, :257], sampling, generator))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=MODELS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPT, Tokenizer]:
    return load_model(checkpoint(tmp_path_factory.mktemp("c") / "x", MODELS[request.param]))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0),
        Sampling(1.0),
        Sampling(0.7, top_k=20),
        Sampling(1.3, top_p=0.8),
        Sampling(0.9, top_k=50, top_p=0.5),
    ],
)
def test_the_cache_changes_no_token(
    loaded: tuple[GPT, Tokenizer], sampling: Sampling
) -> None:
    model, _ = loaded
    for seed in range(4):
        prompt = torch.randint(
            0, 256, (1 + 5 * seed,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        cached = generate_tokens(model, prompt, 20, sampling, seed, stop=(), vocabulary=257)
        assert cached == uncached(model, prompt, 20, sampling, seed)


def test_the_same_seed_gives_the_same_text_and_another_one_another(
    loaded: tuple[GPT, Tokenizer],
) -> None:
    model, tokenizer = loaded
    first = generate(model, tokenizer, "def ", 20, seed=1)
    assert first == generate(model, tokenizer, "def ", 20, seed=1)
    assert first.text != generate(model, tokenizer, "def ", 20, seed=2).text
    assert first.prompt == "def "
    assert tokenizer.decode(list(first.tokens)) == first.text


def test_generation_ends_with_the_document(loaded: tuple[GPT, Tokenizer]) -> None:
    model, tokenizer = loaded
    tokens = generate_tokens(
        model, [1, 2, 3], 30, Sampling(1.0), 0, stop=(), vocabulary=257
    )
    stop = tokens[9]
    early = generate_tokens(
        model, [1, 2, 3], 30, Sampling(1.0), 0, stop=(stop,), vocabulary=257
    )
    assert early == tokens[: tokens.index(stop) + 1]
    other_end = cast(Tokenizer, Ended(tokenizer, stop))
    ended = generate(model, other_end, "\x01\x02\x03", 30)
    assert ended.finish_reason == "end_of_document"
    assert list(ended.tokens) == early[:-1]


class Ended:
    """A tokenizer with another end."""

    def __init__(self, inner: Tokenizer, end: int) -> None:
        self.inner = inner
        self.end_of_document = end
        self.end_tokens = frozenset([end])
        self.vocab_size = inner.vocab_size

    def encode_prompt(self, text: str) -> list[int]:
        return self.inner.encode_prompt(text)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


def test_an_empty_prompt_begins_a_document(loaded: tuple[GPT, Tokenizer]) -> None:
    model, tokenizer = loaded
    answer = generate(model, tokenizer, "", 8, temperature=0)
    assert answer.prompt == ""
    assert "endoftext" not in answer.text
    assert (
        list(answer.tokens)
        == generate_tokens(model, [256], 8, Sampling(0), 0, stop=(256,), vocabulary=257)[
            : len(answer.tokens)
        ]
    )


@pytest.mark.parametrize(("published", "ends"), [([256, 7], {256, 7}), (7, {256})])
def test_generation_ends_with_any_end_token_of_the_published_model(
    tmp_path: Path, published: int | list[int], ends: set[int]
) -> None:
    path = checkpoint(tmp_path / "c", LLAMA)
    (tmp_path / "c" / "published").mkdir()
    values = json.dumps({"eos_token_id": published})
    (tmp_path / "c" / "published" / "generation_config.json").write_text(values)
    _, tokenizer = load_model(path)
    # Ids of another tokenizer mean other tokens.
    assert tokenizer.end_tokens == ends


def test_a_prompt_is_read_as_the_training_data_were(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c", LLAMA, begin_of_document=256)
    model, tokenizer = load_model(path)
    answer = generate(model, tokenizer, "a<|endoftext|>", 2)
    assert answer.prompt_tokens == (256, *b"a<|endoftext|>")
    assert answer.prompt == "a<|endoftext|>"
    _, marked = load_model(path, special_tokens_in_text=("<|endoftext|>",))
    assert generate(model, marked, "a<|endoftext|>", 2).prompt_tokens == (256, 97, 256)
    with pytest.raises(ValueError, match="has no special token '<s>'; name those"):
        load_model(path, special_tokens_in_text=("<s>",))


def test_special_tokens_of_a_prompt_are_those_of_the_training_data(tmp_path: Path) -> None:
    settings = config(LLAMA, "fp32").model_dump(mode="json")
    settings["data"]["tokenizer"]["special_tokens_in_text"] = ["<|endoftext|>"]
    path = checkpoint(tmp_path / "c", LLAMA, config=settings)
    _, tokenizer = load_model(path)
    assert tokenizer.encode("<|endoftext|>") == [256]
    _, plain = load_model(path, special_tokens_in_text="none")
    assert plain.encode("<|endoftext|>") == list(b"<|endoftext|>")


def test_a_token_that_the_model_has_no_row_for_is_never_chosen(tmp_path: Path) -> None:
    larger = byte_tokenizer("<|endoftext|>", *(f"<{number}>" for number in range(50)))
    path = checkpoint(tmp_path / "c", LLAMA)
    model, _ = load_model(path)
    answer = generate(model, Tokenizer.from_json(larger), "a", 60, temperature=99.0)
    assert max(answer.tokens) < model.config.vocabulary
    marked = Tokenizer.from_json(larger, special_tokens_in_text="all")
    with pytest.raises(
        ValueError, match=r"the prompt has token 306 \('<49>'\), the model rows for 300; "
    ):
        generate(model, marked, "a<49>", 2)


def test_spare_rows_of_the_vocabulary_are_never_chosen(
    loaded: tuple[GPT, Tokenizer],
) -> None:
    model, _ = loaded
    assert (
        max(generate_tokens(model, [1], 60, Sampling(50.0), 3, stop=(), vocabulary=20)) < 20
    )


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, Sampling(1.0), generator) for _ in range(20000)])
    assert torch.allclose(drawn.bincount(minlength=4) / 20000, logits.exp(), atol=0.015)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0, top_k=1), {1}),
        (Sampling(1.0, top_k=2), {1, 2}),
        (Sampling(1.0, top_p=0.41), {1, 2}),
        (Sampling(1.0, top_p=0.0), {1}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(sampling: Sampling, allowed: set[int]) -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, sampling, generator) for _ in range(200)} == allowed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan must be 0 or more"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be between 0 and 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3 must be at least 1"),
        ({"seed": 1 << 64}, "seed=18446744073709551616 must be between"),
        (
            {"max_new_tokens": 10**15},
            "new ones need more than the .*; ask for at most",
        ),
    ],
)
def test_senseless_values_are_refused(
    loaded: tuple[GPT, Tokenizer], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(*loaded, "a", **values)


def test_learned_positions_end_somewhere(tmp_path: Path) -> None:
    model, tokenizer = load_model(checkpoint(tmp_path / "c", GPT2))
    with pytest.raises(
        ValueError,
        match="the prompt has 70 tokens, the model has learned 64 positions; shorten the prompt",
    ):
        generate(model, tokenizer, "x" * 70, 1)
    with pytest.raises(
        ValueError,
        match=r"60 prompt tokens and 9 new ones need more than the 64 positions .* at most 4 new "
        "tokens",
    ):
        generate(model, tokenizer, "x" * 60, 9)
    assert (
        len(generate_tokens(model, [1] * 60, 4, Sampling(0), 0, stop=(), vocabulary=257))
        == 4
    )


def test_memory_for_keys_and_values_ends_somewhere(
    loaded: tuple[GPT, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    config = model.config
    token_bytes = 2 * 4 * config.num_layers * config.kv_heads * config.head_width
    monkeypatch.setattr(
        "megatron_ray.inference.caches.free_memory_bytes", lambda _: 10 * token_bytes
    )
    with pytest.raises(
        ValueError,
        match="4 prompt tokens and 6 new ones need more than the 9 tokens that the free "
        "memory has room for; ask for at most 5 new tokens",
    ):
        generate(model, tokenizer, "four", 6)
    with pytest.raises(
        ValueError,
        match="the prompt has 9 tokens, the free memory has room for 9; shorten the prompt",
    ):
        generate(model, tokenizer, "nine char", 1)
    assert len(generate(model, tokenizer, "four", 5).tokens) <= 5


def test_rotary_positions_go_on(tmp_path: Path) -> None:
    model, _ = load_model(checkpoint(tmp_path / "c", LLAMA))
    assert (
        len(generate_tokens(model, [1] * 63, 20, Sampling(0), 0, stop=(), vocabulary=257))
        == 20
    )


def test_the_main_parameters_of_a_bf16_run_are_what_is_loaded(tmp_path: Path) -> None:
    wide, _ = load_model(checkpoint(tmp_path / "fp32", LLAMA))
    narrow, _ = load_model(checkpoint(tmp_path / "bf16", LLAMA, precision="bf16"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(wide.parameters(), narrow.parameters(), strict=True)
    )


def test_checkpoints_without_tokenizer_or_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"it holds no tokenizer\.json, so its tokens cannot be turned into text",
    ):
        load_model(checkpoint(tmp_path / "a", LLAMA, tokenizer=False))
    path = checkpoint(tmp_path / "b", LLAMA)
    state = json.loads(Path(path, "train_state.json").read_text())
    size = len(json.dumps(state))
    del state["config"]
    Path(path, "train_state.json").write_text(json.dumps(state).ljust(size))
    # As in a checkpoint of an earlier version, which was written without digests.
    manifest = json.loads(Path(path, "manifest.json").read_text())
    for name in [name for name in manifest["files"] if name.startswith("digests/")]:
        del manifest["files"][name]
    Path(path, "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="it does not say which model it holds"):
        load_model(path)


def test_the_command_prints_text_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path / "c", LLAMA)
    common = [
        "--device",
        "cpu",
        "--checkpoint",
        path,
        "--prompt",
        "import ",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0.8",
        "--top-k",
        "40",
        "--seed",
        "3",
    ]
    assert main([*common, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == "import "
    assert len(answer["tokens"]) <= 12
    assert main([*common, "--json", "--stream"]) == 0
    *pieces, whole = map(json.loads, capsys.readouterr().out.splitlines())
    assert whole == answer
    assert "".join(pieces) == answer["text"]
    assert len(pieces) > 1
    assert main(common) == 0
    assert capsys.readouterr().out == f"import {answer['text']}\n"


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert (
        printed.err
        == f"error: cannot load {tmp_path}/none: there is no checkpoint at this path\n"
    )
    assert printed.out == ""
