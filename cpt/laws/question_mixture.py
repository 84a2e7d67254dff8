"""Which mixture of several corpora: from what a person set to `recommend.multi_domain`, and back.

What is made small is the weighted sum of the losses in `goal`, without one the mean of all measured losses.

Array suffixes: D draws, G mixtures asked, K corpora.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cpt.laws.recommend.convexity import smallest_share, why_not_convex
from cpt.laws.recommend.distance import distance
from cpt.laws.recommend.multi_domain import Mixture, mixture
from cpt.laws.recommend.programme import SharesLoss
from cpt.laws.result import Estimate, Recommendation, TargetFit
from cpt.laws.rows import Floats, points
from cpt.laws.settings import Settings
from cpt.laws.table import Table


def recommend_mixture(
    table: Table, fits: Mapping[str, TargetFit], settings: Settings, n_params: float | None, tokens: float | None
) -> tuple[Recommendation | None, str]:
    """The best mixture within limits and caps, or None and why there is none.

    Args:
        n_params, tokens: what is asked about; None where the table has none.

    Raises:
        UsageError: a goal, limit or cap names what is not there, or the caps leave too few tokens.
    """
    unique = {name: float(np.max(values)) for name, values in table.unique_tokens.items() if name in table.corpora}
    goal = dict(settings.goal) or {name: 1 / len(fits) for name in fits}
    matters = [name for name in fits if goal.get(name) or name in settings.limits]
    draws = min(len(fit.theta_DP) for fit in fits.values())
    found = mixture(
        {name: _along(fit, n_params, tokens) for name, fit in fits.items()},
        table.corpora,
        goal=goal,
        limits=settings.limits,
        tokens=tokens,
        caps=settings.caps,
        unique_tokens=unique,
        max_epochs=settings.epochs if unique else None,
        smallest=max(smallest_share(fit.law) for fit in fits.values()),
        convex=not any(why_not_convex(fits[name].law, fits[name].theta_DP[0]) for name in matters),
        draws=draws,
        seed=settings.seed,
    )
    if found.decided_by == "nothing":
        return None, found.reason
    return _answer(found, table, fits, settings, n_params, tokens), ""


def _along(fit: TargetFit, n_params: float | None, tokens: float | None) -> SharesLoss:
    corpora = fit.rows.corpora
    own = corpora.index(fit.name) if fit.name in corpora else None

    def loss(shares_GK: Floats, which: slice) -> Floats:
        share_G = None if own is None else shares_GK[:, own]
        asked = points(
            n_params=n_params, tokens=tokens, share=share_G, shares=shares_GK, corpora=corpora, base=fit.base
        )
        return fit.law.loss(fit.theta_DP[which], asked)[0]

    return loss


def _answer(
    found: Mixture,
    table: Table,
    fits: Mapping[str, TargetFit],
    settings: Settings,
    n_params: float | None,
    tokens: float | None,
) -> Recommendation:
    shares_K = np.array([found.shares[name].value for name in table.corpora])
    first = next(iter(fits.values()))
    far = distance(first.rows, n_params=n_params, tokens=tokens, shares=shares_K)
    if settings.goal:
        named = ", ".join(f"{weight:g} x {name}" for name, weight in settings.goal.items() if weight)
        asked = f"the mixture with the lowest weighted loss ({named})"
    else:
        asked = "the mixture with the lowest mean of all measured losses"
    return Recommendation(
        usage="mixture",
        asked=asked,
        ratio=None,
        mixture=found.shares,
        n_params=n_params,
        tokens=None if tokens is None else Estimate(tokens),
        losses=found.losses,
        base={name: fit.base for name, fit in fits.items() if fit.base is not None},
        limits=found.limits,
        ratio_D=np.empty(0),
        inside=far.inside,
        factors={key: float(value) for key, value in far.factors.items()},
        decided_by=found.decided_by,
        notes=(found.reason, found.guarantee, *found.notes),
        more={
            "distance": far.reason,
            "objective": found.objective,
            "gap": found.gap if math.isfinite(found.gap) else None,
            "at_edge": found.at_edge,
            "tokens": found.tokens,
            "epochs": found.epochs,
        },
    )
