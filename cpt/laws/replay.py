"""Forgetting with replay: how far the old loss rises when a share of the old data is read again.

L_g = L_g0 + A·D_ft^beta / ((1 + B·p)·N)^alpha

L_g0 [nats/token] the old loss before training, p the replay share, D_ft = (1 - p)·D the tokens of the new domain,
N parameters. The law knows only a rise: a general loss below L_g0 is outside it.

Source:
    Bethune et al. 2025, arXiv:2502.06042 (scaling laws for forgetting during finetuning with data injection).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws.law import LAWS, Law, Parameter
from cpt.laws.rows import Floats, Rows


@LAWS.add("replay")
@dataclass(frozen=True)
class Replay(Law):
    """The rise of the general loss; its share column is the replay share.

    Args:
        has_n: rows of several sizes; else N^alpha is part of A.
        has_d: rows of several token counts; else D_ft^beta is part of A.
    """

    has_n: bool = True
    has_d: bool = True

    name: ClassVar[str] = "replay"
    equation: ClassVar[str] = "L_g = L_g0 + A·D_ft^beta / ((1 + B·p)·N)^alpha"
    needs: ClassVar[tuple[str, ...]] = ("share", "base")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        found = [Parameter("A", -100.0, 100.0), Parameter("B", -5.0, 12.0), Parameter("alpha", 0.01, 5.0, log=False)]
        return (*found, Parameter("beta", 0.01, 3.0, log=False)) if self.has_d else tuple(found)

    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        log_d_R, log_n_R = self._logs(rows)
        assert rows.share_R is not None and rows.base_R is not None
        b_B1, alpha_B1 = np.exp(theta_BP[:, 1:2]), theta_BP[:, 2:3]
        grown_BR = b_B1 * rows.share_R
        below_BR = np.log1p(grown_BR) + log_n_R
        exponent_BR = theta_BP[:, :1] - alpha_B1 * below_BR
        if self.has_d:
            exponent_BR = exponent_BR + theta_BP[:, 3:4] * log_d_R
        rise_BR = np.exp(np.clip(exponent_BR, -700, 700))
        parts = [rise_BR, -rise_BR * alpha_B1 * grown_BR / (1 + grown_BR), -rise_BR * below_BR]
        if self.has_d:
            parts.append(rise_BR * log_d_R)
        return rows.base_R + rise_BR, np.stack(parts, 2)

    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """B, alpha and beta drawn, A as the mean of what is left in logarithms, best first."""
        log_d_R, log_n_R = self._logs(rows)
        assert rows.share_R is not None and rows.base_R is not None
        rise_R = np.maximum(rows.loss_R - rows.base_R, 1e-4)
        found = []
        for _ in range(8 * count):
            b, alpha, beta = rng.uniform(0, 8), rng.uniform(0.05, 2), rng.uniform(0.05, 1.5)
            shape_R = -alpha * (np.log1p(np.exp(b) * rows.share_R) + log_n_R) + (beta * log_d_R if self.has_d else 0)
            left_R = np.log(rise_R) - shape_R
            theta = [left_R.mean(), b, alpha, beta][: len(self.parameters)]
            miss = float(np.sum(rows.weight_R * np.abs(np.exp(left_R.mean() + shape_R) - rise_R)))
            found.append((miss, theta))
        found.sort()
        low_P, high_P = self.bounds
        return np.clip(np.array([theta for _, theta in found[:count]]), low_P, high_P)

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Law, tuple[str, ...]]:
        """Leaves out N or D_ft where all rows share one value.

        Raises:
            UsageError: no base loss, no replay share, or fewer than three of them.
        """
        if rows.base_R is None:
            raise UsageError("law `replay` needs the general loss before training", "give it as `base_general=`")
        if not np.isfinite(rows.base_R).all():
            raise UsageError(
                "law `replay` needs the general loss before training of every model size",
                "rows with 0 tokens give it; `base_general=` is that of the size that is asked about",
            )
        if rows.share_R is None or len(np.unique(rows.share_R)) < 3:
            raise UsageError("law `replay` needs at least three different replay shares")
        notes = []
        has_n = rows.n_params_R is not None and len(np.unique(rows.n_params_R)) > 1
        has_d = rows.tokens_R is not None and len(np.unique(rows.tokens_R)) > 1
        if not has_n:
            notes.append("one model size: N is left out, nothing can be said about other sizes")
        if not has_d:
            notes.append("one token count: D_ft is left out, nothing can be said about longer runs")
        return cls(**{"has_n": has_n, "has_d": has_d, **options}), tuple(notes)  # type: ignore[arg-type]

    def replay_for(self, theta_P: Floats, tolerance: float, *, n_params: float = 1, domain_tokens: float = 1) -> float:
        """The smallest replay share at which the rise stays within a tolerance; above 1 none does.

        Args:
            theta_P: fitted parameters.
            tolerance: allowed rise of the general loss [nats/token].
            n_params: size of the model [count].
            domain_tokens: tokens of the new domain, D_ft [tokens].
        """
        value = self.natural(theta_P)
        rise = value["A"] * domain_tokens ** value.get("beta", 0.0) / tolerance
        needed = rise ** (1 / value["alpha"]) / (n_params if self.has_n else 1)
        return max(needed - 1, 0.0) / value["B"]

    def _logs(self, rows: Rows) -> tuple[Floats, Floats]:
        """log D_ft and log N by row; zeros where the term is left out or p = 1 leaves no domain tokens."""
        nothing_R = np.zeros(len(rows))
        log_n_R = np.log(rows.n_params_R) if self.has_n and rows.n_params_R is not None else nothing_R
        if not self.has_d or rows.tokens_R is None or rows.share_R is None:
            return nothing_R, log_n_R
        return np.log(np.maximum(rows.tokens_R * (1 - rows.share_R), 1.0)), log_n_R
