"""Whether an attempt still moves, from the signs of life of its ranks. No input or output here.

A hang is when no rank has gone on with anything for a long time. Ranks wait for each other, so all stand still at once;
the one to look at is the one that has not even a sign of life (stopped, or its machine is gone), else the one that is
furthest behind.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cpt.base import pulse
from cpt.base.units import show_duration

# Of one step number: what comes after what. An evaluation at step n comes after the save of step n.
_ORDER = {pulse.START: 0, pulse.LOAD: 1, pulse.STEP: 2, pulse.SAVE: 3, pulse.EVAL: 4, pulse.END: 5}
_SLOW = 1.5  # times the median
_STARVING = 0.1  # of a step's time


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank last said of itself; see `base.pulse`.

    Args:
        t: when [unix seconds].
        moved: when it last went on with anything [unix seconds].
    """

    rank: int
    pid: int
    host: str
    t: float
    doing: str
    step: int | None
    count: int
    moved: float
    own_s: float = 0.0
    data_share: float = 0.0

    @property
    def place(self) -> tuple[int, int, int]:
        """How far it is; larger is further."""
        return (self.step if self.step is not None else -1, _ORDER.get(self.doing, 2), self.count)


@dataclass(frozen=True, kw_only=True)
class Hang:
    """An attempt that does not move.

    Args:
        rank: the one to look at.
        silent: ranks without a sign of life: stopped, or their machine is gone.
        behind: of the others, those that are behind the rest; empty when all are at the same place.
        step, doing: where it is, or where the others wait for a silent one.
        since: since when nothing moves [unix seconds].
        ranks: what each rank last did, for the record.
    """

    rank: int
    pid: int
    host: str
    silent: tuple[int, ...]
    behind: tuple[int, ...]
    step: int | None
    doing: str
    since: float
    text: str
    ranks: tuple[Mapping[str, object], ...]


def judge(beats: Mapping[int, Beat], now: float, hang_after: float) -> Hang | None:
    """The hang of an attempt, if it is one. The ranks' clocks are taken to agree to a part of `hang_after`.

    Args:
        beats: by rank.
        now: [unix seconds].
        hang_after: without progress on any rank [s]; 0 = never.
    """
    # Before its first word and after its last one a rank may take its time: libraries are imported, a law is fitted.
    # It gives signs of life all the same: one that stays silent is waited for by the others.
    working = any(b.doing not in (pulse.START, pulse.END) for b in beats.values())
    stopped = any(now - b.t > hang_after and b.doing == pulse.START for b in beats.values())
    if not hang_after or not (working or stopped):
        return None
    since = max(b.moved for b in beats.values())
    if now - since <= hang_after:
        return None
    silent = tuple(sorted(r for r, b in beats.items() if now - b.t > hang_after / 2 and b.doing != pulse.END))
    living = {r: b for r, b in beats.items() if r not in silent and b.doing != pulse.END}
    behind: tuple[int, ...] = ()
    if living:
        last = min(b.place for b in living.values())
        if any(b.place != last for b in living.values()):
            behind = tuple(sorted(r for r, b in living.items() if b.place == last))
    rank = silent[0] if silent else behind[0] if behind else min(living)
    # What a silent rank said last may be older than what it did: the living ones say where they wait for it.
    at = living[min(living)] if silent and living else beats[rank]
    return Hang(
        rank=rank,
        pid=beats[rank].pid,
        host=beats[rank].host,
        silent=silent,
        behind=behind,
        step=at.step,
        doing=at.doing,
        since=since,
        text=_text(beats[rank], at, silent, behind, since, now),
        ranks=tuple(
            {"rank": b.rank, "doing": b.doing, "step": b.step, "host": b.host} for _, b in sorted(beats.items())
        ),
    )


def _text(one: Beat, at: Beat, silent: tuple[int, ...], behind: tuple[int, ...], since: float, now: float) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(since))
    head = f"nothing has moved for {show_duration(now - since)} (since {clock})"
    where = f"in `{at.doing}`" + (f" of step {at.step}" if at.step is not None else "")
    others = [r for r in silent or behind if r != one.rank]
    too = f"; so {'are' if len(others) > 1 else 'is'} {_ranks(others)}" if others else ""
    if silent:
        where = f"it was {where}" if at is one else f"others wait {where}"
        return f"{head}: rank {one.rank} on `{one.host}` is without a sign of life, {where}{too}"
    if behind:
        return f"{head}: rank {one.rank} is behind the others, {where}{too}"
    return f"{head}: all ranks are {where}"


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def notes(beats: Mapping[int, Beat]) -> list[tuple[str, str]]:
    """(name, sentence) of what makes an attempt slow: a rank that computes longer than the others, waits for data.

    On GPUs a rank's own time is that of its host alone, which hands work to the device ahead of time.
    """
    found = []
    known = {r: b.own_s for r, b in beats.items() if b.own_s > 0}
    if len(known) > 1:
        median = statistics.median_low(known.values())
        for rank, own in sorted(known.items()):
            if own > _SLOW * median:
                text = (
                    f"rank {rank} on `{beats[rank].host}` is slow: {own:.3g} s for its part of a step, "
                    f"others {median:.3g} s; all wait for it: a busy machine?"
                )
                found.append((f"slow {rank}", text))
    for rank, beat in sorted(beats.items()):
        if beat.data_share > _STARVING:
            text = f"rank {rank} on `{beat.host}` waits for data {beat.data_share:.0%} of the time: a slow disk?"
            found.append((f"starving {rank}", text))
    return found
