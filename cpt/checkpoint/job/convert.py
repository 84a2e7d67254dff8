"""Does a planned conversion, from the first check to the renamed folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpt.base import lock
from cpt.base.errors import CptError, StoppedAndSaved, UsageError
from cpt.base.files import fsync_folder
from cpt.checkpoint import average, find, master, store
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.formats import FORMATS
from cpt.checkpoint.job import crew, place
from cpt.checkpoint.job.crew import Stop, Stopped, Told
from cpt.checkpoint.job.journal import NAME as JOURNAL
from cpt.checkpoint.job.journal import Entry, Journal, open_journal
from cpt.checkpoint.job.look import Facts, findings
from cpt.checkpoint.job.marks import Marks
from cpt.checkpoint.job.planning import Plan, Running, state_of_files
from cpt.checkpoint.job.record import (
    OWN,
    Report,
    done_report,
    dropped,
    own_manifest,
    record,
    state_id,
    weights_from,
    with_record,
)
from cpt.checkpoint.job.work import CHECK, REREAD, WRITE, Task, Worker, crc32_from_disk, not_as_written
from cpt.checkpoint.writing import FileSums

Event = Callable[[str, Mapping[str, Any]], None]
_BEAT_SECONDS = 20.0
_COPY = 8 << 20


class NotFinite(UsageError):
    """NaN or infinite values; what was written is good but for that."""


def convert(
    plan: Plan,
    running: Running = Running(),  # noqa: B008 (frozen)
    event: Event = lambda kind, facts: None,
    command: str = "a conversion",
) -> Report:
    """Write the folder, or go on with it where an earlier run stopped. OUT is whole or not there.

    Args:
        event: called with `progress` (phase, done, total [bytes], tensor), `file` (name, size, files done and in all),
            `resumed` (files finished and begun, of, bytes), `taken_over` (who).
        command: for people who find the lock, or what it left unfinished.

    Raises:
        UsageError: OUT is something else; the source is damaged, holds NaN, or its optimizer is not its model's.
        EnvironmentProblem: the disk is full or cannot be written. What is finished is kept.
        StoppedAndSaved: a signal asked for a stop; the same command goes on.
    """
    begin = time.monotonic()
    out = plan.request.out
    place.check_names(plan)
    if place.done_already(plan, verify=running.verify):
        _tidy(out, plan)
        return done_report(plan)
    folder = place.partial(out)
    if not folder.exists():
        place.check_space(plan, 0)
    held = _take(folder, out, command, event)
    try:
        if place.done_already(plan):  # another process has finished it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            return done_report(plan)
        return _Job(plan, running, event, held, begin, command).work()
    except OSError as error:
        raise place.closed(out, error) from error
    finally:
        if folder.is_dir():
            held.release()
            _remove_lock_files(folder)


def _take(folder: Path, out: Path, command: str, event: Event) -> lock.Lock:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held, dead = lock.take(
            folder, lock.holder_of(os.getpid(), command), "wait for it, or stop it; then the same command goes on"
        )
    except OSError as error:
        raise place.closed(out, error) from None
    if dead is not None:
        event("taken_over", {"who": dead.text()})
    return held


class _Job:
    """One run of a conversion, with the lock held."""

    def __init__(self, plan: Plan, running: Running, event: Event, held: lock.Lock, begin: float, command: str) -> None:
        self.command = command
        self.plan, self.running, self.event, self.held, self.begin = plan, running, event, held, begin
        self.out, self.partial = plan.request.out, place.partial(plan.request.out)
        self.folder = self.partial / plan.output.step_folder
        self.stop = Stop()
        self.marks = Marks(self.partial, plan.id)
        self.worker = Worker(plan, running, self.folder, self.marks)
        self.facts = Facts()
        self.done = self.total = self.written = 0
        self.phase, self.last_beat = "", time.monotonic()
        self.used = 1  # processes at a time
        self.wrong: list[master.Wrong] = []
        self.told = Told(self._progress, self._result, self._tick)
        self.journal: Journal
        self.kept: dict[int, int] = {}  # of files that an earlier run began, by number [bytes]

    def work(self) -> Report:
        self.journal = open_journal(self.partial, self.plan, self.command)
        try:
            with crew.signals(self.stop):
                self._resume()
                self._check()
                self._write()
                sums = self._finish()
                if self.running.verify:
                    self._reread(sums)
                self.stop.check()
            self._refuse_changed()
            self._rename()
        except Stopped:
            files, of = len(self.journal.files), len(self.plan.output.files)
            raise StoppedAndSaved(
                f"stopped; {files:,} of {of:,} files are finished in `{self.partial}`", "the same command goes on"
            ) from None
        except OSError as error:
            if error.errno in place.FULL:
                raise self._full() from None
            raise
        except NotFinite:
            raise
        except UsageError:
            shutil.rmtree(self.partial, ignore_errors=True)  # nothing of it can be used
            raise
        return self._report(sums)

    def _resume(self) -> None:
        """What an earlier run finished is kept, and of what it left half-written all that a mark vouches for."""
        files = self.plan.output.files
        for number, file in enumerate(files):
            if file.name not in self.journal.files:
                self.kept[number] = self.marks.keep(number, self.folder / file.name)
        if self.running.recheck and self.journal.files:
            self._crc_tasks("checking again", self._recheck)
        finished, begun = self.journal.files, sum(size > 0 for size in self.kept.values())
        size = sum(e.sums.size for e in finished.values()) + sum(self.kept.values())
        if finished or begun:
            self.event("resumed", {"files": len(finished), "begun": begun, "of": len(files), "bytes": size})
        for entry in finished.values():
            self.facts.add(Facts.from_json(entry.facts))
        self._refuse_nonfinite()
        place.check_space(self.plan, size)

    def _crc_tasks(self, phase: str, compare: Callable[[str, int], None]) -> None:
        """Read finished files again."""
        files = self.plan.output.files
        tasks = [
            Task(REREAD, i, self.journal.files[f.name].sums.size)
            for i, f in enumerate(files)
            if f.name in self.journal.files
        ]
        self.compare = compare
        self._run(phase, tasks)

    def _recheck(self, name: str, crc32: int) -> None:
        if crc32 != self.journal.files[name].sums.crc32:
            del self.journal.files[name]
            (self.folder / name).unlink(missing_ok=True)

    def _check(self) -> None:
        """The master test."""
        parts = self.worker.parts
        if len(self.journal.checked) < parts:
            size = self._compared_bytes() // parts
            tasks = [Task(CHECK, i, size) for i in range(parts) if i not in self.journal.checked]
            self._run("comparing main weights", tasks)
        if self.wrong:
            raise master.refuse(self.plan.content, self.wrong)

    def _compared_bytes(self) -> int:
        atoms = self.plan.content.atoms.values()
        return sum(a.states[s].nbytes for a in atoms for s in ("fp32", "model") if {"fp32", "model"} <= {*a.states})

    def _write(self) -> None:
        files = self.plan.output.files
        tasks = [
            Task(WRITE, i, f.nbytes - self.kept.get(i, 0))
            for i, f in enumerate(files)
            if f.name not in self.journal.files
        ]
        self._run("writing", tasks)

    def _run(self, phase: str, tasks: list[Task]) -> None:
        self.phase, self.done, self.total = phase, 0, sum(t.size for t in tasks)
        self.used = max(self.used, min(self.running.workers, len(tasks)))
        crew.run(tasks, self.running.workers, self.worker.do, self.told, self.stop)

    def _progress(self, size: int, tensor: str) -> None:
        self.done += size
        if tensor:
            facts = {"phase": self.phase, "done": min(self.done, self.total), "total": self.total, "tensor": tensor}
            self.event("progress", facts)

    def _result(self, task: Task, result: Mapping[str, Any]) -> None:
        if task.kind == CHECK:
            found = [master.Wrong(**w) for w in result["wrong"]]
            self.wrong += found
            if not found:
                self.journal.passed(task.number)
        elif task.kind == REREAD:
            self.compare(result["file"], result["crc32"])
        else:
            given = result["sums"]
            entry = Entry(FileSums(**{**given, "payloads": tuple(given["payloads"])}), result["facts"])
            self.journal.file(result["file"], entry)
            self.marks.remove(task.number)
            self.written += entry.sums.size - result["kept"]
            self.facts.add(Facts.from_json(entry.facts))
            finished = {"name": result["file"], "size": entry.sums.size, "crc32": f"{entry.sums.crc32:08x}"}
            self.event("file", {**finished, "done": len(self.journal.files), "of": len(self.plan.output.files)})
            self._refuse_nonfinite()

    def _refuse_nonfinite(self) -> None:
        if self.running.allow_nonfinite or not self.facts.nonfinite:
            return
        found = [f for f in findings(self.facts, self.plan.content) if f.kind == "nonfinite"]
        texts = [
            f"`{f.tensor}`: {f.count:,} {'value is' if f.count == 1 else 'values are'} NaN or infinite, "
            f"the first at {list(f.first)}"
            for f in found
        ]
        finished, of = len(self.journal.files), len(self.plan.output.files)
        rest = [] if finished == of else [f"{of - finished:,} of {of:,} files were not looked at yet"]
        hints = [*texts[1:5], *([f"and in {len(texts) - 5:,} more tensors"] if len(texts) > 5 else []), *rest]
        if self.plan.members:
            raise UsageError(f"{self._not_finite()} values that are not finite; {texts[0]}", *hints)
        raise NotFinite(
            f"`{self.plan.found.folder}` holds values that are not finite; {texts[0]}",
            *hints,
            f"`--allow-nonfinite` converts them as they are, and goes on with `{self.partial}`",
        )

    def _not_finite(self) -> str:
        """The members of an average whose values are NaN or infinite where it is, and the verb."""
        places = [(atom, row, column, pad) for ((atom, _, pad), _), (_, row, column) in self.facts.nonfinite.items()]
        files = Files()
        found = [
            f"`{c.path}`"
            for c in self.plan.members
            if not all(average.is_finite(c, atom, row, column, files, pad=pad) for atom, row, column, pad in places)
        ]
        return f"{' and '.join(found) or 'the average'} {'hold' if len(found) > 1 else 'holds'}"

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self.last_beat > _BEAT_SECONDS:
            self.last_beat = now
            self.held.beat()

    def _finish(self) -> dict[str, FileSums]:
        """Copies and small files. They are written anew by every run."""
        self.phase = "finishing"
        output = self.plan.output
        sums = {f.name: self.journal.files[f.name].sums for f in output.files}
        for name, source in output.copies.items():
            self.stop.check()
            sums[name] = _copy(source, self.folder / name)
            self.written += sums[name].size
        made = dict(output.finish(sums))
        value = record(self.plan, self.facts, checksums=self.worker.sums.count, compared=bool(self.worker.parts))
        if output.manifest in made:
            made[output.manifest] = with_record(made[output.manifest], value)
        else:
            assert output.manifest == OWN, output.manifest
            others = sums | {name: _sums(data) for name, data in made.items()}
            made = {OWN: own_manifest(value, others), **made}  # first: the format's own last file stays the last
        for name, data in made.items():
            _write_synced(self.folder / name, data)
            sums[name] = _sums(data)
            self.written += len(data)
        return sums

    def _reread(self, sums: Mapping[str, FileSums]) -> None:
        """Everything once more from the disk, and the folder opened as anybody will open it."""

        def compare(name: str, found: int) -> None:
            if found != sums[name].crc32:
                raise not_as_written(self.folder / name, found, sums[name].crc32)

        self._crc_tasks("reading again", compare)
        for name in sums:
            if name not in self.journal.files:
                compare(name, crc32_from_disk(self.folder / name))
        FORMATS.get(self.plan.request.to).open(self.folder, self.plan.request.reading)

    def _refuse_changed(self) -> None:
        """A source that was written to meanwhile: nobody knows which of its states was read."""
        for folder, state in self.plan.sources.items():
            if state_of_files(folder) != state:
                raise UsageError(f"`{folder}` has changed while it was read", "wait until nobody writes to it")

    def _rename(self) -> None:
        """Make the folder appear under its name, whole and synced."""
        if step := self.plan.output.step_folder:
            word = step.removeprefix("iter_").lstrip("0") or "0" if step.startswith("iter_") else step
            _write_synced(self.partial / store.TRACKER, word.encode())
        for temporary in (*self.partial.glob(".lock.json.*"), *self.partial.glob(f".{JOURNAL}.*")):
            temporary.unlink(missing_ok=True)
        if self.marks.folder.is_dir():
            shutil.rmtree(self.marks.folder)
        for root, _, _ in os.walk(self.partial):
            fsync_folder(root)
        os.rename(self.partial, self.out)
        fsync_folder(self.out.absolute().parent)
        lock.Lock(self.out, self.held.holder).release()
        _tidy(self.out, self.plan)

    def _full(self) -> CptError:
        finished = sum(e.sums.size for e in self.journal.files.values())
        left = [self.marks.read(i) for i, f in enumerate(self.plan.output.files) if f.name not in self.journal.files]
        finished += sum(one.mark.size for one in left if one)
        needed = self.plan.nbytes + self.plan.nbytes // 100 - finished
        return place.no_space(
            self.out,
            needed,
            place.free_bytes(self.partial),
            f"what is finished is kept in `{self.partial}`: make room, and the same command goes on",
        )

    def _report(self, sums: Mapping[str, FileSums]) -> Report:
        return Report(
            id=self.plan.id,
            state=state_id(self.plan),
            out=self.out,
            folder=self.out / self.plan.output.step_folder,
            files=len(sums),
            bytes=sum(s.size for s in sums.values()),
            written=self.written,
            seconds=time.monotonic() - self.begin,
            peak_memory=max([*self.told.peaks, crew.anonymous_memory()]),
            workers=self.used,
            tensors=len(self.plan.content.atoms),
            rounded=self.facts.rounded,
            weights=weights_from(self.plan),
            dropped=dropped(self.plan),
            findings=tuple(findings(self.facts, self.plan.content)),
            checksums=self.worker.sums.count,
            compared=bool(self.worker.parts),
            reread=self.running.verify,
        )


def _copy(source: Path, target: Path) -> FileSums:
    """Copy and sync a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size = crc = 0
    with open(source, "rb") as reading, open(target, "wb") as writing:
        while data := reading.read(_COPY):
            crc = crc32(data, crc)
            size += len(data)
            writing.write(data)
        writing.flush()
        os.fsync(writing.fileno())
    return FileSums(size=size, crc32=crc)


def _write_synced(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sums(data: bytes) -> FileSums:
    return FileSums(size=len(data), crc32=crc32(data))


def _tidy(out: Path, plan: Plan) -> None:
    """Remove what a run that was killed right after the renaming left in OUT."""
    journal = out / JOURNAL
    if journal.is_file() and plan.id.encode() in journal.read_bytes()[:10_000]:
        journal.unlink()
    if lock.live_holder(out) is None:
        (out / lock.NAME).unlink(missing_ok=True)
        _remove_lock_files(out)


def _remove_lock_files(folder: Path) -> None:
    """The file by which two processes that take a lock wait for each other, and an empty folder that held only it."""
    own = folder / f".{lock.NAME}"
    if own.is_file() and not (folder / lock.NAME).exists():
        own.unlink(missing_ok=True)
    if folder.name.endswith(find.PARTIAL) and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
