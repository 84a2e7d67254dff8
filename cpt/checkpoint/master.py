"""The master test: the optimizer's fp32 weights, rounded to the model's dtype, are the model's weights bit for bit.

It finds shifted slices, swapped gate and up, wrong bucket sizes and memory that was never filled in, in any format, and
costs one pass over the values. No torch; memory is a few small blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint.arrays import CARRIERS, Array, Files, as_matrix, convert, rectangles, row_spans
from cpt.checkpoint.content import MAIN, MODEL, Content
from cpt.checkpoint.values import FLOATS

_BLOCK = 1 << 18  # values compared at a time: what fits into a core's cache
_TURN = 1 << 24  # values after which the next of several parts takes over
Values = np.ndarray[Any, np.dtype[Any]]


class NotItsWeights(UsageError):
    """An optimizer's main weights are not the model's weights."""


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A tensor whose main weight is not its model weight.

    Args:
        pad: whether these are the vocabulary's padding rows.
        first: index of the first wrong value, row after row.
        count: wrong values.
        zeros: those of them whose main weight is zero.
        numel: values of the tensor.
    """

    atom: str
    pad: bool
    first: int
    count: int
    zeros: int
    numel: int

    def __str__(self) -> str:
        return self.atom + (" (padding rows)" if self.pad else "")


def check(content: Content, files: Files, *, part: int = 0, parts: int = 1) -> list[Wrong]:
    """Tensors whose main weight, rounded, is not the model weight; padding rows of the vocabulary too.

    Tensors without one of the two, and those declared as unrounded, are not compared. NaN in both is equal, whatever
    its bits; `0` and `-0` are not.

    Args:
        part, parts: only this share of the values, so that processes can share the work; `together` joins their finds.
    """
    found: list[Wrong] = []
    for turn, (atom, pad, main, weight, first, last) in enumerate(_turns(content)):
        if turn % parts == part:
            found += _compare(files, atom, pad, main, weight, first, last)
    return together(found)


def compared(content: Content) -> int:
    """How many tensors have both weights; padding rows are of their tensor."""
    return len({atom for atom, *_ in _pairs(content)})


def together(found: Iterable[Wrong]) -> list[Wrong]:
    """Finds of one tensor as one, in the order in which they came."""
    joined: dict[tuple[str, bool], Wrong] = {}
    for w in found:
        before = joined.get((w.atom, w.pad))
        joined[w.atom, w.pad] = (
            w
            if before is None
            else replace(
                w, first=min(before.first, w.first), count=before.count + w.count, zeros=before.zeros + w.zeros
            )
        )
    return list(joined.values())


def refuse(content: Content, wrong: Sequence[Wrong]) -> NotItsWeights:
    """The error for a checkpoint that failed the test; names the known fault of megatron-core when it fits."""
    wrong = together(wrong)
    form = content.optimizer.form if content.optimizer else None
    known = content.format in ("torch_dist", "native") and form in (None, "fully_reshardable") and _is_shifted(wrong)
    whole = {w.atom for w in wrong if not w.pad}
    names = [str(w) for w in wrong if not (w.pad and w.atom in whole)]
    return refusal(str(content.path), names, compared(content), known=known)


