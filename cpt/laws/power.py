"""y = a·x^s + b, solved exactly: for a given s the rest is linear, so that only s is searched.

The ratio law and the critical-ratio law of CMR have this form. Array suffixes: B curves at once, P points, S tried
exponents.
"""

from __future__ import annotations

import numpy as np

from cpt.laws.rows import Floats

LOW, HIGH = -8.0, 8.0  # exponents that are searched
_GRID, _ROUNDS = 65, 9


def box_cox(log_x: Floats, s: Floats) -> tuple[Floats, Floats, Floats]:
    """(x^s - 1)/s, which is log x at s = 0, with its first and second derivative by s."""
    z = s * log_x
    small = np.abs(z) < 1e-3
    s = np.where(small, 1.0, s)
    power = np.expm1(z)
    value = np.where(small, log_x * (1 + z / 2 + z * z / 6 + z**3 / 24), power / s)
    slope = np.where(small, log_x**2 * (0.5 + z / 3 + z * z / 8 + z**3 / 30), ((power + 1) * z - power) / s**2)
    bend = np.where(small, log_x**3 * (1 / 3 + z / 4 + z * z / 10), (log_x**2 * (power + 1) - 2 * slope) / s)
    return value, slope, bend


def fit_power(x_P: Floats, y_BP: Floats) -> tuple[Floats, Floats, Floats]:
    """Least-squares a, s and b of y = a·x^s + b for every curve, all through the same x > 0.

    A search on a grid of s from -8 to 8 that closes in on the best value; at least three distinct x.

    Returns:
        a_B, s_B, b_B; s is never nearer to 0 than 1e-6, where the form is b + a·log x.
    """
    assert len(x_P) >= 3 and np.all(x_P > 0)
    centre = np.exp(np.log(x_P).mean())  # keeps x^s near 1
    log_P = np.log(x_P / centre)
    y_BP = np.atleast_2d(np.asarray(y_BP, np.float64))
    mean_B1 = y_BP.mean(1, keepdims=True)
    low_B, high_B = np.full(len(y_BP), LOW), np.full(len(y_BP), HIGH)
    for _ in range(_ROUNDS):
        s_BS = low_B[:, None] + (high_B - low_B)[:, None] * np.linspace(0, 1, _GRID)
        z_BSP = box_cox(log_P, s_BS[:, :, None])[0]
        z_BSP = z_BSP - z_BSP.mean(2, keepdims=True)
        along_BS = (z_BSP * (y_BP - mean_B1)[:, None, :]).sum(2) / (z_BSP**2).sum(2)
        rest_BS = ((along_BS[:, :, None] * z_BSP - (y_BP - mean_B1)[:, None, :]) ** 2).sum(2)
        best_B = np.argmin(rest_BS, 1)
        row_B = np.arange(len(y_BP))
        step_B = (high_B - low_B) / (_GRID - 1)
        s_B, slope_B = s_BS[row_B, best_B], along_BS[row_B, best_B]
        low_B, high_B = np.maximum(s_B - 2 * step_B, LOW), np.minimum(s_B + 2 * step_B, HIGH)
    s_B = np.where(np.abs(s_B) < 1e-6, 1e-6, s_B)
    # Box-Cox slope c and mean level back to a·x^s + b.
    b_B = mean_B1[:, 0] - slope_B * np.expm1(s_B[:, None] * log_P).mean(1) / s_B
    a_centred_B = slope_B / s_B
    return a_centred_B * centre ** (-s_B), s_B, b_B - a_centred_B
