"""Checks of a checkpoint: its files are what was written, and its optimizer's main weights are its model's weights."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.files import read_json, why_unreadable
from cpt.base.units import show_bytes
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint import master, store
from cpt.checkpoint.arrays import CARRIERS, Array, Files, as_matrix, itemsize, rectangles, row_spans
from cpt.checkpoint.content import MAIN, MODEL, Atom, Content
from cpt.checkpoint.formats import Format, Reading
from cpt.checkpoint.values import Seen, not_finite, odd, some

LISTS = ("conversion.json", "atom.json")  # that may list a folder's files with their checksums
_DATA = (".safetensors", ".distcp", ".bin", ".pt")  # files of values, whose checksums are verified while they are read
_PAD = " (padding rows)"
_AHEAD = 16 << 20  # bytes that are asked for before they are needed
_READ = 1 << 20  # bytes summed at a time
_BLOCK = 1 << 18  # values looked at together
_TURN = 1 << 24  # values that a thread takes at a time


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in a checkpoint.

    Args:
        wrong: what makes it bad, one line each; empty = good.
        odd: what may be meant: tensors that are all zero, constant, subnormal.
        unseen: what its format cannot show.
        done: what was checked, one phrase each.
        nbytes: read [bytes]; some values are read twice, once for checksums.
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
    watch: Callable[[int], None] = lambda nbytes: None,
) -> Report:
    """Check a checkpoint folder of any format: structure, checksums, main weights, values. Reads every byte.

    Args:
        workers: threads that share the reading.
        watch: called with the number of bytes read after each block, from any thread.

    Raises:
        UsageError: it is no checkpoint of a format that is known.
    """
    from cpt.checkpoint import find

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
        if wrong := list(_small_ones_wrong(sums)):  # what is opened would say something else of it
            return replace(report, wrong=tuple(wrong))
        why = find.why_not_whole(folder)
        if why is not None and name != "megatron":
            return replace(report, wrong=(f"`{folder}` is not whole: {why}",))
        content = form.open(folder, reading or Reading())
    except UsageError as error:
        return replace(report, wrong=(error.message, *(e.message for e in error.more)))
    return _inspect_values(replace(report, done=("structure",)), content, sums, workers, watch)


def _inspect_values(
    report: Report, content: Content, listed: Sequence[Sum], workers: int, watch: Callable[[int], None]
) -> Report:
    sums = [*listed, *_stored_sums(content, {str(s.file) for s in listed if s.is_whole})]
    files = Files()
    wrong: list[str] = []
    seen: dict[str, Seen] = {}
    unequal: list[master.Wrong] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        try:
            for line in pool.map(lambda s: s.why_wrong(watch), sums):
                wrong += [line] if line is not None else []
            if not wrong:
                for values, odd_ones in pool.map(lambda turn: _look(content, files, turn, watch), _turns(content)):
                    unequal += odd_ones
                    for key, one in values.items():
                        seen[key] = one if key not in seen else _joined(seen[key], one)
        except UsageError as error:
            pool.shutdown(cancel_futures=True)
            wrong.append(error.message)
    if unequal:
        refused = master.refuse(content, unequal)
        wrong.append(f"{refused.message}: {refused.hints[0]}")
    wrong += not_finite(seen)
    summed = sum(s.length for s in sums)
    done = [*report.done]
    if sums:
        done.append(f"{len(sums):,} checksums over {show_bytes(summed)}")
    if pairs := master.compared(content):
        done.append(f"main weights against model weights of {pairs:,} tensors")
    if seen:
        done.append(f"values of {len(seen):,} tensors and states")
    return replace(
        report,
        wrong=tuple(wrong),
        odd=tuple(odd({n: s for n, s in seen.items() if _PAD not in n})),  # padding is often zero
        unseen=tuple(_unseen(content, sums)),
        done=tuple(done),
        nbytes=summed + sum(s.numel * itemsize(s.dtype) for s in seen.values()),
    )


@dataclass(frozen=True)
class Sum:
    """Bytes of a file and the CRC-32 that they should have.

    Args:
        size: of the whole file; None where that is not said.
        said_by: who says so, for messages.
    """

    file: Path
    start: int
    length: int
    crc32: int
    said_by: str
    size: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is of a whole file."""
        return self.size is not None

    def why_not_there(self) -> str | None:
        """What is wrong with the file's name and size."""
        try:
            size = self.file.stat().st_size
        except OSError:
            return f"`{self.file.name}` is missing: `{self.said_by}` lists it"
        if self.size is not None and size != self.size:
            return f"`{self.file.name}` has {size:,} bytes instead of {self.size:,}"
        return None

    def why_wrong(self, watch: Callable[[int], None]) -> str | None:
        """What is wrong with the bytes; reads them."""
        crc, left = 0, self.length
        buffer = memoryview(bytearray(min(_READ, max(1, left))))
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.start)
                while left:
                    if (self.length - left) % _AHEAD == 0:
                        _ask_for(file.fileno(), self.start + self.length - left + _AHEAD, min(_AHEAD, left))
                    got = file.readinto(buffer[: min(_READ, left)])
                    if not got:
                        return f"`{self.file.name}` was cut off while it was read"
                    crc = zlib.crc32(buffer[:got], crc)
                    left -= got
                    watch(got)
        except OSError as error:
            return f"`{self.file.name}` {why_unreadable(error)}"
        if crc == self.crc32:
            return None
        where = "" if self.is_whole else f" at byte {self.start:,}"
        return (
            f"`{self.file.name}` has other bytes than were written{where} "
            f"(checksum {crc:08x} instead of {self.crc32:08x})"
        )


