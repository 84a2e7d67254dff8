"""The master test: rounding rule against torch, places of every kind, and what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.checkpoint import master
from cpt.checkpoint.arrays import CARRIERS, Array, Files, Place
from cpt.checkpoint.content import Atom, Content, Optimizer
from cpt.plan.model import ModelConfig

MODEL = ModelConfig(
    family="llama",
    num_layers=1,
    hidden_size=6,
    ffn_hidden_size=7,
    num_attention_heads=1,
    num_query_groups=1,
    head_dim=4,
    vocab_size=7,
    max_position_embeddings=8,
    norm_eps=1e-5,
)
DTYPES = ("bfloat16", "float16", "float32")
EDGES = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 3e38, 65504.0, 65519.9, 65520.0, 1e-45, 6e-8, 1e-40]


def rounded(main: np.ndarray, dtype: str) -> np.ndarray:
    """By torch: the other implementation."""
    made = torch.from_numpy(main).to(getattr(torch, dtype))
    bits = torch.int16 if made.element_size() == 2 else torch.int32
    return made.view(bits).numpy().view(CARRIERS[dtype]).copy()


def stored(folder: Path, name: str, values: np.ndarray, dtype: str, *, gap: int = 0, turned: bool = False) -> Array:
    """A matrix written to a file, `gap` bytes after each row, or its transpose."""
    matrix = values.T if turned else values
    rows = [np.ascontiguousarray(row).tobytes() + b"\7" * gap for row in matrix]
    (folder / name).write_bytes(b"head" + b"".join(rows))
    stride = matrix.shape[1] * values.itemsize + gap
    at = Place(str(folder / name), 4, stride, 0, values.shape[0], 0, values.shape[1], turned)
    return Array(dtype, values.shape, (at,))


def content(folder: Path, atoms: dict[str, Atom], format: str = "torch_dist", form: str | None = None) -> Content:
    optimizer = Optimizer(step=7, form=form)
    return Content(format=format, path=folder, model=MODEL, atoms=atoms, optimizer=optimizer)


def made(folder: Path, main: np.ndarray, weight: np.ndarray, dtype: str = "bfloat16") -> Content:
    states = {"fp32": stored(folder, "main", main, "float32", gap=12), "model": stored(folder, "weight", weight, dtype)}
    return content(folder, {"w": Atom(name="w", shape=main.shape, dtype=dtype, states=states)})


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_weight_is_wrong_exactly_where_torch_rounds_otherwise(dtype: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**32, 4096, dtype=np.uint32)
    bits[::3] &= 0xFFFF8000  # ties, and values that need no rounding
    main = bits.view(np.float32)
    main[: len(EDGES)] = EDGES
    weight = rounded(main, dtype)
    assert len(master.unequal(main, "float32", weight, dtype)) == 0
    changed = np.sort(random.choice(4096, 5, replace=False))
    unsigned = weight.view(f"u{weight.itemsize}")
    unsigned[changed] ^= 1 << random.integers(0, 8 * weight.itemsize, 5).astype(unsigned.dtype)
    was, now = torch.from_numpy(main).to(getattr(torch, dtype)), torch.from_numpy(unsigned.view(f"i{weight.itemsize}"))
    still = (was.isnan() & now.view(was.dtype).isnan()).numpy()[changed]
    assert list(master.unequal(main, "float32", weight, dtype)) == list(changed[~still])


@pytest.mark.parametrize(
    ("main", "weight"),
    [(0x7F800001, 0x7F80), (0x7FFFFFFF, 0x8000), (0x7F7FFFFF, 0x7F7F), (0x80000000, 0x0000)],
)
def test_infinity_nan_and_signs_of_zero_are_not_mixed_up(main: int, weight: int) -> None:
    values = np.array([main], np.uint32).view(np.float32)
    assert list(master.unequal(values, "float32", np.array([weight], np.uint16), "bfloat16")) == [0]


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 600_000), (5000, 301)])
def test_a_wrong_value_is_found_wherever_it_is_and_by_one_share_only(tmp_path: Path, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    main = random.normal(size=shape).astype(np.float32)
    weight = rounded(main, "bfloat16")
    at = int(random.integers(0, weight.size))
    weight.reshape(-1)[at] ^= 3
    source = made(tmp_path, main, weight)
    wrong = master.Wrong(atom="w", pad=False, first=at, count=1, zeros=0, numel=weight.size)
    assert master.check(source, Files()) == [wrong]
    shares = [master.check(source, Files(), part=i, parts=3) for i in range(3)]
    assert sorted(map(len, shares)) == [0, 0, 1] and [w for s in shares for w in s] == [wrong]


def test_padding_rows_and_transposed_places_are_compared_too(tmp_path: Path) -> None:
    main = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    weight = rounded(main, "bfloat16")
    states = {
        "fp32": stored(tmp_path, "a", main, "float32", turned=True),
        "model": stored(tmp_path, "b", weight, "bfloat16"),
    }
    pad = {
        "fp32": stored(tmp_path, "c", main, "float32"),
        "model": stored(tmp_path, "d", weight + np.uint16(1), "bfloat16"),
    }
    source = content(tmp_path, {"e": Atom(name="e", shape=(6, 5), dtype="bfloat16", states=states, pad=pad)})
    wrong = master.check(source, Files())
    assert [(w.atom, w.pad, w.count) for w in wrong] == [("e", True, 30)] and master.compared(source) == 1
    assert "`e (padding rows)`" in master.refuse(source, wrong).message


def test_a_checkpoint_without_main_or_without_model_weights_has_nothing_to_compare(tmp_path: Path) -> None:
    main = stored(tmp_path, "a", np.zeros((2, 3), np.float32), "float32")
    atoms = {
        "one": Atom(name="one", shape=(2, 3), dtype="bfloat16", states={"fp32": main}),
        "two": Atom(name="two", shape=(2, 3), dtype="float32", states={"model": main}),
    }
    assert master.check(content(tmp_path, atoms), Files()) == []


@pytest.mark.parametrize(
    ("zeroed", "format", "form", "known"),
    [
        (35, "torch_dist", "fully_reshardable", True),
        (9, "torch_dist", None, True),
        (1, "torch_dist", "fully_reshardable", False),
        (35, "torch_dist", "dp_reshardable", False),
        (35, "megatron", None, False),
    ],
)
def test_the_fault_of_megatron_core_is_named_when_it_fits(
    tmp_path: Path, zeroed: int, format: str, form: str | None, known: bool
) -> None:
    main = np.random.default_rng(3).normal(size=(7, 5)).astype(np.float32)
    weight = rounded(main, "bfloat16")
    main.reshape(-1)[35 - zeroed :] = 0
    source = made(tmp_path, main, weight)
    source = content(tmp_path, dict(source.atoms), format, form)
    wrong = master.check(source, Files())
    assert [(w.count, w.zeros, w.first) for w in wrong] == [(zeroed, zeroed, 35 - zeroed)]
    error = master.refuse(source, wrong)
    said = "\n".join((error.message, *error.hints))
    assert ("0.15.0 to 0.19.2" in said) == known
    assert "in 1 of 1 tensors (`w`)" in said and "`--optimizer none`" in said
