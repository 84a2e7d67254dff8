"""A plan's model and layout as a running Megatron-core model, and the few calls that a training loop is made of.

    engine = build(model, parallel, precision=..., optimizer=..., seed=...)
    batches = microbatches(tokens_BS1, micro_batch_size=..., device=engine.device)
    losses = forward_backward(engine, batches)          # per sample, on the last pipeline stage; gradients are ready
    sums, tokens = reduce_by_source(engine, losses, source_B, num_sources)      # known to all ranks
    norm = grad_norm(engine)                            # known to all ranks
    update(engine, lr, norm)                            # or nothing at all, to skip a NaN or a spike
    evaluate(engine, batches)                           # losses without gradients

The objective is the mean over all unmasked tokens of the *global* batch, so that layout, micro-batch size and gradient
accumulation change nothing but rounding.

Shapes: B sequences of this model copy, S positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from cpt.base import pulse
from cpt.base.errors import PlanError
from cpt.engine import device, optimizer, weights
from cpt.engine.layers import Model
from cpt.engine.ports import Engine
from cpt.plan.check import CONVERT_HINT, why_not_trained
from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import Optimizer

VOCABULARY_MULTIPLE = 128
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of embedding and output layer: the smallest multiple of 128 · tp that holds the vocabulary."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def split_layers(num_layers: int, parallel: Parallel) -> tuple[int, ...]:
    """Layers of each of the pp · vp model parts, in the order in which a token passes them.

    Given counts are taken as they are. Otherwise layers are divided evenly, and the first parts have one more when they
    do not divide: the last part also has the output layer to compute.

    Raises:
        PlanError: the counts do not fit, or there are fewer layers than parts.
    """
    num_parts = parallel.pp * parallel.vp
    if parallel.layers is not None:
        if len(parallel.layers) != num_parts or sum(parallel.layers) != num_layers or min(parallel.layers) < 0:
            raise PlanError(
                f"`parallel.layers` has {len(parallel.layers)} parts with {sum(parallel.layers)} layers, "
                f"wanted {num_parts} parts (pp · vp) with {num_layers} layers"
            )
        return tuple(parallel.layers)
    if num_layers < num_parts:
        raise PlanError(f"{num_layers} layers cannot be split into {num_parts} parts (pp · vp)")
    share, extra = divmod(num_layers, num_parts)
    return tuple(share + (part < extra) for part in range(num_parts))


def _layout(num_layers: int, parallel: Parallel) -> list[list[str]] | None:
    """Megatron-core's list of what each part holds; None when the split is even, which it does by itself."""
    counts = split_layers(num_layers, parallel)
    if parallel.pp == 1 or len(set(counts)) == 1:
        return None
    layout = [["decoder"] * count for count in counts]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def transformer_config(model: ModelConfig, parallel: Parallel, *, precision: str, recompute: str = "none") -> Any:
    """Megatron-core's configuration for this model and layout.

    Args:
        precision: fp32 | bf16.
        recompute: none | selective (core attention) | full (every layer) activation recomputation.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    recomputation: dict[str, Any] = {}
    if recompute == "selective":
        recomputation = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    elif recompute == "full":
        recomputation = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=_ACTIVATIONS[model.activation],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        autocast_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=not device.has_cuda(),
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vp if parallel.vp > 1 else None,
        pipeline_model_parallel_layout=_layout(model.num_layers, parallel),
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        # Of two interleaved ranks each is the other's next and previous: batched messages would be confused.
        batch_p2p_comm=parallel.vp == 1,
        # Gradients of the sum of losses, divided by the global batch's number of tokens at the end.
        calculate_per_token_loss=True,
        # These need kernels that may not be there.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **recomputation,
    )


def build(
    model: ModelConfig,
    parallel: Parallel,
    *,
    precision: str,
    optimizer: Optimizer | None,
    recompute: str = "none",
    seed: int = 0,
) -> Engine:
    """This rank's part of the model with initial weights and, for training, its optimizer.

    Call after `distributed.init`. Initial weights depend on `seed` and the parameters' global names only.

    Args:
        precision: fp32, or bf16 with fp32 main weights and gradients.
        optimizer: None builds a model for evaluation: no DDP, no gradient buffers.
        recompute: none | selective | full.

    Raises:
        PlanError: there are no layers for such a model.
    """
    if why := why_not_trained(model):
        raise PlanError(why, CONVERT_HINT)
    config = transformer_config(model, parallel, precision=precision, recompute=recompute)
    where = device.install()
    rows = padded_vocab_size(model.vocab_size, parallel.tp)
    chunks: list[torch.nn.Module] = []
    for part in range(parallel.vp):
        stage = part if parallel.vp > 1 else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunk = Model(model, config, rows, stage, pre_process=first, post_process=last)
        chunk.model_type = _model_type()
        chunks.append(chunk.to(where))
    engine = Engine(model, parallel, precision, chunks, None, config, rows, where)
    weights.initialise(engine, seed)
    if optimizer is not None:
        _add_optimizer(engine, optimizer)
    return engine


def _model_type() -> Any:
    from megatron.core.transformer.enums import ModelType

    return ModelType.encoder_or_decoder


def _add_optimizer(engine: Engine, options: Optimizer) -> None:
    """Wrap the chunks with gradient buffers and build the optimizer over them."""
    parallel, config = engine.parallel, engine.config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.distributed_optimizer,
        check_for_nan_in_grad=False,  # a NaN is handled by rule in the loop, not by an assertion
    )
    engine.chunks = [
        DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(engine.chunks)
    ]
    engine.optimizer = optimizer.build(engine.chunks, options, parallel, engine.precision)
    config.finalize_model_grads_func = _finalize_gradients
    if parallel.overlap_grad_reduce:
        no_syncs: list[Any] = [chunk.no_sync for chunk in engine.chunks]
        config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]


def _finalize_gradients(*args: Any, **kwargs: Any) -> None:
    """Megatron-core's callback after the last backward pass: ranks add their gradients up."""
    pulse.current.gradients_ready = time.monotonic()
    finalize_model_grads(*args, **kwargs)


