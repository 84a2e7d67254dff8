"""What a run folder says about how it came to be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import yaml

from cpt.base.records import from_json
from cpt.plan.types import RunPlan
from cpt.stages import record
from tests.unit.stages.plans import plan, stage


def test_secrets_of_the_environment_are_not_written_down(tmp_path: Path) -> None:
    environ = {"WANDB_API_KEY": "s3cret-1", "HF_TOKEN": "s3cret-2", "AWS_SECRET_ACCESS_KEY": "s3cret-3"}
    found = record.environment(tmp_path, {**environ, "OMP_NUM_THREADS": "2"}, now=0.0)
    assert "s3cret" not in json.dumps(found)
    assert found["variables"] == {"OMP_NUM_THREADS": "2"}


def test_a_run_is_fresh_by_its_first_command(tmp_path: Path) -> None:
    assert not record.is_fresh(tmp_path)
    record.write_command(tmp_path, ["cpt", "run", "recipe=a", "--fresh"], 0.0)
    record.write_command(tmp_path, ["cpt", "resume", "a-2"], 1.0)
    assert record.is_fresh(tmp_path)
    (tmp_path / "command.txt").unlink()
    record.write_command(tmp_path, ["cpt", "run", "name=--fresh run"], 0.0)
    record.write_command(tmp_path, ["cpt", "run", "--fresh"], 1.0)
    assert not record.is_fresh(tmp_path)


def test_the_commit_and_what_was_not_committed_are_written_down(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    assert record.git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "model.py").write_text("width = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    (tmp_path / "model.py").write_text("width = 2\n")
    (tmp_path / "new.py").write_text("")
    found = record.git_state(tmp_path)
    assert found is not None and len(found["commit"]) == 40
    assert "+width = 2" in found["diff"] and found["untracked"] == ["new.py"]


def test_every_command_is_kept_as_it_was_typed(tmp_path: Path) -> None:
    record.write_command(tmp_path, ["cpt", "run", "recipe=a b"], now=0.0)
    record.write_command(tmp_path, ["cpt", "run", "--yes"], now=9.0)
    lines = (tmp_path / "command.txt").read_text().splitlines()
    assert lines[1::2] == ["cpt run 'recipe=a b'", "cpt run --yes"]


def test_ranks_read_back_the_very_plan(tmp_path: Path) -> None:
    one = plan(stage())
    record.write_plan(tmp_path, one)
    assert from_json(RunPlan, json.loads((tmp_path / "plan.json").read_text())) == one
    assert isinstance(yaml.safe_load((tmp_path / "plan.yaml").read_text()), dict)
