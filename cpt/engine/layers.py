"""The pieces of the model that Megatron-core does not have for every machine and family, as modules for its layer spec.

Norm           RMSNorm or LayerNorm that also serves sequence parallelism
Rotary         rotary tables of the `config.json` kind, with position ids that restart inside a sequence
Attention      self-attention on `scaled_dot_product_attention`, never a [S, S] score matrix
GatedMLP       SwiGLU without the extra passes over memory
ParallelLayer  x + attention(norm1(x)) + mlp(norm2(x)), GPT-NeoX's parallel residual
Model          GPT whose loss leaves the padding rows of the vocabulary out

Parameter names are Megatron-core's own, so that checkpoints keep the usual keys.

Shapes: B sequences, S positions, H hidden, N query heads and G key-value heads of this tensor rank, D head size,
V padded vocabulary rows of this tensor rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from cpt.engine import compat
from cpt.plan.model import ModelConfig

Tensor = torch.Tensor


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last axis, as `config.normalization` says.

    Under sequence parallelism every tensor rank sees other positions: the weights are marked so that Megatron-core sums
    their gradients over the tensor ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        self.rms = config.normalization == "RMSNorm"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x`, same shape and dtype."""
        if self.rms and x.dtype == torch.float32:
            return _RMSNorm.apply(x, self.weight, self.eps)
        if self.rms:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class _RMSNorm(torch.autograd.Function):
    """x · w / √(mean(x²) + ε) in fp32, in half the passes over memory that a chain of operations takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        H = x.shape[-1]
        product = (grad * x).reshape(-1, H)
        grad_weight = scale.reshape(-1) @ product
        share = (product @ weight).view(scale.shape).mul_(scale.pow(3)).div_(-H)
        return (grad * weight).mul_(scale).addcmul_(x, share), grad_weight, None


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Rotary frequencies, one for each pair of rotated dimensions.

    Raises:
        AssertionError: a scaling that `checkpoint.hf.read_config` should have refused.

    Source:
        RoPE: Su et al. 2021, arXiv:2104.09864. `linear`: Chen et al. 2023, arXiv:2306.15595. `llama3`: the Llama 3.1
        release, frequencies below the old context divided by `factor` with a linear ramp between the two wavelengths.
    """
    dim = int(model.head_dim * model.rotary_percent)
    frequencies = 1.0 / (model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    scaling: Mapping[str, Any] = model.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return frequencies
    factor = float(scaling["factor"])
    if kind == "linear":
        return frequencies / factor
    assert kind == "llama3", f"rope_scaling of type {kind}"
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    old_length = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequencies
    smooth = (old_length / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    long_waves = torch.where(wavelength > old_length / low, frequencies / factor, frequencies)
    is_between = (wavelength >= old_length / high) & (wavelength <= old_length / low)
    return torch.where(is_between, between, long_waves)


class Rotary:
    """Cosines and sines by position. Not a module: nothing of it belongs in a checkpoint.

    Args:
        model: gives frequencies.
        dtype: of the tables that are handed out; they are computed in fp32.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(model).to(device)
        self.dtype = dtype
        self.tables = torch.empty(2, 0, 0, dtype=dtype, device=device)

    def __call__(self, length: int, position_ids_BS: Tensor | None) -> Tensor:
        """cos and sin as one tensor [2, S, 1 or B, 1, D_rot / 2]: one, so that recomputation can save it."""
        if length > self.tables.shape[1]:
            positions = torch.arange(length, device=self.frequencies.device, dtype=torch.float32)
            angles = torch.outer(positions, self.frequencies)
            self.tables = torch.stack((angles.cos(), angles.sin())).to(self.dtype)
        if position_ids_BS is None:
            return self.tables[:, :length, None, None]
        return self.tables[:, position_ids_BS.t()].unsqueeze(3)


class _Rotate(torch.autograd.Function):
    """Turns the first 2 · D_half dimensions of each head by its position's angles; the rest passes unchanged.

    Written out because a chain of slices, negations and concatenations passes five times over memory each way.
    """

    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_SBND, cos, sin, _for_attention(x_SBND))

    @staticmethod
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_SBND, cos, -sin, torch.empty_like(grad_SBND)), None, None


class _SplitAndRotate(torch.autograd.Function):
    """Queries, keys and values out of the fused projection [S, B, G, (N / G + 2) · D], the first two rotated.

    One function, so that the way back writes all gradients into one buffer instead of joining three.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        S, B, G, width = mixed.shape
        ctx.heads = heads = width // head_dim - 2
        query, key, value = mixed.view(S, B, G, heads + 2, head_dim).split((heads, 1, 1), dim=3)
        out = mixed.new_empty(B, G, heads, S, head_dim).permute(3, 0, 1, 2, 4)
        _turn(query, cos.unsqueeze(3), sin.unsqueeze(3), out)
        key, value = key.squeeze(3), value.squeeze(3)
        return out.flatten(2, 3), _turn(key, cos, sin, _for_attention(key)), _for_attention(value).copy_(value)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        sin = -sin
        S, B, G, D = grad_key.shape
        out = grad_key.new_empty(S, B, G, ctx.heads + 2, D)
        query, key, value = out.split((ctx.heads, 1, 1), dim=3)
        _turn(grad_query.unflatten(2, (G, ctx.heads)), cos.unsqueeze(3), sin.unsqueeze(3), query)
        _turn(grad_key, cos, sin, key.squeeze(3))
        value.squeeze(3).copy_(grad_value)
        return out.view(S, B, G, -1), None, None, None


def _for_attention(x_SBND: Tensor) -> Tensor:
    """Space for a tensor like `x`, in memory order [B, N, S, D], which attention reads without a copy."""
    S, B, N, D = x_SBND.shape
    return x_SBND.new_empty(B, N, S, D).permute(2, 0, 1, 3)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """`x` turned by its angles, into `out`; with -sin, turned back."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half : 2 * half]).addcmul_(a, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotate(x_SBND: Tensor, rotary: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys; `rotary` as `Rotary` gives it."""
    return _Rotate.apply(x_SBND, rotary[0], rotary[1])


class CoreAttention(torch.nn.Module):
    """softmax(q kᵀ / √D) v by torch's fused attention.

    `attention_mask` is None (causal) or True where a position may look, [B, 1, S, S].
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        """Attention output [S, B, N · D]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        out_BNSD = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        S, B = query_SBND.shape[:2]
        return out_BNSD.permute(2, 0, 1, 3).reshape(S, B, -1)


class Attention(SelfAttention):
    """Self-attention with Megatron-core's parameters and our forward pass: rotary tables instead of angles."""

    @property
    def is_plain(self) -> bool:
        """Whether this rank has whole query groups and nothing stands between projection and rotation."""
        return not self.config.qk_layernorm and self.config.num_query_groups >= self.world_size

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Any = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output [S, B, H] and the bias that the caller adds, as Megatron-core's layers want it."""
        if self.is_plain:
            mixed, _ = self.linear_qkv(hidden_states)
            mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
            query, key, value = _SplitAndRotate.apply(
                mixed, rotary_pos_emb[0], rotary_pos_emb[1], self.config.kv_channels
            )
        else:
            query, key, value = self.get_query_key_value_tensors(hidden_states)[:3]
            query, key = rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb)
        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(self.core_attention, False, query, key, value, attention_mask)
        else:
            context = self.core_attention(query, key, value, attention_mask)
        output, bias = self.linear_proj(context)
        return output, bias


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up on [gate; up] halves, with the gradient computed in one buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


class GatedMLP(MLP):
    """fc2(silu(gate) · up) with [gate; up] = fc1(x)."""

    def forward(self, hidden_states: Tensor, per_token_scale: Any = None, **unused: Any) -> Any:
        """Output [S, B, H] and fc2's bias."""
        both, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            both = both + bias
        return self.linear_fc2(_SwiGLU.apply(both))


class ParallelLayer(TransformerLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)): GPT-NeoX's parallel residual, which Megatron-core does not have."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Output [S, B, H] and no cross-attention context."""
        x = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        attended, attention_bias = self.self_attention(
            self.input_layernorm(x),
            attention_mask=kwargs.get("attention_mask"),
            rotary_pos_emb=kwargs.get("rotary_pos_emb"),
        )
        fed, mlp_bias = self.mlp(self.pre_mlp_layernorm(x))
        if attention_bias is not None:
            attended = attended + attention_bias
        if mlp_bias is not None:
            fed = fed + mlp_bias
        # The order of the reference implementation, so that both round alike.
        return fed + attended + x, None


