"""Which source gives the next sample: Tijdeman's chairman assignment.

Every source i has a share λ_i (they sum to 1) and has given x_i samples after n. Its debt is d_i = n λ_i - x_i. With k
sources and θ = 1 / (2k - 2), sample n goes, among the sources whose debt would reach θ (they may give), to the one
whose debt would first pass 1 - θ if it were passed over (the earliest deadline). Then |d_i| ≤ 1 - θ < 1 after every
sample; giving to the largest debt does not hold this from three sources on.

Shares may change at any sample. Debts go on, so nothing is forgotten; the bound is proven for shares that are known
ahead, so around a change that nobody knew of a debt may pass 1 for a while.

All arithmetic is in whole numbers (shares are parts of 2^40), so the order is the same on every machine and the state
is exact. One sample costs O(log k).

Source:
    Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32, theorem 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from cpt.base.errors import UsageError

UNIT = 1 << 40


def whole_shares(shares: Sequence[float]) -> list[int]:
    """Shares as parts of `UNIT` that sum to it exactly: rounded down, the rest to the largest remainders."""
    total = float(sum(shares))
    if not shares or total <= 0 or any(not 0 <= s < float("inf") for s in shares):
        raise UsageError(f"mixture shares must be finite, not negative and not all zero, found {list(shares)}")
    exact = [s / total * UNIT for s in shares]
    parts = [int(e) if s == 0 else max(1, int(e)) for e, s in zip(exact, shares, strict=True)]
    order = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    rest = UNIT - sum(parts)
    if rest > 0:
        each, more = divmod(rest, sum(s > 0 for s in shares))
        positive = [i for i in order if shares[i] > 0]
        for place, i in enumerate(positive):
            parts[i] += each + (place < more)
    else:
        parts[max(range(len(parts)), key=lambda i: parts[i])] += rest
    return parts


class Assignment:
    """The sequence of sources, as whole numbers 0..k-1.

    Args:
        shares: of each source; normalised.
        state: what `state` gave, to go on from there; its shares win over `shares`.
    """

    def __init__(self, shares: Sequence[float], state: dict[str, Any] | None = None) -> None:
        self.samples = 0
        self._step = 0  # samples since the last change of shares
        self._given = [0] * len(shares)  # by each source since then
        self._waiting: list[tuple[int, int]] = []
        self._ready: list[tuple[int, int]] = []
        self.counts = [0] * len(shares)
        self._debts = [0] * len(shares)  # at the last change of shares, in parts of UNIT
        self._shares = whole_shares(shares)
        if state is not None:
            if not len(state["counts"]) == len(state["debts"]) == len(state["shares"]) == len(shares):
                raise UsageError(f"the saved mixture has {len(state['counts'])} sources, the stage has {len(shares)}")
            self.samples = int(state["samples"])
            self.counts = [int(c) for c in state["counts"]]
            self._debts = [int(d) for d in state["debts"]]
            self._shares = [int(s) for s in state["shares"]]
        self._arrange()

    def take(self, count: int) -> list[int]:
        """The sources of the next `count` samples."""
        chosen = []
        waiting, ready, shares, given = self._waiting, self._ready, self._shares, self._given
        samples = self._step
        for _ in range(count):
            samples += 1
            while waiting and waiting[0][0] <= samples:
                i = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (self._deadline(i), i))
            # Nobody ready: only after a change of shares that nobody knew of.
            i = heapq.heappop(ready)[1] if ready else heapq.heappop(waiting)[1]
            chosen.append(i)
            given[i] += 1
            if shares[i]:
                heapq.heappush(waiting, (self._release(i), i))
        self._step = samples
        self.samples += count
        for i in chosen:
            self.counts[i] += 1
        return chosen

    def set_shares(self, shares: Sequence[float]) -> None:
        """Other shares from the next sample on; what each source is owed or ahead stays."""
        assert len(shares) == len(self._shares), "a mixture keeps its sources"
        self._debts = self._debts_now()
        self._shares = whole_shares(shares)
        self._arrange()

    def state(self) -> dict[str, Any]:
        """Everything to go on from here, in JSON types."""
        return {
            "samples": self.samples,
            "counts": list(self.counts),
            "debts": self._debts_now(),
            "shares": list(self._shares),
        }

    def _debts_now(self) -> list[int]:
        step = self._step
        return [d + step * s - g * UNIT for d, s, g in zip(self._debts, self._shares, self._given, strict=True)]

    def _arrange(self) -> None:
        """Build the heaps from the debts: who waits (by the first sample it may give), who may give (by deadline)."""
        self._step = 0
        self._given = [0] * len(self._shares)
        active = sum(s > 0 for s in self._shares)
        self._theta = UNIT // (2 * active - 2) if active > 1 else 0
        self._waiting = [(self._release(i), i) for i, s in enumerate(self._shares) if s]
        self._ready = []
        heapq.heapify(self._waiting)

    def _release(self, i: int) -> int:
        """First sample at which the debt of i reaches θ."""
        return -((self._debts[i] - self._given[i] * UNIT - self._theta) // self._shares[i])

    def _deadline(self, i: int) -> int:
        """The last sample up to which i may be passed over: its debt is then still at most 1 - θ.

        A whole number, so that a resume, which counts from another sample, compares alike.
        """
        return (UNIT - self._theta + self._given[i] * UNIT - self._debts[i]) // self._shares[i]
