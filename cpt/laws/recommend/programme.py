"""A programme over the simplex: a weighted loss made small within caps on shares and limits on other losses.

Solved by sequential quadratic programming from several starts. For convex losses `gap` bounds what any allowed
mixture can be better by: the objective and the limits lie above their tangents, so the linearised problem is no worse.

Array suffixes: G mixtures asked, K corpora, J limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from cpt.laws.rows import Floats

SharesLoss = Callable[[Floats, slice], Floats]  # (shares_GK, which draws) -> loss_DG of these draws
_STEP = 1e-6  # of the central differences, in shares
_DUST = 1e-9  # shares this close to their lower end are at it
WITHIN = 1e-7  # by which a limit may be exceeded [nats/token]
_AGREE = 1e-6  # starts whose objectives differ by less found the same optimum [nats/token]


@dataclass(frozen=True)
class Agreement:
    """How many starts ended as low as the best."""

    starts: int
    agreeing: int


@dataclass(frozen=True)
class Programme:
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

    def best(self, draw: int, starts: list[Floats]) -> tuple[Floats, Agreement]:
        """The lowest allowed mixture found from these starts; without any, the one that exceeds its limits least."""
        found = [self._descend(draw, start) for start in starts]
        allowed = [h for h in found if self.excess(h, draw) <= WITHIN]
        if not allowed:
            closest = [self._least_excess(draw, start) for start in starts]
            nearest = min(closest, key=lambda h: self.excess(h, draw))
            if self.excess(nearest, draw) > WITHIN:
                return nearest, Agreement(len(starts), 1)
            allowed = [h for h in (self._descend(draw, nearest), nearest) if self.excess(h, draw) <= WITHIN]
        values = [float(self.value(h[None], draw)[0]) for h in allowed]
        agreeing = sum(v - min(values) <= _AGREE for v in values)
        return allowed[int(np.argmin(values))], Agreement(len(starts), agreeing)

    def emptied(self, shares_K: Floats, draw: int) -> Floats:
        """Shares at the lower end set to 0, where the law sees no difference and the mixture stays as good."""
        least_K = np.where(shares_K <= self.low_K * (1 + 1e-6), 0.0, shares_K)
        least_K = least_K + (1 - least_K.sum()) * np.where(least_K < self.high_K, least_K, 0.0) / least_K.sum()
        better = self.value(least_K[None], draw)[0] <= self.value(shares_K[None], draw)[0] + 1e-12
        kept = bool(np.all(least_K <= self.high_K)) and self.excess(least_K, draw) <= WITHIN
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
        shares_K = np.where(shares_K < self.low_K + _DUST, self.low_K, shares_K)
        for _ in range(3):
            miss = 1.0 - shares_K.sum()
            space_K = np.where(shares_K > self.low_K, self.high_K - shares_K, 0) if miss > 0 else shares_K - self.low_K
            if abs(miss) < 1e-15 or space_K.sum() <= 0:
                break
            shares_K = np.clip(shares_K + miss * space_K / space_K.sum(), self.low_K, self.high_K)
        return shares_K


_SUMS_TO_ONE = {"type": "eq", "fun": lambda h: h.sum() - 1.0, "jac": np.ones_like}


def start_points(problem: Programme, count: int, seed: int) -> list[Floats]:
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
