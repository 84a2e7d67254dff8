"""A native checkpoint as a Hugging Face folder: one process, no Megatron, one file's worth of tensors in memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cpt.base.errors import StageFailed
from cpt.base.units import show_bytes
from cpt.checkpoint import hf, manifest, native
from cpt.checkpoint.ranks import is_disk_full
from cpt.plan.types import ModelConfig

_BYTES = {"fp32": 4, "float32": 4}


def to_hf(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Write `out` from an `iter_*` folder, whole or not at all.

    Args:
        dtype: auto | fp32 | bf16 | fp16, see `hf.write`.
        tokenizer: folder or `tokenizer.json` whose files go along.

    Raises:
        UsageError: the checkpoint is not whole, or `out` exists.
        StageFailed: the disk has no room; nothing is left of `out`.
    """
    model = manifest.read(checkpoint).model
    needed = size_of(model, dtype)
    free = _free(Path(out))
    if free < needed * 1.01:
        raise _no_room(out, needed, free)
    try:
        return hf.write(native.tensors(checkpoint), model, out, dtype=dtype, tokenizer=tokenizer)
    except OSError as error:
        if is_disk_full(error):
            raise _no_room(out, needed, _free(Path(out))) from error
        raise
    except Exception as error:
        # safetensors wraps what the disk says into an error of its own.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _no_room(out, needed, _free(Path(out))) from error
        raise


def size_of(model: ModelConfig, dtype: str) -> int:
    """Bytes of a model's weights as a Hugging Face folder."""
    spelled = hf.source_dtype(model) if dtype == "auto" else dtype
    return model.num_parameters * _BYTES.get(spelled, 2)


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _no_room(out: str | os.PathLike[str], needed: int, free: int) -> StageFailed:
    return StageFailed(
        f"not enough disk space to write `{out}`: {show_bytes(needed)} needed, {show_bytes(free)} free",
        "the checkpoint it is made from is untouched; make space, and the same command goes on",
    )
