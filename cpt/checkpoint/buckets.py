"""Flat buffers of Megatron's distributed optimizer: where each parameter lies in them. No torch.

A rank keeps the fp32 weights and the moments of its parameters in one flat buffer for each virtual chunk and dtype. The
walk goes over the parameters in reverse order of registration; each starts at the next multiple of 64 values of its
bucket; a bucket ends once it holds `bucket_numel` values, and is padded at its end. A shared embedding (tied, pp > 1)
has a bucket of its own. Files leave out a bucket's end padding (its `unpadded` length is recorded):

    reading   groups(...) -> walk(buffer, recorded lengths) -> places(slots, pieces of the flat tensor)
    writing   groups(...) -> form(buffer, bucket_numel, dp) -> payload(...) of each bucket and state

`read` does the first for all groups of a checkpoint with one record of each bucket (`dp_reshardable`), `search` finds
the walk where bucket lengths are not recorded (`distrib_optim.pt`).

Source: megatron-core 0.16.1, `distributed/param_and_grad_buffer.py`, `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, layouts
from cpt.checkpoint.arrays import Array, Files, Fill, Payload, Place, Segment, convert
from cpt.checkpoint.content import MAIN, MOMENTS, Layout
from cpt.checkpoint.copies import Parts, Placed
from cpt.checkpoint.layouts import Held
from cpt.checkpoint.mapping import EMBEDDING
from cpt.plan.types import ModelConfig

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
        at = _up(at, ALIGNMENT)
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
    return Formed(tuple(slots), tuple(unpadded), tuple(_up(n, multiple) for n in unpadded))


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
        start = _up(at, ALIGNMENT)
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
    if buffer.params and (bucket != len(unpadded) - 1 or _up(at, ALIGNMENT) < unpadded[bucket]):
        raise UsageError(
            f"{what}: the model's parameters fill {bucket + 1} buckets up to {at:,} values, "
            f"recorded are {len(unpadded)} with {sum(unpadded):,}"
        )
    return tuple(slots)


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


def _agree(files: Files, weights: Weights, walked: Iterable[_Walked], loaded: Mapping[str, Flat]) -> bool:
    """Whether fp32 weights round to the model's, as far as the ends of each rectangle show."""
    return all(
        _same(files, weights, atom, pad, place)
        for w in walked
        for bucket in range(len(w.unpadded))
        for _, atom, pad, place in places(w.slots, bucket, loaded[w.key(bucket, MAIN)])
    )


def _same(files: Files, weights: Weights, atom: str, pad: bool, place: Place) -> bool:
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


_SAMPLE = 4096  # values compared at each end of a rectangle


