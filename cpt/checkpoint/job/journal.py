"""What is finished of a conversion: `journal.jsonl`, the plan first, then a line for each file that is synced."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.files import canonical_json, read_lines, write_atomic
from cpt.checkpoint.job.place import JOURNAL, MARKS, differences
from cpt.checkpoint.job.planning import Plan
from cpt.checkpoint.writing import FileSums

NAME = JOURNAL


@dataclass(frozen=True)
class Entry:
    """A finished file.

    Args:
        facts: what was seen of its values, see `look.Facts`.
    """

    sums: FileSums
    facts: Mapping[str, Any]


@dataclass
class Journal:
    """The journal of one folder.

    Args:
        files: finished ones by name.
        checked: parts of the master test that were passed.
    """

    path: Path
    files: dict[str, Entry] = field(default_factory=dict)
    checked: set[int] = field(default_factory=set)

    def file(self, name: str, entry: Entry) -> None:
        """Note a file that is whole."""
        self._append({"file": name, **_sums_json(entry.sums), "facts": entry.facts})
        self.files[name] = entry

    def passed(self, part: int) -> None:
        """Note a part of the master test."""
        self._append({"checked": part})
        self.checked.add(part)

    def _append(self, value: Any) -> None:
        with open(self.path, "ab") as file:
            file.write(canonical_json(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def open_journal(folder: Path, plan: Plan, command: str = "") -> Journal:
    """The journal of `OUT.partial`, begun if there is none. What is said to be finished is believed by its size.

    Args:
        command: that goes on, noted for people.

    Raises:
        UsageError: the folder holds another conversion, or none.
    """
    path = folder / NAME
    head = {
        "id": plan.id,
        "to": plan.request.to,
        "source": {"format": plan.found.format, "path": str(plan.found.folder), "identity": plan.identity},
        "options": plan.options,
        "command": command,
    }
    if not path.exists():
        strange = sorted(
            p.name for p in folder.iterdir() if not p.name.startswith((".lock.json", "lock.json", ".journal", MARKS))
        )
        if strange:
            raise UsageError(
                f"`{folder}` exists and is no unfinished conversion: it holds `{strange[0]}`",
                "remove it, or name another folder",
            )
        write_atomic(path, canonical_json(head) + "\n")
        return Journal(path)
    _cut_torn_line(path)
    lines = [line for line in read_lines(path) if isinstance(line, dict)]
    if not lines or "id" not in lines[0]:
        raise UsageError(f"`{path}` is damaged", f"remove `{folder}`, and the same command begins anew")
    if lines[0]["id"] != plan.id:
        raise UsageError(
            f"`{folder}` is another unfinished conversion (id {str(lines[0]['id'])[:12]}, this one is {plan.id[:12]})",
            *differences(lines[0], plan),
            f"remove `{folder}` to begin anew, or go on with the command that began it",
        )
    journal = Journal(path)
    wanted = {f.name: f.nbytes for f in plan.output.files}
    for line in lines[1:]:
        if "checked" in line:
            journal.checked.add(int(line["checked"]))
        elif line.get("file") in wanted:
            entry = Entry(_sums(line), line["facts"])
            file = folder / plan.output.step_folder / line["file"]
            if file.is_file() and file.stat().st_size == entry.sums.size == wanted[line["file"]]:
                journal.files[line["file"]] = entry
            else:
                journal.files.pop(line["file"], None)
    return journal


def _cut_torn_line(path: Path) -> None:
    """A line that a kill cut off would swallow the beginning of the next one."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _sums_json(sums: FileSums) -> dict[str, Any]:
    return asdict(sums)


def _sums(line: Mapping[str, Any]) -> FileSums:
    return FileSums(size=line["size"], crc32=line["crc32"], payloads=tuple(line["payloads"]), sha256=line.get("sha256"))
