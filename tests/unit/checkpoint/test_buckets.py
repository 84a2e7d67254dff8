"""Flat optimizer buffers: forming and walking are inverse, any cut into chunks is read, any bucket size is found."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint import bucket_search, buckets, layouts
from cpt.checkpoint.arrays import Array, Files, whole
from cpt.checkpoint.buckets import Buffer, Flat, Piece
from cpt.checkpoint.content import MAIN, Content, Layout
from cpt.checkpoint.layouts import Held
from cpt.checkpoint.writing import blocks
from cpt.plan.model import ModelConfig
from tests.made_checkpoints import LLAMA, MOE, content

TIED = dataclasses.replace(LLAMA, tie_embeddings=True)


def buffer_of(model: ModelConfig, layout: Layout, *, tp: int = 0, pp: int = 0, spec: str = "local") -> Buffer:
    held = layouts.held(model, layout, 48, tp=tp, pp=pp, spec=spec)
    (made,) = buckets.buffers(model, layout, held, pp=pp, dtype_of=lambda key: "bfloat16")
    return made


def by_megatron(sizes: list[int], alone: list[bool], bucket_size: int | None, dp: int) -> tuple[list[int], list[int]]:
    """Starts in the whole buffer and unpadded lengths of buckets.

    Source: megatron-core 0.16.1, `_ParamAndGradBuffer.__init__`, told in our own words with positions in the buffer.
    """
    multiple = math.lcm(dp, 128)
    starts, lengths = [], []
    position = bucket_start = 0
    filled = False
    for size, own in zip(reversed(sizes), reversed(alone), strict=True):
        position = -(-position // 64) * 64
        if own and filled:
            lengths.append(position - bucket_start)
            position = bucket_start = -(-position // multiple) * multiple
        starts.append(position)
        position += size
        filled = True
        if own or (bucket_size is not None and position - bucket_start >= bucket_size):
            lengths.append(position - bucket_start)
            position = bucket_start = -(-position // multiple) * multiple
            filled = False
    if filled:
        lengths.append(position - bucket_start)
    return starts, lengths


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=12),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 1500)),
    st.integers(1, 9),
)
def test_buckets_are_formed_as_megatron_forms_them_and_walked_back(
    sizes: list[int], shared: bool, bucket_size: int | None, dp: int
) -> None:
    params = tuple(Held(0, f"p{i}", f"p{i}", whole(f"p{i}", (n,)), False) for i, n in enumerate(sizes))
    alone = frozenset({"p0"} if shared else ())
    buffer = Buffer(0, ("bfloat16", "float32"), params, alone)
    formed = buckets.form(buffer, bucket_size, dp)
    starts, lengths = by_megatron(sizes, [shared and i == 0 for i in range(len(sizes))], bucket_size, dp)
    first = [0]
    for n in formed.padded:
        assert n % 128 == 0 and n % dp == 0
        first.append(first[-1] + n)
    assert [first[s.bucket] + s.start for s in formed.slots] == starts
    assert list(formed.unpadded) == lengths
    assert buckets.walk(buffer, formed.unpadded, "buffer") == formed.slots


def flat_file(source: Content, formed: buckets.Formed, state: str, path: Path) -> np.ndarray[Any, Any]:
    """A buffer's buckets one after another, without end padding."""
    files, scratch = Files(), np.empty(1 << 16, np.uint8)
    data = b"".join(
        block.tobytes()
        for bucket in range(len(formed.unpadded))
        for block in blocks(buckets.payload(formed, bucket, state, "flat"), source, files, scratch)
    )
    path.write_bytes(data)
    return np.frombuffer(data, "<f4")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parameters_are_found_whatever_the_chunks(data: Any, tmp_path: Path) -> None:
    source = content(tmp_path / "made", TIED)
    layout = Layout(tp=2, pp=3, bucket_numel=data.draw(st.integers(1, 2500)), dp=data.draw(st.integers(1, 5)))
    tp, pp = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2))
    buffer = buffer_of(TIED, layout, tp=tp, pp=pp, spec=data.draw(st.sampled_from(layouts.SPECS)))
    formed = buckets.form(buffer, layout.bucket_numel, layout.dp)
    stored = flat_file(source, formed, "exp_avg", tmp_path / "flat")
    seen = 0
    begin = 0
    for bucket, length in enumerate(formed.unpadded):
        cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=5))})
        pieces = [Piece(a, b - a, str(tmp_path / "flat"), 4 * (begin + a)) for a, b in itertools.pairwise(cuts)]
        flat = Flat("float32", length, tuple(data.draw(st.permutations(pieces))))
        for slot, atom, pad, place in buckets.places(formed.slots, bucket, flat):
            view = Files().view(place, "float32")
            truth = (source.atoms[atom].pad if pad else source.atoms[atom].states)["exp_avg"]
            out = np.empty(view.shape, "<f4")
            Files().read(truth, place.row, place.column, out, "float32")
            assert view.tobytes() == out.tobytes(), slot.held.name
            seen += view.size
        begin += length
    assert seen == sum(h.tensor.numel for h in buffer.params)
    # What lies between parameters is zero.
    starts = [sum(formed.unpadded[: s.bucket]) + s.start for s in formed.slots]
    gaps = np.ones(len(stored), bool)
    for start, slot in zip(starts, formed.slots, strict=True):
        gaps[start : start + slot.held.tensor.numel] = False
    assert not stored[gaps].any()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 4000), length=st.integers(0, 4000), size=st.integers(1, 3000))
