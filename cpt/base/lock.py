"""Who is working on a run, a stage or a conversion: `lock.json` with host, pid and a heartbeat.

A lock is stale when its process is gone (known on the same machine) or, from another machine, when its last sign of
life is older than two minutes by the clock of the file system that both see, when a queue says that its batch job is
gone, or when the queue has started that very job again. A stale lock is taken over.

Whoever lost a lock so may live on all the same (a machine that was cut off): what it writes where others read is
fenced, see `Fence`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cpt.base.errors import Fenced, UsageError
from cpt.base.files import read_json, write_json
from cpt.base.processes import boot_id, start_time

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
    job: str | None = None  # the batch job that it runs in, unique over clusters; the same when the job is requeued

    def text(self) -> str:
        """Who it is, for a message."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.since))
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on `{self.host}`{job} since {since}"


def this_machine() -> str:
    """Equal for two processes only when they see the same pids."""
    parts = [boot_id() or ""]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(filter(None, parts)) or platform.node()


def holder_of(pid: int, what: str, job: str | None = None) -> Holder:
    """A holder for a process of this machine, which may be part of a batch job."""
    return Holder(
        host=platform.node(),
        machine=this_machine(),
        pid=pid,
        start=start_time(pid),
        token=uuid.uuid4().hex,
        since=time.time(),
        what=what,
        job=job,
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
        """Give the lock back, if it is still ours and its folder still there."""
        with contextlib.suppress(FileNotFoundError), _exclusive(self.path.parent):
            if self.is_ours():
                self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Fence:
    """The right to publish in a folder: it ends when another process takes the folder's lock over.

    Args:
        token: of the lock when the work began.
    """

    folder: Path
    token: str

    def is_open(self) -> bool:
        """Whether the lock is still the one that the work began under."""
        held = read_holder(self.folder)
        return held is not None and held.token == self.token

    def check(self) -> None:
        """Return if what was made may be published.

        Raises:
            Fenced: the lock is another one's, or gone.
        """
        if self.is_open():
            return
        held = read_holder(self.folder)
        raise Fenced(
            f"another attempt has taken over `{self.folder.name}`; this one publishes nothing",
            f"`{self.folder}` is in use by {held.text()}" if held else f"`{self.folder}` is in use by nobody any more",
        )

    def beat(self) -> None:
        """Give a sign of life for the lock, if it is still ours."""
        with contextlib.suppress(OSError):
            if self.is_open():
                beat(self.folder / NAME)


def beat(path: Path) -> None:
    """Give a sign of life for a lock file. The time is the file system's, not this machine's."""
    with contextlib.suppress(OSError):
        os.utime(path)


def take(
    folder: Path, holder: Holder, *hints: str, is_gone: Callable[[Holder], bool] | None = None
) -> tuple[Lock, Holder | None]:
    """Take the lock of a folder.

    Args:
        hints: what a person can do when somebody alive holds it.
        is_gone: asked about a holder on another machine that was heard of lately: True when a queue knows that its
            batch job has ended.

    Returns:
        The lock, and the dead holder that it was taken over from, if there was one.

    Raises:
        UsageError: somebody alive holds it; the message says who.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder):
        held = read_holder(folder)
        if held is not None and is_alive(held, folder, dead=lambda old: _is_requeued(old, holder, is_gone)):
            raise UsageError(
                f"`{folder}` is in use by {held.text()} (`{held.what}`)",
                *(hints or ("`cpt status` shows how far it is, `cpt cancel` asks it to save and stop",)),
            )
        write_json(folder / NAME, asdict(holder))
    return Lock(folder, holder), held


def read_holder(folder: Path) -> Holder | None:
    """Who holds the lock of a folder, dead or alive; None when nobody does (or the file is no lock)."""
    known = {f.name for f in fields(Holder)}
    try:
        return Holder(**{k: v for k, v in read_json(folder / NAME).items() if k in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        return None


def live_holder(folder: Path) -> Holder | None:
    """Who holds the lock of a folder and is alive."""
    held = read_holder(folder)
    return held if held is not None and is_alive(held, folder) else None


def is_alive(held: Holder, folder: Path, dead: Callable[[Holder], bool] | None = None) -> bool:
    """Whether a holder still works.

    Args:
        dead: asked about one on another machine that was heard of lately; True when it is known to be gone.
    """
    if held.machine == this_machine():
        return held.start is not None and start_time(held.pid) == held.start
    if _silence(folder) >= STALE_SECONDS:
        return False
    return dead is None or not dead(held)


def _is_requeued(old: Holder, new: Holder, is_gone: Callable[[Holder], bool] | None) -> bool:
    """Whether an older run of the new holder's own batch job held the lock, or one of a job that is gone."""
    if old.job is not None and old.job == new.job and old.since < new.since:
        return True  # a queue starts a job again only after it has given its machines up
    return is_gone is not None and is_gone(old)


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
