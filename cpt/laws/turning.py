"""Where the objective of continual pretraining begins to fall, and the ratio at which that is the end of the run.

F(T) = L_d + lambda·(L_g - L_g0 - eps_g) begins to fall at T_0, where
    a1·s1·T^(s1-1) + lambda·( a2·s2·T^(s2-1) + a3·s3·T^(s3-1) ) = 0
A ratio is feasible when T_0 <= T_max. As lambda grows, T_0 tends to the peak of the general loss,
    T_peak = ( -a2·s2 / (a3·s3) )^(1/(s3-s2))
CMR law, one for a model size:  R_cmr(T) = alpha4·T^s4 + beta3, fitted on the pairs (T_0(R_k), R_k).

T is in units of 0.2e9 tokens throughout; the printed fixed-point form for T_0 is not used, it need not converge.

Source:
    Gu et al. 2024, arXiv:2407.17467 (CMR scaling law), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cpt.laws.cmr import UNIT, Cmr, TokenLaw
from cpt.laws.power import fit_power
from cpt.laws.rows import Floats

LAMBDA = 1000.0  # published: 100 to 7000
LOW, HIGH = 1e-2, 1e6  # units of T that are searched: 2e6 to 2e14 tokens
_GRID, _HALVINGS = 600, 60


@dataclass(frozen=True)
class CriticalLaw:
    """R_cmr(T) = alpha·T^s + beta.

    Args:
        alpha, s, beta: parameters, T in units of 0.2e9 tokens.
    """

    alpha: float
    s: float
    beta: float

    def ratio(self, tokens: float) -> tuple[float, bool]:
        """The critical domain share for a budget, clipped to 0..1, and whether it had to be.

        Args:
            tokens: length of the run [tokens].
        """
        raw = self.alpha * (tokens / UNIT) ** self.s + self.beta
        return min(max(raw, 0.0), 1.0), not 0 <= raw <= 1


def turning_point(domain: TokenLaw, general: TokenLaw, weight: float = LAMBDA) -> Floats:
    """T_0 of every draw, in units of 0.2e9 tokens: 0 where the objective falls from the start, infinite where it never
    falls up to 2e14 tokens.

    Args:
        domain, general: token laws of one ratio.
        weight: lambda, how much a general loss above its limit counts.
    """
    a_BJ = np.concatenate([domain.a_BJ * domain.s_BJ, weight * general.a_BJ * general.s_BJ], 1)
    power_BJ = np.concatenate([domain.s_BJ, general.s_BJ], 1) - 1

    def slope(log_t: Floats) -> Floats:
        # Divided by the largest power, so that nothing overflows: only the sign is used.
        exponent_BTJ = power_BJ[:, None, :] * log_t[:, :, None]
        exponent_BTJ = exponent_BTJ - exponent_BTJ.max(2, keepdims=True)
        sloped_BT: Floats = (a_BJ[:, None, :] * np.exp(exponent_BTJ)).sum(2)
        return sloped_BT

    grid_T = np.linspace(np.log(LOW), np.log(HIGH), _GRID)
    rising_BT = slope(np.broadcast_to(grid_T, (len(a_BJ), _GRID))) > 0
    turns_BT = rising_BT[:, :-1] & ~rising_BT[:, 1:]
    first_B = turns_BT.argmax(1)
    low_B1, high_B1 = grid_T[first_B][:, None], grid_T[first_B + 1][:, None]
    for _ in range(_HALVINGS):
        middle_B1 = 0.5 * (low_B1 + high_B1)
        up_B1 = slope(middle_B1) > 0
        low_B1, high_B1 = np.where(up_B1, middle_B1, low_B1), np.where(up_B1, high_B1, middle_B1)
    found_B = np.exp(0.5 * (low_B1 + high_B1)[:, 0])
    found_B = np.where(turns_BT.any(1), found_B, np.inf)
    return np.where(rising_BT.any(1), found_B, 0.0)


def peak(general: TokenLaw) -> Floats:
    """T at which the general loss is highest, in units of 0.2e9 tokens; NaN where two terms make no peak."""
    a_BJ, s_BJ = general.a_BJ, general.s_BJ
    assert a_BJ.shape[1] == 2, "one power term has no peak"
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_B = -a_BJ[:, 0] * s_BJ[:, 0] / (a_BJ[:, 1] * s_BJ[:, 1])
        found_B: Floats = ratio_B ** (1 / (s_BJ[:, 1] - s_BJ[:, 0]))
    return found_B


def critical_law(units: Floats, ratios: Floats) -> CriticalLaw | None:
    """The CMR law through pairs of T_0 and R; None with fewer than three pairs of finite T_0 above 0.

    Args:
        units: T_0 of each ratio, in units of 0.2e9 tokens.
        ratios: domain shares [fraction].
    """
    use = np.isfinite(units) & (units > 0)
    if len(np.unique(units[use])) < 3:
        return None
    alpha_B, s_B, beta_B = fit_power(units[use], ratios[use])
    return CriticalLaw(float(alpha_B[0]), float(s_B[0]), float(beta_B[0]))


@dataclass(frozen=True, eq=False)
class Turning:
    """The answer of T_0, draw by draw.

    Args:
        units_DK: T_0 of every measured ratio, in units of 0.2e9 tokens.
        ratios: measured domain shares, ascending [fraction].
        share_D: share at which T_0 is the end of the run, as the CMR law gives it, not clipped [fraction].
        law: the CMR law of the fit itself; None where too few ratios turn.
        how: what `share_D` rests on, in words.
    """

    units_DK: Floats
    ratios: tuple[float, ...]
    share_D: Floats
    law: CriticalLaw | None
    how: str

    def feasible(self, tokens: float) -> tuple[float, ...]:
        """Measured ratios whose objective has begun to fall by the end of the run [fraction]."""
        return tuple(r for r, t in zip(self.ratios, self.units_DK[0], strict=True) if t <= tokens / UNIT)


def turning(
    domain: Cmr, domain_DP: Floats, general: Cmr, general_DP: Floats, tokens: float, weight: float = LAMBDA
) -> Turning:
    """T_0 of every ratio that both laws know, and the share at which it is the end of the run.

    Args:
        domain, general: the laws of both losses.
        domain_DP, general_DP: their draws, row 0 the fit.
        tokens: length of the run [tokens].
        weight: lambda.
    """
    of_d, of_g = domain.token_laws(domain_DP), general.token_laws(general_DP)
    pairs = _shared(of_d, of_g)
    units_DK = np.stack([turning_point(d, g, weight) for _, d, g in pairs], 1)
    ratios = np.array([ratio for ratio, _, _ in pairs])
    answers = [_share(units_K, ratios, tokens / UNIT) for units_K in units_DK]
    share_D = np.array([share for share, _ in answers])
    return Turning(units_DK, tuple(ratios.tolist()), share_D, critical_law(units_DK[0], ratios), answers[0][1])


def _share(units_K: Floats, ratios: Floats, end: float) -> tuple[float, str]:
    """The share whose T_0 is `end`, and what that rests on."""
    law = critical_law(units_K, ratios)
    if law is not None:
        return law.alpha * end**law.s + law.beta, "the CMR law"
    if not (units_K > end).any():
        return 1.0, "no measured ratio whose objective begins to fall only after the end of the run"
    turns = np.flatnonzero(np.isfinite(units_K) & (units_K > 0))
    if len(turns) == 2 and units_K[turns[0]] != units_K[turns[1]]:
        x, y = np.log(units_K[turns]), ratios[turns]
        return float(y[0] + (np.log(end) - x[0]) * (y[1] - y[0]) / (x[1] - x[0])), "a line through two ratios"
    feasible = ratios[units_K <= end]
    return float(feasible.max(initial=0.0)), "the largest measured ratio that is feasible"


def _shared(of_d: Mapping[float, TokenLaw], of_g: Mapping[float, TokenLaw]) -> list[tuple[float, TokenLaw, TokenLaw]]:
    """Token laws of both losses for the ratios that both know."""
    found = []
    for ratio, law in of_d.items():
        near = min(of_g, key=lambda other: abs(other - ratio))
        if abs(near - ratio) < 1e-5:
            found.append((ratio, law, of_g[near]))
    assert found, "the laws share no ratio"
    return found
