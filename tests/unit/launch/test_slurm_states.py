"""Slurm's words for jobs, as real commands printed them, in ours; and what is never handed on to a job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cpt.base.errors import EnvironmentProblem, UsageError
from cpt.launch.batch import ACTIVE, JobState
from cpt.launch.slurm import states
from cpt.launch.slurm.commands import (
    Away,
    Commands,
    NotInstalled,
    Refused,
    Said,
    TryLater,
    clean,
    is_away,
    parse_limit,
    why,
)

FACTS = {"partition": "short", "limit": "1:00:00", "nodes": "5", "cpus": "40"}


def waiting(reason: str) -> JobState:
    return states.explain(JobState(id="7", state="pending", word="PENDING", reason=reason), FACTS)


def fake(folder: Path, name: str, text: str) -> Commands:
    """Commands that find one of their own names in a folder: what it prints was printed by the real one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return Commands(environ={"PATH": f"{folder}:/usr/bin:/bin"}, cwd=folder)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2:00", 120),
        ("0:05", 5),
        ("1:00:00", 3600),
        ("1-02:03:04", 93784),
        ("365-00:00:00", 365 * 86400),
        *((word, None) for word in ("UNLIMITED", "INVALID", "NOT_SET", "N/A", "infinite", "", "-1:30")),
    ],
)
def test_lengths_of_time_as_slurm_prints_them(text: str, seconds: float | None) -> None:
    assert parse_limit(text) == seconds


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("DependencyNeverSatisfied", "`scancel 7` removes it"),
        ("PartitionTimeLimit", "`launcher.time=...`"),
        ("PartitionNodeLimit", "`short` has or allows fewer than 5 nodes"),
        ("PartitionConfig", "cannot give 40 CPUs on 5 nodes"),
        ("JobHeldUser", "`scontrol release 7`"),
        ("JobHeldAdmin", "administrator"),
        ("launch failed requeued held", "`scontrol release 7`"),
        ("launch_failed_requeued_held", "`scontrol release 7`"),
        ("BadConstraints", "`launcher.constraint`"),
        ("ReqNodeNotAvail, UnavailableNodes:node2", "`sinfo -R`"),
        ("PartitionDown", "is down"),
        ("QOSMaxWallDurationPerJobLimit", "quality of service allows"),
        ("AssocMaxNodePerJobLimit", "account allows"),
        ("AssocGrpCPUMinutesLimit", "account allows"),
        ("QOSMinGRES", "quality of service allows"),
    ],
)
def test_what_never_starts_by_itself_is_stuck_and_says_what_to_do(reason: str, hint: str) -> None:
    job = waiting(reason)
    assert job.stuck and hint in job.hint and not job.hint.endswith(".")


@pytest.mark.parametrize("reason", ["Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit", ""])
def test_what_only_waits_is_not_stuck(reason: str) -> None:
    assert not waiting(reason).stuck and not waiting(reason).hint


@pytest.mark.parametrize(
    "reason",
    [
        "QOSGrpJobsLimit",
        "QOSMaxCpuPerUserLimit",
        "QOSMaxJobsPerUserLimit",
        "AssocGrpNodeLimit",
        "ReqNodeNotAvail, Reserved for maintenance",
    ],
)
def test_a_limit_that_ends_with_other_jobs_is_explained_and_not_stuck(reason: str) -> None:
    assert not waiting(reason).stuck and "waits until" in waiting(reason).hint


def test_a_running_job_keeps_no_hint_of_its_wait() -> None:
    job = JobState(id="7", state="running", word="RUNNING", reason="JobHeldUser")
    assert states.explain(job, FACTS) == job


def test_accounts() -> None:
    """Rows of a real sacct, one job of each kind."""
    found = states.parse_accounts(
        "1|COMPLETED|0:0|node1\n2|FAILED|7:0|node[1-2]\n3|CANCELLED by 0|0:0|None assigned\n4_1|TIMEOUT|0:0|node1\n"
        "5|NODE_FAIL|1:0|node2\n6|PREEMPTED|0:0|node1\n7|REQUEUED|0:0|node1\n8|PENDING|0:0|None assigned\n"
        "9|OUT_OF_MEMORY|0:125|node1\n10|FAILED|0:9|node1\n11|RUNNING|0:0|node1\n1.batch|COMPLETED|0:0|node1\n\n"
    )
    assert {job: s.state for job, s in found.items()} == {
        "1": "done",
        "2": "failed",
        "3": "cancelled",
        "4_1": "timeout",
        "5": "lost",
        "6": "lost",
        "7": "gone",  # not in the queue, so that it does not run whatever the accounts say
        "8": "gone",
        "9": "failed",
        "10": "failed",
        "11": "gone",
    }
    assert (found["2"].reason, found["2"].nodes, found["10"].reason) == ("exit code 7", "node[1-2]", "signal 9")
    assert found["3"].nodes == "" and found["3"].word == "CANCELLED"


