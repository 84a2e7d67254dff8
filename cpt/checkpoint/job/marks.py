"""How far unfinished files are: `.marks/<number of the file>.json`, so that a killed run loses seconds and not a file.

A mark says how many bytes are written, their CRC-32, and what was seen of their values. Nothing is synced for it: after
a kill the system still has what was written. After a restart of the machine, on another one, or on a network's file
system it may not: then those bytes are read again, and a file or a mark that is spoiled is begun anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.base.file_systems import is_own
from cpt.base.files import canonical_json
from cpt.base.processes import boot_id
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.job.look import Look
from cpt.checkpoint.job.place import MARKS
from cpt.checkpoint.writing import Mark

EVERY = 32 << 20  # written bytes from one mark of a file to the next; smaller files get none [bytes]


@dataclass(frozen=True)
class Left:
    """A mark as it was left.

    Args:
        seen: of the values so far, see `Look.to_json`.
        is_sure: whether this very system, not restarted since, has written the bytes to a disk of its own.
    """

    mark: Mark
    seen: Any
    is_sure: bool


@dataclass(frozen=True)
class Marks:
    """The marks of one plan.

    Args:
        partial: `OUT.partial`.
        id: of the plan.
    """

    partial: Path
    id: str

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.partial / MARKS

    def path(self, number: int) -> Path:
        """Where the mark of a file of the plan lies."""
        return self.folder / f"{number}.json"

    def leave(self, number: int, mark: Mark, look: Look) -> None:
        """Note how far a file is. Where that fails the file has its older mark, or none."""
        text = canonical_json({"id": self.id, "boot": boot_id(), "mark": asdict(mark), "seen": look.to_json()})
        path = self.path(number)
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            new = path.with_suffix(".new")
            new.write_text(f"{crc32(text.encode()):08x} {text}", encoding="utf-8")
            os.replace(new, path)

    def read(self, number: int) -> Left | None:
        """The mark of a file; None if there is none, or a damaged one, or that of another plan."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the last two: of another version
            given, text = self.path(number).read_text(encoding="utf-8").split(" ", 1)
            if int(given, 16) == crc32(text.encode()) and (value := json.loads(text))["id"] == self.id:
                mark = Mark(**{**value["mark"], "sums": tuple(value["mark"]["sums"])})
                is_same_boot = value["boot"] is not None and value["boot"] == boot_id()
                return Left(mark, value["seen"], is_same_boot and is_own(self.partial))
        return None

    def keep(self, number: int, file: Path) -> int:
        """Cut a file down to its mark, or remove both where there is no such mark; what is left of it [bytes]."""
        left = self.read(number)
        if left is not None and file.is_file() and file.stat().st_size >= left.mark.size:
            os.truncate(file, left.mark.size)
            return left.mark.size
        file.unlink(missing_ok=True)
        self.remove(number)
        return 0

    def remove(self, number: int) -> None:
        """Forget how far a file is."""
        self.path(number).unlink(missing_ok=True)
