"""Slurm's commands on a real cluster: submissions, refusals, and answers that get lost."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.launch.slurm.commands import Away, Commands, Refused, TryLater
from tests.slurm.conftest import Cluster

_tokens = (f"cpt-test-{os.getpid()}-{n}" for n in itertools.count())


@pytest.fixture
def commands(cluster: Cluster, tmp_path: Path) -> Commands:
    return Commands(environ=cluster.environ, cwd=tmp_path)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Writes a batch script of some lines; `#SBATCH` options go by keyword or as lines."""

    def write(*lines: str, name: str = "job.sbatch") -> Path:
        path = tmp_path / name
        path.write_text(
            f"#!/bin/bash\n#SBATCH --output={tmp_path}/%j.log --open-mode=append\n" + "\n".join(lines) + "\n"
        )
        return path

    return write


def comments(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "-h", "-t", "all", "-o", "%k").splitlines()


def test_a_job_runs_and_keeps_its_token(cluster: Cluster, commands: Commands, script: Callable[..., Path]) -> None:
    token = next(_tokens)
    job = commands.submit(script("pwd; env"), token)
    assert job.isdigit() and commands.find(token) == job
    assert cluster.wait(job) == "COMPLETED" and commands.find(token) == job
    assert f"Comment={token}" in cluster.run("scontrol", "show", "job", job).replace("\n", " ").split()
    assert commands.find(token + "x") is None and commands.find(token[:-1]) is None


def test_a_job_has_nothing_of_the_job_that_submits_it(
    cluster: Cluster, script: Callable[..., Path], tmp_path: Path
) -> None:
    outer = {**cluster.environ, "SLURM_CPUS_PER_TASK": "3", "RANK": "1", "MASTER_ADDR": "x", "SBATCH_PARTITION": "nope"}
    outer |= {"MINE": "kept"}
    commands = Commands(environ=outer, cwd=tmp_path)
    job = commands.submit(script("env"), next(_tokens))
    assert cluster.wait(job) == "COMPLETED"
    seen = dict(line.partition("=")[::2] for line in (tmp_path / f"{job}.log").read_text().splitlines())
    assert seen["MINE"] == "kept" and seen["SLURM_JOB_ID"] == job and seen["SLURM_SUBMIT_DIR"] == str(tmp_path)
    assert not {"RANK", "MASTER_ADDR", "SLURM_CPUS_PER_TASK", "SBATCH_PARTITION"} & set(seen)


