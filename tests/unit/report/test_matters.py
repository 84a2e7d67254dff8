"""What the report says of a run's troubles: each once, and none lost because the run went on from before it."""

from cpt.base.events import EventLog
from cpt.base.files import write_json
from cpt.report.history import read_run
from cpt.report.sections import matters
from tests import made_run


def test_each_trouble_is_one_line(tmp_path):
    run = made_run.make(tmp_path)
    stage = run / "stages" / "anneal"
    log = EventLog(stage / "attempt_1" / "events.jsonl")
    log.write("warning", step=40, text="step 40: the loss is 9; back to step 38, without the samples of steps 39 to 40")
    for step in (39, 40):
        log.write("step", step=step, tokens=step, loss=None, skipped="left out after a rollback", left_out=40)
    log.write("warning", step=48, text="rank 1 on `node` is slow")
    write_json(stage / "attempt_1" / "failure.json", {"error": "nothing has moved for 30 min", "step": 48})
    (stage / "attempt_2").mkdir()
    second = EventLog(stage / "attempt_2" / "events.jsonl")
    second.write("note", text="checkpoint `iter_0000045` is passed over: one byte is another")
    second.write("stage_start", step=30, attempt=2, resumed=True)
    second.write(
        "warning", step=40, text="step 40: the loss is 9; back to step 38, without the samples of steps 39 to 40"
    )
    told = [row for row in matters(read_run(run)) if row["stage"] == "anneal"]
    assert sorted((row["what"], row["text"].partition(":")[0], row["step"]) for row in told) == [
        ("failed", "attempt 1", "48"),
        ("note", "checkpoint `iter_0000045` is passed over", ""),
        ("resume", "attempt 2 goes on", "30"),
        ("warning", "rank 1 on `node` is slow", "48"),
        ("warning", "step 40", "40"),
    ]
