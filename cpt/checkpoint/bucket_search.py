"""Find where parameters lie in flat optimizer buffers whose buckets were joined (`distrib_optim.pt`). No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays
from cpt.checkpoint.arrays import Files, Place
from cpt.checkpoint.bucket_reading import Weights, is_same
from cpt.checkpoint.buckets import ALIGNMENT, Buffer, Flat, Slot, form, joined, places, round_up
from cpt.checkpoint.content import MAIN
from cpt.checkpoint.layouts import Held

_MOST_STEPS = 1024  # places of one parameter that are followed up


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
        return all(is_same(files, weights, atom, pad, place) for _, atom, pad, place in places([slot], 0, main))

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
            at = round_up(at, ALIGNMENT) + held.tensor.numel
            sizes.add(at)
    return [None, *sorted(sizes, reverse=True)]


def _joined_starts(buffer: Buffer, bucket_numel: int | None) -> tuple[int, ...]:
    """Starts of the parameters, buckets joined without their end padding."""
    return tuple(slot.start for slot in joined(form(replace(buffer, bucketed=True), bucket_numel, 1)).slots)


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
