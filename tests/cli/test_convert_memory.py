"""Memory of a conversion: a few blocks, whatever the model's size. `benchmarks/convert.py` measures 3 GB."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpt.checkpoint import hf_config, mapping
from cpt.plan.model import ModelConfig
from tests.checkpoints import PLAIN

# The largest tensor of the large one has ten times the values of the small one's.
SMALL = replace(PLAIN, num_layers=4, hidden_size=256, ffn_hidden_size=704, vocab_size=12_001)  # about 35 MB
LARGE = replace(SMALL, num_layers=40, vocab_size=120_003)  # about 360 MB
BLOCK = 1 << 20


def write(folder: Path, model: ModelConfig) -> Path:
    """A Hugging Face folder; the same random values again and again are as good here, and quick."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config.config_for(model, "float32")))
    pool = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32).tobytes()
    header: dict[str, object] = {}
    at = 0
    tensors = mapping.hf_tensors(model)
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [at, at + 4 * tensor.numel]}
        at += 4 * tensor.numel
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for left in range(4 * tensor.numel, 0, -len(pool)):
                file.write(pool[:left])
    return folder


def peak(source: Path, out: Path, *flags: str) -> int:
    """Anonymous memory of the process that had most [bytes]."""
    command = [sys.executable, "-m", "cpt", "convert-ckpt", str(source), str(out), "--json", "--quiet", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(out)
    return int(json.loads(done.stdout)["peak_anonymous_bytes"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return write(root / "small", SMALL), write(root / "large", LARGE)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--to", "hf", "--dtype", "bf16"],
        ["--to", "atom"],
        ["--to", "torch_dist"],
        ["--to", "megatron", "--tp", "2", "--pp", "2"],
    ],
    ids=["hf", "atom", "torch_dist", "megatron"],
)
def test_a_model_ten_times_as_large_takes_no_more_memory(
    models: tuple[Path, Path], flags: list[str], workers: str, tmp_path: Path
) -> None:
    flags = [*flags, "--workers", workers, "--block", "1MiB"]
    small, large = (peak(folder, tmp_path / folder.name, *flags) for folder in models)
    assert 10e6 < large < 80e6 + 4 * BLOCK
    assert large < small + 6e6  # names and places of ten times the tensors are in it