def refusal(path: str, wrong: Sequence[str], tensors: int, *, known: bool) -> NotItsWeights:
    """The error for main weights that are not the model's weights.

    Args:
        wrong: names of the tensors.
        tensors: how many were compared.
        known: whether it looks like the fault of megatron-core.
    """
    names = ", ".join(f"`{w}`" for w in wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    why = (
        "megatron-core 0.15.0 to 0.19.2 writes such `fully_reshardable` checkpoints when gradients lie in several "
        "buckets and one of them ends in padding (`overlap_grad_reduce`, or tied embeddings with pp > 1); "
        "their optimizer state cannot be used"
        if known
        else "the optimizer's state is damaged, or of another moment than the weights"
    )
    return NotItsWeights(
        f"`{path}`: the optimizer's main weights are not the model's weights in {len(wrong)} of {tensors} tensors "
        f"({names})",
        why,
        "the weights themselves are good: `--optimizer none` converts them alone"
        if known
        else "`--optimizer none` converts the weights alone",
    )


def _is_shifted(wrong: Sequence[Wrong]) -> bool:
    """Whether whole tensors are other values or zeros, and not a few values damaged."""
    return any(2 * w.count > w.numel or w.count == w.zeros > 1 for w in wrong)


def _pairs(content: Content) -> Iterator[tuple[str, bool, Array, Array]]:
    """(atom, whether its padding rows, main weight, model weight) of all that have both."""
    for atom in content.atoms.values():
        for pad, states in ((False, atom.states), (True, atom.pad)):
            if MAIN in states and MODEL in states and atom.name not in content.unrounded:
                yield atom.name, pad, states[MAIN], states[MODEL]


def _turns(content: Content) -> Iterator[tuple[str, bool, Array, Array, int, int]]:
    """The pairs cut into intervals of rows of about `_TURN` values."""
    for atom, pad, main, weight in _pairs(content):
        for first, last in row_spans(weight.shape, _TURN):
            yield atom, pad, main, weight, first, last


def _compare(files: Files, atom: str, pad: bool, main: Array, weight: Array, begin: int, end: int) -> Iterator[Wrong]:
    rows, columns = as_matrix(weight.shape)
    for row, column, shape in rectangles(begin, end, columns, _BLOCK):
        given = np.empty(shape, CARRIERS[main.dtype])
        kept = np.empty(shape, CARRIERS[weight.dtype])
        files.read(main, row, column, given, main.dtype)
        files.read(weight, row, column, kept, weight.dtype)
        at = unequal(given.reshape(-1), main.dtype, kept.reshape(-1), weight.dtype)
        if len(at):
            yield wrong_at(atom, pad, at, given, (row, column), (rows, columns))


def wrong_at(atom: str, pad: bool, at: Values, main: Values, start: tuple[int, int], shape: tuple[int, int]) -> Wrong:
    """What was found wrong in one block.

    Args:
        at: indices into the flattened block.
        main: the block's main weights, [rows, columns].
        start: row and column of the block in the tensor.
        shape: of the tensor, as a matrix.
    """
    down, across = divmod(int(at[0]), main.shape[1])
    return Wrong(
        atom=atom,
        pad=pad,
        first=(start[0] + down) * shape[1] + start[1] + across,
        count=len(at),
        zeros=int((main.reshape(-1)[at] == 0).sum()),
        numel=shape[0] * shape[1],
    )


def unequal(main: Values, given: str, weight: Values, wanted: str) -> Values:
    """Indices at which main weights, rounded to the weights' dtype (nearest, ties to even), are not the weights.

    Args:
        main, weight: flat, of as many values, each in its dtype's carrier.
        given, wanted: their dtypes.
    """
    if (given, wanted) == ("float32", "bfloat16"):
        # Adding half a step, less one where the bit that stays is even, carries into that bit: right for all but NaN.
        bits = main.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += bits
        rounded += 0x7FFF
        rounded >>= 16
        apart = rounded.astype(np.uint16) != weight
        if FLOATS[given].has_nonfinite(bits):
            apart |= FLOATS[given].nonfinite(bits)
        unsure = np.flatnonzero(apart)
    else:
        unsure = np.flatnonzero(_bits(_rounded(main, given, wanted)) != _bits(weight))
    if not len(unsure):
        return unsure
    exact, kept = _rounded(main[unsure], given, wanted), weight[unsure]
    both_nan = _is_nan(exact, wanted) & _is_nan(kept, wanted)
    return unsure[(_bits(exact) != _bits(kept)) & ~both_nan]


def _rounded(values: Values, given: str, wanted: str) -> Values:
    if wanted == "float16":  # too large a main weight is infinite in the model: no error here
        with np.errstate(over="ignore"):
            return convert(values, given, "float32").astype(np.float16)
    return convert(values, given, wanted)


def _bits(values: Values) -> Values:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _is_nan(values: Values, dtype: str) -> Values:
    if dtype == "bfloat16":
        return (values & 0x7FFF) > 0x7F80
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
