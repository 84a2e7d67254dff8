"""Whether a converted checkpoint computes what its source does: logits of transformers beside those of megatron-core.

The converted files are loaded by megatron-core itself into its own `GPTModel` (local layer spec, fp32), set up from the
arguments in the checkpoint, so that a table of names that is wrong in the same way in both directions shows. A model
that megatron-core cannot compute (parallel residual) is computed by the engine of this project.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import StageFailed, UsageError
from cpt.checkpoint import hf_config, megatron_args, torch_zip
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.content import Layout

Logits = np.ndarray[Any, np.dtype[np.float32]]

BOUND = 2e-6  # of the largest |logit|, fp32 on one thread
_TOKENS = 64


def compare(
    source: Path, converted: Path, *, tp: Sequence[int] = (1, 2), tokens: int = _TOKENS, timeout: float = 3600.0
) -> float:
    """Largest difference of logits, as a share of the largest |logit|; at most `BOUND` when all is well.

    Both models are in memory whole, one after the other, in fp32; not for models larger than memory.

    Args:
        source: Hugging Face folder.
        converted: Hugging Face folder, or a step's folder of `torch_dist` or `megatron` files.
        tp: tensor ranks that `torch_dist` files are loaded under; those that do not divide the model are left out.
            `megatron` files are loaded under their own.
        tokens: length of the one sequence that is read.
        timeout: for all ranks of a layout [s].

    Raises:
        UsageError: a folder is not of a kind that can be computed.
        StageFailed: megatron-core could not load or compute the converted checkpoint.
    """
    model = hf_config.read_config(source)
    length = min(tokens, model.max_position_embeddings)
    tokens_BS = np.random.default_rng(1234).integers(0, model.vocab_size, (1, length))
    wanted = of_hugging_face(source, tokens_BS)
    if (converted / "config.json").is_file():
        found = [of_hugging_face(converted, tokens_BS)]
    else:
        own = int(arguments(converted).get("tensor_model_parallel_size") or 1)
        heads, groups = model.num_attention_heads, model.num_query_groups
        good = [n for n in tp if heads % n == 0 and groups % n == 0]
        layouts = good if (converted / "metadata.json").is_file() else [own]
        found = [_in_ranks(converted, tokens_BS, n, timeout) for n in layouts]
    return max(difference(wanted, other) for other in found)


def difference(wanted: Logits, found: Logits) -> float:
    """Largest difference over the vocabulary of `wanted`, as a share of its largest |logit|."""
    rows = wanted.shape[-1]
    return float(np.abs(wanted - found[..., :rows]).max() / np.abs(wanted).max())


def of_hugging_face(folder: Path, tokens_BS: Any) -> Logits:
    """Logits [B, S, V] of transformers: fp32, one thread, eager attention.

    Raises:
        UsageError: transformers is not installed.
    """
    import torch

    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UsageError("comparing logits needs transformers", "`pip install transformers`") from None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # A difference of logits says all that its warnings could.
    talks, moves = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            found: Logits = model(torch.as_tensor(tokens_BS)).logits.numpy()
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(talks)
        if moves:
            logging.enable_progress_bar()
    return found


def arguments(folder: Path) -> dict[str, Any]:
    """Megatron's arguments in a step's folder, complete."""
    files = [folder / "common.pt", *sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))]
    path = next((f for f in files if f.is_file()), None)
    if path is None:
        raise UsageError(f"`{folder}` is no checkpoint whose logits megatron-core computes")
    data = Files().map(str(path))
    stated = dict(vars(torch_zip.read(data, 0, len(data), path).value["args"]))
    # What is not stated has Megatron's default, which the model that they describe tells in full.
    model = megatron_args.to_model(stated, str(path))
    layout = Layout(tp=int(stated.get("tensor_model_parallel_size") or 1))
    padded = int(stated.get("padded_vocab_size") or model.vocab_size)
    full = megatron_args.to_args(model, layout=layout, padded_vocab_size=padded, dtype="float32", spec="cpt")
    return full | stated


def of_megatron(folder: str, tokens_BS: Any) -> Logits | None:
    """Logits [B, S, V padded] of a checkpoint in megatron-core, on the first of the tensor ranks; all call it."""
    import torch

    args = arguments(Path(folder))
    with torch.no_grad():
        if args.get("use_parallel_residual") or args.get("hf_rope_scaling"):
            return _of_engine(folder, tokens_BS)
        model = _stock(args)
        _load(model, Path(folder), args)
        tokens = torch.as_tensor(tokens_BS)
        B, S = tokens.shape
        positions = torch.arange(S)[None].expand(B, S)
        above = torch.ones(S, S, dtype=torch.bool).triu(1)[None, None]
        part = model.float().eval()(tokens, positions, above)
        return _gathered(part)


def _gathered(part: Any) -> Logits | None:
    """The vocabularies of all tensor ranks, on the first."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, -1).numpy() if dist.get_rank() == 0 else None


def _of_engine(folder: str, tokens_BS: Any) -> Logits | None:
    import torch.distributed as dist

    from cpt.checkpoint import megatron_args, native
    from cpt.engine import megatron
    from cpt.plan.model import Parallel

    model = megatron_args.to_model(arguments(Path(folder)), folder)
    engine = megatron.build(model, Parallel(tp=dist.get_world_size()), precision="fp32", optimizer=None)
    native.load(engine, folder, keep={"weights"})
    found = megatron.logits(engine, np.asarray(tokens_BS))
    return None if found is None or dist.get_rank() else found.numpy()


