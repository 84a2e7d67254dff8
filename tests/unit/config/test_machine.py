"""Facts for the estimates: this machine, and speeds of earlier runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.base.errors import PlanError
from cpt.base.records import to_json
from cpt.config import build, machine
from cpt.launch.slurm.options import Slurm
from tests.command import cpt, write_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CPT_CACHE", raising=False)
    return write_project(tmp_path)


def earlier_run(project: Path, speeds: list[float], *overrides: str) -> None:
    """A run folder with a plan and step events of its stage `domain`."""
    run = project / "runs" / "before"
    events = run / "stages" / "domain" / "attempt_1" / "events.jsonl"
    events.parent.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(to_json(build.plan("two", list(overrides)))))
    lines = [{"kind": "step", "step": i, "tokens_per_s": speed} for i, speed in enumerate(speeds)]
    events.write_text("not json\n" + "".join(json.dumps(line) + "\n" for line in lines) + '{"cut')


def test_the_speed_of_a_like_stage_is_taken_with_its_run_as_the_basis(project: Path) -> None:
    earlier_run(project, [1.0, 500.0, 510.0, 490.0, 505.0], "stages.domain.tokens=8k", "train.seed=9")
    found = machine.measured(build.plan("two"))
    assert found["domain"].tokens_per_s == 500 and found["domain"].run == "before"
    assert found["anneal"] == found["domain"]  # the same model, lengths and layout


@pytest.mark.parametrize("override", ["train.seq_length=32", "train.parallel.tp=2", "train.micro_batch_size=1"])
def test_a_stage_of_another_length_or_layout_says_nothing(project: Path, override: str) -> None:
    earlier_run(project, [500.0] * 5, override)
    assert machine.measured(build.plan("two")) == {}


def test_a_damaged_run_is_passed_over(project: Path) -> None:
    earlier_run(project, [500.0] * 5)
    (project / "runs" / "before" / "plan.json").write_text("{")
    assert machine.measured(build.plan("two")) == {}


def test_this_machine_has_devices_with_a_basis() -> None:
    found = machine.devices()
    assert found.kind in ("cpu", "gpu") and found.basis and (found.cores or 0) >= 1


def test_a_run_on_a_cluster_is_not_measured_by_the_machine_that_it_is_sent_from(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_memory", lambda: 10**6)
    monkeypatch.setattr(machine, "_gpu_names", list)
    with pytest.raises(PlanError, match=r"this machine has 1\.0 MB"):
        build.plan("two", ["train.parallel.dp=2"])
    sent = ["recipe=two", "train.parallel.dp=2", "launcher=slurm", "launcher.ranks_per_node=2"]
    said = cpt("plan", *sent, "launcher.cpus_per_rank=4").out
    assert "needs   2 ranks · about " in said and " memory at peak of each rank · " in said
    said = cpt("plan", *sent, "launcher.gpus=gres", "launcher.gres_type=a100").out
    assert "needs   2 GPUs · about " in said and "40% of the peak of `a100` assumed" in said
    assert "speed of the devices not known" in cpt("plan", *sent, "launcher.gpus=gres").out


def test_the_cores_of_a_rank_on_a_cluster_are_its_own() -> None:
    found = machine.devices(Slurm(cpus_per_rank=4))
    assert (found.cores, found.memory, found.flops_per_s) == (None, None, 4 * machine.CORE_FLOPS_PER_S)
