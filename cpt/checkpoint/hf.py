"""A Hugging Face folder's weights into an engine under any layout: each rank reads its own rows and columns only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.checkpoint import mapping
from cpt.checkpoint.arrays import CARRIERS, Files, Segment, Tensor
from cpt.checkpoint.content import MODEL, Content
from cpt.checkpoint.hf_config import read_config

if TYPE_CHECKING:
    import torch

    from cpt.engine.ports import Engine

__all__ = ["load", "read_config"]

_BLOCK = 64 << 20  # of values in hand at a time [bytes]


def load(engine: Engine, folder: str | os.PathLike[str]) -> None:
    """Put a Hugging Face folder's weights into the engine's model, and into the optimizer's main weights.

    Every rank calls it and reads its own part. Values are converted to the model's dtype; padding rows of the
    vocabulary become 0.

    Raises:
        UsageError: a tensor is missing, unknown, or of another shape than the engine's configuration says.
    """
    from cpt.checkpoint.formats import hf
    from cpt.engine import megatron, weights

    content = hf.opened(Path(folder), engine.model)
    fused = mapping.megatron_tensors(engine.model)
    files = Files()
    for weight in weights.walk(engine):
        _fill(weight, fused[weight.name].tensor, content, files)
    files.close()
    megatron.refresh_main_weights(engine)


def _fill(weight: Any, whole: Tensor, content: Content, files: Files) -> None:
    """Read this rank's rows and columns of a tensor into its parameter, block by block."""
    import torch

    rows, columns = whole.matrix
    left, right = weight.columns or (0, columns)
    segment = Segment(rows, columns, whole.fills)
    dtype = str(weight.param.dtype).removeprefix("torch.")
    step = max(1, _BLOCK // (max(1, right - left) * CARRIERS[dtype].itemsize))
    with torch.no_grad():
        at = 0
        for start, stop in weight.rows:
            for first in range(start, stop, step):
                last = min(first + step, stop)
                out = np.zeros((last - first, right - left), CARRIERS[dtype])
                files.fill(segment, first, last, lambda atom, pad: content.array(atom, MODEL, pad), out, dtype, left)
                part = weight.param[at : at + last - first]
                part.copy_(_tensor(out, dtype).view(part.shape))
                at += last - first


def _tensor(values: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """Values in the carrier of a dtype as a tensor of it."""
    import torch

    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
