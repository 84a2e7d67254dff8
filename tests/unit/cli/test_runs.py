"""Commands that look at runs: which runs there are, and what is said when a log holds nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cpt.base.errors import GuardStop, StoppedAndSaved
from cpt.base.files import write_json
from cpt.cli import failures
from cpt.launch import batch
from cpt.stages import state
from tests import made_run
from tests.command import cpt

NAME = "demo-7c1e92"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run under `runs` of the working folder, with empty rank logs as good runs have them."""
    monkeypatch.chdir(tmp_path)
    run = made_run.make(tmp_path / "runs")
    for stage in ("base", "domain", "anneal", "export"):
        attempt = run / "stages" / stage / ("attempt_2" if stage == "domain" else "attempt_1")
        (attempt / "logs").mkdir(parents=True)
        (attempt / "logs" / "rank_0000.log").write_bytes(b"")
    return run


def test_status_without_a_run_lists_the_runs_newest_first(run: Path) -> None:
    stopped = made_run.make(run.parent.parent / "other", until=("domain", 45)).rename(run.parent / "stopped")
    os.utime(run, (1, 1))
    damaged = run.parent / "damaged"
    damaged.mkdir()
    (damaged / "plan.json").write_text("{")
    os.utime(damaged, (0, 0))
    ended = cpt("status")
    assert ended.code == 0 and ended.err == ""
    rows = [line.split()[:4] for line in ended.out.splitlines()[1:]]
    assert rows == [
        ["stopped", "dead", "domain", "45/120"],
        [NAME, "done", "export", "-"],
        ["damaged", "damaged", "-", "-"],
    ]
    lines = json.loads(cpt("status", "--json").out)
    assert (lines[0]["name"], lines[0]["state"], lines[0]["step"]) == (stopped.name, "dead", 45)


def test_status_without_any_run_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cpt("status")
    assert ended.code == 0 and "`cpt run recipe=demo` starts one" in ended.err
    assert json.loads(cpt("status", "--json").out) == []


@pytest.mark.parametrize("words", [["report"], ["logs"], ["lineage"], ["cancel"], ["ckpt", "list"]])
def test_a_command_that_lacks_its_run_names_those_that_are_there(words: list[str], run: Path) -> None:
    ended = cpt(*words)
    assert ended.code == 2 and "wants" in ended.err.splitlines()[0]
    assert f"hint: runs in `runs`: `{NAME}`" in ended.err


def test_the_steps_of_a_stage_are_shown_as_while_it_ran_and_the_log_of_its_rank_behind_them(run: Path) -> None:
    ended = cpt("logs", NAME)
    lines = ended.out.splitlines()
    assert ended.code == 0 and "is empty" not in ended.err
    assert lines[0].startswith("anneal  starts · ") and lines[-1].startswith("anneal  done at step ")
    steps = [line for line in lines if line.startswith("anneal  step ")]
    assert len(steps) == 25 and all(f"  {name} " in steps[-1] for name in ("tokens", "loss", "lr", "tokens/s"))
    log = run / "stages" / "anneal" / "attempt_1" / "logs" / "rank_0000.log"
    log.write_text("one\na warning\n")
    assert cpt("logs", NAME).out == ended.out + "one\na warning\n"
    assert cpt("logs", NAME, "-n", "1").out == f"{lines[-1]}\na warning\n"
    assert cpt("logs", NAME, "--rank", "0").out == "one\na warning\n"


def test_an_empty_log_of_a_rank_says_where_the_steps_are(run: Path) -> None:
    ended = cpt("logs", NAME, "--rank", "0")
    assert ended.code == 0 and ended.out == ""
    assert "note: the log of rank 0 of `anneal` is empty" in ended.err and f"cpt status {NAME}" in ended.err


