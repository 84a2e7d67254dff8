"""What one tokenising process does: pieces of raw files in, encoded documents out. Imports neither torch nor Hydra."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.data.encode import CHECK_EVERY, CHECK_FIRST, FAST, Encoder, Encoding, Fast, Reference, equal, wrap
from cpt.data.pieces import Piece, texts
from cpt.data.split import document_hash, utf8

MEMORY = 1 << 30  # a process that holds more [bytes] is replaced after its piece


@dataclass(frozen=True)
class Task:
    """What all pieces have in common; picklable. `limit`: documents whose hash is below it are held out."""

    encoding: Encoding
    encoder: str
    text: str
    limit: int


@dataclass
class Encoded:
    """The documents of one piece.

    `train`, `valid`: ids and tokens of each document. `valid_bytes`: UTF-8 bytes of each held-out document.
    `least`: the smallest document hash. `differ`: documents for which the fast encoder was wrong.
    """

    train: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    valid: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    valid_bytes: np.ndarray[Any, Any]
    train_bytes: int
    empty: int
    least: int
    checked: int
    differ: int
    size: int  # of the piece
    blank: int = 0  # documents of white space only


class Tokeniser:
    """Encodes pieces one after the other."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._fast = task.encoder == FAST
        self._broken = 0  # times that the fast encoder failed
        self._reference: Reference | None = None
        self._encoder: Encoder = Fast(task.encoding) if self._fast else self.reference

    @property
    def reference(self) -> Reference:
        """The reference encoder, loaded when first needed."""
        if self._reference is None:
            self._reference = Reference(self.task.encoding)
        return self._reference

    def encode(self, piece: Piece, first: bool, held_out: bool | None = None) -> Encoded:
        """The documents of a piece.

        Args:
            piece: what to read.
            first: whether it is the first of the source, of which some documents are always checked.
            held_out: True or False puts all documents on one side, None goes by their hash.
        """
        train: list[str] = []
        valid: list[str] = []
        valid_bytes: list[int] = []
        check: list[str] = []
        train_bytes = empty = blank = 0
        least = 1 << 64
        for raw in texts(piece, self.task.text):
            if not raw:
                empty += 1
                continue
            blank += raw.isspace()
            text, data = utf8(raw)
            number = document_hash(data)
            least = min(least, number)
            if held_out or (held_out is None and number < self.task.limit):
                valid.append(text)
                valid_bytes.append(len(data))
            else:
                train.append(text)
                train_bytes += len(data)
            if self._fast and (number // 7 % CHECK_EVERY == 0 or (first and len(check) < CHECK_FIRST)):
                check.append(text)
        differ = sum(not equal(self._encode([t]), self.reference.encode([t])) for t in check)
        return Encoded(
            wrap(*self._encode(train), self.task.encoding),
            wrap(*self._encode(valid), self.task.encoding),
            np.asarray(valid_bytes, "<i8"),
            train_bytes,
            empty,
            least,
            len(check),
            differ + self._broken,
            piece.size,
            blank,
        )

    def _encode(self, texts: list[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Ids of texts; a failure of the fast encoder counts as a difference."""
        if not self._fast:
            return self._encoder.encode(texts)
        try:
            return self._encoder.encode(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a panic of the Rust library is no `Exception`
            self._broken += 1
            return self.reference.encode(texts)


def main(descriptor: int) -> None:
    """Serve pieces that come through a socket until it closes. Each answer says whether the process leaves after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process decides
    with Connection(descriptor) as connection:
        try:
            tokeniser = Tokeniser(connection.recv())
            while True:
                piece, first, held_out = connection.recv()
                try:
                    answer: Any = tokeniser.encode(piece, first, held_out)
                except UsageError as error:
                    answer = error
                leaves = resident() > MEMORY
                connection.send((answer, leaves))
                if leaves:
                    return
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def resident() -> int:
    """Memory that this process holds [bytes]; 0 where that cannot be told."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0
