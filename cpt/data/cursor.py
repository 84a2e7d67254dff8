"""How far a source has been read, in one role. Survives another mixture, another `seq_length`, another layout.

Documents of a corpus are visited in the order of a keyed bijection, another one each epoch. The key holds the seed, the
corpus's content and the epoch, not the stage: a later stage goes on where the earlier one stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cpt.base.errors import PlanError
from cpt.data.corpus import Corpus
from cpt.data.permute import Permutation

_LEAST_WINDOW, _MOST_WINDOW = 64, 8192  # documents looked up at a time


class Segments(NamedTuple):
    """Pieces of documents, one after the other: tokens `start` to `stop` of document number `document` in `epoch`.

    Shapes:
        all [pieces] int64
    """

    epochs: np.ndarray[Any, Any]
    documents: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    stops: np.ndarray[Any, Any]


class Cursor:
    """A place in the endless sequence of a corpus's documents.

    Args:
        corpus: what is read.
        seed: keys the order of documents.
        state: what `state` gave, to go on from there. The epoch that it is in keeps the seed it was begun with.
        name: of the source, for messages.
    """

    def __init__(self, corpus: Corpus, seed: int, state: Mapping[str, Any] | None = None, name: str = "") -> None:
        self.corpus = corpus
        self.seed = seed
        self.epoch = 0
        self.rank = 0  # of the document in this epoch's order
        self.offset = 0  # tokens of that document that were given
        self.tokens = 0  # tokens given since the very first
        self.epoch_seed = seed
        if state is not None:
            if state["content"] != corpus.content_hash:
                raise PlanError(
                    f"source `{name}` changed since its cursor was saved, so its place in it means nothing",
                    "start the stage without `cursor` in `keep`, or give back the files and options it was read with",
                )
            self.epoch, self.rank, self.offset = int(state["epoch"]), int(state["rank"]), int(state["offset"])
            self.tokens, self.epoch_seed = int(state["tokens"]), int(state["seed"])
        self._documents = np.empty(0, np.int64)  # window of coming documents; the first is the one the cursor is in
        self._epochs = np.empty(0, np.int64)
        self._ends = np.empty(0, np.int64)  # tokens from the cursor's document's start to each document's end
        self._next = (self.epoch, self.rank)  # first document after the window
        self._orders: dict[int, Permutation] = {}

    def state(self) -> dict[str, Any]:
        """Everything to go on from here, in JSON types."""
        return {
            "epoch": self.epoch,
            "rank": self.rank,
            "offset": self.offset,
            "tokens": self.tokens,
            "seed": self.epoch_seed,
            "content": self.corpus.content_hash,
        }

    def segments(self, skip: int, count: int) -> Segments:
        """The pieces of documents that hold `count` tokens, beginning `skip` tokens ahead. Moves nothing."""
        first = self.offset + skip
        last = first + count
        self._reach(last)
        i = int(np.searchsorted(self._ends, first, side="right"))
        j = int(np.searchsorted(self._ends, last, side="left")) + 1
        ends = self._ends[i:j]
        begins = np.empty_like(ends)
        begins[0] = self._ends[i - 1] if i else 0
        begins[1:] = ends[:-1]
        found = Segments(
            self._epochs[i:j], self._documents[i:j], np.maximum(begins, first) - begins, np.minimum(ends, last) - begins
        )
        full = found.stops > found.starts
        return found if full.all() else Segments(*(part[full] for part in found))

    def advance(self, count: int) -> None:
        """Move on by `count` tokens."""
        target = self.offset + count
        self._reach(target)
        passed = int(np.searchsorted(self._ends, target, side="right"))
        begin = int(self._ends[passed - 1]) if passed else 0
        epoch, size = self.epoch, len(self.corpus.train)
        self.epoch, self.rank = divmod(self.epoch * size + self.rank + passed, size)
        self.offset = target - begin
        self.tokens += count
        if self.epoch != epoch:
            self.epoch_seed = self.seed
            self._orders = {e: o for e, o in self._orders.items() if e >= self.epoch}
        self._documents, self._epochs = self._documents[passed:], self._epochs[passed:]
        self._ends = self._ends[passed:] - begin

    def _reach(self, tokens: int) -> None:
        """Widen the window until more than `tokens` tokens lie in it."""
        held = int(self._ends[-1]) if len(self._ends) else 0
        while held <= tokens:
            documents, epochs, lengths = self._look_up(tokens - held)
            self._documents = np.concatenate([self._documents, documents])
            self._epochs = np.concatenate([self._epochs, epochs])
            self._ends = np.concatenate([self._ends, held + np.cumsum(lengths, dtype=np.int64)])
            held = int(self._ends[-1])

    def _look_up(self, tokens: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The next documents of the order, about as many as hold twice the tokens asked for, within one epoch."""
        epoch, rank = self._next
        size = len(self.corpus.train)
        mean = max(1, self.corpus.catalog["tokens"] // size)
        wanted = min(max(2 * tokens // mean, _LEAST_WINDOW), _MOST_WINDOW)
        ranks = np.arange(rank, min(rank + wanted, size))
        if epoch not in self._orders:
            seed = self.epoch_seed if epoch == self.epoch else self.seed
            self._orders[epoch] = Permutation(size, seed, self.corpus.content_hash, epoch)
        documents = self._orders[epoch](ranks)
        self._next = (epoch, rank + len(ranks)) if rank + len(ranks) < size else (epoch + 1, 0)
        return documents, np.full(len(ranks), epoch), self.corpus.train.lengths[documents]
