"""A rank knows its number under every launcher."""

from __future__ import annotations

from cpt.launch.environment import rank_environment

STEP = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


def test_srun_tells_a_rank_its_number() -> None:
    assert rank_environment(STEP) == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}


def test_a_rank_knows_how_many_are_on_its_node() -> None:
    uneven = STEP | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "99"}
    for node, here in (("0", "3"), ("1", "3"), ("2", "2")):
        found = rank_environment(uneven | {"SLURM_NODEID": node})
        assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("8", here)
    assert rank_environment(uneven | {"SLURM_NODEID": "3"})["LOCAL_WORLD_SIZE"] == "8"


def test_torchrun_inside_of_slurm_wins() -> None:
    assert rank_environment({**STEP, "RANK": "2"}) == {}


def test_the_batch_script_itself_is_no_rank() -> None:
    assert rank_environment({k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"}) == {}
    assert rank_environment({**STEP, "SLURM_STEP_ID": "4294967291"} | {"SLURM_STEP_ID": "batch"}) == {}
