"""Where raw text comes from. A reader names the files to read; what must be extracted becomes a file in the cache."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cpt.base.errors import UsageError
from cpt.base.registry import Registry, nearest
from cpt.plan.types import Source


class Reader:
    """One kind of source. Free of options, so that a name in a recipe is enough."""

    wants_paths: ClassVar[bool] = False  # whether a source must name files
    licence: ClassVar[str | None] = None  # of the text, where it is known

    def stamp(self, source: Source) -> Any:
        """What the source is, as cheap JSON: equal stamps mean equal text."""
        raise NotImplementedError

    def files(self, source: Source, cache: str | Path) -> tuple[str, ...]:
        """The files to read, made first if need be."""
        raise NotImplementedError

    def size(self, source: Source) -> tuple[int, int]:
        """About how many bytes of text and documents, without reading much."""
        raise NotImplementedError


READERS: Registry[type[Reader]] = Registry("reader")


@READERS.add("files")
@dataclass(frozen=True)
class Files(Reader):
    """Your own files: JSON lines (plain, gz, zst), Parquet, Arrow, text (a document a file), Megatron `.bin/.idx`."""

    wants_paths: ClassVar[bool] = True

    def stamp(self, source: Source) -> Any:
        return [stat_file(path) for path in both(source.paths)]

    def files(self, source: Source, cache: str | Path) -> tuple[str, ...]:
        if not source.paths:
            raise UsageError(f"source `{source.name}` names no files", "set `paths` to files or a pattern")
        return both(source.paths)


@READERS.add("python_docs")
@dataclass(frozen=True)
class PythonDocs(Reader):
    """Library documentation that is on the machine: Python's own topics and docstrings, sympy's docstrings."""

    licence: ClassVar[str | None] = "PSF-2.0 and BSD-3-Clause"

    def stamp(self, source: Source) -> Any:
        from cpt.data import python_docs

        return python_docs.stamp()

    def files(self, source: Source, cache: str | Path) -> tuple[str, ...]:
        from cpt.data import extract, python_docs

        return (extract.extracted("python_docs", self.stamp(source), python_docs.documents, cache),)

    def size(self, source: Source) -> tuple[int, int]:
        return 8_000_000, 4_200


@READERS.add("icd10cm")
@dataclass(frozen=True)
class Icd10cm(Reader):
    """The ICD-10-CM tabular list (diseases and their codes, public domain) inside the package `simple-icd-10-cm`."""

    licence: ClassVar[str | None] = "public domain (US government)"

    def stamp(self, source: Source) -> Any:
        from cpt.data import icd10cm

        return icd10cm.stamp()

    def files(self, source: Source, cache: str | Path) -> tuple[str, ...]:
        from cpt.data import extract, icd10cm

        return (extract.extracted("icd10cm", self.stamp(source), icd10cm.documents, cache),)

    def size(self, source: Source) -> tuple[int, int]:
        return 4_400_000, 1_900


def reader(source: Source) -> Reader:
    """The reader of a source."""
    return READERS.get(source.reader)()


def files(source: Source, cache: str | Path) -> tuple[str, ...]:
    """The files that hold the text of a source, extracted into the cache if need be."""
    return reader(source).files(source, cache)


def is_megatron(paths: Sequence[str]) -> bool:
    """Whether a source is Megatron data.

    Raises:
        UsageError: it is in part, or of several pairs.
    """
    from cpt.data.pieces import file_kind

    kinds = {file_kind(path)[0] for path in paths}
    if "megatron" not in kinds:
        return False
    if len(kinds) > 1 or len({Path(path).with_suffix("") for path in paths}) > 1:
        raise UsageError(
            "a source is either one Megatron pair `.bin/.idx` or files of text", "make each pair a source of its own"
        )
    return True


def pair(path: str) -> tuple[str, str]:
    """Both files of a pair, named by one of them or by their common prefix.

    Raises:
        UsageError: one is missing.
    """
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    for name in (prefix + ".bin", prefix + ".idx"):
        if not Path(name).is_file():
            raise UsageError(f"Megatron data is a pair of files, and `{name}` is missing")
    return prefix + ".bin", prefix + ".idx"


def both(paths: Sequence[str]) -> tuple[str, ...]:
    """Paths with the other file of each Megatron pair added."""
    return tuple(name for path in paths for name in (pair(path) if path.endswith((".bin", ".idx")) else (path,)))


def stat_file(path: str) -> list[Any]:
    """Path, size [bytes] and time of change [ns] of a file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UsageError(f"cannot read `{path}`: {error.strerror}") from None
    return [path, found.st_size, found.st_mtime_ns]


def expand(patterns: Sequence[str], folder: str | Path) -> tuple[str, ...]:
    """Absolute files that patterns name, sorted, each once. A folder means the files in it that can be read.

    Args:
        patterns: paths or glob patterns (`**` goes into folders), as typed; `~` is the home folder.
        folder: what relative ones are relative to.

    Raises:
        UsageError: a pattern that matches no file, or a file that cannot be told how to read.
    """
    from cpt.data.pieces import file_kind

    found: set[str] = set()
    for pattern in patterns:
        full = os.path.normpath(os.path.join(folder, os.path.expanduser(pattern)))
        if not os.path.exists(full) and os.path.isfile(full + ".idx"):
            full += ".idx"  # the prefix of a Megatron pair
        matches = [full] if os.path.exists(full) else glob.glob(full, recursive=True)
        before = len(found)
        for match in matches:
            if os.path.isfile(match):
                file_kind(match)
                found.add(match)
            elif match == full and not os.path.isdir(match):
                raise UsageError(f"`{pattern}` is neither a file nor a folder")
            elif match == full:
                inside = [os.path.join(match, name) for name in os.listdir(match) if not name.startswith(".")]
                found.update(name for name in inside if os.path.isfile(name) and _readable(name))
        if len(found) == before and not any(m in found for m in matches):
            raise _nothing(pattern, full)
    pairs = {path for path in found if path.endswith(".bin") and path[:-4] + ".idx" in found}
    return tuple(sorted(found - pairs))


def _readable(path: str) -> bool:
    from cpt.data.pieces import file_kind

    try:
        return file_kind(path)[0] != "text"
    except UsageError:
        return False


def _nothing(pattern: str, full: str) -> UsageError:
    parent, name = os.path.split(full)
    if not os.path.isdir(parent):
        return UsageError(f"no file matches `{pattern}`", f"`{parent}` is not a folder")
    near = nearest(name, os.listdir(parent))
    hints = (f"did you mean `{os.path.join(os.path.dirname(pattern), near)}`?",) if near else (f"looked in `{parent}`",)
    return UsageError(f"no file matches `{pattern}`", *hints)
