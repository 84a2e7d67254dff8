"""CMR laws: how both losses move from the base model's, ratio by ratio, for a model of one size.

Token laws at a fixed ratio, on changes from the base model, T in units of 0.2e9 tokens:
    dL_d(T) = a1·T^s1 + b1
    dL_g(T) = a2·T^s2 + a3·T^s3 + b2        two terms, because the general loss first rises, then falls
Ratio law at a fixed T, through the token laws of all measured ratios:
    L(R) = alpha·R^s + beta                 R the domain share, 0 < R, separately for both losses

Every measured ratio has its own token law; between and beyond them the ratio law predicts. `critical` answers which
ratio is feasible.

Source:
    Gu et al. 2024, arXiv:2407.17467 (CMR scaling law), equations 4 to 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws.fit import DELTA, descend
from cpt.laws.law import LAWS, Law, Parameter
from cpt.laws.options import one_of
from cpt.laws.power import box_cox, fit_power
from cpt.laws.rows import Floats, Rows

UNIT = 0.2e9  # tokens in one unit of T
SAME = 1e-6  # shares nearer than this are one ratio
SMALLEST = 1e-3  # the ratio law is asked no nearer to R = 0
MOST = 50.0  # bound on a and b [nats/token]
EXPONENTS = (-1.5, -1.0, -0.6, -0.3, -0.1, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
STARTS, SEEDS = 10, 24
DESCENT = 300  # iterations of each seed
SIDES = {"domain": 1, "general": 2}  # power terms of the token law


@dataclass(frozen=True)
class TokenLaw:
    """Change of a loss from the base model's at one ratio, for one or more draws.

    Args:
        a_BJ, s_BJ: factors [nats/token] and exponents of the power terms.
        b_B: constant [nats/token].
    """

    a_BJ: Floats
    s_BJ: Floats
    b_B: Floats

    def change(self, units: Floats | float) -> Floats:
        """dL_B at T units of 0.2e9 tokens [nats/token]."""
        moved_B: Floats = (self.a_BJ * np.asarray(units, np.float64)[..., None] ** self.s_BJ).sum(-1) + self.b_B
        return moved_B


@LAWS.add("cmr")
@dataclass(frozen=True)
class Cmr(Law):
    """A token law for each ratio, and the ratio law between them.

    Args:
        side: `domain` (one power term) or `general` (two); found from the rows: a loss that rises above the base
            model's is taken for the general one.
        ratios: measured shares of the corpus that the loss is measured on, ascending [fraction].
        base: loss of the base model [nats/token].
    """

    side: str = "general"
    ratios: tuple[float, ...] = ()
    base: float = 0.0

    name: ClassVar[str] = "cmr"
    equation: ClassVar[str] = (
        "dL_d(T) = a1·T^s1 + b1, dL_g(T) = a2·T^s2 + a3·T^s3 + b2 (T in 0.2e9 tokens), L(R) = alpha·R^s + beta"
    )
    settable: ClassVar[Mapping[str, Callable[[object], object]]] = {"side": one_of(*SIDES)}
    needs: ClassVar[tuple[str, ...]] = ("tokens", "share", "base")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        names = ["a1", "s1", "b1"] if self.side == "domain" else ["a2", "s2", "a3", "s3", "b2"]
        bounds = {"s": 2.0}
        return tuple(
            Parameter(f"{name}@{ratio:.6g}", -bounds.get(name[0], MOST), bounds.get(name[0], MOST), log=False)
            for ratio in self.ratios
            for name in names
        )

    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        assert rows.share_R is not None and rows.tokens_R is not None
        units_R = rows.tokens_R / UNIT
        apart_RK = np.abs(rows.share_R[:, None] - np.array(self.ratios))
        own_R = apart_RK.argmin(1)
        between_R = apart_RK.min(1) > SAME
        width = len(self.parameters) // len(self.ratios)
        loss_BR = np.empty((len(theta_BP), len(rows)))
        gradient_BRP = np.zeros((*loss_BR.shape, theta_BP.shape[1]))
        for k in range(len(self.ratios)):
            at = np.flatnonzero((own_R == k) & ~between_R)
            if len(at):
                block = slice(k * width, (k + 1) * width)
                loss_BR[:, at], gradient_BRP[:, at, block] = self._along(theta_BP[:, block], units_R[at])
        if between_R.any():
            at = np.flatnonzero(between_R)
            loss_BR[:, at], gradient_BRP[:, at] = self._between(theta_BP, units_R[at], rows.share_R[at])
        return loss_BR, gradient_BRP

    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """Ratio by ratio: the best exponents of a grid with all else by least squares, each followed to its optimum.

        The ratios share no parameter, so that start i holds the i-th best of every one.
        """
        assert rows.share_R is not None and rows.tokens_R is not None
        count = min(count, STARTS)
        blocks = []
        for ratio in self.ratios:
            at = np.abs(rows.share_R - ratio) <= SAME
            units_R, moved_R = rows.tokens_R[at] / UNIT, rows.loss_R[at] - self.base
            found = []
            for exponents in combinations(EXPONENTS, SIDES[self.side]):
                design = np.stack([*[units_R**s for s in exponents], np.ones(len(units_R))], 1)
                scale = np.abs(design).max(0, initial=1e-12)
                solved = np.linalg.lstsq(design / scale, moved_R, rcond=1e-7)[0] / scale
                solved = np.clip(solved, -MOST, MOST)
                miss = float(np.abs(design @ solved - moved_R).sum())
                pairs = [value for j, s in enumerate(exponents) for value in (solved[j], s)]
                found.append((miss, [*pairs, solved[-1]]))
            found.sort()
            seed_SQ = np.array([theta for _, theta in found[:SEEDS]])
            weight_SR = np.broadcast_to(rows.weight_R[at], (len(seed_SQ), int(at.sum())))
            alone = replace(self, ratios=(ratio,))
            low_Q, high_Q = alone.bounds
            seed_SQ = np.clip(seed_SQ, low_Q, high_Q)
            seed_SQ, score_S = descend(alone, rows.take(at), seed_SQ, weight_SR, DELTA, "linear", DESCENT)
            order = np.argsort(score_S, kind="stable")
            blocks.append(seed_SQ[order[np.minimum(np.arange(count), len(order) - 1)]])
        return np.concatenate(blocks, 1)

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Law, tuple[str, ...]]:
        """The ratios of the rows, each with enough checkpoints for its token law.

        Raises:
            UsageError: several sizes, no base loss, fewer than three ratios, or too few checkpoints of one.
        """
        if rows.share_R is None or rows.tokens_R is None:
            raise UsageError("law `cmr` needs columns of ratios and of tokens")
        if rows.n_params_R is not None and len(sizes := np.unique(rows.n_params_R)) > 1:
            raise UsageError(
                f"law `cmr` holds for one model size, found {len(sizes)} values of `n_params`",
                f"choose one: `where='n_params=={sizes[-1]:.10g}'`",
            )
        if rows.base_R is None or not np.isfinite(rows.base_R).all():
            raise UsageError(
                "law `cmr` needs the losses before training",
                "give `base_general=` and `base_domain=`, or rows with 0 tokens",
            )
        rises = bool((rows.loss_R > rows.base_R).any())
        given = {"side": "general" if rises else "domain", **options}
        if given["side"] not in SIDES:
            raise UsageError(f"`side` of law `cmr` is `{given['side']}`, wanted `domain` or `general`")
        ratios = np.unique(np.round(rows.share_R, 6))
        inside = [r for r in ratios if (r > SMALLEST if given["side"] == "domain" else 0 < r < 1 - SMALLEST)]
        if len(inside) < 3:
            raise UsageError(f"law `cmr` needs three different ratios between 0 and 1, found {len(inside)}")
        needed = 2 * SIDES[str(given["side"])] + 2
        for ratio in ratios:
            length = len(np.unique(rows.tokens_R[np.abs(rows.share_R - ratio) <= SAME]))
            if length < needed:
                raise UsageError(
                    f"law `cmr` needs {needed} checkpoints of different length for every ratio,"
                    f" share {ratio:g} has {length}"
                )
        return cls(side=str(given["side"]), ratios=tuple(ratios.tolist()), base=float(rows.base_R[0])), ()

    def left_with(self, rows: Rows) -> Law:
        """With the ratios that are left: a token law without rows would be nothing but where it started."""
        law, _ = Cmr.for_rows(rows, side=self.side)
        return self if law == self else law

    def token_laws(self, theta_BP: Floats) -> dict[float, TokenLaw]:
        """The token law of every measured domain share R, ascending in R."""
        width = len(self.parameters) // len(self.ratios)
        found = {}
        for k, share in enumerate(self.ratios):
            block = theta_BP[:, k * width : (k + 1) * width]
            ratio = share if self.side == "domain" else round(1 - share, 9)
            found[ratio] = TokenLaw(block[:, 0:-1:2], block[:, 1:-1:2], block[:, -1])
        return dict(sorted(found.items()))

    def ratio_law(self, theta_BP: Floats, tokens: float) -> tuple[Floats, Floats, Floats]:
        """alpha_B, s_B and beta_B of L(R) = alpha·R^s + beta at a token count, R the domain share above 0."""
        laws = self.token_laws(theta_BP)
        inside = [ratio for ratio in laws if ratio > SMALLEST and (self.side == "domain" or ratio < 1 - SAME)]
        loss_BK = self.base + np.stack([laws[ratio].change(tokens / UNIT) for ratio in inside], 1)
        return fit_power(np.array(inside), loss_BK)

    def _along(self, block_BQ: Floats, units_R: Floats) -> tuple[Floats, Floats]:
        """Losses of one ratio's token law and their derivatives by its own parameters."""
        log_R = np.log(units_R)
        loss_BR = self.base + np.repeat(block_BQ[:, -1:], len(units_R), 1)
        slopes = []
        for j in range(SIDES[self.side]):
            power_BR = np.exp(block_BQ[:, 2 * j + 1, None] * log_R)
            part_BR = block_BQ[:, 2 * j, None] * power_BR
            loss_BR = loss_BR + part_BR
            slopes += [power_BR, part_BR * log_R]
        return loss_BR, np.stack([*slopes, np.ones_like(loss_BR)], 2)

    def _between(self, theta_BP: Floats, units_R: Floats, share_R: Floats) -> tuple[Floats, Floats]:
        """Losses by the ratio law through the token laws; derivatives follow how the fitted curve moves."""
        width = len(self.parameters) // len(self.ratios)
        ratio_K, ratio_R = np.array(self.ratios), share_R
        if self.side == "general":
            ratio_K, ratio_R = 1 - ratio_K, 1 - ratio_R
        inside_K = np.flatnonzero((ratio_K > SMALLEST) & ((self.side == "domain") | (ratio_K < 1 - SAME)))
        ratio_R = np.maximum(ratio_R, SMALLEST)
        loss_BR = np.empty((len(theta_BP), len(units_R)))
        gradient_BRP = np.zeros((*loss_BR.shape, theta_BP.shape[1]))
        for units in np.unique(units_R):
            at = np.flatnonzero(units_R == units)
            parts = [self._along(theta_BP[:, k * width : (k + 1) * width], np.array([units])) for k in inside_K]
            known_BK = np.concatenate([part[0] for part in parts], 1)
            alpha_B, s_B, beta_B = fit_power(ratio_K[inside_K], known_BK)
            log_R, log_K = np.log(ratio_R[at]), np.log(ratio_K[inside_K])
            loss_BR[:, at] = alpha_B[:, None] * np.exp(s_B[:, None] * log_R) + beta_B[:, None]
            weight_BRK = _through(alpha_B, s_B, beta_B, log_R, log_K, known_BK)
            for j, k in enumerate(inside_K):
                block = slice(k * width, (k + 1) * width)
                gradient_BRP[:, at, block] = weight_BRK[:, :, j, None] * parts[j][1][:, 0, None, :]
        return loss_BR, gradient_BRP


