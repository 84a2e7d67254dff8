"""Quantities as people write them (`10B`, `36h`, `80GB`, `0.5%`) to numbers and back."""

from __future__ import annotations

import math
import re

from cpt.base.errors import UsageError

_COUNT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_NUMBER = r"([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"


def _split(text: str) -> tuple[float, str] | None:
    match = re.fullmatch(_NUMBER + r"\s*([A-Za-z%]*)", text.strip())
    if match is None:
        return None
    try:
        number = float(match[1].replace("_", "").replace(",", ""))
    except ValueError:
        return None
    return (number, match[2]) if math.isfinite(number) else None


def _refuse(what: str, value: object, forms: str) -> UsageError:
    return UsageError(f"`{value}` is not {what}; accepted forms: {forms}")


def parse_count(value: object) -> int:
    """A whole count of tokens, steps or documents: `10B`, `1.5e9`, `500M`, `2048`.

    Raises:
        UsageError: not a whole, finite, non-negative count.
    """
    forms = "`2048`, `500M`, `1.5e9`, `10B`"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _refuse("a count", value, forms)
    parts = _split(str(value))
    if parts is None or parts[1].upper() not in _COUNT:
        raise _refuse("a count", value, forms)
    count = parts[0] * _COUNT[parts[1].upper()]
    if count < 0 or abs(count - round(count)) > 1e-6 * max(1.0, count):
        raise _refuse("a whole count", value, forms)
    return int(value) if isinstance(value, int) else round(count)


def parse_amount(value: object) -> float:
    """A finite number that need not be whole, with an optional suffix: `1.8B`, `1.5e9`, `25%` (0.25).

    Raises:
        UsageError: not such a number.
    """
    forms = "`1.5e9`, `1.8B`, `25%`"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _refuse("a number", value, forms)
    parts = _split(str(value))
    if parts is None or parts[1].upper() not in (*_COUNT, "%"):
        raise _refuse("a number", value, forms)
    amount = parts[0] / 100 if parts[1] == "%" else parts[0] * _COUNT[parts[1].upper()]
    if not math.isfinite(amount):
        raise _refuse("a finite number", value, forms)
    return amount


def parse_share(value: object) -> float:
    """A share between 0 and 1: `0.005`, `0.5%`.

    Raises:
        UsageError: not a number, or outside 0 to 1.
    """
    forms = "`0.05`, `5%`"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _refuse("a share", value, forms)
    parts = _split(str(value))
    if parts is None or parts[1] not in ("", "%"):
        raise _refuse("a share", value, forms)
    share = parts[0] / 100 if parts[1] == "%" else parts[0]
    if not 0 <= share <= 1:
        raise _refuse("a share between 0 and 1", value, forms)
    return share


def parse_bytes(value: object) -> int:
    """An amount of memory or disk [bytes]: `80GB`, `512MiB`.

    Raises:
        UsageError: not an amount of bytes.
    """
    forms = "`80GB`, `512MiB`, `1e9`"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _refuse("an amount of bytes", value, forms)
    parts = _split(str(value))
    if parts is None or parts[1].upper() not in _BYTES or parts[0] < 0:
        raise _refuse("an amount of bytes", value, forms)
    return round(parts[0] * _BYTES[parts[1].upper()])


def parse_duration(value: object) -> float:
    """A length of time [s]: `36h`, `90m`, `2d`, `1:30:00` (h:m:s), `2-00:00:00` (days-h:m:s), or a number of seconds.

    Raises:
        UsageError: not a length of time.
    """
    forms = "`36h`, `90m`, `2d`, `1:30:00`, `2-00:00:00`"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _refuse("a length of time", value, forms)
    text = str(value).strip()
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{1,2}):(\d{1,2})", text)
    if clock:
        days, hours, minutes, seconds = (int(x or 0) for x in clock.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    parts = _split(text)
    if parts is None or parts[0] < 0 or (parts[1] and parts[1].lower() not in _SECONDS):
        raise _refuse("a length of time", value, forms)
    return parts[0] * _SECONDS[parts[1].lower() or "s"]


def show_count(count: float) -> str:
    """A count for people with three significant figures: 10.0B, 500M, 1.20B; exact below ten thousand (9,536)."""
    if abs(count) < 10_000:
        return f"{count:,.0f}"
    power = 1
    while power < 4 and abs(float(f"{count / 1000**power:.3g}")) >= 1000:
        power += 1
    value = count / 1000**power
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{' KMBT'[power]}"


def show_bytes(size: float) -> str:
    """An amount of bytes for people: 512 B, 20 GB, 1.2 MB."""
    value = float(size)
    for suffix in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or suffix == "TB":
            break
        value /= 1000
    return f"{value:.0f} {suffix}" if value >= 10 or suffix == "B" else f"{value:.1f} {suffix}"


def show_duration(seconds: float) -> str:
    """A length of time for people: 45 s, 3 min 20 s, 3.6 h, 2.1 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