def test_the_log_of_the_stage_that_failed_is_shown_first(run: Path) -> None:
    folder = run / "stages" / "base"
    state.write(folder, state.State(status=state.FAILED, attempt=1, reason="out of memory"))
    (folder / "attempt_1" / "logs" / "rank_0000.log").write_text("no memory\n")
    assert cpt("logs", NAME).out.endswith("\nno memory\n")
    assert cpt("logs", NAME, "-r", "0").out == "no memory\n"


def test_after_a_stop_without_saving_the_saved_step_is_shown(run: Path) -> None:
    folder = run / "stages" / "anneal"
    write_json(folder / "state.json", {"status": "saved", "attempt": 1, "step": 34, "reason": "stopped at once"})
    stage = json.loads(cpt("status", NAME, "--json").out)["stages"][2]
    assert (stage["status"], stage["step"], stage["tokens"]) == ("saved", 34, 34 * made_run.TOKENS_PER_STEP)


def test_a_stop_that_went_as_planned_is_no_error() -> None:
    asked, guard = StoppedAndSaved("stopped at step 13", "the same command goes on"), GuardStop("ended")
    assert failures.error_text(asked) == "note: stopped at step 13\n\nhint: the same command goes on\n"
    assert failures.error_text(guard) == "warning: ended\n"
    assert (asked.exit_code, guard.exit_code) == (75, 4)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"id": 3}', "\x00"])
def test_a_damaged_plan_is_one_line_with_a_way_on(content: str, run: Path) -> None:
    (run / "plan.json").write_text(content)
    for words in (["status", NAME], ["logs", NAME], ["report", NAME]):
        ended = cpt(*words)
        lines = ended.err.splitlines()
        assert ended.code == 2 and "plan.json` is damaged" in lines[0] and "`--fresh`" in lines[2], ended
        assert len(lines) == 3
    assert cpt("diff", NAME, NAME).code == 2


def test_two_plans_of_one_name_are_told_apart_by_what_was_typed(run: Path) -> None:
    other = made_run.make(run.parent.parent / "other")
    plan = json.loads((other / "plan.json").read_text())
    plan["stages"]["base"]["train"]["seed"] = 7
    write_json(other / "plan.json", plan)
    head = cpt("diff", NAME, f"other/{NAME}").out.splitlines()[0]
    assert head.split() == ["key", NAME, "(7c1e92)", f"other/{NAME}", "(7c1e92)"]


def test_the_log_of_a_job_stands_in_for_ranks_that_have_none(run: Path) -> None:
    stage = run / "stages" / "anneal"
    shutil.rmtree(stage / "attempt_1")
    (stage / "logs").mkdir(exist_ok=True)
    log = stage / "logs" / "run-anneal-7.log"
    batch.note_sent(run, "anneal", batch.Sent(id="7", token="t", script="job.sbatch", log=str(log)))
    ended = cpt("logs", NAME, "--stage", "anneal")
    assert ended.code == 0 and "job 7 of `anneal` has printed nothing" in ended.err
    log.write_text("module: command not found\n")
    ended = cpt("logs", NAME, "--stage", "anneal")
    assert ended.out == "module: command not found\n"
    assert f"`{log}`: what the script of job 7 printed, as no rank of `anneal` has written" in ended.err


def test_the_log_of_a_job_is_shown_when_asked_for(run: Path) -> None:
    stage = run / "stages" / "domain"
    (stage / "attempt_2" / "logs" / "rank_0000.log").write_text("a rank\n")
    for id in ("7", "9"):
        log = stage / f"{id}.log"
        batch.note_sent(run, "domain", batch.Sent(id=id, token=id, script="job.sbatch", log=str(log)))
        log.write_text(f"job {id}\n")
    assert cpt("logs", NAME, "--stage", "domain").out.endswith("\na rank\n")
    assert cpt("logs", NAME, "--stage", "domain", "--job").out == "job 9\n"
    assert cpt("logs", NAME, "--job").out == "job 9\n"
    ended = cpt("logs", NAME, "--stage", "base", "--job")
    assert ended.code == 2 and "stage `base` was not sent to a queue" in ended.err
