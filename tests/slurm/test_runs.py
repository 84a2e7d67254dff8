"""Whole runs on a real Slurm: chains, time limits, lost nodes, cancels. They end with the very bits of a local run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpt.base.files import read_lines
from cpt.stages import state
from cpt.stages.attempt import attempts
from tests.dist import killing
from tests.slurm.conftest import Cluster

ROOT = Path(__file__).resolve().parents[2]
ON_SLURM = ("launcher=slurm", "launcher.ranks_per_node=2", "launcher.cpus_per_rank=1", "launcher.mem=500M")
TRAIN = """
train:
  seq_length: 64
  global_batch_size: 4
  micro_batch_size: 1
  precision: fp32
  parallel: {dp: 2}
  evaluate: {every: 2560, tokens: 2048}
checkpoint: {every: 1280, retain: {last: 3}}
"""
# Two layers; the first stage at tp 2 x dp 2, four ranks on two nodes, the others two ranks on one.
CHAIN = f"""{killing.TINY}{TRAIN}
stages:
  domain:
    from: base
    tokens: 2560
    mixture: {{even: 0.7, odd: 0.3}}
    lr: {{schedule: rewarm, peak: 1e-3, warmup: 4}}
    parallel: {{tp: 2, dp: 2}}
  second:
    from: domain
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: 2560
    mixture: {{even: 0.2, odd: 0.8}}
  export: {{kind: convert, from: second, to: hf}}
"""
# What most tests do something to: a long stage and a short one.
TWO = f"""{killing.TOPICS}{TRAIN}
base: {{checkpoint: chain-local/it/stages/domain}}
stages:
  long:
    from: base
    keep: [weights]
    tokens: 25600
    mixture: {{even: 0.2, odd: 0.8}}
    lr: {{schedule: rewarm, peak: 1e-3, warmup: 4}}
  short:
    from: long
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: 1280
    mixture: {{even: 0.2, odd: 0.8}}
    lr: {{schedule: linear, end: 0}}
"""
# What starts ranks in place of Python itself, to slow them.
SLOWED = """
import signal, sys, time
from pathlib import Path
from cpt import worker
from cpt.data import stream

folder = Path(sys.argv[-1]).parent

class Slow(stream.Stream):
    METHOD

if __name__ == "__main__":
    if folder.parent.name == "long" and folder.name in ("attempt_1", "attempt_2"):
        stream.Stream = Slow
    sys.exit(worker.main(sys.argv[-1:]))
