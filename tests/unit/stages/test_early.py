"""What counts as a job that ended before its stage began, by what a queue says and by what the run's files say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cpt.base.files import write_json
from cpt.launch import batch
from cpt.launch.batch import JobState, Sent
from cpt.stages import early, state
from cpt.stages.attempt import STOP_FILE
from cpt.stages.state import State
from tests.unit.stages import plans

FAILED = JobState(id="7", state=batch.FAILED, word="FAILED", reason="exit code 7")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "stages" / name).mkdir(parents=True)
    return tmp_path


def find(run_dir: Path, job: JobState, stage: str = "a", time_sent: float = 1.0) -> early.Early | None:
    plan = plans.plan(plans.stage("a"), plans.stage("b", "a"), runs=str(run_dir.parent))
    sent = [Sent(id=id, token=id, script="", log=str(run_dir / f"{id}.log"), time=time_sent) for id in ("6", "7", "8")]
    return early.find(run_dir, plan, stage, sent, {job.id: job}, ["a"] if stage == "b" else [])


def began(run_dir: Path, job: str, status: str) -> None:
    write_json(run_dir / "stages" / "a" / "attempt_1" / "job.json", {"queue_job": job})
    state.write(run_dir / "stages" / "a", State(status=status, attempt=1, reason="what the attempt said"))


def test_the_queues_word_and_the_last_lines_of_the_log_are_told(run_dir: Path) -> None:
    (run_dir / "7.log").write_text("one\ntwo\n\nthree\nfour\n")
    found = find(run_dir, FAILED)
    assert found is not None and found.is_known
    told = "it printed last: two / three / four"
    assert found.reason == f"job 7 ended: FAILED (exit code 7) before the stage began; {told}"


def test_a_job_that_nobody_knows_any_more_is_told_with_why_its_end_is_not(run_dir: Path) -> None:
    found = find(run_dir, JobState(id="7", state=batch.GONE))
    assert found is not None and not found.is_known
    assert "job 7 left the queue before the stage began, and how it ended cannot be told: the queue" in found.reason
    found = find(run_dir, JobState(id="7", state=batch.GONE, reason="the accounts do not answer: x"))
    assert found is not None and "cannot be told: the accounts do not answer: x; it printed nothing" in found.reason


@pytest.mark.parametrize("ended", [batch.DONE, batch.FAILED, batch.TIMEOUT, batch.LOST])
def test_every_end_without_an_attempt_is_one(run_dir: Path, ended: str) -> None:
    assert find(run_dir, JobState(id="7", state=ended, word=ended.upper())) is not None


@pytest.mark.parametrize("now", [*batch.ACTIVE, batch.CANCELLED, batch.UNKNOWN])
def test_a_job_that_waits_or_was_cancelled_is_none(run_dir: Path, now: str) -> None:
    assert find(run_dir, JobState(id="7", state=now)) is None


def test_an_attempt_of_the_job_speaks_for_itself(run_dir: Path) -> None:
    began(run_dir, "7", state.FAILED)
    assert find(run_dir, FAILED) is None
    began(run_dir, "6", state.FAILED)
    assert find(run_dir, FAILED) is not None, "an attempt of the job before it says nothing about this one"


def test_a_job_that_saved_and_then_did_not_come_back_is_one(run_dir: Path) -> None:
    began(run_dir, "7", state.SAVED)
    assert find(run_dir, JobState(id="7", state=batch.FAILED, word="FAILED", reason="exit code 75")) is None
    found = find(run_dir, FAILED)
    assert found is not None and "FAILED (exit code 7) before the stage went on" in found.reason


def test_a_stage_behind_one_that_is_not_done_ended_because_of_that(run_dir: Path) -> None:
    assert find(run_dir, FAILED, stage="b") is None
    state.write(run_dir / "stages" / "a", State(status=state.DONE))
    assert find(run_dir, FAILED, stage="b") is not None


def test_a_run_that_was_cancelled_has_not_failed(run_dir: Path) -> None:
    (run_dir / STOP_FILE).touch()
    assert find(run_dir, FAILED) is None


def test_what_was_written_down_since_the_job_was_sent_stays(run_dir: Path) -> None:
    state.write(run_dir / "stages" / "a", State(status=state.FAILED, reason="a damaged parent", updated=time.time()))
    assert find(run_dir, FAILED) is None
    assert find(run_dir, FAILED, time_sent=time.time() + 1) is not None
