"""What a recommendation says: a share with its interval, why it is that share, and what it predicts.

Losses come as functions, so that nothing here knows how a law is fitted:

    loss(share_G, tokens_G) -> loss_DG

The share is that of the corpus the loss is measured on: r_d for the domain loss, r_g = 1 - r_d for the general loss.

Array suffixes: D draws (row 0 is the fit, the others are bootstrap draws), G points asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws.result import Estimate, plain
from cpt.laws.rows import Floats

Loss = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A recommended share of domain data.

    Args:
        usage: which question it answers: `tradeoff`, `limited`, `threshold`, `cmr`.
        value: share of domain data, r_d [fraction]; NaN when no share meets the tolerance.
        low, high: 95 % percentile interval over the draws; NaN without draws.
        decided_by: `minimum` (the domain loss is lowest there), `tolerance` (the general loss may not rise further),
            `range` (end of the shares that were searched), `nothing` (no share is admissible).
        at_edge: the share is an end of the range that was searched.
        reason: why it is this share, one sentence.
        tokens: of the run [tokens]; None when they were not part of the question.
        loss_domain, loss_general: predicted there [nats/token].
        limit: the general loss that is allowed [nats/token].
        smallest_rise: least achievable general loss less that of the base [nats/token], when nothing is admissible.
        epochs: passes over the domain data, when they are limited.
        notes: what else a person should know, one sentence each.
        draws_D: the share of each draw, the fit first.
    """

    usage: str
    value: float
    low: float
    high: float
    decided_by: str
    at_edge: bool = False
    reason: str
    tokens: float | None = None
    loss_domain: Estimate | None = None
    loss_general: Estimate | None = None
    limit: float | None = None
    smallest_rise: float | None = None
    epochs: float | None = None
    notes: tuple[str, ...] = ()
    draws_D: Floats = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    @property
    def replay(self) -> float:
        """Share of general data, 1 - r_d [fraction]."""
        return 1.0 - self.value

    @property
    def replay_tokens(self) -> float:
        """General tokens of the run [tokens]."""
        return self.replay * (math.nan if self.tokens is None else self.tokens)

    @property
    def domain_tokens(self) -> float:
        """Domain tokens of the run, repeats counted [tokens]."""
        return self.value * (math.nan if self.tokens is None else self.tokens)

    def to_json(self) -> dict[str, Any]:
        """One JSON object; the draws themselves are left out, what is not known is null."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "draws_D"}
        amounts = {"replay": self.replay, "replay_tokens": self.replay_tokens, "domain_tokens": self.domain_tokens}
        answer: dict[str, Any] = plain(found | amounts)
        return answer


def general_limit(base_general: float | None, tolerance: float | None, eps_g: float | None) -> float:
    """The general loss that is allowed [nats/token].

    Args:
        base_general: general loss before training, L_g0 [nats/token].
        tolerance: allowed relative rise, 0.03 for 3 % [fraction].
        eps_g: allowed rise [nats/token]; give one of the two.

    Raises:
        UsageError: the base loss is missing, both or none are given, or one is negative.
    """
    if tolerance is not None and eps_g is not None:
        raise UsageError("`tolerance` and `eps_g` both say how far the general loss may rise", "give one of them")
    if tolerance is None and eps_g is None:
        raise UsageError("how far may the general loss rise?", "give `tolerance=3%` or `eps_g=0.05` (nats per token)")
    for name, value in (("tolerance", tolerance), ("eps_g", eps_g)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"`{name}` is {value:g}; it must be 0 or more")
    if base_general is None or not math.isfinite(base_general):
        raise UsageError(
            "the general loss before training is missing, so a rise cannot be measured",
            "give `base_general=`, or a row of the table with `tokens` 0",
        )
    if base_general <= 0:
        raise UsageError(f"`base_general` is {base_general:g}; a loss must be above 0")
    return base_general * (1 + tolerance) if tolerance is not None else base_general + (eps_g or 0.0)
