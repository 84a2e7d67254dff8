"""The local launcher on real ranks: they start, stop, fail and are killed; nothing of the tree is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpt.base import processes

SCRIPT = Path(__file__).with_name("launch_script.py")


class Tree:
    """A parent of ranks, started as `cpt run` starts it: below a process of its own that may be killed as well."""

    def __init__(self, folder: Path, what: str, num_ranks: int = 2) -> None:
        self.folder = folder
        self.num_ranks = num_ranks
        command = [sys.executable, str(SCRIPT), str(folder), str(num_ranks), what]
        outer = (
            "import os, subprocess, sys\n"
            "environ = {**os.environ, 'CPT_PARENT_PID': str(os.getpid())}\n"
            "p = subprocess.Popen(sys.argv[1:], env=environ, start_new_session=True)\n"
            "print(p.pid, flush=True)\n"
            "sys.exit(p.wait() % 256)\n"
        )
        environ = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
        self.cli = subprocess.Popen(
            [sys.executable, "-c", outer, *command], stdout=subprocess.PIPE, text=True, env=environ
        )
        assert self.cli.stdout is not None
        self.parent = int(self.cli.stdout.readline())
        self.pids = {self.parent}

    def wait_for(self, name: str) -> list[str]:
        """Texts that the ranks left under a name."""
        paths = [self.folder / f"{name}_{rank}" for rank in range(self.num_ranks)]
        until(lambda: all(p.exists() and p.read_text() for p in paths), f"{name} of all ranks")
        return [p.read_text() for p in paths]

    def ranks(self) -> list[int]:
        found = [int(text) for text in self.wait_for("ready")]
        self.pids |= set(found)
        return found

    def living(self) -> list[int]:
        found = self.pids | set(processes.session_members(self.parent))
        return [pid for pid in found if processes.start_time(pid) is not None]


def until(condition: Callable[[], bool], what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Tree]]:
    trees: list[Tree] = []

    def begin(what: str, num_ranks: int = 2) -> Tree:
        trees.append(Tree(tmp_path, what, num_ranks))
        return trees[-1]

    yield begin
    for tree in trees:
        tree.cli.kill()
        tree.cli.wait()
        processes.kill_session(tree.parent)


def test_four_ranks_import_megatron_once_and_meet(start: Callable[..., Tree]) -> None:
    tree = start("meet", 4)
    assert tree.cli.wait(120) == 0
    threads = max(1, processes.num_cores() // 4)
    for rank in range(4):
        log = (tree.folder / "logs" / f"rank_{rank:04d}.log").read_text()
        assert f"sum 6 threads {threads}" in log
    at_forks = [path.read_text() for path in tree.folder.glob("threads_*")]
    assert at_forks == ["1"] * 4


def test_the_first_error_is_named_not_those_that_followed(start: Callable[..., Tree]) -> None:
    tree = start("one_raises", 4)
    assert tree.cli.wait(120) == 1
    failure = json.loads((tree.folder / "failure.json").read_text())
    assert failure["rank"] == 2
    assert failure["error"] == "ValueError: the first error"
    assert "ValueError: the first error" in Path(failure["log"]).read_text()
    until(lambda: not tree.living(), "an empty tree", 5)


def test_a_stop_signal_reaches_every_rank_and_ends_with_75(start: Callable[..., Tree]) -> None:
    tree = start("save_on_stop", 2)
    until(lambda: all((tree.folder / f"listening_{r}").exists() for r in range(2)), "handlers")
    tree.ranks()
    time.sleep(0.1)
    os.kill(tree.parent, signal.SIGTERM)
    assert tree.cli.wait(30) == 75
    assert not (tree.folder / "failure.json").exists()


def test_a_second_interrupt_ends_ranks_that_do_not_listen(start: Callable[..., Tree]) -> None:
    tree = start("ignores_stop", 2)
    tree.ranks()
    until(lambda: all((tree.folder / f"deaf_{r}").exists() for r in range(2)), "deaf ranks")
    os.kill(tree.parent, signal.SIGINT)
    time.sleep(0.5)
    assert len(tree.living()) >= 3
    os.kill(tree.parent, signal.SIGINT)
    tree.cli.wait(10)
    until(lambda: not tree.living(), "an empty tree", 5)


def test_a_stop_before_a_rank_listens_loses_nothing_and_is_no_failure(start: Callable[..., Tree]) -> None:
    tree = start("loop", 2)
    tree.ranks()
    os.kill(tree.parent, signal.SIGTERM)
    assert tree.cli.wait(30) == 75


@pytest.mark.parametrize("victim", ["cli", "parent", "rank"])
def test_no_process_outlives_a_kill_9(start: Callable[..., Tree], victim: str) -> None:
    tree = start("helpers", 2)
    ranks = tree.ranks()
    for text in tree.wait_for("helpers"):
        tree.pids |= {int(word) for word in text.split()}
    assert len(tree.living()) >= 7, "a parent, two ranks, and a manager and a writer of each"
    os.kill({"cli": tree.cli.pid, "parent": tree.parent, "rank": ranks[1]}[victim], signal.SIGKILL)
    until(lambda: not tree.living(), f"the whole tree to end, living: {tree.living()}", 5)
    if victim == "rank":
        tree.cli.wait(5)
        failure = json.loads((tree.folder / "failure.json").read_text())
        assert failure["rank"] == 1
        assert failure["error"].startswith("killed by SIGKILL")
