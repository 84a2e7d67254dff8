"""wandb may be missing, broken, hanging or dead: the run goes on and says so in one line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from cpt.base.files import read_json, write_json
from cpt.report import wandb
from cpt.report.status import read_status, status_text
from cpt.report.wandb_process import Sent, alone, values
from tests import made_run

FAKE = """
import json, os, sys
class Settings:
    def __init__(self, **fields): pass
class Run:
    def __init__(self, kw):
        self.file = open(os.environ["FAKE_LOG"], "a")
        self.say("init", id=kw["id"], mode=kw["mode"])
    def say(self, what, **fields): self.file.write(json.dumps([what, fields]) + "\\n"); self.file.flush()
    def define_metric(self, *a, **k): pass
    def log(self, values): self.say("log", **values)
    def finish(self, **k): self.say("finish")
def init(**kw): return Run(kw)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a module called wandb in front of the real one; gives (write its source, read what it was told)."""
    folder = tmp_path / "fake"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.getcwd()}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "told.jsonl"))
    (folder / "wandb.py").write_text(FAKE)

    def told():
        path = tmp_path / "told.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return lambda source: (folder / "wandb.py").write_text(textwrap.dedent(source)), told


@pytest.fixture
def run(tmp_path):
    folder = made_run.make(tmp_path / "runs")
    plan = read_json(folder / "plan.json")
    write_json(folder / "plan.json", {**plan, "tracking": {"wandb": "offline", "project": "cpt"}})
    return folder


def test_every_step_is_sent_once_although_a_stage_was_resumed(run, fake):
    _, told = fake
    assert wandb.WandbSink(run).close(30) is None
    logged = [fields for what, fields in told() if what == "log"]
    steps = [(f["stage"], f["stage_step"]) for f in logged if "train/lr" in f]
    assert len(steps) == len(set(steps)) == 150 + 120 + 50
    assert told()[0][0] == "init" and told()[-1][0] == "finish"
    tokens = [f["tokens"] for f in logged if f["stage"] == "anneal"]
    assert tokens[0] == (150 + 120) * made_run.TOKENS_PER_STEP


def test_a_run_started_again_is_one_wandb_run_and_sends_nothing_twice(run, fake):
    _, told = fake
    wandb.WandbSink(run).close(30)
    before = len(told())
    assert wandb.WandbSink(run).close(30) is None
    again = told()[before:]
    assert [what for what, _ in again] == ["init", "finish"]
    assert again[0][1]["id"] == told()[0][1]["id"]


def test_an_offline_run_is_sent_whole_by_sync(run, fake):
    _, told = fake
    wandb.WandbSink(run).close(30)
    before = len(told())
    says = f"wandb is offline: `cpt sync {run.name}` sends what was written"
    assert wandb.is_only_here(run) and says in status_text(read_status(run), time.time())
    assert wandb.sync(run, lambda text: None) is None
    assert not wandb.is_only_here(run) and says not in status_text(read_status(run), time.time())
    again = told()[before:]
    assert again[0] == ["init", {"id": told()[0][1]["id"], "mode": "online"}]
    assert len(again) == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('no wandb here')", "no wandb here"),
        (FAKE + "\ndef init(**kw): raise RuntimeError('no key')", "no key"),
        (FAKE + "\nRun.log = lambda self, values: 1 / 0", "ZeroDivisionError"),
        ("import os; os._exit(3)", "its process ended with 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with -11"),
    ],
)
def test_a_broken_wandb_is_one_line_and_no_exception(run, fake, source, message):
    write, _ = fake
    write(source)
    problem = wandb.WandbSink(run).close(30)
    assert problem is not None and problem.startswith("wandb failed: ") and message in problem
    assert "\n" not in problem


def test_a_hanging_wandb_is_ended(run, fake):
    write, _ = fake
    write("import time\ntime.sleep(1000)")
    sink = wandb.WandbSink(run)
    pid = sink._process.pid
    start = time.monotonic()
    assert sink.close(1.0) == "wandb did not finish within 1 s"
    assert time.monotonic() - start < 60
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_did_not_arrive_is_sent_again(run, fake):
    write, told = fake
    write(FAKE + "\nimport time\nRun.finish = lambda self, **k: time.sleep(1000)")
    sink = wandb.WandbSink(run)
    deadline = time.monotonic() + 30
    while len(told()) < 300 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sink.close(2.0) == "wandb did not finish within 2 s"
    before = told()
    write(FAKE)
    assert wandb.WandbSink(run).close(30) is None
    again = told()[len(before) :]
    assert again[:-1] == before and again[-1][0] == "finish"


def test_one_process_at_a_time_sends(run, fake):
    _, told = fake
    (run / wandb.FOLDER).mkdir()
    with alone(run, "offline", threading.Event()) as is_alone:
        assert is_alone
        assert wandb.WandbSink(run).close(30) == "wandb failed: another process is sending the run"
        assert told() == []
    assert wandb.WandbSink(run).close(30) is None
    assert told()[-1][0] == "finish"


@pytest.mark.parametrize("how", ["signal", "parent"])
def test_beside_a_job_it_ends_when_told_and_when_the_script_has_gone(run, fake, how):
    _, told = fake
    words = [sys.executable, "-m", "cpt.report.wandb_process", str(run), "--beside"]
    code = f"import subprocess, time; p = subprocess.Popen({words!r}); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as script:
        pid = int(script.stdout.readline())
        deadline = time.monotonic() + 30
        while len(told()) < 300 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(pid, signal.SIGUSR2)  # as a queue warns every process of a job
        assert _alive(pid)
        os.kill(*((pid, signal.SIGTERM) if how == "signal" else (script.pid, signal.SIGKILL)))
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.1)
    assert not _alive(pid) and told()[-1][0] == "finish"
    assert wandb.read_state(run / wandb.FOLDER)["problem"] is None


def test_a_sender_without_its_run_ends_by_itself(run, fake, tmp_path):
    write, _ = fake
    write("import time\ntime.sleep(1000)")
    code = f"""
        import os, time
        from pathlib import Path
        from cpt.report.wandb import WandbSink
        sink = WandbSink(Path({str(run)!r}))
        print(sink._process.pid, flush=True)
        time.sleep(2)
        os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.2)
    assert not _alive(pid)


def _alive(pid):
    """Alive and not only waiting to be collected by whoever inherited it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_line_that_is_half_written_is_sent_when_it_is_whole(run):
    events = run / "stages" / "base" / "attempt_1" / "events.jsonl"
    whole = events.read_bytes()
    events.write_bytes(whole[:-20])
    sent = Sent(run, "offline")
    first = len(list(sent.new()))
    events.write_bytes(whole)
    assert len(list(sent.new())) == 1 and first > 100
    assert list(sent.new()) == []


def test_off_starts_nothing_and_neither_does_a_run_of_jobs(tmp_path):
    plan = made_run.plan(tmp_path)
    assert wandb.start(plan, tmp_path) is None
    plan = dataclasses.replace(plan, tracking={"wandb": "offline"}, launcher={"name": "slurm"})
    assert wandb.start(plan, tmp_path) is None and list(tmp_path.iterdir()) == []


def test_evaluations_are_sent_by_domain():
    event = {"kind": "eval", "step": 3, "tokens": 10, "losses": {"a": {"loss": 1.0, "bpb": None}}}
    assert values("s", event, 5) == {"tokens": 15, "stage": "s", "stage_step": 3, "valid/loss/a": 1.0}
    assert values("s", {"kind": "save", "step": 1}, 0) == {}
