"""Values of a spec mean the same in a YAML file, a JSON file, an override and a request."""

import codecs
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.parsing.numbers import whole_number
from megatron_ray.config.parsing.yaml_values import read_yaml
from megatron_ray.config.train_config import apply_overrides, read_mapping
from workers.protocol.job import JobSpec

SPEC: dict[str, Any] = {
    "model": {"preset": "gpt-tiny"},
    "data": {"train": [{"path": "corpus.txt"}]},
    "training": {"seq_length": 64, "global_batch_size": 4, "steps": 20},
    "optimizer": {"lr": 1e-3},
}


def spec_with(path: str, value: Any) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(json.dumps(SPEC))
    node = spec
    *parents, leaf = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return spec


def value_of(spec: JobSpec, path: str) -> Any:
    node: Any = spec
    for name in path.split("."):
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    return node


def values_of_all_ways(tmp_path: Path, path: str, text: str) -> list[Any]:
    """Returns the value of a field that is written as `text` in each way to give it."""
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump(spec_with(path, "PLACE")).replace("PLACE", text)
    )
    quoted = json.dumps(spec_with(path, text))
    mappings = [
        read_mapping(tmp_path / "job.yaml"),
        apply_overrides(SPEC, [f"{path}={text}"]),
        json.loads(quoted),
    ]
    try:
        number = json.loads(text)
    except json.JSONDecodeError:
        pass  # JSON has no such numbers
    else:
        mappings.append(spec_with(path, number))
    return [value_of(JobSpec.from_mapping(mapping), path) for mapping in mappings]


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("training.steps", "1000", 1000),
        ("training.steps", "1e3", 1000),
        ("training.steps", "1E+3", 1000),
        ("training.steps", "1.5e3", 1500),
        ("training.steps", "1_000", 1000),
        ("training.steps", "1000.0", 1000),
        ("training.steps", "0x3e8", 1000),
        ("training.steps", "010", 10),
        ("training.seed", "9e18", 9 * 10**18),
        ("training.seed", "0x7fffffffffffffff", 2**63 - 1),
        ("parallel.dp", "1e0", 1),
        ("parallel.dp", "auto", "auto"),
        ("checkpoint.every_steps", "2e1", 20),
        ("restart.max_preemptions", "-1e0", -1),
        ("optimizer.lr", "1e-3", 1e-3),
        ("optimizer.lr", "1", 1.0),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "1_0.5e-1", 1.05),
        ("training.deterministic", "yes", True),
        ("training.deterministic", "off", False),
        ("training.deterministic", "True", True),
        ("name", "no", "no"),
        ("name", "2024-01-01", "2024-01-01"),
        ("metadata.at", "12:30", "12:30"),
    ],
)
def test_a_value_means_the_same_however_it_is_given(
    tmp_path: Path, path: str, text: str, value: Any
) -> None:
    values = values_of_all_ways(tmp_path, path, text)
    assert values == [value] * len(values)
    assert {type(item) for item in values} == {type(value)}


@pytest.mark.parametrize(
    ("path", "value", "refusal"),
    [
        ("training.steps", "1.5e0", "a whole number, got '1.5e0'; write it as 1000 or 1e3"),
        ("training.steps", 1.5, "a whole number, got 1.5; write it as 1000 or 1e3"),
        ("training.steps", "1e-3", "a whole number, got '1e-3'; write it as 1000 or 1e3"),
        ("training.steps", "1,000", "got '1,000'; write it as 1000 or 1e3"),
        ("training.steps", "10k", "got '10k'; write it as 1000 or 1e3"),
        ("training.steps", "1e999999999", "got '1e999999999'; write it as 1000 or 1e3"),
        ("training.steps", "1e400", "must be at most 1099511627776, got '1e400'"),
        ("training.steps", "9" * 200_000, "a whole number with fewer digits, got '999"),
        ("schedule.warmup_steps", 10**400, "must be at most 1099511627776, got 1000"),
        ("training.steps", True, "a whole number, got true; write it as 1000 or 1e3"),
        ("training.seq_length", None, "a whole number, got null; write it as 1000 or 1e3"),
        ("optimizer.lr", "0,1", "a number, got '0,1'; write it as 0.001 or 1e-3"),
        ("optimizer.lr", False, "a number, got false; write it as 0.001 or 1e-3"),
        ("parallel.dp", "1.5", "got '1.5'; write it as 1000 or 1e3; or must be 'auto'"),
        ("name", 5, 'a string, got 5; put it in quotes: "5"'),
        ("name", True, 'a string, got true; put it in quotes: "true"'),
        ("training.deterministic", "maybe", "true or false, got 'maybe'"),
        ("training.stepz", 3, "unknown field 'stepz'; did you mean 'steps'?"),
        ("training", 3, "must be a JSON object, got 3"),
    ],
)
def test_a_refusal_shows_the_value_and_what_to_write(
    path: str, value: Any, refusal: str
) -> None:
    spec = spec_with(path, value)
    with pytest.raises(ValidationError) as caught:
        JobSpec.from_mapping(spec)
    (problem,) = problems_from_pydantic(caught.value.errors(), spec, model=JobSpec)
    assert problem.pointer == "/" + path.replace(".", "/")
    assert refusal in problem.detail


