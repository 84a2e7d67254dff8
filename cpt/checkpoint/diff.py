"""Two checkpoints of any formats side by side: every logical tensor bit by bit, and what lies beside the tensors.

Reads both once, in small blocks. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.records import to_json
from cpt.checkpoint import hf_config
from cpt.checkpoint.arrays import CARRIERS, Array, Files, as_matrix, convert, itemsize, rectangles
from cpt.checkpoint.content import MAIN, MODEL, MOMENTS, Atom, Content

_BLOCK = 1 << 18  # values compared at a time
Values = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Differs:
    """A state of a tensor that is not the same in both.

    Args:
        tensor: name of the logical tensor; its padding rows are called so.
        state: `model`, `fp32`, `exp_avg`, `exp_avg_sq`.
        first: index of the first differing value, None where shapes differ.
        values: that value in both, as text; or both shapes or dtypes.
        count: differing values.
        numel: values compared.
        largest: largest difference; NaN on one side only counts as infinite.
        dtypes: of both, where these differ.
    """

    tensor: str
    state: str
    first: tuple[int, ...] | None
    values: tuple[str, str]
    count: int
    numel: int
    largest: float
    dtypes: tuple[str, str] | None = None

    def __str__(self) -> str:
        a, b = self.values
        if self.first is None:
            return f"`{self.tensor}` {self.state}: {a} and {b}"
        said = []
        if self.dtypes is not None:
            said.append(f"{self.dtypes[0]} and {self.dtypes[1]}")
        if self.count:
            at = ", ".join(map(str, self.first))
            said.append(
                f"{self.count:,} of {self.numel:,} values differ, first at [{at}]: {a} and {b}; "
                f"largest difference {self.largest:.4g}"
            )
        else:
            said.append("the same values")
        return f"`{self.tensor}` {self.state}: {', '.join(said)}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """All that two checkpoints differ in.

    Args:
        tensors: that both have, with other values.
        only: (0 = first, 1 = second, what only that one has).
        fields: (name, value in the first, value in the second) beside the tensors.
        compared: states of tensors that both have.
    """

    tensors: tuple[Differs, ...]
    only: tuple[tuple[int, str], ...]
    fields: tuple[tuple[str, Any, Any], ...]
    compared: int

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.tensors or self.only or self.fields)


def diff(
    a: Content,
    b: Content,
    files: Files,
    *,
    weights: bool = False,
    watch: Callable[[int], None] = lambda nbytes: None,
) -> Difference:
    """Compare two opened checkpoints.

    Args:
        weights: compare model weights and the model's fields only.
        watch: called with the number of bytes read after each block.
    """
    found: list[Differs] = []
    compared = 0
    for name, state, pad, one, other in _both(a, b, weights):
        compared += 1
        differs = _compare(name, state, pad, one, other, files, watch)
        found += [differs] if differs is not None else []
    return Difference(
        tensors=tuple(found), only=tuple(_only(a, b, weights)), fields=tuple(_fields(a, b, weights)), compared=compared
    )


@dataclass(frozen=True)
class _Side:
    """An array and the dtype in which its values count."""

    array: Array
    dtype: str


def _states(content: Content, atom: Atom, pad: bool, weights: bool) -> dict[str, _Side]:
    """What a checkpoint holds of a tensor; a model weight that is stored as its main weight alone counts as both."""
    states = atom.pad if pad else atom.states
    if not states:
        return {}
    found: dict[str, _Side] = {}
    if MODEL in states or MAIN in states:
        found[MODEL] = _Side(content.array(atom.name, MODEL, pad), atom.dtype)
    if not weights:
        found |= {s: _Side(states[s], states[s].dtype) for s in (MAIN, *MOMENTS) if s in states}
    return found


def _both(a: Content, b: Content, weights: bool) -> Iterator[tuple[str, str, bool, _Side, _Side]]:
    """(tensor, state, whether its padding rows, first, second) of what both have."""
    for name, atom in a.atoms.items():
        if name not in b.atoms:
            continue
        for pad in (False,) if weights else (False, True):
            one, other = _states(a, atom, pad, weights), _states(b, b.atoms[name], pad, weights)
            for state in one:
                if state in other:
                    yield name, state, pad, one[state], other[state]


def _only(a: Content, b: Content, weights: bool) -> Iterator[tuple[int, str]]:
    for side, (mine, its) in enumerate(((a, b), (b, a))):
        missing: dict[str, list[str]] = {}
        for name, atom in mine.atoms.items():
            if name not in its.atoms:
                yield side, f"tensor `{name}`"
                continue
            for pad in (False,) if weights else (False, True):
                there = _states(its, its.atoms[name], pad, weights)
                for state in _states(mine, atom, pad, weights):
                    if state not in there:
                        missing.setdefault(f"{state} of padding rows" if pad else state, []).append(name)
        for state, names in missing.items():
            some = f"`{names[0]}`" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
            yield side, f"{state} of {some}"
        if not weights:
            yield from ((side, f"`{k}`") for k in mine.common if k not in its.common)
            yield from ((side, f"object `{k}`") for k in mine.objects if k not in its.objects)


def _fields(a: Content, b: Content, weights: bool) -> Iterator[tuple[str, Any, Any]]:
    """What differs beside the tensors and is known of both."""
    yield from _named(_model(a), _model(b), "model ")
    if weights:
        return
    plain = {"iteration": a.iteration, "rows of the padded vocabulary": a.padded_vocab_size}
    yield from _named(plain, {"iteration": b.iteration, "rows of the padded vocabulary": b.padded_vocab_size}, "")
    if a.optimizer is not None and b.optimizer is not None:
        yield from _named({"step": a.optimizer.step}, {"step": b.optimizer.step}, "optimizer ")
        mine, its = list(a.optimizer.groups), list(b.optimizer.groups)
        if len(mine) != len(its):
            yield "number of parameter groups", len(mine), len(its)
        for i, (one, other) in enumerate(zip(mine, its, strict=False)):
            yield from _named(one, other, f"parameter group {i}: ", missing=True)
    yield from _named(a.common, b.common, "")
    yield from _named(a.objects, b.objects, "object ")


def _named(
    one: Mapping[str, Any], other: Mapping[str, Any], what: str, *, missing: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Fields that are not the same; with `missing` those of one side only too."""
    for key in sorted({*one, *other} if missing else {*one} & {*other}):
        mine, its = _plain(one.get(key)), _plain(other.get(key))
        if _text_of(mine) != _text_of(its) and (missing or None not in (mine, its)):
            yield f"{what}`{key}`", mine, its


