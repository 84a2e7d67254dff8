"""Process trees that end together: parent-death signals, process groups, and who a pid really is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0


def die_with_parent(parent: int) -> None:
    """End this process by SIGKILL when process `parent` ends, also when that one is killed.

    Linux sends the signal itself; elsewhere a thread looks twice a second.
    """
    if not _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    # The parent may have ended before the line above.
    if os.getppid() != parent:
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def boot_id() -> str | None:
    """Equal for two processes only when one run of one system has them; None where the system has no such word."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return None


def bind_children() -> None:
    """From now on every process forked from this one's main thread ends with it (writers that a save forks)."""
    state = {"parent": 0, "main": True}

    def before() -> None:
        state["parent"] = os.getpid()
        # The kernel counts the forking *thread* as the parent, and a helper thread may end long before the process.
        state["main"] = threading.current_thread() is threading.main_thread()

    def after_in_child() -> None:
        if state["main"]:
            die_with_parent(int(state["parent"]))

    os.register_at_fork(before=before, after_in_child=after_in_child)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def start_time(pid: int) -> int | None:
    """When a process started [clock ticks since boot]; None when there is no such process (or it is a zombie).

    A pid alone may have been given to another process since; pid and start time together are never used twice.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in brackets may hold spaces
    return None if fields[0] in "ZX" else int(fields[19])


def kill_group(group: int, number: int = signal.SIGKILL) -> None:
    """Signal every process of a group; nothing when the group is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def session_members(session: int) -> list[int]:
    """Pids of the living processes of a session."""
    found = []
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                pid = int(entry.name)
                if os.getsid(pid) == session and start_time(pid) is not None:
                    found.append(pid)
    return found


def kill_session(session: int, seconds: float = 5.0) -> None:
    """End every process of a session that we started, and wait until none is left.

    Args:
        session: the session's id; never our own.
        seconds: how long to wait at most [s].
    """
    assert session != os.getsid(0), "a process does not end its own session"
    deadline = time.monotonic() + seconds
    while members := session_members(session):
        for pid in members:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
