"""What a worker does: a part of the master test, a whole file, a file read again. Results are plain JSON."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.base.errors import StageFailed, UsageError
from cpt.checkpoint import master
from cpt.checkpoint.arrays import Files, Payload, Place, itemsize
from cpt.checkpoint.content import MAIN, MODEL, Content
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.job.look import Look, is_rounded
from cpt.checkpoint.job.marks import EVERY, Marks
from cpt.checkpoint.job.planning import Plan, Running
from cpt.checkpoint.writing import Written, read_again, write_file

_PART = 256 << 20  # of the source, read in one part of the master test [bytes]
_READ = 8 << 20
CHECK, WRITE, REREAD = "check", "write", "reread"
Tell = Callable[[int, str], None]  # bytes done since the last call, name of the tensor; may raise to stop


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Args:
        kind: check (part `number` of the master test) | write | reread (file `number` of the plan).
        size: bytes it goes through.
    """

    kind: str
    number: int
    size: int


def check_parts(content: Content) -> int:
    """Into how many parts the master test is cut: it does not depend on the number of workers."""
    sizes = [
        array.nbytes
        for atom in content.atoms.values()
        for states in (atom.states, atom.pad)
        if MAIN in states and MODEL in states
        for array in (states[MAIN], states[MODEL])
    ]
    return min(64, max(1, sum(sizes) // _PART)) if sizes else 0


class Worker:
    """Does tasks of one plan. Made before workers are forked: they share what it has worked out.

    Args:
        folder: that the plan's files are relative to.
        marks: how far unfinished files are.
    """

    def __init__(self, plan: Plan, running: Running, folder: Path, marks: Marks) -> None:
        self.plan, self.running, self.folder, self.marks = plan, running, folder, marks
        self.parts = check_parts(plan.content)
        self.sums = SourceSums(plan)
        self.files = Files()

    def do(self, task: Task, tell: Tell) -> dict[str, Any]:
        """Do one task.

        Raises:
            UsageError: the source is not what it should be.
            OSError: the disk is full, or a file cannot be written.
        """
        if task.kind == CHECK:
            return self._check(task, tell)
        if task.kind == REREAD:
            return self._reread(task, tell)
        return self._write(task, tell)

    def _check(self, task: Task, tell: Tell) -> dict[str, Any]:
        wrong = master.check(self.plan.content, self.files, part=task.number, parts=self.parts)
        for w in wrong:  # damaged bytes are the better explanation
            self.sums.verify_atom(w.atom, self.files)
        tell(task.size, "main weights")
        return {"wrong": [asdict(w) for w in wrong]}

    def _write(self, task: Task, tell: Tell) -> dict[str, Any]:
        out = self.plan.output.files[task.number]
        look, there = self._begun(task.number, lambda: tell(0, out.name))
        kept = told = marked = there.size if there else 0
        before = self.files.rounded - look.facts.rounded

        def begin(payload: Payload, first: int) -> None:
            self.files.count_rounded = is_rounded(payload, self.plan.content)
            if first:  # what it reads was verified by the run that began it
                look.skip(payload, first)
            else:
                self.sums.verify_payload(payload, task.number, self.files)

        def leave(written: Written) -> None:
            nonlocal marked
            if out.nbytes >= EVERY and written.size > marked:
                marked = written.size
                look.facts.rounded = self.files.rounded - before
                self.marks.leave(task.number, written.mark, look)

        def after(written: Written, payload: Payload | None) -> None:
            nonlocal told
            size, told = written.size - told, written.size
            try:
                tell(size, payload.name if payload else "")
            except BaseException:
                leave(written)
                raise
            if payload is None or written.size - marked >= EVERY:
                leave(written)

        try:
            sums = write_file(
                out,
                self.plan.content,
                self.folder,
                self.files,
                block=self.running.block,
                begin=begin,
                watch=look,
                after=after,
                there=there,
            )
        except BrokenPipeError:
            raise  # the parent is dead, and nothing wrong with the file
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(self.folder / out.name)  # its room may be what the next run needs
                self.marks.remove(task.number)
            error.filename = error.filename or str(self.folder / out.name)
            raise
        look.facts.rounded = self.files.rounded - before
        return {"file": out.name, "sums": asdict(sums), "facts": look.facts.to_json(), "kept": kept}

    def _begun(self, number: int, turn: Callable[[], None]) -> tuple[Look, Written | None]:
        """What an earlier run has seen and written of a file, if that can be gone on with."""
        out, left = self.plan.output.files[number], self.marks.read(number)
        there = None
        if left is not None:
            if left.is_sure and not self.running.recheck:
                there = Written.up_to(out, left.mark)
            there = there or read_again(out, self.folder, left.mark, turn)
        if left is None or there is None:
            return Look(self.plan.content), None
        return Look.from_json(self.plan.content, left.seen), there

    def _reread(self, task: Task, tell: Tell) -> dict[str, Any]:
        name = self.plan.output.files[task.number].name
        return {"file": name, "crc32": crc32_from_disk(self.folder / name, lambda n: tell(n, name))}


def crc32_from_disk(path: Path, tell: Callable[[int], None] = lambda size: None) -> int:
    """CRC-32 of a file, read from the disk and not from memory where the system lets us ask for that."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(_READ)
        view = memoryview(buffer)
        while size := file.readinto(buffer):
            value = crc32(view[:size], value)
            tell(size)
    return value


class SourceSums:
    """The checksums that the source's format carries; each is verified once, when its values are first read.

    Args:
        plan: whose files own the stretches that are summed: the first payload that reads of one verifies it.
    """

    def __init__(self, plan: Plan) -> None:
        self.content = plan.content
        self._stretches = {file: sorted(found) for file, found in plan.content.crc32.items()}
        self._starts = {file: [s[0] for s in found] for file, found in self._stretches.items()}
        self._owned: dict[tuple[int, str, str], list[tuple[str, int]]] = {}
        if self._stretches:
            self._share_out(plan)

    @property
    def count(self) -> int:
        """How many stretches are verified by a whole conversion."""
        return sum(len(owned) for owned in self._owned.values())

    def _share_out(self, plan: Plan) -> None:
        seen: set[tuple[str, int]] = set()
        read: set[tuple[str, str, bool]] = set()
        for number, out in enumerate(plan.output.files):
            for payload in out.payloads:
                mine = []
                for segment in payload.segments:
                    for f in segment.fills:
                        if f.atom is None or (f.atom, payload.state, f.pad) in read:
                            continue
                        read.add((f.atom, payload.state, f.pad))
                        array = self.content.array(f.atom, payload.state, f.pad)
                        mine += [s for s in self._of(array.places, array.dtype) if s not in seen]
                        seen.update(mine)
                if mine:
                    self._owned.setdefault((number, payload.name, payload.state), []).extend(mine)

    def _of(self, places: Iterable[Place], dtype: str) -> Iterator[tuple[str, int]]:
        """(file, number of the stretch) that places lie in."""
        size = itemsize(dtype)
        found: dict[tuple[str, int], None] = {}
        for p in places:
            starts = self._starts.get(p.file)
            if not starts:
                continue
            rows, columns = (p.columns, p.rows) if p.transposed else (p.rows, p.columns)
            end = p.start + (rows - 1) * p.stride + columns * size
            first = max(0, bisect_right(starts, p.start) - 1)
            for i in range(first, bisect_right(starts, end - 1)):
                start, length, _ = self._stretches[p.file][i]
                if start < end and p.start < start + length:
                    found[p.file, i] = None
        return iter(found)

    def verify_payload(self, payload: Payload, number: int, files: Files) -> None:
        """Verify what a payload of file `number` is the first to read.

        Raises:
            UsageError: bytes of the source are not what was written.
        """
        for file, i in self._owned.get((number, payload.name, payload.state), ()):
            self._verify(file, i, payload.name, files)

    def verify_atom(self, atom: str, files: Files) -> None:
        """Verify everything that an atom is read from.

        Raises:
            UsageError: as `verify_payload`.
        """
        one = self.content.atoms[atom]
        for states in (one.states, one.pad):
            for array in states.values():
                for file, i in self._of(array.places, array.dtype):
                    self._verify(file, i, atom, files)

    def _verify(self, file: str, number: int, tensor: str, files: Files) -> None:
        start, length, wanted = self._stretches[file][number]
        data = memoryview(files.map(file))
        if start + length > len(data):
            raise UsageError(f"`{file}` has {len(data):,} bytes, {start + length:,} are needed: the file was cut off")
        value = 0
        for at in range(start, start + length, _READ):
            value = crc32(data[at : min(at + _READ, start + length)], value)
        data.release()
        if value != wanted:
            raise UsageError(
                f"`{file}` is damaged: bytes {start:,} to {start + length:,} have the checksum {value:08x} instead of "
                f"{wanted:08x}; `{tensor}` lies in them",
                "take another copy of the checkpoint, or an earlier step",
            )


def not_as_written(path: Path, found: int, wanted: int) -> StageFailed:
    """The error for a written file that reads back as something else."""
    return StageFailed(
        f"`{path}` reads back with checksum {found:08x} instead of {wanted:08x}: the disk or the memory is faulty",
        "remove the file, and the same command writes it again",
    )
