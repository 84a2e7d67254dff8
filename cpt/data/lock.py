"""Things built once in a shared cache: whole or absent, and by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cpt.base.errors import EnvironmentProblem
from cpt.base.files import fsync_folder


@contextlib.contextmanager
def building(
    root: Path, name: str, whole: Callable[[Path], bool] = Path.exists, waiting: Callable[[], None] | None = None
) -> Iterator[Path | None]:
    """Hold the right to build `root/name`: gives an empty folder beside it to build in, or None if it exists by then.

    The right ends with the process, however it ends; what a killed one left is removed by the next.

    Args:
        root: folder that holds such things.
        name: of the thing.
        whole: tells whether what lies there can be used; what cannot is removed.
        waiting: called when another process is building it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if waiting:
                waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        if whole(root / name):
            yield None
            return
        shutil.rmtree(root / name, ignore_errors=True)
        for left in root.glob(f".{name}.part-*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = root / f".{name}.part-{os.getpid()}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Give a finished folder its name."""
    fsync_folder(folder)
    os.rename(folder, target)
    fsync_folder(target.parent)


@contextlib.contextmanager
def writing(cache: str | Path) -> Iterator[None]:
    """Turn a full or closed disk under the cache into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                f"no space left in the cache `{cache}`", "free some, or set `CPT_CACHE` to a folder on another disk"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise EnvironmentProblem(
                f"cannot write to the cache `{cache}`: {(error.strerror or '').lower()}",
                "set `CPT_CACHE` to a folder of yours",
            ) from None
        raise
