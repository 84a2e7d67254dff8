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
from cpt.checkpoint.sums import damages

JOURNAL = "journal.jsonl"  # of `OUT.partial`
MARKS = ".marks"  # of `OUT.partial`
KEY = "conversion"  # of the manifest
FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


# Options that a person gives under another name.
_FLAGS = {
    "layers": "--pipeline-layout",
    "bucket_numel": "--bucket-size",
    "file_bytes": "--file-size",
    "first_replica": "--replicas first",
    "keep_padding": "--pad keep",
    "vocabulary_multiple": "padding of the vocabulary",
}


def partial(out: Path) -> Path:
    """`OUT.partial`, where everything is written until it is whole."""
    return out.parent / (out.name + PARTIAL)  # `with_name` refuses `/`


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


def check_writable(out: Path) -> None:
    """Whether the folder that OUT is to lie in can be written, as far as permissions say it.

    Raises:
        EnvironmentProblem: it cannot.
    """
    if not os.access(existing_parent(out), os.W_OK | os.X_OK):
        raise closed(out, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def unfinished(folder: Path) -> str | None:
    """What a folder of an unfinished conversion is, in one phrase; None for any other folder.

    Args:
        folder: OUT, whose `OUT.partial` is looked at while OUT is not there, or that folder itself.
    """
    begun = folder if folder.name.endswith(PARTIAL) else partial(folder)
    if not (begun / JOURNAL).is_file() or (begun != folder and os.path.lexists(folder)):
        return None
    head = next(read_lines(begun / JOURNAL), None)
    source = head.get("source") if isinstance(head, dict) else None
    of = f" of `{source['path']}`" if isinstance(source, dict) and "path" in source else ""
    command = head.get("command") if isinstance(head, dict) else None
    goes_on = f"`{command}`" if str(command).startswith("cpt ") else "the command that began it"
    return f"an unfinished conversion{of}: {goes_on} goes on with it"


def done_already(plan: Plan, *, verify: bool = False) -> bool:
    """Whether OUT holds this very conversion.

    Args:
        verify: every byte of it is read; else sizes, and the bytes of small files.

    Raises:
        UsageError: OUT is there and holds something else, or is damaged.
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
    folder = out / plan.output.step_folder
    if wrong := damages(folder, values=verify):
        raise UsageError(
            f"`{folder}` holds this conversion, and it is damaged: {wrong[0]}",
            *([f"and {len(wrong) - 1:,} more files"] if len(wrong) > 1 else []),
            f"remove `{out}`, and the same command makes it anew",
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
    for name in sorted({*old, *plan.options} - {"average"}):
        there, here = (_shown(given.get(name)) for given in (old, plan.options))
        if there != here:
            found.append(f"`{_FLAGS.get(name, '--' + name.replace('_', '-'))}` is {there} there, {here} here")
    source, before_of, of = before.get("source"), old.get("average"), plan.options.get("average")
    if before_of != of:
        what = "an average of other checkpoints, or with other weights" if of else "an average"
        found.append(f"that one is {what if before_of else 'no average'}")
    elif isinstance(source, dict) and source.get("identity") != plan.identity:
        found.append("that one is from other files, or they have changed since")
    return found


def _shown(value: Any) -> str:
    """An option's value as a person gives it."""
    if value is None:
        return "not given"
    return f"`{','.join(map(str, value))}`" if isinstance(value, list | tuple) else f"`{value}`".replace("True", "on")


def check_space(plan: Plan, done: int) -> None:
    """Whether the disk has room for what is still to be written, and 1 % more.

    Args:
        done: bytes of files that are finished already.

    Raises:
        EnvironmentProblem: it has not.
    """
    folder = existing_parent(partial(plan.request.out) / "x")
    if os.statvfs(folder).f_blocks == 0:  # a file system that does not say
        return
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
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and isinstance(error.filename, str | Path):
        return UsageError(f"`{error.filename}` is there and is no folder", "move it away, or name another output")
    return EnvironmentProblem(f"`{out}` cannot be written: {error.strerror or error}")
