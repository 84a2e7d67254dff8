"""Slurm's short form of host names, `node[1-2,7],gpu-a[01-03]x`, to names, where no `scontrol` is at hand."""

from __future__ import annotations

import itertools
import re

MOST = 65_536  # hosts in a list, as in Slurm

_PIECE = re.compile(r"\[([^][]*)\]|([^][,\s]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def expand(text: str) -> list[str]:
    """Host names in the order of the list; those of several brackets with the last one fastest.

    Raises:
        ValueError: not such a list.
    """
    hosts: list[str] = []
    for item in re.split(r",(?![^[]*\])", text):
        if item := item.strip():
            hosts.extend(_item(item, text))
        if len(hosts) > MOST:
            raise ValueError(f"`{text[:80]}` has more than {MOST:,} hosts")
    return hosts


def _item(item: str, text: str) -> list[str]:
    parts: list[list[str]] = []
    size, end = 1, 0
    for piece in _PIECE.finditer(item):
        if piece.start() != end:
            break
        end = piece.end()
        parts.append([piece[2]] if piece[2] else _numbers(piece[1], text))
        size *= len(parts[-1])
        if size > MOST:
            raise ValueError(f"`{text[:80]}` has more than {MOST:,} hosts")
    if end != len(item):
        raise ValueError(f"`{text[:80]}` is not a list of hosts: the brackets of `{item[:80]}` do not match")
    return ["".join(names) for names in itertools.product(*parts)]


def _numbers(ranges: str, text: str) -> list[str]:
    """What stands in one pair of brackets; zeros in front are kept, as wide as the first number of a range."""
    found: list[str] = []
    for one in ranges.split(","):
        match = _RANGE.fullmatch(one.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or last < first:
            raise ValueError(f"`{text[:80]}` is not a list of hosts: `{one[:80]}` is not a number or a range")
        if last - first >= MOST:
            raise ValueError(f"`{text[:80]}` has more than {MOST:,} hosts")
        found.extend(f"{number:0{len(match[1])}d}" for number in range(first, last + 1))
    return found
