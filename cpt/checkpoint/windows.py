"""Stretches of files, read past the page cache into a few buffers that are used again and again.

What is read once need not push out what others will read again, and past the cache a disk is read for a fifth of the
processor's time. What is in the cache already comes from there, as it does where a file system knows no other way.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from cpt.base.errors import UsageError
from cpt.base.files import why_unreadable

_ALIGNED = 4096  # where reads past the cache begin and end [bytes]
_SMALL = 1 << 17  # less is read by way of the page cache, which reads on [bytes]
_DIRECT = getattr(os, "O_DIRECT", 0)

Stretch = tuple[str, int, int]  # file, first byte, byte after the last


@dataclass(frozen=True)
class Window:
    """Bytes of a file that were read.

    Args:
        start: of `data` in the file.
        data: of the buffer; less than was asked for where the file ends before.
    """

    start: int
    data: memoryview


@dataclass
class Windows:
    """What was read of some files, by file in order of start. Valid until the buffer is read into again."""

    of: dict[str, list[Window]] = field(default_factory=dict)

    def find(self, file: str, start: int, end: int) -> tuple[memoryview, int] | None:
        """Data that hold the bytes from `start` to `end`, and where `start` is in them; None = they were not read."""
        windows = self.of.get(file, ())
        i = bisect_right(windows, start, key=lambda w: w.start) - 1
        if i < 0 or end > windows[i].start + len(windows[i].data):
            return None
        return windows[i].data, start - windows[i].start


def read(stretches: Iterable[Stretch], buffer: mmap.mmap) -> Windows:
    """Read stretches of files into a buffer, as many as find room.

    Raises:
        UsageError: a file cannot be read.
    """
    found, view, at = Windows(), memoryview(buffer), 0
    for file, those in groupby(_joined(stretches), key=lambda s: s[0]):
        windows = found.of[file] = []
        try:
            with _File(file) as opened:
                for _, start, end in those:
                    room = view[at : at + end - start]
                    if len(room) == end - start:
                        windows.append(Window(start, room[: opened.read(room, start)]))
                        at += len(room)
        except OSError as error:
            raise UsageError(f"`{file}` {why_unreadable(error)}") from None
    return found


def _joined(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """The same bytes by file and in order, each once and aligned."""
    last: Stretch | None = None
    for file, start, end in sorted(stretches):
        start, end = start - start % _ALIGNED, end + -end % _ALIGNED
        if last is not None and last[0] == file and start <= last[2]:
            last = (file, last[1], max(end, last[2]))
            continue
        if last is not None:
            yield last
        last = (file, start, end)
    if last is not None:
        yield last


class _File:
    """An open file that is read past the page cache where that is of use and the file system can."""

    def __init__(self, file: str) -> None:
        self._plain = os.open(file, os.O_RDONLY)
        self._direct: int | None = None
        if _DIRECT:
            with contextlib.suppress(OSError):
                self._direct = os.open(file, os.O_RDONLY | _DIRECT)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, room: memoryview, start: int) -> int:
        """Fill a part of a buffer from an aligned place on; gives how many bytes there were."""
        if self._direct is not None and len(room) >= _SMALL and not self._is_cached(start, len(room)):
            try:
                return _fill(room, self._direct, start)
            except OSError as error:
                if error.errno != errno.EINVAL:  # opened so all the same
                    raise
        return _fill(room, self._plain, start)

    def _is_cached(self, start: int, length: int) -> bool:
        """Whether some page is in the page cache; to ask brings it there, so the same one tells nothing later."""
        page = random.randrange(length // _ALIGNED) * _ALIGNED
        try:
            return os.preadv(self._plain, [bytearray(_ALIGNED)], start + page, os.RWF_NOWAIT) > 0
        except (OSError, AttributeError):  # it is not, or the system does not tell
            return False


def _fill(room: memoryview, descriptor: int, start: int) -> int:
    done = 0
    while done < len(room) and done % _ALIGNED == 0:  # else the file has ended
        got = os.preadv(descriptor, [room[done:]], start + done)
        if not got:
            break
        done += got
    return done
