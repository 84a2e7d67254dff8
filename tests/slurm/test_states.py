"""What is said about jobs on a real cluster, against what happened to them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.launch.batch import JobState
from cpt.launch.slurm import states
from cpt.launch.slurm.commands import Commands, Refused, TryLater
from tests.slurm.conftest import Cluster

ACCOUNTS = ("--accounting", "--set", "MinJobAge=2", "--set", "AccountingStorageEnforce=associations,limits,qos")

_tokens = (f"cpt-test-{os.getpid()}-{n}" for n in itertools.count())


class Jobs:
    """Submits scripts and asks about them, with the code under test.

    Args:
        folder: of scripts and logs.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.commands = Commands(environ=cluster.environ, cwd=folder)

    def submit(self, *lines: str, dependency: str | None = None, kill: bool = True) -> str:
        path = self.folder / "job.sbatch"
        path.write_text(f"#!/bin/bash\n#SBATCH --output={self.folder}/%j.log\n" + "\n".join(lines) + "\n")
        return self.commands.submit(path, next(_tokens), dependency, kill)

    def ask(self, *ids: str) -> dict[str, JobState]:
        return states.ask(self.commands, ids)

    def wait(self, job: str, reason: str, seconds: float = 60) -> JobState:
        """Wait until a job that waits has a reason."""
        end = time.monotonic() + seconds
        while not (found := self.ask(job)[job]).reason.startswith(reason):
            assert time.monotonic() < end, f"{found}, wanted {reason}"
            time.sleep(0.1)
        return found


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


Accounted = tuple[Jobs, dict[str, str]]


@pytest.fixture(scope="module")
def accounted(clusters: Callable[..., Cluster], tmp_path_factory: pytest.TempPathFactory) -> Accounted:
    """Jobs of a cluster that keeps accounts and forgets soon, with what each must come to be.

    The limit of the first is looked at every 30 s only: other tests run meanwhile.
    """
    kept = Jobs(clusters("accounts", *ACCOUNTS), tmp_path_factory.mktemp("accounts"))
    late = kept.submit("#SBATCH --time=1", "sleep 300")
    kept.cluster.wait(late, "RUNNING")
    kept.cluster.run("scontrol", "update", f"JobId={late}", "EndTime=now+1")
    good, bad, cancelled = kept.submit("true"), kept.submit("exit 7"), kept.submit("sleep 300")
    array = kept.submit("#SBATCH --array=0-1", "exit $SLURM_ARRAY_TASK_ID")
    kept.cluster.wait(cancelled, "RUNNING")
    kept.commands.cancel([cancelled])
    ids = [late, good, bad, cancelled, f"{array}_0", f"{array}_1"]
    return kept, dict(zip(ids, ("timeout", "done", "failed", "cancelled", "done", "failed"), strict=True))


def test_the_queue_knows_jobs_that_just_began(accounted: Accounted) -> None:
    kept, wanted = accounted
    late = next(iter(wanted))
    assert kept.ask(late)[late].state in ("running", "ending", "timeout")


def test_ends_of_jobs(jobs: Jobs) -> None:
    good, bad, saved = jobs.submit("true"), jobs.submit("exit 7"), jobs.submit("exit 75")
    killed = jobs.submit("kill -9 $$")
    long = jobs.submit("#SBATCH --time=1-02:00:00 --nodes=2", "sleep 60")
    free = jobs.submit("sleep 60")
    for job in (good, bad, saved, killed):
        jobs.cluster.wait(job)
    jobs.cluster.wait(long, "RUNNING")
    jobs.cluster.wait(free, "RUNNING")
    found = jobs.ask(good, bad, saved, killed, long, free, "99999", "no-job", good)
    assert {job: state.state for job, state in found.items()} == {
        good: "done",
        bad: "failed",
        saved: "failed",
        killed: "failed",
        long: "running",
        free: "running",
        "99999": "gone",
        "no-job": "gone",
    }
    assert [found[job].reason for job in (good, bad, saved, killed)] == ["", "exit code 7", "exit code 75", "signal 9"]
    assert found[long].nodes == "node[1-2]" and 93_000 < (found[long].seconds_left or 0) <= 93_600
    assert found[free].seconds_left is None and found[good].nodes in ("node1", "node2")
    jobs.commands.cancel([long])
    jobs.cluster.wait(long, ("COMPLETING", "CANCELLED"))
    assert jobs.ask(long)[long].state in ("ending", "cancelled")
    jobs.cluster.wait(long, "CANCELLED")
    assert jobs.ask(long)[long].state == "cancelled"


