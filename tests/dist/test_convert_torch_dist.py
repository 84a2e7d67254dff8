"""Converted `torch_dist` folders and megatron-core: it loads what we write, we read what it writes, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.checkpoint.arrays import CARRIERS, Files, as_matrix
from cpt.checkpoint.content import MODEL, OPTIMIZER, Content, Layout
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.formats.torch_dist import TorchDist
from cpt.plan.model import ModelConfig, Parallel
from tests import made_checkpoints
from tests.dist import legacy_ranks
from tests.dist.ranks import run_ranks
from tests.dist.test_checkpoint import (
    LLAMA,
    NEOX,
    TIED,
    Run,
    assert_equal_tensors,
    load_foreign,
    load_save_go_on,
    progress,
    train_save_go_on,
)
from tests.dist.test_convert_megatron import CASES, layout
from tests.shared import shared_data

QWEN = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, head_dim=10)


def converted(folder: Path, out: Path, writing: Writing) -> Path:
    content = TorchDist.open(folder, Reading())
    return made_checkpoints.write(content, "torch_dist", out, writing)


def layout_of(parallel: Parallel) -> Layout:
    return Layout(tp=parallel.tp, pp=parallel.pp, dp=parallel.dp, vp=parallel.vp, layers=parallel.layers)


def metadata_of(form: str | None) -> dict[str, Any]:
    from cpt.checkpoint.states import sharding_metadata

    metadata = sharding_metadata() | {"distrib_optim_sharding_type": form}
    if form is None:
        del metadata["distrib_optim_sharding_type"]
    return metadata


def loaded_by_megatron(model: ModelConfig, parallel: Parallel, form: str | None, folder: str) -> list[float]:
    """Megatron-core's own load into a fresh engine, then three steps."""
    from megatron.core import dist_checkpointing

    run = Run(model, parallel, "bf16", seed=99)
    assert run.engine.optimizer is not None
    (chunk,) = run.engine.bare_chunks()
    metadata = metadata_of(form)
    module: Any = chunk
    sharded = {"model": module.sharded_state_dict(metadata=metadata)}
    sharded["optimizer"] = run.engine.optimizer.sharded_state_dict(sharded["model"], is_loading=True, metadata=metadata)
    state = dist_checkpointing.load(sharded, folder)
    said = dist_checkpointing.load_content_metadata(folder)
    assert said["non_homogeneous_layers"] is False and said.get("distrib_optim_sharding_type") == form
    module.load_state_dict(state["model"], strict=False)
    run.engine.optimizer.load_state_dict(state["optimizer"])
    assert state["iteration"] == 3 and state["args"].num_layers == model.num_layers
    return run.steps(3, 3)


@pytest.mark.parametrize("model", [QWEN, TIED], ids=["untied", "tied"])
def test_megatron_core_loads_every_form_that_is_written_and_training_goes_on(
    model: ModelConfig, tmp_path: Path
) -> None:
    first = tmp_path / "iter_0000003"
    straight, _ = run_ranks(Parallel(dp=2), train_save_go_on, model, Parallel(dp=2), "bf16", str(first))[0]
    both = Parallel(tp=2, pp=2, layers=(3, 2) if model.num_layers == 5 else None)
    for form, parallel in (
        ("fully_reshardable", Parallel(dp=2)),
        ("fully_reshardable", both),
        ("dp_reshardable", Parallel(dp=2)),
        ("dp_reshardable", both),
        ("plain", Parallel(tp=2, distributed_optimizer=False)),
    ):
        out = tmp_path / f"{form}_{parallel.world_size}"
        writing = Writing(optimizer=form, layout=layout_of(parallel), vocabulary_multiple=128, file_bytes=100_000)
        folder = converted(first, out, writing)
        assert len(list(folder.glob("*.distcp"))) > 1
        asked = None if form == "plain" else form
        losses = run_ranks(parallel, loaded_by_megatron, model, parallel, asked, str(folder))[0]
        if parallel.dp == 2:
            assert losses == straight, form
        else:
            assert losses == pytest.approx(straight, abs=2e-2), form


@pytest.mark.parametrize(
    ("model", "precision"), [(LLAMA, "fp32"), (NEOX, "bf16")], ids=["fp32", "parallel residual, bf16"]
)
def test_our_own_checkpoints_convert_and_start_engines_at_any_layout(
    model: ModelConfig, precision: str, tmp_path: Path
) -> None:
    first = tmp_path / "first" / "iter_0000003"
    parallel = Parallel(tp=2, distributed_optimizer=False)
    straight, _ = run_ranks(parallel, train_save_go_on, model, parallel, precision, str(first))[0]
    content = TorchDist.open(first, Reading())
    assert content.model == model and content.iteration == 3 and content.layout == Layout(tp=2)
    assert content.left_out == ()
    spec = "cpt" if model.parallel_residual else "local"
    for form, other in (("fully_reshardable", Parallel(pp=2)), ("plain", parallel)):
        writing = Writing(optimizer=form, layout=layout_of(other), spec=spec)
        folder = converted(first, tmp_path / form, writing)
        copy = tmp_path / form / "copy"
        losses, warnings = run_ranks(other, load_save_go_on, model, other, precision, str(folder), str(copy))[0]
        assert_equal_tensors(first, copy)
        assert losses == pytest.approx(straight, abs=1e-5 if precision == "fp32" else 2e-2)
        same = other == parallel
        assert warnings == [] if same else "random states start anew: the checkpoint holds none" in warnings
        dropped = TorchDist.plan(content, writing).dropped
        assert dropped == (() if same else ("random states: they belong to the layout tp 2 × pp 1 × dp 1",))


