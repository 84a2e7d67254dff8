"""Checks of a checkpoint: its files are what was written, and its optimizer's main weights are its model's weights."""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.units import show_bytes
from cpt.checkpoint import master, store, windows
from cpt.checkpoint.arrays import CARRIERS, Array, Files, Place, as_matrix, crossing, itemsize, rectangles
from cpt.checkpoint.content import MAIN, MODEL, Atom, Content
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.formats import Reading
from cpt.checkpoint.sums import Sum, Summings, Watch, file_sums, name_in, small_ones_wrong, stored_sums
from cpt.checkpoint.values import Seen, not_finite, odd, some
from cpt.checkpoint.windows import Windows

_PAD = " (padding rows)"
_BLOCK = 1 << 20  # of a state that is looked at together: what stays in a core's cache [bytes]
_TURN = 1 << 23  # of all states, that a thread takes at a time [bytes]
_BUFFER = 2 * _TURN  # with what lies between [bytes]
_AHEAD = 3  # turns that are read before they are looked at, beside one for each thread
_READERS = 2


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in a checkpoint.

    Args:
        wrong: what makes it bad, one line each; empty = good.
        odd: what may be meant: tensors that are all zero, constant, subnormal.
        unseen: what its format cannot show.
        done: what was checked, one phrase each.
        nbytes: read [bytes]; those of checksums and values count once.
    """

    folder: Path
    format: str
    wrong: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    nbytes: int = 0

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Everything that is wrong with a checkpoint folder, one line each; empty = nothing. Reads every byte."""
    return list(inspect(Path(folder)).wrong)


def inspect(
    folder: Path,
    *,
    reading: Reading | None = None,
    workers: int = 1,
    watch: Watch = lambda nbytes: None,
) -> Report:
    """Check a checkpoint folder of any format: structure, checksums, main weights, values. Reads every byte.

    Args:
        workers: threads that look at values; two more read.
        watch: called with the number of bytes read after each block, from any thread.

    Raises:
        UsageError: it is no checkpoint of a format that is known.
    """
    from cpt.checkpoint import find
    from cpt.checkpoint.job import place

    if (begun := place.unfinished(folder)) is not None:
        return Report(folder=folder, format="unknown", wrong=(f"`{folder}` is {begun}",))
    name = find.recognise(folder)
    if name is None:
        why = find.why_not_whole(folder) if folder.is_dir() else "it is no folder"
        if folder.is_dir() and store.is_folder_name(folder.name):
            return Report(folder=folder, format="unknown", wrong=(f"`{folder}` is not whole: {why}",))
        raise UsageError(f"`{folder}` is no checkpoint: {why}")
    form = find.known()[name]
    report = Report(folder=folder, format=name)
    try:
        sums = file_sums(folder)
        if wrong := [line for s in sums if (line := s.why_not_there()) is not None]:
            return replace(report, wrong=tuple(wrong))
        if wrong := list(small_ones_wrong(sums)):  # what is opened would say something else of it
            return replace(report, wrong=tuple(wrong))
        why = find.why_not_whole(folder)
        if why is not None and name not in find.READERS_SAY:
            return replace(report, wrong=(f"`{folder}` is not whole: {why}",))
        content = form.open(folder, reading or Reading())
    except UsageError as error:
        lines = (error.message, *(e.message for e in error.more))
        return replace(report, wrong=tuple(line.replace(f"`{folder}/", "`") for line in lines))
    return _inspect_values(replace(report, done=("structure",)), content, sums, workers, watch)


def _inspect_values(report: Report, content: Content, listed: Sequence[Sum], workers: int, watch: Watch) -> Report:
    sums = [*listed, *stored_sums(content, {str(s.file) for s in listed if s.is_whole})]
    count, workers = _Count(watch), max(1, workers)
    looker = _Looker(content, Summings(sums), count.add)
    wrong: list[str] = []
    seen: dict[str, Seen] = {}
    unequal: list[master.Wrong] = []
    try:
        for values, odd_ones in _looked(looker, _turns(content), workers):
            unequal += odd_ones
            for key, one in values.items():
                seen[key] = one if key not in seen else _joined(seen[key], one)
    except UsageError as error:
        wrong.append(error.message)
    with ThreadPoolExecutor(max_workers=workers) as pool:  # after all turns, that no byte is summed twice
        changed = list(filter(None, pool.map(lambda s: s.why_wrong(count.add), looker.sums.all)))
    if changed:  # explains whatever the values are
        wrong, seen, unequal = changed, {}, []
    if unequal:
        refused = master.refuse(content, unequal)
        wrong.append(f"{refused.message}: {refused.hints[0]}")
    wrong += not_finite(seen)
    done = [*report.done]
    if sums:
        done.append(f"{len(sums):,} checksum{'s' * (len(sums) > 1)} over {show_bytes(sum(s.length for s in sums))}")
    if pairs := master.compared(content):
        done.append(f"main weights against model weights of {pairs:,} tensor{'s' * (pairs > 1)}")
    if seen:
        done.append(f"values of {len(seen):,} tensors and states")
    return replace(
        report,
        wrong=tuple(wrong),
        odd=tuple(odd({n: s for n, s in seen.items() if _PAD not in n})),  # padding is often zero
        unseen=tuple(_unseen(content, sums)),
        done=tuple(done),
        nbytes=count.total,
    )


