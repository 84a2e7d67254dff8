"""Flat buffers of Megatron's distributed optimizer: where each parameter lies in them. No torch.

A rank keeps the fp32 weights and the moments of its parameters in one flat buffer for each virtual chunk and dtype. The
walk goes over the parameters in reverse order of registration; each starts at the next multiple of 64 values of its
bucket; a bucket ends once it holds `bucket_numel` values, and is padded at its end. A shared embedding (tied, pp > 1)
has a bucket of its own. Files leave out a bucket's end padding (its `unpadded` length is recorded):

    reading   groups(...) -> walk(buffer, recorded lengths) -> places(slots, pieces of the flat tensor)
    writing   groups(...) -> form(buffer, bucket_numel, dp) -> payload(...) of each bucket and state

`bucket_reading` does the first for all groups of a checkpoint that records each bucket (`dp_reshardable`),
`bucket_search` finds the walk where bucket lengths are not recorded (`distrib_optim.pt`).

Source: megatron-core 0.16.1, `distributed/param_and_grad_buffer.py`, `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, layouts
from cpt.checkpoint.arrays import Fill, Payload, Place, Segment
from cpt.checkpoint.content import MAIN, MOMENTS, Layout
from cpt.checkpoint.layouts import Held
from cpt.checkpoint.mapping import EMBEDDING
from cpt.plan.model import ModelConfig

STATES = {MAIN: "param", **{m: m for m in MOMENTS}}  # our name of a state: Megatron's name in flat buffers
ALIGNMENT = 64  # a parameter starts at a multiple of this [values]
BUCKET_ALIGNMENT = 128  # a bucket's padded length is a multiple of this and of the data-parallel size [values]


@dataclass(frozen=True)
class Buffer:
    """A flat buffer: parameters of one dtype of one virtual chunk.

    Args:
        index: `gbuf_idx`.
        dtypes: of parameters and of gradients.
        params: in order of registration.
        alone: keys of parameters that have a bucket of their own.
        bucketed: whether Megatron applies a bucket size here (first stage, first chunk) at all.
    """

    index: int
    dtypes: tuple[str, str]
    params: tuple[Held, ...]
    alone: frozenset[str] = frozenset()
    bucketed: bool = True


@dataclass(frozen=True)
class Group:
    """A model-parallel group of one optimizer: what its data-parallel ranks share.

    Args:
        chain: position among several optimizers (0: all but experts, 1: experts); None = there is one only.
        index: `dp_group_idx`.
        dp: data-parallel ranks.
    """

    chain: int | None
    index: int
    tp: int
    pp: int
    ep: int
    dp: int
    buffers: tuple[Buffer, ...]

    @property
    def prefix(self) -> str:
        """Of the group's keys in a `torch_dist` checkpoint."""
        chained = "" if self.chain is None else f"chained_{self.chain}."
        return f"{chained}optimizer.distributed.dp_group_idx_{self.index}."

    def key(self, buffer: Buffer, bucket: int, state: str) -> str:
        """Name of a bucket's flat tensor in a `torch_dist` checkpoint; `state` by our name."""
        param, grad = buffer.dtypes
        dtypes = f"dtype_(torch.{param}, torch.{grad})"
        return f"{self.prefix}gbuf_idx_{buffer.index}.{dtypes}.bucket_idx_{bucket}.{STATES[state]}"

    def __str__(self) -> str:
        return f"tp {self.tp}, pp {self.pp}" + (f", ep {self.ep}" if self.chain else "")


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter's place.

    Args:
        start: of its first value in its bucket [values].
    """

    held: Held
    bucket: int
    start: int

    @property
    def stop(self) -> int:
        """One past its last value in its bucket [values]."""
        return self.start + self.held.tensor.numel


@dataclass(frozen=True)
class Formed:
    """A buffer cut into buckets: lengths without and with the padding at each bucket's end [values]."""

    slots: tuple[Slot, ...]
    unpadded: tuple[int, ...]
    padded: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Values of a flat tensor that lie one after another in a file.

    Args:
        at: index of the first in the flat tensor [values].
        start: of the first in the file [bytes].
    """

    at: int
    numel: int
    file: str
    start: int


@dataclass(frozen=True)
class Flat:
    """A flat tensor of a file; pieces in any order. Without pieces it is not there."""

    dtype: str
    numel: int
    pieces: tuple[Piece, ...]


def groups(
    model: ModelConfig,
    layout: Layout,
    padded_vocab_size: int,
    *,
    spec: str,
    dtype_of: Callable[[str], str],
    grad_dtype: Callable[[str], str] | None = None,
    pad_rows: int | None = None,
) -> list[Group]:
    """Every model-parallel group of a model's optimizers with its buffers.

    Args:
        spec: layer spec; it decides the order of registration.
        dtype_of: dtype of a Megatron tensor of the model by its canonical key.
        grad_dtype: of gradients by the dtype of their parameters; None = the same.
        pad_rows: padding rows of the vocabulary that are there to be taken (see `mapping.megatron_tensors`).
    """
    experts_apart = bool(model.num_experts) and layout.ep > 1
    found = []
    for chain in (0, 1) if experts_apart else (None,):
        inner = layout.etp or layout.tp
        tps, eps, dp = layout.tp, 1, layout.dp
        if chain == 1:
            tps, eps, dp = inner, layout.ep, max(1, layout.dp * layout.tp // (inner * layout.ep))
        for pp in range(layout.pp):
            for ep in range(eps):
                for tp in range(tps):
                    held = layouts.held(
                        model, layout, padded_vocab_size, tp=tp, pp=pp, ep=ep, spec=spec, pad_rows=pad_rows
                    )
                    if chain is not None:
                        held = [h for h in held if h.is_expert == (chain == 1)]
                    made = buffers(model, layout, held, pp=pp, dtype_of=dtype_of, grad_dtype=grad_dtype)
                    index = (pp * eps + ep) * tps + tp
                    found.append(Group(chain, index, tp, pp, ep, dp, tuple(made)))
    return found


def buffers(
    model: ModelConfig,
    layout: Layout,
    held: Sequence[Held],
    *,
    pp: int,
    dtype_of: Callable[[str], str],
    grad_dtype: Callable[[str], str] | None = None,
) -> list[Buffer]:
    """A rank's parameters of one optimizer, given in order of registration, as buffers."""
    by_kind: dict[tuple[int, str], list[Held]] = {}
    for h in held:
        by_kind.setdefault((h.chunk, dtype_of(h.key)), []).append(h)
    alone = frozenset({EMBEDDING} if model.tie_embeddings and layout.pp > 1 else ())
    ordered = sorted(by_kind.items(), key=lambda item: item[0][0])  # chunk by chunk, dtypes as they were met
    return [
        Buffer(
            i,
            (dtype, grad_dtype(dtype) if grad_dtype else dtype),
            tuple(params),
            alone,
            bucketed=pp == 0 and chunk == 0,
        )
        for i, ((chunk, dtype), params) in enumerate(ordered)
    ]


