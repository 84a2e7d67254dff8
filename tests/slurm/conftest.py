"""A real Slurm cluster of two pretended nodes on this machine, started once for all tests here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TOOL = HERE / "slurm-local"
PREFIX = "cpt-slurm-"  # in /tmp, followed by the process that uses it: paths of unix sockets are short
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


class Cluster:
    """A running cluster.

    Args:
        root: folder of everything it has.
        options: of `slurm-local start`.
    """

    def __init__(self, root: Path, *options: str) -> None:
        self.root = root
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SRUN_", "SBATCH_"))}
        self.environ["SLURM_CONF"] = str(root / "etc" / "slurm.conf")
        self._options = options
        self._away: set[str] = set()

    def tool(self, *arguments: str, timeout: float = 60) -> None:
        """Run `slurm-local`."""
        command = [sys.executable, str(TOOL), "--dir", str(self.root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"`slurm-local {' '.join(arguments)}`: {done.stderr}"

    def start(self) -> None:
        """Start it, or what is missing of it (after `kill_controller`)."""
        self.tool("start", *self._options, timeout=600)  # the first time it is installed

    def stop(self) -> None:
        """End every process of it and remove all files."""
        self.tool("stop", "--purge")

    def run(self, *arguments: str | Path, check: bool = True, cwd: Path | None = None, timeout: float = 60) -> str:
        """What a Slurm command (or any other, with this cluster's environment) prints."""
        command = [str(a) for a in arguments]
        done = subprocess.run(command, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"`{' '.join(command)}`: {done.returncode} {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Slurm's word for a job (of one array element: `95_2`); empty when it is forgotten."""
        return self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T", check=False)

    def wait(self, job: str, states: str | Collection[str] = FINAL, seconds: float = 120) -> str:
        """Wait until a job is in one of some states; gives it."""
        wanted = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in wanted:
            if time.monotonic() > end:
                told = self.run("scontrol", "show", "job", job, check=False)
                raise AssertionError(f"job {job} is {state or 'forgotten'} after {seconds:g} s, not {wanted}\n{told}")
            time.sleep(0.1)
        return state

    def start_now(self, job: str, seconds: float = 120) -> None:
        """End the two minutes that a job waits after a requeue."""
        self.wait(job, "PENDING", seconds)
        # A node refuses what was granted in the same second in which the run before was ended ("credential revoked"),
        # and the job fails.
        time.sleep(1.2 - time.time() % 1)
        end = time.monotonic() + seconds
        # The controller may set the time anew while it still clears up after the run before.
        while self.run("squeue", "-h", "-j", job, "-o", "%T %r", check=False) == "PENDING BeginTime":
            assert time.monotonic() < end, f"job {job} does not start"
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            time.sleep(0.5)

    def crash(self, node: str, tell: bool = True) -> None:
        """A node dies with all its processes. `tell`: the controller knows at once, else after about 25 s."""
        self._away.add(node)
        self.tool("node-crash", node, *(["--tell"] if tell else []))

    def kill_slurmd(self, node: str, tell: bool = True) -> None:
        """Slurm loses a node; the processes of its jobs live on."""
        self._away.add(node)
        self.tool("node-kill-slurmd", node, *(["--tell"] if tell else []))

    def up(self, node: str) -> None:
        """Bring such a node back."""
        self.tool("node-up", node)
        self._away.discard(node)

    @property
    def controller(self) -> int:
        """Process of slurmctld."""
        state = json.loads((self.root / "run" / "state.json").read_text())
        return int(state["daemons"]["slurmctld"]["pid"])

    def kill_controller(self) -> None:
        """End slurmctld, so that it saves what it knows; `start` brings it back."""
        pid = self.controller
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 60
        while lives(pid):
            assert time.monotonic() < end, "slurmctld does not end"
            time.sleep(0.05)

    def clear(self, seconds: float = 120) -> None:
        """Cancel every job, wait for their processes to end, bring every node back."""
        self.run("scancel", "--user", self.run("id", "-un"))
        for node in sorted(self._away):
            self.up(node)
        end = time.monotonic() + seconds
        while left := self.run("squeue", "-h", "-o", "%i %T"):
            assert time.monotonic() < end, f"jobs that do not end: {left}"
            time.sleep(0.1)


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended and was not asked about does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def remove_stale(keep: Collection[Cluster] = ()) -> None:
    """Stop clusters of test runs that were killed: of processes that ended, and of this one's number."""
    kept = {cluster.root for cluster in keep}
    for root in Path("/tmp").glob(f"{PREFIX}*"):
        pid = root.name.removeprefix(PREFIX).split("-")[0]
        if root in kept or not pid.isdigit() or (int(pid) != os.getpid() and lives(int(pid))):
            continue
        with contextlib.suppress(FileNotFoundError):
            if root.stat().st_uid == os.geteuid():
                Cluster(root).stop()


@pytest.fixture(scope="session")
def clusters() -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster: `clusters("young", "--set", "MinJobAge=2")`; the same name gives the same one."""
    if not shutil.which("sbatch") and (os.geteuid() != 0 or not shutil.which("apt-get")):
        pytest.skip("needs Slurm, or root on Debian to install it")
    remove_stale()
    started: dict[str, Cluster] = {}

    def start(name: str, *options: str) -> Cluster:
        if name not in started:
            made = started[name] = Cluster(Path(f"/tmp/{PREFIX}{os.getpid()}-{name}"), *options)
            made.start()
        return started[name]

    yield start
    for made in started.values():
        made.stop()


@pytest.fixture(scope="session")
def cluster(clusters: Callable[..., Cluster]) -> Cluster:
    """Two nodes of four CPUs, partitions `main`, `short` (2 minutes at most) and `spot`; no accounting."""
    return clusters("main")


@pytest.fixture(autouse=True)
def _clear(request: pytest.FixtureRequest) -> Iterator[None]:
    """No job and no lost node of a test meets the next one."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()