def _stock(args: Mapping[str, Any]) -> Any:
    """Megatron-core's own model as Megatron sets it up from its arguments."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    def tanh_gelu(x: Any) -> Any:
        return F.gelu(x, approximate="tanh")

    experts = args.get("num_experts")
    plain_gelu = tanh_gelu if args["openai_gelu"] or args["bias_gelu_fusion"] else F.gelu
    config = TransformerConfig(
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=args["num_attention_heads"],
        num_query_groups=args["num_query_groups"] if args["group_query_attention"] else args["num_attention_heads"],
        kv_channels=args["kv_channels"],
        normalization=args["normalization"],
        layernorm_epsilon=args["norm_epsilon"],
        add_bias_linear=args["add_bias_linear"],
        add_qkv_bias=args["add_qkv_bias"],
        qk_layernorm=args["qk_layernorm"],
        gated_linear_unit=args["swiglu"],
        activation_func=F.silu if args["swiglu"] else plain_gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_expert_options(args) if experts else {},
    )
    if experts:
        from megatron.core.transformer.moe import moe_utils

        # Without Transformer Engine megatron-core 0.16 forgets to say that it is not there.
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args["normalization"])
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=args["qk_layernorm"], normalization=args["normalization"])
    return GPTModel(
        config,
        spec,
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"],
        rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"],
        rope_scaling=args["use_rope_scaling"],
        rope_scaling_factor=args["rope_scaling_factor"],
        seq_len_interpolation_factor=args["rotary_seq_len_interpolation_factor"],
    )


def _expert_options(args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_moe_experts": args["num_experts"],
        "moe_ffn_hidden_size": args["moe_ffn_hidden_size"],
        "moe_router_topk": args["moe_router_topk"],
        "moe_router_pre_softmax": args["moe_router_pre_softmax"],
        "moe_router_score_function": args["moe_router_score_function"],
        "moe_layer_freq": args["moe_layer_freq"],
        "moe_shared_expert_intermediate_size": args["moe_shared_expert_intermediate_size"],
        "moe_shared_expert_gate": args["moe_shared_expert_gate"],
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
    }


def _load(model: Any, folder: Path, args: Mapping[str, Any]) -> None:
    """Put a checkpoint's values into megatron-core's model, by megatron-core."""
    if (folder / "metadata.json").is_file():
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))["model"]
    else:
        state = _merged_stages(folder, args)
    model.load_state_dict(state)


def _merged_stages(folder: Path, args: Mapping[str, Any]) -> dict[str, Any]:
    """This tensor rank's parameters over all stages and expert ranks of `megatron` files, as one stage has them."""
    from argparse import Namespace

    import torch
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    found: dict[str, Any] = {}
    pp, ep = (int(args.get(f"{kind}_model_parallel_size") or 1) for kind in ("pipeline", "expert"))
    first = 0
    for stage in range(pp):
        layers = 0
        for expert in range(ep):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "") + (f"_{expert:03d}" if ep > 1 else "")
            with torch.serialization.safe_globals([Namespace]):
                held = torch.load(folder / name / "model_optim_rng.pt", weights_only=True)
            if "model" not in held:
                raise UsageError(f"`{folder}` has virtual pipeline chunks, whose logits are not computed")
            for key, value in held["model"].items():
                if key.startswith("decoder.layers."):
                    number, rest = key.removeprefix("decoder.layers.").split(".", 1)
                    layers = max(layers, int(number) + 1)
                    key = f"decoder.layers.{first + int(number)}.{rest}"
                if ".local_experts." in key:
                    head, tail = key.split(".local_experts.")
                    number, rest = tail.split(".", 1)
                    key = f"{head}.local_experts.{expert * (args['num_experts'] // ep) + int(number)}.{rest}"
                if key == "output_layer.weight" and not args["untie_embeddings_and_output_weights"]:
                    continue
                found[key] = value
        first += layers
    return found


def _in_ranks(folder: Path, tokens_BS: Any, tp: int, timeout: float) -> Logits:
    """`of_megatron` in processes of its own, which leave nothing of Megatron's state behind."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npy"
        call = (str(folder), np.asarray(tokens_BS), tp, scratch)
        ranks = [context.Process(target=_rank, args=(rank, *call)) for rank in range(tp)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        failed = [i for i, process in enumerate(ranks) if process.exitcode != 0]
        for process in ranks:
            if process.is_alive():
                process.kill()
        if failed:
            why = Path(scratch) / f"error_{failed[0]}"
            said = why.read_text() if why.is_file() else f"rank {failed[0]} did not end well"
            raise StageFailed(f"megatron-core cannot compute `{folder}`: {said}")
        found: Logits = np.load(out)
    return found


def _rank(rank: int, folder: str, tokens_BS: Any, tp: int, scratch: str) -> None:
    import torch
    import torch.distributed as dist

    from cpt.engine import device

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        device.install()
        from megatron.core import parallel_state, tensor_parallel

        dist.init_process_group("gloo", init_method=f"file://{scratch}/meet", rank=rank, world_size=tp)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        found = of_megatron(folder, tokens_BS)
        if rank == 0 and found is not None:
            np.save(Path(scratch) / "logits.npy", found)
        dist.barrier()
    except Exception as error:
        (Path(scratch) / f"error_{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)
