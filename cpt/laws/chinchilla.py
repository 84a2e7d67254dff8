"""Token-and-size law: L(N, D) = E + A / N^alpha + B / D^beta.

    N parameters [count], D tokens [tokens], E, A, B, alpha, beta > 0 fitted. E is the loss that no model goes below.

For tables with one mixture. Source: Hoffmann et al. 2022, arXiv:2203.15556, equation 2; fitting as in Besiroglu et al.
2024, arXiv:2404.10102.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws.law import LAWS, Law, Parameter
from cpt.laws.powers import seeds
from cpt.laws.rows import Floats, Rows

_EXPONENTS = np.linspace(0.05, 1.2, 8)


@LAWS.add("chinchilla")
@dataclass(frozen=True)
class Chinchilla(Law):
    """E + A / N^alpha + B / D^beta.

    Args:
        has_n: with the size term; without it, it is part of E.
        has_d: with the token term.
    """

    name = "chinchilla"
    equation = "L(N, D) = E + A / N^alpha + B / D^beta"
    needs = ("n_params", "tokens")

    has_n: bool = True
    has_d: bool = True

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        found = [Parameter("E", -5, 3)]
        if self.has_n:
            found += [Parameter("A", -10, 30), Parameter("alpha", 0.01, 2.5, log=False)]
        if self.has_d:
            found += [Parameter("B", -10, 40), Parameter("beta", 0.01, 2.5, log=False)]
        return tuple(found)

    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        columns = list(theta_BP.T)
        floor_B1 = np.exp(columns.pop(0))[:, None]
        loss_BR = np.repeat(floor_B1, len(rows), axis=1)
        slopes = [loss_BR.copy()]
        for size_R in self._sizes(rows):
            log_R = np.log(size_R)
            factor_B1, exponent_B1 = columns.pop(0)[:, None], columns.pop(0)[:, None]
            term_BR = np.exp(factor_B1 - exponent_B1 * log_R)
            loss_BR += term_BR
            slopes += [term_BR, -log_R * term_BR]
        return loss_BR, np.stack(slopes, axis=2)

    def _sizes(self, rows: Rows) -> list[Floats]:
        found = [rows.n_params_R] * self.has_n + [rows.tokens_R] * self.has_d
        assert all(size_R is not None for size_R in found)
        return found  # type: ignore[return-value]

    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """An 8 x 8 grid of exponents, the rest by non-negative least squares; the best of them."""
        sizes = self._sizes(rows)
        mesh = np.meshgrid(*[_EXPONENTS] * len(sizes), indexing="ij")
        exponent_SK = np.stack([m.ravel() for m in mesh], axis=1) if sizes else np.zeros((1, 0))
        terms = [np.ones((len(exponent_SK), len(rows)))]
        terms += [size_R ** -exponent_SK[:, k : k + 1] for k, size_R in enumerate(sizes)]
        log_ST, misfit_S = seeds(np.stack(terms, axis=1), rows.loss_R, rows.weight_R)
        columns = [log_ST[:, 0]]
        for k in range(len(sizes)):
            columns += [log_ST[:, 1 + k], exponent_SK[:, k]]
        best = np.argsort(misfit_S, kind="stable")[: min(count, 16)]
        return np.stack(columns, axis=1)[best]

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Law, tuple[str, ...]]:
        """Without the term of a quantity that does not vary.

        Raises:
            UsageError: neither size nor tokens vary, or there are too few rows.
        """
        assert rows.n_params_R is not None or rows.tokens_R is not None
        notes = []
        has_n = rows.n_params_R is not None and len(np.unique(rows.n_params_R)) > 1
        has_d = rows.tokens_R is not None and len(np.unique(rows.tokens_R)) > 1
        if not has_n and not has_d:
            raise UsageError("the rows hold one model size and one token count: there is nothing to fit a law to")
        if not has_n:
            notes.append("one model size: A / N^alpha is part of E, and nothing can be said about other sizes")
        if not has_d:
            notes.append("one token count: B / D^beta is part of E, and nothing can be said about other lengths")
        law = cls(has_n=has_n, has_d=has_d)
        needs_rows(law, rows)
        return law, tuple(notes)


def needs_rows(law: Law, rows: Rows) -> None:
    """Refuse a table with fewer rows than parameters + 3.

    Raises:
        UsageError: says how many there are and how many are needed.
    """
    wanted = len(law.parameters) + 3
    if len(rows) < wanted:
        raise UsageError(
            f"{len(rows)} rows are too few for the law `{law.name}` with {len(law.parameters)} parameters, "
            f"which needs {wanted}"
        )
