"""The cluster of these tests itself: what other tests rely on."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import PREFIX, Cluster, lives, remove_stale


def test_every_test_here_needs_slurm(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("slurm")


def test_what_a_killed_test_run_left_is_removed(cluster: Cluster) -> None:
    """A cluster belongs to a process, which has ended; those of processes that live are left alone."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = Cluster(Path(f"/tmp/{PREFIX}{ended.pid}-main"), "--nodes", "1")
    left.start()
    controller = left.controller
    remove_stale(keep=[cluster])
    assert not left.root.exists() and not lives(controller)
    assert cluster.run("squeue") and cluster.run("scontrol", "ping").endswith("is UP")


def test_a_node_without_slurmd_keeps_its_processes(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nwhile :; do echo x >> {tmp_path}/beats; sleep 0.1; done\n")
    job = cluster.run("sbatch", "--parsable", "--nodelist=node2", f"--output={tmp_path}/log", script)
    cluster.wait(job, "RUNNING")
    cluster.kill_slurmd("node2")
    cluster.wait(job, "PENDING")
    before = (tmp_path / "beats").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "beats").stat().st_size > before
    cluster.clear()
    end = time.monotonic() + 60  # the node learns that the job is not its own any more
    while time.time() - (tmp_path / "beats").stat().st_mtime < 1:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert cluster.run("sinfo", "-h", "-p", "main", "-o", "%T") == "idle"