def search(buffer: Buffer, flats: Mapping[str, Flat], weights: Weights, files: Files, what: str) -> tuple[Slot, ...]:
    """The walk over a buffer whose buckets were joined without recording their lengths (`distrib_optim.pt`).

    After each parameter a bucket may have ended: then the next one starts at once, else at the next multiple of 64 of
    its bucket. Where that makes a difference, the fp32 weights tell, which must round to the model's weights, and the
    values between parameters, which are zero.

    Args:
        flats: the whole buffer by state, each one piece.

    Returns:
        Slots as if there was one bucket.

    Raises:
        UsageError: no walk fits, or several do that mean different values.
    """
    main = flats[MAIN]
    ordered = list(reversed(buffer.params))
    least = [0] * (len(ordered) + 1)  # values from parameter i to the end, without padding
    for i in range(len(ordered) - 1, -1, -1):
        least[i] = least[i + 1] + ordered[i].tensor.numel
    if not least[0] <= main.numel <= least[0] + (ALIGNMENT - 1) * len(ordered):
        raise UsageError(f"{what} holds {main.numel:,} values, the model's parameters on this rank are {least[0]:,}")

    def follow(i: int, at: int, phase: int) -> list[tuple[int, int]]:
        """(start, phase) that parameter i may have after one that ends at `at`; phase: its bucket's start modulo 64."""
        same = at + -(at - phase) % ALIGNMENT
        if i == 0 or same == at:
            return [(at, phase)]
        if ordered[i - 1].key in buffer.alone:
            return [(at, at % ALIGNMENT)]
        return [(same, phase), (at, at % ALIGNMENT)]

    def is_possible(i: int, before: int, start: int) -> bool:
        end, rest = start + ordered[i].tensor.numel, len(ordered) - i - 1
        if not end + least[i + 1] <= main.numel <= end + least[i + 1] + (ALIGNMENT - 1) * rest:
            return False
        if not all(_is_zero(files, flat, before, start) for flat in flats.values()):
            return False
        slot = Slot(ordered[i], 0, start)
        return all(_same(files, weights, atom, pad, place) for _, atom, pad, place in places([slot], 0, main))

    # All that is possible, parameter by parameter: (start, phase) -> what it may follow.
    steps: list[dict[tuple[int, int], list[tuple[int, int]]]] = []
    for i, held in enumerate(ordered):
        before = steps[-1] if steps else {(0, 0): []}
        made: dict[tuple[int, int], list[tuple[int, int]]] = {}
        tested: dict[tuple[int, int], bool] = {}
        for previous in before:
            at = previous[0] + (ordered[i - 1].tensor.numel if i else 0)
            for start, phase in follow(i, at, previous[1]):
                if (at, start) not in tested:
                    tested[at, start] = is_possible(i, at, start)
                if tested[at, start]:
                    made.setdefault((start, phase), []).append(previous)
        if not made:
            raise UsageError(
                f"{what}: with no bucket size the fp32 weights match the model's weights; "
                f"`{held.name}` is the first that does not",
                "the optimizer state and the model's weights are of different saves, or one of them is damaged",
            )
        if len(made) > _MOST_STEPS:
            raise UsageError(f"{what}: too many bucket sizes fit")
        steps.append(made)
    last = [s for s in steps[-1] if s[0] + ordered[-1].tensor.numel == main.numel] if steps else []
    found = sorted(_paths(steps, last))
    if not found:
        raise UsageError(f"{what} holds {main.numel:,} values, which no bucket size gives")
    if len(found) > 1:
        formed = {_joined_starts(buffer, size) for size in _sizes(ordered)}
        found = [p for p in found if p in formed] or found
    for other in found[1:]:
        for held, start, elsewhere in zip(ordered, found[0], other, strict=True):
            numel = held.tensor.numel
            if start != elsewhere and not all(
                _is_zero(files, flat, at, at + numel) for flat in flats.values() for at in (start, elsewhere)
            ):
                raise UsageError(f"{what}: several bucket sizes fit, with other values for `{held.name}`")
    return tuple(Slot(held, 0, start) for held, start in zip(ordered, found[0], strict=True))


_MOST_STEPS = 1024  # places of one parameter that are followed up


def _paths(
    steps: Sequence[Mapping[tuple[int, int], Sequence[tuple[int, int]]]], last: Sequence[tuple[int, int]]
) -> set[tuple[int, ...]]:
    """Starts of all parameters for each way that leads to `last`; a few when there are very many."""
    ends = {(s[0],): s for s in last}
    paths: dict[tuple[int, ...], set[tuple[int, int]]] = {starts: {s} for starts, s in ends.items()}
    for made in reversed(steps[1:]):
        longer: dict[tuple[int, ...], set[tuple[int, int]]] = {}
        for starts, states in list(paths.items())[:_MOST_STEPS]:
            for state in states:
                for previous in made[state]:
                    longer.setdefault((previous[0], *starts), set()).add(previous)
        paths = longer
    return set(paths)


def _sizes(ordered: Sequence[Held]) -> list[int | None]:
    """Bucket sizes that can make a difference: every length that a bucket can have."""
    sizes: set[int] = set()
    for first in range(len(ordered) if len(ordered) <= _MOST_STEPS else 0):
        at = 0
        for held in ordered[first:]:
            at = _up(at, ALIGNMENT) + held.tensor.numel
            sizes.add(at)
    return [None, *sorted(sizes, reverse=True)]


def _joined_starts(buffer: Buffer, bucket_numel: int | None) -> tuple[int, ...]:
    """Starts of the parameters, buckets joined without their end padding."""
    return tuple(slot.start for slot in joined(form(replace(buffer, bucketed=True), bucket_numel, 1)).slots)


def joined(formed: Formed) -> Formed:
    """The buckets as one, without the padding at their ends (as `distrib_optim.pt` has them)."""
    first = [sum(formed.unpadded[:i]) for i in range(len(formed.unpadded))]
    slots = tuple(Slot(s.held, 0, first[s.bucket] + s.start) for s in formed.slots)
    return Formed(slots, (sum(formed.unpadded),), (sum(formed.padded),))


def _is_zero(files: Files, flat: Flat, first: int, last: int) -> bool:
    """Whether values `first` to `last` of a flat tensor are all zero."""
    size = arrays.itemsize(flat.dtype)
    for piece in flat.pieces:
        low, high = max(first, piece.at), min(last, piece.at + piece.numel)
        if low < high:
            place = Place(piece.file, piece.start + (low - piece.at) * size, 0, 0, 1, 0, high - low)
            if files.view(place, flat.dtype).any():
                return False
    return True


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
