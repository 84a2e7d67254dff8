"""Several corpora: the mixture with the lowest weighted loss within limits and caps.

    minimise    sum_i weight_i * L_i(h)
    over        h >= 0, sum_k h_k = 1,  h_k * D <= most tokens of corpus k,  L_j(h) <= limit_j

Where every loss is convex in the shares this is a convex programme, and the answer carries a certificate: for convex
losses the linearised problem bounds what any allowed mixture can reach, hence `gap` bounds what the answer misses.
Where they are not, it is the best of many starts and says so.

Array suffixes: D draws, G mixtures asked, K corpora, J limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from scipy import optimize

from cpt.base.errors import UsageError
from cpt.base.registry import unknown
from cpt.laws.result import Estimate, plain
from cpt.laws.rows import Floats

SharesLoss = Callable[[Floats, slice], Floats]  # (shares_GK, which draws) -> loss_DG of these draws
_STEP = 1e-6  # of the central differences, in shares
_WITHIN = 1e-7  # by which a limit may be exceeded [nats/token]
_AGREE = 1e-6  # starts whose objectives differ by less found the same optimum [nats/token]


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
    problem = _Problem(losses, dict(goal), limits, np.full(len(corpora), smallest), high_K)
    first_K, found = problem.best(0, _start_points(problem, starts if not convex else 4, seed))
    draws_DK = np.empty((draws, len(corpora)))
    for draw in range(1, draws):
        draws_DK[draw] = problem.emptied(problem.best(draw, [first_K])[0], draw)
    excess = problem.excess(first_K, 0)
    allowed = excess <= _WITHIN
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


@dataclass(frozen=True)
class _Agreement:
    starts: int
    agreeing: int


@dataclass(frozen=True)
class _Problem:
    """The programme of one draw at a time."""

    losses: Mapping[str, SharesLoss]
    goal: Mapping[str, float]
    limits: Mapping[str, float]
    low_K: Floats
    high_K: Floats

    def value(self, shares_GK: Floats, draw: int) -> Floats:
        """Weighted loss_G."""
        total_G = np.zeros(len(shares_GK))
        for name, weight in self.goal.items():
            if weight:
                total_G += weight * self.losses[name](shares_GK, slice(draw, draw + 1))[0]
        return total_G

    def room(self, shares_GK: Floats, draw: int) -> Floats:
        """Limit less loss, room_GJ; not negative where a mixture is allowed."""
        each = [most - self.losses[name](shares_GK, slice(draw, draw + 1))[0] for name, most in self.limits.items()]
        return np.stack(each, axis=1) if each else np.zeros((len(shares_GK), 0))

    def excess(self, shares_K: Floats, draw: int) -> float:
        """By how much the worst limit is exceeded, 0 when none is [nats/token]."""
        return float(np.max(-self.room(shares_K[None], draw), initial=0.0))

    def best(self, draw: int, starts: list[Floats]) -> tuple[Floats, _Agreement]:
        """The lowest allowed mixture found from these starts; without any, the one that exceeds its limits least."""
        found = [self._descend(draw, start) for start in starts]
        allowed = [h for h in found if self.excess(h, draw) <= _WITHIN]
        if not allowed:
            closest = [self._least_excess(draw, start) for start in starts]
            nearest = min(closest, key=lambda h: self.excess(h, draw))
            if self.excess(nearest, draw) > _WITHIN:
                return nearest, _Agreement(len(starts), 1)
            allowed = [h for h in (self._descend(draw, nearest), nearest) if self.excess(h, draw) <= _WITHIN]
        values = [float(self.value(h[None], draw)[0]) for h in allowed]
        agreeing = sum(v - min(values) <= _AGREE for v in values)
        return allowed[int(np.argmin(values))], _Agreement(len(starts), agreeing)

    def emptied(self, shares_K: Floats, draw: int) -> Floats:
        """Shares at the lower end set to 0, where the law sees no difference and the mixture stays as good."""
        least_K = np.where(shares_K <= self.low_K * (1 + 1e-6), 0.0, shares_K)
        least_K = least_K + (1 - least_K.sum()) * np.where(least_K < self.high_K, least_K, 0.0) / least_K.sum()
        better = self.value(least_K[None], draw)[0] <= self.value(shares_K[None], draw)[0] + 1e-12
        kept = bool(np.all(least_K <= self.high_K)) and self.excess(least_K, draw) <= _WITHIN
        return least_K if better and kept and abs(least_K.sum() - 1) < 1e-12 else shares_K

    def gap(self, shares_K: Floats, draw: int) -> float:
        """What any allowed mixture can be better by, for convex losses: a linear programme [nats/token]."""
        slope_K = self._slopes(lambda h: self.value(h, draw)[:, None], shares_K)[0]
        room_J, slope_JK = self.room(shares_K[None], draw)[0], self._slopes(lambda h: self.room(h, draw), shares_K)
        found = optimize.linprog(
            slope_K,
            A_ub=-slope_JK if len(room_J) else None,
            b_ub=np.maximum(room_J, 0) - slope_JK @ shares_K if len(room_J) else None,
            A_eq=np.ones((1, len(shares_K))),
            b_eq=[1.0],
            bounds=np.stack([self.low_K, self.high_K], axis=1),
            method="highs",
        )
        return max(0.0, float(slope_K @ shares_K - found.fun)) if found.status == 0 else float("inf")

    def _descend(self, draw: int, start_K: Floats) -> Floats:
        constraints: list[dict[str, Any]] = [_SUMS_TO_ONE]
        if self.limits:
            constraints.append(
                {
                    "type": "ineq",
                    "fun": lambda h: self.room(h[None], draw)[0],
                    "jac": lambda h: self._slopes(lambda g: self.room(g, draw), h),
                }
            )
        found = optimize.minimize(
            lambda h: float(self.value(h[None], draw)[0]),
            start_K,
            jac=lambda h: self._slopes(lambda g: self.value(g, draw)[:, None], h)[0],
            bounds=np.stack([self.low_K, self.high_K], axis=1),
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 300},
        )
        return self._on_simplex(found.x)

    def _least_excess(self, draw: int, start_K: Floats) -> Floats:
        """The mixture that exceeds its worst limit least: one more variable, the excess."""

        def room(x: Floats) -> Floats:
            return self.room(x[None, :-1], draw)[0] + x[-1]

        def room_slope(x: Floats) -> Floats:
            slope_JK = self._slopes(lambda g: self.room(g, draw), x[:-1])
            return np.concatenate([slope_JK, np.ones((len(slope_JK), 1))], axis=1)

        ends = [*zip(self.low_K, self.high_K, strict=True), (-10.0, None)]
        unit = np.append(np.zeros(len(start_K)), 1.0)
        sums = {"type": "eq", "fun": lambda x: x[:-1].sum() - 1, "jac": lambda x: 1 - unit}
        found = optimize.minimize(
            lambda x: x[-1],
            np.append(start_K, self.excess(start_K, draw)),
            jac=lambda x: unit,
            bounds=ends,
            constraints=[sums, {"type": "ineq", "fun": room, "jac": room_slope}],
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 300},
        )
        return self._on_simplex(found.x[:-1])

    def _slopes(self, of: Callable[[Floats], Floats], shares_K: Floats) -> Floats:
        """Derivatives by the shares, slope_JK, one-sided at the lower end."""
        steps_KK = np.eye(len(shares_K)) * _STEP
        below_K = np.minimum(_STEP, np.maximum(shares_K - self.low_K, 0))
        points = np.concatenate([shares_K + steps_KK, shares_K - np.diag(below_K)])
        value_GJ = of(points)
        slope: Floats = ((value_GJ[: len(shares_K)] - value_GJ[len(shares_K) :]) / (_STEP + below_K)[:, None]).T
        return slope

    def _on_simplex(self, shares_K: Floats) -> Floats:
        """Within the caps and of sum 1 to the last digit."""
        shares_K = np.clip(shares_K, self.low_K, self.high_K)
        for _ in range(3):
            miss = 1.0 - shares_K.sum()
            space_K = self.high_K - shares_K if miss > 0 else shares_K - self.low_K
            if abs(miss) < 1e-15 or space_K.sum() <= 0:
                break
            shares_K = np.clip(shares_K + miss * space_K / space_K.sum(), self.low_K, self.high_K)
        return shares_K


_SUMS_TO_ONE = {"type": "eq", "fun": lambda h: h.sum() - 1.0, "jac": np.ones_like}


def _start_points(problem: _Problem, count: int, seed: int) -> list[Floats]:
    """The middle of what the caps leave, then random mixtures, some of them near the corners."""
    rng = np.random.default_rng(seed)
    size = len(problem.high_K)
    shapes = [np.ones(size), *rng.dirichlet(np.ones(size), count // 2), *rng.dirichlet(np.full(size, 0.2), count)]
    return [_capped(shape, problem.low_K, problem.high_K) for shape in shapes[:count]]


def _capped(weight_K: Floats, low_K: Floats, high_K: Floats) -> Floats:
    """Shares in proportion to weights, within the caps; what a cap cuts off goes to the others."""

    def shares(scale: float) -> Floats:
        return np.clip(scale * weight_K, low_K, high_K)

    few, many = 0.0, 1.0
    while shares(many).sum() < 1 and many < 1e12:
        many *= 2
    for _ in range(200):
        middle = (few + many) / 2
        few, many = (middle, many) if shares(middle).sum() < 1 else (few, middle)
    found = shares(many)
    space_K = high_K - found
    return found + max(0.0, 1 - found.sum()) * space_K / (space_K.sum() or 1.0)


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
        return f"the weighted loss is lowest where {_names(at_limit)} reaches its limit"
    if at_cap:
        return f"the weighted loss is lowest with all of {_names(at_cap)} that its cap allows"
    return "the weighted loss has its minimum here; neither a cap nor a limit decides"


def _names(names: tuple[str, ...]) -> str:
    return " and ".join(f"`{n}`" for n in names)


def _guarantee(convex: bool, allowed: bool, gap: float, found: _Agreement, smallest: float) -> str:
    if not allowed:
        return "the mixture shown exceeds its worst limit least of all that were tried"
    if convex:
        of = f" of shares of at least {smallest:g}" if smallest else ""
        return f"the losses are convex in the shares: no allowed mixture{of} is better by more than {gap:.1g} nats"
    return (
        f"the losses are not convex in the shares, so a better mixture is not ruled out: this is the best of "
        f"{found.starts} starts, {found.agreeing} of which ended here or as low"
    )
