"""The order of merges against counted pairs: where, under given shares of the sources, another pair was more frequent.

Counts are rates, in pairs per million bytes of a source's sample, so that a share weighs bytes of text. Steps are
replayed in blocks; only pairs that can exceed the lowest merged pair of a block are looked at step by step.

Array suffixes: J sources, K columns (parts of samples), S steps (merges), P pairs, E changes, R violated places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt.laws.pair_counts import NONE, Ints, PairCounts
from cpt.laws.rows import Floats

BLOCK = 64  # steps
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Violations:
    """Places (step, pair) in the order of merges, with how far the pair's rate lies over the merged pair's."""

    step_R: Ints
    pair_R: Ints
    excess_RJ: Floats  # of each source, to be weighed with its share


@dataclass(frozen=True, eq=False)
class Replay:
    """Counted pairs as rates of sources.

    Args:
        counts: by column.
        weight_KJ: what a count of a column adds to a source's rate; zero for the columns of other sources.
    """

    counts: PairCounts
    weight_KJ: Floats

    @property
    def merged_SJ(self) -> Floats:
        """Rate of each merge's own pair."""
        return np.asarray(self.counts.merged_SK @ self.weight_KJ)

    def violations(
        self, share_J: Floats, slack_S: Floats, slack_P: Floats, used_S: NDArray[np.bool_], most: int
    ) -> Violations:
        """The worst pairs of every step, over what the slacks of step and pair allow; up to `most` a step."""
        merged_SJ = self.merged_SJ
        limit_S = merged_SJ @ share_J + slack_S
        steps, pairs, excess = [], [], []
        for start, stop, rate_PJ, pair_E, step_E, rate_EJ in self._blocks():
            grown_P = np.bincount(pair_E, np.maximum(rate_EJ @ share_J, 0), len(rate_PJ))
            lowest = min(limit_S[start:stop][used_S[start:stop]], default=np.inf)
            able = np.flatnonzero(rate_PJ @ share_J + grown_P - slack_P > lowest + TOLERANCE)
            if not len(able):
                continue
            path_BAJ = _paths(able, stop - start, rate_PJ, pair_E, step_E, rate_EJ)
            over_BA = path_BAJ @ share_J - limit_S[start:stop, None] - slack_P[able]
            over_BA[~used_S[start:stop]] = 0
            over_BA[able == self.counts.own_S[start:stop, None]] = 0
            for b in np.flatnonzero((over_BA > TOLERANCE).any(axis=1)):
                worst = np.flatnonzero(over_BA[b] > TOLERANCE)
                if len(worst) > most:
                    worst = worst[np.argsort(-over_BA[b, worst], kind="stable")[:most]]
                steps.append(np.full(len(worst), start + b))
                pairs.append(able[worst])
                excess.append(path_BAJ[b, worst] - merged_SJ[start + b])
        if not steps:
            return Violations(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, len(share_J))))
        return Violations(np.concatenate(steps), np.concatenate(pairs), np.concatenate(excess))

    def excess(self, step_R: Ints, pair_R: Ints) -> Floats:
        """How far pairs lie over the merged pair at given places, in ascending order of steps: excess_RJ."""
        found = np.empty((len(step_R), self.weight_KJ.shape[1]))
        merged_SJ = self.merged_SJ
        for start, stop, rate_PJ, pair_E, step_E, rate_EJ in self._blocks():
            here = slice(*np.searchsorted(step_R, [start, stop]))
            if here.start < here.stop:
                able, index = np.unique(pair_R[here], return_inverse=True)
                path_BAJ = _paths(able, stop - start, rate_PJ, pair_E, step_E, rate_EJ)
                found[here] = path_BAJ[step_R[here] - start, index] - merged_SJ[step_R[here]]
        return found

    def _blocks(self) -> Iterator[tuple[int, int, Floats, Ints, Ints, Floats]]:
        """Blocks of steps: first, last + 1, rates before the first, and the changes that their merges make."""
        counts, steps = self.counts, len(self.counts.merged_SK)
        rate_PJ = np.zeros((len(counts.names_P), self.weight_KJ.shape[1]))
        first = slice(0, counts.first_S[0])
        np.add.at(rate_PJ, counts.pair_E[first], counts.change_E[first, None] * self.weight_KJ[counts.column_E[first]])
        for start in range(0, steps, BLOCK):
            stop = min(start + BLOCK, steps)
            part = slice(counts.first_S[start], counts.first_S[stop])
            pair_E = counts.pair_E[part].astype(np.int64)
            rate_EJ = counts.change_E[part, None] * self.weight_KJ[counts.column_E[part]]
            sizes = np.diff(counts.first_S[start : stop + 1])
            yield start, stop, rate_PJ, pair_E, np.repeat(np.arange(stop - start), sizes), rate_EJ
            np.add.at(rate_PJ, pair_E, rate_EJ)


def _paths(able: Ints, size: int, rate_PJ: Floats, pair_E: Ints, step_E: Ints, rate_EJ: Floats) -> Floats:
    """Rates of some pairs before each step of a block."""
    place_P = np.full(len(rate_PJ), NONE)
    place_P[able] = np.arange(len(able))
    change = np.zeros((size + 1, len(able), rate_PJ.shape[1]))
    change[0] = rate_PJ[able]
    some = place_P[pair_E] != NONE
    np.add.at(change, (step_E[some] + 1, place_P[pair_E[some]]), rate_EJ[some])
    return np.asarray(np.cumsum(change, axis=0)[:-1])
