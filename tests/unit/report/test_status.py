"""`cpt status` from what lies on disk."""

import dataclasses
import json
import os

import pytest

from cpt.base import lock
from cpt.base.errors import UsageError
from cpt.base.events import EventLog
from cpt.base.files import write_json
from cpt.report import wandb
from cpt.report.runs import find_run
from cpt.report.status import read_status, status_json, status_text, tail
from cpt.stages import state
from cpt.stages.attempt import STOP_FILE
from tests import made_run


def test_each_stage_has_its_figures(tmp_path):
    status = read_status(made_run.make(tmp_path, until=("domain", 45)))
    base, domain, anneal, export = status.stages
    assert (base.status, base.step, base.seconds_left) == ("done", 150, 0.0)
    assert (domain.step, domain.steps, domain.tokens) == (45, 120, 45 * 4096)
    assert domain.lr is not None and domain.tokens_per_s is not None and domain.last_event is not None
    assert (anneal.status, anneal.step) == ("pending", None)
    assert export.steps is None and export.kind == "convert"


def test_a_running_stage_without_a_process_is_called_dead(tmp_path):
    run = made_run.make(tmp_path, until=("domain", 45))
    status = read_status(run)
    assert status.stages[1].status == "dead" and status.seconds_left is None
    assert "nobody works on it any more" in status_text(status, made_run.START)


def test_a_running_stage_names_who_works_on_it_and_how_long_it_takes(tmp_path):
    run = made_run.make(tmp_path, until=("domain", 45))
    held, _ = lock.take(run / "stages" / "domain", lock.holder_of(os.getpid(), "cpt run"))
    try:
        status = read_status(run)
        assert status.stages[1].status == "running" and f"process {os.getpid()}" in status.stages[1].held_by
        assert status.stages[1].seconds_left == pytest.approx(75 * 0.6, rel=0.02)
        assert status.seconds_left == pytest.approx((75 + 50) * 0.6, rel=0.02)
        text = status_text(status, made_run.START + 200)
        assert "left    about 75 s" in text and "domain  running   45/120" in text
        (run / STOP_FILE).touch()
        status = read_status(run)
        assert (status.stages[1].status, status.stages[1].seconds_left, status.seconds_left) == ("stopping", None, None)
        text = status_text(status, made_run.START + 200)
        assert ", asked to save and stop" in text and "left    about" not in text
    finally:
        held.release()


def test_the_newest_warnings_of_a_stage_that_is_not_done_are_told(tmp_path):
    run = made_run.make(tmp_path, until=("domain", 45))
    log = EventLog(run / "stages" / "domain" / "attempt_1" / "events.jsonl")
    for step in (41, 42, 43, 44):
        log.write("warning", step=step, text=f"step {step}: the loss is nan; the update was skipped")
    log.write("warning", step=45, text="rank 1 on `node` is slow")
    log.write("warning", step=45, text="rank 1 on `node` is slow")
    text = status_text(read_status(run), made_run.START)
    told = [line for line in text.splitlines() if line.startswith("domain: ") and "warning" in line]
    assert told == [
        "domain: warning: step 43: the loss is nan; the update was skipped",
        "domain: warning: step 44: the loss is nan; the update was skipped",
        "domain: warning: at step 45: rank 1 on `node` is slow",
        "domain: 3 older warnings: `cpt report` shows all",
    ]
    done = made_run.make(tmp_path / "done")
    EventLog(done / "stages" / "base" / "attempt_1" / "events.jsonl").write("warning", step=1, text="long ago")
    assert "long ago" not in status_text(read_status(done), made_run.START)


def test_why_there_is_a_second_attempt_is_told(tmp_path):
    run = made_run.make(tmp_path, until=("domain", 45))
    stage = run / "stages" / "domain"
    write_json(stage / "attempt_1" / "failure.json", {"error": "nothing has moved for 30 min"})
    (stage / "attempt_2").mkdir()
    state.write(stage, dataclasses.replace(state.read(stage), attempt=2))
    assert "domain: attempt 1 ended: nothing has moved for 30 min" in status_text(read_status(run), made_run.START)


def test_what_is_not_at_wandb_is_told(tmp_path):
    run = made_run.make(tmp_path)
    assert "wandb failed" not in status_text(read_status(run), made_run.START)
    wandb.write_state(run / wandb.FOLDER, id="a", problem="no key")
    text = status_text(read_status(run), made_run.START)
    assert text.endswith(
        "wandb failed: no key; the run does not depend on it, `cpt sync demo-7c1e92` sends it later\n"
    ), text


def test_status_is_strict_json(tmp_path):
    json.dumps(status_json(read_status(made_run.make(tmp_path))), allow_nan=False)


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f'{{"kind":"step","step":{i}}}\n' for i in range(10_000)))
    found = list(tail(path, size=1000))
    assert found[-1]["step"] == 9_999 and len(found) < 50
    assert list(tail(tmp_path / "missing")) == []


def test_a_run_is_found_by_path_and_by_name(tmp_path):
    run = made_run.make(tmp_path / "runs")
    assert find_run("demo-7c1e92", tmp_path / "runs") == run
    assert find_run(str(run)) == run
    assert find_run(str(run / "stages" / "base")) == run


def test_a_mistyped_run_is_answered_with_the_nearest(tmp_path):
    made_run.make(tmp_path / "runs")
    with pytest.raises(UsageError) as error:
        find_run("demo-7c1e9", tmp_path / "runs")
    assert error.value.hints == ("did you mean `demo-7c1e92`?",)
    with pytest.raises(UsageError) as error:
        find_run("x", tmp_path / "nothing")
    assert "`cpt run recipe=demo` starts one" in error.value.hints[0]
    with pytest.raises(UsageError, match="is not a run folder"):
        find_run(str(tmp_path))