def refresh_main_weights(engine: Engine) -> None:
    """Copy the model's weights into the optimizer's fp32 main weights. Call after weights were changed from outside."""
    if engine.optimizer is not None:
        engine.optimizer.reload_model_params()


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass reads. Every pipeline and tensor rank of a model copy has the same.

    `loss_mask_BS` is 1 where a token counts. `attention_mask_B1SS` is True where a position may look; None = causal.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    position_ids_BS: torch.Tensor | None = None
    attention_mask_B1SS: torch.Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """Per sample: sum of the losses of its unmasked tokens [nats] and their number, in the order of the samples."""

    sum_B: torch.Tensor
    tokens_B: torch.Tensor


def microbatches(
    tokens_BS1: Any,
    loss_mask_BS: Any = None,
    position_ids_BS: Any = None,
    segment_ids_BS: Any = None,
    *,
    micro_batch_size: int,
    device: torch.device,
) -> list[Microbatch]:
    """Cut this model copy's samples into micro-batches.

    Args:
        tokens_BS1: token ids [B, S + 1], numpy or torch; labels are the tokens one further.
        loss_mask_BS: 0 where a label does not count; None: all count.
        position_ids_BS: positions that restart at documents; None: 0, 1, 2, ...
        segment_ids_BS: documents by number, attention stays inside each; None: no borders.
    """
    tokens = torch.as_tensor(tokens_BS1).to(device=device, dtype=torch.int64)
    B, S = tokens.shape[0], tokens.shape[1] - 1
    mask = torch.ones(B, S, device=device) if loss_mask_BS is None else _on(loss_mask_BS, device, torch.float32)
    positions = None if position_ids_BS is None else _on(position_ids_BS, device, torch.int64)
    segments = None if segment_ids_BS is None else _on(segment_ids_BS, device, torch.int64)
    causal = None if segments is None else torch.ones(S, S, dtype=torch.bool, device=device).tril_()
    cut = []
    for i in range(0, B, micro_batch_size):
        rows = slice(i, min(i + micro_batch_size, B))
        allowed = None
        if segments is not None and causal is not None:
            allowed = (segments[rows, :, None] == segments[rows, None, :]).logical_and_(causal).unsqueeze(1)
        cut.append(
            Microbatch(
                tokens_BS=tokens[rows, :-1].contiguous(),
                labels_BS=tokens[rows, 1:].contiguous(),
                loss_mask_BS=mask[rows],
                position_ids_BS=None if positions is None else positions[rows],
                attention_mask_B1SS=allowed,
            )
        )
    return cut


