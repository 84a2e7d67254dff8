"""Verification of every format: what is good passes, what is wrong is found and named, what cannot be seen is said."""

from __future__ import annotations

import gc
import json
import mmap
import zlib
from pathlib import Path

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint import verify
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.content import Layout
from cpt.checkpoint.formats import Writing
from cpt.checkpoint.job import averaging, planning
from cpt.checkpoint.job.convert import convert
from cpt.checkpoint.sums import file_sums
from tests.made_checkpoints import content, write
from tests.shared import shared_data

GOLDENS = (
    "td_model_tp2pp2",
    "td_fully_reshardable_dp2",
    "td_dp_reshardable_dp2",
    "td_nodistopt_tp2",
    "legacy_tp2pp2",
    "legacy_distopt_dp2",
)


@pytest.mark.parametrize("name", GOLDENS)
def test_good_checkpoints_of_megatron_core_itself_pass(name: str) -> None:
    report = verify.inspect(shared_data("ckpt", "mcore-goldens", name, "iter_0000007"), workers=2)
    assert report.is_good and not report.odd and not report.unseen, report
    assert ("main weights against model weights of 39 tensors" in report.done) == (name != "td_model_tp2pp2")
    assert any("checksums" in d for d in report.done)


def test_the_fault_of_megatron_core_is_named() -> None:
    folder = shared_data("ckpt", "mcore-goldens", "bad_fully_reshardable_multibucket", "iter_0000007")
    (wrong,) = verify.inspect(folder).wrong
    assert "main weights are not the model's weights in 30 of 39 tensors" in wrong
    assert "megatron-core 0.15.0 to 0.19.2 writes such `fully_reshardable` checkpoints" in wrong


