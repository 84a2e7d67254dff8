"""Signs of life of a rank: a thread that writes what the main thread is doing, every few seconds.

    attempt_N/heartbeats/rank_0002.json    {rank, pid, host, t, doing, step, count, moved, own_s, data_share}
    attempt_N/stacks/rank_0002.txt         where all threads of a rank were when the attempt was found to hang

Ranks that a parent on this machine watches only write. Others (in a batch job, under torchrun) also read the files of
all: each finds the same hang, writes its stacks and its record, and ends; see `watch`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from cpt.base import pulse
from cpt.base.errors import FAILED, Fenced
from cpt.base.events import EventLog
from cpt.base.lock import Fence
from cpt.launch import outcome, watch
from cpt.launch.explain import explain
from cpt.launch.watch import Beat, Hang

BEAT_SECONDS = 5.0
HANG_VARIABLE = "CPT_HANG_AFTER"  # [s]; 0 = nobody looks for a hang
HANG_SECONDS = 1800.0
# Not one of the stop signals, and none that a library takes: writes the stacks of all threads, even of a rank whose
# main thread is stuck inside a library.
STACK_SIGNAL: int | None = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else None
_FLIGHT_RECORDS = "2000"  # collectives that NCCL remembers on each rank
_GRACE_SECONDS = 10.0  # for the other ranks to write their stacks


def hang_after(environ: Mapping[str, str]) -> float:
    """Seconds without any progress after which an attempt is a hang; 0 = never."""
    try:
        return max(0.0, float(environ[HANG_VARIABLE]))
    except (KeyError, ValueError):
        return HANG_SECONDS


def beat_seconds(hang_after: float, world_size: int) -> float:
    """How often a rank writes: so that a hang is found in time, and a file system has fewer than fifty of all a second.

    Args:
        hang_after: [s]; 0 = nobody looks for a hang.
    """
    seconds = max(BEAT_SECONDS, world_size / 50)
    return min(seconds, hang_after / 4) if hang_after else seconds


def beat_path(attempt_dir: Path, rank: int) -> Path:
    """Where a rank writes its signs of life."""
    return attempt_dir / "heartbeats" / f"rank_{rank:04d}.json"


def stack_path(attempt_dir: Path, rank: int) -> Path:
    """Where the stacks of a rank's threads go when the attempt hangs."""
    return attempt_dir / "stacks" / f"rank_{rank:04d}.txt"


def read_beats(attempt_dir: Path, world_size: int) -> dict[int, Beat]:
    """The newest sign of life of each rank that gave one."""
    found = {}
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[rank] = Beat(**json.loads(beat_path(attempt_dir, rank).read_text()))
    return found


