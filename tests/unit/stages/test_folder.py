"""Which folder a run goes into."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.stages.run import Settings, choose_folder
from tests.unit.stages import plans


def test_empty_folders_of_a_deleted_run_are_used_again_files_of_somebody_are_not(tmp_path: Path) -> None:
    plan = plans.plan(plans.stage("a"), runs=str(tmp_path), name="it")
    settings = Settings(command=["cpt", "run"], cwd=tmp_path, environ={})
    left = tmp_path / "it" / "stages" / "a" / "attempt_1"
    left.mkdir(parents=True)
    assert choose_folder(plan, settings)[1] == tmp_path / "it"
    (left / "thesis.txt").touch()
    with pytest.raises(UsageError, match="exists and is not a run folder"):
        choose_folder(plan, settings)
