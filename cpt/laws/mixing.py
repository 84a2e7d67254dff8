"""Exponential mixture law: the loss at one size and one token count as a function of the shares alone.

Two corpora:   L(r) = c + exp(t·r + b)
k corpora:     L(h) = c + k·exp(sum_j t_j·h_j), with k = 1

r is the share of the corpus that the loss is measured on, h the shares of all corpora, c [nats/token] what no share of
this data removes. The shares of a row sum to 1, hence a factor k says the same as a constant added to all t_j; it is
held at 1, and only predictions, never single t_j, can be compared with other fits.

Source:
    Ye et al. 2024, arXiv:2403.16952 (Data Mixing Laws), equations 6 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.units import parse_amount
from cpt.laws.law import LAWS, Law, Parameter
from cpt.laws.options import yes_or_no
from cpt.laws.rows import Floats, Rows

STEEP = 1000.0  # bound on t: a corpus that only its own text teaches falls within a share of 0.3 % (t = -330 seen)
STARTS = 8  # enough where the seeds already solve all but c
SCAN = 1000  # values of c that the published procedure tries


@LAWS.add("mixing")
@dataclass(frozen=True)
class Mixing(Law):
    """c + exp(linear in the shares).

    Args:
        corpora: names of the corpora where there are more than two, else empty.
        two_stage: choose c by correlation before the rest is fitted, as published; the default fits all together.
        c: c held at this value [nats/token], as the second stage does.
    """

    corpora: tuple[str, ...] = ()
    two_stage: bool = False
    c: float | None = field(default=None, compare=False)

    name: ClassVar[str] = "mixing"
    equation: ClassVar[str] = "L(r) = c + exp(t·r + b), for k corpora L(h) = c + exp(sum_j t_j·h_j)"
    settable: ClassVar[Mapping[str, Callable[[object], object]]] = {"two_stage": yes_or_no, "c": parse_amount}

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        slopes = tuple(Parameter(f"t_{corpus}", -STEEP, STEEP, log=False) for corpus in self.corpora)
        if not self.corpora:
            slopes = (Parameter("t", -STEEP, STEEP, log=False), Parameter("b", -STEEP, STEEP, log=False))
        return slopes if self.c is not None else (Parameter("c", 0.0, 20.0, log=False), *slopes)

    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        design_RJ = self._design(rows)
        slopes_BJ = theta_BP if self.c is not None else theta_BP[:, 1:]
        part_BR = np.exp(np.clip(slopes_BJ @ design_RJ.T, -700, 700))
        gradient_BRJ = part_BR[:, :, None] * design_RJ
        if self.c is not None:
            return self.c + part_BR, gradient_BRJ
        ones_BR1 = np.ones((*part_BR.shape, 1))
        return theta_BP[:, :1] + part_BR, np.concatenate([ones_BR1, gradient_BRJ], 2)

    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """For a given c the logarithm of L - c is linear in the shares: least squares on a grid of c, best first."""
        count = min(count, STARTS)
        design_RJ, loss_R = self._design(rows), rows.loss_R
        if self.c is not None:
            values = np.array([self.c])
        else:
            low = loss_R.min()
            span = max(loss_R.max() - low, 1e-6)
            near = low - span * np.geomspace(1e-3, 10, 30)
            values = np.concatenate([near[near > 0], np.linspace(0, low - 1e-6, 30)])
        found = []
        for c in values:
            above_R = np.maximum(loss_R - c, 1e-9)
            weight_R = np.sqrt(rows.weight_R) * above_R / loss_R  # a step of log(L - c) in steps of log L
            slopes_J = np.linalg.lstsq(design_RJ * weight_R[:, None], np.log(above_R) * weight_R, rcond=1e-10)[0]
            slopes_J = np.clip(slopes_J, -STEEP, STEEP)
            miss_R = (c + np.exp(np.clip(design_RJ @ slopes_J, -700, 700))) / loss_R - 1
            head = [] if self.c is not None else [c]
            found.append((float(np.sum(rows.weight_R * np.abs(miss_R))), [*head, *slopes_J]))
        found.sort()
        theta_SP = np.array([theta for _, theta in found])
        while len(theta_SP) < count:
            theta_SP = np.concatenate([theta_SP, theta_SP + rng.normal(0, 0.3, theta_SP.shape)])
        return theta_SP[:count]

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Law, tuple[str, ...]]:
        """One size, one token count, and at least as many mixtures as parameters.

        Raises:
            UsageError: several sizes or token counts, or too few mixtures.
        """
        for column, name in ((rows.n_params_R, "n_params"), (rows.tokens_R, "tokens")):
            if column is not None and len(values := np.unique(column)) > 1:
                raise UsageError(
                    f"law `mixing` holds at one size and one token count, found {len(values)} values of `{name}`",
                    f"choose one: `where='{name}=={values[-1]:.10g}'`",
                )
        several = rows.shares_RK is not None and (rows.share_R is None or rows.shares_RK.shape[1] > 2)
        law = cls(**{"corpora": rows.corpora if several else (), **options})  # type: ignore[arg-type]
        if law.c is not None and not 0 <= law.c < rows.loss_R.min():
            raise UsageError(
                f"`c` of law `mixing` is {law.c:g}, wanted 0 to below the least loss {rows.loss_R.min():.4g}"
            )
        mixtures = len(np.unique(law._design(rows), axis=0))
        needed = len(law.parameters) if several else 3
        if mixtures < needed:
            raise UsageError(f"law `mixing` needs at least {needed} different mixtures, found {mixtures}")
        if several and len(rows) < needed + 3:
            raise UsageError(f"law `mixing` over {len(law.corpora)} corpora needs {needed + 3} rows, found {len(rows)}")
        if not law.two_stage or law.c is not None:
            return law, ()
        c = law.scan(rows)
        note = f"`c` was set to {c:.4g} by the scan of the two-stage procedure and is not part of the intervals"
        return cls(corpora=law.corpora, two_stage=True, c=c), (note,)

    def left_with(self, rows: Rows) -> Law:
        """In the two-stage procedure with the c of these rows."""
        return replace(self, c=self.scan(rows)) if self.two_stage else self

    def scan(self, rows: Rows) -> float:
        """c by the published first stage: of 1000 values in 0 .. min(L) - 1e-6 the one with the largest
        |correlation| between the shares and log(L - c) [nats/token]."""
        values_S = np.linspace(0, rows.loss_R.min() - 1e-6, SCAN)
        log_RS = np.log(rows.loss_R[:, None] - values_S)
        log_RS = log_RS - log_RS.mean(0)
        design_RJ = self._design(rows)
        basis_RJ, strength_J, _ = np.linalg.svd(design_RJ - design_RJ.mean(0), full_matrices=False)
        keep_J = strength_J > 1e-9 * strength_J.max()
        # With one share this is |correlation|, with several the multiple correlation.
        explained_S = ((basis_RJ[:, keep_J].T @ log_RS) ** 2).sum(0) / (log_RS**2).sum(0)
        return float(values_S[np.argmax(explained_S)])

    def share_at(self, theta_BP: Floats, loss_B: Floats | float) -> Floats:
        """The share at which the law of two corpora gives a loss; outside 0..1 no share does [fraction]."""
        assert not self.corpora, "several shares give the same loss"
        c_B = self.c if self.c is not None else theta_BP[:, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            share_B: Floats = (np.log(loss_B - c_B) - theta_BP[:, -1]) / theta_BP[:, -2]
        return share_B

    def _design(self, rows: Rows) -> Floats:
        """What the exponent is linear in: the shares of k corpora, or the one share and 1."""
        if self.corpora:
            assert rows.shares_RK is not None and rows.shares_RK.shape[1] == len(self.corpora)
            return rows.shares_RK
        assert rows.share_R is not None
        return np.stack([rows.share_R, np.ones(len(rows))], 1)
