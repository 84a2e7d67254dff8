"""Hugging Face folders: every spelling of them is read, what does not fit is refused by name, bits survive."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint import export, hf_config, mapping
from cpt.checkpoint.arrays import Payload, Segment
from cpt.checkpoint.content import Content
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.formats.hf import HuggingFace, grouped
from tests.checkpoints import MODELS, PLAIN, convert, read_safetensors, tensors, values, write_hf, write_safetensors

TIED = MODELS["qwen2"]


def opened(folder: Path, **reading: Any) -> Content:
    return HuggingFace.open(folder, Reading(**reading))


def add(folder: Path, **more: np.ndarray) -> None:
    """Put tensors into a folder of one file, under names with `.` for `__`."""
    name = folder / "model.safetensors"
    old = {n: np.frombuffer(b, np.float32).reshape(s) for n, (_, s, b) in read_safetensors(folder).items()}
    write_safetensors(name, old | {n.replace("__", "."): v for n, v in more.items()})


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("bfloat16", 3)])
def test_a_folder_written_again_is_the_same(tmp_path: Path, family: str, dtype: str, shards: int) -> None:
    write_hf(tmp_path / "a", MODELS[family], dtype, shards=shards, something_new={"kept": 1})
    (tmp_path / "a" / "tokenizer.json").write_text('{"a":  1}')
    out = convert(tmp_path / "a", tmp_path / "b", "hf", writing=Writing(file_bytes=10_000))
    assert read_safetensors(out) == read_safetensors(tmp_path / "a")
    assert (out / "config.json").read_bytes() == (tmp_path / "a" / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_text() == '{"a":  1}'
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert list(mapping.hf_tensors(MODELS[family])) == [
        name for path in sorted(out.glob("*.safetensors")) for name in read_order(path)
    ]
    assert all(name in read_order(out / file) for name, file in index["weight_map"].items())


@given(sizes=st.lists(st.integers(1, 50), max_size=30), most=st.integers(1, 200))
def test_shards_are_few_and_of_about_equal_size(sizes: list[int], most: int) -> None:
    payloads = [Payload(str(i), "model", "uint8", (Segment(n, 1, ()),)) for i, n in enumerate(sizes)]
    groups = grouped(payloads, most)
    assert [p for g in groups for p in g] == payloads and all(groups)
    totals = [sum(p.nbytes for p in g) for g in groups]
    assert all(total <= most or len(g) == 1 for total, g in zip(totals, groups, strict=True))
    if max(sizes, default=0) <= most:
        assert (len(groups) - 1) * most < 2 * max(1, sum(sizes))  # two neighbours never fit into one
        assert max(totals, default=0) <= sum(sizes) / max(1, len(groups)) + max(sizes, default=0)


def read_order(path: Path) -> list[str]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [n for n in header if n != "__metadata__"]


@pytest.mark.parametrize("family", MODELS)
def test_logical_tensors_are_out_by_in(tmp_path: Path, family: str) -> None:
    made = write_hf(tmp_path / "a", MODELS[family])
    content = opened(tmp_path / "a")
    for name, shape in mapping.atom_shapes(MODELS[family]).items():
        is_conv1d = family == "gpt2" and ".h." in name and made[name].ndim == 2
        assert made[name].shape == (shape[::-1] if is_conv1d else shape)
        expected = made[name].T if is_conv1d else made[name]
        assert np.array_equal(values(content, name, "model"), expected), name


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_files_without_the_models_prefix_are_read(tmp_path: Path, family: str) -> None:
    """As the first GPT-2 was published, with the buffers that such files hold."""
    model = MODELS[family]
    made = write_hf(tmp_path / "a", model)
    prefix = next(iter(made)).split(".")[0] + "."
    older = {n.removeprefix(prefix): v for n, v in made.items()}
    mask = np.ones((1, 1, 4, 4), np.float32)
    older |= {f"h.{i}.attn.bias": mask for i in range(3)} | {"layers.0.attention.masked_bias": mask[0, 0, 0, :1]}
    older |= {"layers.0.attention.rotary_emb.inv_freq": mask[0, 0, 0]}
    write_safetensors(tmp_path / "a" / "model.safetensors", older)
    content = opened(tmp_path / "a")
    assert list(content.atoms) == list(made)
    assert content.left_out == (
        "`h.*.attn.bias` (3): computed, not a parameter",
        "`layers.*.attention.masked_bias` (1): computed, not a parameter",
        "`layers.*.attention.rotary_emb.inv_freq` (1): computed, not a parameter",
    )
    again = read_safetensors(convert(content, tmp_path / "b", "hf"))
    assert {n: v[2] for n, v in again.items()} == {n: v.tobytes() for n, v in made.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_read_as_data(tmp_path: Path, family: str, shards: int) -> None:
    torch = pytest.importorskip("torch")
    model = MODELS[family]
    made = write_hf(tmp_path / "a", model, "bfloat16")
    (tmp_path / "a" / "model.safetensors").unlink()
    state = {n: torch.from_numpy(v.view(np.int16)).view(torch.bfloat16) for n, v in made.items()}
    # Views of larger storages and of transposed ones, as real files have.
    first = next(n for n in state if n.endswith(("o_proj.weight", "c_proj.weight")))
    state[first] = state[first].t().contiguous().t()
    norm = next(n for n in state if "norm" in n or "ln_1" in n)
    state[norm] = torch.cat((state[norm], state[norm]))[model.hidden_size :]
    state = {n: torch.nn.Parameter(v, requires_grad=False) if "embed" in n else v for n, v in state.items()}
    if shards == 1:
        torch.save(state, tmp_path / "a" / "pytorch_model.bin")
    else:
        where = {n: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, n in enumerate(state)}
        for file in set(where.values()):
            torch.save({n: v for n, v in state.items() if where[n] == file}, tmp_path / "a" / file)
        (tmp_path / "a" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    content = opened(tmp_path / "a")
    assert sum(len(sums) for sums in content.crc32.values()) == len(state)
    out = read_safetensors(convert(content, tmp_path / "b", "hf"))
    assert {n: v[2] for n, v in out.items()} == {n: v.tobytes() for n, v in made.items()}


def test_a_pickle_that_would_run_code_is_data(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_hf(tmp_path / "a", PLAIN)
    (tmp_path / "a" / "model.safetensors").unlink()

    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"model.norm.weight": Bad()}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"`model.norm.weight` is not a tensor"):
        opened(tmp_path / "a")
    assert not (tmp_path / "made").exists()


def test_a_tied_copy_with_equal_bits_is_dropped_and_another_refused(tmp_path: Path) -> None:
    made = write_hf(tmp_path / "a", TIED)
    embedding = made["model.embed_tokens.weight"]
    add(tmp_path / "a", lm_head__weight=embedding)
    content = opened(tmp_path / "a")
    assert "lm_head.weight" not in content.atoms
    assert content.left_out == ("`lm_head.weight`: it is `model.embed_tokens.weight` again",)
    other = embedding.copy()
    other[-1, -1] = -0.0 if other[-1, -1] == 0.0 else np.nextafter(other[-1, -1], np.float32(9))
    add(tmp_path / "a", lm_head__weight=other)
    with pytest.raises(UsageError, match=r"`lm_head.weight` differs from `model.embed_tokens.weight`") as error:
        opened(tmp_path / "a")
    assert "`--untie`" in error.value.hints[0]
    untied = opened(tmp_path / "a", untie=True)
    assert not untied.model.tie_embeddings and not untied.left_out
    out = convert(untied, tmp_path / "b", "hf")
    assert read_safetensors(out)["lm_head.weight"][2] == other.tobytes()
    before = json.loads((tmp_path / "a" / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == before | {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model__layers__1__self_attn__q_proj__bias": 48},
            r"no rule says what `model.layers.1.self_attn.q_proj.bias`",
        ),
        ({"model__layers__1__mlp__up_proj__weight": (40, 68)}, r"has shape \[40, 68\], `config.json` says \[68, 40\]"),
        ({"model__norm__weights": 40}, r"no rule says .* \(nearest known: `model.norm.weight`\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_hf(tmp_path / "a", PLAIN)
    add(tmp_path / "a", **{n: np.ones(shape, np.float32) for n, shape in change.items()})
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / "a")


def test_missing_and_quantised_tensors_are_reported_together(tmp_path: Path) -> None:
    made = write_hf(tmp_path / "a", PLAIN)
    del made["model.norm.weight"]
    header_name = "lm_head.weight"
    write_safetensors(tmp_path / "a" / "model.safetensors", made)
    data = (tmp_path / "a" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[header_name] = header[header_name] | {"dtype": "F8_E4M3"}
    text = json.dumps(header).encode()
    (tmp_path / "a" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(UsageError, match=r"tensor `model.norm.weight` is missing") as error:
        opened(tmp_path / "a")
    assert "`lm_head.weight` has dtype `F8_E4M3`, which is not converted" in error.value.more[0].message


def test_an_index_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    write_hf(tmp_path / "a", PLAIN, shards=2)
    index = tmp_path / "a" / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    for name in ("../b/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors"):
        where["weight_map"]["lm_head.weight"] = name
        index.write_text(json.dumps(where))
        with pytest.raises(UsageError, match=r"`lm_head.weight` is in `.*`, which is not the name of a file beside it"):
            opened(tmp_path / "a")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_hf(tmp_path / "a", PLAIN, shards=3)
    (tmp_path / "a" / "model-00002-of-00003.safetensors").unlink()
    for _ in range(2):  # with the index, and without
        with pytest.raises(UsageError, match=r"model-00002-of-00003.safetensors` is missing"):
            opened(tmp_path / "a")
        (tmp_path / "a" / "model.safetensors.index.json").unlink(missing_ok=True)


def test_dtypes_change_where_asked_and_exceptions_keep_theirs(tmp_path: Path) -> None:
    made = write_hf(tmp_path / "a", PLAIN, "bfloat16")
    norm = np.linspace(0.5, 2, 40, dtype=np.float32)
    write_safetensors(tmp_path / "a" / "model.safetensors", made | {"model.norm.weight": norm}, "bfloat16")
    same = read_safetensors(convert(tmp_path / "a", tmp_path / "same", "hf"))
    assert same["model.norm.weight"] == ("F32", (40,), norm.tobytes()) and same["lm_head.weight"][0] == "BF16"
    wide = convert(tmp_path / "a", tmp_path / "wide", "hf", writing=Writing(dtype="float32"))
    found = read_safetensors(wide)
    assert found["lm_head.weight"][2] == (made["lm_head.weight"].astype(np.uint32) << 16).tobytes()
    assert json.loads((wide / "config.json").read_text())["torch_dtype"] == "float32"
    # Back to bf16: the norm was fp32 among fp32 tensors, so it is rounded with them.
    back = read_safetensors(convert(wide, tmp_path / "back", "hf", writing=Writing(dtype="bfloat16")))
    assert {n: v for n, v in back.items() if n != "model.norm.weight"} == {
        n: v for n, v in same.items() if n != "model.norm.weight"
    }
    rounded = norm.view(np.uint32) + 0x7FFF + ((norm.view(np.uint32) >> 16) & 1)
    assert back["model.norm.weight"][2] == (rounded >> 16).astype(np.uint16).tobytes()


def test_a_run_exports_the_dtype_that_is_asked_of_a_hugging_face_base_too(tmp_path: Path) -> None:
    write_hf(tmp_path / "in", PLAIN)
    for dtype, found in (("auto", "float32"), ("bf16", "bfloat16")):
        export.to_hf(tmp_path / "in", tmp_path / dtype, dtype=dtype)
        assert {a.dtype for a in opened(tmp_path / dtype).atoms.values()} == {found}
        assert hf_config.source_dtype(hf_config.read_config(tmp_path / dtype)) == found


def test_padding_is_dropped_or_kept(tmp_path: Path) -> None:
    made = write_hf(tmp_path / "a", PLAIN)
    content = opened(tmp_path / "a")
    # The same files read as a vocabulary of 53 whose other 8 rows are padding.
    model = dataclasses.replace(content.model, vocab_size=53)
    atoms = dict(content.atoms)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        array = atoms[name].states["model"]
        (place,) = array.places
        real = dataclasses.replace(array, shape=(53, 40), places=(dataclasses.replace(place, rows=53),))
        rest = dataclasses.replace(place, start=place.start + 53 * place.stride, rows=8)
        atoms[name] = dataclasses.replace(
            atoms[name],
            shape=(53, 40),
            states={"model": real},
            pad={"model": dataclasses.replace(array, shape=(8, 40), places=(rest,))},
        )
    padded = dataclasses.replace(content, model=model, atoms=atoms, padded_vocab_size=61)
    without = convert(padded, tmp_path / "without", "hf")
    assert read_safetensors(without)["lm_head.weight"] == ("F32", (53, 40), made["lm_head.weight"][:53].tobytes())
    assert json.loads((without / "config.json").read_text())["vocab_size"] == 53
    assert HuggingFace.plan(padded, Writing()).dropped == ("8 padding rows of the vocabulary",)
    kept = convert(padded, tmp_path / "kept", "hf", writing=Writing(keep_padding=True))
    assert read_safetensors(kept) == read_safetensors(tmp_path / "a")
    assert json.loads((kept / "config.json").read_text())["vocab_size"] == 61


def test_a_vocabulary_of_unknown_size_is_not_guessed(tmp_path: Path) -> None:
    write_hf(tmp_path / "a", PLAIN)
    content = opened(tmp_path / "a")
    args = {"padded_vocab_size": 61, "vocab_size": None}
    model = dataclasses.replace(content.model, hf_config=None)
    unknown = dataclasses.replace(content, model=model, args=args, padded_vocab_size=61)
    with pytest.raises(UsageError, match="does not say how many of its 61 rows"):
        HuggingFace.plan(unknown, Writing())
    HuggingFace.plan(unknown, Writing(keep_padding=True))
    known = dataclasses.replace(unknown, args=args | {"vocab_size": 61})
    assert HuggingFace.plan(known, Writing()).dropped == (
        "no `config.json` came along: a new one says `model_type: llama`, and nothing of `eos_token_id`, "
        "`bos_token_id` and what else only the first one said (`--config HF_FOLDER` brings it)",
    )


def test_neither_torch_nor_transformers_is_loaded(tmp_path: Path) -> None:
    import subprocess
    import sys

    write_hf(tmp_path / "a", MODELS["gpt2"])
    code = (
        "import sys; from pathlib import Path; from tests.checkpoints import convert;"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'hf');"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")], check=True)


def test_what_was_written_by_hand_is_what_safetensors_reads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    write_hf(tmp_path / "a", MODELS["mixtral"])
    out = convert(tmp_path / "a", tmp_path / "b", "hf")
    loaded = safetensors.load_file(out / "model.safetensors")
    made = tensors(MODELS["mixtral"])
    assert set(loaded) == set(made) and all(np.array_equal(loaded[n], made[n]) for n in made)
    assert hf_config.read_config(out) == hf_config.read_config(tmp_path / "a")
