"""Looks at values while they pass: NaN and infinite ones, tensors that are all one value, subnormal ones, rounded ones.

It must cost little beside the checksum: maxima of the bits taken as integers find NaN and infinite values, an eighth of
the values shows whether subnormal ones are many, and a tensor is compared with its first value only until one differs.
Only where something is found are the logical tensors looked for, and the values counted one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cpt.checkpoint.arrays import Array, Fill, Payload, Segment, crop
from cpt.checkpoint.content import MAIN, MODEL, Content
from cpt.checkpoint.values import FLOATS, MANY_SUBNORMALS, Kind, Values, the_one

Key = tuple[str, str, bool]  # atom, state, whether its padding rows
Box = tuple[int, int, int, int]  # first row, rows, first column, columns of the logical tensor


@dataclass
class Facts:
    """What was seen in one file, or in all of them.

    Args:
        nonfinite: NaN or infinite values of a part: how many, and the place of the first (row, column).
        single: parts whose values are all the same, and that value's bits. Padding rows are not looked at.
        subnormal: how many, of parts that have many.
        rounded: values that another dtype changed.
    """

    nonfinite: dict[tuple[Key, Box], tuple[int, int, int]] = field(default_factory=dict)
    single: dict[tuple[Key, Box], int] = field(default_factory=dict)
    subnormal: dict[tuple[Key, Box], int] = field(default_factory=dict)
    rounded: int = 0

    def add(self, other: Facts) -> None:
        """Take in what was seen elsewhere; copies of one part count once."""
        self.nonfinite |= other.nonfinite
        self.single |= other.single
        self.subnormal |= other.subnormal
        self.rounded += other.rounded

    def to_json(self) -> dict[str, Any]:
        """As JSON; `from_json` gives the same facts again."""

        def rows(found: Mapping[tuple[Key, Box], Any]) -> list[list[Any]]:
            return [[list(key), list(box), value] for (key, box), value in found.items()]

        return {
            "nonfinite": rows(self.nonfinite),
            "single": rows(self.single),
            "subnormal": rows(self.subnormal),
            "rounded": self.rounded,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Facts:
        """What `to_json` gave."""

        def found(rows: Iterable[Any]) -> Iterator[tuple[tuple[Key, Box], Any]]:
            for (atom, state, pad), box, seen in rows:
                yield ((str(atom), str(state), bool(pad)), tuple(box)), tuple(seen) if isinstance(seen, list) else seen

        return cls(
            nonfinite=dict(found(value["nonfinite"])),
            single=dict(found(value["single"])),
            subnormal=dict(found(value["subnormal"])),
            rounded=int(value["rounded"]),
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to say about one logical tensor.

    Args:
        kind: nonfinite | zero | constant | subnormal.
        count: values concerned.
        first: index of the first one.
    """

    kind: str
    atom: str
    state: str
    count: int
    first: tuple[int, ...] = ()

    @property
    def tensor(self) -> str:
        """Its name for a person."""
        return self.atom if self.state == MODEL else f"{self.atom} ({self.state})"

    def to_json(self) -> dict[str, Any]:
        """As JSON; `first` only where there is one."""
        return {
            "kind": self.kind,
            "tensor": self.atom,
            "state": self.state,
            "count": self.count,
            **({"first": list(self.first)} if self.first else {}),
        }


def findings(facts: Facts, content: Content) -> list[Finding]:
    """What was seen, by logical tensor, in the order of the model."""
    order = {name: i for i, name in enumerate(content.atoms)}
    found: list[Finding] = []
    for key, parts in _by_tensor(facts.nonfinite).items():
        first = min((row, column) for _, row, column in parts.values())
        count = sum(n for n, _, _ in parts.values())
        found.append(_finding("nonfinite", key, count, _index(content, key, first)))
    for key, bits in _by_tensor(facts.single).items():
        numel = math.prod(_array(content, key).shape)
        values = set(bits.values())
        if len(values) == 1 and numel > 1 and sum(b[1] * b[3] for b in bits) >= numel:
            found.append(_finding("constant" if values.pop() else "zero", key, numel))
    for key, counts in _by_tensor(facts.subnormal).items():
        numel = math.prod(_array(content, key).shape)
        if sum(counts.values()) > MANY_SUBNORMALS * numel:
            found.append(_finding("subnormal", key, sum(counts.values())))
    return sorted(found, key=lambda f: (("nonfinite", "zero", "constant", "subnormal").index(f.kind), order[f.atom]))


def _by_tensor(found: Mapping[tuple[Key, Box], Any]) -> dict[Key, dict[Box, Any]]:
    grouped: dict[Key, dict[Box, Any]] = {}
    for (key, box), value in found.items():
        grouped.setdefault(key, {})[box] = value
    return grouped


def _finding(kind: str, key: Key, count: int, first: tuple[int, ...] = ()) -> Finding:
    atom, state, pad = key
    return Finding(kind=kind, atom=atom, state=f"{state}, padding" if pad else state, count=count, first=first)


def _array(content: Content, key: Key) -> Array:
    atom, state, pad = key
    return content.array(atom, state, pad)


def _index(content: Content, key: Key, place: tuple[int, int]) -> tuple[int, ...]:
    """Row and column of a logical tensor's matrix as an index of its shape."""
    shape = _array(content, key).shape
    if len(shape) < 2:
        return (place[0],) if shape else ()
    return (place[0], *(int(i) for i in np.unravel_index(place[1], shape[1:])))


