"""Layout strings and equal cuts."""

import pytest

from megatron_ray.pipeline_parallel.schedules.layout import (
    LayoutError,
    StageContents,
    parse_layout,
    split_into_stages,
)


def test_megatrons_own_example() -> None:
    stages = parse_layout("Et*3|(tt|)*29,m|L", 61, 1)
    assert len(stages) == 32
    assert stages[0] == StageContents((0, 1, 2), embedding=True)
    assert stages[1] == StageContents((3, 4))
    assert stages[29] == StageContents((59, 60))
    assert stages[30] == StageContents(mtp_layers=(0,))
    assert stages[31] == StageContents(loss=True)


def test_groups_nest_and_stages_may_be_empty() -> None:
    assert parse_layout("E|(t*2 | (t,|)*2)*1 | |L|", 4) == (
        StageContents(embedding=True),
        StageContents((0, 1)),
        StageContents((2,)),
        StageContents((3,)),
        StageContents(),
        StageContents(),
        StageContents(loss=True),
    )
    assert parse_layout("EttL", 2) == (StageContents((0, 1), embedding=True, loss=True),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Etx|L", "position 3: 'x' is none of E, t, m, L"),
        ("E(tt|L", r"position 7: '\(' without '\)'"),
        ("Ett)|L", r"position 4: '\)' without '\('"),
        ("Et*|L", r"position 4: '\*' must be followed by how often"),
        ("Et*9999999|L", "at most six digits"),
        ("Et*999999|L", "more than 100000 parts"),
        ("E(t*9999)*999999|L", "more than 100000 parts"),
        ("(" * 2000 + "E", "more than 20 groups inside each other"),
        ("Et|tt|L", r"has 3 decoder layers \('t'\), the model has 2"),
        ("Ett|m|L", r"has 1 multi-token-prediction layers \('m'\), the model has 0"),
        ("tEt|L", "must begin with the embedding"),
        ("EtE|tL", "must begin with the embedding 'E', and have it once"),
        ("Et|Lt", "must end with the loss"),
        ("", "has 0 decoder layers"),
    ],
)
def test_layouts_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        parse_layout(text, 2)


def test_where_the_prediction_layers_may_stand() -> None:
    with pytest.raises(LayoutError, match="a decoder layer behind"):
        parse_layout("Et|m|tL", 2, 1)
    with pytest.raises(LayoutError, match="over stages"):
        parse_layout("Ett|m|mL", 2, 2)


def test_equal_and_unequal_cuts() -> None:
    assert [stage.layers for stage in split_into_stages(8, 4)] == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ]
    stages = split_into_stages(8, 3, first=1, last=3, num_mtp_layers=1)
    assert stages[0] == StageContents((0,), embedding=True)
    assert stages[2] == StageContents((5, 6, 7), loss=True, mtp_layers=(0,))
    assert split_into_stages(3, 1) == (StageContents((0, 1, 2), embedding=True, loss=True),)
    assert [len(stage.layers) for stage in split_into_stages(5, 2, first=2, last=3)] == [
        2,
        3,
    ]


def test_cuts_that_do_not_work_out() -> None:
    with pytest.raises(
        LayoutError,
        match="10 layers do not divide evenly into 4 stages; nearest: num_layers=8 or 12",
    ):
        split_into_stages(10, 4)
    with pytest.raises(
        LayoutError,
        match="3 layers do not divide evenly into 4 stages; nearest: num_layers=4, or give",
    ):
        split_into_stages(3, 4)
    with pytest.raises(LayoutError, match=r"\[5, 5\]\) do not make up 8 layers"):
        split_into_stages(8, 3, first=5, last=5)
    with pytest.raises(LayoutError, match="do not make up 5 layers in 1 stages"):
        split_into_stages(5, 1, first=2, last=3)
