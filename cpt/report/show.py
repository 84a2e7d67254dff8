"""Numbers and names as people read them: the same rounding in display, status, table and page."""

from __future__ import annotations

import time
import unicodedata

from cpt.base.units import show_bytes, show_count, show_duration

__all__ = [
    "ago",
    "change",
    "loss",
    "lr",
    "moment",
    "plain",
    "share",
    "show_bytes",
    "show_count",
    "show_duration",
    "speed",
]

NOTHING = "-"


def plain(text: object, limit: int = 500) -> str:
    """Text of unknown origin on one line: no control characters (terminal escapes), no line breaks, not too long."""
    shown = "".join(
        " " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") else c for c in str(text)[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[:limit] + "…"


def lr(value: float | None) -> str:
    """3.0e-05; 0 for zero."""
    return NOTHING if value is None else "0" if value == 0 else f"{value:.1e}"


def loss(value: float | None) -> str:
    """A loss with three digits [nats/token or bits/byte]."""
    return NOTHING if value is None else f"{value:.3f}"


def change(value: float | None) -> str:
    """A difference with its sign."""
    return NOTHING if value is None else "0.000" if abs(value) < 0.0005 else f"{value:+.3f}"


def share(value: float | None) -> str:
    """A fraction in percent."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def speed(value: float | None) -> str:
    """Tokens a second."""
    return NOTHING if value is None else f"{value:,.0f}" if value < 100_000 else show_count(value)


def moment(t: float) -> str:
    """A time in the user's zone with the offset."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(t))


def ago(t: float | None, now: float) -> str:
    """How long ago something was."""
    return NOTHING if t is None else f"{show_duration(max(0.0, now - t))} ago"
