"""Ways down from one lr to another: `SHAPES[name](u, high, low)` at progress u from 0 to 1 gives the lr."""

from __future__ import annotations

import math
from collections.abc import Callable

from cpt.base.errors import UsageError


def clip(u: float) -> float:
    """Progress held within 0 to 1, so that a step past the end stays on the last level."""
    return min(1.0, max(0.0, u))


def between(c: float, high: float, low: float) -> float:
    """`high` at c = 1 and `low` at c = 0, both exactly."""
    return c * high + (1 - c) * low


def linear(u: float) -> float:
    return 1 - u


def cosine(u: float) -> float:
    return (1 + math.cos(math.pi * u)) / 2


def exponential(u: float) -> float:
    return 2 * 0.5**u - 1


def minus_sqrt(u: float) -> float:
    return 1 - math.sqrt(u)


def inverse_sqrt(u: float, a: float = 10.0) -> float:
    """1 - h(u)/h(1) with h(u) = 1/sqrt(1 + a·u) - 1: steep at first, convex."""
    return 1 - (1 / math.sqrt(1 + a * u) - 1) / (1 / math.sqrt(1 + a) - 1)


COEFFICIENTS: dict[str, Callable[[float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "minus_sqrt": minus_sqrt,
    "inverse_sqrt": inverse_sqrt,
}


def decay(shape: str, u: float, high: float, low: float) -> float:
    """The lr at progress `u` of a decay from `high` to `low`.

    `geometric` is high·(low/high)^u; the other shapes are low + (high - low)·c(u).
    """
    u = clip(u)
    if shape == "geometric":
        return high * (low / high) ** u
    return between(COEFFICIENTS[shape](u), high, low)


def warm(step: int, warmup: int, peak: float, start_lr: float) -> float:
    """The lr of a warmup step: from `start_lr` (excluded) to `peak` (at the last warmup step), never above it."""
    start = min(start_lr, peak)
    return between((step + 1) / warmup, peak, start)


def known_shape(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a shape that is not among the allowed ones."""
    if value not in allowed:
        raise UsageError(f"`{name}` is `{value}`, wanted one of " + ", ".join(f"`{a}`" for a in allowed))
