"""Plans a Megatron `torch_dist` folder: layers stacked, chunks of at most 64 MiB, few files that workers share.

    iter_0000007/ or release/
        __0_0.distcp ...   records of chunks, model first, then each state of the optimizer; objects last
        .metadata          where each lies
        common.pt          arguments, step, what is no tensor
        metadata.json      from here on megatron-core loads it
        manifest.json      from here on `cpt run` starts from it

Chunk boundaries need not follow any layout, so one folder serves all; the layout decides padding rows and arguments.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import struct
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt import __version__
from cpt.base.errors import UsageError
from cpt.checkpoint import buckets, layouts, mapping, megatron_args, torch_zip
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint.arrays import Crc, OutFile, Payload, Segment, as_matrix, crop, itemsize
from cpt.checkpoint.content import MAIN, MODEL, MOMENTS, OPTIMIZER, Content
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.formats import Output, Writing
from cpt.checkpoint.formats.atom import packed
from cpt.checkpoint.formats.torch_dist_names import MANIFEST, RANDOM, RANK
from cpt.checkpoint.manifest import FileFacts, Manifest, Origin
from cpt.checkpoint.mapping import Fused
from cpt.checkpoint.torch_dist import BACKEND, COMMON, CONFIG, METADATA, Record, metadata
from cpt.checkpoint.unpickle import Dtype
from cpt.checkpoint.writing import FileSums
from cpt.plan.model import ModelConfig, Parallel

_Part = bytes | Payload | Crc
_Parts = tuple[_Part, ...]
CHUNK = 64 << 20  # at most, of a chunk's values [bytes]
_ALIGN = 64  # records start at multiples of this [bytes]
_PREFIX = {
    "fully_reshardable": {MAIN: "param", **{m: m for m in MOMENTS}},
    "plain": {MAIN: "fp32_param", **{m: m for m in MOMENTS}},
}
# Modules that keep state beside their parameters (scaling factors of FP8): Megatron asks for an object of each.
_EXTRA = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
_EXTRA_TE = ("self_attention.core_attention", "self_attention.q_layernorm", "self_attention.k_layernorm")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A block of a stored tensor and its values."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    payload: Payload


def plan(content: Content, writing: Writing) -> Output:
    """The folder that holds a content.

    Raises:
        UsageError: Megatron cannot compute such a model, the layout does not fit it, or state is missing.
    """
    model, layout = content.model, writing.layout
    padded = writing.padded_vocab_size(content)
    form = _form(content, writing)
    layouts.check(model, layout, padded, cuts_layers=form == "dp_reshardable")
    spec = "te" if writing.spec == "te" else "local"
    dtypes = writing.weight_dtypes(content)
    tensors = mapping.megatron_tensors(model, padded, pad_rows=content.pad_rows)
    stacked = _can_be_stacked(model, tensors, dtypes)
    most = _most(content, dtypes)
    args = megatron_args.to_args(
        model, layout=layout, padded_vocab_size=padded, dtype=most, iteration=content.iteration, spec=writing.spec,
        vocabulary_multiple=writing.vocabulary_multiple or _multiple(content),
    )  # fmt: skip
    if content.args is not None and not megatron_args.knows_vocab_size(content.args, model):
        args["vocab_size"] = None  # nobody said how many rows are padding: that must not become a fact here
    chunks = list(_weights(content, tensors, dtypes, spec, stacked))
    objects: dict[str, Any] = dict.fromkeys(_extra_states(model, spec, stacked))
    if form == "dp_reshardable":
        assert content.optimizer is not None
        known = content.optimizer.gradients
        groups = buckets.groups(
            model, layout, padded, spec=spec, pad_rows=content.pad_rows,
            dtype_of=lambda key: dtypes[_atom(tensors[key])],
            grad_dtype=lambda dtype: buckets.grad_dtype(content.args or {}, dtype, known),
        )  # fmt: skip
        found, said = _flat(content, groups, writing)
        chunks += found
        objects |= said
    elif form != "none":
        chunks += _states(content, tensors, form, spec, stacked, most)
    random = _random_states(content, writing)
    files, records = _packed(chunks, objects, random, writing.file_bytes)
    common = pickled_common(content, writing, form, dict(content.args or {}) | args, stacked)
    draft = dataclasses.replace(_draft(content, writing, padded, most, form), rng_ranks=len(random))

    def finish(sums: Mapping[str, FileSums]) -> dict[str, bytes]:
        made = {METADATA: metadata(records), COMMON: common, CONFIG: json.dumps(BACKEND).encode()}
        facts = {name: FileFacts(size=s.size, crc32=f"{s.crc32:08x}") for name, s in sums.items()}
        facts |= {n: FileFacts(size=len(b), crc32=f"{crc32(b):08x}") for n, b in made.items()}
        manifest = dataclasses.replace(draft, files=dict(sorted(facts.items())))
        return made | {manifests.NAME: (json.dumps(manifests.with_sum(manifest), indent=2) + "\n").encode()}

    return Output(
        files=files,
        finish=finish,
        copies={name: path for name, path in content.files.items() if name != "config.json"},
        step_folder=f"iter_{content.iteration:07d}" if content.iteration else "release",
        dropped=tuple(_dropped(content, form, with_random=bool(random))),
        manifest=manifests.NAME,
    )


def _form(content: Content, writing: Writing) -> str:
    """The optimizer's form."""
    form = writing.optimizer or ("fully_reshardable" if content.has_optimizer else "none")
    if form != "none" and not content.has_optimizer:
        raise UsageError(f"`{content.path}` holds no optimizer state, so there is none to write as `{form}`")
    if form not in (*_PREFIX, "dp_reshardable", "none"):
        raise UsageError(f"`torch_dist` has no optimizer form `{form}`")
    return form


