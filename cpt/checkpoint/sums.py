"""Checksums of a checkpoint's files: which are listed or carried by the format, and whether the bytes have them.

A `Summing` is put together from pieces that come in any order, so that whoever reads the values also sums their bytes,
and each byte is read once. No torch.
"""

from __future__ import annotations

import contextlib
import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.files import read_json, why_unreadable
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint.content import Content
from cpt.checkpoint.crc32 import crc32, crc32_of_both
from cpt.checkpoint.formats import Format, Reading

LISTS = ("conversion.json", "atom.json")  # that may list a folder's files with their checksums
_DATA = (".safetensors", ".distcp", ".bin", ".pt")  # files of values, whose checksums are verified while they are read
_AHEAD = 16 << 20  # bytes that are asked for before they are needed
_ASK = 1 << 17  # bytes asked for at once: of more, Linux reads only the beginning
_READ = 1 << 20  # bytes summed at a time

Watch = Callable[[int], None]


@dataclass(frozen=True)
class Sum:
    """Bytes of a file and the CRC-32 that they should have.

    Args:
        name: of the file inside the checkpoint's folder, for messages.
        size: of the whole file; None where that is not said.
        said_by: who says so, for messages.
    """

    file: Path
    name: str
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
        if not self.file.is_file():
            return f"`{self.name}` is missing: `{self.said_by}` lists it"
        size = self.file.stat().st_size
        if self.size is not None and size != self.size:
            return f"`{self.name}` has {size:,} bytes instead of {self.size:,}"
        return None


class Summing:
    """The CRC-32 of a sum's bytes, in the making: pieces may come in any order and from any thread."""

    def __init__(self, of: Sum) -> None:
        self.of = of
        self.start, self.end = of.start, of.start + of.length
        self._taken: list[tuple[int, int]] = []  # (start, end) in order, apart from each other
        self._done: list[tuple[int, int, int]] = []  # (start, end, crc) likewise
        self._lock = threading.Lock()

    def take(self, start: int, end: int) -> list[tuple[int, int]]:
        """Those bytes from `start` to `end` that nobody has taken yet: who takes them sums them and notes it."""
        start, end = max(start, self.start), min(end, self.end)
        with self._lock:
            first = bisect_left(self._taken, start, key=lambda t: t[1])
            last = bisect_right(self._taken, end, key=lambda t: t[0])
            touching = self._taken[first:last]
            if start >= end or (len(touching) == 1 and touching[0][0] <= start and end <= touching[0][1]):
                return []
            ends = [start, *(e for _, e in touching)]
            starts = [*(s for s, _ in touching), end]
            self._taken[first:last] = [(min(start, *starts), max(end, *ends))]
        return [(max(e, start), s) for e, s in zip(ends, starts, strict=True) if max(e, start) < s]

    def note(self, start: int, end: int, crc: int) -> None:
        """Bytes that were summed."""
        with self._lock:
            i = bisect_left(self._done, (start,))
            if i < len(self._done) and self._done[i][0] == end:
                _, after, more = self._done.pop(i)
                end, crc = after, crc32_of_both(crc, more, after - end)
            if i and self._done[i - 1][1] == start:
                i -= 1
                before, _, less = self._done.pop(i)
                start, crc = before, crc32_of_both(less, crc, end - start)
            self._done.insert(i, (start, end, crc))

    def why_wrong(self, watch: Watch = lambda nbytes: None) -> str | None:
        """What is wrong with the bytes; reads those that were not summed yet."""
        name = f"`{self.of.name}`"
        try:
            with open(self.of.file, "rb", buffering=0) as file:
                for start, end in self._missing():
                    crc = _crc32_of(file, start, end, watch)
                    if crc is None:
                        return f"{name} was cut off while it was read"
                    self.note(start, end, crc)
        except OSError as error:
            return f"{name} {why_unreadable(error)}"
        crc = self._done[0][2] if self._done else 0
        if crc == self.of.crc32:
            return None
        where = "" if self.of.is_whole else f" at byte {self.start:,}"
        return f"{name} has other bytes than were written{where} (checksum {crc:08x} instead of {self.of.crc32:08x})"

    def _missing(self) -> list[tuple[int, int]]:
        starts = [self.start, *(end for _, end, _ in self._done)]
        ends = [*(start for start, _, _ in self._done), self.end]
        return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def _crc32_of(file: FileIO, start: int, end: int, watch: Watch) -> int | None:
    """CRC-32 of bytes that are read; None = the file ends before them."""
    crc, at = 0, start
    buffer = memoryview(bytearray(min(_READ, end - start)))
    file.seek(start)
    while at < end:
        if (at - start) % _AHEAD == 0 and end - at > _AHEAD:
            _ask_for(file.fileno(), at + _AHEAD, min(at + 2 * _AHEAD, end))
        got = file.readinto(buffer[: min(_READ, end - at)])
        if not got:
            return None
        crc = crc32(buffer[:got], crc)
        at += got
        watch(got)
    return crc