class Look:
    """Looks at the blocks of one file as they pass; `facts` holds what was seen.

    Args:
        content: whose values they are.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        self.facts = Facts()
        self._varied: set[Key] = set()  # tensors with two different values
        self._boxes: dict[Key, list[Box]] = {}  # of `facts.single`, by tensor
        self._payload: Payload | None = None
        self._at = 0  # values of the payload that have passed
        self._settled = False  # all of the payload's tensors are known to vary

    def to_json(self) -> dict[str, Any]:
        """What was seen, and what is needed to go on looking."""
        return {**self.facts.to_json(), "varied": sorted(self._varied)}

    @classmethod
    def from_json(cls, content: Content, value: Mapping[str, Any]) -> Look:
        """Goes on where `to_json` was taken; `skip` says where in a payload that was."""
        look = cls(content)
        look.facts = Facts.from_json(value)
        look._varied = {(atom, state, pad) for atom, state, pad in value["varied"]}
        for key, box in look.facts.single:
            look._boxes.setdefault(key, []).append(box)
        return look

    def skip(self, payload: Payload, count: int) -> None:
        """The payload's first values have passed before."""
        self._payload, self._at, self._settled = payload, count, False

    def __call__(self, payload: Payload, values: Values) -> None:
        """Look at a block.

        Args:
            values: flat, the payload's next ones.
        """
        if payload is not self._payload:
            self.skip(payload, 0)
        first, self._at = self._at, self._at + len(values)
        kind = FLOATS.get(payload.dtype)
        if kind is not None:
            bits = values.view(kind.carrier)
            if kind.has_nonfinite(bits):
                self._count(payload, bits, first, kind, "nonfinite")
            if kind.may_be_subnormal(bits):
                self._count(payload, bits, first, kind, "subnormal")
        if not self._settled:
            self._compare(payload, values, first)

    def _count(self, payload: Payload, bits: Values, first: int, kind: Kind, what: str) -> None:
        for key, box, part, transposed in _parts(payload, bits, first):
            wrong = kind.nonfinite(part) if what == "nonfinite" else kind.subnormal(part)
            count = int(np.count_nonzero(wrong))
            if not count:
                continue
            if what == "subnormal":
                self.facts.subnormal[key, box] = count
                continue
            wrong = wrong.T if transposed else wrong
            row, column = divmod(int(np.argmax(wrong.reshape(-1))), wrong.shape[1])
            self.facts.nonfinite[key, box] = (count, box[0] + row, box[2] + column)

    def _compare(self, payload: Payload, values: Values, first: int) -> None:
        keys = set()
        bits = values.view(f"u{values.itemsize}")
        for key, box, part, _ in _parts(payload, bits, first):
            if key[2] or key in self._varied:
                continue
            value = the_one(part)
            if value is None:
                self._vary(key)
            else:
                self._join(key, box, value)
                keys.add(key)
        if not keys:  # looked for again with the next payload: other tensors are in it
            self._settled = all(_key(payload, f) in self._varied or f.pad for f in _fills(payload))

    def _vary(self, key: Key) -> None:
        self._varied.add(key)
        for box in self._boxes.pop(key, []):
            del self.facts.single[key, box]

    def _join(self, key: Key, box: Box, value: int) -> None:
        """Note a part of one value; parts that lie one below the other become one."""
        row, rows, column, columns = box
        boxes = self._boxes.setdefault(key, [])
        if boxes and self.facts.single[key, boxes[0]] != value:
            self._vary(key)
            return
        for one in reversed(boxes):
            top, height, left, width = one
            if (left, width) == (column, columns) and top + height == row:
                boxes.remove(one)
                del self.facts.single[key, one]
                row, rows = top, height + rows
                break
        boxes.append((row, rows, column, columns))
        self.facts.single[key, boxes[-1]] = value


def _fills(payload: Payload) -> Iterator[Fill]:
    return (f for s in payload.segments for f in s.fills if f.atom is not None)


def _key(payload: Payload, fill: Fill) -> Key:
    assert fill.atom is not None
    return fill.atom, payload.state, fill.pad


def _parts(payload: Payload, bits: Values, first: int) -> Iterator[tuple[Key, Box, Values, bool]]:
    """The rectangles of logical tensors in a block: whose, which rectangle of it, its values, whether transposed.

    Args:
        first: of the payload's values, in the block.
    """
    at, last = 0, first + len(bits)
    for segment in payload.segments:
        size = segment.rows * segment.columns
        if size and at < last and at + size > first:
            begin, end = max(at, first), min(at + size, last)
            while begin < end:  # whole rows, or a part of one
                row, column = divmod(begin - at, segment.columns)
                width = min(segment.columns - column, end - begin)
                height = (end - begin) // width if width == segment.columns else 1
                rows = bits[begin - first :][: height * width].reshape(height, width)
                yield from _of_rows(payload, segment, row, column, rows)
                begin += height * width
        at += size


def _of_rows(
    payload: Payload, segment: Segment, row: int, column: int, rows: Values
) -> Iterator[tuple[Key, Box, Values, bool]]:
    for f in crop(segment.fills, row, rows.shape[0], column, rows.shape[1]):
        if f.atom is None:
            continue
        height, width = (f.columns, f.rows) if f.transposed else (f.rows, f.columns)
        box = (f.at_row, height, f.at_column, width)
        yield _key(payload, f), box, rows[f.row : f.row + f.rows, f.column : f.column + f.columns], f.transposed


def is_rounded(payload: Payload, content: Content) -> bool:
    """Whether a payload's dtype can change values that a person did not ask to be rounded by asking for weights.

    A weight that is kept as its fp32 main weight alone is rounded to its own dtype: nothing is lost by that.
    """
    fill = next(_fills(payload), None)
    if fill is None or fill.atom is None:
        return False
    atom = content.atoms[fill.atom]
    states = atom.pad if fill.pad else atom.states
    return not (payload.state == MODEL and MODEL not in states and MAIN in states and payload.dtype == atom.dtype)
