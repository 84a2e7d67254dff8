"""`cpt convert-ckpt --logits`: what was converted computes the same in megatron-core."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import hf_models
from tests.cli.test_ckpt import cpt

pytest.importorskip("transformers")


def test_logits_are_compared_where_both_sides_compute(tmp_path: Path) -> None:
    source = hf_models.make(tmp_path / "hf", "qwen2")
    done = cpt("convert-ckpt", str(source), str(tmp_path / "out"), "--to", "torch_dist", "--logits", "--json")
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["logits"] <= 2e-6
    refused = cpt("convert-ckpt", str(source), str(tmp_path / "atom"), "--to", "atom", "--logits")
    assert refused.returncode == 2 and "cannot compare `hf` with `atom`" in refused.stderr
    assert not (tmp_path / "atom").exists()
