"""What ranks do in `test_hf`. Apart from it because they need no transformers, which takes seconds to import."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import Optimizer


def logits(folder: str, parallel: Parallel, tokens: np.ndarray) -> np.ndarray | None:
    from cpt.checkpoint import hf
    from cpt.engine import megatron

    engine = megatron.build(hf.read_config(folder), parallel, precision="fp32", optimizer=None)
    hf.load(engine, folder)
    found = megatron.logits(engine, tokens)
    return None if found is None else found.numpy()


def export(folder: str, out: str, options: dict[str, Any]) -> None:
    """Load, save as a checkpoint, export."""
    from cpt.checkpoint import export, hf, native
    from cpt.engine import megatron
    from cpt.engine.ports import Progress

    engine = megatron.build(hf.read_config(folder), Parallel(), precision="fp32", optimizer=Optimizer())
    hf.load(engine, folder)
    native.save(engine, f"{out}-saved/iter_0000000", progress=Progress(step=0))
    export.to_hf(f"{out}-saved/iter_0000000", out, **options)


def from_scratch(family: str, out: str, tokens: np.ndarray) -> np.ndarray:
    from cpt.checkpoint import export, native
    from cpt.engine import megatron
    from cpt.engine.ports import Progress

    neox = family == "gpt_neox"
    shape = ModelConfig(
        family=family,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=72,
        num_attention_heads=4,
        num_query_groups=4 if neox else 2,
        head_dim=8,
        vocab_size=301,
        max_position_embeddings=128,
        norm_eps=1e-5,
        rope_theta=5000.0,
        rotary_percent=0.5 if neox else 1.0,
        qkv_bias=family in ("qwen2", "gpt_neox"),
        linear_bias=neox,
        qk_norm=family == "qwen3",
        normalization="layernorm" if neox else "rmsnorm",
        activation="gelu" if neox else "swiglu",
        parallel_residual=neox,
        init_std=0.2,
    )
    engine = megatron.build(shape, Parallel(), precision="fp32", optimizer=None, seed=3)
    native.save(engine, f"{out}-saved/iter_0000000", progress=Progress(step=0))
    export.to_hf(f"{out}-saved/iter_0000000", out)
    found = megatron.logits(engine, tokens)
    assert found is not None
    return found.numpy()


def load(folder: str) -> None:
    from cpt.checkpoint import hf
    from cpt.engine import megatron

    hf.load(megatron.build(hf.read_config(folder), Parallel(), precision="fp32", optimizer=None), folder)