@pytest.mark.parametrize(("workers", "is_split"), [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize("name", ["hf", "atom", "torch_dist", "megatron"])
def test_what_is_written_here_passes_and_one_changed_main_weight_is_found(
    tmp_path: Path, name: str, workers: int, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_split:  # parts of rows, as of very wide tensors
        monkeypatch.setattr(verify, "_TURN", 1 << 8)
        monkeypatch.setattr(verify, "_BLOCK", 1 << 6)
    made = content(tmp_path / "made")
    layout = Layout(tp=2) if name == "megatron" else Layout()
    folder = write(made, name, tmp_path / name, Writing(vocabulary_multiple=8 * (3 - layout.tp), layout=layout))
    read: list[int] = []
    report = verify.inspect(folder, workers=workers, watch=read.append)
    assert report.is_good and report.format == name and sum(read) == report.nbytes > 10_000
    assert len(report.unseen) == (name == "hf")
    (place,) = made.atoms["model.norm.weight"].states["fp32"].places
    with open(place.file, "r+b") as file:
        file.seek(place.start + 8)
        file.write(np.float32(77).tobytes())
    if name in ("torch_dist", "megatron"):
        folder = write(made, name, tmp_path / "wrong", Writing(vocabulary_multiple=8 * (3 - layout.tp), layout=layout))
        (wrong,) = verify.inspect(folder, workers=workers).wrong
        assert "in 1 of 30 tensors (`model.norm.weight`)" in wrong and "damaged, or of another moment" in wrong


@pytest.mark.parametrize(
    ("name", "layout"), [("hf", Layout()), ("torch_dist", Layout(tp=2)), ("megatron", Layout(tp=2))]
)
def test_values_are_read_once_and_not_by_way_of_a_map(
    name: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(content(tmp_path / "made"), name, tmp_path / "out", Writing(vocabulary_multiple=8, layout=layout))

    class Unused(Files):
        def part(self, file: str, start: int, end: int) -> tuple[mmap.mmap | bytes, int]:
            raise AssertionError(f"{file} {start} was not read ahead")

    monkeypatch.setattr(verify, "Files", Unused)
    assert verify.verify(folder) == []


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="this system does not list what is mapped")
@pytest.mark.parametrize("name", ["hf", "atom", "torch_dist", "megatron"])
def test_what_was_verified_is_let_go_at_once(name: str, tmp_path: Path) -> None:
    """A file that is removed while it is mapped keeps its room on the disk."""
    folder = write(content(tmp_path / "made"), name, tmp_path / "out")
    gc.disable()
    try:
        assert verify.verify(folder) == []
        assert str(folder) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_values_that_are_odd_are_told_and_those_that_are_no_numbers_are_wrong(tmp_path: Path) -> None:
    made = content(tmp_path / "made", dtype="float32", optimizer=False, padded=None)
    for name, value in (
        ("model.layers.0.input_layernorm.weight", 0.0),
        ("model.layers.1.input_layernorm.weight", 1.0),
        ("model.layers.2.input_layernorm.weight", 1e-40),
    ):
        (place,) = made.atoms[name].states["model"].places
        with open(place.file, "r+b") as file:
            file.seek(place.start)
            file.write(np.full(15 if value == 1e-40 else 16, value, np.float32).tobytes())
    report = verify.inspect(write(made, "hf", tmp_path / "odd"))
    assert report.is_good and report.odd == (
        "all values are zero in `model.layers.0.input_layernorm.weight`",
        "all values are the same in `model.layers.1.input_layernorm.weight`",
        "more than 1% of the values are subnormal in `model.layers.2.input_layernorm.weight`",
    )
    (place,) = made.atoms["lm_head.weight"].states["model"].places
    with open(place.file, "r+b") as file:
        file.seek(place.start + 4 * 100)
        file.write(np.array([np.nan, np.inf, np.nan], np.float32).tobytes())
    report = verify.inspect(write(made, "hf", tmp_path / "nan"))
    assert report.wrong == ("`lm_head.weight` holds 2 NaN and 1 infinite values, the first at index 100",)


def test_a_conversion_lists_checksums_of_every_file(tmp_path: Path) -> None:
    source = write(content(tmp_path / "made", optimizer=False, padded=None), "hf", tmp_path / "hf")
    for to in ("hf", "torch_dist"):
        out = tmp_path / f"out-{to}"
        request = planning.Request(source=source, out=out, to=to, writing=Writing(vocabulary_multiple=16))
        folder = convert(planning.plan(request)).folder
        sums = file_sums(folder)
        listed = {s.file.relative_to(folder).as_posix() for s in sums}
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert there - listed <= {"conversion.json", "manifest.json"} and len(listed) >= 2
        assert all(zlib.crc32(s.file.read_bytes()) == s.crc32 for s in sums)
        assert verify.inspect(folder).unseen == ()


def test_files_that_a_manifest_lists_and_are_gone_or_cut_are_told_without_reading(tmp_path: Path) -> None:
    source = write(content(tmp_path / "made", optimizer=False, padded=None), "hf", tmp_path / "hf")
    convert(planning.plan(planning.Request(source=source, out=tmp_path / "out", to="hf")))
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").write_bytes(whole[:-2])
    (wrong,) = verify.verify(tmp_path / "out")
    assert wrong == f"`model.safetensors` has {len(whole) - 2:,} bytes instead of {len(whole):,}"
    (tmp_path / "out" / "model.safetensors").unlink()
    (wrong,) = verify.verify(tmp_path / "out")
    assert wrong == "`model.safetensors` is missing: `conversion.json` lists it"
    with pytest.raises(UsageError, match=r"has no `.safetensors` files"):
        planning.plan(planning.Request(source=tmp_path / "out", out=tmp_path / "again", to="atom"))


def test_a_folder_that_is_no_checkpoint_is_an_error_and_an_unfinished_step_is_bad(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no checkpoint: it is empty"):
        verify.inspect(tmp_path)
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"half")
    assert "is not whole: it holds nothing that is known" in verify.verify(folder)[0]
    source = write(content(tmp_path / "made"), "torch_dist", tmp_path / "td")
    (source / "manifest.json").unlink()
    (source / "metadata.json").unlink()
    assert "its save never finished" in verify.verify(source)[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_verifying_needs_little_memory_whatever_the_size(tmp_path: Path) -> None:
    import dataclasses
    import subprocess
    import sys

    from tests.made_checkpoints import LLAMA

    wide = dataclasses.replace(LLAMA, hidden_size=512, ffn_hidden_size=2000, vocab_size=8000, num_layers=2)
    folder = write(content(tmp_path / "made", wide, padded=None), "torch_dist", tmp_path / "td")
    script = """
import json, sys, threading, time
from pathlib import Path
from cpt.checkpoint import verify, find
find.known()
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
before = most = anonymous()
done = False
def look():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=look)
thread.start()
report = verify.inspect(Path(sys.argv[1]), workers=2)
done = True
thread.join()
print(json.dumps({"good": report.is_good, "bytes": report.nbytes, "grown": most - before}))
"""
    ran = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=600)
    found = json.loads(ran.stdout)
    assert found["good"] and found["bytes"] > 150 << 20
    assert found["grown"] < 60 << 20, f"{found['grown'] >> 20} MiB"


@pytest.mark.parametrize("name", ["hf", "megatron", "atom", "torch_dist"])
def test_no_conversion_uses_a_small_file_that_was_changed(tmp_path: Path, name: str) -> None:
    writing = Writing(vocabulary_multiple=16)
    source = write(content(tmp_path / "made", optimizer=name != "hf"), "torch_dist", tmp_path / "td", writing)
    request = planning.Request(source=source, out=tmp_path / "out", to=name, writing=writing)
    folder = convert(planning.plan(request)).folder
    listed = file_sums(folder)
    small = [s.file for s in listed if s.file.suffix == ".json" or s.file.name in (".metadata", "common.pt")]
    assert len(small) >= {"hf": 1, "megatron": 0, "atom": 1, "torch_dist": 3}[name]
    for file in small:
        good = file.read_bytes()
        file.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
        with pytest.raises(UsageError, match=f"`{file.relative_to(folder)}` has other bytes than were written"):
            planning.plan(planning.Request(source=tmp_path / "out", out=tmp_path / "again", to="atom"))
        with pytest.raises(UsageError, match=f"`{file.relative_to(folder)}` has other bytes than were written"):
            averaging.plan([(tmp_path / "out", 1.0)], tmp_path / "again", "hf", Writing())
        assert any(f"`{file.relative_to(folder)}` has other bytes" in line for line in verify.verify(folder))
        file.write_bytes(good)
    planning.plan(planning.Request(source=tmp_path / "out", out=tmp_path / "again", to="atom"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("torch_dist", ".metadata"),
        ("torch_dist", "common.pt"),
        ("torch_dist", "__0_0.distcp"),
        ("torch_dist", "manifest.json"),
        ("hf", "model.safetensors"),
        ("atom", "atom.json"),
        ("megatron", "mp_rank_00/model_optim_rng.pt"),
    ],
)
def test_an_empty_file_is_called_so_and_what_python_says_is_kept_from_people(
    tmp_path: Path, name: str, file: str
) -> None:
    folder = write(content(tmp_path / "made"), name, tmp_path / name)
    if file != "manifest.json":
        (folder / "manifest.json").unlink(missing_ok=True)
    (folder / file).write_bytes(b"")
    (wrong,) = verify.verify(folder)
    assert "is empty" in wrong and Path(file).name in wrong
    (folder / file).write_bytes(b"\x80\x04\x8c\x01x\x8c\x01y\x81.{")
    (wrong,) = verify.verify(folder)
    assert not any(word in wrong for word in ("Error", "Errno", "Expecting", "NEWOBJ", "codec", "mmap")), wrong


def test_a_file_of_values_that_is_gone_is_missing(tmp_path: Path) -> None:
    folder = write(content(tmp_path / "made"), "torch_dist", tmp_path / "td")
    (folder / "manifest.json").unlink()
    (folder / "__0_0.distcp").unlink()
    (wrong,) = verify.verify(folder)
    assert "`" in wrong and wrong.endswith("__0_0.distcp` is missing")
