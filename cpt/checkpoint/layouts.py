"""Which rectangles of a model's tensors each Megatron rank holds, under which name and in which order. No torch.

tp cuts rows, columns, or both halves of a gated fc1; pp and virtual chunks cut layers; ep cuts experts into contiguous
blocks. One description serves reading and writing of per-rank files and of flat optimizer buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpt.base.errors import UsageError
from cpt.checkpoint import mapping
from cpt.checkpoint.arrays import Tensor, part
from cpt.checkpoint.content import Layout
from cpt.checkpoint.mapping import EMBEDDING, OUTPUT, Fused
from cpt.plan.model import ModelConfig

SPECS = ("local", "te", "cpt")  # `cpt`: the layers of this project, which are named as Megatron's local ones
# Where each tensor of a layer is registered, by the start of its canonical name. Transformer Engine has the attention's
# norm inside `linear_qkv`, which comes after `linear_proj`.
_ORDER = (
    "self_attention.linear_qkv.layer_norm_",
    "self_attention.linear_proj.",
    "self_attention.linear_qkv.",
    "self_attention.q_layernorm.",
    "self_attention.k_layernorm.",
    "mlp.linear_fc1.layer_norm_",
    "mlp.router.",
    "mlp.experts.",
    "mlp.linear_fc1.",
    "mlp.linear_fc2.",
    "mlp.shared_experts.",
)


@dataclass(frozen=True)
class Held:
    """A parameter of a rank.

    Args:
        chunk: virtual pipeline chunk.
        name: the module's own, layers numbered from 0 within the chunk.
        key: canonical Megatron name, layers numbered over the model.
        tensor: in terms of logical tensors.
        copied: whether every tensor rank has all of it; copies must be equal bit for bit.
    """

    chunk: int
    name: str
    key: str
    tensor: Tensor
    copied: bool

    @property
    def is_expert(self) -> bool:
        """Whether it is a weight of one expert."""
        return ".experts.experts." in self.key


def pad_vocabulary(vocab_size: int, divisor: int, tp: int) -> int:
    """Smallest multiple of divisor · tp that holds the vocabulary: Megatron's padded size."""
    multiple = divisor * tp
    return -(-vocab_size // multiple) * multiple


def layers_of(layout: Layout, num_layers: int) -> dict[tuple[int, int], range]:
    """Layers of each (stage, chunk).

    Raises:
        UsageError: they cannot be divided like that; names what can.
    """
    parts = layout.pp * layout.vp
    counts = layout.layers
    if counts is None:
        if num_layers % parts:
            good = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise UsageError(
                f"{num_layers} layers do not divide into pp {layout.pp} · vp {layout.vp} = {parts} equal parts",
                f"pp · vp can be {', '.join(map(str, good))}; or say how many layers each part has with a layout",
            )
        counts = (num_layers // parts,) * parts
    if len(counts) != parts or sum(counts) != num_layers or min(counts) < 0:
        raise wrong_parts("the pipeline layout", counts, layout.pp, layout.vp, num_layers)
    found, at = {}, 0
    for i, count in enumerate(counts):
        found[i % layout.pp, i // layout.pp] = range(at, at + count)
        at += count
    return found


def wrong_parts(what: str, counts: Sequence[int], pp: int, vp: int, num_layers: int) -> UsageError:
    """The error for layers of parts that are not those of the ranks or of the model."""

    def said(parts: int, layers: int) -> str:
        return f"{parts} part{'s' * (parts != 1)} with {layers} layer{'s' * (layers != 1)}"

    return UsageError(
        f"{what} has {said(len(counts), sum(counts))}; wanted: {said(pp * vp, num_layers)} (pp {pp}"
        + (f" · vp {vp})" if vp > 1 else ")")
    )


def check(model: ModelConfig, layout: Layout, padded_vocab_size: int, *, cuts_layers: bool = True) -> None:
    """Whether a model can be cut like that.

    Args:
        cuts_layers: whether what is written depends on how many layers each part has; if not, parts that nobody
            counted may be unequal.

    Raises:
        UsageError: names every size that does not divide, and the values that would.
    """
    problems: list[UsageError] = []
    tp, ep = layout.tp, layout.ep
    if wrong := _not_for_tp(model, layout, padded_vocab_size, tp):
        possible = [n for n in range(1, 65) if not _not_for_tp(model, layout, padded_vocab_size, n)]
        hint = f"possible: {', '.join(f'tp {n}' for n in possible)}"
        problems.append(UsageError(f"tp {tp} does not divide {', '.join(wrong)}", hint))
    if model.num_experts:
        if model.num_experts % ep:
            problems.append(
                UsageError(
                    f"ep {ep} does not divide {model.num_experts} experts (possible: {_divisors(model.num_experts)})"
                )
            )
        for size, what in _of_experts(model) if layout.etp else ():
            if size % (layout.etp or 1):
                problems.append(
                    UsageError(f"{layout.etp} tensor ranks do not divide {size} {what} (possible: {_divisors(size)})")
                )
    elif ep > 1:
        problems.append(UsageError(f"ep is {ep}, but the model has no experts"))
    if cuts_layers or layout.layers is not None:
        try:
            layers_of(layout, model.num_layers)
        except UsageError as error:
            problems.append(error)
    if problems:
        raise UsageError(problems[0].message, *problems[0].hints, more=tuple(problems[1:]))


def _not_for_tp(model: ModelConfig, layout: Layout, padded_vocab_size: int, tp: int) -> list[str]:
    """What so many tensor ranks do not divide."""
    groups, heads = model.num_query_groups, model.num_attention_heads
    query = heads * model.head_dim
    sizes = [(heads, "attention heads")]
    if any(not mapping.has_experts(model, i) for i in range(model.num_layers)):
        sizes.append((model.ffn_hidden_size, "rows of the MLP (`ffn_hidden_size`)"))
    if padded_vocab_size % layout.tp:  # else it was padded for just these ranks
        sizes.append((padded_vocab_size, "rows of the padded vocabulary"))
    sizes.append((query, "columns of the attention's output"))
    sizes.append((query + 2 * groups * model.head_dim, "rows of queries, keys and values"))
    if model.num_experts and not layout.etp:
        sizes += _of_experts(model)
    wrong = [f"{size} {what}" for size, what in sizes if size % tp]
    if groups % tp and tp % groups:
        wrong.append(f"{groups} key-value heads (nor is it a multiple of them)")
    return wrong


def _of_experts(model: ModelConfig) -> list[tuple[int, str]]:
    found = [
        (model.moe_ffn_hidden_size, "rows of an expert (`moe_ffn_hidden_size`)"),
        (model.moe_shared_ffn_hidden_size, "rows of the shared expert (`moe_shared_ffn_hidden_size`)"),
    ]
    return [(size, what) for size, what in found if size]


def _divisors(size: int) -> str:
    return ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)


def held(
    model: ModelConfig,
    layout: Layout,
    padded_vocab_size: int,
    *,
    tp: int,
    pp: int,
    ep: int = 0,
    spec: str = "local",
    pad_rows: int | None = None,
) -> list[Held]:
    """What one rank holds, in the order of registration; a tied output layer's copy on the last stage included.

    Args:
        tp, pp, ep: the rank.
        spec: one of `SPECS`: names of norms and experts.
        pad_rows: padding rows of the vocabulary that are there to be taken (see `mapping.megatron_tensors`).
    """
    whole = mapping.megatron_tensors(model, padded_vocab_size, pad_rows=pad_rows)
    stages = layers_of(layout, model.num_layers)
    found: list[Held] = []
    for chunk in range(layout.vp):
        layers = stages[pp, chunk]
        is_first, is_last = (pp, chunk) == (0, 0), (pp, chunk) == (layout.pp - 1, layout.vp - 1)
        keys = [k for k in whole if is_first and k.startswith("embedding.")]
        for i in layers:
            prefix = f"decoder.layers.{i}."
            inside = [k for k in whole if k.startswith(prefix)]
            keys += sorted(inside, key=lambda k: _position(k.removeprefix(prefix), spec))
        if is_last:
            keys += [k for k in whole if k.startswith("decoder.final_layernorm.")]
            keys += [OUTPUT] if OUTPUT in whole else []
        for key in keys:
            if is_elsewhere(model, layout, key, ep):
                continue
            fused = whole[key]
            ranks, rank = (layout.etp, tp) if layout.etp and _is_expert(key) else (layout.tp, tp)
            name = local_name(model, key, spec, first_layer=layers.start, layout=layout)
            tensor = cut(fused, ranks, rank)
            found.append(Held(chunk, name, key, tensor, copied=not fused.tp))
        if is_last and model.tie_embeddings and not is_first:
            found.append(Held(chunk, OUTPUT, EMBEDDING, cut(whole[EMBEDDING], layout.tp, tp), copied=False))
    return found


def cut(fused: Fused, tp: int, rank: int) -> Tensor:
    """A tensor rank's part of a whole Megatron tensor, in the order that rank has it in memory."""
    tensor = fused.tensor
    rows, columns = tensor.matrix
    if tp == 1 or not fused.tp:
        return tensor
    if fused.tp == "columns":
        width = columns // tp
        return part(tensor, [(0, rows)], (rank * width, (rank + 1) * width))
    if fused.tp == "halves":
        size = rows // 2 // tp
        return part(tensor, [(base + rank * size, base + (rank + 1) * size) for base in (0, rows // 2)])
    size = rows // tp
    return part(tensor, [(rank * size, (rank + 1) * size)])


def is_elsewhere(model: ModelConfig, layout: Layout, key: str, ep: int) -> bool:
    """Whether a tensor is of an expert that another expert rank holds."""
    if not _is_expert(key) or layout.ep == 1:
        return False
    each = model.num_experts // layout.ep
    return _expert(key) // each != ep


def local_name(model: ModelConfig, key: str, spec: str, *, first_layer: int = 0, layout: Layout | None = None) -> str:
    """A parameter's name in a module of this layer spec, layers numbered from the chunk's first."""
    name = key
    if key.startswith("decoder.layers."):
        _, _, number, rest = key.split(".", 3)
        layer = int(number)
        name = f"decoder.layers.{layer - first_layer}.{rest}"
        if spec != "te":
            name = name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
        if spec != "te" or mapping.has_experts(model, layer):
            name = name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
        if _is_expert(key):
            each = model.num_experts // (layout.ep if layout else 1)
            e = _expert(key)
            if spec != "te":
                name = name.replace(f".experts.experts.{e}.", f".experts.local_experts.{e % each}.")
            else:  # one module for all experts: the number follows the parameter's name
                name = name.replace(f".experts.experts.{e}.", ".experts.") + str(e % each)
    return name


def _is_expert(key: str) -> bool:
    return ".experts.experts." in key


def _expert(key: str) -> int:
    return int(key.split(".experts.experts.")[1].split(".")[0])


def _position(name: str, spec: str) -> tuple[int, int, str, bool]:
    """Sorts the tensors of a layer into the order of registration."""
    place, step = next(i for i, start in enumerate(_ORDER) if name.startswith(start)), 0
    if spec == "te" and place == 0:
        place, step = _ORDER.index("self_attention.linear_proj."), 1
    module, _, kind = name.rpartition(".")
    is_bias = kind.endswith("bias")  # a weight comes before its bias
    if name.startswith("mlp.experts."):
        expert, module = module.removeprefix("mlp.experts.experts.").split(".", 1)
        if spec == "te":  # one module for all experts: all weights, then all biases
            return place, step, module, is_bias
        step = int(expert)
    return place, step, module, is_bias


def ranks(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, ep) of every rank that has a file of its own."""
    for ep in range(layout.ep):
        for pp in range(layout.pp):
            for tp in range(layout.tp):
                yield tp, pp, ep