def test_every_word_has_a_meaning() -> None:
    assert {state for state in states.WORDS.values() if state in ACTIVE} == set(ACTIVE)


def test_an_array_is_what_its_most_alive_element_is() -> None:
    base = JobState(id="", state="done")
    elements = {f"12_{i}": replace(base, id=f"12_{i}", state=s) for i, s in enumerate(("done", "running", "failed"))}
    assert states._combined("12", states._of("12", elements)).state == "running"
    assert states._combined("12_2", states._of("12_2", elements)).state == "failed"
    assert states._combined("1", states._of("1", elements)).state == "gone"


def test_nothing_of_another_job_reaches_this_one() -> None:
    outer = {
        **{"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1", "SBATCH_PARTITION": "x", "SRUN_DEBUG": "1"},
        **{"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        **{"SQUEUE_FORMAT": "%i", "SACCT_FORMAT": "x", "SLURM_TIME_FORMAT": "relative", "TORCHELASTIC_RUN_ID": "1"},
    }
    kept = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "HOME": "/root", "RANKS": "1", "OMP_NUM_THREADS": "1"}
    assert clean({**outer, **kept}) == kept


@pytest.mark.parametrize(
    "told",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "squeue: fatal: Could not establish a configuration source",
        "squeue: fatal: Unable to process configuration file",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
    ],
)
def test_no_answer_is_told_from_a_refusal(told: str) -> None:
    assert is_away(Said(1, "", told))
    assert not is_away(Said(1, "", "slurm_load_jobs error: Invalid job id specified"))


@pytest.mark.parametrize(
    ("told", "kind", "hint"),
    [
        (
            "sbatch: error: invalid partition specified: nope\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified",
            Refused,
            "launcher.partition",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            Refused,
            "launcher.account",
        ),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", Refused, "launcher.qos"),
        ("sbatch: error: Batch job submission failed: Invalid feature specification", Refused, "launcher.constraint"),
        (
            "sbatch: error: CPU count per node can not be satisfied\n"
            "sbatch: error: Batch job submission failed: Requested node configuration is not available",
            Refused,
            "launcher.cpus_per_rank",
        ),
        ("sbatch: error: Memory specification can not be satisfied", Refused, "launcher.mem"),
        ("sbatch: error: Invalid generic resource (gres) specification", Refused, "launcher.gpus"),
        ("sbatch: error: Batch job submission failed: Requested reservation is invalid", Refused, "launcher.reserv"),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", Refused, "MaxArraySize"),
        (
            "sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information",
            Refused,
            "launcher.extra",
        ),
        (
            "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
            "accounting/QOS policy (job submit limit, user's size and/or time limits)",
            TryLater,
            "later",
        ),
        (
            "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job violates "
            "accounting/QOS policy (job submit limit, user's size and/or time limits)",
            Refused,
            "sacctmgr show qos",
        ),
        (
            "sbatch: error: Batch job submission failed: Required partition not available (inactive or drain)",
            TryLater,
            "later",
        ),
    ],
)
def test_a_refusal_is_one_line_with_what_to_do(tmp_path: Path, told: str, kind: type[Exception], hint: str) -> None:
    (tmp_path / "told").write_text(told)
    commands = fake(tmp_path, "sbatch", f"cat {tmp_path}/told >&2; exit 1")
    with pytest.raises(kind) as refused:
        commands.submit(tmp_path / "job.sbatch", "token")
    error = refused.value
    assert isinstance(error, UsageError | EnvironmentProblem)
    assert "\n" not in error.message and "sbatch: " not in error.message and "`job.sbatch`" in error.message
    assert any(hint in line for line in error.hints)


def test_no_slurm_on_this_machine(tmp_path: Path) -> None:
    commands = Commands(environ={"PATH": str(tmp_path)}, cwd=tmp_path)
    with pytest.raises(NotInstalled, match="no command `sbatch`"):
        commands.submit(tmp_path / "job.sbatch", "token")
    assert states.ask(commands, ["1"])["1"].state == "unknown"


def test_the_id_is_told_from_the_name_of_the_cluster(tmp_path: Path) -> None:
    assert fake(tmp_path, "sbatch", "echo '123;alpha'").submit(tmp_path / "job.sbatch", "token") == "123"


def test_nothing_is_asked_twice_when_a_controller_that_is_away_has_no_answer_about_the_token(tmp_path: Path) -> None:
    fake(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    commands = fake(tmp_path, "sbatch", f"echo x >> {tmp_path}/calls; echo 'Socket timed out' >&2; exit 1")
    with pytest.raises(Away) as lost:
        commands.submit(tmp_path / "job.sbatch", "token")
    assert (tmp_path / "calls").read_text() == "x\n"
    assert any("may be in the queue" in hint for hint in lost.value.hints)


def test_complaints_on_one_line() -> None:
    assert why(Said(1, "", "sbatch: error: a\nsbatch: error: Batch job submission failed: a\nb\x1b[1m\n")) == "a; b [1m"
    assert why(Said(3, "", "")) == "exit code 3"
