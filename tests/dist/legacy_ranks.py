"""What ranks do in `test_convert_megatron`: stock megatron-core models, saved and loaded as Megatron does it.

Apart from the tests because ranks must not import what only the tests need.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.plan.model import ModelConfig

STEPS = 3
METADATA = {
    "distrib_optim_sharding_type": "dp_reshardable",
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": False,
    "singleton_local_shards": False,
}


@dataclass(frozen=True)
class Case:
    """A layout, and how the optimizer is built.

    Args:
        bucket: size at which a bucket ends [values]; None = one bucket.
    """

    model: ModelConfig
    tp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    dp: int = 1
    distributed: bool = True
    bf16: bool = True
    bucket: int | None = None
    fp32_gradients: bool = True
    layers: tuple[int, ...] | None = None

    @property
    def has_buckets(self) -> bool:
        """Whether megatron-core can save `dp_reshardable`.

        It fails when the bucket before a shared embedding ends off a multiple of 64: the padding goes beyond its end.
        """
        shared = self.model.tie_embeddings and self.pp > 1
        return self.distributed and not (shared and self.model.hidden_size % 64)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def padded(self) -> int:
        return math.ceil(self.model.vocab_size / (16 * self.tp)) * 16 * self.tp


def arguments(case: Case) -> Namespace:
    """As Megatron-LM writes them, by hand: not by the code under test."""
    m = case.model
    return Namespace(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        group_query_attention=True,
        num_query_groups=m.num_query_groups,
        kv_channels=m.head_dim,
        vocab_size=m.vocab_size,
        padded_vocab_size=case.padded,
        make_vocab_size_divisible_by=16,
        max_position_embeddings=m.max_position_embeddings,
        seq_length=m.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=10000,
        rotary_percent=1.0,
        normalization="RMSNorm",
        norm_epsilon=m.norm_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=m.qkv_bias,
        qk_layernorm=m.qk_norm,
        untie_embeddings_and_output_weights=not m.tie_embeddings,
        num_experts=m.num_experts or None,
        moe_ffn_hidden_size=m.moe_ffn_hidden_size or None,
        moe_router_topk=m.moe_topk or 2,
        moe_router_pre_softmax=False,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vp if case.vp > 1 else None,
        expert_model_parallel_size=case.ep,
        data_parallel_size=case.dp,
        bf16=case.bf16,
        params_dtype="bfloat16" if case.bf16 else "float32",
        use_distributed_optimizer=case.distributed,
        grad_reduce_in_bf16=not case.fp32_gradients,
        accumulate_allreduce_grads_in_fp32=case.fp32_gradients,
        transformer_impl="local",
        ckpt_format="torch",
        consumed_train_samples=28,
    )


class Stock:
    """A rank's part of a stock model with its optimizer."""

    def __init__(self, case: Case, seed: int) -> None:
        import datetime
        import os

        import torch
        import torch.distributed as dist
        import torch.nn.functional as F  # noqa: N812
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.enums import ModelType

        if not dist.is_initialized():
            world = int(os.environ["WORLD_SIZE"])
            rank = int(os.environ["RANK"])
            dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=case.tp,
                pipeline_model_parallel_size=case.pp,
                virtual_pipeline_model_parallel_size=case.vp if case.vp > 1 else None,
                expert_model_parallel_size=case.ep,
                create_gloo_process_groups=True,
            )
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        m, dtype = case.model, torch.bfloat16 if case.bf16 else torch.float32
        experts: dict[str, Any] = {}
        if m.num_experts:
            experts = {
                "num_moe_experts": m.num_experts,
                "moe_ffn_hidden_size": m.moe_ffn_hidden_size,
                "moe_router_topk": m.moe_topk,
                "moe_token_dispatcher_type": "alltoall",
                "expert_model_parallel_size": case.ep,
            }
        pipeline: Any = None
        if case.layers is not None:
            pipeline = [["decoder"] * n for n in case.layers]
            pipeline[0].insert(0, "embedding")
            pipeline[-1].append("loss")
        config = TransformerConfig(
            num_layers=m.num_layers,
            hidden_size=m.hidden_size,
            ffn_hidden_size=m.ffn_hidden_size,
            num_attention_heads=m.num_attention_heads,
            num_query_groups=m.num_query_groups,
            kv_channels=m.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=m.norm_eps,
            add_bias_linear=False,
            add_qkv_bias=m.qkv_bias,
            qk_layernorm=m.qk_norm,
            gated_linear_unit=True,
            activation_func=F.silu,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=case.bf16,
            use_cpu_initialization=True,
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            virtual_pipeline_model_parallel_size=case.vp if case.vp > 1 else None,
            pipeline_model_parallel_layout=pipeline,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
            **experts,
        )
        spec = get_gpt_layer_local_spec(
            num_experts=m.num_experts or None, qk_layernorm=m.qk_norm, normalization="RMSNorm"
        )
        self.case, self.chunks = case, []
        for part in range(case.vp):
            stage = part if case.vp > 1 else None
            chunk = GPTModel(
                config,
                spec,
                vocab_size=case.padded,
                max_sequence_length=m.max_position_embeddings,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=m.tie_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            )
            chunk.model_type = ModelType.encoder_or_decoder
            for name, param in chunk.named_parameters():
                if name.endswith("norm.weight"):  # ones otherwise: nothing could be told apart
                    param.data += torch.sin(torch.arange(param.numel()) + len(name) + seed).to(dtype) / 4
            chunk = chunk.to(dtype)
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=case.fp32_gradients,
                overlap_grad_reduce=case.bucket is not None,
                use_distributed_optimizer=case.distributed,
                bucket_size=case.bucket,
            )
            self.chunks.append(
                DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=part > 0)
            )
        options = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            bf16=case.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=case.distributed,
            clip_grad=0.0,
        )
        self.optimizer = get_megatron_optimizer(options, self.chunks)
        self.parallel = parallel_state

    @property
    def modules(self) -> list[Any]:
        return [chunk.module for chunk in self.chunks]

    def train(self) -> None:
        """Updates with made gradients: a function of the weights, so equal wherever weights are equal."""
        import torch

        for step in range(STEPS):
            for module in self.modules:
                for param in module.parameters():
                    param.main_grad.copy_(torch.sin(37 * param.data.float() + step))
            self.optimizer.step()

    def truth(self) -> dict[str, Any]:
        """Every parameter's model weight, and the pieces of its state that this rank has, as the optimizer has them."""
        import torch

        found: dict[str, Any] = {}
        pieces: list[tuple[Any, int, int, dict[str, Any]]] = []
        for one in self.optimizer.chained_optimizers:
            if self.case.distributed:
                for param in one.model_param_gbuf_map:
                    of = one._get_model_param_range_map(param)["param"]
                    pieces.append((param, of.start, of.end, one._get_main_param_and_optimizer_states(param)))
            elif self.case.bf16:
                for halves, mains in zip(one.float16_groups, one.fp32_from_float16_groups, strict=True):
                    for param, main in zip(halves, mains, strict=True):
                        pieces.append((param, 0, param.numel(), {"param": main, **one.optimizer.state[main]}))
            else:
                for group in one.optimizer.param_groups:
                    for param in group["params"]:
                        pieces.append((param, 0, param.numel(), {"param": param, **one.optimizer.state[param]}))
        names = {id(p): (i, n) for i, m in enumerate(self.modules) for n, p in m.named_parameters()}
        for i, module in enumerate(self.modules):
            for name, param in module.named_parameters():
                bits = param.data.view(torch.int16 if self.case.bf16 else torch.int32)
                found[f"{i}:{name}"] = {"model": bits.numpy().tobytes(), "pieces": []}
        for param, start, end, state in pieces:
            i, name = names[id(param)]
            parts = {k: state[k].detach().numpy().tobytes() for k in ("param", "exp_avg", "exp_avg_sq")}
            found[f"{i}:{name}"]["pieces"].append((start, end, parts))
        return found

    def where(self) -> dict[str, int]:
        p = self.parallel
        return {
            "tp": p.get_tensor_model_parallel_rank(),
            "pp": p.get_pipeline_model_parallel_rank(),
            "ep": p.get_expert_model_parallel_rank(),
            "dp": p.get_data_parallel_rank(),
            "edp": p.get_expert_data_parallel_rank(),
        }

    def folder(self, root: Path) -> Path:
        """As Megatron-LM's `get_checkpoint_name` has it."""
        at = self.where()
        name = f"mp_rank_{at['tp']:02d}"
        name += f"_{at['pp']:03d}" if self.case.pp > 1 else ""
        name += f"_{at['ep']:03d}" if self.case.ep > 1 else ""
        return root / name

    def save_legacy(self, root: Path) -> None:
        """As Megatron-LM's `save_checkpoint` does with `--ckpt-format torch`."""
        import torch
        import torch.distributed as dist

        folder = self.folder(root)
        folder.mkdir(parents=True, exist_ok=True)
        if self.case.distributed:
            self.optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
        if self.where()["edp"] == 0:
            state = {"args": arguments(self.case), "checkpoint_version": 3.0, "iteration": STEPS}
            for i, module in enumerate(self.modules):
                state["model" if self.case.vp == 1 else f"model{i}"] = module.state_dict_for_save_checkpoint()
            state["optimizer"] = self.optimizer.state_dict()
            state["opt_param_scheduler"] = {"max_lr": 1e-2, "num_steps": STEPS * 8}
            torch.save(state, folder / "model_optim_rng.pt")
        dist.barrier()

    def load_legacy(self, root: Path) -> None:
        """As Megatron-LM's `load_checkpoint` does, strictly."""
        import torch
        import torch.distributed as dist

        folder = self.folder(root)
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(folder / "model_optim_rng.pt", weights_only=True)
        for i, module in enumerate(self.modules):
            module.load_state_dict(state["model" if self.case.vp == 1 else f"model{i}"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.case.distributed:
            with torch.no_grad():  # megatron-core's own way fails for fp32 weights without
                self.optimizer.load_parameter_state(str(folder / "distrib_optim.pt"))
        dist.barrier()

    def sharded(self, is_loading: bool) -> dict[str, Any]:
        parts = {
            "model" if self.case.vp == 1 else f"model{i}": m.sharded_state_dict() for i, m in enumerate(self.modules)
        }
        optimizer = self.optimizer.sharded_state_dict(dict(parts), is_loading, metadata=METADATA)
        return parts | {"optimizer": optimizer}

    def save_sharded(self, folder: Path) -> None:
        """As Megatron-LM does with `--ckpt-format torch_dist` and `dp_reshardable` optimizer state."""
        import torch.distributed as dist
        from megatron.core import dist_checkpointing

        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        state = self.sharded(False)
        state |= {"args": arguments(self.case), "checkpoint_version": 3.0, "iteration": STEPS}
        dist_checkpointing.save(state, str(folder), content_metadata=METADATA)

    def load_sharded(self, folder: Path) -> None:
        import torch
        from megatron.core import dist_checkpointing

        with torch.serialization.safe_globals([Namespace]):
            state = dist_checkpointing.load(self.sharded(True), str(folder))
        for i, module in enumerate(self.modules):
            module.load_state_dict(state["model" if self.case.vp == 1 else f"model{i}"], strict=True)
        with torch.no_grad():
            self.optimizer.load_state_dict(state["optimizer"])


def save(case: Case, root: str, sharded: str | None) -> tuple[dict[str, int], dict[str, Any]]:
    """Train and save in both formats; gives (where the rank is, what it holds)."""
    stock = Stock(case, seed=1)
    stock.train()
    stock.save_legacy(Path(root))
    if sharded:
        stock.save_sharded(Path(sharded))
    return stock.where(), stock.truth()


def load(case: Case, root: str, sharded: str | None) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Load into a model of other values; gives (where the rank is, what it holds after loading each)."""
    from cpt.engine import optimizer

    if case.distributed:  # with torch's AdamW, megatron-core cannot load such a file: `KeyError: 'step'`
        optimizer.register()
    stock = Stock(case, seed=5)
    found = []
    for folder, load_one in ((root, stock.load_legacy), (sharded, stock.load_sharded)):
        if folder:
            stock.train()
            load_one(Path(folder))
            found.append(stock.truth())
    return stock.where(), found
