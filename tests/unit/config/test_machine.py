"""Facts for the estimates: this machine, and speeds of earlier runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.config import build, machine
from cpt.plan.types import to_json
from tests.command import write_project


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
    assert found.kind in ("cpu", "gpu") and found.basis and found.cores >= 1