def _most(content: Content, dtypes: Mapping[str, str]) -> str:
    """The dtype of most values of the model."""
    values: dict[str, int] = {}
    for name, atom in content.atoms.items():
        values[dtypes[name]] = values.get(dtypes[name], 0) + math.prod(atom.shape)
    return max(values, key=lambda d: values[d])


def _multiple(content: Content) -> int:
    said = (content.args or {}).get("make_vocab_size_divisible_by")
    return said if isinstance(said, int) and said > 0 else 128


def _atom(fused: Fused) -> str:
    return next(f.atom for f in fused.tensor.fills if f.atom)


def _can_be_stacked(model: ModelConfig, tensors: Mapping[str, Fused], dtypes: Mapping[str, str]) -> bool:
    """Whether all layers have the same tensors of the same dtypes."""
    if model.num_experts and model.moe_dense_layers:
        return False
    kinds: dict[str, str] = {}
    return all(
        kinds.setdefault(_stored(model, key, "local", stacked=True)[0], dtypes[_atom(fused)]) == dtypes[_atom(fused)]
        for key, fused in tensors.items()
    )


def _stored(model: ModelConfig, key: str, spec: str, *, stacked: bool) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """(key, index, lengths) of a canonical tensor in its stored one: place on the leading axes, and their lengths."""
    if not key.startswith("decoder.layers."):
        return key, (), ()
    _, _, number, rest = key.split(".", 3)
    layer = int(number)
    index, lengths = ((layer,), (model.num_layers,)) if stacked else ((), ())
    if spec == "te" and mapping.has_experts(model, layer):
        rest = rest.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    experts = "mlp.experts.experts."
    if rest.startswith(experts):
        expert, rest = rest.removeprefix(experts).split(".", 1)
        rest = experts + rest
        index, lengths = (*index, int(expert)), (*lengths, model.num_experts)
    return ("decoder.layers." if stacked else f"decoder.layers.{layer}.") + rest, index, lengths


