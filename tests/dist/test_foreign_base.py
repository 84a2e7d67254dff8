"""Runs that start from checkpoints of other formats: converted first, and gone on with as from the native one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpt.base.files import read_json, read_lines
from cpt.checkpoint import store
from tests.dist import killing
from tests.dist.killing import ROOT, Runs

COMMON = (
    killing.TOPICS
    + """
train:
  seq_length: 64
  global_batch_size: 4
  micro_batch_size: 1
  precision: fp32
  broken_import_guard: false
  evaluate: {tokens: 1024}
"""
)
FIRST = (
    COMMON
    + """
base: scratch
model: {family: llama, num_layers: 3, hidden_size: 32, ffn_hidden_size: 52, num_attention_heads: 4, num_query_groups: 2}
tokenizer: {train_on: [even, odd], vocab_size: 389}
stages:
  domain:
    from: base
    tokens: 1024
    mixture: {even: 0.7, odd: 0.3}
    lr: {schedule: constant, peak: 1e-3}
    parallel: {tp: 2}
  ranks: {kind: convert, from: domain, to: megatron, tp: 2, pp: 3}
"""
)
AGAIN = (
    COMMON
    + """
base: {checkpoint: "@"}
stages:
  more:
    from: base
    keep: [weights, optimizer]
    tokens: 1024
    mixture: {odd: 1}
    lr: {schedule: constant, peak: 1e-3}
"""
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of one stage, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "first.yaml").write_text(FIRST)
    (folder / "recipes" / "again.yaml").write_text(AGAIN)
    killing.write_topics(folder)
    found = Runs(folder, recipe="first")
    done = found.finish("first")
    assert done.process.returncode == 0, done.text()[-4000:]
    return Runs(folder, recipe="again")


def convert(source: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "cpt", "convert-ckpt", str(source), str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out


def losses(runs: Runs, name: str, base: Path, tokenizer: str) -> tuple[list[float], Any]:
    """Every training loss of a run from a base, and the job that its ranks got."""
    done = runs.finish(name, f"base.checkpoint={base}", f"tokenizer.path={tokenizer}")
    assert done.process.returncode == 0, done.text()[-4000:]
    attempt = runs.folder / name / "it" / "stages" / "more" / "attempt_1"
    found = [e["loss"] for e in read_lines(attempt / "events.jsonl") if e["kind"] == "step"]
    assert len(found) == 4
    return found, read_json(attempt / "job.json")


def test_a_run_goes_on_from_any_format_as_from_our_own(trained: Runs, tmp_path: Path) -> None:
    run_dir = trained.folder / "first" / "it"
    newest, _ = store.newest_whole(run_dir / "stages" / "domain" / "checkpoints")
    assert newest is not None
    tokenizer = read_json(run_dir / "prepared.json")["tokenizer"]
    straight, job = losses(trained, "native", newest, tokenizer)
    assert job["parent"] == str(newest)
    bases = {
        "megatron": run_dir / "stages" / "ranks" / "megatron",
        "buckets": convert(
            newest, tmp_path / "buckets", "--to", "torch_dist", "--optimizer", "dp_reshardable", "--tp", "2",
            "--bucket-size", "5000", "--dp", "2",
        ),
        "atom": convert(newest, tmp_path / "atom", "--to", "atom"),
    }  # fmt: skip
    for name, base in bases.items():
        found, job = losses(trained, name, base, tokenizer)
        assert found == straight, name
        assert job["start"] == "native" and "/cache/checkpoints/" in job["parent"]
    converted = {Path(p).parent for p in [job["parent"]]}
    assert all(store.resolve(folder).name == newest.name for folder in converted)
