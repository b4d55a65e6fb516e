"""Continued pre-training: a run starts from given weights under any layout, and
transformers agrees with what it makes of them.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_ray.checkpoint.directory import commit, latest_committed, list_checkpoints
from megatron_ray.checkpoint.hf.exporting import export_folder
from megatron_ray.checkpoint.hf.importing import import_folder
from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.datasets import build_dataset
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import EvalReport, Report, StepReport
from megatron_ray.training.saving import start_from_weights, training_state
from megatron_ray.training.session import TrainingSession, build
from tests.support.corpus_files import prepare_squares
from tests.support.hf_folders import VOCABULARY, edit_config, publish
from tests.support.tokenizer_files import byte_tokenizer

pytestmark = pytest.mark.parallel
Run = Callable[..., list[Any]]

LLAMA: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "max_sequence_length": 64,
    "norm_eps": 1e-5,
    "vocab_multiple": 32,
}


def config(
    folder: Path,
    start_from: Path | None,
    model: dict[str, Any] | None = None,
    steps: int = 20,
    **parallel: Any,
) -> TrainConfig:
    ranks = "-".join(f"{name}{degree}" for name, degree in parallel.items()) or "one"
    return TrainConfig.from_mapping(
        {
            "model": LLAMA | (model or {}),
            "parallel": {
                "dp": 1,
                "sequence_parallel": parallel.get("tp", 1) > 1,
                **parallel,
            },
            "data": {
                "train": [{"path": str(folder / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(folder / "cache"),
            },
            "training": {
                "seq_length": 32,
                "micro_batch_size": 2,
                "global_batch_size": 8,
                "steps": steps,
            },
            "optimizer": {"lr": 0.003},
            "checkpoint": {"start_from": str(start_from) if start_from else None},
            "storage": {"path": str(folder / ranks)},
        }
    )


def train(
    rank: int,
    world_size: int,
    settings: TrainConfig,
    data: PreparedData,
    resume_from: str | None = None,
) -> list[Report]:
    """Everything that this rank reported."""
    reports: list[Report] = []
    mesh = ParallelMesh.create(
        ParallelDims.of(settings.parallel), World(rank, world_size, rank, "cpu")
    )
    TrainingSession(
        settings, mesh, data, report=reports.append, resume_from=resume_from
    ).run()
    return reports


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedData:
    return prepare_squares(config(tmp_path, None).data)


def losses(reports: list[Report]) -> list[float]:
    return [report.loss for report in reports if isinstance(report, StepReport)]


def judged_loss(
    folder: Path, settings: TrainConfig, data: PreparedData, tokens: int
) -> float:
    """transformers' loss over the samples that the run was evaluated on, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    count = tokens // settings.training.seq_length
    samples = build_dataset(
        data.validation,
        count,
        settings.training.seq_length,
        settings.training.seed,
        settings.data_cache,
    )
    batch = torch.stack(
        [torch.as_tensor(samples[index].astype("int64")) for index in range(count)]
    )
    with torch.no_grad():
        logits = model(batch[:, :-1]).logits
    return float(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    )


def test_pretraining_goes_on_and_transformers_agrees_with_the_outcome(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    publish("llama", tmp_path / "hf", shard="30KB")
    settings = config(tmp_path, tmp_path / "hf", tp=2, pp=2)
    whole = run_ranks(train, 4, settings, corpus)
    evaluation = next(report for report in whole[0] if isinstance(report, EvalReport))
    first = losses(whole[0])[0]
    last = losses(whole[0])[-1]
    assert len(losses(whole[0])) == 20
    assert last < first - 0.5, "it learns"
    (saved,) = list_checkpoints(str(tmp_path / "tp2-pp2"))
    commit(saved.path, {}, [])
    exported = export_folder(saved.path, str(tmp_path / "out"))
    assert exported.architecture == "LlamaForCausalLM"
    assert exported.tokenizer
    assert judged_loss(
        tmp_path / "out", settings, corpus, evaluation.num_tokens
    ) == pytest.approx(evaluation.loss, abs=1e-5)


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 2}, {"pp": 2, "dp": 2}, {"dp": 2, "zero": 3}],
    ids=["tp2", "pp2-dp2", "zero3"],
)
def test_every_layout_begins_with_the_same_weights(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData, parallel: dict[str, Any]
) -> None:
    publish("llama", tmp_path / "hf")
    import_folder(str(tmp_path / "hf"), str(tmp_path / "ours"))
    one = losses(run_ranks(train, 1, config(tmp_path, tmp_path / "hf", steps=3), corpus)[0])
    settings = config(tmp_path, tmp_path / "ours", steps=3, **parallel)
    world_size = settings.parallel.tp * settings.parallel.pp * parallel.get("dp", 1)
    # Only ranks of the last stage report losses.
    curves = []
    for reports in run_ranks(train, world_size, settings, corpus):
        if losses(reports):
            curves.append(losses(reports))
    assert curves[0] == pytest.approx(one, rel=1e-5)


