"""Usage 2: a fixed amount of domain data, general data as needed.

A smaller domain share makes the run longer (D = D_d / r_d), which helps the domain loss through D and hurts it
through r. With epochs the domain data may be read again, at the value that the repeated-data law gives repeats.

Source:
    Que et al. 2024, D-CPT law, arXiv:2406.01375, usage 2; Muennighoff et al. 2023, arXiv:2305.16264, for repeats.
"""

from __future__ import annotations

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws.recommend.answer import Loss, Ratio, general_limit
from cpt.laws.recommend.search import Found, best_share
from cpt.laws.recommend.tradeoff import draws_without
from cpt.laws.repeated import R_DATA, effective_tokens
from cpt.laws.result import Estimate
from cpt.laws.rows import Floats

SMALLEST = 1e-3  # share below which no run would be made, when no smallest observed share is given


def limited(
    domain: Loss,
    general: Loss | None = None,
    *,
    domain_tokens: float,
    max_tokens: float | None = None,
    low: float = SMALLEST,
    max_epochs: float = 1.0,
    r_star: float = R_DATA,
    base_general: float | None = None,
    tolerance: float | None = None,
    eps_g: float | None = None,
) -> Ratio:
    """The share of domain data that makes the best of a fixed amount of it.

    Args:
        domain: domain loss by (r_d, tokens).
        general: general loss by (r_g, tokens), for the prediction and for a tolerance.
        domain_tokens: distinct domain tokens there are, D_d [tokens].
        max_tokens: longest run [tokens]; at small shares it ends before the domain data do.
        low: smallest share to search, r_d: the smallest observed one.
        max_epochs: passes over the domain data that are allowed.
        r_star: epochs after which a repeat is worth 1/e of the first, `laws.repeated`.
        base_general, tolerance, eps_g: a limit on the general loss, as in `tradeoff`; none when both are None.

    Raises:
        UsageError: an amount is not positive, more than 40 epochs, or the tolerance lacks what it needs.
    """
    for name, value in (("domain_tokens", domain_tokens), ("max_tokens", max_tokens), ("max_epochs", max_epochs)):
        if value is not None and not value > 0:
            raise UsageError(f"`{name}` is {value:g}; it must be above 0")
    has_limit = tolerance is not None or eps_g is not None
    if has_limit and general is None:
        raise UsageError("a tolerance needs the general loss, which the table does not hold")
    limit = general_limit(base_general, tolerance, eps_g) if has_limit else None
    low = min(max(low, SMALLEST), 1.0)

    def seen(share_G: Floats) -> Floats:
        """Domain tokens of the run, repeats counted [tokens]."""
        most_G = np.full_like(share_G, domain_tokens * max_epochs)
        return most_G if max_tokens is None else np.minimum(most_G, share_G * max_tokens)

    def tokens(share_G: Floats) -> Floats:
        """Tokens of the run as the law counts them: repeats at their worth [tokens]."""
        worth_G: Floats = effective_tokens(np.full_like(share_G, domain_tokens), seen(share_G), r_star)
        return worth_G / share_G

    def domain_along(share_G: Floats) -> Floats:
        return domain(share_G, tokens(share_G))

    def general_along(share_G: Floats) -> Floats:
        assert general is not None
        return general(1.0 - share_G, seen(share_G) / share_G)

    within = general_along if limit is not None else None
    full = None if max_tokens is None else domain_tokens * max_epochs / max_tokens  # all data read, all tokens spent
    most = limit if limit is not None else np.inf
    found = best_share(domain_along, within, most, low, 1.0, full, same_tokens=False)
    share = float(found.share_D[0])
    at = np.array([share])
    seen_there = float(seen(at)[0])
    nothing = found.decided_by == "nothing"
    loss_general = None if general is None else Estimate.of(general_along(at)[:, 0])
    rise = loss_general.value - base_general if nothing and loss_general and base_general else None
    spread = Estimate.of(found.share_D)
    return Ratio(
        usage="limited",
        value=float("nan") if nothing else share,
        low=spread.low,
        high=spread.high,
        decided_by=found.decided_by,
        at_edge=found.decided_by == "range",
        reason=_reason(found, low, limit, rise, full),
        tokens=seen_there / share,
        loss_domain=Estimate.of(domain_along(at)[:, 0]),
        loss_general=loss_general,
        limit=limit,
        smallest_rise=rise,
        epochs=seen_there / domain_tokens,
        notes=_notes(found, seen_there, domain_tokens, max_epochs),
        draws_D=found.share_D,
    )


def _reason(found: Found, low: float, limit: float | None, rise: float | None, full: float | None) -> str:
    if found.decided_by == "nothing":
        return f"no share keeps the general loss at or below {limit:.4f}; the smallest rise is {rise:.4f} nats"
    if found.decided_by == "tolerance":
        return f"the domain loss is lowest where the general loss reaches its limit of {limit:.4f}"
    if full is not None and found.share_D[0] == full:
        return "the longest run that is allowed, with all the domain data in it"
    if found.decided_by == "minimum":
        return "less general data would shorten the run too far, more would dilute the domain data too much"
    if found.share_D[0] <= low:
        return f"a longer run with more general data helps down to {low:g}, the smallest share that was searched"
    return "general data only dilute the domain data here; the run is domain data alone"


def _notes(found: Found, seen: float, domain_tokens: float, max_epochs: float) -> tuple[str, ...]:
    notes = draws_without(found)
    if seen < domain_tokens * max_epochs * (1 - 1e-9):
        notes += (f"the cap on tokens ends the run after {seen / domain_tokens:.2f} passes over the domain data",)
    return notes
