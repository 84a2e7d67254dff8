"""What an attempt does besides starting ranks: its sign of life, and attempts that never began."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from cpt.base import lock
from cpt.base.errors import FAILED, SAVED
from cpt.base.files import read_json, write_json
from cpt.base.records import to_json
from cpt.launch import outcome
from cpt.launch.slurm.options import Slurm
from cpt.plan.types import Job
from cpt.stages import attempt, state
from tests.unit.stages.plans import plan, stage, train


def test_the_pulse_beats_its_own_lock_alone(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "only"
    held, _ = lock.take(folder, lock.holder_of(os.getpid(), "one"))
    job = folder / "attempt_1" / "job.json"
    write_json(job, {"fence": held.holder.token})
    tick = attempt.pulse(job)
    os.utime(held.path, (1, 1))
    assert tick() is False and held.path.stat().st_mtime > 1
    held.release()
    other, _ = lock.take(folder, lock.holder_of(os.getpid(), "another"))
    os.utime(other.path, (1, 1))
    (tmp_path / attempt.STOP_FILE).touch()
    assert tick() is True and other.path.stat().st_mtime == 1


def test_attempts_that_never_began_and_those_of_an_earlier_command_do_not_count(tmp_path: Path) -> None:
    for number, resume in ((1, None), (2, "checkpoints/iter_0000012"), (4, "checkpoints/iter_0000012")):
        write_json(tmp_path / f"attempt_{number}" / "job.json", {"resume": resume})
    (tmp_path / "attempt_3").mkdir()  # killed before its job was written
    assert attempt._began_at(tmp_path) == [0, 12, 12]
    assert attempt._began_at(tmp_path, first=3) == [12]


def begun(run_dir: Path) -> attempt.Attempt:
    only = stage("only", train=train())
    folder = attempt.stage_dir(run_dir, "only")
    (folder / "attempt_1").mkdir(parents=True)
    held, _ = lock.take(folder, lock.holder_of(os.getpid(), "a test"))
    job = Job(
        run_dir=str(run_dir),
        stage="only",
        attempt=1,
        start="scratch",
        parent=None,
        resume=None,
        corpora={},
        tokenizer=None,
    )
    return attempt.Attempt(plan(only), only, job, folder / "attempt_1", held)


def test_ranks_that_ended_well_count_though_their_parent_was_killed_behind_them(tmp_path: Path) -> None:
    one = begun(tmp_path)
    outcome.write_record(one.folder, 0, SAVED)
    assert attempt.finish(one, -9) == SAVED
    assert state.read(one.stage_dir).status == state.SAVED


@pytest.mark.parametrize(("left", "word"), [(3600, "repeat"), (-1, "failed")])
def test_a_stop_without_a_step_is_repeated_unless_the_time_limit_was_near(
    left: float, word: str, tmp_path: Path
) -> None:
    one = begun(tmp_path)
    one = dataclasses.replace(one, job=dataclasses.replace(one.job, queue_job="7", warned_from=time.time() + left))
    write_json(one.folder / "job.json", to_json(one.job))
    outcome.write_record(one.folder, 0, SAVED)
    assert attempt.finish(one, SAVED) == SAVED
    assert attempt._word(one, SAVED, Slurm()) == word
    now = state.read(one.stage_dir)
    assert (now.status == state.FAILED) == ("`launcher.time` must be" in now.reason) == (word == "failed")


def test_a_killed_parent_is_told_where_no_rank_says_anything(tmp_path: Path) -> None:
    one = begun(tmp_path)
    assert attempt.finish(one, -9) == FAILED
    assert read_json(one.folder / "failure.json")["error"] == "the parent process of the ranks was killed"
    assert lock.read_holder(one.stage_dir) is None
