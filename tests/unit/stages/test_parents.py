"""Which checkpoint a stage starts from."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from cpt.base import lock
from cpt.base.errors import UsageError
from cpt.base.files import write_json
from cpt.base.records import to_json
from cpt.checkpoint import manifest
from cpt.checkpoint.manifest import FileFacts, Manifest, Origin
from cpt.launch.batch import Inside
from cpt.plan.model import ModelConfig, Parallel
from cpt.stages import attempt, parents, state
from cpt.stages.state import State
from tests.unit.stages.plans import plan, stage

MODEL = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=4,
    vocab_size=32,
    max_position_embeddings=64,
    norm_eps=1e-5,
)


def checkpoint(stage_dir: Path, step: int, phase: str = "train", whole: bool = True) -> Path:
    """A checkpoint folder with one small file and its manifest."""
    folder = stage_dir / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"12345")
    facts = {"data": FileFacts(size=5 if whole else 6, crc32="00000000")}
    values: dict[str, Any] = {"model": MODEL, "padded_vocab_size": 128, "precision": "fp32", "layout": Parallel()}
    manifest.write(
        folder,
        Manifest(origin=Origin(), phase=phase, step=step, tokens=step, progress={}, files=facts, **values),
    )
    return folder


def done(run_dir: Path, name: str) -> Path:
    folder = run_dir / "stages" / name
    state.write(folder, State(status=state.DONE, fingerprint="f1"))
    return folder


def test_other_bytes_than_were_written_are_found_when_they_are_read(tmp_path: Path) -> None:
    folder = done(tmp_path, "domain")
    end = checkpoint(folder, 100, "end")
    assert parents.missing_result(TWO[0], folder) is None
    assert "`data`" in str(parents.missing_result(TWO[0], folder, deep=True))
    with pytest.raises(UsageError, match="which is damaged: `data`") as error:
        parents.refuse_damaged(plan(*TWO), TWO[1], end, tmp_path)
    assert error.value.hints[0].startswith(f"`cpt resume {tmp_path}` makes it again")


@pytest.mark.parametrize(("inside", "status"), [(None, state.PENDING), (Inside(id="7"), state.FAILED)])
def test_a_job_leaves_a_damaged_parent_where_status_finds_it(
    tmp_path: Path, inside: Inside | None, status: str
) -> None:
    checkpoint(done(tmp_path, "domain"), 100, "end")
    write_json(tmp_path / "plan.json", to_json(plan(*TWO)))
    with pytest.raises(UsageError, match="which is damaged"):
        attempt.begin(tmp_path, "anneal", lock.holder_of(os.getpid(), "a test"), inside)
    child = tmp_path / "stages" / "anneal"
    found = state.read(child)
    assert found.status == status
    assert (f"`cpt resume {tmp_path}` makes it again" in found.reason) == (inside is not None)
    assert lock.read_holder(child) is None and attempt.attempts(child) == []


def test_a_damaged_checkpoint_that_is_no_end_of_a_stage_says_what_mends_it(tmp_path: Path) -> None:
    folder = done(tmp_path, "domain")
    first, fork, end = checkpoint(folder, 25), checkpoint(folder, 50), checkpoint(folder, 100, "end")
    child = dataclasses.replace(TWO[1], parent_at=50)
    with pytest.raises(UsageError) as error:
        parents.refuse_damaged(plan(TWO[0], child), child, fork, tmp_path)
    assert error.value.hints == (
        f"`rm -r {fork} {end}`, then `cpt resume {tmp_path}`, makes it again from the checkpoint before it",
        "whole checkpoints of `domain` are at steps 25, 100: `stages.anneal.from=domain@25` takes another one",
    )
    outside = dataclasses.replace(child, parent=str(first))
    with pytest.raises(UsageError) as error:
        parents.refuse_damaged(plan(TWO[0], outside), outside, first, tmp_path)
    assert error.value.hints[0].startswith(f"`cpt ckpt verify {first}` names every damaged file")


TWO = (stage("domain"), stage("anneal", "domain"))


def test_a_child_starts_from_its_parents_end(tmp_path: Path) -> None:
    folder = done(tmp_path, "domain")
    checkpoint(folder, 50)
    end = checkpoint(folder, 100, "end")
    assert parents.resolve(plan(*TWO), TWO[1], tmp_path) == ("native", end)


@pytest.mark.parametrize("status", [state.PENDING, state.RUNNING, state.SAVED, state.FAILED])
def test_a_child_never_starts_on_a_parent_that_is_not_done(tmp_path: Path, status: str) -> None:
    checkpoint(tmp_path / "stages" / "domain", 100, "stop")
    state.write(tmp_path / "stages" / "domain", State(status=status))
    with pytest.raises(UsageError, match=f"`domain`, which is {status}"):
        parents.resolve(plan(*TWO), TWO[1], tmp_path)


def test_a_parent_whose_end_is_gone_is_named(tmp_path: Path) -> None:
    folder = done(tmp_path, "domain")
    checkpoint(folder, 50)
    checkpoint(folder, 100, "end", whole=False)
    with pytest.raises(UsageError, match="not of its end"):
        parents.resolve(plan(*TWO), TWO[1], tmp_path)


def test_a_fork_starts_at_its_step(tmp_path: Path) -> None:
    folder = done(tmp_path, "domain")
    fork = checkpoint(folder, 50)
    checkpoint(folder, 100, "end")
    child = stage("anneal", "domain", parent_at=50)
    assert parents.resolve(plan(TWO[0], child), child, tmp_path) == ("native", fork)
    missing = stage("anneal", "domain", parent_at=60)
    with pytest.raises(UsageError) as error:
        parents.resolve(plan(TWO[0], missing), missing, tmp_path)
    assert "at steps 50, 100" in error.value.hints[0]


def test_a_reused_parent_is_found_in_the_other_run(tmp_path: Path) -> None:
    other = tmp_path / "other" / "stages" / "domain"
    end = checkpoint(other, 100, "end")
    state.write(other, State(status=state.DONE, fingerprint="f1"))
    own = tmp_path / "run" / "stages" / "domain"
    state.write(own, State(status=state.DONE, fingerprint="f1", reference=str(other)))
    assert parents.resolve(plan(*TWO), TWO[1], tmp_path / "run") == ("native", end)


def test_an_evaluation_hands_on_what_it_measured(tmp_path: Path) -> None:
    folder = done(tmp_path, "domain")
    end = checkpoint(folder, 100, "end")
    measure = stage("measure", "domain", kind="evaluate")
    done(tmp_path, "measure")
    child = stage("anneal", "measure")
    assert parents.resolve(plan(TWO[0], measure, child), child, tmp_path) == ("native", end)


def test_a_child_of_an_export_starts_from_its_folder(tmp_path: Path) -> None:
    export = stage("export", "domain", kind="convert", options={"to": "hf"})
    folder = done(tmp_path, "export")
    child = stage("more", "export")
    with pytest.raises(UsageError, match="is missing"):
        parents.resolve(plan(TWO[0], export, child), child, tmp_path)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    assert parents.resolve(plan(TWO[0], export, child), child, tmp_path) == ("hf", folder / "hf")


def test_the_base_and_a_folder_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    one = stage("domain", str(tmp_path))
    assert parents.resolve(plan(one), one, tmp_path / "run") == ("hf", tmp_path)
    end = checkpoint(tmp_path / "native", 7, "end")
    two = stage("domain", str(tmp_path / "native"))
    assert parents.resolve(plan(two), two, tmp_path / "run") == ("native", end)
    scratch = stage("domain", None)
    assert parents.resolve(plan(scratch), scratch, tmp_path) == ("scratch", None)