def layer_spec(model: ModelConfig) -> ModuleSpec:
    """Megatron-core's description of one layer of this family."""
    qk_norm = Norm if model.qk_norm else IdentityOp
    return ModuleSpec(
        module=ParallelLayer if model.parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=Attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=compat.mlp_spec(
                GatedMLP if model.activation == "swiglu" else MLP,
                MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine's spelling, which every Megatron checkpoint of the `torch_dist` kind has.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(model: ModelConfig, config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline chunk and the final norm."""
    count = get_num_layers_to_build(config, vp_stage, parallel_state.get_pipeline_model_parallel_rank())
    return TransformerBlockSubmodules(layer_specs=[layer_spec(model)] * count, layer_norm=Norm)


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] over a vocabulary that is split over tensor ranks and padded at its end.

    Overwrites the logits, which nobody needs afterwards: no second [tokens, V] buffer.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, valid: int, group: Any) -> Tensor:
        """Losses in fp32, shaped like `labels`; `first` is the id of this rank's first row, `valid` the vocabulary."""
        logits = logits.float()
        rows = logits.shape[-1]
        if first + rows > valid:
            logits[..., max(0, valid - first) :] = float("-inf")
        if group.size() == 1:
            log_probs = torch.log_softmax(logits, dim=-1)
            losses = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            probs, mine, local = log_probs, None, labels
        else:
            top = logits.amax(dim=-1)
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            logits.sub_(top.unsqueeze(-1))
            mine = (labels >= first) & (labels < first + rows)
            local = (labels - first).masked_fill_(~mine, 0)
            chosen = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill_(~mine, 0.0)
            probs = logits.exp_()
            both = torch.stack((chosen, probs.sum(dim=-1)))
            dist.all_reduce(both, group=group)
            losses = both[1].log() - both[0]
            probs.div_(both[1].unsqueeze(-1))
        ctx.save_for_backward(probs, mine, local)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        probs, mine, local = ctx.saved_tensors
        if mine is None:
            probs = probs.exp_()
            hit = torch.ones((), dtype=probs.dtype, device=probs.device).expand(local.shape)
        else:
            hit = mine.to(probs.dtype)
        probs.scatter_add_(-1, local.unsqueeze(-1), -hit.unsqueeze(-1))
        return probs.mul_(grad.unsqueeze(-1)), None, None, None, None


