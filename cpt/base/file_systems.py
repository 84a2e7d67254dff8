"""Which file system a path is on, and whether other machines can have it too."""

from __future__ import annotations

import re
from pathlib import Path

_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "pvfs2", "orangefs", "panfs", "wekafs", "afs")


def is_network(kind: str) -> bool:
    """Whether several machines can have a file system of a type mounted."""
    return kind == "fuse" or kind.startswith((*_NETWORK, "fuse."))


def is_own(path: Path) -> bool:
    """Whether a path is on a file system that no other machine has; no where that cannot be known."""
    kind = file_system(path)
    return bool(kind) and not is_network(kind)


def file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that a path is or would be on; empty when it cannot be known.

    Args:
        mounts: as in /proc/self/mountinfo; None = this machine's.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
        except OSError:
            return ""
        path = path.resolve()
    best, kind = -1, ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        words = left.split()
        if len(words) < 5 or not right:
            continue
        place = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), words[4])
        if path.is_relative_to(place) and len(place) >= best:  # of several at one place the last one counts
            best, kind = len(place), right.split()[0]
    return kind
