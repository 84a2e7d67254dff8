"""Stretches of files in buffers: the bytes are the files', whatever the file system can and wherever they come from."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint import windows

SIZES = {"small": 3_000, "odd": 777_777, "even": 1 << 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    for name, size in SIZES.items():
        (made / name).write_bytes(random.Random(size).randbytes(size))
    return made


def forget(file: Path) -> None:
    """Put a file out of the page cache."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def without_direct(*given: Any, **more: Any) -> int:
    raise OSError(errno.EINVAL, "Invalid argument")


def read_refusing(real: Callable[..., int]) -> Callable[..., int]:
    """`os.preadv` of a file system that opens files for direct reads and then has none."""
    direct = os.O_DIRECT

    def preadv(descriptor: int, *rest: Any) -> int:
        flags = int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0], 8)
        return without_direct() if flags & direct else real(descriptor, *rest)

    return preadv


def assert_all_found(folder: Path, stretches: list[windows.Stretch]) -> None:
    found = windows.read(stretches, mmap.mmap(-1, 8 << 20))
    for file, start, end in stretches:
        data = Path(file).read_bytes()
        there = found.find(file, start, min(end, len(data)))
        assert there is not None
        assert bytes(there[0][there[1] : there[1] + min(end, len(data)) - start]) == data[start:end]
        assert found.find(file, start, len(data) + 1) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), is_cold=st.booleans())
def test_whatever_is_asked_for_has_the_bytes_of_the_file(folder: Path, data: st.DataObject, is_cold: bool) -> None:
    stretches = []
    for name in data.draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=8)):
        start = data.draw(st.integers(0, SIZES[name] - 1))
        stretches.append((str(folder / name), start, data.draw(st.integers(start + 1, SIZES[name] + 9_000))))
    if is_cold:
        for name in SIZES:
            forget(folder / name)
    assert_all_found(folder, stretches)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system knows no reads past the page cache")
@pytest.mark.parametrize("refuses", ["open", "read"])
def test_a_file_system_without_direct_reads_is_read_all_the_same(
    folder: Path, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refuses == "open":
        plain = os.open
        monkeypatch.setattr(os, "open", lambda f, flags: (without_direct if flags & os.O_DIRECT else plain)(f, flags))
    else:
        monkeypatch.setattr(os, "preadv", read_refusing(os.preadv))
    forget(folder / "even")
    assert_all_found(folder, [(str(folder / "even"), 5, 900_000)])


def test_what_finds_no_room_is_left_out(folder: Path) -> None:
    file = str(folder / "even")
    found = windows.read([(file, 0, 500_000), (file, 510_000, 520_000)], mmap.mmap(-1, 1 << 16))
    assert found.find(file, 0, 10) is None
    assert found.find(file, 510_000, 520_000) is not None


def test_a_file_that_is_gone_is_an_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="nothing` is missing"):
        windows.read([(str(folder / "nothing"), 0, 10)], mmap.mmap(-1, 1 << 16))