def test_a_part_of_a_bucket_is_that_part_of_the_whole(first: int, length: int, size: int, tmp_path: Path) -> None:
    source = content(tmp_path / "made", LLAMA)
    formed = buckets.form(buffer_of(LLAMA, Layout()), size, 1)
    bucket = 0
    first = min(first, formed.unpadded[bucket])
    last = min(first + length, formed.unpadded[bucket])
    scratch = np.empty(1 << 16, np.uint8)

    def made(**span: Any) -> bytes:
        payload = buckets.payload(formed, bucket, MAIN, "flat", **span)
        return b"".join(b.tobytes() for b in blocks(payload, source, Files(), scratch))

    assert made(first=first, last=last) == made()[4 * first : 4 * last]


def searched(source: Content, buffer: Buffer, layout: Layout, folder: Path) -> tuple[Any, buckets.Formed]:
    formed = buckets.form(buffer, layout.bucket_numel, layout.dp)
    flats = {}
    for state in buckets.STATES:
        numel = len(flat_file(source, formed, state, folder / state))
        flats[state] = Flat("float32", numel, (Piece(0, numel, str(folder / state), 0),))

    def weights(atom: str, pad: bool) -> Array:
        return source.array(atom, "model", pad)

    return bucket_search.search(buffer, flats, weights, Files(), "`distrib_optim.pt`"), buckets.joined(formed)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.one_of(st.none(), st.integers(1, 3000)),
    pp=st.sampled_from((1, 3)),
    tied=st.booleans(),
    spec=st.sampled_from(layouts.SPECS),
    constant=st.booleans(),
)
def test_any_bucket_size_is_found(
    size: int | None, pp: int, tied: bool, spec: str, constant: bool, tmp_path: Path
) -> None:
    model = dataclasses.replace(LLAMA, tie_embeddings=tied, family="qwen2", qkv_bias=True)
    source = content(tmp_path / "made", model)
    if constant:
        source = with_fresh_vectors(source, tmp_path)
    layout = Layout(pp=pp, bucket_numel=size)
    for stage in range(pp):
        found, formed = searched(source, buffer_of(model, layout, pp=stage, spec=spec), layout, tmp_path)
        assert found == formed.slots


def with_fresh_vectors(source: Content, folder: Path) -> Content:
    """Weights of norms all one, as before training: shifted by a few values they look the same."""
    atoms = dict(source.atoms)
    for name, atom in source.atoms.items():
        if "norm" in name:
            numel = math.prod(atom.shape)
            (folder / "ones").write_bytes(np.ones(64, "<f4").tobytes())
            (folder / "halves").write_bytes(np.full(64, 0x3F80, "<u2").tobytes())
            states = dict(atom.states)
            for state, file, dtype in (("fp32", "ones", "float32"), ("model", "halves", "bfloat16")):
                place = dataclasses.replace(states[state].places[0], file=str(folder / file), start=0)
                assert place.rows == numel
                states[state] = Array(dtype, atom.shape, (place,))
            atoms[name] = dataclasses.replace(atom, states=states)
    return dataclasses.replace(source, atoms=atoms)