@pytest.mark.parametrize(
    ("line", "found", "hint"),
    [
        ("--partition=nope", "invalid partition specified: nope", "launcher.partition"),
        ("--constraint=a100", "Invalid feature specification", "launcher.constraint"),
        ("--cpus-per-task=5", "Requested node configuration is not available", "launcher.cpus_per_rank"),
        ("--mem=100G", "Memory specification can not be satisfied", "launcher.mem"),
        ("--gres=gpu:2", "Invalid generic resource (gres) specification", "launcher.gpus"),
        ("--reservation=mine", "Requested reservation is invalid", "launcher.reservation"),
        ("--time=2h", "Invalid --time specification", "launcher.time"),
        ("--array=0-2000", "Invalid job array specification", "MaxArraySize"),
        ("--bogus", "unrecognized option '--bogus'", "launcher.extra"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(
    commands: Commands, script: Callable[..., Path], line: str, found: str, hint: str
) -> None:
    token = next(_tokens)
    with pytest.raises(Refused) as refused:
        commands.submit(script(f"#SBATCH {line}"), token)
    assert found in refused.value.message and any(hint in h for h in refused.value.hints)
    assert commands.find(token) is None
    with pytest.raises(Refused):
        commands.test_only(script(f"#SBATCH {line}"))


def test_a_script_can_be_asked_about_without_a_job(
    cluster: Cluster, commands: Commands, script: Callable[..., Path]
) -> None:
    before = comments(cluster)
    assert "to start at" in commands.test_only(script("#SBATCH --nodes=2"))
    assert comments(cluster) == before


def test_a_job_that_was_submitted_before_is_taken(commands: Commands, script: Callable[..., Path]) -> None:
    token = next(_tokens)
    job = commands.submit(script("sleep 60"), token)
    assert commands.submit(script("sleep 60"), token, again=True) == job


def test_an_array_has_one_token(cluster: Cluster, commands: Commands, script: Callable[..., Path]) -> None:
    token = next(_tokens)
    job = commands.submit(script("#SBATCH --array=0-3%2", "sleep 60"), token)
    cluster.wait(f"{job}_1", "RUNNING")
    assert commands.find(token) == job


def test_a_submission_whose_answer_is_lost_makes_one_job(
    cluster: Cluster, script: Callable[..., Path], tmp_path: Path
) -> None:
    """The controller stands still when `sbatch` is called, which gives up; then it goes on, and takes the job."""
    token = next(_tokens)
    commands = Commands(environ=cluster.environ, cwd=tmp_path, seconds=2)
    os.kill(cluster.controller, signal.SIGSTOP)
    wake = threading.Timer(3, os.kill, (cluster.controller, signal.SIGCONT))
    wake.start()
    try:
        job = commands.submit(script("sleep 60"), token)
    finally:
        wake.cancel()
        os.kill(cluster.controller, signal.SIGCONT)
    time.sleep(0.5)
    assert comments(cluster).count(token) == 1
    assert commands.find(token) == job


def test_a_submission_that_never_came_is_made_again(
    cluster: Cluster, script: Callable[..., Path], tmp_path: Path
) -> None:
    """The first `sbatch` of two finds no controller, as with a network that fails for a moment."""
    token, folder = next(_tokens), tmp_path / "bin"
    folder.mkdir()
    real = cluster.run("which", "sbatch")
    first = (
        f'[ -e {folder}/tried ] || {{ touch {folder}/tried; echo "Unable to contact slurm controller" >&2; exit 1; }}'
    )
    (folder / "sbatch").write_text(f'#!/bin/sh\n{first}\nexec {real} "$@"\n')
    (folder / "sbatch").chmod(0o755)
    environ = {**cluster.environ, "PATH": f"{folder}:{cluster.environ['PATH']}"}
    job = Commands(environ=environ, cwd=tmp_path).submit(script("sleep 60"), token)
    assert job.isdigit() and comments(cluster).count(token) == 1


def test_twins_of_a_token_become_one(cluster: Cluster, script: Callable[..., Path], tmp_path: Path) -> None:
    """The first `sbatch` reaches the controller after the job was looked for: two jobs, of which the first stays."""
    token, folder = next(_tokens), tmp_path / "bin"
    folder.mkdir()
    real, path = cluster.run("which", "sbatch"), script("#SBATCH --hold")
    late = f"[ -e {folder}/tried ] || {{ touch {folder}/tried; echo 'Socket timed out' >&2; exit 1; }}"
    twin = f"{real} --parsable --comment={token} {path} > {folder}/first"
    (folder / "sbatch").write_text(f'#!/bin/sh\n{late}\n{twin}\nexec {real} "$@"\n')
    (folder / "sbatch").chmod(0o755)
    environ = {**cluster.environ, "PATH": f"{folder}:{cluster.environ['PATH']}"}
    job = Commands(environ=environ, cwd=tmp_path).submit(path, token)
    assert job == (folder / "first").read_text().strip()
    assert cluster.wait(str(int(job) + 1)) == "CANCELLED" and cluster.state(job) == "PENDING"


def test_a_queue_that_is_full_is_told_from_a_refusal(
    clusters: Callable[..., Cluster], script: Callable[..., Path], tmp_path: Path
) -> None:
    """`MaxJobCount`: sbatch itself tries for minutes."""
    full = clusters("young", "--set", "MinJobAge=2", "--set", "MaxJobCount=4")
    full.clear()
    commands = Commands(environ=full.environ, cwd=tmp_path, seconds=3)
    try:
        with pytest.raises(TryLater, match="temporarily unable to accept"):
            for _ in range(6):
                token = next(_tokens)
                commands.submit(script("#SBATCH --hold"), token)
        assert commands.find(token) is None
    finally:
        full.clear()


def test_requeue_cancel_and_signal(
    cluster: Cluster, commands: Commands, script: Callable[..., Path], tmp_path: Path
) -> None:
    lines = (
        "trap 'echo shell; exit 3' USR2",
        "srun bash -c 'trap \"echo task; exit 0\" USR2; touch up; while :; do sleep 0.1; done'",
    )
    job = commands.submit(script(*lines), next(_tokens))
    waits = commands.submit(script("#SBATCH --begin=now+1hour"), next(_tokens))
    cluster.wait(job, "RUNNING")
    end = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < end:
        time.sleep(0.05)
    commands.signal([job, waits, "99999"], "USR2")
    assert cluster.wait(job) == "COMPLETED"
    told = (tmp_path / f"{job}.log").read_text().split()
    assert "task" in told and "shell" not in told
    assert cluster.state(waits) == "PENDING"

    again = commands.submit(script("sleep 60"), next(_tokens))
    cluster.wait(again, "RUNNING")
    commands.requeue(again)
    cluster.start_now(again)
    cluster.wait(again, "RUNNING")
    fixed = commands.submit(script("#SBATCH --no-requeue", "sleep 60"), next(_tokens))
    cluster.wait(fixed, "RUNNING")
    with pytest.raises(Refused, match=f"put job {fixed} back"):
        commands.requeue(fixed)
    commands.cancel([waits, "99999", again, fixed, job])
    assert [cluster.wait(j, "CANCELLED") for j in (waits, again, fixed)]
    commands.cancel([again])
    commands.signal([again], "USR2")
    commands.signal([], "USR2")


def test_a_controller_that_stands_still_is_given_up_in_time(cluster: Cluster, script: Callable[..., Path]) -> None:
    commands, token = Commands(environ=cluster.environ, seconds=1), next(_tokens)
    os.kill(cluster.controller, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(Away, match="did not end in 1 s") as away:
            commands.submit(script(), token)
    finally:
        os.kill(cluster.controller, signal.SIGCONT)
    assert time.monotonic() - began < 8 and "may be in the queue" in away.value.hints[0]
    end = time.monotonic() + 60  # as the controller comes to it, the same command finds it
    while (job := Commands(environ=cluster.environ).find(token)) is None and time.monotonic() < end:
        time.sleep(0.1)
    assert job and Commands(environ=cluster.environ).submit(script(), token, again=True) == job
    assert comments(cluster).count(token) == 1
