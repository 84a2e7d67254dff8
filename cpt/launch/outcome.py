"""How an attempt ended, from what its ranks left behind. The same files serve every launcher.

attempt_N/ranks/rank_0002.json    written by the rank itself as its last act: code, error, step, time
attempt_N/failure.json            the first error of the first rank that failed
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt.base.errors import DONE, ENVIRONMENT, FAILED, GUARD, SAVED
from cpt.base.files import read_json, read_lines, write_json

_GOOD = (DONE, SAVED, GUARD)
# Faults of the machine, which another attempt may not meet: a rank was killed or its node is gone, nothing moves any
# more, ranks do not find each other or could not be started, a GPU or a disk failed under them.
MACHINE = frozenset({"killed", "lost", "hang", "connect", "launch", "device", "io"})
# Not so a command that cannot be executed: a person has to name another, or put it there.
COMMAND = "command"
_EXECVE = re.compile(r"execve\(\): (.+)")
_NOT_EXECUTED = (126, 127)  # of a shell: found but not executable, not found


def log_path(attempt_dir: Path, rank: int) -> Path:
    """Where a rank's stdout and stderr go."""
    return attempt_dir / "logs" / f"rank_{rank:04d}.log"


def record_path(attempt_dir: Path, rank: int) -> Path:
    """Where a rank writes how it ended."""
    return attempt_dir / "ranks" / f"rank_{rank:04d}.json"


def write_record(attempt_dir: Path, rank: int, code: int, failure: Mapping[str, Any] | None = None) -> None:
    """A rank's last act: its exit code and, when it failed, what went wrong."""
    if not attempt_dir.is_dir():
        return  # a run that was deleted meanwhile is not made again for that
    write_json(record_path(attempt_dir, rank), {"rank": rank, "code": code, "time": time.time(), **(failure or {})})


def is_machine_fault(failure: Mapping[str, Any]) -> bool:
    """Whether another attempt may go well though nothing is changed, by a `failure.json`.

    Not so where it would end the same way (an error of the code or the recipe, no memory, a full disk), nor where
    another attempt is at work already (`fenced`).
    """
    return failure.get("kind") in MACHINE


def not_executed(code: int, lines: Sequence[str]) -> str | None:
    """What says that the command in front of the ranks cannot be executed; None when that is not why they ended.

    Args:
        code: of that command; a queue may give another's.
        lines: what it printed last, no empty ones.
    """
    found = next((match[1] for line in lines if (match := _EXECVE.search(line))), None)
    if found is not None or code not in _NOT_EXECUTED:
        return found
    return lines[-1].strip() if lines else f"exit code {code}"


def last_step(attempt_dir: Path) -> int | None:
    """The last completed step that the attempt logged; None before the first."""
    step = None
    for event in read_lines(attempt_dir / "events.jsonl"):
        if isinstance(event.get("step"), int):
            step = event["step"]
    return step


def conclude(
    attempt_dir: Path,
    world_size: int,
    ended: Mapping[int, int] | None = None,
    *,
    stopping: bool = False,
    out_of_memory: bool = False,
    found: Mapping[str, Any] | None = None,
) -> int:
    """The attempt's exit code: 0, 75, 4, or 1 with `failure.json` written.

    Args:
        ended: rank → exit status as `subprocess` gives it (-9 = killed by signal 9), of ranks that ended by
            themselves, in the order in which they ended. None when the launcher cannot know: only records count.
        stopping: ranks were asked to stop, so that one ended by SIGTERM had nothing to save yet.
        out_of_memory: the kernel has ended a process for memory meanwhile.
        found: the failure for which the launcher itself ended the ranks.
    """
    if found is not None:
        write_json(attempt_dir / "failure.json", _complete(attempt_dir, dict(found)))
        return FAILED
    records = _records(attempt_dir, world_size)
    known = dict(ended) if ended is not None else {}
    codes = {rank: int(records[rank]["code"]) if rank in records else known.get(rank) for rank in range(world_size)}
    if stopping and any(codes[r] == -signal.SIGTERM for r in codes) and not any(_is_failure(c) for c in codes.values()):
        return SAVED
    if all(code in _GOOD for code in codes.values()):
        worst = {code for code in codes.values() if code is not None}
        return GUARD if GUARD in worst else SAVED if SAVED in worst else DONE
    write_json(attempt_dir / "failure.json", first_failure(attempt_dir, world_size, records, known, out_of_memory))
    return FAILED


def _is_failure(code: int | None) -> bool:
    return code is not None and code not in _GOOD and code != -signal.SIGTERM


def _records(attempt_dir: Path, world_size: int) -> dict[int, dict[str, Any]]:
    found = {}
    for rank in range(world_size):
        path = record_path(attempt_dir, rank)
        if path.exists():
            found[rank] = read_json(path)
    return found


def first_failure(
    attempt_dir: Path,
    world_size: int,
    records: Mapping[int, Mapping[str, Any]],
    ended: Mapping[int, int],
    out_of_memory: bool,
) -> dict[str, Any]:
    """Who failed first and why. A rank killed from outside comes before the ranks that only lost touch with it."""
    killed = [rank for rank, status in ended.items() if status < 0 and rank not in records]
    silent = [rank for rank, status in ended.items() if status > 0 and status not in _GOOD and rank not in records]
    failed = sorted((r for r in records.values() if r["code"] not in _GOOD), key=lambda r: r["time"])
    if killed:
        rank = killed[0]
        failure = {"rank": rank, **_killed(-ended[rank], out_of_memory)}
    elif failed:
        failure = dict(failed[0])
    elif silent:
        rank = silent[0]
        failure = {"rank": rank, "kind": "exit", "error": f"ended with exit code {ended[rank]} and no word"}
    else:
        missing = [rank for rank in range(world_size) if rank not in records]
        rank = missing[0] if missing else 0
        failure = {"rank": rank, "kind": "lost", "error": "ended without a word, most likely killed"}
    return _complete(attempt_dir, failure)


def _complete(attempt_dir: Path, failure: dict[str, Any]) -> dict[str, Any]:
    """A failure with all fields that readers of `failure.json` want."""
    failure.setdefault("step", last_step(attempt_dir))
    failure["log"] = str(log_path(attempt_dir, int(failure["rank"])))
    failure.setdefault("exit_code", FAILED)
    failure.setdefault("hints", [])
    return failure


def _killed(number: int, out_of_memory: bool) -> dict[str, Any]:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and out_of_memory:
        return {
            "kind": "memory",
            "error": "killed by the kernel: out of memory",
            "exit_code": ENVIRONMENT,
            "hints": ["a smaller `micro_batch_size`, `recompute: full` or more `tp` or `pp` lowers memory"],
        }
    if number == signal.SIGKILL:
        return {"kind": "killed", "error": "killed by SIGKILL: out of memory, or somebody's `kill -9`"}
    return {"kind": "killed", "error": f"killed by {name}"}
