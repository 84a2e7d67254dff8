"""Who is working on a run, a stage or a conversion: `lock.json` with host, pid and a heartbeat.

A lock is stale when its process is gone (known on the same machine) or, from another machine, when its last sign of
life is older than two minutes by the clock of the file system that both see. A stale lock is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.files import read_json, write_json
from cpt.base.processes import start_time

STALE_SECONDS = 120.0
NAME = "lock.json"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    host: str
    machine: str  # boot and pid namespace: equal only where pids can be compared
    pid: int
    start: int | None  # start time of the pid [ticks since boot]
    token: str  # unique to this taking of the lock
    since: float  # [unix seconds]
    what: str  # for people: the command or script

    def text(self) -> str:
        """Who it is, for a message."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.since))
        return f"process {self.pid} on `{self.host}` since {since}"


def this_machine() -> str:
    """Equal for two processes only when they see the same pids."""
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join(parts) or platform.node()


def holder_of(pid: int, what: str) -> Holder:
    """A holder for a process of this machine."""
    return Holder(
        host=platform.node(),
        machine=this_machine(),
        pid=pid,
        start=start_time(pid),
        token=uuid.uuid4().hex,
        since=time.time(),
        what=what,
    )


class Lock:
    """A lock that is held. Beat it at least every minute; release it at the end.

    Args:
        folder: what is locked: of a run, a stage, an unfinished conversion.
        holder: who holds it.
    """

    def __init__(self, folder: Path, holder: Holder) -> None:
        self.path = folder / NAME
        self.holder = holder

    def is_ours(self) -> bool:
        """Whether nobody has taken it over meanwhile (a machine that slept, a long network break)."""
        held = read_holder(self.path.parent)
        return held is not None and held.token == self.holder.token

    def beat(self) -> None:
        """Give a sign of life."""
        beat(self.path)

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        with _exclusive(self.path.parent):
            if self.is_ours():
                self.path.unlink(missing_ok=True)


def beat(path: Path) -> None:
    """Give a sign of life for a lock file. The time is the file system's, not this machine's."""
    with contextlib.suppress(OSError):
        os.utime(path)


def take(folder: Path, holder: Holder, *hints: str) -> tuple[Lock, Holder | None]:
    """Take the lock of a folder.

    Args:
        hints: what a person can do when somebody alive holds it.

    Returns:
        The lock, and the dead holder that it was taken over from, if there was one.

    Raises:
        UsageError: somebody alive holds it; the message says who.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder):
        held = read_holder(folder)
        if held is not None and is_alive(held, folder):
            raise UsageError(
                f"`{folder}` is in use by {held.text()} (`{held.what}`)",
                *(hints or ("`cpt status` shows how far it is, `cpt cancel` asks it to save and stop",)),
            )
        write_json(folder / NAME, asdict(holder))
    return Lock(folder, holder), held


def read_holder(folder: Path) -> Holder | None:
    """Who holds the lock of a folder, dead or alive; None when nobody does (or the file is no lock)."""
    try:
        return Holder(**read_json(folder / NAME))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return None


def live_holder(folder: Path) -> Holder | None:
    """Who holds the lock of a folder and is alive."""
    held = read_holder(folder)
    return held if held is not None and is_alive(held, folder) else None


def is_alive(held: Holder, folder: Path) -> bool:
    """Whether a holder still works."""
    if held.machine == this_machine():
        return held.start is not None and start_time(held.pid) == held.start
    return _silence(folder) < STALE_SECONDS


def _silence(folder: Path) -> float:
    """Seconds since the lock's last sign of life, by the clock of the file system."""
    probe = folder / f".{NAME}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime - (folder / NAME).stat().st_mtime
    except OSError:
        return time.time() - (folder / NAME).stat().st_mtime if (folder / NAME).exists() else STALE_SECONDS
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process at a time between looking at the lock and writing it."""
    fd = os.open(folder / f".{NAME}", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Some network file systems know no flock; then the window of a few milliseconds stays.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