def _on(values: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(values).to(device=device, dtype=dtype)


LossHook = Callable[[torch.Tensor, Microbatch], torch.Tensor]


def forward_backward(
    engine: Engine, batches: Sequence[Microbatch], *, loss_hook: LossHook | None = None
) -> Losses | None:
    """One global batch: gradients of the mean token loss, reduced over all ranks, in the gradient buffers.

    Args:
        batches: micro-batches of this model copy, all of one shape. Every copy has the same number.
        loss_hook: changes the per-token losses [B, S] that are differentiated; reported losses are those before it.

    Returns:
        Losses on the last pipeline stage, None on the others.
    """
    assert engine.optimizer is not None, "built for evaluation"
    for chunk in engine.chunks:
        chunk.train()
        chunk.zero_grad_buffer()  # type: ignore[operator]
    engine.optimizer.zero_grad()
    return _run(engine, batches, loss_hook, forward_only=False)


@torch.no_grad()
def evaluate(engine: Engine, batches: Sequence[Microbatch]) -> Losses | None:
    """Losses without gradients. Returns as `forward_backward` does."""
    for chunk in engine.chunks:
        chunk.eval()
    return _run(engine, batches, None, forward_only=True)


def _run(engine: Engine, batches: Sequence[Microbatch], hook: LossHook | None, *, forward_only: bool) -> Losses | None:
    assert batches, "no micro-batches"
    count = len(batches)
    if engine.parallel.vp > 1 and count % engine.parallel.pp:
        # The interleaved schedule takes micro-batches in groups of pp: fill the last group with ones that do not count.
        blank = replace(batches[-1], loss_mask_BS=torch.zeros_like(batches[-1].loss_mask_BS))
        batches = [*batches, *[blank] * (-count % engine.parallel.pp)]
    iterators: list[Iterator[Microbatch]] = [iter(batches) for _ in engine.chunks]
    B, S = batches[0].tokens_BS.shape
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, hook),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=engine.chunks if len(engine.chunks) > 1 else engine.chunks[0],
        num_microbatches=len(batches),
        seq_length=S,
        micro_batch_size=B,
        forward_only=forward_only,
    )
    if not results:
        return None
    results = results[:count]
    return Losses(torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results]))


def _forward_step(hook: LossHook | None, batches: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Any, Any]:
    """Megatron-core's callback: hidden states on inner stages, per-token losses [B, S] on the last."""
    batch = next(batches)
    pulse.current.tick()
    output = model(batch.tokens_BS, batch.position_ids_BS, batch.attention_mask_B1SS, labels=batch.labels_BS)
    return output, partial(_sum_losses, hook, batch)


def _sum_losses(
    hook: LossHook | None, batch: Microbatch, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Sum to differentiate, number of tokens, and the per-sample sums and counts that are reported."""
    mask = batch.loss_mask_BS
    tokens_B = mask.sum(dim=1)
    sum_B = (losses_BS * mask).sum(dim=1)
    objective = sum_B.sum() if hook is None else (hook(losses_BS, batch) * mask).sum()
    return objective, tokens_B.sum().to(torch.int32), (sum_B.detach(), tokens_B)


def reduce_by_source(
    engine: Engine, losses: Losses | None, source_B: Any, num_sources: int
) -> tuple[list[float], list[int]]:
    """Sums of losses [nats] and tokens by source over the global batch, the same on every rank.

    Args:
        losses: as `forward_backward` or `evaluate` returned it on this rank.
        source_B: number of each sample's source, in the order of the samples.
    """
    total = torch.zeros(2, num_sources, dtype=torch.float64, device=engine.device)
    if losses is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        sources = _on(source_B, engine.device, torch.int64)
        total[0].index_add_(0, sources, losses.sum_B.double())
        total[1].index_add_(0, sources, losses.tokens_B.double())
    dist.all_reduce(total)
    return total[0].tolist(), [round(t) for t in total[1].tolist()]


@torch.no_grad()
def grad_norm(engine: Engine) -> float:
    """L2 norm of all gradients, the same on every rank; NaN or infinite when any gradient is.

    Call once after `forward_backward` (and after hooks changed `main_grad`), before `update`.
    """
    assert engine.optimizer is not None
    engine.optimizer.prepare_grads()
    return float(engine.optimizer.get_grad_norm())


@torch.no_grad()
def update(engine: Engine, lr: float, norm: float) -> None:
    """Clip by the global norm and step the optimizer with this lr. To skip an update, do not call it.

    Args:
        norm: what `grad_norm` gave for these gradients.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    assert engine.optimizer is not None
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    for part in optimizer.parts(engine.optimizer):
        if part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
    engine.optimizer.step_with_ready_grads()


@torch.no_grad()
def logits(engine: Engine, tokens_BS: Any) -> torch.Tensor | None:
    """Logits [B, S, V] in fp32 without padding rows, on every tensor rank of the last pipeline stage; else None.

    All ranks call it with the same tokens.
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens = _on(tokens_BS, engine.device, torch.int64)
    for chunk in engine.chunks:
        chunk.eval()

    def forward(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[Any, Any]:
        return model(next(batches), None, None), lambda output, non_loss_data=True: output

    # The interleaved schedule takes micro-batches in groups of pp.
    count = engine.parallel.pp if engine.parallel.vp > 1 else 1
    iterators = [iter([tokens] * count) for _ in engine.chunks]
    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=engine.chunks if len(engine.chunks) > 1 else engine.chunks[0],
        num_microbatches=count,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not results:
        return None
    whole = gather_from_tensor_model_parallel_region(results[0])
    return whole[..., : engine.model.vocab_size].float()
