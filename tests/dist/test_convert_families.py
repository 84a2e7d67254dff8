"""Every family through every format: the same bits back, and in megatron-core the logits of transformers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint import hf_config, logits
from cpt.checkpoint.content import Layout
from cpt.checkpoint.formats import Writing
from cpt.plan.model import Parallel
from tests import hf_models
from tests.checkpoints import convert, read_safetensors, write_safetensors
from tests.dist.ranks import run_ranks

pytest.importorskip("transformers")
# Two tensors of equal shape, of layer 2, that may be mistaken for one another.
_LLAMA = (("self_attn.k_proj.weight", "self_attn.v_proj.weight"), ("mlp.gate_proj.weight", "mlp.up_proj.weight"))
SWAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        _LLAMA[0],
        ("experts.0.w1.weight", "experts.0.w3.weight"),
        ("experts.1.w2.weight", "experts.2.w2.weight"),
    ),
    "qwen2_moe": (
        ("self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        ("mlp.experts.2.gate_proj.weight", "mlp.experts.2.up_proj.weight"),
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    ),
    "qwen3_moe": (
        ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        ("mlp.experts.0.down_proj.weight", "mlp.experts.3.down_proj.weight"),
    ),
    "gpt_neox": (
        ("input_layernorm.weight", "post_attention_layernorm.weight"),
        ("attention.dense.bias", "input_layernorm.bias"),
    ),
    "gpt2": (("ln_1.weight", "ln_2.weight"), ("attn.c_proj.bias", "mlp.c_proj.bias")),
}


@dataclass(frozen=True)
class Model:
    """A random model of a family and what it computes."""

    name: str
    folder: Path
    tokens: Any
    wanted: logits.Logits

    @property
    def spec(self) -> str:
        """Whose layers can compute it."""
        return "cpt" if self.name == "gpt_neox" else "local"

    def writing(self, **layout: Any) -> Writing:
        return Writing(layout=Layout(**layout), spec=self.spec)

    @property
    def experts(self) -> int:
        """Expert ranks that the model can be cut for."""
        return 2 if self.name.endswith(("moe", "mixtral")) else 1


@pytest.fixture(scope="module", params=list(hf_models.CONVERTED))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name: str = request.param
    folder = hf_models.make(tmp_path_factory.mktemp(name) / "hf", name)
    tokens = np.random.default_rng(5).integers(0, hf_models.SIZES["vocab_size"], (1, 90))
    return Model(name, folder, tokens, logits.of_hugging_face(folder, tokens))


def same_model(a: Path, b: Path) -> bool:
    one, other = (dataclasses.replace(hf_config.read_config(f), hf_config=None) for f in (a, b))
    return one == other


@pytest.mark.parametrize(
    ("to", "layout"),
    [
        ("torch_dist", {}),
        ("torch_dist", {"tp": 2, "pp": 2, "layers": (1, 2)}),
        ("megatron", {"tp": 2, "pp": 2, "layers": (2, 1)}),
        ("atom", {}),
    ],
    ids=lambda p: p if isinstance(p, str) else "x".join(map(str, p)) or "1",
)
def test_through_another_format_and_back_are_the_same_bits(
    model: Model, tmp_path: Path, to: str, layout: dict[str, Any]
) -> None:
    if to == "megatron":
        layout = layout | {"ep": model.experts}
    there = convert(model.folder, tmp_path / "there", to, writing=model.writing(**layout))
    back = convert(there, tmp_path / "back", "hf", given=to)
    assert read_safetensors(back) == read_safetensors(model.folder)
    assert same_model(back, model.folder)


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_in_megatron_core_are_those_of_transformers(model: Model, tmp_path: Path, tp: int) -> None:
    there = convert(model.folder, tmp_path / "there", "torch_dist", writing=model.writing(tp=2))
    found = run_ranks(Parallel(tp=tp), logits.of_megatron, str(there), model.tokens)[0]
    worst = logits.difference(model.wanted, found)
    print(f"{model.name} tp {tp}: {worst:.2g}")
    assert worst <= logits.BOUND


def test_logits_of_files_by_rank_are_those_of_transformers(model: Model, tmp_path: Path) -> None:
    if model.spec == "cpt":
        with pytest.raises(UsageError, match="use_parallel_residual"):
            convert(model.folder, tmp_path / "there", "megatron")
        return
    writing = model.writing(tp=2, pp=2, layers=(2, 1), ep=model.experts)
    there = convert(model.folder, tmp_path / "there", "megatron", writing=writing)
    found = run_ranks(Parallel(tp=2), logits.of_megatron, str(there), model.tokens)[0]
    assert logits.difference(model.wanted, found) <= logits.BOUND


def test_two_swapped_tensors_of_equal_shape_are_noticed(model: Model, tmp_path: Path) -> None:
    tensors = read_safetensors(model.folder)
    values = {n: np.frombuffer(data, np.float32).reshape(shape) for n, (_, shape, data) in tensors.items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((model.folder / "config.json").read_bytes())
    for i, pair in enumerate(SWAPS.get(model.name.split("-")[0], _LLAMA)):
        a, b = (next(n for n in values if f".2.{end}" in n or (".2." in n and n.endswith(end))) for end in pair)
        assert values[a].shape == values[b].shape and a != b
        write_safetensors(tmp_path / "hf" / "model.safetensors", values | {a: values[b], b: values[a]})
        there = convert(tmp_path / "hf", tmp_path / str(i), "torch_dist", writing=model.writing())
        found = run_ranks(Parallel(), logits.of_megatron, str(there), model.tokens)[0]
        assert logits.difference(model.wanted, found) > 10 * logits.BOUND, pair


def test_what_comes_back_loads_in_transformers(model: Model, tmp_path: Path) -> None:
    """Also without the `config.json` that came along: the one that is made anew describes the same model."""
    there = convert(model.folder, tmp_path / "there", "torch_dist", writing=model.writing())
    back = convert(there, tmp_path / "back", "hf", given="torch_dist")
    made = dataclasses.replace(hf_config.read_config(back), hf_config=None)
    (back / "config.json").write_text(json.dumps(hf_config.config_for(made)))
    assert np.array_equal(logits.of_hugging_face(back, model.tokens), model.wanted)
