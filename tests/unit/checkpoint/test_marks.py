"""A conversion that ends anywhere inside a file goes on there: the same bytes, the same facts, the same report."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.base import file_systems
from cpt.base.errors import CptError, StageFailed, StoppedAndSaved, UsageError
from cpt.checkpoint.arrays import CARRIERS, Files, Payload
from cpt.checkpoint.content import Content
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.formats import Layout, Writing
from cpt.checkpoint.job import marks, place, work
from cpt.checkpoint.job.convert import NotFinite, convert
from cpt.checkpoint.job.journal import Entry, Journal
from cpt.checkpoint.job.look import Look
from cpt.checkpoint.job.marks import Marks
from cpt.checkpoint.job.planning import Plan, Request, Running, plan
from cpt.checkpoint.job.record import Report
from cpt.checkpoint.writing import Mark, Written, blocks, read_again, write_file
from tests import made_checkpoints
from tests.made_checkpoints import LLAMA

EVERY, BLOCK = 700, 120  # bytes; rows of LLAMA have up to 88, so some are longer than a block of other dtypes
POINTS = 12  # at which each format is killed


class Killed(BaseException):
    """Stands for a kill: nobody catches it, and it comes where no mark is left for it."""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are left all the time, and nothing waits for the disk."""
    monkeypatch.setattr(work, "EVERY", EVERY)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is restarted before each look at a mark: what is written is read again."""
    boots = iter(range(10**9))
    monkeypatch.setattr(marks, "boot_id", lambda: str(next(boots)))


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """What is noted of each file, of the conversion that noted it last."""
    noted: dict[str, Entry] = {}
    before = Journal.file

    def file(self: Journal, name: str, entry: Entry) -> None:
        noted[name] = entry
        before(self, name, entry)

    monkeypatch.setattr(Journal, "file", file)
    return noted


class Blocks:
    """Counts the blocks that are looked at, and does something at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen, self.at, self.act = 0, -1, lambda: None
        look = Look.__call__

        def call(this: Look, *block: Any) -> None:
            self.seen += 1
            if self.seen == self.at:
                self.act()
            look(this, *block)

        monkeypatch.setattr(Look, "__call__", call)

    def end_at(self, at: int, act: Callable[[], None]) -> None:
        """From now on do it at the so many-th block."""
        self.seen, self.at, self.act = 0, at, act


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    return Blocks(monkeypatch)


def kill() -> None:
    raise Killed


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def said(report: Report) -> dict[str, Any]:
    """A report but for what differs from run to run."""
    found = dataclasses.asdict(report)
    for name in ("seconds", "written", "peak_memory", "out", "folder", "workers"):
        del found[name]
    return found


def odd(content: Content, *, nonfinite: bool) -> None:
    """Make some values such that there is something to find: zeros at a tensor's end, a constant, NaN at both ends."""
    files = {a.places[0].file for atom in content.atoms.values() for a in atom.states.values()}
    data = np.fromfile(file := files.pop(), np.uint8)

    def bits(name: str, state: str) -> np.ndarray[Any, Any]:
        array = content.atoms[name].states[state]
        return data[array.places[0].start :][: array.nbytes].view(CARRIERS[array.dtype])

    names = list(content.atoms)
    for name, where, value in (
        (names[0], slice(-300, None), 0.0),
        (names[-2], slice(None), 1.0),
        *(((names[1], slice(3, 5), np.nan), (names[-3], slice(-1, None), np.nan)) if nonfinite else ()),
    ):
        for state in content.atoms[name].states:
            one = bits(name, state)
            number = np.asarray([value], np.float32)
            one[where] = (number.view(np.uint32) >> 16) if one.dtype.itemsize == 2 else number
    data.tofile(file)


TARGETS = {
    "hf": Writing(dtype="float16"),
    "atom": Writing(),
    "torch_dist": Writing(layout=Layout(tp=2)),
    "dp_reshardable": Writing(optimizer="dp_reshardable", layout=Layout(dp=2)),
    "megatron": Writing(layout=Layout(tp=2), dtype="float16"),
}


def planned(target: str, folder: Path, *, nonfinite: bool = False, given: str = "atom") -> Plan:
    source = folder / "in"
    if not source.exists():
        made = made_checkpoints.content(folder / "made", LLAMA)
        odd(made, nonfinite=nonfinite)
        source = made_checkpoints.write(made, given, source)
    writing = dataclasses.replace(TARGETS[target], vocabulary_multiple=16)
    to = "torch_dist" if target == "dp_reshardable" else target
    return plan(Request(source=source, out=folder / "out", to=to, writing=writing))


