"""Folders of transformers become checkpoints and folders again: equal to the bit,
judged by transformers, and clear about what is bad.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf import exporting, importing
from megatron_ray.checkpoint.hf.__main__ import main
from megatron_ray.checkpoint.hf.exporting import export_folder
from megatron_ray.checkpoint.hf.importing import import_folder
from megatron_ray.checkpoint.hf.weights import HfWeights, load_whole
from megatron_ray.checkpoint.initial_model import initial_model, resolve_initial_model
from megatron_ray.checkpoint.train_state import read_train_state
from megatron_ray.config.checkpoint import CheckpointConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError, Problem
from megatron_ray.config.train_config import TrainConfig, read_mapping
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.inference.generate import load_model
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedTensor, TensorBox
from megatron_ray.training.saving import start_from_weights
from megatron_ray.training.session import build
from megatron_ray.validation.initial_weights import model_signature
from tests.support.hf_folders import (
    FAMILIES,
    SEQUENCE,
    VOCABULARY,
    edit_config,
    edit_tensors,
    publish,
)

LOGITS_BAR = 5e-6
"""Relative L2, fp32."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def settings_of(path: str) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": initial_model(path).model_dump(mode="json"),
            "parallel": {"dp": 1, "sequence_parallel": False},
            "data": {"train": [{"path": "x"}]},
            "training": {
                "seq_length": SEQUENCE,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "steps": 1,
            },
            "optimizer": {"lr": 0.001},
        }
    )


def logits_here(path: str, tokens: Tensor) -> Tensor:
    """Of a folder of either kind, as a run that begins with it has them."""
    model, optimizer = build(settings_of(path), ParallelMesh.single(), initialise=False)
    start_from_weights(path, model, optimizer, 0)
    positions = torch.arange(tokens.shape[1])[None].expand(len(tokens), -1)
    with torch.no_grad():
        return model.module.eval().logits(tokens, positions)


