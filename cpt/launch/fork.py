"""The parent of the ranks on one machine: imports the heavy libraries once, forks the ranks, watches them.

Importing torch and Megatron-core takes several seconds of a core. Done once and shared by fork, four ranks start in
the time of one. The parent itself never computes and never touches a GPU, so that a forked rank may open one.

    cpt run ── python -m cpt.worker --ranks 4 JOB ── rank 0 ── helpers of a save
                (own session)                     ├─ rank 1    (each rank leads its own process group)
                                                  └─ ...
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cpt.base import processes, pulse
from cpt.base.errors import DONE, GUARD, SAVED
from cpt.launch import heartbeat, outcome, watch
from cpt.launch.watch import Beat

PARENT_VARIABLE = "CPT_PARENT_PID"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GRACE_SECONDS = 1.0  # for ranks that are failing by themselves to write down why, before they are killed
_PORT_BYTES = 4
_LINGER_SECONDS = 600.0  # a rank that lives this long after another one ended well will not end by itself


@dataclass
class _Tree:
    """The living ranks and how the others ended, in order."""

    living: dict[int, int] = field(default_factory=dict)  # pid → rank
    ended: dict[int, int] = field(default_factory=dict)  # rank → status as subprocess gives it
    asked: int = 0  # stop signals received
    now: bool = False  # asked a second time: do not wait
    failure: dict[str, Any] | None = None  # why the parent itself ends them


def num_threads(num_ranks: int) -> int:
    """Threads a rank may use: more threads than cores slows a run several times."""
    return max(1, processes.num_cores() // num_ranks)


def set_threads(environ: MutableMapping[str, str], threads: int) -> None:
    """Set what numeric libraries read at their import, where the person has not."""
    for name in THREAD_VARIABLES:
        environ.setdefault(name, str(threads))


def run_ranks(
    num_ranks: int,
    attempt_dir: Path,
    rank_main: Callable[[], int],
    modules: Iterable[str],
    tick: Callable[[], bool] = lambda: False,
    hang_after: float = 0.0,
) -> int:
    """Fork `num_ranks` ranks, wait for all, and leave no process behind.

    Args:
        attempt_dir: the attempt's folder; ranks log to `logs/rank_0000.log` in it.
        rank_main: what each rank runs; it finds RANK, WORLD_SIZE, ... in the environment and gives its exit code.
        modules: imported once, before the fork.
        tick: called about once a second while ranks live; True asks for a stop.
        hang_after: seconds without progress on any rank after which they are ended [s]; 0 = never.

    Returns:
        The attempt's exit code, see `outcome.conclude`.
    """
    set_threads(os.environ, num_threads(num_ranks))
    if parent := os.environ.pop(PARENT_VARIABLE, None):
        processes.die_with_parent(int(parent))
    processes.adopt_orphans()
    tree = _Tree()
    _take_signals(tree)
    (attempt_dir / "logs").mkdir(parents=True, exist_ok=True)
    for name in modules:
        importlib.import_module(name)
    if tree.asked:
        return SAVED
    memory_kills = _memory_kills()
    told = os.pipe()
    try:
        gc.freeze()  # the collector would touch, and so copy, every page of the imported modules in every rank
        for rank in range(num_ranks):
            _fork(tree, rank, num_ranks, attempt_dir, rank_main, told)
        # Not before the forks: it has a thread, and a lock of the C library that this thread holds while a rank is
        # forked (as it does to look up the address of a rank that connects) would stay taken in that rank for ever.
        store = _rendezvous(num_ranks) if num_ranks > 1 else None
        _tell(told, store.port if store is not None else 0, num_ranks)
        _watch(tree, num_ranks, tick, _Watcher(attempt_dir, num_ranks, hang_after))
    finally:
        _end_all(tree)
    return outcome.conclude(
        attempt_dir,
        num_ranks,
        tree.ended,
        stopping=tree.asked > 0,
        out_of_memory=_memory_kills() > memory_kills,
        found=tree.failure,
    )


def _take_signals(tree: _Tree) -> None:
    def handle(number: int, _frame: FrameType | None) -> None:
        tree.asked += 1
        tree.now |= tree.asked > 1 and number == signal.SIGINT

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a closed terminal stops nothing
            signal.signal(number, handle)


def _rendezvous(num_ranks: int) -> Any:
    """The store at which the ranks meet. It takes a free port itself, so nobody can take that port in between."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, num_ranks, is_master=True, wait_for_workers=False)


def _tell(told: tuple[int, int], port: int, num_ranks: int) -> None:
    """Give every rank the port at which they meet."""
    reading, writing = told
    os.close(reading)
    with contextlib.suppress(BrokenPipeError):  # all of them have ended: `_watch` sees how
        os.write(writing, port.to_bytes(_PORT_BYTES, "little") * num_ranks)
    os.close(writing)


def _hear(told: tuple[int, int]) -> int:
    """The port, once all ranks are there.

    Raises:
        EOFError: the parent has ended before.
    """
    reading, writing = told
    os.close(writing)
    data = os.read(reading, _PORT_BYTES)
    os.close(reading)
    if len(data) < _PORT_BYTES:
        raise EOFError("the parent of the ranks ended before they met")
    return int.from_bytes(data, "little")


