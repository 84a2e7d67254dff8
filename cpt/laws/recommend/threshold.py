"""Critical ratio by threshold: the largest share of domain data that keeps the general loss within its limit.

Source:
    Gu et al. 2024, CMR scaling law, arXiv:2407.17467: the admissible ratios at fixed tokens.
"""

from __future__ import annotations

import numpy as np

from cpt.laws.recommend.answer import Loss, Ratio, general_limit
from cpt.laws.recommend.search import best_share
from cpt.laws.recommend.tradeoff import draws_without
from cpt.laws.result import Estimate
from cpt.laws.rows import Floats


def threshold(
    general: Loss,
    *,
    tokens: float,
    base_general: float | None,
    tolerance: float | None = None,
    eps_g: float | None = None,
    domain: Loss | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Ratio:
    """The largest admissible share; its `replay` is the critical general share r_g.

    Args:
        general: general loss by (r_g, tokens).
        tokens: length of the run [tokens].
        base_general: general loss before training [nats/token].
        tolerance, eps_g: allowed relative rise, or allowed rise [nats/token].
        domain: domain loss by (r_d, tokens), for the prediction only.
        low, high: shares to search, r_d.

    Raises:
        UsageError: the tolerance or the base loss is missing or wrong.
    """
    limit = general_limit(base_general, tolerance, eps_g)
    assert base_general is not None

    def general_along(share_G: Floats) -> Floats:
        return general(1.0 - share_G, np.full_like(share_G, tokens))

    found = best_share(lambda share_G: np.tile(-share_G, (_draws(general_along), 1)), general_along, limit, low, high)
    share = float(found.share_D[0])
    at = np.array([share])
    loss_general = Estimate.of(general_along(at)[:, 0])
    rise = loss_general.value - base_general
    nothing = found.decided_by == "nothing"
    if nothing:
        reason = f"no share keeps the general loss at or below {limit:.4f}; the smallest rise is {rise:.4f} nats"
    elif found.decided_by == "range":
        reason = f"the general loss stays within its limit of {limit:.4f} without any replay that was searched"
    else:
        reason = f"the general loss reaches its limit of {limit:.4f} at a general share of {1 - share:.4f}"
    spread = Estimate.of(found.share_D)
    return Ratio(
        usage="threshold",
        value=float("nan") if nothing else share,
        low=spread.low,
        high=spread.high,
        decided_by=found.decided_by,
        at_edge=found.decided_by == "range",
        reason=reason,
        tokens=tokens,
        loss_domain=None if domain is None else Estimate.of(domain(at, np.array([tokens]))[:, 0]),
        loss_general=loss_general,
        limit=limit,
        smallest_rise=rise if nothing else None,
        notes=draws_without(found),
        draws_D=found.share_D,
    )


def _draws(general_along: object) -> int:
    return len(general_along(np.array([0.5])))  # type: ignore[operator]
