"""Where a conversion goes: whether it may, whether it fits, and whether it is there already."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from cpt.base.errors import CptError, EnvironmentProblem, UsageError
from cpt.base.files import read_json, read_lines
from cpt.base.units import show_bytes
from cpt.checkpoint.find import PARTIAL
from cpt.checkpoint.job.planning import Plan

JOURNAL = "journal.jsonl"  # of `OUT.partial`
MARKS = ".marks"  # of `OUT.partial`
KEY = "conversion"  # of the manifest
FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


def partial(out: Path) -> Path:
    """`OUT.partial`, where everything is written until it is whole."""
    return out.with_name(out.name + PARTIAL)


def check_names(plan: Plan) -> None:
    """Whether the file system holds such names.

    Raises:
        UsageError: one is too long.
    """
    out = plan.request.out.absolute()
    if not out.name:
        raise UsageError(f"`{plan.request.out}` names no folder")
    there = existing_parent(out)
    try:
        longest, whole = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
    except (OSError, ValueError):
        longest, whole = 255, 4096
    folder = partial(out) / plan.output.step_folder
    for name in [f.name for f in plan.output.files] + list(plan.output.copies):
        path = folder / name
        for part in path.relative_to(there).parts:
            if len(os.fsencode(part)) > longest:
                raise UsageError(
                    f"name too long: `{part[:60]}…` has {len(os.fsencode(part)):,} bytes, {longest} are possible",
                    f"while it is written the folder is called `NAME{PARTIAL}`",
                )
        if len(os.fsencode(path)) >= whole:
            raise UsageError(f"path too long: `{name}` in `{out.name[:60]}…` has more than {whole:,} bytes")


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    for folder in path.absolute().parents:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UsageError(f"`{folder}` is a file, so `{path}` cannot be made")
    return Path("/")


def done_already(plan: Plan) -> bool:
    """Whether OUT holds this very conversion.

    Raises:
        UsageError: OUT is there and holds something else.
    """
    out = plan.request.out
    if not os.path.lexists(out):
        return False
    record = read_record(out, plan)
    if out == Path():  # as an empty word is, too
        raise UsageError("OUT is empty, or this very folder", "name a folder that is not there yet")
    if record is None:
        raise UsageError(f"`{out}` exists already", "name another folder, or remove it first")
    if record.get("id") != plan.id:
        raise UsageError(
            f"`{out}` holds another conversion (id {str(record.get('id'))[:12]}, this one would be {plan.id[:12]})",
            *differences(record, plan),
            "name another folder, or remove it first",
        )
    return True


def clear_other(plan: Plan) -> None:
    """Remove what another conversion made or began at OUT, for a caller that owns OUT and has changed its mind."""
    out, begun = plan.request.out, partial(plan.request.out)
    record = read_record(out, plan)
    if os.path.lexists(out) and (record is None or record.get("id") != plan.id):
        shutil.rmtree(out)
    head = next(read_lines(begun / JOURNAL), None) if (begun / JOURNAL).is_file() else None
    if begun.is_dir() and (not isinstance(head, dict) or head.get("id") != plan.id):
        shutil.rmtree(begun)


def read_record(out: Path, plan: Plan) -> dict[str, Any] | None:
    """What OUT was converted from; None when it does not say."""
    try:
        record = read_json(out / plan.output.step_folder / plan.output.manifest)[KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) else None


def differences(before: dict[str, Any], plan: Plan) -> list[str]:
    """How a conversion that was begun before differs from this one, one line each."""
    found = []
    if before.get("to") != plan.request.to:
        found.append(f"that one is to `{before.get('to')}`")
    options = before.get("options")
    old = options if isinstance(options, dict) else {}
    for name in sorted({*old, *plan.options}):
        if old.get(name) != plan.options.get(name):
            found.append(
                f"`{name}` is `{old.get(name, 'not given')}` there, `{plan.options.get(name, 'not given')}` here"
            )
    source = before.get("source")
    if isinstance(source, dict) and source.get("identity") != plan.identity:
        found.append("that one is from other files, or they have changed since")
    return found


def check_space(plan: Plan, done: int) -> None:
    """Whether the disk has room for what is still to be written, and 1 % more.

    Args:
        done: bytes of files that are finished already.

    Raises:
        EnvironmentProblem: it has not.
    """
    folder = existing_parent(partial(plan.request.out) / "x")
    free = free_bytes(folder)
    needed = plan.nbytes + plan.nbytes // 100 - done
    if needed > free:
        raise no_space(plan.request.out, needed, free)


def free_bytes(folder: Path) -> int:
    """Free space of a folder's file system [bytes]."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def no_space(out: Path, needed: int, free: int, *hints: str) -> EnvironmentProblem:
    """The error of a full disk.

    Args:
        needed, free: [bytes].
    """
    return EnvironmentProblem(
        f"not enough disk space for `{out}`: {needed:,} bytes ({show_bytes(needed)}) needed, {free:,} "
        f"({show_bytes(free)}) free",
        *hints,
    )


def closed(out: Path, error: OSError) -> CptError:
    """The error of a folder that cannot be written."""
    if error.errno in _CLOSED:
        why = "the file system is read-only" if error.errno == errno.EROFS else "writing there is not permitted"
        return EnvironmentProblem(f"`{out}` cannot be written: {why}", "name a folder elsewhere")
    if error.errno == errno.ENAMETOOLONG:
        return UsageError(f"name too long: `{str(out)[:80]}…`")
    return EnvironmentProblem(f"`{out}` cannot be written: {error.strerror or error}")
