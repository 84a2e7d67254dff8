"""A native checkpoint's main weights against its model weights, in torch, for an engine that loads it.

The same test on a checkpoint of any format, without torch, is `master`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cpt.base.errors import UsageError
from cpt.checkpoint import master
from cpt.checkpoint.torch_dist import Folder

if TYPE_CHECKING:
    import torch

MAIN = ("optimizer.state.param.", "optimizer.state.fp32_param.")
_BLOCK = 1 << 22  # elements compared at a time


def same_after_rounding(main: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the fp32 main weight, rounded to the weight's dtype (nearest, ties to even), is the weight."""
    import torch

    rounded = main.detach().to(device=weight.device, dtype=weight.dtype)
    if torch.equal(rounded, weight):
        return True
    return bool(((rounded == weight) | (rounded.isnan() & weight.isnan())).all())


def has_main_weights(source: Folder) -> bool:
    """Whether a checkpoint holds fp32 main weights in model shapes."""
    return any(key.startswith(MAIN) for key in source)


def has_optimizer(source: Folder) -> bool:
    """Whether a checkpoint holds moments in model shapes."""
    return any(key.startswith("optimizer.state.exp_avg.") for key in source)


def pairs(source: Folder) -> Iterator[tuple[str, str]]:
    """(main weight, model weight) names of a checkpoint."""
    for key in source:
        for prefix in MAIN:
            if key.startswith(prefix) and key.removeprefix(prefix) in source:
                yield key, key.removeprefix(prefix)


def check_main_weights(source: Folder, part: int = 0, parts: int = 1) -> int:
    """Compare main weights with model weights; gives how many tensors were compared.

    Args:
        part, parts: only every `parts`-th row of tensors from `part` on, so that ranks share the reading.

    Raises:
        UsageError: some differ. A known fault of megatron-core is named when it fits.
    """
    wrong, compared = [], 0
    for main, weight in sorted(pairs(source)):
        stored, kept = source.tensors[main], source.tensors[weight]
        if stored.shape != kept.shape:
            raise UsageError(f"`{source.path}`: `{main}` has shape {list(stored.shape)}, `{weight}` {list(kept.shape)}")
        compared += 1
        if not all(_same(source, main, weight, a, b) for a, b in _blocks(stored.shape, part, parts)):
            wrong.append(weight)
    if wrong:
        raise master.refusal(str(source.path), wrong, compared, known=True)
    return compared


def _blocks(shape: tuple[int, ...], part: int, parts: int) -> Iterator[tuple[int, int]]:
    """Ranges of axis 0 of about `_BLOCK` elements; those of `part`."""
    numel = 1
    for n in shape[1:]:
        numel *= n
    rows = max(1, _BLOCK // max(1, numel))
    for i, first in enumerate(range(0, shape[0], rows)):
        if i % parts == part % parts:
            yield first, min(first + rows, shape[0])


def _same(source: Folder, main: str, weight: str, first: int, last: int) -> bool:
    shape = source.tensors[main].shape
    offset, size = (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])
    return same_after_rounding(source.read(main, offset, size), source.read(weight, offset, size))