def grad_dtype(args: Mapping[str, object], dtype: str, known: Mapping[str, str] | None = None) -> str:
    """Dtype of gradients by Megatron's arguments: float32 for 16-bit parameters unless they say otherwise.

    Args:
        dtype: of the parameters.
        known: dtypes that the source's own buffers are named after (`Optimizer.gradients`); they come before arguments.
    """
    if known and dtype in known:
        return known[dtype]
    said = args.get("accumulate_allreduce_grads_in_fp32")
    if said is None:
        said = not args.get("grad_reduce_in_bf16")
    return "float32" if said else dtype


def form(buffer: Buffer, bucket_numel: int | None, dp: int) -> Formed:
    """Cut a buffer into buckets as Megatron does.

    Args:
        bucket_numel: a bucket ends once it holds that many values; None = never.
        dp: data-parallel ranks.
    """
    size = bucket_numel if buffer.bucketed else None
    slots: list[Slot] = []
    unpadded: list[int] = []
    at = 0
    filled = False
    for held in reversed(buffer.params):
        at = round_up(at, ALIGNMENT)
        is_alone = held.key in buffer.alone
        if is_alone and filled:
            unpadded.append(at)  # this padding counts
            at = 0
        slots.append(Slot(held, len(unpadded), at))
        at += held.tensor.numel
        filled = True
        if is_alone or (size is not None and at >= size):
            unpadded.append(at)
            at, filled = 0, False
    if filled:
        unpadded.append(at)
    multiple = math.lcm(dp, BUCKET_ALIGNMENT)
    return Formed(tuple(slots), tuple(unpadded), tuple(round_up(n, multiple) for n in unpadded))


