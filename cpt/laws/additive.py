"""Additive law over several corpora: each share adds to what is learnt, with its own exponent.

L(N, D, h) = E + 1 / sum_i C_i·h_i^gamma_i + A / N^alpha + B / D^beta

h_i shares of the k corpora (read as at least 1e-4), N parameters, D tokens; 5 + 2k parameters, and without the terms in
N and D, where these do not vary, 1 + 2k. The joint variant replaces A and B by A_h = (sum_i CA_i·h_i)^gA and
B_h = (sum_i CB_i·h_i)^gB (5 + 4k parameters): only then does the best mixture depend on N and D.

Source:
    Shukor et al. 2025, arXiv:2507.09404 (scaling laws for optimal data mixtures), additive and joint laws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import nnls

from cpt.base.errors import UsageError
from cpt.laws.law import LAWS, Law, Parameter
from cpt.laws.options import yes_or_no
from cpt.laws.rows import Floats, Rows

FLOOR = 1e-4  # a share of 0 is read as this
STARTS = 8  # of four times as many seeds, the best go on


@LAWS.add("additive")
@dataclass(frozen=True)
class Additive(Law):
    """A floor, the reciprocal of a sum over corpora, and terms in size and tokens.

    Args:
        corpora: names of the k corpora.
        has_n: with A / N^alpha; else it is part of E.
        has_d: with B / D^beta; else it is part of E.
        joint: A and B depend on the mixture.
    """

    corpora: tuple[str, ...] = ()
    has_n: bool = False
    has_d: bool = False
    joint: bool = False

    name: ClassVar[str] = "additive"
    equation: ClassVar[str] = "L(N, D, h) = E + 1 / sum_i C_i·h_i^gamma_i + A/N^alpha + B/D^beta"
    settable: ClassVar[Mapping[str, Callable[[object], object]]] = {"joint": yes_or_no}
    needs: ClassVar[tuple[str, ...]] = ("shares",)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        found = [Parameter("E", -5.0, 3.0)]
        found += [Parameter(f"C_{corpus}", -20.0, 15.0) for corpus in self.corpora]
        found += [Parameter(f"gamma_{corpus}", 0.01, 3.0, log=False) for corpus in self.corpora]
        for factor, exponent, high in self._sizes():
            if self.joint:
                found += [Parameter(f"C{factor}_{corpus}", -30.0, 40.0) for corpus in self.corpora]
                found.append(Parameter(f"g{factor}", 0.05, 3.0, log=False))
            else:
                found.append(Parameter(factor, -10.0, high))
            found.append(Parameter(exponent, 0.01, 2.0, log=False))
        return tuple(found)

    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        share_RK, k = self._shares(rows), len(self.corpora)
        log_RK = np.log(share_RK)
        floor_B1 = np.exp(theta_BP[:, :1])
        log_c_BK, gamma_BK = theta_BP[:, 1 : 1 + k], theta_BP[:, 1 + k : 1 + 2 * k]
        part_BRK = np.exp(log_c_BK[:, None, :] + gamma_BK[:, None, :] * log_RK)
        sum_BR = part_BRK.sum(2)
        by_c_BRK = -part_BRK / sum_BR[:, :, None] ** 2
        loss_BR = floor_B1 + 1 / sum_BR
        slopes = [np.broadcast_to(floor_B1, loss_BR.shape)[:, :, None], by_c_BRK, by_c_BRK * log_RK]
        at = 1 + 2 * k
        for size_R in self._columns(rows):
            log_size_R = np.log(size_R)
            if self.joint:
                part_BRK = np.exp(theta_BP[:, None, at : at + k]) * share_RK
                sum_BR = part_BRK.sum(2)
                power_B1, at = theta_BP[:, at + k : at + k + 1], at + k + 1
                log_factor_BR = power_B1 * np.log(sum_BR)
            else:
                log_factor_BR, at = theta_BP[:, at : at + 1], at + 1
            term_BR = np.exp(np.clip(log_factor_BR - theta_BP[:, at : at + 1] * log_size_R, -700, 700))
            loss_BR = loss_BR + term_BR
            if self.joint:
                slopes.append(term_BR[:, :, None] * power_B1[:, :, None] * part_BRK / sum_BR[:, :, None])
                slopes.append((term_BR * np.log(sum_BR))[:, :, None])
            else:
                slopes.append(term_BR[:, :, None])
            slopes.append((-term_BR * log_size_R)[:, :, None])
            at += 1
        return loss_BR, np.concatenate(slopes, 2)

    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """E, exponents and the parts of N and D drawn; 1/(what is left) is linear in C: non-negative least squares."""
        count = min(count, STARTS if len(self.corpora) > 8 else 3 * STARTS)
        share_RK, loss_R, k = self._shares(rows), rows.loss_R, len(self.corpora)
        columns = self._columns(rows)
        found = []
        for _ in range(4 * count):
            floor = rng.uniform(0.05, 0.95) * loss_R.min()
            left_R = loss_R - floor
            tail: list[float] = []
            for size_R in columns:
                exponent, part = rng.uniform(0.1, 0.8), rng.uniform(0.05, 0.4)
                shape_R = size_R**-exponent
                factor = part * (left_R / shape_R).min()
                left_R = left_R - factor * shape_R
                power = rng.uniform(0.3, 1.0)
                tail += [*[np.log(factor) / power] * k, power] if self.joint else [np.log(factor)]
                tail.append(exponent)
            gamma = float(np.exp(rng.uniform(np.log(0.1), np.log(1.2))))
            weight_R = np.sqrt(rows.weight_R) * left_R**2 / loss_R  # a step of 1/left in steps of log L
            c_K, miss = nnls(share_RK**gamma * weight_R[:, None], weight_R / left_R)
            c_K = np.maximum(c_K, 1e-3 * max(c_K.max(), 1e-6))
            found.append((miss, [np.log(floor), *np.log(c_K), *[gamma] * k, *tail]))
        found.sort()
        low_P, high_P = self.bounds
        return np.clip(np.array([theta for _, theta in found[:count]]), low_P, high_P)

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Law, tuple[str, ...]]:
        """Leaves out N or D where all rows share one value.

        Raises:
            UsageError: no shares of several corpora, or too few rows.
        """
        if rows.shares_RK is None:
            raise UsageError("law `additive` needs the shares of all corpora, one column `w_NAME` a corpus")
        notes = []
        has_n = rows.n_params_R is not None and len(np.unique(rows.n_params_R)) > 1
        has_d = rows.tokens_R is not None and len(np.unique(rows.tokens_R)) > 1
        if not has_n:
            notes.append("one model size: A/N^alpha is left out, nothing can be said about other sizes")
        if not has_d:
            notes.append("one token count: B/D^beta is left out, nothing can be said about other lengths")
        law = cls(**{"corpora": rows.corpora, "has_n": has_n, "has_d": has_d, **options})  # type: ignore[arg-type]
        if law.joint and not (has_n or has_d):
            raise UsageError("the joint form of law `additive` needs rows of several sizes or token counts")
        needed = len(law.parameters) + 3
        if len(rows) < needed:
            raise UsageError(f"law `additive` over {len(law.corpora)} corpora needs {needed} rows, found {len(rows)}")
        return law, tuple(notes)

    def _sizes(self) -> list[tuple[str, str, float]]:
        """Names of factor and exponent and the bound of the factor, for the terms that there are."""
        return [("A", "alpha", 30.0)] * self.has_n + [("B", "beta", 40.0)] * self.has_d

    def _columns(self, rows: Rows) -> list[Floats]:
        """The columns of those terms."""
        found = [rows.n_params_R] * self.has_n + [rows.tokens_R] * self.has_d
        return [column for column in found if column is not None]

    def _shares(self, rows: Rows) -> Floats:
        """Shares of the corpora, none below the floor."""
        assert rows.shares_RK is not None and rows.shares_RK.shape[1] == len(self.corpora)
        return np.maximum(rows.shares_RK, FLOOR)