class Heartbeat:
    """Writes the pulse of this process until `stop`. Errors of the file system are ignored: no rank dies of them.

    Args:
        rank, world_size: of this process.
        hang_after: seconds without progress on any rank that are a hang; 0 = none is [s].
        is_watched: a parent looks for hangs; else the ranks do.
        fence: of the stage, whose lock rank 0 keeps alive; None = somebody else does. Once another attempt has taken
            the stage over, this one ends: what it computes nobody can use.
    """

    def __init__(
        self,
        attempt_dir: Path,
        rank: int,
        world_size: int = 1,
        *,
        hang_after: float = 0.0,
        is_watched: bool = True,
        fence: Fence | None = None,
    ) -> None:
        self.attempt_dir, self.rank, self.world_size = attempt_dir, rank, world_size
        self.hang_after, self.is_watched = hang_after, is_watched
        self.fence = fence if rank == 0 else None
        self._seconds = beat_seconds(hang_after, world_size)
        self._stopped = threading.Event()
        self._noted: set[str] = set()
        self._closed = 0  # looks in a row at which the fence was closed
        self._stacks: TextIO | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin; the first sign of life is written at once."""
        with contextlib.suppress(OSError):
            beat_path(self.attempt_dir, self.rank).parent.mkdir(parents=True, exist_ok=True)
        self._listen()
        self._write()
        self._thread.start()

    def stop(self) -> None:
        """End, with a last sign of life."""
        self._stopped.set()
        self._thread.join(self._seconds)
        pulse.current.say(pulse.END)
        self._write()
        if self._stacks is not None:
            with contextlib.suppress(OSError):
                path = stack_path(self.attempt_dir, self.rank)
                if path.stat().st_size == 0:
                    path.unlink()
                    path.parent.rmdir()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._write()
            if self.fence is not None:
                self._keep(self.fence)
            still = time.monotonic() - pulse.current.moved
            # Who still moves need not look: that would be the square of the ranks in files.
            if not self.is_watched and (self.rank == 0 or still > self.hang_after > 0):
                with contextlib.suppress(OSError):
                    self._look()

    def _keep(self, fence: Fence) -> None:
        """Keep the stage's lock alive, or end where it is another one's. Once may be an error of the file system."""
        try:
            fence.check()
        except Fenced as error:
            self._closed += 1
            if self._closed > 1:
                outcome.write_record(self.attempt_dir, self.rank, FAILED, explain(error))
                self._end(error.message)
        except OSError:
            return
        else:
            self._closed = 0
            fence.beat()

    def _end(self, text: str) -> NoReturn:
        """End this rank though its main thread goes on, or will not come back."""
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()
        os._exit(FAILED)

    def _write(self) -> None:
        path = beat_path(self.attempt_dir, self.rank)
        temporary = path.with_name(f".{path.name}")
        # Not `write_json`: waiting for the disk every five seconds on every rank would be felt.
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(vars(self._beat())))
            os.replace(temporary, path)

    def _beat(self) -> Beat:
        now, p = time.time(), pulse.current
        return Beat(
            rank=self.rank,
            pid=os.getpid(),
            host=platform.node(),
            t=now,
            doing=p.doing,
            step=p.step,
            count=p.count,
            moved=now - (time.monotonic() - p.moved),
            own_s=p.own_s,
            data_share=p.data_share,
        )

    def _listen(self) -> None:
        """Write stacks when STACK_SIGNAL comes."""
        import faulthandler

        if STACK_SIGNAL is None:
            return
        path = stack_path(self.attempt_dir, self.rank)
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = open(path, "a")  # noqa: SIM115 - open as long as the process lives
            faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)

    def _look(self) -> None:
        """Look at all ranks: warn of slow ones, and end this one when nothing moves any more."""
        beats = read_beats(self.attempt_dir, self.world_size)
        if self.rank == 0:
            tell(self.attempt_dir, beats, self._noted)
        found = watch.judge(beats, time.time(), self.hang_after)
        if found is None:
            return
        dump_stacks(self.attempt_dir, {self.rank: os.getpid()} | self._of_silent(found, beats), silent=found.silent)
        _dump_flight_record(self.attempt_dir, self.rank)
        outcome.write_record(self.attempt_dir, self.rank, FAILED, failure(self.attempt_dir, found))
        living = [r for r in beats if r not in found.silent]
        _wait(lambda: all(outcome.record_path(self.attempt_dir, r).exists() for r in living), _GRACE_SECONDS)
        self._end(found.text)

    def _of_silent(self, found: Hang, beats: Mapping[int, Beat]) -> dict[int, int]:
        """Processes of silent ranks on this machine, where this rank is the first of the others there."""
        here = sorted(r for r, b in beats.items() if b.host == platform.node() and r not in found.silent)
        is_first = here[:1] == [self.rank]
        return {r: beats[r].pid for r in found.silent if is_first and beats[r].host == platform.node()}


def tell(attempt_dir: Path, beats: Mapping[int, Beat], told: set[str]) -> None:
    """Write a `warning` event about each rank that is slow or waits for its data, once."""
    for name, text in watch.notes(beats):
        if name not in told:
            told.add(name)
            step = outcome.last_step(attempt_dir) or 0
            EventLog(attempt_dir / "events.jsonl").write("warning", step=step, text=text)


def failure(attempt_dir: Path, found: Hang) -> dict[str, Any]:
    """A hang, as `failure.json` and records say it."""
    hints = []
    shown = stack_path(attempt_dir, found.rank)
    if found.rank in found.silent:
        hints.append(f"rank {found.rank} ran as process {found.pid} on `{found.host}`: stopped, or its machine is gone")
        if _has_stacks(attempt_dir, found.rank):
            hints.append(f"where its threads were stands in `{shown}`, those of the other ranks beside it")
        else:
            hints.append(f"where the other ranks waited stands in `{shown.parent}`")
    else:
        hints.append(f"where its threads were stands in `{shown}`, those of the other ranks beside it")
    hints.append("if a step may last longer, set `launcher.hang_after`")
    return {
        "rank": found.rank,
        "kind": "hang",
        "error": found.text,
        "at_step": found.step,  # under way; `step`, the last one done, is added from the events
        "doing": found.doing,
        "since": found.since,
        "ranks": list(found.ranks),
        "hints": hints,
    }


def dump_stacks(
    attempt_dir: Path, pids: Mapping[int, int], seconds: float = 5.0, silent: Collection[int] = ()
) -> list[int]:
    """Write the stacks of ranks, by rank their pid on this machine; the ranks whose stacks there are.

    By `py-spy` where it is installed and allowed: it also shows what is stuck inside a library, and where a stopped
    process was. Else the rank's own handler does it, as far as the process runs.

    Args:
        seconds: how long to wait for ranks at most [s].
        silent: ranks without a sign of life.
    """
    spy = shutil.which("py-spy")
    asked = []
    for rank, pid in pids.items():
        path = stack_path(attempt_dir, rank)
        if spy is not None and _spy(spy, pid, path, seconds, is_silent=rank in silent):
            continue
        if rank in silent:
            continue
        if STACK_SIGNAL is not None and path.exists():  # it listens: without a handler the signal would end it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, STACK_SIGNAL)
                asked.append(rank)
    _wait(lambda: all(_has_stacks(attempt_dir, rank) for rank in asked), seconds)
    time.sleep(0.1)  # a handler writes line by line
    return [rank for rank in pids if _has_stacks(attempt_dir, rank)]


def _spy(spy: str, pid: int, path: Path, seconds: float, *, is_silent: bool) -> bool:
    # What waits inside the kernel cannot be paused, and what is stopped need not be.
    command = [spy, "dump", "--pid", str(pid), *(["--nonblocking"] if is_silent else [])]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode or not done.stdout:
        return False
    with contextlib.suppress(OSError), open(path, "ab") as file:
        file.write(done.stdout)
        return True
    return False


def _has_stacks(attempt_dir: Path, rank: int) -> bool:
    try:
        return stack_path(attempt_dir, rank).stat().st_size > 0
    except OSError:
        return False


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def flight_environment(attempt_dir: Path) -> dict[str, str]:
    """What makes NCCL remember its last collectives and write them to `attempt_N/flight/` when one of them times out.

    Read with `torchfrtrace`. A rank of a batch job also writes them when it finds a hang itself. Names of torch 2.6 and
    later; ranks that talk over gloo have no such record. Not tried on several GPUs yet.
    """
    prefix = str(attempt_dir / "flight" / "rank_")
    return {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": _FLIGHT_RECORDS,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
    }


def record_flights(attempt_dir: Path, environ: MutableMapping[str, str]) -> None:
    """Set `flight_environment` where there are NVIDIA GPUs, before torch makes its groups; own values stay."""
    if not Path("/dev/nvidiactl").exists():
        return
    with contextlib.suppress(OSError):
        (attempt_dir / "flight").mkdir(parents=True, exist_ok=True)
        for name, value in flight_environment(attempt_dir).items():
            environ.setdefault(name, value)


def collective_seconds(hang_after: float) -> float:
    """How long a collective may wait: the hang is to be found before, as it says more than a time-out does [s]."""
    return max(600.0, hang_after + 120.0)


def _dump_flight_record(attempt_dir: Path, rank: int) -> None:
    """NCCL's memory of its last collectives, now; nothing without CUDA."""
    with contextlib.suppress(Exception):
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            data = torch._C._distributed_c10d._dump_nccl_trace()
            (attempt_dir / "flight" / f"rank_{rank}").write_bytes(data)
