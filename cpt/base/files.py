"""Atomic writes, append-only JSON lines, hashes. Whoever reads a file written here sees the old one or the new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename, fsync of the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_folder(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write one JSON value atomically, readable for people. NaN is no JSON, so it is written as null."""
    write_atomic(path, json.dumps(without_nan(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in a file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def why_unreadable(error: Exception) -> str:
    """What an error of `read_json`, or of opening a file, says to a person: goes after the file's name.

    Raises:
        PermissionError: it is one: the machine's fault and not the file's, which is told in one place.
    """
    if isinstance(error, PermissionError):
        raise error
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, IsADirectoryError):
        return "is a folder, wanted is a file"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    if isinstance(error, json.JSONDecodeError):
        where = f"from line {error.lineno:,}, character {error.colno:,} on"
        return f"is damaged or was cut off: it is not JSON {where}" if error.doc.strip() else "is empty"
    if isinstance(error, UnicodeDecodeError):
        return "is damaged: it is not text"
    if isinstance(error, KeyError):
        return f"is damaged: it lacks `{error.args[0] if error.args else ''}`"
    return "is damaged: what it says does not fit together"


def closed_at(path: str | os.PathLike[str]) -> Path:
    """What is really closed where a path cannot be read: the first folder above it that is, or it itself."""
    path = Path(path)
    return next((folder for folder in reversed(path.parents) if not os.access(folder, os.X_OK)), path)


def without_nan(value: Any) -> Any:
    """`value` with every non-finite float replaced by None, so that it is strict JSON."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return value


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def append_line(path: str | os.PathLike[str], value: Any) -> None:
    """Append one JSON line in a single write, so that readers see whole lines (but for a kill in between)."""
    line = json.dumps(without_nan(value), ensure_ascii=False, separators=(",", ":")) + "\n"
    with open(path, "ab") as file:
        file.write(line.encode())


def read_lines(path: str | os.PathLike[str]) -> Iterator[Any]:
    """JSON values of a `.jsonl` file; a last line cut off by a kill is skipped."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return
    for line in data.split(b"\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces. The text that fingerprints are taken of."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def hash_text(text: str | bytes) -> str:
    """SHA-256 of a text, as hexadecimal."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