def interrupted(plan: Plan, running: Running) -> bool:
    """Begin a conversion that something ends; whether it did."""
    try:
        convert(plan, running)
    except (Killed, StoppedAndSaved, StageFailed):
        return True
    return False


@pytest.mark.parametrize("restarted", [False, True], ids=["same boot", "restarted"])
@pytest.mark.parametrize("target", TARGETS)
def test_killed_at_any_block_it_ends_with_the_same_bytes_facts_and_report(
    target: str,
    restarted: bool,
    tmp_path: Path,
    passing: Blocks,
    entries: dict[str, Entry],
    request: pytest.FixtureRequest,
) -> None:
    if restarted:
        request.getfixturevalue("restarts")
    plan, running = planned(target, tmp_path), Running(block=BLOCK)
    before = said(convert(plan, running))
    wanted, noted, all_blocks = bytes_of(tmp_path / "out"), dict(entries), passing.seen
    most = 0
    for at in range(1, all_blocks + 1, max(1, all_blocks // POINTS)):
        shutil.rmtree(tmp_path / "out")
        entries.clear()
        passing.end_at(at, kill)
        assert interrupted(plan, running)
        passing.end_at(-1, kill)
        report = convert(plan, running)
        assert bytes_of(tmp_path / "out") == wanted
        assert (said(report), entries) == (before, noted)
        assert all_blocks - at < passing.seen <= all_blocks - at + 2 + EVERY // 4, "not more than since a mark again"
        most = max(most, report.bytes - report.written)
    assert most and sorted(p.name for p in tmp_path.iterdir()) == ["in", "made", "out"]


@pytest.mark.parametrize("target", TARGETS)
def test_killed_again_and_again(target: str, tmp_path: Path, passing: Blocks, entries: dict[str, Entry]) -> None:
    plan, running = planned(target, tmp_path), Running(block=BLOCK)
    before = said(convert(plan, running))
    wanted, noted, all_blocks = bytes_of(tmp_path / "out"), dict(entries), passing.seen
    shutil.rmtree(tmp_path / "out")
    passing.end_at(all_blocks // 4, kill)
    runs = 0
    while interrupted(plan, running):
        runs += 1
        passing.end_at(all_blocks // 4, kill)
    assert runs > 2 and bytes_of(tmp_path / "out") == wanted and entries == noted
    assert said(convert(plan, running))["id"] == before["id"]


def test_a_worker_that_is_killed_and_others_that_stop_go_on_where_they_were(
    tmp_path: Path, passing: Blocks, entries: dict[str, Entry]
) -> None:
    made, running = planned("megatron", tmp_path), Running(block=BLOCK, workers=2)
    before = said(convert(made, running))
    wanted, noted = bytes_of(tmp_path / "out"), dict(entries)
    shutil.rmtree(tmp_path / "out")
    parent, runs = os.getpid(), 0

    def die() -> None:
        if os.getpid() != parent:
            os._exit(9)

    for at in (40, 300, 150, 90):
        passing.end_at(at, die)
        runs += interrupted(made, running)
    passing.end_at(-1, die)
    events: list[tuple[str, Mapping[str, Any]]] = []
    report = convert(made, running, lambda kind, facts: events.append((kind, dict(facts))))
    resumed = next(facts for kind, facts in events if kind == "resumed")
    progress = [facts for kind, facts in events if kind == "progress" and facts["phase"] == "writing"]
    assert runs == 4 and resumed["begun"] and resumed["bytes"]
    assert progress[-1]["total"] == made.output.nbytes - resumed["bytes"]
    assert (bytes_of(tmp_path / "out"), entries, said(report)) == (wanted, noted, before)


def test_a_stop_loses_nothing(tmp_path: Path, passing: Blocks) -> None:
    made, running = planned("atom", tmp_path), Running(block=BLOCK)
    convert(made, running)
    wanted, all_blocks = bytes_of(tmp_path / "out"), passing.seen
    shutil.rmtree(tmp_path / "out")
    passing.end_at(200, lambda: os.kill(os.getpid(), 15))
    assert interrupted(made, running)
    passing.end_at(-1, kill)
    convert(made, running)
    assert passing.seen == all_blocks - 200 and bytes_of(tmp_path / "out") == wanted


def half_done(folder: Path, passing: Blocks, at: int = 300, **options: Any) -> tuple[Plan, Path, Path]:
    """A conversion killed inside a file; its plan, the file, the mark."""
    made = planned("atom", folder, **options)
    passing.end_at(at, kill)
    assert interrupted(made, Running(block=BLOCK, allow_nonfinite=True))
    passing.end_at(-1, kill)
    (mark,) = (folder / "out.partial" / place.MARKS).iterdir()
    return made, folder / "out.partial" / made.output.files[int(mark.stem)].name, mark


SPOILED: dict[str, Callable[[Path, Path], object]] = {
    "first byte": lambda file, mark: flip(file, 0),
    "last byte that counts": lambda file, mark: flip(file, size_of(mark) - 1),
    "shorter file": lambda file, mark: os.truncate(file, size_of(mark) - 1),
    "no file": lambda file, mark: file.unlink(),
    "empty mark": lambda file, mark: mark.write_text(""),
    "cut mark": lambda file, mark: mark.write_text(mark.read_text()[:-20]),
    "other facts": lambda file, mark: mark.write_text(mark.read_text().replace('"rounded":0', '"rounded":1')),
    "no text": lambda file, mark: mark.write_bytes(b"\xff" * 100),
    "another plan's": lambda file, mark: Marks(mark.parents[1], "x").leave(
        int(mark.stem), mark_of(100), Look(planned("atom", mark.parents[2]).content)
    ),
    "too long": lambda file, mark: rewrite(mark, size=10**9),
    "past the end": lambda file, mark: (file.write_bytes(bytes(10**6)), rewrite(mark, size=10**6)),
}


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def rewrite(mark: Path, size: int) -> None:
    made = planned("atom", mark.parents[2])
    Marks(mark.parents[1], made.id).leave(int(mark.stem), mark_of(size), Look(made.content))


def size_of(mark: Path) -> int:
    """How many bytes a mark on the disk vouches for."""
    size = json.loads(mark.read_text()[9:])["mark"]["size"]
    assert isinstance(size, int)
    return size


def mark_of(size: int) -> Mark:
    return Mark(size=size, parts=0, total=0, inside=0, crc=0, sums=())


@pytest.mark.parametrize(
    ("how", "restarted"), [*((how, True) for how in SPOILED), *((how, False) for how in SPOILED if "byte" not in how)]
)
def test_a_spoiled_file_or_mark_is_begun_anew(
    how: str, restarted: bool, tmp_path: Path, passing: Blocks, request: pytest.FixtureRequest
) -> None:
    if restarted:
        request.getfixturevalue("restarts")
    straight = planned("atom", tmp_path)
    convert(straight, Running(block=BLOCK))
    wanted = bytes_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    made, file, mark = half_done(tmp_path, passing)
    SPOILED[how](file, mark)
    report = convert(made, Running(block=BLOCK))
    assert bytes_of(tmp_path / "out") == wanted
    whole = {f.name for f in made.output.files} - {file.name}
    assert report.bytes - report.written <= sum(f.nbytes for f in made.output.files if f.name in whole)


def test_what_is_written_is_read_again_after_a_restart_or_when_asked_for(
    tmp_path: Path, passing: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def count(out: Any, folder: Path, mark: Mark, turn: Callable[[], None]) -> Any:
        read.append(mark.size)
        return read_again(out, folder, mark, turn)

    monkeypatch.setattr(work, "read_again", count)
    found = []
    monkeypatch.setattr(marks, "boot_id", lambda: "this")
    for recheck, boot, kind in (
        (False, "this", "xfs"),
        (True, "this", "xfs"),
        (False, "another", "xfs"),
        (False, None, "xfs"),
        (False, "this", "nfs4"),
        (False, "this", ""),
    ):
        made, _, _ = half_done(tmp_path, passing)
        with monkeypatch.context() as patch:
            patch.setattr(marks, "boot_id", lambda boot=boot: boot)
            patch.setattr(file_systems, "file_system", lambda path, kind=kind: kind)
            convert(made, Running(block=BLOCK, recheck=recheck))
        found.append(len(read))
        shutil.rmtree(tmp_path / "out")
    assert found == [0, 1, 2, 3, 4, 5]


def test_a_mark_of_another_release_is_no_mark(tmp_path: Path, passing: Blocks) -> None:
    made, _, mark = half_done(tmp_path, passing)
    text = json.dumps({"id": made.id, "size": 100, "crc32": 0, "seen": None})
    mark.write_text(f"{crc32(text.encode()):08x} {text}")
    assert Marks(mark.parents[1], made.id).read(int(mark.stem)) is None


@pytest.mark.parametrize("at", [60, 300, 500])
def test_nan_before_and_after_a_mark_stops_it_or_is_reported_the_same(at: int, tmp_path: Path, passing: Blocks) -> None:
    allowed = Running(block=BLOCK, allow_nonfinite=True)
    before = said(convert(planned("atom", tmp_path, nonfinite=True), allowed))
    wanted = bytes_of(tmp_path / "out")
    assert sum(f["kind"] == "nonfinite" for f in before["findings"]) >= 2
    shutil.rmtree(tmp_path / "out")
    made, _, _ = half_done(tmp_path, passing, at, nonfinite=True)
    with pytest.raises(NotFinite, match="not finite"):
        convert(made, Running(block=BLOCK))
    assert said(convert(made, allowed)) == before and bytes_of(tmp_path / "out") == wanted


def test_a_damaged_source_is_refused_by_the_run_that_reads_it_first(tmp_path: Path, passing: Blocks) -> None:
    made, _, _ = half_done(tmp_path, passing)
    source = max((tmp_path / "in").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    times = source.stat()
    flip(source, source.stat().st_size - 1)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UsageError, match="is damaged"):
        convert(made, Running(block=BLOCK))
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_takes_file_and_mark_away(tmp_path: Path, passing: Blocks) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    made, file, mark = half_done(tmp_path, passing)
    passing.end_at(20, full)
    with pytest.raises(CptError, match="not enough disk space"):
        convert(made, Running(block=BLOCK))
    assert not file.exists() and not mark.exists()
    passing.end_at(-1, full)
    assert convert(made, Running(block=BLOCK)).bytes


def test_a_dead_parent_costs_no_file(tmp_path: Path, passing: Blocks) -> None:
    def broken() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    made, file, mark = half_done(tmp_path, passing)
    passing.end_at(20, broken)
    with pytest.raises(CptError):
        convert(made, Running(block=BLOCK))
    assert file.exists() and mark.exists()


def test_what_is_kept_counts_as_room(tmp_path: Path, passing: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    made, file, mark = half_done(tmp_path, passing)
    kept = size_of(mark)
    finished = [f.nbytes for f in made.output.files if (file.parent / f.name).is_file() and f.name != file.name]
    needed = made.nbytes + made.nbytes // 100 - kept - sum(finished)
    monkeypatch.setattr(place, "free_bytes", lambda folder: needed - 1)
    with pytest.raises(CptError, match=f"{needed:,} bytes"):
        convert(made, Running(block=BLOCK))
    monkeypatch.setattr(place, "free_bytes", lambda folder: needed)
    convert(made, Running(block=BLOCK))


def test_small_files_get_no_mark(tmp_path: Path, passing: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "EVERY", 10**6)
    passing.end_at(100, kill)
    assert interrupted(planned("atom", tmp_path), Running(block=BLOCK))
    assert not (tmp_path / "out.partial" / place.MARKS).exists()


@pytest.mark.parametrize(("first", "then"), [(40, 40), (40, 4000), (4000, 40), (8, 120)])
@pytest.mark.parametrize("target", ["hf", "dp_reshardable"])
def test_values_from_any_block_on_are_the_rest_of_them(target: str, first: int, then: int, tmp_path: Path) -> None:
    made, files = planned(target, tmp_path), Files()

    def all_of(block: int, payload: Payload, start: int = 0) -> Iterator[np.ndarray[Any, Any]]:
        for values in blocks(payload, made.content, files, np.empty(block, np.uint8), start):
            yield values.copy()

    for payload in made.output.files[0].payloads[::5]:
        whole = list(all_of(first, payload))
        joined = np.concatenate(whole)
        at = 0
        for i, values in enumerate(whole):
            at += len(values)
            rest = list(all_of(then, payload, at))
            assert np.array_equal(np.concatenate([joined[:0], *rest]), joined[at:])
            if first == then:
                assert [len(v) for v in rest] == [len(v) for v in whole[i + 1 :]], "the same blocks follow"


def test_sums_of_a_file_gone_on_with_are_those_of_the_whole(tmp_path: Path) -> None:
    made, files = planned("torch_dist", tmp_path), Files()
    out = dataclasses.replace(made.output.files[0], sha256=True)
    marks: list[Mark] = []
    whole = write_file(out, made.content, tmp_path, files, block=BLOCK, after=lambda w, p: marks.append(w.mark))
    data = (tmp_path / out.name).read_bytes()
    for mark in marks[:: len(marks) // 20]:
        (tmp_path / out.name).write_bytes(data[: mark.size] + b"left over" * 1000)
        there = read_again(out, tmp_path, mark)
        assert there is not None
        assert write_file(out, made.content, tmp_path, files, block=BLOCK, there=there) == whole
        assert (tmp_path / out.name).read_bytes() == data
        assert Written.up_to(out, mark) is None, "no SHA-256 of bytes that were not read"
        (tmp_path / out.name).write_bytes(data[: mark.size] + b"left over" * 1000)
        there = Written.up_to(plain := dataclasses.replace(out, sha256=False), mark)
        assert there is not None and there.mark == mark
        sums = write_file(plain, made.content, tmp_path, files, block=BLOCK, there=there)
        assert sums == dataclasses.replace(whole, sha256=None)
        assert (tmp_path / out.name).read_bytes() == data
