"""D-CPT law: L(N, D, r) = E + A / N^alpha + B · r^eta / D^beta + C / (r + eps)^gamma.

    N parameters [count], D tokens [tokens], r the share of the corpus that the loss is measured on [fraction]; nine
    positive parameters. The domain loss takes r = r_domain, the general loss r = r_general, each with its own fit.
    The form `l1` has no eta: E + A / N^alpha + B / D^beta + C / (r + eps)^gamma.

At r = 0 the third term is absent. Source: Que et al. 2024, arXiv:2406.01375 (form L3; L1 is its compared variant).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws.chinchilla import needs_rows
from cpt.laws.law import LAWS, Law, Parameter
from cpt.laws.powers import seeds
from cpt.laws.rows import Floats, Rows

MIN_RATIOS = 4
_DRAWS_PER_START = 8


@LAWS.add("dcpt")
@dataclass(frozen=True)
class DCPT(Law):
    """E + A / N^alpha + B · r^eta / D^beta + C / (r + eps)^gamma.

    Args:
        has_n: with the size term; without it, it is part of E.
        has_d: with the token term; without it, it is part of the ratio term.
    """

    name = "dcpt"
    equation = "L(N, D, r) = E + A / N^alpha + B * r^eta / D^beta + C / (r + eps)^gamma"
    needs: ClassVar[tuple[str, ...]] = ("n_params", "tokens", "share")
    has_eta = True

    has_n: bool = True
    has_d: bool = True

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        found = [Parameter("E", -5, 3)]
        if self.has_n:
            found += [Parameter("A", -10, 30), Parameter("alpha", 0.01, 2, log=False)]
        if self.has_d:
            found += [Parameter("B", -10, 40), Parameter("beta", 0.01, 2, log=False)]
        if self.has_d and self.has_eta:
            found += [Parameter("eta", 0.01, 5, log=False)]
        found += [Parameter("C", -15, 5), Parameter("eps", -9, 1.5), Parameter("gamma", 0.01, 3, log=False)]
        return tuple(found)

    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        columns = [column[:, None] for column in theta_BP.T]
        share_R = rows.share_R
        assert share_R is not None
        floor_BR = np.repeat(np.exp(columns.pop(0)), len(rows), axis=1)
        slopes = [floor_BR]
        loss_BR = floor_BR.copy()
        if self.has_n:
            log_R = np.log(_present(rows.n_params_R))
            term_BR = np.exp(columns.pop(0) - columns.pop(0) * log_R)
            slopes += [term_BR, -log_R * term_BR]
            loss_BR += term_BR
        if self.has_d:
            log_R = np.log(_present(rows.tokens_R))
            log_term_BR = columns.pop(0) - columns.pop(0) * log_R
            if self.has_eta:
                absent_R = share_R <= 0
                log_share_R = np.log(np.where(absent_R, 1.0, share_R))
                term_BR = np.where(absent_R, 0.0, np.exp(log_term_BR + columns.pop(0) * log_share_R))
                slopes += [term_BR, -log_R * term_BR, log_share_R * term_BR]
            else:
                term_BR = np.exp(log_term_BR)
                slopes += [term_BR, -log_R * term_BR]
            loss_BR += term_BR
        factor_B1, eps_B1, gamma_B1 = columns
        shifted_BR = share_R + np.exp(eps_B1)
        log_BR = np.log(shifted_BR)
        term_BR = np.exp(factor_B1 - gamma_B1 * log_BR)
        slopes += [term_BR, -gamma_B1 * term_BR * np.exp(eps_B1) / shifted_BR, -log_BR * term_BR]
        return loss_BR + term_BR, np.stack(slopes, axis=2)

    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """Random exponents, the factors by non-negative least squares; the best of eight times as many."""
        share_R = rows.share_R
        assert share_R is not None
        draws = count * _DRAWS_PER_START
        unit_SK = rng.random((draws, 5))
        alpha, beta = 0.1 + 0.9 * unit_SK[:, :1], 0.1 + 0.9 * unit_SK[:, 1:2]
        gamma, eta = 0.02 + 0.98 * unit_SK[:, 2:3], 0.02 + 2.48 * unit_SK[:, 3:4]
        log_eps = -6 + 6 * unit_SK[:, 4:5]
        terms = [np.ones((draws, len(rows)))]
        if self.has_n:
            terms += [_present(rows.n_params_R) ** -alpha]
        if self.has_d:
            terms += [_present(rows.tokens_R) ** -beta * (share_R**eta if self.has_eta else 1.0)]
        terms += [(share_R + np.exp(log_eps)) ** -gamma]
        log_ST, misfit_S = seeds(np.stack(terms, axis=1), rows.loss_R, rows.weight_R)
        factors = [log_ST[:, k : k + 1] for k in range(log_ST.shape[1])]
        columns = [factors.pop(0)]
        if self.has_n:
            columns += [factors.pop(0), alpha]
        if self.has_d:
            columns += [factors.pop(0), beta, *([eta] if self.has_eta else [])]
        columns += [factors.pop(0), log_eps, gamma]
        best = np.argsort(misfit_S, kind="stable")[:count]
        return np.concatenate(columns, axis=1)[best]

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Self, tuple[str, ...]]:
        """The terms that the rows can determine.

        Raises:
            UsageError: fewer than four ratios, or too few rows.
        """
        assert rows.share_R is not None
        ratios = len(np.unique(rows.share_R))
        if ratios < MIN_RATIOS:
            other = {1: ("`law=chinchilla` fits one ratio",), MIN_RATIOS - 1: ("`law=mixing` needs three",)}
            found = "one ratio is" if ratios == 1 else f"{ratios} distinct ratios are"
            hints = ("add runs at other ratios", *other.get(ratios, ()))
            raise UsageError(f"{found} too few for the law `{cls.name}`, which needs four", *hints)
        notes = []
        has_n = rows.n_params_R is not None and len(np.unique(rows.n_params_R)) > 1
        has_d = rows.tokens_R is not None and len(np.unique(rows.tokens_R)) > 1
        if not has_n:
            notes.append("one model size: A / N^alpha is part of E, and nothing can be said about other sizes")
        if not has_d:
            notes.append(
                "one token count: the token term is part of the ratio term, and nothing can be said of other lengths"
            )
        law = cls(has_n=has_n, has_d=has_d)
        needs_rows(law, rows)
        return law, tuple(notes)


@LAWS.add("l1")
@dataclass(frozen=True)
class L1(DCPT):
    """The D-CPT law without eta: E + A / N^alpha + B / D^beta + C / (r + eps)^gamma."""

    name = "l1"
    equation = "L(N, D, r) = E + A / N^alpha + B / D^beta + C / (r + eps)^gamma"
    has_eta = False


def _present(column_R: Floats | None) -> Floats:
    assert column_R is not None
    return column_R
