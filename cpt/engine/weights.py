"""A rank's weights by their global names: which part of which whole tensor each one is, and initial values.

Names are those of Megatron's `torch_dist` checkpoints with one key a layer (`decoder.layers.3.mlp.linear_fc1.weight`,
layers numbered from 0 over all pipeline ranks; norms under `layer_norm_weight` of the layer they feed).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cpt.engine.ports import Engine

# How a tensor lies over the tensor ranks, by the end of its name; anything else is whole on every rank.
ROWS = (
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
    "linear_fc1.bias",
    "word_embeddings.weight",
    "output_layer.weight",
)
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_RENAMED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


@dataclass(frozen=True)
class Weight:
    """One parameter of this rank.

    `name` is global; `rows` are the half-open intervals of the whole tensor's axis 0 that this rank holds, in order
    (two for a gated fc1: its gate rows, then its up rows); `columns` the interval of axis 1, None for all.
    `rows_in_all` counts the whole tensor's rows, padding rows of the vocabulary included.
    """

    name: str
    param: torch.nn.Parameter
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None
    rows_in_all: int

    @property
    def shape_in_all(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        rest = self.param.shape[1:]
        if self.columns is not None:
            rest = torch.Size([self.columns[1], *rest[1:]])
        return (self.rows_in_all, *rest)


def walk(engine: Engine) -> Iterator[Weight]:
    """Every parameter of this rank with its place in the whole model. A tied output layer comes as the embedding."""
    from megatron.core import parallel_state

    tp = engine.parallel.tp
    rank = parallel_state.get_tensor_model_parallel_rank() if tp > 1 else 0
    gated = engine.model.activation == "swiglu"
    chunks: list[Any] = engine.bare_chunks()
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for local, param in chunk.named_parameters():
            name = global_name(local, numbers)
            if name == "output_layer.weight" and engine.model.tie_embeddings:
                name = "embedding.word_embeddings.weight"
            size = param.shape[0]
            rows: tuple[tuple[int, int], ...] = ((0, size),)
            columns, in_all = None, size
            if name.endswith(ROWS):
                in_all = size * tp
                rows = ((rank * size, (rank + 1) * size),)
                if gated and ".linear_fc1." in name:
                    half, all_half = size // 2, in_all // 2
                    rows = tuple((base + rank * half, base + (rank + 1) * half) for base in (0, all_half))
            elif name.endswith(COLUMNS):
                width = param.shape[1]
                columns = (rank * width, (rank + 1) * width) if tp > 1 else None
            yield Weight(name, param, rows, columns, in_all)


def global_name(local: str, numbers: list[int]) -> str:
    """The checkpoint's name of a parameter of a chunk whose layers have these global numbers."""
    for ours, theirs in _RENAMED:
        local = local.replace(f".{ours}", f".{theirs}")
    if local.startswith("decoder.layers."):
        head, index, rest = "decoder.layers", *local.removeprefix("decoder.layers.").split(".", 1)
        return f"{head}.{numbers[int(index)]}.{rest}"
    return local


@torch.no_grad()
def initialise(engine: Engine, seed: int) -> None:
    """Fill the model with initial weights: a pure function of (seed, global name, place in the whole tensor).

    So the layout never changes them. Matrices are normal with `init_std`, those that write into the residual stream
    with init_std / √(2 · layers); norms are 1, biases 0, padding rows of the vocabulary 0.

    Source:
        Scaled output matrices: Radford et al. 2019 (GPT-2), section 2.3.
    """
    model = engine.model
    output_std = model.init_std / math.sqrt(2 * model.num_layers)
    for weight in walk(engine):
        name, param = weight.name, weight.param
        _mark_split(weight)
        if name.endswith("layer_norm_weight") or name.endswith("layernorm.weight"):
            param.fill_(1.0)
        elif param.dim() == 1:
            param.zero_()
        else:
            is_vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
            rows = model.vocab_size if is_vocabulary else weight.rows_in_all
            columns = weight.columns[1] - weight.columns[0] if weight.columns else param.shape[1]
            whole = torch.empty(rows, columns * (engine.parallel.tp if weight.columns else 1))
            whole.normal_(0.0, output_std if name.endswith(COLUMNS) else model.init_std, generator=_keyed(seed, name))
            param.zero_()
            copy_rows(weight, whole)


def _mark_split(weight: Weight) -> None:
    """Tell Megatron-core which parameters are split over tensor ranks: it counts the others once in gradient norms.

    Megatron-core sets this itself only when it initialises the weights.
    """
    param: Any = weight.param
    axis = 0 if weight.name.endswith(ROWS) else 1 if weight.name.endswith(COLUMNS) else None
    if axis is not None and not hasattr(param, "tensor_model_parallel"):
        param.tensor_model_parallel, param.partition_dim, param.partition_stride = True, axis, len(weight.rows)


@torch.no_grad()
def copy_rows(weight: Weight, whole: torch.Tensor) -> None:
    """Copy this rank's part out of a whole tensor, which may lack padding rows at its end."""
    at = 0
    for start, stop in weight.rows:
        part = whole[start : min(stop, whole.shape[0])]
        if weight.columns is not None:
            part = part[:, weight.columns[0] : weight.columns[1]]
        weight.param[at : at + part.shape[0]].copy_(part)
        at += stop - start


def _keyed(seed: int, name: str) -> torch.Generator:
    """A random stream of its own for every tensor."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