class _Count:
    """Adds up what threads have read and tells it."""

    def __init__(self, watch: Watch) -> None:
        self.total = 0
        self._watch = watch
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.total += nbytes
        self._watch(nbytes)


def _unseen(content: Content, sums: Sequence[Sum]) -> Iterator[str]:
    """What no check can find here."""
    covered: dict[str, int] = {}
    for s in sums:
        covered[str(s.file)] = covered.get(str(s.file), 0) + s.length
    held = {p.file for a in content.atoms.values() for x in (*a.states.values(), *a.pad.values()) for p in x.places}
    bare = sorted(name_in(content.path, Path(f)) for f in held if f not in covered)
    if bare:
        yield (
            f"{some(bare)} {'carries' if len(bare) == 1 else 'carry'} no checksums: "
            f"a changed value that is still a number cannot be found; a folder that `cpt convert-ckpt` wrote has them"
        )


_Box = tuple[int, int, tuple[int, int]]  # row, column, shape


@dataclass(frozen=True)
class _Turn:
    """A part of a tensor's matrix, in all its states: what a thread works on at a time.

    Args:
        pad: whether it is of the tensor's padding rows.
    """

    atom: Atom
    pad: bool
    box: _Box

    @property
    def states(self) -> Mapping[str, Array]:
        """The tensor's arrays, all of one shape."""
        return self.atom.pad if self.pad else self.atom.states

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole matrix."""
        return as_matrix(next(iter(self.states.values())).shape)

    def boxes(self) -> Iterator[_Box]:
        """Blocks that cover the part."""
        row, left, (rows, columns) = self.box
        size = max(itemsize(array.dtype) for array in self.states.values())
        for top, column, shape in rectangles(row, row + rows, columns, _BLOCK // size):
            yield top, left + column, shape

    def stretches(self) -> Iterator[windows.Stretch]:
        """Where the part lies in files; not where much else lies between, as in a matrix that is stored turned."""
        for array in self.states.values():
            for piece in _pieces(array, self.box):
                if piece.end - piece.start <= 2 * piece.held:
                    yield piece.place.file, piece.start, piece.end


def _turns(content: Content) -> Iterator[_Turn]:
    """All of all tensors, in parts of about equal size."""
    for atom in content.atoms.values():
        for pad, states in ((False, atom.states), (True, atom.pad)):
            if states:
                size = sum(itemsize(array.dtype) for array in states.values())
                rows, columns = as_matrix(next(iter(states.values())).shape)
                for box in rectangles(0, rows, columns, _TURN // size):
                    yield _Turn(atom, pad, box)


_Looked = tuple[dict[str, Seen], list[master.Wrong]]


def _looked(looker: _Looker, turns: Iterable[_Turn], workers: int) -> Iterator[_Looked]:
    """What is found in each turn, in order; some are read while others are looked at.

    Raises:
        UsageError: a file cannot be read. Turns that have not begun are left out.
    """
    under_way: deque[Future[_Looked]] = deque()
    buffers: list[mmap.mmap] = []

    def read(turn: _Turn) -> tuple[Windows, mmap.mmap]:
        buffer = buffers.pop() if buffers else mmap.mmap(-1, _BUFFER)
        return windows.read(turn.stretches(), buffer), buffer

    def look(turn: _Turn, reading: Future[tuple[Windows, mmap.mmap]]) -> _Looked:
        there, buffer = reading.result()
        found = looker.look(turn, there)
        buffers.append(buffer)
        return found

    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(workers) as lookers:
        try:
            for turn in turns:
                if len(under_way) == workers + _AHEAD:
                    yield under_way.popleft().result()
                under_way.append(lookers.submit(look, turn, readers.submit(read, turn)))
            while under_way:
                yield under_way.popleft().result()
        finally:
            lookers.shutdown(cancel_futures=True)


class _Looker:
    """Looks at values, and sums the bytes that hold them while they are at hand."""

    def __init__(self, content: Content, sums: Summings, watch: Watch) -> None:
        self.content = content
        self.sums = sums
        self.watch = watch
        self.files = Files()

    def look(self, turn: _Turn, there: Windows) -> _Looked:
        """Look at a part of all states of a tensor once: their values, and main weights against model weights."""
        atom, states = turn.atom, turn.states
        names = {s: f"{atom.name}{_PAD if turn.pad else ''}" + ("" if s == MODEL else f" {s}") for s in states}
        seen = {names[s]: Seen(a.dtype) for s, a in states.items()}
        wrong: list[master.Wrong] = []
        compare = MAIN in states and MODEL in states and atom.name not in self.content.unrounded
        for box in turn.boxes():
            blocks = {}
            for state, array in states.items():
                self._sum(array, box, there)
                blocks[state] = self._block(array, box, there)
                seen[names[state]].add(blocks[state], box[0] * turn.shape[1] + box[1])
            if compare:
                at = master.unequal(blocks[MAIN], states[MAIN].dtype, blocks[MODEL], states[MODEL].dtype)
                if len(at):
                    main = blocks[MAIN].reshape(box[2])
                    wrong.append(master.wrong_at(atom.name, turn.pad, at, main, box[:2], turn.shape))
        return seen, master.together(wrong)

    def _sum(self, array: Array, box: _Box, there: Windows) -> None:
        """Sum the bytes that hold a block, as far as nobody has and there is a checksum of them."""
        for piece in _pieces(array, box):
            file, start = piece.place.file, piece.start
            if file not in self.sums:
                self.watch(piece.held)
                continue
            end = min(piece.end, len(self.files.map(file)))  # of a file that was cut off the rest is missed later
            for one in self.sums.crossing(file, start, end):
                for first, last in one.take(start, end):
                    one.note(first, last, self._crc32(file, first, last, there))

    def _crc32(self, file: str, start: int, end: int, there: Windows) -> int:
        self.watch(end - start)
        if (found := there.find(file, start, end)) is not None:
            data, at = found
            return crc32(data[at : at + end - start])
        with memoryview(self.files.map(file)) as view, view[start:end] as part:
            return crc32(part)

    def _block(self, array: Array, box: _Box, there: Windows) -> np.ndarray[Any, Any]:
        """A rectangle of an array, flat; copied only where it does not lie in one piece."""
        block, found = np.empty(0, CARRIERS[array.dtype]), 0
        for piece in _pieces(array, box):
            view = self._view(piece, array.dtype, there)
            if view.shape == box[2] and view.flags.c_contiguous:
                return view.reshape(-1)
            block = block if block.size else np.empty(box[2], block.dtype)
            block[piece.of_block] = view
            found += view.size
        assert found == block.size > 0, f"{found} of {block.size} values of {box} of {array.shape}"
        return block.reshape(-1)

    def _view(self, piece: _Piece, dtype: str, there: Windows) -> np.ndarray[Any, Any]:
        place, size = piece.place, itemsize(dtype)
        data, at = there.find(place.file, piece.start, piece.end) or self.files.part(place.file, piece.start, piece.end)
        view = np.ndarray(piece.stored, CARRIERS[dtype], data, at, (place.stride, size))
        return view.T if place.transposed else view


@dataclass(frozen=True)
class _Piece:
    """What a place holds of a block.

    Args:
        of_block: rows and columns of the block.
        stored: shape in the file, where rows and columns of a turned place change places.
        start, end: in the file [bytes].
        held: size of the values [bytes]; less than from `start` to `end` where others lie between.
    """

    place: Place
    of_block: tuple[slice, slice]
    stored: tuple[int, int]
    start: int
    end: int
    held: int


def _pieces(array: Array, box: _Box) -> Iterator[_Piece]:
    """The pieces of a block, which cover it."""
    row, column, (rows, columns) = box
    size = itemsize(array.dtype)
    for p in crossing(array.places, row, row + rows):
        top, bottom = max(p.row, row), min(p.row + p.rows, row + rows)
        left, right = max(p.column, column), min(p.column + p.columns, column + columns)
        if top >= bottom or left >= right:
            continue
        first, stored = (top - p.row, left - p.column), (bottom - top, right - left)
        if p.transposed:
            first, stored = first[::-1], stored[::-1]
        start = p.start + first[0] * p.stride + first[1] * size
        yield _Piece(
            place=p,
            of_block=(slice(top - row, bottom - row), slice(left - column, right - column)),
            stored=stored,
            start=start,
            end=start + (stored[0] - 1) * p.stride + stored[1] * size,
            held=stored[0] * stored[1] * size,
        )


def _joined(a: Seen, b: Seen) -> Seen:
    a.join(b)
    return a
