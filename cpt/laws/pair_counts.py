"""How often pairs of neighbouring tokens occur in samples of text while the merges of a tokenizer are applied in order.

A word is kept once per sample with its count, as a linked list of tokens over flat arrays. A merge visits only the
places where its pair stands, so that a step costs what it changes. The result is the changes of every step.

Array suffixes: K columns (samples or parts of them), L places (a token in a word), S steps (merges), P pairs,
E changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cpt.data.merges import Merge, Merges

Ints = NDArray[np.int64]
NONE = -1  # no neighbour, no token, no pair
RARE = 2  # pairs that all samples together never have more often are not kept


@dataclass(frozen=True, eq=False, kw_only=True)
class PairCounts:
    """Counts of pairs before every merge.

    Args:
        merged_SK: count of each merge's own pair, right before it is merged.
        own_S: number of each merge's own pair, NONE when it is not kept.
        pair_E, column_E, change_E: changes in the order of steps: first the counts before any merge, then what each
            merge changes.
        first_S: where the changes begin that merge `s` makes, and where those of the last one end.
        names_P: the two tokens of each pair.
    """

    merged_SK: Ints
    own_S: Ints
    pair_E: NDArray[np.int32]
    column_E: NDArray[np.int32]
    change_E: Ints
    first_S: Ints
    names_P: list[tuple[str, str]]


def count(merges: Merges, words_K: Sequence[Counter[str]], steps: int) -> PairCounts:
    """Apply the first merges to samples and record how the counts of all pairs change.

    Args:
        words_K: the words of each sample, with counts.
        steps: merges to apply.
    """
    used = merges.merges[:steps]
    text = _Text.of(merges, words_K, used)
    found = [text.start()]
    merged = []
    for step in range(len(used)):
        own, changes = text.merge(step)
        merged.append(own)
        found.append(changes)
    return _kept(text, np.array(merged, np.int64).reshape(len(used), text.columns), found)


@dataclass(eq=False)
class _Changes:
    """Sums by (pair, column)."""

    key_E: Ints
    column_E: Ints
    change_E: Ints


@dataclass(eq=False)
class _Text:
    """All words as linked lists of tokens."""

    names: list[str]
    columns: int
    steps: list[tuple[int, int, int]]  # left, right and made token of each merge
    token_L: Ints
    next_L: Ints
    before_L: Ints
    column_L: Ints
    weight_L: Ints
    key_M: Ints = field(init=False)  # keys of the merges, sorted, and the step of each
    step_M: Ints = field(init=False)
    places: list[list[Ints]] = field(init=False)  # where the pair of a merge may stand
    begins: NDArray[np.bool_] = field(init=False)  # scratch: place begins a pair of this step

    @classmethod
    def of(cls, merges: Merges, words_K: Sequence[Counter[str]], used: Sequence[Merge]) -> _Text:
        letters, first, last, weight, column = [], [], [], [], []
        for k, words in enumerate(words_K):
            spelled = list(words)
            sizes = np.fromiter(map(len, spelled), np.int64, len(spelled))
            keep = sizes > 0
            times = np.fromiter(words.values(), np.int64, len(spelled))[keep]
            sizes = sizes[keep]
            codes = np.frombuffer("".join(spelled).encode("utf-32-le", "surrogatepass"), np.uint32)
            ends = np.cumsum(sizes)
            at_end, at_start = np.zeros(len(codes), bool), np.zeros(len(codes), bool)
            at_end[ends - 1] = True
            at_start[ends - sizes] = True
            letters.append(codes)
            first.append(at_start)
            last.append(at_end)
            weight.append(np.repeat(times, sizes))
            column.append(np.full(len(codes), k))
        code_L, first_L, last_L = np.concatenate(letters), np.concatenate(first), np.concatenate(last)
        kinds, kind_L = np.unique(code_L.astype(np.int64) * 4 + first_L * 2 + last_L, return_inverse=True)
        vocabulary = merges.tokenizer.get_vocab(with_added_tokens=False)
        names = list(dict.fromkeys(t for m in used for t in (m.left, m.right, m.token)))
        ids = {name: i for i, name in enumerate(names)}
        token_kinds = []
        for kind in kinds.tolist():
            name = ("" if kind & 2 else merges.prefix) + chr(kind >> 2) + (merges.suffix if kind & 1 else "")
            if name in vocabulary and name not in ids:
                ids[name] = len(names)
                names.append(name)
            token_kinds.append(ids.get(name, NONE))
        token_L = np.array(token_kinds, np.int64)[kind_L]
        size = len(token_L)
        next_L, before_L = np.arange(1, size + 1), np.arange(-1, size - 1)
        next_L[last_L] = NONE
        before_L[first_L] = NONE
        unknown = np.flatnonzero(token_L == NONE)  # stands between its neighbours for good
        next_L[before_L[unknown][before_L[unknown] >= 0]] = NONE
        before_L[next_L[unknown][next_L[unknown] >= 0]] = NONE
        next_L[unknown] = before_L[unknown] = NONE
        return cls(
            names,
            len(words_K),
            [(ids[m.left], ids[m.right], ids[m.token]) for m in used],
            token_L,
            next_L,
            before_L,
            np.concatenate(column),
            np.concatenate(weight),
        )

    def start(self) -> _Changes:
        """Counts before any merge; also notes where the pairs of the merges stand."""
        keys = np.array([self._key(a, b) for a, b, _ in self.steps], np.int64)
        self.step_M = np.argsort(keys, kind="stable")
        self.key_M = keys[self.step_M]
        self.places = [[] for _ in self.steps]
        self.begins = np.zeros(len(self.token_L) + 1, bool)  # the last one is that of NONE
        place = np.flatnonzero(self.next_L != NONE)
        key = self._key(self.token_L[place], self.token_L[self.next_L[place]])
        self._note(key, place)
        return self._sums(key, self.column_L[place], self.weight_L[place])

    def merge(self, step: int) -> tuple[Ints, _Changes]:
        """Apply a merge; give the count of its pair by column before, and the changes."""
        a, b, made = self.steps[step]
        left = np.unique(np.concatenate(self.places[step])) if self.places[step] else np.empty(0, np.int64)
        self.places[step] = []
        right = self.next_L[left]
        stands = (self.token_L[left] == a) & (right != NONE)
        stands[stands] = self.token_L[right[stands]] == b
        left = left[stands]
        own_K = np.bincount(self.column_L[left], self.weight_L[left], self.columns).astype(np.int64)
        if a == b:
            left = self._every_other(left)
        right = self.next_L[left]
        self.begins[left] = True
        after = self.next_L[right]
        before = self.before_L[left]
        has_before, ends = before != NONE, (after != NONE) & ~self.begins[after]
        gone = np.concatenate([self._key(self.token_L[before[has_before]], a), self._key(b, self.token_L[after[ends]])])
        self.begins[left] = False
        self.token_L[left] = made
        self.token_L[right] = NONE
        self.next_L[left] = after
        self.before_L[after[after != NONE]] = left[after != NONE]
        before = self.before_L[left[has_before]]
        place = np.concatenate([before, left[ends]])
        came = np.concatenate([self._key(self.token_L[before], made), self._key(made, self.token_L[after[ends]])])
        self._note(came, place)
        touched = np.concatenate([left[has_before], left[ends]])
        weight, column = self.weight_L[touched], self.column_L[touched]
        other = gone != self._key(a, b)
        some = np.flatnonzero(own_K)
        changes = self._sums(
            np.concatenate([gone[other], came, np.full(len(some), self._key(a, b))]),
            np.concatenate([column[other], column, some]),
            np.concatenate([-weight[other], weight, -own_K[some]]),
        )
        return own_K, changes

    def _every_other(self, left: Ints) -> Ints:
        """Of places where a token meets itself those that a merge from left to right takes: `aaa` has one pair."""
        self.begins[left] = True
        starts = ~self.begins[self.before_L[left]]
        self.begins[left] = False
        index = np.arange(len(left))
        run = np.maximum.accumulate(np.where(starts, index, 0))
        return left[(index - run) % 2 == 0]

    def _key(self, left: Ints | int, right: Ints | int) -> Ints:
        return np.asarray(left, np.int64) * len(self.names) + right

    def _note(self, key: Ints, place: Ints) -> None:
        """Note places whose pair some merge will take."""
        if not len(self.key_M):
            return
        at = np.minimum(np.searchsorted(self.key_M, key), len(self.key_M) - 1)
        wanted = self.key_M[at] == key
        steps, place = self.step_M[at[wanted]], place[wanted]
        order = np.argsort(steps, kind="stable")
        steps, place = steps[order], place[order]
        borders = np.flatnonzero(np.diff(steps)) + 1
        for s, some in zip(steps[np.r_[0, borders]] if len(steps) else (), np.split(place, borders), strict=False):
            self.places[s].append(some)

    def _sums(self, key: Ints, column: Ints, change: Ints) -> _Changes:
        both = key * self.columns + column
        order = np.argsort(both, kind="stable")
        both = both[order]
        first = np.flatnonzero(np.r_[True, both[1:] != both[:-1]]) if len(both) else np.empty(0, np.int64)
        sums = np.add.reduceat(change[order], first) if len(both) else np.empty(0, np.int64)
        keep = sums != 0
        both = both[first][keep]
        return _Changes(both // self.columns, both % self.columns, sums[keep])


def _kept(text: _Text, merged_SK: Ints, found: list[_Changes]) -> PairCounts:
    """The changes of pairs that were ever frequent enough to count, with the pairs numbered."""
    key_E = np.concatenate([f.key_E for f in found])
    column_E = np.concatenate([f.column_E for f in found])
    change_E = np.concatenate([f.change_E for f in found])
    first = np.cumsum([0] + [len(f.key_E) for f in found])
    key_P, pair_E = np.unique(key_E, return_inverse=True)
    often = np.bincount(pair_E, np.maximum(change_E, 0), len(key_P)) > RARE
    number_P = np.cumsum(often) - 1
    keep = often[pair_E]
    passed = np.r_[0, np.cumsum(keep)]
    left_P, right_P = np.divmod(key_P[often], len(text.names))
    key_S = text._key(np.array([s[0] for s in text.steps]), np.array([s[1] for s in text.steps]))
    at = np.minimum(np.searchsorted(key_P, key_S), len(key_P) - 1)
    own_S = np.where((key_P[at] == key_S) & often[at], number_P[at], NONE)
    return PairCounts(
        merged_SK=merged_SK,
        own_S=own_S,
        pair_E=number_P[pair_E[keep]].astype(np.int32),
        column_E=column_E[keep].astype(np.int32),
        change_E=change_E[keep],
        first_S=passed[first[1:]],
        names_P=[(text.names[a], text.names[b]) for a, b in zip(left_P, right_P, strict=True)],
    )