def logits_there(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_goes_in_and_comes_out_equal(tmp_path: Path, name: str) -> None:
    published = publish(name, tmp_path / "hf")
    imported = import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    assert imported.model_type == name.partition("-")[0].replace("llama3", "llama")
    # Its spec is of these weights, field by field.
    fields = read_mapping(Path(imported.spec))["model"]
    model = ModelConfig.model_validate(fields)
    assert model_signature(model) == model_signature(initial_model(str(tmp_path / "hf")))
    exported = export_folder(
        str(tmp_path / "ours"), str(tmp_path / "again"), shard_bytes=20_000
    )
    assert len(exported.files) > 1
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert_equal(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again"))
    result: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, experts_implementation="eager"
    )
    loaded, info = result
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    assert type(loaded) is type(published)
    assert loaded.config.eos_token_id == published.config.eos_token_id
    tokens = torch.randint(
        0, VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(1)
    )
    expected = logits_there(published, tokens)
    assert torch.equal(logits_there(loaded.eval(), tokens), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("source", ["hf", "ours"])
def test_a_run_that_begins_with_them_computes_the_same(
    tmp_path: Path, name: str, source: str
) -> None:
    published = publish(name, tmp_path / "hf", shard="30KB")
    if source == "ours":
        import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    tokens = torch.randint(
        0, VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(1)
    )
    expected = logits_there(published.double(), tokens)
    measured = (
        logits_here(str(tmp_path / source), tokens)
        .double()
        .reshape(expected.shape[0], expected.shape[1], -1)[..., :VOCABULARY]
    )
    assert (measured - expected).norm() / expected.norm() <= LOGITS_BAR


def test_types_are_kept_or_chosen(tmp_path: Path) -> None:
    publish("llama", tmp_path / "hf", dtype=torch.bfloat16)
    import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    export_folder(str(tmp_path / "ours"), str(tmp_path / "kept"))
    assert_equal(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "kept"))
    export_folder(str(tmp_path / "ours"), str(tmp_path / "fp32"), torch.float32)
    wide = {name: tensor.float() for name, tensor in tensors_of(tmp_path / "hf").items()}
    assert_equal(wide, tensors_of(tmp_path / "fp32"))
    assert (
        json.loads((tmp_path / "fp32" / "config.json").read_text())["torch_dtype"]
        == "float32"
    )


def test_weights_wider_than_the_published_ones_are_noted(tmp_path: Path) -> None:
    publish("llama", tmp_path / "hf")
    edit_config(tmp_path / "hf", dtype="bfloat16")
    import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    (note,) = export_folder(str(tmp_path / "ours"), str(tmp_path / "out")).notes
    assert "float32, as they were trained, and were published as bfloat16: --dtype" in note
    chosen = export_folder(str(tmp_path / "ours"), str(tmp_path / "fp32"), torch.float32)
    assert chosen.notes == ()


def test_boxes_are_read_from_anywhere(tmp_path: Path) -> None:
    publish("gpt2", tmp_path / "hf")
    weights = HfWeights(str(tmp_path / "hf"))
    for name in (
        "layers.1.attention.k.weight",
        "layers.0.mlp.down.weight",
        "layers.0.attention.v.bias",
    ):
        whole = load_whole(weights, name)
        offset = (5, 3)[: whole.dim()]
        size = (7, 11)[: whole.dim()]
        part = torch.zeros(size)
        weights.load_into(
            {
                f"model/{name}": ShardedTensor(
                    tuple(whole.shape), [TensorBox(Box(offset, size), part)]
                )
            }
        )
        where = tuple(
            slice(start, start + length) for start, length in zip(offset, size, strict=True)
        )
        assert torch.equal(part, whole[where])


def test_a_checkpoint_made_here_speaks_and_its_tokenizer_goes_along(tmp_path: Path) -> None:
    publish("llama", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(Tokenizer.of_bytes().to_json())
    edit_config(tmp_path / "hf", eos_token_id=[256, 7], bos_token_id=256)
    import_folder(f"file://{tmp_path / 'hf'}", str(tmp_path / "ours"))
    _, tokenizer = load_model(str(tmp_path / "ours"))
    assert tokenizer.end_of_document == 256
    export_folder(str(tmp_path / "ours"), str(tmp_path / "again"))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("a line")["input_ids"] == list(b"a line")
    assert again.eos_token_id == 256
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        256,
        [256, 7],
        None,
    )


def test_names_without_the_prefix_and_computed_tensors_are_read(tmp_path: Path) -> None:
    publish("gpt2", tmp_path / "hf")
    whole = tensors_of(tmp_path / "hf")
    import_folder(str(tmp_path / "hf"), str(tmp_path / "one"))
    edit_tensors(
        tmp_path / "hf",
        lambda tensors: {
            name.removeprefix("transformer."): tensor for name, tensor in tensors.items()
        },
    )
    edit_tensors(
        tmp_path / "hf",
        lambda tensors: (
            tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
        ),
    )
    import_folder(str(tmp_path / "hf"), str(tmp_path / "two"))
    export_folder(str(tmp_path / "two"), str(tmp_path / "again"))
    assert_equal(whole, tensors_of(tmp_path / "again"))
    states = [read_train_state(str(tmp_path / name), 0) for name in ("one", "two")]
    assert states[0]["config"]["model"] == states[1]["config"]["model"]


def quantise(
    tensors: dict[str, Tensor], block: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(as DeepSeek publishes them, what they stand for)."""
    stored = dict(tensors)
    meant = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            rows, columns = (-(-size // block) for size in tensor.shape)
            scales = torch.rand(rows, columns) + 0.5
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scales
            factors = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[
                : tensor.shape[0], : tensor.shape[1]
            ]
            meant[name] = (stored[name].float() * factors).bfloat16()
    return stored, meant


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_blocks_of_fp8_are_undone(tmp_path: Path, name: str) -> None:
    publish(name, tmp_path / "hf")
    stored, meant = quantise(tensors_of(tmp_path / "hf"), 12)
    edit_tensors(tmp_path / "hf", lambda _: stored)
    edit_config(
        tmp_path / "hf",
        quantization_config={"quant_method": "fp8", "weight_block_size": [12, 12]},
    )
    import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    export_folder(str(tmp_path / "ours"), str(tmp_path / "again"))
    assert_equal(meant, tensors_of(tmp_path / "again"))
    weights = HfWeights(str(tmp_path / "hf"))
    part = torch.zeros(9, 15)
    weights.load_into(
        {
            "model/layers.0.mlp.up.weight": ShardedTensor(
                (48, 32), [TensorBox(Box((11, 5), (9, 15)), part)]
            )
        }
    )
    assert torch.equal(
        part.bfloat16(), meant["model.layers.0.mlp.up_proj.weight"][11:20, 5:20]
    )


def fused(folder: Path, model: nn.Module) -> None:
    """Writes the tensors as transformers has them in memory."""
    names = {re.sub(r"\\d+", "{}", name) for name in model.state_dict()}
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    edit_tensors(folder, lambda _: dict(model.state_dict()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_experts_in_one_tensor_are_those_of_published_files(
    tmp_path: Path, name: str
) -> None:
    model = publish(name, tmp_path / "hf")
    published = HfWeights(str(tmp_path / "hf"))
    expected = {key: load_whole(published, key) for key in published.shapes}
    fused(tmp_path / "hf", model)
    weights = HfWeights(str(tmp_path / "hf"))
    assert_equal(expected, {key: load_whole(weights, key) for key in weights.shapes})
    # A part of one expert, as a rank reads it.
    expert = "layers.2.moe.experts.1.up.weight"
    if name == "mixtral":
        expert = "layers.1.moe.experts.1.up.weight"
    part = torch.zeros(9, 13)
    box = TensorBox(Box((5, 3), (9, 13)), part)
    weights.load_into(
        {f"model/{expert}": ShardedTensor(tuple(expected[expert].shape), [box])}
    )
    assert torch.equal(part, expected[expert][5:14, 3:16])


def test_other_layouts_of_mixtral_are_read(tmp_path: Path) -> None:
    model = publish("mixtral", tmp_path / "hf")
    import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    published = tensors_of(tmp_path / "hf")
    for old, new in ((".block_sparse_moe.", ".mlp."), (".mlp.", ".block_sparse_moe.")):
        source = published if new == ".mlp." else dict(model.state_dict())
        renamed = {name.replace(old, new): tensor for name, tensor in source.items()}
        edit_tensors(tmp_path / "hf", partial(_replace, renamed))
        weights = HfWeights(str(tmp_path / "hf"))
        for name in ("layers.1.moe.experts.3.down.weight", "layers.0.moe.router.weight"):
            tensor = load_whole(weights, name)
            (saved,) = [t for key, t in published.items() if key == stored_name(name)]
            assert torch.equal(tensor, saved)


def _replace(new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    return new


def stored_name(name: str) -> str:
    """Of Mixtral's router or down matrix."""
    name = name.replace("moe.router", "block_sparse_moe.gate")
    name = name.replace("moe.experts", "block_sparse_moe.experts").replace("down", "w2")
    return f"model.{name}"


def test_an_unknown_layout_of_experts_is_refused_by_its_name(tmp_path: Path) -> None:
    model = publish("qwen3_moe", tmp_path / "hf")
    fused(tmp_path / "hf", model)
    edit_tensors(
        tmp_path / "hf",
        lambda tensors: {
            name.replace("gate_up_proj", "gate_up_blocks"): tensor
            for name, tensor in tensors.items()
        },
    )
    with pytest.raises(ConfigError, match=r"it holds 2 others .*gate_up_blocks"):
        HfWeights(str(tmp_path / "hf"))
    edit_tensors(
        tmp_path / "hf",
        lambda _: {
            name: tensor.mT if name.endswith("down_proj") else tensor
            for name, tensor in model.state_dict().items()
        },
    )
    words = r"experts.down_proj' has shape \[4, 24, 32\], \[4, 32, 24\] is .* transpose it"
    with pytest.raises(ConfigError, match=words):
        HfWeights(str(tmp_path / "hf"))


def start_problems(folder: Path, **model: Any) -> list[Problem]:
    """As a job that begins with the folder gets them before it starts."""
    fields = HfWeights(str(folder)).model.model_dump(mode="json") | model
    checkpoint = CheckpointConfig(start_from=str(folder))
    _, problems = resolve_initial_model(
        checkpoint, ModelConfig.model_validate(fields), compare_copies=True
    )
    return problems


def test_a_head_of_its_own_is_used_whatever_the_flag_says(tmp_path: Path) -> None:
    publish("llama", tmp_path / "hf")
    edit_config(tmp_path / "hf", tie_word_embeddings=True)
    imported = import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    note, no_tokenizer = imported.notes
    assert "has no tokenizer.json" in no_tokenizer
    assert "lm_head.weight differs from model.embed_tokens.weight" in note
    export_folder(str(tmp_path / "ours"), str(tmp_path / "again"))
    assert_equal(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again"))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    # A job that begins with the folder gets the same answer.
    assert start_problems(tmp_path / "hf", tie_embeddings=False) == []
    (problem,) = start_problems(tmp_path / "hf", tie_embeddings=True)
    assert problem.pointer == "/model/tie_embeddings"
    assert problem.detail.endswith(f"made with False; set it to that. {note}")
    tokens = torch.arange(SEQUENCE)[None]
    expected = logits_there(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), tokens
    )
    measured = logits_here(str(tmp_path / "hf"), tokens).view_as(expected)
    assert (measured - expected).norm() / expected.norm() <= LOGITS_BAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_repeats_the_embedding_is_tied(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    publish("llama-tied", tmp_path / "hf", dtype=torch.bfloat16)
    edit_tensors(
        tmp_path / "hf",
        lambda tensors: (
            tensors
            | {"lm_head.weight": tensors["model.embed_tokens.weight"].to(dtype, copy=True)}
        ),
    )
    weights = HfWeights(str(tmp_path / "hf"))
    assert weights.model.tie_embeddings
    assert weights.notes == []


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_head_without_an_embedding_is_taken_for_both(tmp_path: Path, name: str) -> None:
    published = publish(name, tmp_path / "hf")
    embedding = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.weight": tensors.pop(embedding)}

    edit_tensors(tmp_path / "hf", rename)
    tokens = torch.arange(SEQUENCE)[None]
    expected = logits_there(published, tokens)
    measured = logits_here(str(tmp_path / "hf"), tokens).view_as(expected)
    assert (measured - expected).norm() / expected.norm() <= LOGITS_BAR


def test_a_single_file_counts_before_an_index(tmp_path: Path) -> None:
    # Programs that save over an earlier model leave its index.
    publish("llama", tmp_path / "hf", shard="30KB")
    published = publish("llama-tied", tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    tokens = torch.arange(SEQUENCE)[None]
    expected = logits_there(published, tokens)
    measured = logits_here(str(tmp_path / "hf"), tokens).view_as(expected)
    assert (measured - expected).norm() / expected.norm() <= LOGITS_BAR


def test_copies_that_differ_are_refused_on_every_road(tmp_path: Path) -> None:
    publish("deepseek_v3-mtp", tmp_path / "hf")
    name = "model.layers.3.shared_head.head.weight"

    def change_last_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][-1] += 1
        return tensors

    edit_tensors(tmp_path / "hf", change_last_row)
    words = f"tensor {name!r} differs from 'lm_head.weight'"
    with pytest.raises(ConfigError, match=words):
        import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    (problem,) = start_problems(tmp_path / "hf")
    assert words in problem.detail
    # Each rank compares the rows that it reads.
    weights = HfWeights(str(tmp_path / "hf"))
    shape = (VOCABULARY, 32)
    for first, is_refused in ((0, False), (VOCABULARY - 8, True)):
        box = TensorBox(Box((first, 0), (8, 32)), torch.zeros(8, 32))
        state = {"model/head.weight": ShardedTensor(shape, [box])}
        if is_refused:
            with pytest.raises(ConfigError, match=words):
                weights.load_into(state)
        else:
            weights.load_into(state)


Damage = Callable[[Path], None]


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(folder: Path) -> None:
    publish("llama", folder, shard="30KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    (folder / "model.safetensors").unlink(missing_ok=True)


def without(name: str) -> Damage:
    return lambda folder: edit_tensors(
        folder,
        lambda tensors: {key: value for key, value in tensors.items() if key != name},
    )


def with_tensor(name: str, tensor: Tensor) -> Damage:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors | {name: tensor})


def with_config(**changed: Any) -> Damage:
    return lambda folder: edit_config(folder, **changed)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, "is cut short: tensor 'model.norm.weight' ends at byte"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"PK\3\4" * 9),
            "its header would be",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"abc"),
            "it has 3 bytes, which is no safetensors file",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (4).to_bytes(8, "little") + b"nope"
            ),
            "its header is not readable",
        ),
        (
            lose_shard,
            "files that model.safetensors.index.json names are missing: model-00002-of-",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(
                folder / "pytorch_model.bin"
            ),
            "weights in torch's own format are not read",
        ),
        (lambda folder: (folder / "config.json").unlink(), "it holds no config.json"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json: it is not valid JSON",
        ),
        (
            without("model.norm.weight"),
            "lacks 1 of the 21 tensors that its config.json asks for: model.norm.weight; "
            "download its files again, or correct config.json if the model has no such",
        ),
        (
            with_tensor("model.layers.0.self_attn.q_proj.bias", torch.zeros(32)),
            "holds 1 tensors that a llama model of 2 layers, as its config.json describes "
            "it, does not have: model.layers.0.self_attn.q_proj.bias; correct config.json if "
            "they are part of the model, or take them out of the files",
        ),
        (
            with_config(num_hidden_layers=1),
            "a llama model of 1 layers, as its config.json describes it, does not have: "
            "model.layers.1.",
        ),
        (
            with_config(intermediate_size=64),
            "tensor 'model.layers.0.mlp.gate_proj.weight' has shape [48, 32], [64, 32] is "
            "expected from config.json;"
            " look at model.ffn_hidden_size",
        ),
        (
            with_config(num_key_value_heads=4),
            "look at model.num_query_groups or model.head_dim",
        ),
        (with_config(vocab_size=300), "look at model.vocab_size or model.hidden_size"),
        (
            without("lm_head.weight"),
            "lacks lm_head.weight, which its config.json asks for with "
            "tie_word_embeddings=false (the default of some families); set it to true there "
            "if the head is the embedding, or download the missing file",
        ),
        (
            with_config(quantization_config={"quant_method": "gptq"}),
            "quantization_config with quant_method='gptq'",
        ),
        (
            lambda folder: edit_tensors(
                folder,
                lambda tensors: {
                    name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()
                },
            ),
            "needs a factor for each block of [128, 128], and there is none",
        ),
        (
            with_tensor("model.norm.weight", torch.ones(32, dtype=torch.int64)),
            "'model.norm.weight' has type I64, which is not supported",
        ),
    ],
)
def test_a_bad_folder_is_one_message_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage, words: str
) -> None:
    publish("llama", tmp_path / "hf")
    damage(tmp_path / "hf")
    capsys.readouterr()
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert words in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_out_must_be_new_and_in_must_be_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish("llama", tmp_path / "hf")
    (tmp_path / "there").mkdir()
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "there")]) == 1
    assert (
        "it is there already; delete it, or choose another name" in capsys.readouterr().err
    )
    assert (
        main(["import", str(tmp_path / "hf" / "config.json"), str(tmp_path / "out")]) == 1
    )
    assert "it is not a folder with files in it" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "hf"), str(tmp_path / "out")]) == 1
    assert "it is not committed" in capsys.readouterr().err
    with pytest.raises(
        CheckpointError,
        match=r"neither a committed checkpoint .* nor a folder in Hugging Face's format",
    ):
        initial_model(str(tmp_path / "there"))


def test_what_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    publish("llama", tmp_path / "hf")
    import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    monkeypatch.setattr(exporting, "_write_files", full)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*/out: No space left on device"
    ):
        export_folder(str(tmp_path / "ours"), str(tmp_path / "out"))
    monkeypatch.setattr(importing, "commit", full)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*/new: No space left on device"
    ):
        import_folder(str(tmp_path / "hf"), str(tmp_path / "new"))
    (data,) = (tmp_path / "ours" / "data").iterdir()
    data.write_bytes(data.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"has .* bytes, .* were written"):
        export_folder(str(tmp_path / "ours"), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]
