"""What `cpt convert-ckpt` says: its help, plans, reports and refusals, kept as a file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cpt.checkpoint.safetensors_files import read_headers
from tests import made_checkpoints
from tests.checkpoints import PLAIN, write_hf
from tests.command import cpt
from tests.golden.test_golden import same, shown

GOOD = [
    ["in", "plan", "--to", "torch_dist", "--tp", "2", "--dry-run"],
    ["in", "out", "--to", "hf", "--dtype", "bf16"],
    ["in", "out", "--to", "hf", "--dtype", "bf16"],
    ["steps", "plan", "--to", "megatron", "--tp", "2", "--pp", "3", "--optimizer", "plain", "--dry-run"],
    ["steps", "weights", "--to", "hf"],
    ["steps", "none", "--to", "atom", "--optimizer", "none", "--verify", "full"],
    ["zeros", "with_zeros", "--to", "hf"],
    ["steps", "halves", "--to", "torch_dist", "--dtype", "fp16", "--pp", "2", "--dry-run"],
    ["steps", "wide", "--to", "hf", "--dtype", "fp32", "--dry-run"],
]
WRONG = [
    [],
    ["in"],
    ["in", "new"],
    ["in", "new", "--to", "hff"],
    ["in", "new", "--to", "hf", "--tp", "2"],
    ["in", "new", "--to", "hf", "--dtype", "bf61"],
    ["in", "new", "--to", "torch_dist", "--optimizer", "adam"],
    ["in", "new", "--to", "torch_dist", "--optimizer", "plain"],
    ["in", "new", "--to", "megatron", "--tp", "3"],
    ["in", "new", "--to", "megatron", "--pp", "2"],
    ["in", "new", "--to", "megatron", "--pp", "2", "--pipeline-layout", "2;1"],
    ["in", "new", "--to", "hf", "--step", "7"],
    ["in", "in", "--to", "atom"],
    ["in", "in/new", "--to", "atom"],
    ["in", "notes", "--to", "hf"],
    ["notes", "new", "--to", "hf"],
    ["stesp", "new", "--to", "hf"],
    ["steps", "new", "--to", "hf", "--step", "8"],
    ["nan", "new", "--to", "hf"],
    ["in", "out", "--to", "hf"],
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    for name in ("in", "nan", "zeros"):
        write_hf(tmp_path / name, PLAIN)
    for name, value in (("nan", np.nan), ("zeros", 0.0)):
        place = read_headers(tmp_path / name)["model.norm.weight"]
        with open(place.file, "rb+") as file:
            file.seek(place.start)
            file.write(np.full(place.nbytes // 4, value, "<f4").tobytes())
    given = made_checkpoints.content(tmp_path / "values")
    made_checkpoints.write(given, "torch_dist", tmp_path / "steps")
    (tmp_path / "steps" / "iter_0000009").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    return tmp_path


def masked(text: str) -> str:
    """Without what differs between machines and runs."""
    text = re.sub(r"time     .*", "time     SECONDS, MB/s", text)
    text = re.sub(r"at most .* in (one process|each of \d+ processes)", "at most MEMORY in N processes", text)
    text = re.sub(r"[\d.]+ kB", "BYTES", text)
    return re.sub(r"(id  *|id |conversion  |would be )[0-9a-f]{12}", r"\1IDIDIDIDIDID", text)


def test_help(folder: Path) -> None:
    same("convert_help", cpt("convert-ckpt", "--help").out, folder)


def test_plans_and_reports(folder: Path) -> None:
    texts = []
    for arguments in GOOD:
        ended = cpt("convert-ckpt", *arguments)
        assert ended.code == 0, ended.err
        texts.append(masked(shown(["convert-ckpt", *arguments], ended)))
    same("convert_reports", "\n".join(texts), folder)


def test_refusals(folder: Path) -> None:
    assert cpt("convert-ckpt", "in", "out", "--to", "hf", "--dtype", "bf16").code == 0
    texts = []
    for arguments in WRONG:
        ended = cpt("convert-ckpt", *arguments)
        assert ended.code == 2 and ended.out == "", arguments
        texts.append(masked(shown(["convert-ckpt", *arguments], ended)))
    same("convert_refusals", "\n".join(texts), folder)