def _ask_for(descriptor: int, start: int, end: int) -> None:
    """Let the system read a part of a file while others are worked on; where it can. Other threads go on meanwhile."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            for at in range(start, end, _ASK):
                os.posix_fadvise(descriptor, at, min(_ASK, end - at), os.POSIX_FADV_WILLNEED)


class Summings:
    """Checksums of many files, found by the bytes that they are of."""

    def __init__(self, sums: Iterable[Sum]) -> None:
        self.all = [Summing(s) for s in sums]
        self._by_file: dict[str, list[Summing]] = {}
        for one in sorted(self.all, key=lambda s: (s.start, -s.end)):
            apart = self._by_file.setdefault(str(one.of.file), [])
            if not apart or apart[-1].end <= one.start:  # others read their bytes themselves
                apart.append(one)

    def __contains__(self, file: str) -> bool:
        """Whether there are checksums of bytes of a file."""
        return file in self._by_file

    def crossing(self, file: str, start: int, end: int) -> list[Summing]:
        """Those that are of some of the bytes from `start` to `end`."""
        apart = self._by_file.get(file, [])
        first = bisect_right(apart, start, key=lambda s: s.end)
        return apart[first : bisect_left(apart, end, lo=first, key=lambda s: s.start)]


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
    for line in small_ones_wrong(file_sums(folder)):
        raise UsageError(f"`{folder}`: {line}", "`cpt ckpt verify` checks all its files")
    return with_listed_sums(form.open(folder, reading))


def damages(folder: Path, *, values: bool) -> list[str]:
    """What is wrong with files that a manifest in the folder lists, one line each.

    Args:
        values: whether every byte is read; else only those of files that hold no values are.

    Raises:
        UsageError: a manifest is damaged.
    """
    sums = file_sums(folder)
    wrong = list(filter(None, (s.why_not_there() for s in sums)))
    if not wrong:
        wrong = list(filter(None, (Summing(s).why_wrong() for s in sums)) if values else small_ones_wrong(sums))
    return wrong


def small_ones_wrong(sums: Sequence[Sum]) -> Iterator[str]:
    """What is wrong with files that hold no values."""
    for s in sums:
        if s.file.suffix not in _DATA or s.file.name == "common.pt":
            line = s.why_not_there() or Summing(s).why_wrong()
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
    return Sum(folder / str(name), str(name), 0, size, value, said_by, size)


def name_in(folder: Path, file: Path) -> str:
    """A file's name inside a checkpoint's folder."""
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def stored_sums(content: Content, whole: Container[str]) -> Iterator[Sum]:
    """Checksums that the format itself carries, of files that no manifest covers as a whole."""
    for name, ranges in content.crc32.items():
        file = Path(name)
        if str(file) not in whole:
            for start, length, crc in ranges:
                yield Sum(file, name_in(content.path, file), start, length, crc, content.format)
