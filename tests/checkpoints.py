"""Small checkpoints from a seed, and the shortest way from one format to another."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cpt.checkpoint import find, hf_config, mapping
from cpt.checkpoint.arrays import CARRIERS, Files
from cpt.checkpoint.content import Content
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.writing import BLOCK, FileSums, write_file
from cpt.plan.model import ModelConfig

# H ≠ F, head_dim ≠ H / heads, groups ≠ heads, odd vocabulary, an odd number of layers.
PLAIN = ModelConfig(
    family="llama",
    num_layers=3,
    hidden_size=40,
    ffn_hidden_size=68,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    vocab_size=61,
    max_position_embeddings=96,
    norm_eps=1e-6,
)
_EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 28, "moe_topk": 2, "moe_norm_topk": True}
_BIASED: dict[str, Any] = {
    "num_query_groups": 4,
    "head_dim": 10,
    "normalization": "layernorm",
    "qkv_bias": True,
    "linear_bias": True,
}
MODELS: dict[str, ModelConfig] = {
    "llama": PLAIN,
    "mistral": dataclasses.replace(PLAIN, family="mistral"),
    "qwen2": dataclasses.replace(PLAIN, family="qwen2", qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(PLAIN, family="qwen3", qk_norm=True),
    "mixtral": dataclasses.replace(PLAIN, family="mixtral", **_EXPERTS | {"moe_ffn_hidden_size": 68}),
    "qwen2_moe": dataclasses.replace(
        PLAIN, family="qwen2_moe", qkv_bias=True, **_EXPERTS, moe_shared_ffn_hidden_size=36, moe_dense_layers=(1,)
    ),
    "qwen3_moe": dataclasses.replace(PLAIN, family="qwen3_moe", qk_norm=True, **_EXPERTS | {"moe_norm_topk": False}),
    "gpt_neox": dataclasses.replace(PLAIN, family="gpt_neox", activation="gelu", rotary_percent=0.4, **_BIASED),
    "gpt2": dataclasses.replace(
        PLAIN,
        family="gpt2",
        activation="gelu_tanh",
        position_embedding="learned",
        tie_embeddings=True,
        **_BIASED,
    ),
}


def tensors(model: ModelConfig, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random values of every tensor of a Hugging Face file, as bits; bfloat16 as unsigned integers."""
    random = np.random.default_rng(seed)
    made = {}
    for name, tensor in mapping.hf_tensors(model).items():
        values = random.standard_normal(tensor.shape, dtype=np.float32) * 0.1
        made[name] = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values
        if dtype == "float16":
            made[name] = values.astype(np.float16)
    return made


def write_hf(
    folder: Path, model: ModelConfig, dtype: str = "float32", seed: int = 0, shards: int = 1, **extra: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """A Hugging Face folder of random values, written by hand; returns them.

    Args:
        extra: further keys of `config.json`.
    """
    folder.mkdir(parents=True)
    made = tensors(model, dtype, seed)
    (folder / "config.json").write_text(json.dumps(hf_config.config_for(model, dtype) | extra))
    names = list(made)
    where = {}
    for i in range(shards):
        part = {n: made[n] for n in names[i::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, part, dtype)
        where |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return made


def write_safetensors(path: Path, values: dict[str, np.ndarray[Any, Any]], dtype: str = "float32") -> None:
    """A safetensors file; of bfloat16 the values are bits."""
    spelled = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    header, at = {}, 0
    for name, value in values.items():
        kind = spelled.get(str(value.dtype), spelled[dtype])
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for v in values.values()))


def read_safetensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) of every tensor of a folder, by the header alone."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, facts in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = (8 + length + n for n in facts["data_offsets"])
                found[name] = (facts["dtype"], tuple(facts["shape"]), data[start:stop])
    return found


def convert(
    source: Path | Content,
    out: Path,
    to: str,
    *,
    reading: Reading | None = None,
    writing: Writing | None = None,
    given: str = "hf",
    block: int = 1000,
) -> Path:
    """Convert a folder without any of the job's care. Blocks are small, so that every tensor takes several.

    Returns:
        The folder that holds the checkpoint: `out`, or the step's folder in it.
    """
    content = source if isinstance(source, Content) else find.known()[given].open(source, reading or Reading())
    return write(content, to, out, writing, block=block)


def write(content: Content, to: str, out: Path, writing: Writing | None = None, *, block: int = BLOCK) -> Path:
    """Write a content in a format, in this process and without any of the job's care.

    Returns:
        The folder that holds the checkpoint: `out`, or the step's folder in it.
    """
    output = find.writable()[to].plan(content, writing or Writing())
    folder = out / output.step_folder
    folder.mkdir(parents=True, exist_ok=True)
    files = Files()
    sums = {f.name: write_file(f, content, folder, files, block=block) for f in output.files}
    for name, path in output.copies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        (folder / name).write_bytes(data)
        sums[name] = FileSums(size=len(data), crc32=zlib.crc32(data), payloads=())
    for name, data in output.finish(sums).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def values(content: Content, atom: str, state: str) -> np.ndarray[Any, Any]:
    """A state of a logical tensor [out, in], in the carrier of its dtype."""
    array = content.array(atom, state)
    rows = array.shape[0] if array.shape else 1
    out = np.empty((rows, -(-array.nbytes // CARRIERS[array.dtype].itemsize) // max(1, rows)), CARRIERS[array.dtype])
    Files().read(array, 0, 0, out, array.dtype)
    return out.reshape(array.shape)