def _text_of(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # equal NaN are equal


def _plain(value: Any) -> Any:
    """JSON values: tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _model(content: Content) -> dict[str, Any]:
    fields = _plain(to_json(content.model))
    config = content.model.hf_config
    del fields["hf_config"]
    if config is not None:
        fields["sliding_window"] = hf_config.window(config) or "none"
    return dict(fields)


def _compare(
    name: str, state: str, pad: bool, one: _Side, other: _Side, files: Files, watch: Callable[[int], None]
) -> Differs | None:
    name = f"{name} (padding rows)" if pad else name
    if one.array.shape != other.array.shape:
        shapes = (f"shape {list(one.array.shape)}", f"shape {list(other.array.shape)}")
        return Differs(tensor=name, state=state, first=None, values=shapes, count=0, numel=0, largest=0.0)
    dtypes = None if one.dtype == other.dtype else (one.dtype, other.dtype)
    rows, columns = as_matrix(one.array.shape)
    first, values, count, largest = 0, ("", ""), 0, 0.0
    for row, column, shape in rectangles(0, rows, columns, _BLOCK):
        pair = []
        for side in (one, other):
            block = np.empty(shape, CARRIERS[side.dtype])
            _read(files, side, row, column, block, name)
            pair.append(block.reshape(-1))
        watch(sum(math.prod(shape) * itemsize(s.array.dtype) for s in (one, other)))
        at = _unequal(pair[0], one.dtype, pair[1], other.dtype)
        if not len(at):
            continue
        down, across = divmod(int(at[0]), shape[1])
        place = (row + down) * columns + column + across
        if not count or place < first:
            first, values = place, (_text(pair[0][at[0]], one.dtype), _text(pair[1][at[0]], other.dtype))
        count += len(at)
        largest = max(largest, _largest(pair[0][at], one.dtype, pair[1][at], other.dtype))
    if not count and dtypes is None:
        return None
    return Differs(
        tensor=name,
        state=state,
        first=_index(first, one.array.shape),
        values=values,
        count=count,
        numel=rows * columns,
        largest=largest,
        dtypes=dtypes,
    )


def _read(files: Files, side: _Side, row: int, column: int, block: Any, name: str) -> None:
    try:
        files.read(side.array, row, column, block, side.dtype)
    except UsageError as error:
        raise UsageError(f"`{name}`: {error.message}", *error.hints) from None


def _unequal(one: Values, given: str, other: Values, wanted: str) -> Values:
    """Indices of values that differ: bits of one dtype; of two dtypes the numbers, where NaN is NaN."""
    if given == wanted:
        a, b = (v.view(f"u{v.dtype.itemsize}") for v in (one, other))
        return np.flatnonzero(a != b)
    wide, wider = _wide(one, given), _wide(other, wanted)
    return np.flatnonzero((wide != wider) & ~(np.isnan(wide) & np.isnan(wider)))


def _wide(values: Values, dtype: str) -> Values:
    """As fp64, which holds every value of the other dtypes but integers beyond 2^53."""
    return convert(values, dtype, "float32").astype(np.float64) if dtype == "bfloat16" else values.astype(np.float64)


def _largest(one: Values, given: str, other: Values, wanted: str) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(_wide(one, given) - _wide(other, wanted))
    one_is_nan = np.isnan(_wide(one, given)) != np.isnan(_wide(other, wanted))
    return float(np.where(one_is_nan, np.inf, np.nan_to_num(apart, nan=0.0, posinf=np.inf)).max())


def _text(value: Any, dtype: str) -> str:
    number = _wide(np.array([value]), dtype)[0]
    bits = int(np.array([value]).view(f"u{np.array([value]).dtype.itemsize}")[0])
    width = 2 * itemsize(dtype)
    return f"{number:.9g} (0x{bits:0{width}x})" if dtype in ("float32", "bfloat16", "float16") else f"{number:.17g}"


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for n in reversed(shape):
        flat, i = divmod(flat, n) if n else (flat, 0)
        found.append(i)
    return tuple(reversed(found))
