"""The stability gap: a score that falls at the start of a stage and comes back later.

Source:
    Guo et al. 2024, "Efficient Continual Pre-training by Mitigating the Stability Gap", arXiv:2406.14833.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cpt.base.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A stability gap of one domain in one stage.

    `recovery_tokens` is the first measured point after the lowest at which the score is back at its start; None with
    `is_gap` means "not recovered by `until`".
    """

    is_gap: bool  # the depth exceeds the noise band
    depth: float  # start minus lowest [score, for losses nats/token]
    relative: float | None  # depth as a share of the start's size
    lowest_tokens: int  # where it was lowest [tokens of the stage]
    recovery_tokens: int | None
    area: float  # integral of max(0, start - score) over the stage [score · tokens]
    until: int  # last measured point [tokens of the stage]
    noise: float  # half width of the noise band [score]

    def text(self) -> str:
        """One phrase for a table."""
        from cpt.base.units import show_count

        if not self.is_gap:
            return "none above the noise"
        if self.recovery_tokens is None:
            return f"{self.depth:.3f} deep, not recovered by {show_count(self.until)} tokens"
        return f"{self.depth:.3f} deep, recovered at {show_count(self.recovery_tokens)} tokens"


def find_gap(tokens: Sequence[int], scores: Sequence[float], stderr: float = 0.0) -> Gap:
    """Measure the gap of one curve. Where there is none the depth may still be above 0, inside the noise.

    Args:
        tokens: measured points [tokens of the stage], rising; the first is 0, the untouched model.
        scores: the score at each of them; more is better (give losses with their sign turned).
        stderr: standard error of one measurement [score]; a gap counts when it is deeper than twice that.
    """
    if not tokens or len(tokens) != len(scores):
        raise UsageError("a stability gap needs as many scores as token counts, and at least one")
    if any(b <= a for a, b in itertools.pairwise(tokens)):
        raise UsageError("a stability gap needs token counts that rise")
    start = scores[0]
    lowest = min(range(len(scores)), key=lambda i: scores[i])
    depth = start - scores[lowest]
    back = [t for t, s in zip(tokens[lowest + 1 :], scores[lowest + 1 :], strict=True) if s >= start]
    points = list(zip(tokens, scores, strict=True))
    area = sum(_below(start, *a, *b) for a, b in itertools.pairwise(points))
    return Gap(
        is_gap=depth > 2 * stderr and depth > 0,
        depth=depth,
        relative=depth / abs(start) if start else None,
        lowest_tokens=tokens[lowest],
        recovery_tokens=back[0] if back and depth > 0 else None,
        area=area,
        until=tokens[-1],
        noise=2 * stderr,
    )


def _below(level: float, t0: float, s0: float, t1: float, s1: float) -> float:
    """Area between a level and the part of a straight piece that lies below it."""
    d0, d1 = level - s0, level - s1
    if d0 <= 0 and d1 <= 0:
        return 0.0
    if d0 >= 0 and d1 >= 0:
        return (d0 + d1) / 2 * (t1 - t0)
    share = max(d0, d1) / (max(d0, d1) - min(d0, d1))
    return max(d0, d1) / 2 * share * (t1 - t0)