class Model(GPTModel):
    """GPT on these pieces.

    Args:
        model: what to build.
        config: Megatron-core's own configuration, made from it.
        padded_vocab_size: rows of embedding and output layer over all tensor ranks.
    """

    def __init__(self, model: ModelConfig, config: Any, padded_vocab_size: int, vp_stage: int | None, **kwargs: Any):
        super().__init__(
            config,
            block_spec(model, config, vp_stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            # Rotary tables are ours, see `_preprocess`.
            position_embedding_type="none",
            share_embeddings_and_output_weights=model.tie_embeddings,
            vp_stage=vp_stage,
            **kwargs,
        )
        self.real_vocab_size = model.vocab_size
        device = torch.device(torch.cuda.current_device())
        self.rotary = Rotary(model, config.params_dtype, device)

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Megatron-core's own, with our rotary tables in the second place. Position ids may be None: 0, 1, 2, ..."""
        result = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        return (result[0], self.rotary(input_ids.shape[1], position_ids), *result[2:])

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of every token [nats], [B, S] in fp32; padding rows of the vocabulary have no probability."""
        group = self.pg_collection.tp
        first = group.rank() * logits.shape[-1]
        losses_SB = _CrossEntropy.apply(logits, labels.t().contiguous(), first, self.real_vocab_size, group)
        return losses_SB.t().contiguous()
