"""Held-out documents as fixed windows: the same numbers for every layout, batch size and stage."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpt.base.errors import PlanError
from cpt.data.corpus import Corpus
from cpt.data.permute import Permutation
from cpt.plan.types import DataOptions


class ValidSet:
    """Whole held-out documents up to a number of tokens, packed into windows.

    Documents are taken in a fixed random order; the first is taken even when it alone is over the limit. The windows
    follow each other, each begins with the last token of the one before, so that every token is predicted once. When
    documents begin without a BOS token and the tokenizer has an EOS token, one stands before the first document, so
    that its first token is predicted too.

    Args:
        corpus: prepared corpus.
        seq_length: S, tokens of a window.
        tokens: at most so many (but at least one document).
        data: packing options of the run.

    Shapes:
        tokens_NS1 [n, S + 1] int64; the end of the last window is filled with EOS (or 0) and masked out.
        loss_mask_NS [n, S] float32, 1 where a label counts.
        position_ids_NS, segment_ids_NS [n, S] int64, as in `stream.Batch`; None when the run has no such option.
    """

    def __init__(self, corpus: Corpus, seq_length: int, tokens: int, data: DataOptions | None = None) -> None:
        data = data or DataOptions()
        chosen = choose(corpus, tokens)
        eos = corpus.eos_id
        parts = [corpus.valid.read(int(d)).astype(np.int64) for d in chosen]
        owners = [np.full(len(part), number + 1) for number, part in enumerate(parts)]
        if corpus.bos_id is None and eos is not None:
            parts.insert(0, np.array([eos]))
            owners.insert(0, np.array([1 if data.mask_documents else 0]))
        flat, owner = np.concatenate(parts), np.concatenate(owners)
        windows = max(1, -(-(len(flat) - 1) // seq_length))
        padding = windows * seq_length + 1 - len(flat)
        counted = np.ones(len(flat) - 1, np.float32)
        if data.mask_documents:
            counted = (owner[1:] == owner[:-1]).astype(np.float32)
        flat = np.concatenate([flat, np.full(padding, eos or 0)])
        owner = np.concatenate([owner, np.full(padding, -1)])
        rows = np.arange(windows)[:, None] * seq_length + np.arange(seq_length + 1)
        self.tokens_NS1: np.ndarray[Any, Any] = flat[rows]
        mask = np.concatenate([counted, np.zeros(padding, np.float32)])
        self.loss_mask_NS: np.ndarray[Any, Any] = mask.reshape(windows, seq_length)
        self.num_documents = len(chosen)
        self.num_tokens = int(counted.sum())
        self.num_bytes = int(corpus.valid_bytes()[chosen].sum())
        self.position_ids_NS: np.ndarray[Any, Any] | None = None
        self.segment_ids_NS: np.ndarray[Any, Any] | None = None
        inside = owner[rows][:, :-1]
        starts = np.ones(inside.shape, bool)
        starts[:, 1:] = inside[:, 1:] != inside[:, :-1]
        if data.mask_documents:
            self.segment_ids_NS = np.cumsum(starts, axis=1) - 1
        if data.reset_positions:
            columns = np.arange(seq_length)
            self.position_ids_NS = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)

    def __len__(self) -> int:
        return len(self.tokens_NS1)


def choose(corpus: Corpus, tokens: int) -> np.ndarray[Any, Any]:
    """Numbers of the held-out documents of a set, in their fixed random order."""
    lengths = corpus.valid.lengths
    if not lengths.any():
        raise PlanError(
            f"the corpus in `{corpus.folder}` has no held-out documents to measure",
            "set `valid` of its source to a share above 0, or leave it out of `evaluate.sources`",
        )
    documents = Permutation(len(lengths), "valid", corpus.content_hash)(np.arange(len(lengths)))
    documents = documents[lengths[documents] > 0]
    within = np.cumsum(lengths[documents], dtype=np.int64) <= tokens
    return documents[: max(1, int(within.sum()))]