def _chunks(
    model: ModelConfig, fused: Fused, spec: str, stacked: bool, *, prefix: str, state: str, dtype: str
) -> Iterator[_Chunk]:
    """A canonical tensor as chunks of a stored one."""
    key, index, lengths = _stored(model, fused.key, spec, stacked=stacked)
    shape = fused.tensor.shape
    rows, columns = as_matrix(shape)
    most = max(1, CHUNK // max(1, columns * itemsize(dtype)))
    step = -(-rows // -(-rows // most))  # of equal pieces
    for row in range(0, rows, step):
        count = min(step, rows - row)
        fills = tuple(crop(fused.tensor.fills, row, count, 0, columns))
        payload = Payload(prefix + fused.key, state, dtype, (Segment(count, columns, fills),))
        offset = (*index, row, *[0] * (len(shape) - 1))
        yield _Chunk(prefix + key, (*lengths, *shape), offset, (*[1] * len(index), count, *shape[1:]), payload)


def _weights(
    content: Content, tensors: Mapping[str, Fused], dtypes: Mapping[str, str], spec: str, stacked: bool
) -> Iterator[_Chunk]:
    for fused in tensors.values():
        yield from _chunks(content.model, fused, spec, stacked, prefix="", state=MODEL, dtype=dtypes[_atom(fused)])


def _states(
    content: Content, tensors: Mapping[str, Fused], form: str, spec: str, stacked: bool, most: str
) -> Iterator[_Chunk]:
    """The optimizer's state in the shapes of the model."""
    for state in OPTIMIZER:
        if state == MAIN and form == "plain" and most == "float32":
            continue  # the optimizer of fp32 models updates the weights themselves
        for fused in tensors.values():
            if fused.key.endswith(".router.expert_bias"):
                continue  # no parameter
            source, dtype = _source(content, [f.atom for f in fused.tensor.fills if f.atom], state)
            prefix = f"optimizer.state.{_PREFIX[form][state]}."
            yield from _chunks(content.model, fused, spec, stacked, prefix=prefix, state=source, dtype=dtype)


def _source(content: Content, atoms: Iterable[str], state: str) -> tuple[str, str]:
    """(state to read, dtype to write) of a state of the optimizer."""
    for name in atoms:
        there = content.atoms[name].states
        if state in there:
            continue
        if state == MAIN and MODEL in there and there[MODEL].dtype == "float32":
            return MODEL, "float32"
        raise UsageError(f"`{content.path}` has no `{state}` of `{name}`")
    return state, "float32"


def _flat(content: Content, groups: Sequence[buckets.Group], writing: Writing) -> tuple[list[_Chunk], dict[str, Any]]:
    """Flat buckets, and the objects that say how long they are."""
    chunks: list[_Chunk] = []
    objects: dict[str, Any] = {}
    each = CHUNK // itemsize("float32")
    hyper = param_groups(content, writing)
    for group in groups:
        numel: list[dict[Any, list[int]]] = []
        unpadded: list[dict[Any, list[int]]] = []
        for buffer in group.buffers:
            formed = buckets.form(buffer, writing.layout.bucket_numel, group.dp)
            dtypes = tuple(Dtype(d) for d in buffer.dtypes)
            numel.append({dtypes: list(formed.padded)})
            unpadded.append({dtypes: list(formed.unpadded)})
            atoms = [f.atom for held in buffer.params for f in held.tensor.fills if f.atom]
            for state in OPTIMIZER:
                source, _ = _source(content, atoms, state)
                for bucket, length in enumerate(formed.unpadded):
                    key = group.key(buffer, bucket, state)
                    for first in range(0, length, each):
                        last = min(first + each, length)
                        values = buckets.payload(formed, bucket, state, key, source=source, first=first, last=last)
                        chunks.append(_Chunk(key, (length,), (first,), (last - first,), values))
        said = {
            "per_bucket_numel": numel,
            "per_bucket_numel_unpadded": unpadded,
            "optimizer": {"param_groups": hyper[group.chain or 0]},
        }
        objects |= {f"{group.prefix}{name}/shard_0_1": value for name, value in said.items()}
    return chunks, objects


def _extra_states(model: ModelConfig, spec: str, stacked: bool) -> Iterator[str]:
    """Names of the objects beside the tensors."""
    for layer in range(model.num_layers):
        prefix, shard = f"decoder.layers.{layer}.", "0"
        total = "1"
        if stacked:
            prefix, shard, total = "decoder.layers.", str(layer), str(model.num_layers)
        experts = mapping.has_experts(model, layer)
        names = [name for name in _EXTRA if not (experts and name.startswith("mlp."))]
        if spec == "te":
            names += [n for n in _EXTRA_TE if model.qk_norm or "layernorm" not in n]
            names += ["pre_mlp_layernorm"] if experts else []
        if experts and model.moe_shared_ffn_hidden_size:
            names += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
        for name in names:
            yield f"{prefix}{name}._extra_state/shard_{shard}_{total}"
        for e in range(model.num_experts if experts else 0):
            where = f"{shard}.{e}_{total}.{model.num_experts}" if stacked else f"{e}_{model.num_experts}"
            for name in ("linear_fc1", "linear_fc2"):
                yield f"{prefix}mlp.experts.experts.{name}._extra_state/shard_{where}"
    if spec == "te":
        yield "decoder.final_layernorm._extra_state/shard_0_1"


def _packed(
    chunks: Sequence[_Chunk], objects: Mapping[str, Any], random: Sequence[bytes], file_bytes: int
) -> tuple[tuple[OutFile, ...], list[Record]]:
    """Files, and where everything lies in them."""
    archives: dict[tuple[tuple[int, ...], str], _Parts] = {}
    files: list[OutFile] = []
    records: list[Record] = []
    made: list[_Part] = []
    at = count = 0
    each = [len(group) for group in packed([c.payload for c in chunks], file_bytes)]
    begins = set(itertools.accumulate(each[:-1]))  # number of chunks at which another file begins

    def put(key: str, parts: Iterable[_Part], chunk: _Chunk | Record) -> None:
        nonlocal at
        gap = -at % _ALIGN
        made.append(bytes(gap))
        start = at + gap
        at = start
        for p in parts:
            made.append(p)
            at += p.nbytes if isinstance(p, Payload) else 4 if isinstance(p, Crc) else len(p)
        dtype = chunk.dtype if isinstance(chunk, Record) else chunk.payload.dtype
        name = f"__{len(files)}_0.distcp"
        records.append(Record(key, chunk.shape, chunk.offset, chunk.size, dtype, name, start, at - start))

    def close() -> None:
        nonlocal made, at, count
        files.append(OutFile(f"__{len(files)}_0.distcp", tuple(p for p in made if p != b"")))
        made, at, count = [], 0, 0

    for number, chunk in enumerate(chunks):
        if number in begins:
            close()
        put(chunk.key, _archive(chunk, count, archives), chunk)
        count += 1
    nothing = torch_zip.parts([None], ())
    for key, value in objects.items():
        blank = Record(key, None, (), (), "", "", 0, 0)
        put(key, nothing if value is None else torch_zip.parts([value], ()), blank)
    for rank, state in enumerate(random):
        shape = (len(state),)
        record = Record(RANK.format(rank), shape, (0,), shape, "uint8", "", 0, 0)
        put(record.key, torch_zip.parts(torch_zip.Ref(0, shape, "uint8"), (state,)), record)
    close()
    return tuple(files), records


def _archive(chunk: _Chunk, count: int, made: dict[tuple[tuple[int, ...], str], _Parts]) -> Iterable[_Part]:
    """A chunk's record; those of equal shape differ in their values and checksum alone.

    Args:
        count: payloads before it in the file.
        made: records by shape and dtype.
    """
    kind = (chunk.size, chunk.payload.dtype)
    if kind not in made:
        made[kind] = torch_zip.parts(torch_zip.Ref(0, *kind), (chunk.payload,))
    for p in made[kind]:
        yield chunk.payload if isinstance(p, Payload) else Crc(count) if isinstance(p, Crc) else p


def param_groups(content: Content, writing: Writing) -> list[list[dict[str, Any]]]:
    """Parameter groups of each of Megatron's optimizers, without their parameters: one, or two with expert ranks.

    Megatron finds its groups by their multipliers; a source that has none gets Megatron's usual two: with weight decay,
    and without (vectors and biases).
    """
    assert content.optimizer is not None
    given = [dict(g) for g in content.optimizer.groups]
    if not given or not all("wd_mult" in g for g in given):
        first = given[0] if given else {}
        given = [
            {"wd_mult": wd, "lr_mult": 1.0, "is_decoupled_lr": False} | first | {"wd_mult": wd} for wd in (1.0, 0.0)
        ]
    for group in given:
        group.setdefault("is_expert_parallel", False)
        if isinstance(group.get("betas"), list):
            group["betas"] = tuple(group["betas"])
        group["step"] = content.optimizer.step
    dense = [g for g in given if not g["is_expert_parallel"]] or given
    experts = [g for g in given if g["is_expert_parallel"]] or [g | {"is_expert_parallel": True} for g in dense]
    return [dense, experts] if content.model.num_experts and writing.layout.ep > 1 else [dense]


def pickled_common(content: Content, writing: Writing, form: str, args: Mapping[str, Any], stacked: bool) -> bytes:
    """`common.pt`."""
    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": not stacked,
    }
    value: dict[str, Any] = {
        "args": Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": content.iteration or 0,
        **content.common,
    }
    storages: list[bytes] = []
    if form != "none":
        assert content.optimizer is not None
        optimizers = []
        for groups in param_groups(content, writing):
            made: dict[str, Any] = {"optimizer": {"param_groups": groups}, "param_state_sharding_type": form}
            if form == "dp_reshardable":
                made.pop("optimizer")
            if form == "plain":
                storages.append(struct.pack("<f", content.optimizer.step))
                step = torch_zip.Ref(len(storages) - 1, (), "float32")
                made = {"state": {"common_step": step}, "param_groups": groups}
                if args["params_dtype"] != "float32":
                    made = {"optimizer": made}
            optimizers.append(made)
        value["optimizer"] = optimizers[0] if len(optimizers) == 1 else dict(enumerate(optimizers))
        if form != "plain":
            metadata["distrib_optim_sharding_type"] = form  # type: ignore[assignment]
    value["content_metadata"] = metadata
    parts = torch_zip.parts(value, storages)
    return b"".join(p for p in parts if isinstance(p, bytes))


def _draft(content: Content, writing: Writing, padded: int, most: str, form: str) -> Manifest:
    """Our own manifest, before the files are there."""
    said = content.objects.get(MANIFEST) or {}
    step = content.iteration or 0
    optimizer = None
    if form != "none":
        assert content.optimizer is not None
        optimizer = {"step": content.optimizer.step, "groups": [dict(g) for g in content.optimizer.groups]}
    layout = writing.layout
    return Manifest(
        origin=Origin(**said["origin"]) if "origin" in said else Origin(),
        model=content.model,
        padded_vocab_size=padded,
        precision={"float32": "fp32", "bfloat16": "bf16"}.get(most, most),
        layout=Parallel(
            tp=layout.tp,
            pp=layout.pp,
            dp=layout.dp,
            vp=layout.vp,
            layers=layout.layers,
            distributed_optimizer=form != "plain",
        ),
        phase=said.get("phase", "end"),
        step=said.get("step", step),
        tokens=said.get("tokens", 0),
        progress=said.get("progress") or {"step": step},
        optimizer=optimizer,
        versions={"cpt": __version__},
    )


def _random_states(content: Content, writing: Writing) -> list[bytes]:
    """Random states of each rank, where the layout is that of the ranks that saved them."""
    said = content.objects.get(RANDOM)
    layout = writing.layout
    if said is None or list(said["layout"]) != [layout.tp, layout.pp, layout.dp, layout.vp]:
        return []
    return [base64.b64decode(text) for text in said["ranks"]]


def _dropped(content: Content, form: str, *, with_random: bool) -> Iterator[str]:
    if content.has_optimizer and form == "none":
        yield "the optimizer's state, as asked"
    if RANDOM in content.objects and not with_random:
        tp, pp, dp, _ = content.objects[RANDOM]["layout"]
        yield f"random states: they belong to the layout tp {tp} × pp {pp} × dp {dp}"
    for name in content.objects:
        if name not in (MANIFEST, RANDOM):
            yield f"`{name}`"
