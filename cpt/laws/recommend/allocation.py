"""Usage 3: how large a model and how many tokens a compute budget is best spent on, at a fixed share.

    minimise L(N, D) with 6 * N * D = F

Solved by golden section on log N, so that it holds for any law with N and D. For the D-CPT form it is
N = G * (F/6)^(beta/(alpha+beta)) with G = (alpha*A / (beta*B*r^eta))^(1/(alpha+beta)), which a test compares.

Source:
    Hoffmann et al. 2022, arXiv:2203.15556, approach 3; Que et al. 2024, arXiv:2406.01375, usage 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from scipy import optimize

from cpt.base.errors import UsageError
from cpt.laws.recommend.search import ask
from cpt.laws.result import Estimate, plain
from cpt.laws.rows import Floats

SizedLoss = Callable[[Floats, Floats], Floats]  # (n_params_G, tokens_G) -> loss_DG, at a fixed share
FLOPS_PER = 6.0  # of a training step, per parameter and token


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A compute-optimal model.

    Args:
        value: parameters, N [count]; low, high: 95 % percentile interval over the draws.
        tokens: D [tokens], with its interval.
        flops: the budget [FLOPs].
        loss: predicted there [nats/token].
        at_edge: N is an end of the sizes that were searched.
        reason: one sentence.
        draws_D: N of each draw, the fit first.
    """

    value: float
    low: float
    high: float
    tokens: Estimate
    flops: float
    loss: Estimate
    at_edge: bool = False
    reason: str
    draws_D: Floats = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """One JSON object; the draws themselves are left out, what is not known is null."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "draws_D"}
        answer: dict[str, Any] = plain({"usage": "allocation"} | found)
        return answer


def allocation(loss: SizedLoss, *, flops: float, smallest: float = 1e4, largest: float | None = None) -> Allocation:
    """The model size and run length with the lowest loss for a compute budget.

    Args:
        loss: loss by (n_params, tokens) at a fixed share.
        flops: training compute, 6 * N * D [FLOPs].
        smallest, largest: model sizes to search [count]; the largest defaults to one that sees 1e5 tokens.

    Raises:
        UsageError: the budget is not positive or leaves no room between the sizes.
    """
    if not flops > 0:
        raise UsageError(f"`flops` is {flops:g}; it must be above 0")
    largest = largest or flops / FLOPS_PER / 1e5
    if not largest > smallest:
        raise UsageError(f"a budget of {flops:g} FLOPs is too small for a model of {smallest:g} parameters")

    def along(log_n_G: Floats) -> Floats:
        n_params_G = np.exp(log_n_G)
        return loss(n_params_G, flops / FLOPS_PER / n_params_G)

    log_n_D, at_edge = _lowest(along, np.log(smallest), np.log(largest))
    n_params_D = np.exp(log_n_D)
    spread = Estimate.of(n_params_D)
    reason = "a larger model would see too few tokens, a smaller one would be too weak"
    if at_edge:
        reason = "the loss still falls at the end of the sizes that were searched"
    return Allocation(
        value=float(n_params_D[0]),
        low=spread.low,
        high=spread.high,
        tokens=Estimate.of(flops / FLOPS_PER / n_params_D),
        flops=flops,
        loss=Estimate.of(along(log_n_D[:1])[:, 0]),
        at_edge=at_edge,
        reason=reason,
        draws_D=n_params_D,
    )


def _lowest(along: Callable[[Floats], Floats], low: float, high: float) -> tuple[Floats, bool]:
    """The lowest point of each draw, by parabolas on a grid; of the fit itself (row 0) by golden section."""
    grid_G = np.linspace(low, high, 401)
    loss_DG = ask(along, grid_G)
    best_D = loss_DG.argmin(axis=1)
    step = grid_G[1] - grid_G[0]
    at_edge = bool(best_D[0] in (0, len(grid_G) - 1))
    log_n_D = grid_G[best_D]
    for draw in range(len(log_n_D)):
        log_n_D[draw] = _parabola(grid_G, loss_DG[draw], int(best_D[draw]))
    if not at_edge:
        around = (log_n_D[0] - step, log_n_D[0] + step)
        log_n_D[0] = optimize.minimize_scalar(
            lambda x: along(np.array([x]))[0, 0], bounds=around, method="bounded", options={"xatol": 1e-10}
        ).x
    return log_n_D, at_edge


def _parabola(grid_G: Floats, loss_G: Floats, best: int) -> float:
    """The vertex of the parabola through the lowest point of an even grid and its neighbours."""
    if best in (0, len(grid_G) - 1):
        return float(grid_G[best])
    before, here, after = loss_G[best - 1 : best + 2]
    bend = before - 2 * here + after
    shift = 0.5 * (before - after) / bend if bend > 0 else 0.0
    return float(grid_G[best] + shift * (grid_G[1] - grid_G[0]))
