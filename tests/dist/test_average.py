"""Weight averages of checkpoints: exact for one, independent of the order, in fp32, at any layout."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint.average import Average, Member
from cpt.plan.model import ModelConfig, Parallel
from tests.dist.ranks import run_ranks
from tests.dist.test_checkpoint import LLAMA, Run, progress

SHARES = (0.5, 0.3, 0.2)


def save(model: ModelConfig, precision: str, folder: str, seed: int) -> None:
    """A checkpoint after two steps from weights of a seed."""
    from cpt.checkpoint import native

    run = Run(model, Parallel(), precision, seed=seed)
    run.steps(seed, 2)
    native.save(run.engine, folder, progress=progress(2))


def load_and_save(parallel: Parallel, members: list[Member], folder: str) -> None:
    """The average in an engine of a layout, saved again."""
    from cpt.checkpoint import native

    engine = Run(LLAMA, parallel, "fp32", seed=99).engine
    Average(members).load(engine)
    native.save(engine, folder, progress=progress(2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three checkpoints in each precision."""
    found: dict[str, list[Path]] = {}
    for precision in ("fp32", "bf16"):
        for seed in (1, 2, 3):
            folder = tmp_path_factory.mktemp(f"{precision}_{seed}") / "iter_0000002"
            run_ranks(Parallel(), save, LLAMA, precision, str(folder), seed)
            found.setdefault(precision, []).append(folder)
    return found


def tensors(members: list[Member]) -> dict[str, Any]:
    return dict(Average(members).tensors())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_of_one_is_that_model_unrounded(folders: Any, precision: str) -> None:
    import torch

    from cpt.checkpoint import native

    folder = folders[precision][0]
    source, _ = native.open_folder(folder)
    found = tensors([Member(folder, 0.7), Member(folders[precision][1], 0.0)])
    assert set(found) == {name for name, _ in native.tensors(folder)} and len(found) > 20
    for name, place in native.stored(source):
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], place.read(source, main=True)), name
    rounded = dict(native.tensors(folder))
    if precision == "bf16":
        assert any(not torch.equal(found[n], rounded[n].float()) for n in found)  # main weights, not rounded ones
    assert all(torch.equal(found[n].to(rounded[n].dtype), rounded[n]) for n in found)


def test_the_order_of_the_members_changes_nothing(folders: Any) -> None:
    import torch

    members = [Member(folder, share) for folder, share in zip(folders["fp32"], SHARES, strict=True)]
    first = tensors(members)
    for order in itertools.permutations(members):
        other = tensors(list(order))
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_it_is_the_weighted_sum_to_the_last_bit_of_fp32(folders: Any) -> None:
    import torch

    parts = [tensors([Member(folder, 1.0)]) for folder in folders["bf16"]]
    # Weights need not sum to 1.
    found = tensors([Member(folder, 10 * share) for folder, share in zip(folders["bf16"], SHARES, strict=True)])
    for name, value in found.items():
        wanted = sum(part[name].double() * share for part, share in zip(parts, SHARES, strict=True))
        assert torch.allclose(value.double(), wanted, rtol=1.2e-7, atol=1e-30), name


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(pp=2)], ids=["one rank", "tp 2", "pp 2"])
def test_an_engine_of_any_layout_holds_the_same_average(folders: Any, parallel: Parallel, tmp_path: Path) -> None:
    import torch

    members = [Member(folder, share) for folder, share in zip(folders["bf16"], SHARES, strict=True)]
    folder = tmp_path / "iter_0000002"
    run_ranks(parallel, load_and_save, parallel, members, str(folder))
    found = tensors([Member(folder, 1.0)])
    for name, value in tensors(members).items():
        rows = min(len(value), len(found[name]))  # padding of the vocabulary follows tp
        assert torch.equal(found[name][:rows], value[:rows]), name


def test_models_of_another_shape_and_wrong_weights_are_refused(folders: Any, tmp_path: Path) -> None:
    other = tmp_path / "iter_0000002"
    run_ranks(Parallel(), save, dataclasses.replace(LLAMA, num_layers=2), "fp32", str(other), 1)
    with pytest.raises(UsageError, match="have different model shapes"):
        Average([Member(folders["fp32"][0], 0.5), Member(other, 0.5)])
    with pytest.raises(UsageError, match="has the weight -1, wanted is a finite number"):
        Average([Member(other, -1.0)])
    with pytest.raises(UsageError, match="an average needs a checkpoint with a weight above 0"):
        Average([Member(other, 0.0)])