def test_only_unknown_jobs(jobs: Jobs) -> None:
    assert {job: state.state for job, state in jobs.ask("99998", "99999").items()} == {"99998": "gone", "99999": "gone"}
    assert jobs.ask() == {}


def test_jobs_that_never_start_are_stuck_with_what_to_do(jobs: Jobs) -> None:
    long = jobs.submit("#SBATCH --partition=short --time=1:00:00")
    wide = jobs.submit("#SBATCH --nodes=5")
    held = jobs.submit("#SBATCH --hold")
    later = jobs.submit("#SBATCH --begin=now+1hour")
    limit = jobs.wait(long, "PartitionTimeLimit")
    assert limit.state == "pending" and limit.stuck
    assert limit.hint == "partition `short` allows 2 min, the job asks for 1 h: `launcher.time=2m`"
    nodes = jobs.wait(wide, "PartitionNodeLimit")
    assert nodes.stuck and "`main` has or allows fewer than 5 nodes" in nodes.hint
    assert jobs.ask(held)[held].stuck and jobs.ask(held)[held].hint.startswith("it is held: `scontrol release")
    waits = jobs.wait(later, "BeginTime")
    assert (waits.state, waits.stuck, waits.hint) == ("pending", False, "")
    # the hint is what helps
    jobs.cluster.run("scontrol", "update", f"JobId={long}", "TimeLimit=0-00:02:00")
    jobs.cluster.run("scontrol", "release", held)
    assert jobs.cluster.wait(long) == jobs.cluster.wait(held) == "COMPLETED"


def test_a_job_behind_one_that_failed(jobs: Jobs) -> None:
    bad = jobs.submit("exit 1")
    stuck = jobs.submit(dependency=f"afterok:{bad}", kill=False)
    behind = jobs.submit(dependency=f"afterok:{stuck}")
    ended = jobs.submit(dependency=f"afterok:{bad}")
    further = jobs.submit(dependency=f"afterok:{ended}")
    found = jobs.wait(stuck, "DependencyNeverSatisfied")
    assert found.stuck and f"`scancel {stuck}`" in found.hint
    assert jobs.cluster.wait(ended) == jobs.cluster.wait(further) == "CANCELLED"
    told = jobs.ask(behind, ended, further)
    assert [told[j].state for j in (behind, ended, further)] == ["pending", "cancelled", "cancelled"]
    assert not told[behind].stuck and told[ended].reason == "DependencyNeverSatisfied"


def test_a_job_that_went_back_to_the_queue_is_not_stuck(jobs: Jobs) -> None:
    job = jobs.submit("sleep 60")
    jobs.cluster.wait(job, "RUNNING")
    jobs.commands.requeue(job)
    found = jobs.wait(job, "BeginTime")
    assert (found.state, found.stuck, found.restarts, found.hint) == ("pending", False, 1, "")
    jobs.cluster.start_now(job)
    jobs.cluster.wait(job, "RUNNING")
    found = jobs.ask(job)[job]
    assert (found.state, found.restarts) == ("running", 1)
    assert "Restarts=1" in jobs.cluster.run("scontrol", "show", "job", job)


def test_elements_of_an_array(jobs: Jobs) -> None:
    array = jobs.submit("#SBATCH --array=0-3%2", '[ "$SLURM_ARRAY_TASK_ID" = 0 ] && exit 3; sleep 60')
    ids = [f"{array}_{i}" for i in range(4)]
    assert jobs.cluster.wait(ids[0]) == "FAILED"
    jobs.cluster.wait(ids[2], "RUNNING")
    found = jobs.ask(array, *ids, f"{array}_9")
    assert [found[job].state for job in ids] == ["failed", "running", "running", "pending"]
    assert found[ids[0]].reason == "exit code 3" and found[ids[3]].reason == "JobArrayTaskLimit"
    assert not found[ids[3]].stuck and found[array].state == "running" and found[f"{array}_9"].state == "gone"


def test_a_node_that_dies(jobs: Jobs) -> None:
    again = jobs.submit("#SBATCH --nodelist=node2", "sleep 60")
    once = jobs.submit("#SBATCH --nodelist=node2 --no-requeue", "sleep 60")
    for job in (again, once):
        jobs.cluster.wait(job, "RUNNING")
    jobs.cluster.crash("node2")
    jobs.cluster.wait(once, "NODE_FAIL")
    jobs.cluster.wait(again, "PENDING")
    found = jobs.ask(again, once)
    assert (found[once].state, found[once].word) == ("lost", "NODE_FAIL")
    assert (found[again].state, found[again].restarts, found[again].stuck) == ("pending", 1, False)
    needs = jobs.submit("#SBATCH --nodelist=node2")
    told = jobs.wait(needs, "ReqNodeNotAvail")
    assert told.stuck and "`sinfo -R`" in told.hint


