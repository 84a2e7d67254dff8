"""What a plan warns of before anything is started."""

from __future__ import annotations

import dataclasses

import pytest

from cpt.plan.budget import Budget, Devices, StageCost
from cpt.report.plan_text import time_warnings
from tests.unit.stages import plans

COST = StageCost(
    flops=1.0, seconds=15 * 60.0, evaluating=60.0, basis="", memory=0.0, disk=0.0, checkpoints=1
)  # 16 minutes
DEVICES = Devices(kind="cpu", flops_per_s=None, memory=None, basis="", cores=2)


@pytest.mark.parametrize(
    ("launcher", "says"),
    [
        ({"time": "10m", "requeue": False}, "its job has 7 min"),
        ({"time": "10m", "requeue": False, "successors": 1}, "its 2 jobs have 7 min"),
        ({"time": "10m", "max_attempts": 2}, "its 2 jobs have 7 min"),
        ({"time": "10m", "requeue": False, "successors": 2}, ""),
        ({"time": "10m"}, ""),
        ({"requeue": False}, ""),
    ],
)
def test_a_stage_that_is_longer_than_its_jobs_together_is_warned_of(launcher: dict[str, object], says: str) -> None:
    plan = dataclasses.replace(plans.plan(plans.stage("a")), launcher={"name": "slurm", **launcher})
    budget = Budget(
        stages={"a": COST},
        devices=DEVICES,
        num_devices=1,
        checkpoint_bytes=0.0,
        disk=0.0,
    )
    found = time_warnings(plan, budget)
    assert len(found) == bool(says)
    assert all("stage `a` takes about 16 min" in text and says in text and "`cpt resume`" in text for text in found)
