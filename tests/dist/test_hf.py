"""Hugging Face models in and out: the same logits under every layout, the same bits back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.plan.model import Parallel
from tests import hf_models
from tests.dist import hf_ranks
from tests.dist.ranks import RankFailed, run_ranks
from tests.shared import shared_data

pytest.importorskip("transformers")
LAYOUTS = [Parallel(), Parallel(tp=2), Parallel(pp=2), Parallel(tp=2, pp=2)]
TOLERANCE = 1e-5  # of the largest |logit|


def text_tokens(count: int, vocab_size: int) -> np.ndarray:
    """Token ids [1, count] of real English: the licence of Python itself, byte by byte, spread over the vocabulary."""
    text = ((" ".join(str(license).split()) + " ") * 9).encode()
    import pydoc

    text = text + pydoc.plain(pydoc.render_doc(str)).encode()
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    words = (ids[:-1] * 31 + ids[1:] * 7) % vocab_size
    return words[None, :count]


def difference(folder: Path, parallel: Parallel, tokens: np.ndarray, wanted: Any) -> float:
    """Largest difference of logits to `wanted`, as a share of the largest |logit|."""
    results = [r for r in run_ranks(parallel, hf_ranks.logits, str(folder), parallel, tokens) if r is not None]
    assert len(results) == parallel.tp
    return max(float(np.abs(r - wanted.numpy()).max()) for r in results) / float(wanted.abs().max())


@pytest.fixture(scope="module", params=list(hf_models.FAMILIES))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, np.ndarray, Any]:
    name: str = request.param
    folder = hf_models.make(tmp_path_factory.mktemp(name), name)
    tokens = text_tokens(1000, hf_models.SIZES["vocab_size"])
    assert tokens.shape == (1, 1000)
    return name, folder, tokens, hf_models.reference_logits(folder, tokens)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda p: f"tp{p.tp}pp{p.pp}")
def test_imported_logits_are_those_of_transformers(model: Any, parallel: Parallel) -> None:
    _, folder, tokens, wanted = model
    assert difference(folder, parallel, tokens, wanted) <= TOLERANCE


def test_two_swapped_tensors_of_equal_shape_are_noticed(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name, folder, tokens, wanted = model
    shutil.copytree(folder, tmp_path / "swapped")
    tensors = load_file(folder / "model.safetensors")
    is_neox = name.startswith("gpt_neox")
    pairs = (
        [
            ("input_layernorm.weight", "post_attention_layernorm.weight"),
            ("input_layernorm.bias", "attention.dense.bias"),
        ]
        if is_neox
        else [("self_attn.k_proj.weight", "self_attn.v_proj.weight"), ("mlp.gate_proj.weight", "mlp.up_proj.weight")]
    )
    for pair in pairs:
        a, b = (next(t for t in sorted(tensors) if f".1.{end}" in t) for end in pair)
        swapped = tensors | {a: tensors[b], b: tensors[a]}
        save_file(swapped, tmp_path / "swapped" / "model.safetensors", metadata={"format": "pt"})
        assert difference(tmp_path / "swapped", Parallel(), tokens, wanted) > 10 * TOLERANCE


def test_export_after_no_step_gives_back_the_same_bits(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, folder, tokens, wanted = model
    out = tmp_path / "out"
    run_ranks(Parallel(), hf_ranks.export, str(folder), str(out), {"file_bytes": 60_000})
    before = load_file(folder / "model.safetensors")
    after: dict[str, Any] = {}
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        after |= load_file(file)
    assert after.keys() == before.keys()
    assert all(after[n].dtype == before[n].dtype and after[n].equal(before[n]) for n in before)
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert hf_models.reference_logits(out, tokens).equal(wanted)


def test_a_model_trained_from_scratch_is_loaded_by_transformers(tmp_path: Path) -> None:
    tokens = text_tokens(64, 301)
    for family in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox"):
        out = tmp_path / family
        ours = run_ranks(Parallel(), hf_ranks.from_scratch, family, str(out), tokens)[0]
        theirs = hf_models.reference_logits(out, tokens)
        assert np.abs(ours - theirs.numpy()).max() <= TOLERANCE * float(theirs.abs().max()), family


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda p: f"tp{p.tp}pp{p.pp}")
def test_the_real_model_stories260k_gives_the_logits_of_transformers(parallel: Parallel) -> None:
    from tokenizers import Tokenizer

    folder = shared_data("models", "stories260K")
    import gzip

    corpus = shared_data("corpora", "general_en", "valid.jsonl.gz")
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        text = "".join(json.loads(next(lines))["text"] for _ in range(2))
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    tokens = np.array(ids[:1000]).reshape(2, 500)
    assert difference(folder, parallel, tokens, hf_models.reference_logits(folder, tokens)) <= TOLERANCE


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = hf_models.make(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    bad = {
        "missing": ({k: v for k, v in tensors.items() if k != down}, f"tensor `{down}` is missing"),
        "unknown": (
            tensors | {"model.layers.1.mlp.extra": tensors[down].clone()},
            "no rule says what `model.layers.1.mlp.extra` is",
        ),
        "shape": (tensors | {down: tensors[down][:, 1:].contiguous()}, r"has shape \[48, 87\]"),
    }
    for name, (changed, message) in bad.items():
        shutil.copytree(source, tmp_path / name)
        save_file(changed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RankFailed, match=message):
            run_ranks(Parallel(), hf_ranks.load, str(tmp_path / name))
    whole = (source / "model.safetensors").read_bytes()
    shutil.copytree(source, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(RankFailed, match="its header wants"):
        run_ranks(Parallel(), hf_ranks.load, str(tmp_path / "cut"))