def _through(alpha_B: Floats, s_B: Floats, beta_B: Floats, log_R: Floats, log_K: Floats, y_BK: Floats) -> Floats:
    """How far the curve at each point moves when one of the values that it was fitted to does: BRK.

    With c·(x^s - 1)/s + b, whose J are the derivatives by (c, s, b), a minimum of sum (curve - y)^2 moves by H^-1 J.
    """
    c_B1, s_B1 = (alpha_B * s_B)[:, None], s_B[:, None]
    _, slope_BK, bend_BK = box_cox(log_K[None], s_B1)
    at_BR3, at_BK3 = _slopes(c_B1, s_B1, log_R), _slopes(c_B1, s_B1, log_K)
    miss_BK = alpha_B[:, None] * np.exp(s_B1 * log_K) + beta_B[:, None] - y_BK
    curve_B33 = at_BK3.transpose(0, 2, 1) @ at_BK3
    curve_B33[:, 0, 1] += (miss_BK * slope_BK).sum(1)
    curve_B33[:, 1, 0] += (miss_BK * slope_BK).sum(1)
    curve_B33[:, 1, 1] += (miss_BK * c_B1 * bend_BK).sum(1)
    moved: Floats = at_BR3 @ np.linalg.pinv(curve_B33, rcond=1e-12, hermitian=True) @ at_BK3.transpose(0, 2, 1)
    return moved


def _slopes(c_B1: Floats, s_B1: Floats, log_R: Floats) -> Floats:
    """Derivatives of c·(x^s - 1)/s + b by c, s and b: BR3."""
    value_BR, slope_BR, _ = box_cox(log_R[None], s_B1)
    return np.stack([value_BR, c_B1 * slope_BR, np.ones_like(value_BR)], 2)
