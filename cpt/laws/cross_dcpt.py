"""Cross-domain D-CPT law: one law for many domains, told apart by how learnable each is.

L(N, D, r, K) = E + A / N^alpha + B·r^eta / D^beta + C / (r + eps)^gamma + F / K^mu
K = w1 / k1 + w2·k2

k1 [nats/token] is a domain's loss before training and k2 the rate at which it falls over a short probe (about 1 % of a
normal run), so that a new domain costs only the probe. w1 and w2 are fitted together with the law; a common factor of
both is one of F, hence w1 + w2 = 1. k1 and k2 are divided by their means over the rows, or taken as they are.

Source:
    Que et al. 2024, arXiv:2406.01375, the cross-domain law and its third definition of K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.units import parse_amount
from cpt.laws.dcpt import DCPT
from cpt.laws.law import LAWS, Parameter
from cpt.laws.options import one_of
from cpt.laws.rows import Floats, Rows

FEWEST, FEW = 3, 5  # domains: below the first refused, below the second told
NORMALISE = ("mean", "none")
MILLION = 1e6


@LAWS.add("cross_dcpt")
@dataclass(frozen=True)
class CrossDCPT(DCPT):
    """The D-CPT law with a term in the learnability of the domain.

    Args:
        normalise: `mean`: 1/k1 and k2 are divided by their means over the rows; `none`: taken as they are.
        probe_tokens: length of the probe that k2 was measured over, kept with the fit; 0 when it is not known [tokens].
        mean_1, mean_2: the means of 1/k1 and k2 that were divided by.
    """

    name = "cross_dcpt"
    equation = (
        "L(N, D, r, K) = E + A / N^alpha + B * r^eta / D^beta + C / (r + eps)^gamma + F / K^mu, K = w1 / k1 + w2 * k2"
    )
    settable: ClassVar[Mapping[str, Callable[[object], object]]] = {
        "normalise": one_of(*NORMALISE),
        "probe_tokens": parse_amount,
    }
    needs = ("n_params", "tokens", "share", "k1", "k2")

    normalise: str = "mean"
    probe_tokens: float = 0.0
    mean_1: float = field(default=1.0, compare=False)
    mean_2: float = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISE:
            raise UsageError(f"`normalise` of law `cross_dcpt` is `{self.normalise}`, wanted `mean` or `none`")
        if not 0 <= self.probe_tokens < float("inf"):
            raise UsageError(f"`probe_tokens` of law `cross_dcpt` is {self.probe_tokens:g}, wanted 0 or more")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        more = (Parameter("F", -20, 5), Parameter("mu", 0.01, 5, log=False), Parameter("w2", 0, 1, log=False))
        return (*super().parameters, *more)

    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        loss_BR, slope_BRP = super().loss(theta_BP[:, :-3], rows)
        factor_B1, mu_B1, w2_B1 = (theta_BP[:, i, None] for i in (-3, -2, -1))
        slow_R, fast_R = self._parts(rows)
        known_BR = np.maximum((1 - w2_B1) * slow_R + w2_B1 * fast_R, 1e-12)
        log_BR = np.log(known_BR)
        term_BR = np.exp(factor_B1 - mu_B1 * log_BR)
        more = [term_BR, -log_BR * term_BR, -mu_B1 * term_BR * (fast_R - slow_R) / known_BR]
        return loss_BR + term_BR, np.concatenate([slope_BRP, np.stack(more, axis=2)], axis=2)

    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """Those of the D-CPT law; mu and w2 drawn, then F and what it takes from E by least squares."""
        theta_SP = super().starts(rows, rng, count)
        slow_R, fast_R = self._parts(rows)
        left_SR = rows.loss_R - super().loss(theta_SP, rows)[0]
        found = []
        for theta_P, left_R in zip(theta_SP, left_SR, strict=True):
            mu, w2 = rng.uniform(0.1, 2.0), rng.uniform(0.0, 1.0)
            shape_R = np.maximum((1 - w2) * slow_R + w2 * fast_R, 1e-12) ** -mu
            centred_R = shape_R - shape_R.mean()
            factor = float(np.sum(centred_R * left_R) / max(np.sum(centred_R**2), 1e-300))
            factor = max(factor, 1e-3 * float(rows.loss_R.mean() / shape_R.mean()))
            floor = max(float(np.exp(theta_P[0]) + left_R.mean() - factor * shape_R.mean()), 0.01)
            found.append([np.log(floor), *theta_P[1:], np.log(factor), mu, w2])
        return np.array(found)

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Self, tuple[str, ...]]:
        """The terms that the rows can determine.

        Raises:
            UsageError: fewer than three domains, k1 or k2 missing or not usable, or what the D-CPT law refuses.
        """
        if rows.domain_R is None or rows.k1_R is None or rows.k2_R is None:
            raise UsageError(
                "law `cross_dcpt` needs the columns `domain`, `k1` and `k2`",
                "k1 is a domain's loss before training, k2 the rate at which it falls in a short probe",
            )
        domains = len(np.unique(rows.domain_R))
        if domains < FEWEST:
            raise UsageError(f"law `cross_dcpt` needs at least {FEWEST} domains, found {domains}")
        for name, column_R in (("k1", rows.k1_R), ("k2", rows.k2_R)):
            bad_R = ~np.isfinite(column_R) | (column_R <= 0)
            if bad_R.any():
                line, value = rows.line_R[bad_R].min(), column_R[bad_R][0]
                raise UsageError(f"law `cross_dcpt` needs `{name}` above 0 in every row, line {line} has {value:g}")
            for domain in np.unique(rows.domain_R):
                if len(np.unique(column_R[rows.domain_R == domain])) > 1:
                    line = rows.line_R[rows.domain_R == domain].min()
                    raise UsageError(f"`{name}` differs within the domain of line {line}, wanted one value a domain")
        if len(np.unique(rows.k1_R)) < 2 and len(np.unique(rows.k2_R)) < 2:
            raise UsageError("law `cross_dcpt` tells domains apart by `k1` and `k2`, and all domains have the same")
        plain, notes = DCPT.for_rows(rows)
        if domains < FEW:
            notes += (f"{domains} domains determine the term in K only roughly, five or more are wanted",)
        means = {"mean_1": float(np.mean(1 / rows.k1_R)), "mean_2": float(np.mean(rows.k2_R))}
        if options.get("normalise") == "none":
            means = {}
        found = cls(**{"has_n": plain.has_n, "has_d": plain.has_d, **means, **options})  # type: ignore[arg-type]
        needed = len(found.parameters) + 3
        if len(rows) < needed:
            raise UsageError(
                f"{len(rows)} rows are too few for the law `{cls.name}` with {needed - 3} parameters, "
                f"which needs {needed}"
            )
        return found, notes

    def _parts(self, rows: Rows) -> tuple[Floats, Floats]:
        """1/k1 and k2, normalised."""
        assert rows.k1_R is not None and rows.k2_R is not None
        return 1 / rows.k1_R / self.mean_1, rows.k2_R / self.mean_2


def learnability(tokens_P: Floats, loss_P: Floats, probe_tokens: float) -> tuple[float, float]:
    """k1 and k2 of a domain from a short probe.

    Args:
        tokens_P: tokens seen at each measurement, the first before training [tokens].
        loss_P: domain loss at each [nats/token].
        probe_tokens: measurements up to here count [tokens].

    Returns:
        k1, the loss before training [nats/token], and k2, the rate of its fall by least squares [nats per 1M tokens].

    Raises:
        UsageError: fewer than three measurements in the probe, or none before training.
    """
    order = np.argsort(tokens_P, kind="stable")
    tokens_P, loss_P = np.asarray(tokens_P, np.float64)[order], np.asarray(loss_P, np.float64)[order]
    inside = tokens_P <= probe_tokens
    if inside.sum() < 3 or tokens_P[0] != 0:
        raise UsageError(
            f"a probe needs the loss at 0 tokens and two more up to {probe_tokens:g} tokens, found {int(inside.sum())}"
        )
    x, y = tokens_P[inside] / MILLION, loss_P[inside]
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2))
    return float(loss_P[0]), -slope