@pytest.mark.parametrize(
    ("name", "more", "refusal"),
    [
        ("job.yaml", "training: {steps: 5}", "the key 'training' is given twice; keep one"),
        ("job.yaml", "metadata: {a: x, b: {a: y, a: z}}", "the key 'a' is given twice"),
        ("job.json", '"name": "a", "name": "b"', "the key 'name' is given twice; keep one"),
        ("job.yaml", "priority: .inf", "JSON does not support: /priority is inf; use a"),
        ("job.json", '"grace_s": 1e400', "JSON does not support: /grace_s is inf"),
        ("job.yaml", "metadata: {a: !!timestamp 2026-11-20}", "/metadata/a is 2026-11-20"),
        ("job.yaml", "metadata: &a {b: *a}", "it is nested without end"),
        ("job.json", '"metadata": ' + "[" * 100_000, "is nested too deeply for a spec"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_sent_is_refused(
    tmp_path: Path, name: str, more: str, refusal: str
) -> None:
    text = yaml.safe_dump(SPEC) + more
    if name.endswith("json"):
        text = json.dumps(SPEC)[:-1] + ", " + more + "}"
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(refusal)):
        read_mapping(tmp_path / name)


def test_merged_keys_may_be_given_again() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b\n  <<: *a\n  x: 3\nc:\n  <<: *b\n  x: 4"
    assert read_yaml(text)["c"] == {"x": 4, "y": 2}
    assert read_yaml(text)["b"] == {"x": 3, "y": 2}


def test_long_numbers_are_left_to_their_field(tmp_path: Path) -> None:
    digits = "9" * 5000
    (tmp_path / "job.json").write_text(f'{{"a": {digits}}}')
    assert read_mapping(tmp_path / "job.json") == {"a": digits}
    assert read_yaml(f"[{digits}, 0x{digits}]") == [digits, f"0x{digits}"]
    assert apply_overrides({}, [f"a={digits}"]) == {"a": digits}
    with pytest.raises(ValueError, match="/optimizer/lr is nan; use a finite number"):
        apply_overrides(SPEC, ["optimizer.lr=.nan"])


def test_what_is_no_whole_number() -> None:
    for text in (
        "",
        "e3",
        "1__0",
        "_1",
        "0x",
        "0x_",
        "0b2",
        "1e",
        "1.2.3",
        "\uff11",
        "--1",
    ):
        assert whole_number(text) is None


def test_yaml_values_are_those_of_json() -> None:
    text = """{"a": [1, -2.5, 1.0e+3, true, null, "x"], "b": {"c": 1E400}}"""
    assert read_yaml(text)["a"] == json.loads(text)["a"]
    assert read_yaml("a: on\nb: ~\nc:\nd: =\ne: 0o17\nf: '1'\n<<: {g: .inf}") == {
        "a": "on",
        "b": None,
        "c": None,
        "d": "=",
        "e": 15,
        "f": "1",
        "g": float("inf"),
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["job.yaml", "job.json"])
def test_a_byte_order_mark_changes_nothing_in_a_spec(
    tmp_path: Path, name: str, encoding: str
) -> None:
    spec = spec_with("metadata", {"place": "Zürich"})
    content = json.dumps(spec, ensure_ascii=False)
    (tmp_path / name).write_text(content, encoding=encoding)
    assert (tmp_path / name).read_bytes().startswith(
        (codecs.BOM_UTF8, codecs.BOM_UTF16)
    ) == (encoding != "utf-8")
    assert read_mapping(tmp_path / name) == spec


def test_numbers_of_a_list_are_read_alike() -> None:
    spec = spec_with("parallel.hierarchical_cp_sizes", ["2e0", 2])
    assert JobSpec.from_mapping(spec).parallel.hierarchical_cp_sizes == (2, 2)


def test_overrides_reach_items_of_lists() -> None:
    override = "data.train.0.path"
    changed = apply_overrides(SPEC, [f"{override}=b.txt", "data.train.0.weight=2e0"])
    assert JobSpec.from_mapping(changed).data.train[0].weight == 2.0
    assert changed["data"]["train"][0]["path"] == "b.txt"
    assert SPEC["data"]["train"] == [{"path": "corpus.txt"}]
    for path in ("data.train.1.path", "data.train.x", "data.train.-1.path"):
        with pytest.raises(
            ValueError, match="is no item of a list with 1, numbered from 0"
        ):
            apply_overrides(SPEC, [f"{path}=b.txt"])
    with pytest.raises(ValueError, match="'path' is a value, not a group of fields"):
        apply_overrides(SPEC, ["data.train.0.path.x=1"])
