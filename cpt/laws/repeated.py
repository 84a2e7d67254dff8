"""Repeated data: tokens seen again are worth less than new ones.

L(N, D, U) = E + A / N_eff^alpha + B / D_eff^beta

D_eff = U + U·R_D*·(1 - exp(-R_D / R_D*)),       R_D = max(D/U - 1, 0)
N_eff = U_N + U_N·R_N*·(1 - exp(-R_N / R_N*)),   R_N = max(N/U_N - 1, 0)

D tokens seen, U unique tokens (never more than D), U_N = min(N, N_opt(U)) with N_opt(U) the compute-optimal size for U
tokens under the same A, B, alpha and beta. Valid up to roughly 40 epochs: beyond, the measured loss rises again.

Source:
    Muennighoff et al. 2023, arXiv:2305.16264, equations 5, 6 and 17.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws.law import LAWS, Law, Parameter
from cpt.laws.options import yes_or_no
from cpt.laws.rows import Floats, Rows

R_DATA, R_PARAMS = 15.387756, 5.309743  # published, C4
MAX_EPOCHS = 40.0
PUBLISHED = {
    "E": float(np.exp(0.6254804)),
    "A": float(np.exp(6.255414)),
    "B": float(np.exp(7.3049974)),
    "alpha": 0.3526596,
    "beta": 0.3526596,
    "R_D": R_DATA,
    "R_N": R_PARAMS,
}


def effective_tokens(unique: Floats | float, seen: Floats | float, r_star: float = R_DATA) -> Floats:
    """How many new tokens the tokens seen are worth [tokens].

    Args:
        unique: distinct tokens [tokens].
        seen: tokens seen in total, over all epochs [tokens].
        r_star: epochs after which a further one is worth a third (1/e) of the first.

    Raises:
        UsageError: more than 40 epochs.
    """
    check_epochs(unique, seen)
    unique = np.minimum(unique, seen)
    again = np.maximum(np.asarray(seen, np.float64) / unique - 1, 0)
    tokens: Floats = np.asarray(unique * (1 - r_star * np.expm1(-again / r_star)))
    return tokens


def check_epochs(unique: Floats | float, seen: Floats | float) -> None:
    """Refuses what the law cannot say.

    Raises:
        UsageError: more than 40 epochs.
    """
    most = float(np.max(np.asarray(seen, np.float64) / unique, initial=0))
    if most > MAX_EPOCHS * (1 + 1e-9):
        raise UsageError(f"law `repeated` holds up to {MAX_EPOCHS:.0f} epochs over the same data, asked for {most:.4g}")


@LAWS.add("repeated")
@dataclass(frozen=True)
class Repeated(Law):
    """Tokens and size with both seen through their diminishing worth.

    Args:
        tied: alpha = beta, as published.
        excess: parameters beyond the compute-optimal size for the unique tokens are worth less too.
    """

    tied: bool = True
    excess: bool = True

    name: ClassVar[str] = "repeated"
    equation: ClassVar[str] = "L = E + A/N_eff^alpha + B/D_eff^beta, D_eff = U + U·R_D*·(1 - exp(-R_D/R_D*))"
    settable: ClassVar[Mapping[str, Callable[[object], object]]] = {"tied": yes_or_no, "excess": yes_or_no}
    needs: ClassVar[tuple[str, ...]] = ("n_params", "tokens", "unique_tokens")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        found = [Parameter("E", -5.0, 3.0), Parameter("A", -10.0, 30.0), Parameter("B", -10.0, 40.0)]
        found.append(Parameter("alpha", 0.01, 2.0, log=False))
        if not self.tied:
            found.append(Parameter("beta", 0.01, 2.0, log=False))
        found.append(Parameter("R_D", 0.0, 6.0))
        if self.excess:
            found.append(Parameter("R_N", -2.0, 6.0))
        return tuple(found)

    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        assert rows.n_params_R is not None and rows.tokens_R is not None and rows.unique_tokens_R is not None
        check_epochs(rows.unique_tokens_R, rows.tokens_R)
        log_n_R, log_d_R = np.log(rows.n_params_R), np.log(rows.tokens_R)
        log_u_R = np.minimum(np.log(rows.unique_tokens_R), log_d_R)
        column = {p.name: theta_BP[:, i : i + 1] for i, p in enumerate(self.parameters)}
        a, b, alpha = column["A"], column["B"], column["alpha"]
        beta = column.get("beta", alpha)

        log_d_eff, _, by_r_d = _worth(log_u_R, log_d_R, np.exp(column["R_D"]))
        n_by: dict[str, Floats] = {}
        log_n_eff = np.broadcast_to(log_n_R, log_d_eff.shape)
        if self.excess:
            log_opt = (np.log(alpha) + a - np.log(beta) - b) / alpha + beta / alpha * log_u_R
            below = log_opt < log_n_R
            log_n_eff, by_opt, by_r_n = _worth(np.where(below, log_opt, log_n_R), log_n_R, np.exp(column["R_N"]))
            by_opt = np.where(below, by_opt, 0.0)
            n_by = {"A": by_opt / alpha, "B": -by_opt / alpha, "R_N": by_r_n}
            n_by["alpha"] = by_opt * (1 / alpha**2 - log_opt / alpha)
            n_by["beta"] = by_opt * (log_u_R - 1 / beta) / alpha

        floor = np.exp(column["E"])
        size = np.exp(np.clip(a - alpha * log_n_eff, -700, 700))
        data = np.exp(np.clip(b - beta * log_d_eff, -700, 700))
        by = {name: -alpha * size * slope for name, slope in n_by.items()}
        by["E"] = np.broadcast_to(floor, size.shape)
        by["A"] = by.get("A", 0.0) + size
        by["B"] = by.get("B", 0.0) + data
        by["alpha"] = by.get("alpha", 0.0) - size * log_n_eff
        by["beta"] = by.get("beta", 0.0) - data * log_d_eff
        by["R_D"] = -beta * data * by_r_d
        if self.tied:
            by["alpha"] = by["alpha"] + by["beta"]
        return floor + size + data, np.stack([by[p.name] for p in self.parameters], 2)

    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """The published constants, scaled to the mean loss, then draws round them."""
        low_P, high_P = self.bounds
        centre_P = self.fitted(PUBLISHED)
        spread_P = np.array(
            [{"E": 0.3, "A": 1.0, "B": 1.0, "R_D": 0.7, "R_N": 0.7}.get(p.name, 0.1) for p in self.parameters]
        )
        theta_SP = centre_P + spread_P * rng.normal(size=(count, len(centre_P)))
        theta_SP[0] = centre_P
        theta_SP = np.clip(theta_SP, low_P, high_P)
        predicted_SR, _ = self.loss(theta_SP, rows)
        scale_S = np.log((rows.loss_R / predicted_SR).mean(1))
        names = [p.name for p in self.parameters]
        for name in ("E", "A", "B"):  # keeps N_opt, which depends on A/B alone
            theta_SP[:, names.index(name)] += scale_S
        return np.clip(theta_SP, low_P, high_P)

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Law, tuple[str, ...]]:
        """Leaves out the worth of excess parameters where no row can show it.

        Raises:
            UsageError: columns missing, more than 40 epochs, or no row that repeats its data.
        """
        if rows.n_params_R is None or rows.tokens_R is None or rows.unique_tokens_R is None:
            raise UsageError("law `repeated` needs the columns `n_params`, `tokens` and `unique_domain_tokens`")
        epochs_R = rows.tokens_R / rows.unique_tokens_R
        beyond = epochs_R > MAX_EPOCHS * (1 + 1e-9)
        if beyond.any():
            raise UsageError(
                f"law `repeated` holds up to {MAX_EPOCHS:.0f} epochs over the same data, {beyond.sum()} rows are beyond"
                f" (line {rows.line_R[beyond].min()} has {epochs_R.max():.4g})",
                "leave these rows out of the table",
            )
        if epochs_R.max() < 1.5:
            raise UsageError("law `repeated` needs rows that repeat their data, none was seen more than 1.5 times")
        for column, name in ((rows.n_params_R, "n_params"), (rows.tokens_R, "tokens")):
            if len(np.unique(column)) < 3:
                raise UsageError(f"law `repeated` needs at least three different values of `{name}`")
        return cls(**options), ()  # type: ignore[arg-type]


def _worth(log_unique: Floats, log_seen: Floats, r_star: Floats) -> tuple[Floats, Floats, Floats]:
    """log of the effective count, and its derivatives by log unique and by log r_star."""
    again = np.maximum(np.exp(np.minimum(log_seen - log_unique, 700)) - 1, 0)
    fade = np.exp(-again / r_star)
    total = 1 + r_star * (1 - fade)
    by_unique = 1 - fade * (again + 1) / total
    by_star = (r_star * (1 - fade) - again * fade) / total
    return log_unique + np.log(total), by_unique, by_star