def test_a_converted_golden_starts_an_engine(tmp_path: Path) -> None:
    source = shared_data("ckpt", "mcore-goldens", "td_dp_reshardable_dp2", "iter_0000007")
    folder = converted(source, tmp_path / "td", Writing())
    run_ranks(Parallel(tp=2), load_foreign, str(folder), Parallel(tp=2), str(tmp_path / "copy"))
    given, found = (TorchDist.open(f, Reading()) for f in (source, tmp_path / "copy"))
    assert_same(given, found)


def saved_by_both(model: ModelConfig, parallel: Parallel, form: str | None, change: dict[str, bool], out: str) -> None:
    """One trained state saved by us and by megatron-core itself, in another spelling."""
    from megatron.core import dist_checkpointing

    from cpt.checkpoint import native

    run = Run(model, parallel, "bf16")
    assert run.engine.optimizer is not None
    run.steps(0, 2)
    native.save(run.engine, f"{out}/ours", progress=progress(2))
    (chunk,) = run.engine.bare_chunks()
    metadata = metadata_of(form) | change
    module: Any = chunk
    state: dict[str, Any] = {"model": module.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = run.engine.optimizer.sharded_state_dict(state["model"], metadata=metadata)
    state |= {k: v for k, v in native._common(run.engine, progress(2)).items() if k in ("args", "iteration")}
    state["args"].decoder_first_pipeline_num_layers = parallel.layers[0] if parallel.layers else None
    dist_checkpointing.save(state, f"{out}/theirs")


def assert_same(one: Content, other: Content) -> None:
    assert list(one.atoms) == list(other.atoms)
    files = Files()
    for name, atom in one.atoms.items():
        for state in (MODEL, *OPTIMIZER):
            bits = []
            for array in (atom.states[state], other.atoms[name].states[state]):
                out = np.empty(as_matrix(array.shape), CARRIERS[array.dtype])
                files.read(array, 0, 0, out, array.dtype)
                bits.append(out.tobytes())
            assert bits[0] == bits[1], (name, state)
    assert one.optimizer is not None and other.optimizer is not None
    assert one.optimizer.step == other.optimizer.step


@pytest.mark.parametrize(
    ("model", "parallel", "form", "change"),
    [
        (TIED, Parallel(tp=2, dp=2, overlap_grad_reduce=True), "dp_reshardable", {}),
        (TIED, Parallel(pp=2, layers=(2, 3)), "dp_reshardable", {}),
        (QWEN, Parallel(tp=2), "fully_reshardable", {"singleton_local_shards": True}),
        (NEOX, Parallel(tp=2, distributed_optimizer=False), None, {"non_homogeneous_layers": True}),
    ],
    ids=["buckets", "buckets, tied, pp", "gate and up apart", "a key a layer"],
)
def test_what_megatron_core_saves_in_other_spellings_is_read_to_the_bit(
    model: ModelConfig, parallel: Parallel, form: str | None, change: dict[str, bool], tmp_path: Path
) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    run_ranks(parallel, saved_by_both, model, parallel, form, change, str(tmp_path))
    config = Reading()
    ours, theirs = TorchDist.open(tmp_path / "ours", config), TorchDist.open(tmp_path / "theirs", config)
    assert (tmp_path / "ours" / "manifest.json").is_file() and not (tmp_path / "theirs" / "manifest.json").exists()
    assert_same(ours, theirs)


def stock_saved(case: legacy_ranks.Case, root: str) -> Any:
    stock = legacy_ranks.Stock(case, seed=1)
    stock.train()
    stock.save_legacy(Path(root))
    return stock.where(), stock.truth()


def stock_loaded(case: legacy_ranks.Case, form: str | None, folder: str) -> Any:
    """What a stock model of other values holds after megatron-core loaded one of our folders."""
    from cpt.engine import optimizer

    legacy_ranks.METADATA["distrib_optim_sharding_type"] = form
    if form is None:
        del legacy_ranks.METADATA["distrib_optim_sharding_type"]
    if case.distributed:
        optimizer.register()
    stock = legacy_ranks.Stock(case, seed=5)
    stock.train()
    stock.load_sharded(Path(folder))
    return stock.where(), stock.truth()


@pytest.mark.parametrize("name", ["buckets", "expert ranks", "ordinary", "fp32", "fp32, distributed"])
def test_stock_models_load_state_in_model_shapes_strictly(name: str, tmp_path: Path) -> None:
    from cpt.checkpoint.formats.megatron import Megatron

    case = CASES[name]
    saved = run_ranks(case.ranks, stock_saved, case, str(tmp_path / "legacy"))
    content = Megatron.open(tmp_path / "legacy", Reading())
    form = "fully_reshardable" if case.distributed else "plain"
    folder = made_checkpoints.write(content, "torch_dist", tmp_path, Writing(layout=layout(case), optimizer=form))
    asked = form if case.distributed else None
    loaded = run_ranks(case.ranks, stock_loaded, case, asked, str(folder))
    for (where, before), (_, after) in zip(saved, loaded, strict=True):
        assert before.keys() == after.keys()
        assert [k for k in before if before[k] != after[k]] == [], where