def _rank_environment(num_ranks: int, port: int) -> dict[str, str]:
    """Port 0: a single rank meets nobody and takes any free port when it wants one."""
    return {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # torch's own word for "the store is served by the parent": rank 0 joins it instead of opening a second one.
        "TORCHELASTIC_USE_AGENT_STORE": str(port != 0),
    }


def _fork(
    tree: _Tree,
    rank: int,
    num_ranks: int,
    attempt_dir: Path,
    rank_main: Callable[[], int],
    told: tuple[int, int],
) -> None:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # A stop signal between fork and the child's own handlers must not run the parent's handler in the child.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    pid = os.fork()
    if pid == 0:
        _child(rank, num_ranks, parent, attempt_dir, rank_main, told)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    tree.living[pid] = rank
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _child(
    rank: int,
    num_ranks: int,
    parent: int,
    attempt_dir: Path,
    rank_main: Callable[[], int],
    told: tuple[int, int],
) -> NoReturn:
    code = 1
    try:
        processes.die_with_parent(parent)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        log = os.open(outcome.log_path(attempt_dir, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(int(os.environ[THREAD_VARIABLES[0]]))
        os.environ |= _rank_environment(num_ranks, _hear(told))
        code = rank_main()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: that would run the parent's exit handlers a second time and wait for helper threads.
        os._exit(code)


class _Watcher:
    """Reads the ranks' signs of life: warns of slow ranks, finds hangs."""

    def __init__(self, attempt_dir: Path, num_ranks: int, hang_after: float) -> None:
        self.attempt_dir, self.num_ranks, self.hang_after = attempt_dir, num_ranks, hang_after
        self._last = time.monotonic()
        self._begun = time.time()
        self._told: set[str] = set()

    def look(self, tree: _Tree) -> dict[str, Any] | None:
        """The failure when the ranks hang, with their stacks written. Looks every few seconds."""
        if time.monotonic() - self._last < heartbeat.beat_seconds(self.hang_after, self.num_ranks):
            return None
        self._last = time.monotonic()
        beats = heartbeat.read_beats(self.attempt_dir, self.num_ranks)
        with contextlib.suppress(OSError):
            heartbeat.tell(self.attempt_dir, beats, self._told)
        if any(status not in (DONE, SAVED, GUARD) for status in tree.ended.values()):
            return None  # the reason why the others wait
        hang = watch.judge(self._of_living(beats, tree), time.time(), self.hang_after)
        if hang is None:
            return None
        pids = {rank: pid for pid, rank in tree.living.items()}
        heartbeat.dump_stacks(self.attempt_dir, pids, silent=hang.silent)
        return heartbeat.failure(self.attempt_dir, hang)

    def _of_living(self, beats: dict[int, Beat], tree: _Tree) -> dict[int, Beat]:
        """Signs of life of the ranks that have not ended; one that never gave any has been silent since the fork."""
        first = {"host": platform.node(), "t": self._begun, "doing": pulse.START, "moved": self._begun}
        return {
            rank: beats.get(rank) or Beat(rank=rank, pid=pid, step=None, count=0, **first)  # type: ignore[arg-type]
            for pid, rank in tree.living.items()
        }


def _watch(tree: _Tree, num_ranks: int, tick: Callable[[], bool], watcher: _Watcher) -> None:
    """Until all ranks have ended, or one has failed and the others had their second to say why, or they hang."""
    told = 0
    last_tick = time.monotonic()
    deadline: float | None = None
    while tree.living:
        _reap(tree)
        now = time.monotonic()
        if now - last_tick > 1.0:
            last_tick = now
            tree.asked += bool(tick()) and not tree.asked
        if tree.asked > told:
            told = tree.asked
            for pid in list(tree.living):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        if deadline is None and tree.ended:
            good = all(status in (DONE, SAVED, GUARD) for status in tree.ended.values())
            if not good:
                deadline = now + _GRACE_SECONDS
            elif len(tree.ended) < num_ranks:
                deadline = now + _LINGER_SECONDS
        elif deadline is not None and any(s not in (DONE, SAVED, GUARD) for s in tree.ended.values()):
            deadline = min(deadline, now + _GRACE_SECONDS)
        tree.failure = watcher.look(tree)
        if tree.failure is not None:
            return
        if tree.now or (deadline is not None and now > deadline):
            return
        time.sleep(0.02)


def _reap(tree: _Tree) -> None:
    """Take note of ranks that ended; helpers that lost their rank are reaped without a note."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        rank = tree.living.pop(pid, None)
        if rank is not None:
            tree.ended[rank] = os.waitstatus_to_exitcode(status)
            processes.kill_group(pid)


def _end_all(tree: _Tree) -> None:
    """Kill ranks that still live, and every descendant that was left to us."""
    for pid in list(tree.living):
        processes.kill_group(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in list(tree.living):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        processes.kill_group(pid)
    tree.living.clear()
    _kill_descendants()


def _kill_descendants() -> None:
    import psutil

    for _ in range(50):
        is_any_alive = False
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ends meanwhile
                if child.status() != psutil.STATUS_ZOMBIE:
                    is_any_alive = True
                    child.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not is_any_alive:
            return
        time.sleep(0.02)


def _memory_kills() -> int:
    """Processes that the kernel has ended for memory in our control group (version 2); 0 where nobody counts."""
    try:
        group = Path("/proc/self/cgroup").read_text().split("::", 1)[1].splitlines()[0]
        text = Path(f"/sys/fs/cgroup{group}/memory.events").read_text()
    except (OSError, IndexError):
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))
