"""What Megatron-core names things in `torch_dist` folders.

Weights, by canonical name (see `mapping`):

    decoder.layers.mlp.linear_fc1.weight [L, 2F, H]      layers stacked on axis 0, experts on the next
    decoder.layers.3.mlp.linear_fc1.weight [2F, H]       one key a layer, an expert
    ...linear_fc1.weight_w, ...linear_fc1.weight_v       gate and up apart (`singleton_local_shards`)
    mlp.linear_fc1.layer_norm_*, pre_mlp_layernorm.*     the same norm: layer specs name it differently

Optimizer state, all of it perhaps after `chained_N.`:

    optimizer.state.param.<weight>, .exp_avg., .exp_avg_sq.        `fully_reshardable`
    optimizer.state.fp32_param.<weight>, .exp_avg., .exp_avg_sq.   ordinary optimizer
    the same with an extra last axis of flat pieces                `fully_sharded_model_space` (megatron-core to 0.14)
    optimizer.distributed.dp_group_idx_0.gbuf_idx_0....            `dp_reshardable`: flat buckets, see `buckets`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cpt.checkpoint.content import MAIN, MODEL, MOMENTS

STATES = {"param": MAIN, "fp32_param": MAIN, **{m: m for m in MOMENTS}}  # Megatron's name of a state: ours
MANIFEST = "cpt.manifest"  # object: what our manifest says beyond model, files and layout
RANDOM = "cpt.rng"  # object: random states of each rank, base64, and the layout of the ranks
RANK = "cpt.rng.rank_{:05d}"  # tensor: the same of one rank
_CHAINED = r"(?:chained_\d+\.)?"
STATE = re.compile(_CHAINED + r"optimizer\.state\.(\w+)\.(.+)")
FLAT = re.compile(_CHAINED + r"optimizer\.distributed\.")
_FLAT_DTYPES = re.compile(r"\.dtype_\(torch\.(\w+), torch\.(\w+)\)\.")  # of parameters and of gradients
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(.+)")
_HALF = re.compile(r"(.+linear_fc1\.(?:weight|bias))_([wv])")
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class Name:
    """A stored tensor's key, taken apart.

    Args:
        key: canonical name with `{i}`, `{e}` for layer and expert.
        layer, expert: their number; None = stacked (or there is none in `key`).
        half: 0 gate, 1 up, where they are apart.
    """

    state: str
    key: str
    layer: int | None
    expert: int | None
    half: int | None

    @property
    def axes(self) -> tuple[bool, bool]:
        """Whether layers, and whether experts, are a leading axis."""
        return "{i}" in self.key and self.layer is None, "{e}" in self.key and self.expert is None

    @property
    def stacked(self) -> int:
        """Leading axes that are layers or experts."""
        return sum(self.axes)

    def canonical(self, index: Sequence[int]) -> str:
        """The name of one slice.

        Args:
            index: on the stacked axes.
        """
        rest = list(index)
        layers, experts = self.axes
        layer = rest.pop(0) if layers else self.layer
        expert = rest.pop(0) if experts else self.expert
        return self.key.replace("{i}", str(layer)).replace("{e}", str(expert))


def named(key: str) -> Name | None:
    """A key of a weight or of its optimizer state; None = of a state that is not known."""
    state = MODEL
    if match := STATE.fullmatch(key):
        if match[1] not in STATES:
            return None
        state, key = STATES[match[1]], match[2]
    half = layer = expert = None
    if match := _HALF.fullmatch(key):
        key, half = match[1], "wv".index(match[2])
    if match := _LAYER.fullmatch(key):
        layer, rest = match[1], match[2]
        for local, canonical in _NORMS.items():
            if rest.startswith(local):
                rest = canonical + rest.removeprefix(local)
        if inner := _EXPERT.fullmatch(rest):
            expert, rest = inner[1], "mlp.experts.experts.{e}." + inner[2]
        key = "decoder.layers.{i}." + rest
    return Name(state, key, None if layer is None else int(layer), None if expert is None else int(expert), half)


def gradients(flat: Iterable[str]) -> dict[str, str]:
    """Dtype of gradients by dtype of parameters, as the keys of flat buffers say; the first key of several counts."""
    found: dict[str, str] = {}
    for match in filter(None, map(_FLAT_DTYPES.search, flat)):
        found.setdefault(match[1], match[2])
    return found
