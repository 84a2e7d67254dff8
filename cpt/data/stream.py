"""The batches of a train stage, a pure function of the plan and the number of the sample.

    1. `mix.Assignment` says which (source, role) gives each sample of the next global batch;
    2. the j-th sample of a source in this batch begins j · S tokens after its cursor;
    3. this rank reads its own rows; then every rank moves all cursors by the whole global batch.

So ranks need no word with each other, and another dp, a restart or a skipped batch changes nothing. Memory grows with
the number of sources, not of samples. A sample is S + 1 tokens of which the last is the first of the source's next
sample: every token is predicted once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.base.errors import PlanError
from cpt.data.corpus import Corpus
from cpt.data.cursor import Cursor, Segments
from cpt.data.mix import Assignment
from cpt.plan.types import DataOptions, Train

Name = tuple[str, str]  # (source, role); role: new | replay
Recorder = Callable[[int, Name, Segments], None]


@dataclass(frozen=True)
class Batch:
    """Samples of one rank for one step. b samples, S tokens each, and the token after them as the last label.

    Shapes:
        tokens_BS1 [b, S + 1] int64
        source_B [b] int64, index into `Stream.names`
        loss_mask_BS [b, S] float32, 0 where the label is of another document than the token; None: all ones
        position_ids_BS [b, S] int64, from 0 in each document; None: 0..S-1
        segment_ids_BS [b, S] int64, number of the document within the sample; None: attention may cross documents
    """

    tokens_BS1: np.ndarray[Any, Any]
    source_B: np.ndarray[Any, Any]
    loss_mask_BS: np.ndarray[Any, Any] | None = None
    position_ids_BS: np.ndarray[Any, Any] | None = None
    segment_ids_BS: np.ndarray[Any, Any] | None = None


def shares(train: Train) -> dict[Name, float]:
    """Share of all tokens of a stage by (source, role), in the order of names. Sources without a share are left out."""
    replay = train.replay
    part = replay.share if replay else 0.0
    found: dict[Name, float] = {}
    for role, mixture, whole in (("new", train.mixture, 1 - part), ("replay", replay.sources if replay else {}, part)):
        total = sum(mixture.values()) or 1.0
        found |= {(name, role): whole * mixture[name] / total for name in sorted(mixture)}
    return {name: share for name, share in found.items() if share > 0}


def carry(state: Mapping[str, Any]) -> dict[str, Any]:
    """A finished stage's state as the start of the next stage's: every cursor stays, the mixture begins anew."""
    return {"cursors": dict(state.get("cursors", {}))}


def key(name: Name) -> str:
    """A (source, role) pair as one string, as states and events name it: `pubmed`, `web (replay)`."""
    return name[0] if name[1] == "new" else f"{name[0]} ({name[1]})"


class Stream:
    """The batches of a stage.

    Args:
        train: the stage.
        data: packing options.
        corpora: by source name; those of the mixture and of replay must be there.
        cursors: what `state` gave (go on with this stage), what `carry` made of it (a new stage that goes on reading),
            or None (every source from its first document).
        record: called for each row that is read, with the sample's number, its source and its pieces of documents.
    """

    def __init__(
        self,
        train: Train,
        data: DataOptions,
        corpora: Mapping[str, Corpus],
        cursors: Mapping[str, Any] | None = None,
        *,
        record: Recorder | None = None,
    ) -> None:
        wanted = shares(train)
        self.names: list[Name] = list(wanted)
        self.seq_length = train.seq_length
        self.global_batch_size = train.global_batch_size
        self.data = data
        self.record = record
        state = dict(cursors or {})
        saved = dict(state.get("cursors", {}))
        mixture = state.get("mixture")
        if mixture is not None and mixture["names"] != [key(n) for n in self.names]:
            raise PlanError(
                f"the saved stream reads {mixture['names']}, the stage reads {[key(n) for n in self.names]}"
            )
        self._assignment = Assignment(list(wanted.values()), mixture)
        self._cursors = []
        for name in self.names:
            if name[0] not in corpora:
                raise PlanError(f"source `{name[0]}` of the mixture is not prepared")
            corpus = corpora[name[0]]
            if not corpus.catalog["tokens"]:
                raise PlanError(f"source `{name[0]}` has no tokens to train on")
            self._cursors.append(Cursor(corpus, train.seed, saved.pop(key(name), None), name[0]))
        self._others = saved  # of sources that this stage does not read: kept for later stages

    @property
    def samples(self) -> int:
        """Samples given in this stage so far."""
        return self._assignment.samples

    @property
    def given(self) -> dict[str, int]:
        """Tokens given in this stage so far, by source and role."""
        return {key(n): c * self.seq_length for n, c in zip(self.names, self._assignment.counts, strict=True)}

    def batch(self, dp_rank: int = 0, dp: int = 1) -> Batch:
        """This rank's rows of the next global batch; all cursors move by the whole of it.

        Args:
            dp_rank: this rank's number in its data-parallel group.
            dp: size of the group; divides the global batch size.
        """
        assert self.global_batch_size % dp == 0 and 0 <= dp_rank < dp, (self.global_batch_size, dp_rank, dp)
        rows = self.global_batch_size // dp
        first = self._assignment.samples
        chosen = self._assignment.take(self.global_batch_size)
        before = [0] * len(self.names)  # samples of each source in this batch before the row
        parts: list[Segments] = []
        for row, source in enumerate(chosen):
            if row // rows == dp_rank:
                skip = before[source] * self.seq_length
                parts.append(self._cursors[source].segments(skip, self.seq_length + 1))
            before[source] += 1
        own = chosen[dp_rank * rows : (dp_rank + 1) * rows]
        batch = self._read(own, parts)
        if self.record:
            for row, (source, segments) in enumerate(zip(own, parts, strict=True)):
                self.record(first + dp_rank * rows + row, self.names[source], segments)
        self._move(before)
        return batch

    def skip(self) -> None:
        """Pass over the next global batch: what `batch` does to the state, without reading."""
        counts = [0] * len(self.names)
        for source in self._assignment.take(self.global_batch_size):
            counts[source] += 1
        self._move(counts)

    def set_shares(self, wanted: Mapping[Name, float]) -> None:
        """Other shares of the samples from the next batch on (a schedule or a controller of mixture weights)."""
        unknown = set(wanted) - set(self.names)
        assert not unknown, f"not sources of this stream: {unknown}"
        self._assignment.set_shares([wanted.get(name, 0.0) for name in self.names])

    def state(self) -> dict[str, Any]:
        """Everything to go on from here, in JSON types: cursors of every source read so far, mixture of this stage."""
        cursors = {key(n): c.state() for n, c in zip(self.names, self._cursors, strict=True)}
        mixture = {"names": [key(n) for n in self.names], **self._assignment.state()}
        return {"cursors": self._others | cursors, "mixture": mixture}

    def _move(self, counts: Sequence[int]) -> None:
        for cursor, count in zip(self._cursors, counts, strict=True):
            if count:
                cursor.advance(count * self.seq_length)

    def _read(self, sources: Sequence[int], parts: Sequence[Segments]) -> Batch:
        size = self.seq_length
        tokens = np.empty((len(parts), size + 1), np.int64)
        bounds = self.data.reset_positions or self.data.mask_documents
        segment_ids = np.zeros((len(parts), size + 1), np.int64) if bounds else None
        positions = np.zeros((len(parts), size + 1), np.int64) if bounds else None
        for row, (source, segments) in enumerate(zip(sources, parts, strict=True)):
            self._cursors[source].corpus.train.fill(tokens[row], *segments[1:])
            if segment_ids is not None and positions is not None:
                sizes = segments.stops - segments.starts
                segment_ids[row] = np.repeat(np.arange(len(sizes)), sizes)
                positions[row] = np.arange(size + 1) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        mask = None
        if self.data.mask_documents and segment_ids is not None:
            mask = (segment_ids[:, 1:] == segment_ids[:, :-1]).astype(np.float32)
        return Batch(
            tokens,
            np.asarray(sources, np.int64),
            loss_mask_BS=mask,
            position_ids_BS=positions[:, :-1] if self.data.reset_positions and positions is not None else None,
            segment_ids_BS=segment_ids[:, :-1] if self.data.mask_documents and segment_ids is not None else None,
        )
