"""Usage 1: the share with the lowest domain loss among those that keep the general loss within a tolerance.

With two monotone losses that is the largest admissible share. Without, it is the lowest point of the domain loss
inside the admissible set, which may lie well below the largest admissible share.

Source:
    Que et al. 2024, D-CPT law, arXiv:2406.01375, usage 1.
"""

from __future__ import annotations

import numpy as np

from cpt.laws.recommend.answer import Loss, Ratio, general_limit
from cpt.laws.recommend.search import Found, best_share
from cpt.laws.result import Estimate
from cpt.laws.rows import Floats


def tradeoff(
    domain: Loss,
    general: Loss,
    *,
    tokens: float,
    base_general: float | None,
    tolerance: float | None = None,
    eps_g: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Ratio:
    """The share of domain data for a run of so many tokens and a general loss that may rise so far.

    Args:
        domain: domain loss by (r_d, tokens).
        general: general loss by (r_g, tokens), r_g = 1 - r_d.
        tokens: length of the run [tokens].
        base_general: general loss before training [nats/token].
        tolerance, eps_g: allowed relative rise, or allowed rise [nats/token].
        low, high: shares to search, r_d.

    Raises:
        UsageError: the tolerance or the base loss is missing or wrong.
    """
    limit = general_limit(base_general, tolerance, eps_g)
    assert base_general is not None

    def domain_along(share_G: Floats) -> Floats:
        return domain(share_G, np.full_like(share_G, tokens))

    def general_along(share_G: Floats) -> Floats:
        return general(1.0 - share_G, np.full_like(share_G, tokens))

    found = best_share(domain_along, general_along, limit, low, high)
    share = float(found.share_D[0])
    at = np.array([share])
    loss_domain, loss_general = Estimate.of(domain_along(at)[:, 0]), Estimate.of(general_along(at)[:, 0])
    spread = Estimate.of(found.share_D)
    nothing = found.decided_by == "nothing"
    return Ratio(
        usage="tradeoff",
        value=float("nan") if nothing else share,
        low=spread.low,
        high=spread.high,
        decided_by=found.decided_by,
        at_edge=found.decided_by == "range",
        reason=_reason(found, limit, loss_general.value - base_general),
        tokens=tokens,
        loss_domain=loss_domain,
        loss_general=loss_general,
        limit=limit,
        smallest_rise=loss_general.value - base_general if nothing else None,
        notes=draws_without(found),
        draws_D=found.share_D,
    )


def draws_without(found: Found) -> tuple[str, ...]:
    """A sentence when some draws have no admissible share at all."""
    draws_D = found.admissible_D[1:]
    missing = int((~draws_D).sum())
    if not missing:
        return ()
    part = f"{missing} of {len(draws_D)} bootstrap draws"
    return (f"in {part} no share meets the tolerance; they count with the share whose general loss is lowest",)


def _reason(found: Found, limit: float, rise: float) -> str:
    share = found.share_D[0]
    if found.decided_by == "nothing":
        return (
            f"no share keeps the general loss at or below {limit:.4f}; the smallest rise is {rise:.4f} nats, "
            f"at a domain share of {share:.3f}"
        )
    if found.decided_by == "tolerance":
        return f"the domain loss is lowest where the general loss reaches its limit of {limit:.4f}"
    if found.decided_by == "minimum":
        return "the domain loss has its minimum here; other shares within the tolerance are worse for the domain too"
    return f"the general loss stays within its limit of {limit:.4f} up to the end of the shares that were searched"
