"""What a person meets who waits for jobs, looks after them or stops them: short runs on a real Slurm."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cpt.stages import state
from tests.command import tree
from tests.dist import killing
from tests.slurm.conftest import Cluster
from tests.slurm.test_runs import ROOT, Place

ON_SLURM = ("launcher=slurm", "launcher.ranks_per_node=1", "launcher.cpus_per_rank=1", "launcher.mem=500M")
RECIPE = f"""{killing.TINY}
train: {{seq_length: 64, global_batch_size: 4, micro_batch_size: 1, precision: fp32}}
checkpoint: {{every: 2560}}
stages:
  long:
    from: base
    tokens: 12800
    mixture: {{even: 0.7, odd: 0.3}}
    lr: {{schedule: constant, peak: 1e-3}}
  short:
    from: long
    keep: [weights]
    tokens: 1280
    mixture: {{even: 1}}
    lr: {{schedule: constant, peak: 1e-4}}
"""


class Small(Place):
    """A folder with a recipe of one rank."""

    def words(self, runs: str, *overrides: str) -> list[str]:
        return ["run", "recipe=small", f"runs={runs}", "name=it", *ON_SLURM, *overrides]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`cpt` in the background, with all that it prints in one pipe."""
        environ = {**self.cluster.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        command = [sys.executable, "-m", "cpt", *words]
        return subprocess.Popen(
            command, cwd=self.folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Small:
    return Small(tmp_path_factory.mktemp("slurm-waiting"), cluster, small=RECIPE)


def read_until(child: subprocess.Popen[str], wanted: str) -> str:
    """What a command prints up to the line that has a text."""
    assert child.stdout is not None
    found = ""
    for line in child.stdout:
        found += line
        if wanted in line:
            return found
    raise AssertionError(f"it never says {wanted!r}:\n{found}")


def rest(child: subprocess.Popen[str]) -> str:
    """What else it prints until it ends."""
    assert child.stdout is not None
    said = child.stdout.read()
    child.wait(timeout=60)
    return said


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("launcher.partition=gpu", "invalid partition"),
        ("launcher.mem=64G", "node configuration is not available"),
        ("launcher.extra={foo: bar}", "unrecognized option"),
    ],
    ids=["partition", "memory", "option"],
)
def test_a_refused_job_leaves_nothing_behind(place: Small, override: str, says: str) -> None:
    before = tree(place.folder)
    said = place.cpt(*place.words("refused", override), code=2)
    assert says in said and "goes to the queue" not in said and "report" not in said
    assert tree(place.folder) == before