def walk(buffer: Buffer, unpadded: Sequence[int], what: str) -> tuple[Slot, ...]:
    """Where each parameter lies, by the recorded lengths of the buckets.

    Args:
        unpadded: of each bucket, as recorded [values].
        what: name of the buffer, for messages.

    Raises:
        UsageError: parameters and lengths do not fit together.
    """
    slots: list[Slot] = []
    bucket, at = 0, 0
    for held in reversed(buffer.params):
        start = round_up(at, ALIGNMENT)
        if bucket < len(unpadded) and start >= unpadded[bucket]:
            bucket, start = bucket + 1, 0
        if bucket >= len(unpadded) or start + held.tensor.numel > unpadded[bucket]:
            lengths = ", ".join(f"{n:,}" for n in unpadded)
            raise UsageError(
                f"{what}: `{held.name}` with {held.tensor.numel:,} values does not fit into bucket {bucket} "
                f"(recorded lengths: {lengths})",
                "the optimizer state was written by another model, layout or layer spec than the arguments say",
            )
        slots.append(Slot(held, bucket, start))
        at = start + held.tensor.numel
    if buffer.params and (bucket != len(unpadded) - 1 or round_up(at, ALIGNMENT) < unpadded[bucket]):
        raise UsageError(
            f"{what}: the model's parameters fill {bucket + 1} buckets up to {at:,} values, "
            f"recorded are {len(unpadded)} with {sum(unpadded):,}"
        )
    return tuple(slots)


def joined(formed: Formed) -> Formed:
    """The buckets as one, without the padding at their ends (as `distrib_optim.pt` has them)."""
    first = [sum(formed.unpadded[:i]) for i in range(len(formed.unpadded))]
    slots = tuple(Slot(s.held, 0, first[s.bucket] + s.start) for s in formed.slots)
    return Formed(slots, (sum(formed.unpadded),), (sum(formed.padded),))


def places(slots: Iterable[Slot], bucket: int, flat: Flat) -> Iterator[tuple[Slot, str, bool, Place]]:
    """(slot, atom, whether its padding rows, place) of each rectangle of the parameters of a bucket."""
    size = arrays.itemsize(flat.dtype)
    ordered = sorted(flat.pieces, key=lambda p: p.at)
    for slot in slots:
        if slot.bucket != bucket:
            continue
        for piece in ordered:
            first, last = max(slot.start, piece.at), min(slot.stop, piece.at + piece.numel)
            if first >= last:
                continue
            start = piece.start + (first - piece.at) * size
            for segment in arrays.flat_segments(slot.held.tensor, first - slot.start, last - slot.start):
                for atom, pad, place in arrays.places(segment.fills, piece.file, start, segment.columns, flat.dtype):
                    yield slot, atom, pad, place
                start += segment.rows * segment.columns * size


def payload(
    formed: Formed, bucket: int, state: str, name: str, *, source: str | None = None, first: int = 0, last: int = -1
) -> Payload:
    """Values `first` to `last` (-1: all) of a bucket without its end padding; zeros between parameters.

    Args:
        state: the payload's; `source` overrides it (an fp32 model's own weights as `fp32`).
        name: of the payload.
    """
    last = formed.unpadded[bucket] if last < 0 else last
    segments: list[Segment] = []
    at = first

    def zeros(until: int) -> None:
        nonlocal at
        if until > at:
            segments.append(Segment(1, until - at, (Fill(None, 0, 1, 0, until - at),)))
            at = until

    for slot in formed.slots:
        if slot.bucket != bucket or slot.stop <= first or slot.start >= last:
            continue
        zeros(max(slot.start, first))
        end = min(slot.stop, last)
        segments.extend(arrays.flat_segments(slot.held.tensor, at - slot.start, end - slot.start))
        at = end
    zeros(last)
    return Payload(name, source or state, "float32", tuple(segments))


def require_float32(dtype: str, state: str, what: str) -> None:
    """Refuse optimizer state that is not float32, naming what made it so.

    Raises:
        UsageError: as said.
    """
    if dtype == "float32":
        return
    if state == MAIN and dtype.startswith(("int", "uint")):
        raise UsageError(
            f"{what} is {dtype}: 16-bit remainders of the main weights (`store_param_remainders`) are not supported"
        )
    option = "main_params_dtype" if state == MAIN else f"{state}_dtype"
    raise UsageError(f"{what} is {dtype}: optimizer state with `{option}` other than fp32 is not supported")


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below `n`."""
    return -(-n // multiple) * multiple
