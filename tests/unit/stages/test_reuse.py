"""What other runs in the same folder say about a stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cpt.base.files import write_json
from cpt.base.records import to_json
from cpt.plan.types import RunPlan
from cpt.stages import reuse, state
from tests.unit.stages.plans import changed, plan, stage


def _write(runs: Path, name: str, one: RunPlan, status: str = state.SAVED) -> None:
    write_json(runs / name / "plan.json", to_json(one))
    for stage_name in one.stages:
        state.write(runs / name / "stages" / stage_name, state.State(status=status))


def test_a_run_that_differs_in_a_few_values_is_named(tmp_path: Path) -> None:
    new = plan(changed(stage(), "f2", seed=2), runs=str(tmp_path))
    _write(tmp_path, "before", plan(stage(), runs=str(tmp_path)))
    assert reuse.nearest_run(new, new.stages["domain"], tmp_path / "new").changed == ("`seed` 1 → 2",)
    _write(tmp_path, "later", plan(changed(stage(), "f3", seed=3), runs=str(tmp_path)), state.PENDING)
    found = reuse.nearest_run(new, new.stages["domain"], tmp_path / "new")
    assert found.run == "before", "a run that never began the stage has nothing to compare with"


def test_runs_of_another_recipe_and_those_that_differ_in_much_are_not_compared_with(tmp_path: Path) -> None:
    much = {"seed": 2, "seq_length": 64, "global_batch_size": 4, "precision": "bf16", "tokens": 1, "mixture": {"a": 1}}
    new = plan(changed(stage(), "f2", **much), runs=str(tmp_path))
    _write(tmp_path, "unlike", plan(stage(), runs=str(tmp_path)))
    assert reuse.nearest_run(new, new.stages["domain"], tmp_path / "new") == reuse.Nearest()
    near = plan(changed(stage(), "f3", seed=3), runs=str(tmp_path))
    _write(tmp_path, "unlike", dataclasses.replace(plan(stage(), runs=str(tmp_path)), recipe="other"))
    assert reuse.nearest_run(near, near.stages["domain"], tmp_path / "new") == reuse.Nearest()
