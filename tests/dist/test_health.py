"""Real ranks that are stopped, stuck, slow, taken over or asked to stop: what is found, said and left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cpt.base import lock, processes
from cpt.base.files import read_json, read_lines, write_json
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint import store, verify
from cpt.launch import heartbeat, outcome
from cpt.plan.types import Evaluate, Job, Retain, Saving
from cpt.plan.model import Parallel
from cpt.base.records import to_json
from tests.dist.small_run import BATCH, SEQ, SmallRun

ROOT = Path(__file__).resolve().parents[2]
FOREVER = 100_000  # steps
# Data comes from a slow disk.
SLOW_DATA = """
import time
from cpt.data.stream import Stream
batch = Stream.batch
Stream.batch = lambda *given: time.sleep(0.05) or batch(*given)
"""
# As `python -m cpt.worker`, with the methods of the tests.
WORKER = "import sys, tests.dist.small_run; from cpt.worker import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.prepare(tmp_path_factory.mktemp("data"))


@dataclasses.dataclass
class Started:
    """An attempt whose processes run."""

    attempt_dir: Path
    tops: list[subprocess.Popen[bytes]]

    def beat(self, rank: int) -> dict[str, Any]:
        return dict(read_json(heartbeat.beat_path(self.attempt_dir, rank)))

    def steps(self) -> int:
        return max((e["step"] for e in self.events("step")), default=0)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_lines(self.attempt_dir / "events.jsonl") if e["kind"] == kind]

    def wait_until(self, happened: Callable[[], Any], seconds: float = 180.0) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert all(top.poll() is None for top in self.tops), self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def logs(self) -> str:
        return "\n".join(p.read_text()[-3000:] for p in sorted((self.attempt_dir / "logs").glob("*")))

    def failure(self) -> dict[str, Any]:
        return dict(read_json(self.attempt_dir / "failure.json"))

    def pids(self) -> list[int]:
        return [top.pid for top in self.tops] + [self.beat(r)["pid"] for r in range(2)]


Start = Callable[..., Started]


@pytest.fixture
def start(prepared: SmallRun, tmp_path: Path) -> Iterator[Start]:
    """Starts attempts at a run in `tmp_path`: with a parent of ranks, or as a queue starts them (`alone`)."""
    started: list[Started] = []
    run = prepared.copy(tmp_path)

    def begin(
        ranks: int = 2,
        *,
        alone: bool = False,
        environ: Mapping[str, str] | None = None,
        job: Mapping[str, Any] | None = None,
        first: str = "",
        **changes: Any,
    ) -> Started:
        plain: dict[str, Any] = {
            "steps": FOREVER,
            "tokens": FOREVER * BATCH * SEQ,
            "parallel": Parallel(dp=ranks),
            "evaluate": Evaluate(),
            "saving": Saving(every_steps=3, retain=Retain(last=2)),
        }
        made: Job = dataclasses.replace(run.job(run.train(**{**plain, **changes})), **(job or {}))
        attempt_dir = tmp_path / "stages" / "only" / f"attempt_{made.attempt}"
        (attempt_dir / "logs").mkdir()
        write_json(attempt_dir / "job.json", to_json(made))
        common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environ or {})}
        words = [sys.executable, "-c", f"{first}\n{WORKER}"]
        job_path = str(attempt_dir / "job.json")
        orders = [([*words, "--ranks", str(ranks), job_path], common)]
        if alone:
            from tests.dist.ranks import free_port

            port = str(free_port())
            place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            orders = [([*words, job_path], {**common, **place, "RANK": str(r)}) for r in range(ranks)]
        tops = []
        for number, (command, env) in enumerate(orders):
            with open(attempt_dir / "logs" / f"top_{number}.log", "ab") as log:
                tops.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
        started.append(Started(attempt_dir, tops))
        return started[-1]

    yield begin
    for one in started:
        for top in one.tops:
            if top.poll() is None:
                processes.kill_session(top.pid)
                top.wait()


def test_a_stopped_rank_is_found_and_named_and_nothing_is_left(start: Start) -> None:
    run = start(environ={"CPT_HANG_AFTER": "6"})
    run.wait_until(lambda: run.steps() >= 3)
    pids = run.pids()
    begun = time.monotonic()
    os.kill(run.beat(1)["pid"], signal.SIGSTOP)
    assert run.tops[0].wait(80) == 1
    assert time.monotonic() - begun < 40
    found = run.failure()
    assert (found["kind"], found["rank"]) == ("hang", 1) and found["step"] >= 3
    assert "rank 1 on" in found["error"] and "without a sign of life" in found["error"]
    assert f"process {pids[2]}" in found["hints"][0] and outcome.is_machine_fault(found)
    stack = (run.attempt_dir / "stacks" / "rank_0000.txt").read_text()
    assert "loop.py" in stack and "heartbeat" in stack, "all threads of the rank that waits"
    assert_stacks_of_the_stopped(run)
    assert [pid for pid in pids if processes.start_time(pid) is not None] == []


def test_without_a_parent_the_living_ranks_find_it_and_end_themselves(start: Start) -> None:
    run = start(alone=True, environ={"CPT_HANG_AFTER": "6"})
    run.wait_until(lambda: run.steps() >= 3)
    os.kill(run.tops[1].pid, signal.SIGSTOP)
    assert run.tops[0].wait(80) == 1
    record = read_json(outcome.record_path(run.attempt_dir, 0))
    assert (record["kind"], record["rank"], record["code"]) == ("hang", 1, 1)
    assert "loop.py" in (run.attempt_dir / "stacks" / "rank_0000.txt").read_text()
    assert_stacks_of_the_stopped(run)
    assert outcome.conclude(run.attempt_dir, 2) == 1
    assert run.failure()["kind"] == "hang" and run.failure()["rank"] == 1


def assert_stacks_of_the_stopped(run: Started) -> None:
    """Only py-spy can say where a stopped process, rank 1, was."""
    found = (run.attempt_dir / "stacks" / "rank_0001.txt").read_text()
    assert ("loop.py" in found) == (shutil.which("py-spy") is not None), found


def test_a_rank_that_is_slow_is_told_and_one_that_is_stuck_shows_where(start: Start) -> None:
    at = 25
    run = start(environ={"CPT_HANG_AFTER": "6"}, methods={"test_sabotage": {"what": "stuck", "step": at}})
    assert run.tops[0].wait(90) == 1
    found = run.failure()
    assert found["kind"] == "hang" and (found["step"], found["at_step"]) == (at, at + 1)
    assert "small_run.py" in (run.attempt_dir / "stacks" / "rank_0001.txt").read_text()
    assert "small_run.py" not in (run.attempt_dir / "stacks" / "rank_0000.txt").read_text()
    texts = [e["text"] for e in run.events("warning")]
    assert len(texts) == 1 and texts[0].startswith("rank 1 on") and "is slow" in texts[0]


def test_a_rank_that_waits_for_its_data_is_told(start: Start) -> None:
    run = start(1, alone=True, environ={"CPT_HANG_AFTER": "4"}, first=SLOW_DATA)
    run.wait_until(lambda: run.events("warning"))
    text = run.events("warning")[0]["text"]
    assert re.match(r"rank 0 on `.*` waits for data \d\d% of the time: ", text), text


@pytest.mark.parametrize("how", ["signal", "time", "file"])
def test_each_way_to_ask_saves_and_stops_and_is_told(start: Start, how: str, tmp_path: Path) -> None:
    job = {"stop_at": time.time() + 15} if how == "time" else {}
    run = start(1, alone=True, job=job, saving=Saving(every_steps=None))
    run.wait_until(lambda: run.steps() >= 2)
    beat = run.beat(0)
    assert beat["pid"] == run.tops[0].pid and abs(beat["t"] - time.time()) < 30
    if how == "signal":
        run.tops[0].send_signal(signal.SIGUSR2)
    if how == "file":
        (tmp_path / "stop").touch()
    assert run.tops[0].wait(80) == 75, run.logs()
    (stop,) = run.events("stop")
    said = {"signal": "signal SIGUSR2", "time": "time limit", "file": "asked"}[how]
    assert stop["reason"] == f"a stop was asked for ({said})"
    saved, _ = store.newest_whole(run.attempt_dir.parent / "checkpoints")
    assert saved is not None and saved.name == store.folder_name(stop["step"])
    assert run.beat(0)["doing"] == "end"
    assert not (run.attempt_dir / "stacks").exists(), "nothing hung"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_attempt_that_was_taken_over_publishes_nothing_any_more(
    start: Start, tmp_path: Path, asynchronous: bool
) -> None:
    saving = Saving(every_steps=3, retain=Retain(last=2), asynchronous=asynchronous)
    stage_dir = tmp_path / "stages" / "only"
    checkpoints = stage_dir / "checkpoints"
    first, _ = lock.take(stage_dir, lock.holder_of(os.getpid(), "the first attempt"))
    older = start(job={"fence": first.holder.token}, saving=saving)
    older.wait_until(lambda: store.newest_whole(checkpoints)[0] is not None)
    stopped = older.pids()
    for pid in stopped:  # a machine that is cut off: it sleeps, and knows nothing of what follows
        os.kill(pid, signal.SIGSTOP)
    first.release()
    second, _ = lock.take(stage_dir, lock.holder_of(os.getpid(), "the second attempt"))
    newer = start(job={"fence": second.holder.token, "stop_at": time.time() + 15}, saving=saving)
    assert newer.tops[0].wait(60) == 75, newer.logs()
    before = content(checkpoints)
    for pid in reversed(stopped):
        os.kill(pid, signal.SIGCONT)
    assert older.tops[0].wait(60) == 1
    found = older.failure()
    assert found["kind"] == "fenced", found
    assert found["error"] == "another attempt has taken over `only`; this one publishes nothing"
    assert content(checkpoints) == before
    assert all(verify.verify(folder) == [] for _, folder in store.steps(checkpoints))


def test_in_a_batch_job_rank_0_keeps_the_lock_alive_and_ends_when_it_is_taken_over(
    start: Start, tmp_path: Path
) -> None:
    stage_dir = tmp_path / "stages" / "only"
    first, _ = lock.take(stage_dir, lock.holder_of(os.getpid(), "a script", job="7"))
    job = {"fence": first.holder.token, "queue_job": "7"}
    run = start(1, alone=True, job=job, environ={"CPT_HANG_AFTER": "6"}, saving=Saving(every_steps=None))
    run.wait_until(lambda: run.steps() >= 2)
    os.utime(first.path, (1, 1))
    run.wait_until(lambda: first.path.stat().st_mtime > 1, 10)
    first.release()
    lock.take(stage_dir, lock.holder_of(os.getpid(), "another script", job="8"))
    assert run.tops[0].wait(20) == 1
    assert read_json(outcome.record_path(run.attempt_dir, 0))["kind"] == "fenced"
    assert store.steps(stage_dir / "checkpoints") == []


def content(checkpoints: Path) -> dict[str, str]:
    """Every visible entry, with the manifest and the moment of writing of checkpoints."""
    return {
        p.name: f"{(p / manifests.NAME).stat().st_mtime_ns} {json.loads((p / manifests.NAME).read_text())['files']}"
        if p.is_dir()
        else p.read_text()
        for p in checkpoints.iterdir()
        if not p.name.startswith(".")
    }