"""


class Place:
    """A folder on a cluster; recipes that are given are written into it, and their corpora."""

    def __init__(self, folder: Path, cluster: Cluster, **recipes: str) -> None:
        self.folder, self.cluster = folder, cluster
        if recipes:
            (folder / "recipes").mkdir()
            killing.write_topics(folder)
        for name, text in recipes.items():
            (folder / "recipes" / f"{name}.yaml").write_text(text)

    def cpt(self, *words: str, code: int = 0, timeout: float = 300) -> str:
        """What `cpt` prints."""
        environ = {**self.cluster.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        command = [sys.executable, "-m", "cpt", *words]
        done = subprocess.run(
            command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def send(self, runs: str, *overrides: str, recipe: str = "two", code: int = 0) -> str:
        """`cpt run` with this cluster's launcher."""
        return self.cpt("run", f"recipe={recipe}", f"runs={runs}", "name=it", *ON_SLURM, *overrides, code=code)

    def run_dir(self, runs: str) -> Path:
        return self.folder / runs / "it"

    def jobs(self, runs: str) -> dict[str, list[str]]:
        found = json.loads((self.run_dir(runs) / "jobs.json").read_text())
        return {stage: [job["id"] for job in jobs] for stage, jobs in found.items()}

    def job(self, runs: str, stage: str) -> str:
        return self.jobs(runs)[stage][-1]

    def state(self, runs: str, stage: str) -> state.State:
        return state.read(self.run_dir(runs) / "stages" / stage)

    def events(self, runs: str, stage: str) -> list[dict[str, Any]]:
        """Of the newest attempt."""
        folders = sorted((self.run_dir(runs) / "stages" / stage).glob("attempt_*"), key=lambda p: int(p.name[8:]))
        return list(read_lines(folders[-1] / "events.jsonl")) if folders else []

    def wait(self, happened: Callable[[], bool], what: str, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, f"not within {seconds:g} s: {what}\n{self.trouble()}"
            time.sleep(0.1)

    def wait_step(self, runs: str, stage: str, step: int, attempt: int = 1) -> None:
        """Until an attempt has made a step."""

        def made() -> bool:
            return self.state(runs, stage).attempt >= attempt and any(
                e["kind"] == "step" and e["step"] >= step for e in self.events(runs, stage)
            )

        self.wait(made, f"step {step} of `{stage}`, attempt {attempt}")

    def wait_done(self, runs: str, *stages: str, seconds: float = 300) -> None:
        names = stages or ("long", "short")
        self.wait(
            lambda: all(self.state(runs, s).status == state.DONE for s in names), f"{names} of {runs} done", seconds
        )

    def trouble(self) -> str:
        """What a person would look at."""
        queue = self.cluster.run("squeue", "-t", "all", "-o", "%i %T %R", check=False)
        logs = sorted(self.folder.glob("*/it/stages/*/logs/*"))[-6:]
        return queue + "".join(f"\n== {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Place:
    """Both recipes have run once on this machine alone."""
    found = Place(tmp_path_factory.mktemp("slurm-runs"), cluster, chain=CHAIN, two=TWO)
    found.cpt("run", "recipe=chain", "runs=chain-local", "name=it")
    found.cpt("run", "recipe=two", "runs=two-local", "name=it")
    return found


@pytest.fixture
def hurry(cluster: Cluster) -> Iterator[None]:
    """Jobs that went back into the queue start now, not after two minutes."""
    over = threading.Event()
    seen: dict[str, float] = {}  # a node refuses what is granted in the second in which the run before was ended

    def look() -> None:
        while not over.wait(0.5):
            waiting = cluster.run("squeue", "-h", "-t", "PD", "-o", "%i %r", check=False).splitlines()
            ids = [id for id, _, reason in (line.partition(" ") for line in waiting) if reason == "BeginTime"]
            for id in [id for id in seen if id not in ids]:
                del seen[id]
            for id in ids:
                if time.monotonic() - seen.setdefault(id, time.monotonic()) > 2:
                    cluster.run("scontrol", "update", f"JobId={id}", "StartTime=now", check=False)

    watcher = threading.Thread(target=look)
    watcher.start()
    yield
    over.set()
    watcher.join()


def assert_same(place: Place, runs: str, recipe: str = "two") -> None:
    """Weights, optimizer and random states of every stage are those of the local run, bit for bit."""
    for stage in ("long", "short") if recipe == "two" else ("domain", "second"):
        one, other = (killing.content(place.run_dir(r), stage) for r in (runs, f"{recipe}-local"))
        assert one == other, stage


def test_a_chain_ends_done_with_the_bits_of_a_local_run(place: Place) -> None:
    said = place.send("chain", recipe="chain")
    jobs = place.jobs("chain")
    assert list(jobs) == ["domain", "second", "export"]
    assert f"second  sent as job {jobs['second'][0]}, after {jobs['domain'][0]}" in said
    assert "cpt status chain/it" in said
    status = place.cpt("status", "chain/it")
    assert f"job {jobs['second'][0]} waits in the queue (Dependency)" in status
    assert "has jobs in the queue" in place.send("chain", recipe="chain", code=2)
    place.wait_done("chain", "domain", "second", "export")
    assert_same(place, "chain", "chain")
    nodes = json.loads((place.run_dir("chain") / "stages/domain/attempt_1/environment.json").read_text())["variables"]
    assert nodes["SLURM_JOB_NODELIST"] == "node[1-2]"
    assert (place.run_dir("chain") / "stages/export/hf/config.json").is_file()
    place.wait(lambda: place.cluster.state(jobs["export"][0]) == "COMPLETED", "the last job ends")
    assert (place.run_dir("chain") / "report.html").is_file()
    assert "queued" not in place.cpt("status", "chain/it")


def slowed(place: Place, name: str, method: str) -> str:
    """The override that gives the ranks of the first two attempts at `long` a `Stream` with another method."""
    script = place.folder / f"{name}.py"
    script.write_text(SLOWED.replace("METHOD", textwrap.indent(textwrap.dedent(method), "    ").strip()))
    return f"launcher.wrap_command=[{sys.executable},{script}]"


def stops(place: Place, runs: str) -> list[dict[str, Any]]:
    """How attempts at `long` stopped, oldest first."""
    files = [folder / "events.jsonl" for folder in attempts(place.run_dir(runs) / "stages" / "long")]
    return [event for file in files for event in read_lines(file) if event["kind"] == "stop"]


def assert_queued_again(place: Place, runs: str, job: str, times: int) -> None:
    assert place.jobs(runs)["long"] == [job]
    restarts = re.findall(r"Restarts=(\d+)", place.cluster.run("scontrol", "show", "job", job))
    assert int(restarts[0]) >= times


def test_a_stage_stopped_by_its_time_limit_is_queued_again_twice_and_finishes(place: Place, hurry: None) -> None:
    """Slurm's clock alone stops it, 35 to 65 s after a start: the two slow attempts make 86 of 100 steps at most."""
    slow_data = """
        def batch(self, *place):
            time.sleep(1.5)
            return super().batch(*place)
    """
    place.send("clock", "launcher.time=2m", "launcher.warn=55", slowed(place, "slow_data", slow_data))
    job = place.job("clock", "long")
    for count in (1, 2):
        place.wait(lambda count=count: len(stops(place, "clock")) == count, f"stop {count}", 120)  # type: ignore[misc]
        assert place.state("clock", "short").status == state.PENDING
    place.wait_done("clock")
    assert_queued_again(place, "clock", job, times=2)
    found = stops(place, "clock")
    assert all(event["reason"].endswith(("(signal SIGUSR2)", "(time limit)")) for event in found)
    assert 0 < found[0]["step"] < found[1]["step"] < 100
    assert_same(place, "clock")


def test_a_job_stopped_from_outside_before_its_first_step_goes_on(place: Place, hurry: None) -> None:
    """Once by a signal long before its limit, once by preemption."""
    slow_start = """
        def __init__(self, *args, **options):
            (folder / "starting").touch()
            while signal.getsignal(signal.SIGUSR2).__self__.signal is None:
                time.sleep(0.05)
            super().__init__(*args, **options)
    """
    place.send("early", "launcher.time=1h", "launcher.partition=spot", slowed(place, "slow_start", slow_start))
    job = place.job("early", "long")
    folder = place.run_dir("early") / "stages" / "long"
    place.wait((folder / "attempt_1" / "starting").exists, "attempt 1 starts")
    place.cluster.run("scancel", "--signal=USR2", job)
    place.wait((folder / "attempt_2" / "starting").exists, "attempt 2 starts")
    first = place.cluster.run("sbatch", "--parsable", "--exclusive", "-N2", "--wrap", "sleep 1", cwd=place.folder)
    place.wait(lambda: len(stops(place, "early")) == 2, "preempted", 60)
    assert place.cluster.wait(first) == "COMPLETED"
    place.wait_done("early")
    assert_queued_again(place, "early", job, times=2)
    assert [event["step"] for event in stops(place, "early")] == [0, 0]
    assert_same(place, "early")


def test_a_failing_stage_takes_those_behind_it_out_of_the_queue(place: Place) -> None:
    place.send("failing", "stages.long.lr={schedule: constant, peak: 1e30}", "train.anomalies.nan=stop")
    place.wait(lambda: place.state("failing", "long").status == state.FAILED, "failed")
    place.wait(lambda: not place.cluster.run("squeue", "-h"), "an empty queue", 60)
    status = place.cpt("status", "failing/it")
    assert "left the queue because stage `long` failed" in status
    assert "nan" in status
    assert place.state("failing", "short").attempt == 0
    assert "nan" in place.cpt("logs", "failing/it", "--lines", "0")


@pytest.mark.parametrize("loss", [Cluster.crash, Cluster.kill_slurmd], ids=["node", "slurmd"])
def test_a_lost_node_does_not_end_a_run(loss: Callable[[Cluster, str], None], place: Place, hurry: None) -> None:
    """Where slurmd alone dies its ranks live on: the job is started again elsewhere while they still write."""
    runs = loss.__name__
    place.send(runs)
    place.wait_step(runs, "long", step=12)
    node = place.cluster.run("squeue", "-h", "-j", place.job(runs, "long"), "-o", "%N")
    loss(place.cluster, node)
    place.wait_done(runs)
    place.cluster.up(node)
    assert place.state(runs, "long").attempt >= 2
    assert_same(place, runs)


def test_a_cancelled_run_is_saved_and_goes_on(place: Place) -> None:
    place.send("cancelled")
    place.wait_step("cancelled", "long", step=12)
    said = place.cpt("cancel", "cancelled/it", "--wait")
    assert f"removed from the queue: {place.job('cancelled', 'short')}" in said
    assert place.state("cancelled", "long").status == state.SAVED
    assert not place.cluster.run("squeue", "-h")
    assert "saved" in place.cpt("status", "cancelled/it")
    place.cpt("resume", "cancelled/it")
    assert len(place.jobs("cancelled")["long"]) == 2
    place.wait_done("cancelled")
    assert_same(place, "cancelled")


def test_scancel_saves_and_the_run_goes_on_by_its_command(place: Place) -> None:
    place.send("scancelled")
    place.wait_step("scancelled", "long", step=12)
    place.cluster.run("scancel", place.job("scancelled", "long"))
    place.wait(lambda: not place.cluster.run("squeue", "-h"), "an empty queue", 60)
    assert place.state("scancelled", "long").status == state.SAVED
    assert place.state("scancelled", "long").step >= 12  # type: ignore[operator]
    said = place.cpt("resume", "scancelled/it", "--wait", timeout=300)
    assert "done" in said
    assert_same(place, "scancelled")


def test_a_forgotten_parent_does_not_start_a_stage(place: Place, clusters: Callable[..., Cluster]) -> None:
    """Slurm takes a dependency on a job that it has forgotten for fulfilled."""
    young = Place(place.folder, clusters("forgetful", "--set", "MinJobAge=2"))
    young.send("purged", "stages.long.lr={schedule: constant, peak: 1e30}", "train.anomalies.nan=stop")
    first = young.job("purged", "long")
    young.wait(lambda: young.state("purged", "long").status == state.FAILED, "failed")
    young.wait(lambda: not young.cluster.state(first), "Slurm has forgotten it", 120)
    script = young.run_dir("purged") / "stages" / "short" / "job.sbatch"
    job = young.cluster.run("sbatch", "--parsable", f"--dependency=afterok:{first}", script, cwd=young.folder)
    logs = script.parent / "logs" / f"it-short-{job}.log"
    young.wait(lambda: logs.is_file() and "error" in logs.read_text(), "the job refuses", 60)
    assert "starts from `long`, which is failed, not done" in logs.read_text()
    assert young.state("purged", "short").attempt == 0


def test_a_script_by_hand_does_what_a_sent_one_does(place: Place) -> None:
    place.send("hand")
    place.cpt("cancel", "hand/it", "--wait")
    (place.run_dir("hand") / "stop").unlink()
    script = place.run_dir("hand") / "stages" / "long" / "job.sbatch"
    job = place.cluster.run("sbatch", "--parsable", script, cwd=Path("/"))
    assert place.cluster.wait(job, seconds=180) == "COMPLETED", place.trouble()
    assert killing.content(place.run_dir("hand"), "long") == killing.content(place.run_dir("two-local"), "long")