def test_a_log_that_cannot_be_opened_is_said(jobs: Jobs) -> None:
    job = jobs.submit("#SBATCH --output=/no/such/folder/log")
    jobs.cluster.wait(job)
    found = jobs.ask(job)[job]
    assert (found.state, found.reason) == ("failed", "JobLaunchFailure") and "log could not be opened" in found.hint


def test_a_forgotten_job_is_gone(clusters: Callable[..., Cluster], tmp_path: Path) -> None:
    """Nobody keeps accounts there: `sacct` says that they are disabled."""
    young = Jobs(clusters("young", "--set", "MinJobAge=2", "--set", "MaxJobCount=4"), tmp_path)
    young.cluster.clear()
    job = young.submit("exit 1")
    young.cluster.wait(job, ("FAILED", ""))
    end = time.monotonic() + 70  # the controller looks for old records now and then
    while (found := young.ask(job)[job]).state != "gone":
        assert found.state in ("pending", "running", "ending", "failed") and time.monotonic() < end
        time.sleep(0.5)
    assert found == JobState(id=job, state="gone")


@pytest.mark.parametrize("away", ["stopped", "ended"])
def test_a_controller_that_is_away_makes_jobs_unknown_within_the_time_given(jobs: Jobs, away: str) -> None:
    job = jobs.submit("sleep 60")
    jobs.cluster.wait(job, "RUNNING")
    pid = jobs.cluster.controller
    if away == "stopped":
        os.kill(pid, signal.SIGSTOP)
    else:
        jobs.cluster.kill_controller()
    try:
        began = time.monotonic()
        found = states.ask(jobs.commands, [job, "99999"], seconds=1)
        took = time.monotonic() - began
    finally:
        if away == "stopped":
            os.kill(pid, signal.SIGCONT)
        else:
            jobs.cluster.start()
    assert {state.state for state in found.values()} == {"unknown"} and took < 8
    assert "squeue" in found[job].reason and not found[job].stuck
    assert jobs.ask(job)[job].state == "running"


def test_accounts_know_what_the_queue_forgot(accounted: Accounted) -> None:
    kept, wanted = accounted
    end = time.monotonic() + 100
    while any(kept.cluster.state(job) for job in wanted):
        told = {job: state.state for job, state in kept.ask(*wanted).items()}
        # never a wrong end, also while the queue forgets and the accounts lag behind
        assert all(word in ("pending", "running", "ending", "gone", wanted[job]) for job, word in told.items()), told
        assert time.monotonic() < end
        time.sleep(0.5)
    while {job: state.state for job, state in kept.ask(*wanted).items()} != wanted:
        assert time.monotonic() < end, kept.ask(*wanted)
        time.sleep(0.5)
    found = list(kept.ask(*wanted).values())
    assert [job.reason for job in found] == ["", "", "exit code 7", "", "", "exit code 1"]
    assert found[3].word == "CANCELLED" and kept.ask("99999")["99999"].state == "gone"


def test_accounts_and_limits_that_the_cluster_enforces(clusters: Callable[..., Cluster], tmp_path: Path) -> None:
    kept = Jobs(clusters("accounts", *ACCOUNTS), tmp_path)
    kept.cluster.clear()
    with pytest.raises(Refused, match="Invalid account") as refused:
        kept.submit("#SBATCH --account=nope")
    assert refused.value.hints[0].endswith("`launcher.account=...`")
    with pytest.raises(Refused, match="Invalid qos specification"):
        kept.submit("#SBATCH --qos=nope")
    kept.submit("#SBATCH --account=research", "true")
    change = ("sacctmgr", "-i", "modify", "qos", "normal", "set")
    kept.cluster.run(*change, "MaxSubmitJobsPerUser=2", "GrpJobs=1", "MaxWall=10")
    try:
        end = time.monotonic() + 60
        with pytest.raises(TryLater, match="QOSMaxSubmitJobPerUserLimit"):
            while time.monotonic() < end:
                last = kept.submit("sleep 60")
                time.sleep(0.3)  # the controller hears of the change
        waits = kept.wait(last, "QOSGrpJobsLimit")
        assert not waits.stuck and "waits until other jobs end" in waits.hint
        kept.cluster.clear()
        long = kept.wait(kept.submit("#SBATCH --time=1:00:00"), "QOSMaxWallDurationPerJobLimit")
        assert long.stuck and "asks for more than the quality of service allows" in long.hint
    finally:
        kept.cluster.run(*change, "MaxSubmitJobsPerUser=-1", "GrpJobs=-1", "MaxWall=-1")
        kept.cluster.clear()
