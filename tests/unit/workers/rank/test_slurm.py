"""The variables of srun."""

import pytest

from workers.rank.environment import ProcessEnvironmentError, RankEnv

# Of the ninth of twelve processes: three on each of the first two nodes, six on the third.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "8",
    "SLURM_NTASKS": "12",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),6",
    "SLURM_STEP_NODELIST": "gpu[007-008],fat1",
}


def test_a_process_of_srun_is_a_rank_and_the_first_node_has_the_store() -> None:
    env = RankEnv.from_environ(SRUN)
    assert env == RankEnv(8, 12, 2, 6, 2, "gpu007", 24713)
    # As torchrun would export it.
    assert RankEnv.from_environ(env.to_environ()) == env


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("rack[2-3]-node[09,11-12]", "rack2-node09"),
        ("a[1,3].cluster.org,b", "a1.cluster.org"),
    ],
)
def test_the_first_of_several_nodes(nodes: str, first: str) -> None:
    env = RankEnv.from_environ({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert env.master_addr == first


def test_the_users_address_and_torchruns_ranks_come_first() -> None:
    address = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500"}
    env = RankEnv.from_environ({**SRUN, **address})
    assert (env.master_addr, env.master_port) == ("10.0.0.9", 29500)
    # One torchrun on each node, started by srun.
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    env = RankEnv.from_environ({**SRUN, **address, **torchrun, "GROUP_RANK": "0"})
    assert (env.rank, env.world_size) == (1, 2)


def test_the_shell_of_a_batch_script_is_no_rank_of_many() -> None:
    shell = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert RankEnv.from_environ(shell) == RankEnv(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS='many' is not a whole number"),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID=3 is outside the 3 nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3x2"}, "='3x2' has an unknown format"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST='' has an unknown format"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID is not set although others of srun's"),
    ],
)
def test_variables_that_make_no_sense_are_refused(
    change: dict[str, str | None], words: str
) -> None:
    values = {}
    for name, value in {**SRUN, **change}.items():
        if value is not None:
            values[name] = value
    with pytest.raises(
        ProcessEnvironmentError, match=r"; start ranks with srun$"
    ) as caught:
        RankEnv.from_environ(values)
    assert words in str(caught.value)
