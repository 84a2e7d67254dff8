"""What a model is, and how it is laid out over ranks: the part of a plan that checkpoints need too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer, in the project's own words for every family.

    `hf_config` is the `config.json` that the base came with, verbatim, so that an export changes only what changed.
    """

    family: str  # a key of `checkpoint.mapping.RULES`: llama, mistral, qwen2, qwen3, gpt_neox, gpt2, mixtral, ...
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # {"rope_type": "llama3", "factor": ...}
    rotary_percent: float = 1.0
    tie_embeddings: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False  # biases on the other linear layers (GPT-NeoX)
    qk_norm: bool = False
    normalization: str = "rmsnorm"  # rmsnorm | layernorm
    activation: str = "swiglu"  # swiglu | gelu | gelu_tanh
    parallel_residual: bool = False
    init_std: float = 0.02
    position_embedding: str = "rope"  # rope | learned (GPT-2)
    num_experts: int = 0  # in each layer with experts; 0 = none
    moe_ffn_hidden_size: int = 0  # of one expert
    moe_shared_ffn_hidden_size: int = 0  # of the expert that sees every token; 0 = none
    moe_topk: int = 0  # experts a token goes to
    moe_norm_topk: bool = False  # the chosen experts' weights are made to sum to 1
    moe_dense_layers: tuple[int, ...] = ()  # layers with an ordinary MLP
    hf_config: Mapping[str, Any] | None = None

    @property
    def num_parameters(self) -> int:
        """Parameters without vocabulary padding; tied embeddings count once."""
        h, f, d = self.hidden_size, self.ffn_hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_query_groups * d
        attention = h * (q + 2 * kv) + q * h + (q + 2 * kv) * self.qkv_bias + h * self.linear_bias
        attention += 2 * d * self.qk_norm
        gated = 3 if self.activation == "swiglu" else 2
        mlp = gated * h * f + ((gated - 1) * f + h) * self.linear_bias
        m, s = self.moe_ffn_hidden_size, self.moe_shared_ffn_hidden_size
        experts = self.num_experts * (gated * h * m + h) + (gated * h * s + h) * bool(s)
        dense = len(self.moe_dense_layers) if self.num_experts else self.num_layers
        norm = h * (2 if self.normalization == "layernorm" else 1)
        embeddings = self.vocab_size * h * (1 if self.tie_embeddings else 2)
        positions = self.max_position_embeddings * h * (self.position_embedding == "learned")
        mlps = dense * mlp + (self.num_layers - dense) * experts
        return self.num_layers * (attention + 2 * norm) + mlps + norm + embeddings + positions


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A layout. `dp` is the number of model copies; world size is tp · pp · dp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vp: int = 1  # model chunks per pipeline rank (interleaved schedule)
    layers: tuple[int, ...] | None = None  # layers per (pp · vp) part when uneven; None = even, or the default uneven
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp
