"""Read flat optimizer buffers whose buckets are recorded (`dp_reshardable`), see `buckets`. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint.arrays import Array, Files, Place, convert
from cpt.checkpoint.buckets import STATES, Buffer, Flat, Group, Slot, groups, places, require_float32, walk
from cpt.checkpoint.content import MAIN, Layout
from cpt.checkpoint.copies import Parts, Placed
from cpt.plan.model import ModelConfig

_SAMPLE = 4096  # values compared at each end of a rectangle
Weights = Callable[[str, bool], Array | None]  # (logical tensor, whether its padding rows): the model's weight


def read(
    parts: Parts,
    model: ModelConfig,
    layout: Layout,
    padded_vocab_size: int,
    *,
    specs: Sequence[str],
    dtype_of: Callable[[str], str],
    lengths: Callable[[Group], Sequence[Mapping[tuple[str, str], Sequence[int]]]],
    flat: Callable[[str], Flat],
    weights: Weights,
    files: Files,
) -> str:
    """Gather fp32 weights and moments of a `dp_reshardable` checkpoint.

    Args:
        parts: takes them.
        specs: layer specs, the likely one first: the order of registration is not recorded, so the one that fits the
            lengths and whose fp32 weights round to the model's is taken.
        dtype_of: dtype of a Megatron tensor of the model by its canonical key.
        lengths: a group's object `per_bucket_numel_unpadded`.
        flat: a flat tensor of the checkpoint by its key.
        weights: of the model, which the fp32 weights must round to.

    Returns:
        The layer spec whose order it is.

    Raises:
        UsageError: nothing fits, or the state is of a kind that is not converted (16-bit); names it.
    """
    problems: list[UsageError] = []
    fitting: list[tuple[str, list[_Walked]]] = []
    for spec in specs:
        try:
            walked = list(_walked(groups(model, layout, padded_vocab_size, spec=spec, dtype_of=dtype_of), lengths))
        except UsageError as error:
            problems.append(error)
            continue
        fitting.append((spec, walked))
    if not fitting:
        raise problems[0]
    loaded = {w.key(b, s): _checked(flat(w.key(b, s)), w, b, s) for w in fitting[0][1] for b, s in w.tensors()}
    # When none agrees, the master test of the whole will say what is wrong.
    spec, walked = next((f for f in fitting if _agree(files, weights, f[1], loaded)), fitting[0])
    for w in walked:
        for bucket, state in w.tensors():
            tensor = loaded[w.key(bucket, state)]
            by_slot: dict[Slot, list[Placed]] = {}
            for slot, atom, pad, place in places(w.slots, bucket, tensor):
                by_slot.setdefault(slot, []).append((atom, pad, place))
            for slot, placed in by_slot.items():
                parts.add(str(w.group), slot.held, w.group.tp, state, tensor.dtype, placed)
    return spec


@dataclass(frozen=True)
class _Walked:
    """A buffer of a checkpoint with the walk that its recorded lengths give."""

    group: Group
    buffer: Buffer
    unpadded: tuple[int, ...]
    slots: tuple[Slot, ...]

    def key(self, bucket: int, state: str) -> str:
        return self.group.key(self.buffer, bucket, state)

    def tensors(self) -> Iterator[tuple[int, str]]:
        """(bucket, state) of each flat tensor."""
        for bucket in range(len(self.unpadded)):
            for state in STATES:
                yield bucket, state


def _walked(
    found: Iterable[Group], lengths: Callable[[Group], Sequence[Mapping[tuple[str, str], Sequence[int]]]]
) -> Iterator[_Walked]:
    for group in found:
        recorded = lengths(group)
        if len(recorded) != len(group.buffers):
            raise UsageError(
                f"`{group.prefix}` has {len(recorded)} gradient buffers, the model on {group} has {len(group.buffers)}"
            )
        for buffer, by_dtypes in zip(group.buffers, recorded, strict=True):
            if len(by_dtypes) != 1:
                raise UsageError(f"`{group.prefix}gbuf_idx_{buffer.index}` has several dtypes, which is not supported")
            ((dtypes, unpadded),) = by_dtypes.items()
            param, grad = (str(d) for d in dtypes)
            if param != buffer.dtypes[0]:
                raise UsageError(
                    f"`{group.prefix}gbuf_idx_{buffer.index}` is of {param} parameters, the model's are "
                    f"{buffer.dtypes[0]}"
                )
            buffer = replace(buffer, dtypes=(param, grad))
            what = f"optimizer buffer {buffer.index} of {group}"
            yield _Walked(group, buffer, tuple(unpadded), walk(buffer, unpadded, what))


def _checked(flat: Flat, w: _Walked, bucket: int, state: str) -> Flat:
    """A flat tensor, once it is known to be float32, of the recorded length and whole."""
    key = w.key(bucket, state)
    require_float32(flat.dtype, state, f"`{key}`")
    if flat.numel != w.unpadded[bucket]:
        raise UsageError(f"`{key}` has {flat.numel:,} values, its recorded length is {w.unpadded[bucket]:,}")
    at = 0
    for piece in sorted(flat.pieces, key=lambda p: p.at):
        if piece.at != at:
            raise UsageError(
                f"`{key}`: values {min(at, piece.at):,} to {max(at, piece.at):,} are there twice or missing"
            )
        at += piece.numel
    if at < flat.numel:
        raise UsageError(f"`{key}`: only {at:,} of {flat.numel:,} values are there")
    return flat


def _agree(files: Files, weights: Weights, walked: Iterable[_Walked], loaded: Mapping[str, Flat]) -> bool:
    """Whether fp32 weights round to the model's, as far as the ends of each rectangle show."""
    return all(
        is_same(files, weights, atom, pad, place)
        for w in walked
        for bucket in range(len(w.unpadded))
        for _, atom, pad, place in places(w.slots, bucket, loaded[w.key(bucket, MAIN)])
    )


def is_same(files: Files, weights: Weights, atom: str, pad: bool, place: Place) -> bool:
    """Whether the first and last values of a place of fp32 weights, rounded, are the model's, bit for bit."""
    weight = weights(atom, pad)
    if weight is None:
        return True
    rows = max(1, _SAMPLE // max(1, place.columns))
    values = files.view(place, "float32")
    for first in {0, max(0, place.rows - rows)}:
        last = min(place.rows, first + rows)
        main = convert(np.ascontiguousarray(values[first:last]), "float32", weight.dtype)
        model = np.empty_like(main)
        files.read(weight, place.row + first, place.column, model, weight.dtype)
        if main.tobytes() != model.tobytes():
            return False
    return True