def test_a_run_that_goes_on_takes_its_own_checkpoint(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    publish("llama", tmp_path / "hf")
    settings = config(tmp_path, tmp_path / "hf", steps=4)
    settings = settings.model_copy(
        update={
            "checkpoint": settings.checkpoint.model_copy(
                update={"every_steps": 2, "keep_last": 2}
            )
        }
    )
    whole = losses(run_ranks(train, 1, settings, corpus)[0])
    for info in list_checkpoints(str(tmp_path / "one")):
        commit(info.path, {}, [])
    half = min(list_checkpoints(str(tmp_path / "one")), key=lambda info: info.step)
    (tmp_path / "hf").rename(tmp_path / "gone")
    again = losses(run_ranks(train, 1, settings, corpus, half.path)[0])
    assert again == whole[2:]
    assert latest_committed(str(tmp_path / "one")) is not None


def test_rows_added_to_the_weights_are_the_same_in_every_layout(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    publish("llama", tmp_path / "hf")
    wider = {"vocab_size": VOCABULARY + 70}
    one = run_ranks(train, 1, config(tmp_path, tmp_path / "hf", wider, steps=2), corpus)
    parallel: dict[str, Any] = {"tp": 2, "dp": 2, "zero": 3}
    settings = config(tmp_path, tmp_path / "hf", wider, steps=2, **parallel)
    split = run_ranks(train, 4, settings, corpus)
    assert losses(split[0]) == pytest.approx(losses(one[0]), rel=1e-5)


def test_added_rows_are_those_of_a_new_model_and_the_others_those_of_the_weights(
    tmp_path: Path,
) -> None:
    model = publish("llama", tmp_path / "hf")
    settings = config(tmp_path, None, {"vocab_size": VOCABULARY + 4})
    states = []
    for is_new in (True, False):
        built, optimizer = build(settings, ParallelMesh.single(), initialise=is_new)
        if not is_new:
            seed = settings.training.seed
            start_from_weights(str(tmp_path / "hf"), built, optimizer, seed)
        (box,) = training_state(built, optimizer)["model/embedding.weight"].boxes
        states.append(box.tensor.clone())
    fresh, started = states
    assert torch.equal(started[VOCABULARY:], fresh[VOCABULARY:])
    assert fresh[VOCABULARY:].std() > 0
    embedding = model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(started[:VOCABULARY], embedding)


def refusal(settings: TrainConfig, data: PreparedData) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainingSession(settings, ParallelMesh.single(), data)
    return str(caught.value)


def test_what_does_not_fit_is_refused_before_training(
    tmp_path: Path, corpus: PreparedData
) -> None:
    publish("llama", tmp_path / "hf")
    cause = "contradicts the weights of checkpoint.start_from, which were made with"
    assert refusal(
        config(tmp_path, tmp_path / "hf", {"num_layers": 3, "vocab_size": 258}), corpus
    ) == (
        f"/model/num_layers: num_layers=3 {cause} 2; set it to that; /model/vocab_size: "
        f"vocab_size=258 {cause} {VOCABULARY}; set it to that"
    )
    assert "neither a committed checkpoint" in refusal(
        config(tmp_path, tmp_path / "nowhere"), corpus
    )
    rows = VOCABULARY + 1
    too_many = corpus.model_copy(update={"vocab_size": rows, "rows_needed": rows})
    assert re.match(
        rf"model.vocab_size={VOCABULARY} is smaller than the tokenizer's",
        refusal(config(tmp_path, tmp_path / "hf"), too_many),
    )
    other = byte_tokenizer("<|endoftext|>", ordinary=("<b>",))
    (tmp_path / "hf" / "tokenizer.json").write_text(other)
    assert refusal(config(tmp_path, tmp_path / "hf"), corpus) == (
        f"/data/tokenizer: the data were not made with the tokenizer of {tmp_path / 'hf'}: "
        "token '<b>' is missing instead of 257; set data.tokenizer to {kind: file, path: "
        f"{tmp_path / 'hf'}/tokenizer.json}}"
    )
    edit_config(tmp_path / "hf", hidden_act="relu")
    assert "hidden_act='relu' is not supported" in refusal(
        config(tmp_path, tmp_path / "hf"), corpus
    )
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    assert "which is no safetensors file" in refusal(
        config(tmp_path, tmp_path / "hf"), corpus
    )
