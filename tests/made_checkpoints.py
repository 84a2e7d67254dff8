"""Small checkpoints of every format, written by the formats themselves from values of a seed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from cpt.checkpoint import mapping
from cpt.checkpoint.arrays import CARRIERS, Array, Place, as_matrix, convert, itemsize
from cpt.checkpoint.content import Atom, Content, Optimizer
from cpt.checkpoint.formats import Writing
from cpt.plan.model import ModelConfig
from tests import checkpoints

# H ≠ F, head_dim ≠ H / heads, groups ≠ heads, odd vocabulary and number of layers.
LLAMA = ModelConfig(
    family="llama",
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=22,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=45,
    max_position_embeddings=24,
    norm_eps=1e-5,
)
MOE = dataclasses.replace(
    LLAMA, family="mixtral", num_experts=4, moe_ffn_hidden_size=10, moe_topk=2, moe_norm_topk=True
)


def content(
    folder: Path,
    model: ModelConfig = LLAMA,
    *,
    seed: int = 0,
    padded: int | None = 48,
    dtype: str = "bfloat16",
    optimizer: bool = True,
) -> Content:
    """A content whose values lie in one plain file; weights are their main weights, rounded."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    file = folder / "values"
    atoms: dict[str, Atom] = {}
    vocabulary = {
        f.atom for t in mapping.megatron_tensors(model, padded).values() for f in t.tensor.fills if f.pad and f.atom
    }
    with open(file, "wb") as out:

        def put(values: np.ndarray[Any, Any], kind: str, shape: tuple[int, ...]) -> Array:
            start = out.tell()
            out.write(np.ascontiguousarray(values, CARRIERS[kind]).tobytes())
            rows, columns = as_matrix(shape)
            place = Place(str(file), start, columns * itemsize(kind), 0, rows, 0, columns)
            return Array(kind, shape, (place,))

        def states(shape: tuple[int, ...]) -> dict[str, Array]:
            main = random.normal(size=math.prod(shape)).astype(np.float32).reshape(as_matrix(shape))
            made = {"model": put(convert(main, "float32", dtype), dtype, shape)}
            if optimizer:
                made["fp32"] = put(main, "float32", shape)
                made["exp_avg"] = put(main * np.float32(0.3), "float32", shape)
                made["exp_avg_sq"] = put(main * main, "float32", shape)
            return made

        for name, shape in mapping.atom_shapes(model).items():
            extra = (padded or 0) - shape[0] if name in vocabulary else 0
            pad = states((extra, *shape[1:])) if extra > 0 else {}
            atoms[name] = Atom(name=name, shape=shape, dtype=dtype, states=states(shape), pad=pad)
    groups = ({"lr": 1e-3, "weight_decay": 0.1, "wd_mult": 1.0}, {"lr": 1e-3, "weight_decay": 0.0, "wd_mult": 0.0})
    return Content(
        format="made",
        path=folder,
        model=model,
        atoms=atoms,
        padded_vocab_size=padded,
        optimizer=Optimizer(step=7, groups=groups) if optimizer else None,
        iteration=7 if optimizer else None,
    )


def write(given: Content, name: str, out: Path, writing: Writing | None = None) -> Path:
    """Write a content in a format; gives the folder with the files, as a job would leave it."""
    return checkpoints.write(given, name, out, writing or Writing(vocabulary_multiple=16))