def test_without_slurm_nothing_is_prepared(place: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(place.folder)
    monkeypatch.setitem(place.cluster.environ, "PATH", str(tmp_path))
    said = place.cpt(*place.words("absent"), code=3)
    assert "Slurm is not installed on this machine: no command `sbatch`" in said
    assert tree(place.folder) == before


def test_a_node_that_is_away_is_waited_for(place: Small) -> None:
    """`sbatch --test-only` refuses what only fits on nodes that are down; `sbatch` itself does not."""
    place.cluster.crash("node1")
    place.cluster.crash("node2")
    said = place.cpt(*place.words("away"))
    assert "sent    2 jobs" in said
    assert place.cluster.state(place.job("away", "long")) == "PENDING"


def test_what_slurm_refuses_only_when_it_is_sent(place: Small) -> None:
    """Of a job that fits nowhere while a node is away only the submission itself says so."""
    place.cluster.crash("node1")
    too_large = "launcher.mem=64G"
    said = place.cpt(*place.words("sending", too_large), code=2)
    assert "Slurm refuses `job.sbatch`" in said and "node configuration is not available" in said
    assert not place.run_dir("sending").exists()
    place.cpt(*place.words("sending", "launcher.extra={begin: 'now+1hour'}"))
    place.cpt("cancel", "sending/it", "--wait")
    assert "nothing was sent" not in place.cpt("status", "sending/it")
    place.cpt(*place.words("sending", too_large), code=2)
    status = place.cpt("status", "sending/it")
    assert "nothing was sent to the queue: Slurm refuses `job.sbatch`" in status and "`cpt resume it` tries" in status


def test_ctrl_c_ends_the_waiting_alone_and_one_can_wait_again(place: Small) -> None:
    first = place.start(*place.words("again"), "--wait")
    read_until(first, "long  running")
    first.send_signal(signal.SIGINT)
    said = rest(first)
    assert first.returncode == 130
    assert "note: the jobs of `it` go on in the queue" in said
    assert "`cpt resume again/it --wait` waits" in said and "`cpt cancel again/it`" in said
    jobs = place.jobs("again")
    resumed = place.start("resume", "again/it", "--wait")
    read_until(resumed, "are in the queue; this waits for them")
    said = place.cpt(*place.words("again"), "--wait")
    assert "short  done" in said and "next    cpt sample" in said
    said = rest(resumed)
    assert resumed.returncode == 0 and "short  done" in said
    assert place.jobs("again") == jobs
    assert place.state("again", "long").attempt == 1


def test_logs_are_followed_from_the_queue_to_the_end_of_the_attempt(place: Small) -> None:
    node = place.cluster.run("sbatch", "--parsable", "--exclusive", "-N2", "--wrap", "sleep 60", cwd=place.folder)
    place.cluster.wait(node, "RUNNING")
    place.cpt(*place.words("followed"))
    logs = place.start("logs", "-f", "followed/it")
    read_until(logs, f"waits until job {place.job('followed', 'long')} of `long` starts")
    place.cluster.run("scancel", node)
    read_until(logs, "long  starts")
    read_until(logs, "long  step 2/50")
    assert place.state("followed", "long").status == state.RUNNING
    said = rest(logs)
    assert logs.returncode == 0
    steps = re.findall(r"^long  step (\d+)/50  tokens .*  loss \d.*  lr .*  tokens/s [\d,]+ ", said, re.MULTILINE)
    assert steps == [str(n) for n in range(4, 51, 2)]
    assert "long  done at step 50" in said
    place.wait_done("followed")
    assert "short  step 5/5 " in place.cpt("logs", "-f", "followed/it")


def test_a_stage_whose_jobs_are_used_up_says_so_and_takes_those_behind_it_along(place: Small) -> None:
    place.cpt(*place.words("used", "launcher.requeue=false", "launcher.successors=1", "stages.long.tokens=256000"))
    jobs = place.jobs("used")
    for attempt, job in enumerate(jobs["long"], 1):
        place.wait_step("used", "long", step=1, attempt=attempt)
        place.cluster.run("scancel", "--signal=USR2", job)  # as at its time limit
    place.wait(lambda: not place.cluster.run("squeue", "-h"), "an empty queue", 60)
    status = place.cpt("status", "used/it")
    assert place.state("used", "long").status == state.SAVED
    assert "no job of it is left, `cpt resume it` goes on" in status
    assert "short: left the queue because stage `long` was stopped" in status
    assert not list((place.run_dir("used") / "stages" / "short" / "logs").glob("*")), "none of its jobs ran"


def test_a_cancel_while_the_controller_is_away_stops_the_job_that_runs(place: Small) -> None:
    place.cpt(*place.words("away-cancel", "stages.long.tokens=256000"))
    place.wait_step("away-cancel", "long", step=1)
    place.cluster.kill_controller()
    try:
        said = place.cpt("cancel", "away-cancel/it", code=3)
        assert "the queue does not answer" in said and "the job that runs was asked too: it saves and stops" in said
        place.wait(lambda: place.state("away-cancel", "long").status == state.SAVED, "saved", 60)
        status = place.cpt("status", "away-cancel/it")
        assert "starting" not in status and "long   saved" in status
    finally:
        place.cluster.start()
    place.wait(lambda: not place.cluster.run("squeue", "-h"), "an empty queue", 90)
    assert place.state("away-cancel", "short").attempt == 0