def test_of_walks_that_fit_one_whose_values_agree_is_taken(tmp_path: Path) -> None:
    """Many sizes give the same length of the whole: the length alone would take a wrong one."""
    source = content(tmp_path / "made", LLAMA)
    buffer = buffer_of(LLAMA, Layout())
    by_length: dict[int, set[Any]] = {}
    for size in (None, *range(1, 4000, 7)):
        formed = buckets.joined(buckets.form(buffer, size, 1))
        by_length.setdefault(formed.unpadded[0], set()).add(tuple(s.start for s in formed.slots))
    assert max(len(walks) for walks in by_length.values()) > 1
    found, formed = searched(source, buffer, Layout(bucket_numel=300), tmp_path)
    assert found == formed.slots


def test_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    source, other = content(tmp_path / "made", LLAMA), content(tmp_path / "other", LLAMA, seed=1)
    mixed = {
        n: dataclasses.replace(a, states={**a.states, "model": other.atoms[n].states["model"]})
        for n, a in source.atoms.items()
    }
    with pytest.raises(UsageError, match=r"with no bucket size the fp32 weights match .* `output_layer\.weight`"):
        searched(dataclasses.replace(source, atoms=mixed), buffer_of(LLAMA, Layout()), Layout(), tmp_path)


def test_a_buffer_of_another_length_is_refused(tmp_path: Path) -> None:
    buffer = buffer_of(LLAMA, Layout())
    path = tmp_path / "flat"
    path.write_bytes(bytes(4 * 500))
    flats = {s: Flat("float32", 500, (Piece(0, 500, str(path), 0),)) for s in buckets.STATES}
    with pytest.raises(UsageError, match=r"holds 500 values, the model's parameters on this rank are [\d,]+"):
        bucket_search.search(buffer, flats, lambda atom, pad: None, Files(), "`distrib_optim.pt`")


def test_lengths_that_do_not_fit_are_refused() -> None:
    buffer = buffer_of(LLAMA, Layout())
    lengths = list(buckets.form(buffer, 700, 1).unpadded)
    assert len(lengths) > 3
    with pytest.raises(UsageError, match=r"buffer 0: `decoder\..*` with \d+ values does not fit into bucket 1"):
        buckets.walk(buffer, [lengths[0], lengths[1] - 1, *lengths[2:]], "buffer 0")
    with pytest.raises(UsageError, match=r"fill \d+ buckets up to .* values, recorded are \d+"):
        buckets.walk(buffer, [*lengths, 64], "buffer 0")
    with pytest.raises(UsageError, match=r"fill \d+ buckets up to .* values, recorded are \d+"):
        buckets.walk(buffer, [*lengths[:-1], lengths[-1] + 64], "buffer 0")


@pytest.mark.parametrize(
    ("dtype", "state", "said"),
    [
        ("int16", "fp32", "`store_param_remainders`"),
        ("bfloat16", "exp_avg", "`exp_avg_dtype` other than fp32"),
        ("float16", "exp_avg_sq", "`exp_avg_sq_dtype` other than fp32"),
        ("float16", "fp32", "`main_params_dtype` other than fp32"),
    ],
)
def test_sixteen_bit_state_is_refused_by_name(dtype: str, state: str, said: str) -> None:
    buckets.require_float32("float32", state, "`x`")
    with pytest.raises(UsageError, match=said):
        buckets.require_float32(dtype, state, "`x`")


def test_groups_are_numbered_as_megatron_numbers_them() -> None:
    layout = Layout(tp=2, pp=3, ep=4, dp=4)
    made = buckets.groups(
        MOE, layout, 48, spec="local", dtype_of=lambda key: "bfloat16", grad_dtype=lambda dtype: "float32"
    )
    dense, experts = [g for g in made if g.chain == 0], [g for g in made if g.chain == 1]
    assert [(g.index, g.tp, g.pp) for g in dense] == [(pp * 2 + tp, tp, pp) for pp in range(3) for tp in range(2)]
    assert [(g.index, g.tp, g.ep, g.pp, g.dp) for g in experts] == [
        ((pp * 4 + ep) * 2 + tp, tp, ep, pp, 1) for pp in range(3) for ep in range(4) for tp in range(2)
    ]
    assert experts[5].key(experts[5].buffers[0], 2, "fp32") == (
        "chained_1.optimizer.distributed.dp_group_idx_5.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"
        ".bucket_idx_2.param"
    )
    assert all(h.is_expert for g in experts for b in g.buffers for h in b.params)
    assert not any(h.is_expert for g in dense for b in g.buffers for h in b.params)
