"""Several corpora: the mixture with the lowest weighted loss within limits and caps.

    minimise    sum_i weight_i * L_i(h)
    over        h >= 0, sum_k h_k = 1,  h_k * D <= most tokens of corpus k,  L_j(h) <= limit_j

Where every loss is convex in the shares this is a convex programme, and the answer carries a certificate: for convex
losses the linearised problem bounds what any allowed mixture can reach, hence `gap` bounds what the answer misses.
Where they are not, it is the best of many starts and says so.

Array suffixes: D draws, K corpora.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.registry import unknown
from cpt.laws.recommend.programme import WITHIN, Agreement, Programme, SharesLoss, start_points
from cpt.laws.result import Estimate, plain
from cpt.laws.rows import Floats


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A recommended mixture.

    Args:
        shares: of every corpus, with intervals [fraction].
        losses: predicted there [nats/token].
        objective: weighted loss there [nats/token].
        decided_by: `minimum`, `caps`, `limits` or `nothing` (no mixture is within the limits).
        at_edge: corpora whose share is 0 or at its cap.
        reason: one sentence.
        guarantee: what is known about other mixtures, one sentence.
        convex: the guarantee is a proof.
        gap: no allowed mixture is better by more, if convex [nats/token].
        tokens: of every corpus [tokens]; empty when the total is not part of the question.
        epochs: passes over every corpus whose distinct tokens are known.
        limits: highest losses allowed [nats/token].
        smallest_excess: least that the worst limit must be exceeded by, when nothing is allowed [nats/token].
        draws_DK: shares of each draw, the fit first.
    """

    shares: Mapping[str, Estimate]
    losses: Mapping[str, Estimate]
    objective: Estimate
    decided_by: str
    at_edge: tuple[str, ...]
    reason: str
    guarantee: str
    convex: bool
    gap: float
    tokens: Mapping[str, float]
    epochs: Mapping[str, float]
    limits: Mapping[str, float]
    smallest_excess: float | None = None
    notes: tuple[str, ...] = ()
    draws_DK: Floats = field(default_factory=lambda: np.empty((0, 0)), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """One JSON object; the draws themselves are left out, what is not known is null."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "draws_DK"}
        answer: dict[str, Any] = plain({"usage": "mixture"} | found)
        return answer


def mixture(
    losses: Mapping[str, SharesLoss],
    corpora: tuple[str, ...],
    *,
    goal: Mapping[str, float],
    limits: Mapping[str, float] | None = None,
    tokens: float | None = None,
    caps: Mapping[str, float] | None = None,
    unique_tokens: Mapping[str, float] | None = None,
    max_epochs: float | None = None,
    smallest: float = 0.0,
    convex: bool = False,
    draws: int = 1,
    starts: int = 20,
    seed: int = 0,
) -> Mixture:
    """The best mixture of several corpora.

    Args:
        losses: by target.
        corpora: names of the shares.
        goal: weight of each target in what is made small; targets without weight count 0.
        limits: highest loss allowed on a target [nats/token].
        tokens: length of the run [tokens]; caps need it.
        caps: most tokens to read of a corpus [tokens].
        unique_tokens: distinct tokens of a corpus [tokens].
        max_epochs: passes over each corpus that are allowed, where its distinct tokens are known.
        smallest: least share of each corpus (a law that floors small shares is asked no lower) [fraction].
        convex: every loss is convex in the shares, see `convexity`.
        draws: how many draws the losses have, the fit included.
        starts: to search from when not convex.

    Raises:
        UsageError: an unknown name, a weight below 0, caps without `tokens`, or caps that leave too few tokens.
    """
    limits, caps, unique_tokens = dict(limits or {}), dict(caps or {}), dict(unique_tokens or {})
    _check_names(losses, corpora, goal, limits, caps, unique_tokens)
    high_K = _ceilings(corpora, tokens, caps, unique_tokens, max_epochs)
    problem = Programme(losses, dict(goal), limits, np.full(len(corpora), smallest), high_K)
    first_K, found = problem.best(0, start_points(problem, starts if not convex else 4, seed))
    draws_DK = np.empty((draws, len(corpora)))
    near = [first_K] if convex else [first_K, *start_points(problem, 1, seed)]
    for draw in range(1, draws):
        draws_DK[draw] = problem.emptied(problem.best(draw, near)[0], draw)
    excess = problem.excess(first_K, 0)
    allowed = excess <= WITHIN
    gap = problem.gap(first_K, 0) if convex and allowed else float("nan")
    draws_DK[0] = first_K = problem.emptied(first_K, 0)
    here = {name: Estimate.of(loss(first_K[None], slice(None))[:, 0]) for name, loss in losses.items()}
    total_D = sum(weight * losses[name](first_K[None], slice(None))[:, 0] for name, weight in goal.items())
    read = {} if tokens is None else {name: float(h * tokens) for name, h in zip(corpora, first_K, strict=True)}
    at_cap = tuple(c for c, h, most in zip(corpora, first_K, high_K, strict=True) if most < 1 and h >= most - 1e-6)
    empty = tuple(c for c, h in zip(corpora, first_K, strict=True) if h <= smallest + 1e-6)
    at_limit = tuple(t for t, most in limits.items() if abs(here[t].value - most) <= 1e-6)
    decided_by = "nothing" if not allowed else "limits" if at_limit else "caps" if at_cap else "minimum"
    return Mixture(
        shares={name: Estimate.of(draws_DK[:, k]) for k, name in enumerate(corpora)},
        losses=here,
        objective=Estimate.of(np.asarray(total_D)),
        decided_by=decided_by,
        at_edge=at_cap + empty,
        reason=_reason(decided_by, at_limit, at_cap, excess),
        guarantee=_guarantee(convex, allowed, gap, found, smallest),
        convex=convex,
        gap=gap,
        tokens=read,
        epochs={name: read[name] / unique for name, unique in unique_tokens.items() if name in read},
        limits=limits,
        smallest_excess=None if allowed else excess,
        draws_DK=draws_DK,
    )


def _ceilings(
    corpora: tuple[str, ...],
    tokens: float | None,
    caps: Mapping[str, float],
    unique_tokens: Mapping[str, float],
    max_epochs: float | None,
) -> Floats:
    """Highest share of each corpus."""
    most = dict(caps)
    if max_epochs is not None:
        for name, unique in unique_tokens.items():
            most[name] = min(most.get(name, np.inf), unique * max_epochs)
    if most and tokens is None:
        raise UsageError("caps on corpora need the length of the run", "give `tokens=`")
    high_K = np.array([min(1.0, most.get(name, np.inf) / (tokens or 1.0)) for name in corpora])
    if high_K.sum() < 1:
        raise UsageError(
            f"the caps leave {high_K.sum() * (tokens or 1.0):.4g} tokens for a run of {tokens:.4g}",
            "raise the caps or the epochs, or shorten the run",
        )
    return high_K


def _check_names(
    losses: Mapping[str, SharesLoss],
    corpora: tuple[str, ...],
    goal: Mapping[str, float],
    limits: Mapping[str, float],
    caps: Mapping[str, float],
    unique_tokens: Mapping[str, float],
) -> None:
    for name in (*goal, *limits):
        if name not in losses:
            raise unknown("loss", name, losses)
    for name in (*caps, *unique_tokens):
        if name not in corpora:
            raise unknown("corpus", name, corpora)
    for name, weight in goal.items():
        if not weight >= 0:
            raise UsageError(f"the weight of `{name}` is {weight:g}; it must be 0 or more")
    if not any(goal.values()):
        raise UsageError("no loss has a weight, so no mixture is better than another")
    for name, amount in (*caps.items(), *unique_tokens.items()):
        if not amount > 0:
            raise UsageError(f"the tokens of `{name}` are {amount:g}; they must be above 0")


def _reason(decided_by: str, at_limit: tuple[str, ...], at_cap: tuple[str, ...], excess: float) -> str:
    if decided_by == "nothing":
        return f"no mixture is within all limits; the worst one is exceeded by at least {excess:.4f} nats"
    if at_limit:
        cap = f", with all of {_names(at_cap)} that its cap allows" if at_cap else ""
        return f"the weighted loss is lowest where {_names(at_limit)} reaches its limit{cap}"
    if at_cap:
        return f"the weighted loss is lowest with all of {_names(at_cap)} that its cap allows"
    return "the weighted loss has its minimum here; neither a cap nor a limit decides"


def _names(names: tuple[str, ...]) -> str:
    return " and ".join(f"`{n}`" for n in names)


def _guarantee(convex: bool, allowed: bool, gap: float, found: Agreement, smallest: float) -> str:
    if not allowed:
        return "the mixture shown exceeds its worst limit least of all that were tried"
    if convex:
        of = f" of shares of at least {smallest:g}" if smallest else ""
        least = f"{max(gap, 1e-12):.0e}"
        return f"the losses are convex in the shares: no allowed mixture{of} is better by more than {least} nats"
    return (
        f"the losses are not convex in the shares, so a better mixture is not ruled out: this is the best of "
        f"{found.starts} starts, {found.agreeing} of which ended here or as low"
    )