def _ask_for(descriptor: int, start: int, length: int) -> None:
    """Let the system read a part of a file while the one before it is summed; where it can."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)


def file_sums(folder: Path) -> list[Sum]:
    """Checksums of whole files that a manifest in the folder lists; the manifest of a training save before others.

    Raises:
        UsageError: a manifest is damaged.
    """
    if (folder / manifests.NAME).is_file():
        files = manifests.read(folder).files
        try:
            return [_whole(folder, n, f.size, f.crc32, manifests.NAME) for n, f in files.items()]
        except _NotInFolder as error:
            raise UsageError(f"`{folder / manifests.NAME}` is damaged: {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"`{folder / manifests.NAME}` {why_unreadable(error)}") from None
    for name in LISTS:
        if not (folder / name).is_file():
            continue
        try:
            value = read_json(folder / name)
            listed = value.get("files") or value.get("conversion", {}).get("files") or ()
            if isinstance(listed, Mapping):
                listed = [{"name": n, **facts} for n, facts in listed.items()]
            return [_whole(folder, f["name"], f["size"], f["crc32"], name) for f in listed]
        except _NotInFolder as error:
            raise UsageError(f"`{folder / name}` is damaged: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"`{folder / name}` {why_unreadable(error)}") from None
    return []


def open_checked(form: type[Format], folder: Path, reading: Reading) -> Content:
    """A checkpoint whose bytes are to be used: `form.open`, after the checksums of all small files that are listed.

    Files of values are left to their readers, which find their checksums in `content.crc32`.

    Raises:
        UsageError: as `form.open` and `with_listed_sums`; or a small file has other bytes than were written.
    """
    for line in _small_ones_wrong(file_sums(folder)):
        raise UsageError(f"`{folder}`: {line}", "`cpt ckpt verify` checks all its files")
    return with_listed_sums(form.open(folder, reading))


def _small_ones_wrong(sums: Sequence[Sum]) -> Iterator[str]:
    """What is wrong with files that hold no values."""
    for s in sums:
        if s.file.suffix not in _DATA or s.file.name == "common.pt":
            line = s.why_not_there() or s.why_wrong(lambda nbytes: None)
            if line is not None:
                yield line


def with_listed_sums(content: Content) -> Content:
    """A content that also knows the checksums that a manifest beside it lists, of files without checksums of their own.

    Raises:
        UsageError: the manifest is damaged, or a file that it lists is missing or of another size.
    """
    sums = file_sums(content.path)
    for line in (s.why_not_there() for s in sums):
        if line is not None:
            raise UsageError(f"`{content.path}`: {line}")
    more = {str(s.file): ((0, s.length, s.crc32),) for s in sums if str(s.file) not in content.crc32}
    return replace(content, crc32={**content.crc32, **more}) if more else content


class _NotInFolder(ValueError):
    """A list names a file that is none of its folder."""


def _whole(folder: Path, name: object, size: object, crc32: object, said_by: str) -> Sum:
    inside = isinstance(name, str) and name and not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside or isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise _NotInFolder(f"`{name}` is not a file of the folder with a size")
    value = crc32 if isinstance(crc32, int) else int(str(crc32), 16)
    return Sum(folder / str(name), 0, size, value, said_by, size)


def _stored_sums(content: Content, whole: Container[str]) -> Iterator[Sum]:
    """Checksums that the format itself carries, of files that no manifest covers as a whole."""
    for name, ranges in content.crc32.items():
        file = Path(name)
        if str(file) not in whole:
            for start, length, crc in ranges:
                yield Sum(file, start, length, crc, content.format)


def _unseen(content: Content, sums: Sequence[Sum]) -> Iterator[str]:
    """What no check can find here."""
    covered: dict[str, int] = {}
    for s in sums:
        covered[str(s.file)] = covered.get(str(s.file), 0) + s.length
    held = {p.file for a in content.atoms.values() for x in (*a.states.values(), *a.pad.values()) for p in x.places}
    bare = sorted(Path(f).name for f in held if f not in covered)
    if bare:
        yield (
            f"{some(bare)} carry no checksums: a changed value that is still a number cannot be found; "
            f"a folder that `cpt convert-ckpt` wrote has them"
        )


Turn = tuple[Atom, bool, int, int]


def _turns(content: Content) -> Iterator[Turn]:
    """(atom, whether its padding rows, first row, last row): parts of about equal size that threads work on."""
    for atom in content.atoms.values():
        for pad, states in ((False, atom.states), (True, atom.pad)):
            if not states:
                continue
            for first, last in row_spans(next(iter(states.values())).shape, _TURN):
                yield atom, pad, first, last


def _look(
    content: Content, files: Files, turn: Turn, watch: Callable[[int], None]
) -> tuple[dict[str, Seen], list[master.Wrong]]:
    """Read some rows of all states of a tensor once: their values, and main weights against model weights."""
    atom, pad, begin, end = turn
    states = atom.pad if pad else atom.states
    rows, columns = as_matrix(next(iter(states.values())).shape)
    names = {s: f"{atom.name}{_PAD if pad else ''}" + ("" if s == MODEL else f" {s}") for s in states}
    seen = {names[s]: Seen(a.dtype) for s, a in states.items()}
    wrong: list[master.Wrong] = []
    compare = MAIN in states and MODEL in states and atom.name not in content.unrounded
    for first, left, shape in rectangles(begin, end, columns, _BLOCK):
        blocks = {}
        for state, array in states.items():
            blocks[state] = _block(files, array, first, left, shape)
            seen[names[state]].add(blocks[state], first * columns + left)
            watch(blocks[state].nbytes)
        if compare:
            at = master.unequal(blocks[MAIN], states[MAIN].dtype, blocks[MODEL], states[MODEL].dtype)
            if len(at):
                main = blocks[MAIN].reshape(shape)
                wrong.append(master.wrong_at(atom.name, pad, at, main, (first, left), (rows, columns)))
    return seen, master.together(wrong)


def _block(files: Files, array: Array, row: int, column: int, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A rectangle of an array, flat; copied only where it does not lie in one piece."""
    place = array.places[0] if len(array.places) == 1 else None
    if place is not None and not place.transposed and (place.row, place.column) == (0, 0):
        view = files.view(place, array.dtype)[row : row + shape[0], column : column + shape[1]]
        if view.flags.c_contiguous:
            return view.reshape(-1)
    block = np.empty(shape, CARRIERS[array.dtype])
    files.read(array, row, column, block, array.dtype)
    return block.reshape(-1)


def _joined(a: Seen, b: Seen) -> Seen:
    a.join(b)
    return a
