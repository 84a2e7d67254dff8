"""The conversion job with every format: workers, kills and damage change nothing but what they must."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpt.checkpoint import find, master
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.content import Content
from cpt.checkpoint.formats import Reading
from tests import command, made_checkpoints
from tests.checkpoints import PLAIN, values, write_hf
from tests.cli.test_convert_ckpt import children, content, cpt, journal, none_lives, refused, start
from tests.shared import shared_data

MODEL = replace(made_checkpoints.LLAMA, num_layers=4, vocab_size=301)
PADDED = 384
TARGETS: dict[str, list[str]] = {
    "hf": ["--to", "hf", "--dtype", "fp32"],
    "atom": ["--to", "atom"],
    "torch_dist": ["--to", "torch_dist"],
    "dp_reshardable": ["--to", "torch_dist", "--optimizer", "dp_reshardable", "--dp", "2", "--bucket-size", "3k"],
    "plain": ["--to", "torch_dist", "--optimizer", "plain", "--tp", "2"],
    "megatron": ["--to", "megatron", "--tp", "2", "--pp", "2", "--optimizer", "plain"],
    "uneven": ["--to", "megatron", "--pp", "3", "--pipeline-layout", "first=1,last=1", "--spec", "te"],
    "none": ["--to", "megatron", "--optimizer", "none", "--tp", "2"],
}
SOURCES = ("atom", "torch_dist", "megatron")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training state in every format that holds one."""
    root = tmp_path_factory.mktemp("formats")
    given = made_checkpoints.content(root / "made", MODEL, padded=PADDED)
    return {name: made_checkpoints.write(given, name, root / name) for name in SOURCES}


def open_any(folder: Path) -> Content:
    found = find.find(folder)
    return find.known()[found.format].open(found.folder, Reading())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_two_workers_and_one_make_the_same_bytes(
    source: str, target: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    made = []
    for workers in ("1", "2"):
        out = tmp_path / workers / "out"
        flags = [*TARGETS[target], "--workers", workers, "--file-size", "40kB", "--block", "64KiB", "--verify", "full"]
        ended = command.cpt("convert-ckpt", str(sources[source]), str(out), *flags, "--json", "--quiet")
        assert ended.code == 0, ended.err
        report = json.loads(ended.out)
        assert report["reread"] and report["main_weights_compared"] == (target != "none" and source != "atom")
        if source != "megatron" or target != "hf":
            assert report["source_checksums"] > 0, "the source carries checksums, and none was verified"
        made.append(content(out))
    assert made[0] == made[1]
    assert len(made[0]) > 3


def test_every_format_gives_the_same_atoms(sources: dict[str, Path], tmp_path: Path) -> None:
    ids = set()
    for name, folder in sources.items():
        ended = command.cpt("convert-ckpt", str(folder), str(tmp_path / name), "--to", "atom")
        assert ended.code == 0, ended.err
        manifest = json.loads((tmp_path / name / "atom.json").read_text())
        ids.add(manifest["id"])
        assert manifest["conversion"]["source"]["format"] == name
    assert len(ids) == 1


def test_the_record_lies_in_the_formats_own_manifest(sources: dict[str, Path], tmp_path: Path) -> None:
    for target, name in (("atom", "atom.json"), ("torch_dist", "manifest.json"), ("megatron", "conversion.json")):
        out = tmp_path / target
        assert command.cpt("convert-ckpt", str(sources["atom"]), str(out), "--to", target).code == 0
        found = [p for p in out.rglob("*.json") if '"cpt-conversion"' in p.read_text()]
        assert [p.name for p in found] == [name]
        record = json.loads(found[0].read_text())["conversion"]
        assert record["to"] == target and record["verdict"]["source_checksums"] > 0
        again = command.cpt("convert-ckpt", str(sources["atom"]), str(out), "--to", target)
        assert again.code == 0 and "nothing to do" in again.out


def test_a_folder_of_steps_is_written_for_megatron(sources: dict[str, Path], tmp_path: Path) -> None:
    assert command.cpt("convert-ckpt", str(sources["atom"]), str(tmp_path / "out"), "--to", "torch_dist").code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "iter_0000007",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "7"
    ended = command.cpt("convert-ckpt", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "atom")
    assert ended.code == 0, ended.err
    first, last = (json.loads((p / "atom.json").read_text()) for p in (sources["atom"], tmp_path / "back"))
    assert first["id"] == last["id"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x04
    path.write_bytes(data)


@pytest.mark.parametrize("source", ["atom", "torch_dist"])
def test_a_flipped_bit_of_the_source_is_found_by_its_checksum(
    source: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    damaged = tmp_path / sources[source].name
    shutil.copytree(sources[source], damaged)
    largest = max((p for p in damaged.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    for target in ("atom", "megatron"):
        ended = command.cpt("convert-ckpt", str(damaged), str(tmp_path / "out"), "--to", target)
        refused(ended, largest.name, "checksum")
        assert not list(tmp_path.glob("out*")), "nothing half-written is left"


BIG = replace(MODEL, num_layers=4, hidden_size=192, ffn_hidden_size=520, head_dim=40, vocab_size=3001)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("big")
    made = made_checkpoints.content(root / "made", BIG, padded=3072)
    made_checkpoints.write(made, "torch_dist", root / "in")
    return root


@pytest.mark.parametrize("target", ["megatron", "torch_dist", "atom"])
def test_killed_with_optimizer_state_the_same_command_ends_with_the_same_bytes(big: Path, target: str) -> None:
    flags = [*TARGETS[target], "--file-size", "2MB", "--block", "64KiB", "--workers", "2"]
    ended = cpt(big / "in", big / f"{target}-whole", *flags)
    assert ended.returncode == 0, ended.stderr
    chance = random.Random(target)
    out = big / f"{target}-killed"
    for attempt in range(6):
        process = start(big / "in", out, *flags)
        wait = len(journal(out)) + chance.randrange(0, 2)
        partial = out.with_name(out.name + ".partial")
        while process.poll() is None and not (partial.exists() and len(journal(out)) >= wait):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        victims = children(process) if attempt % 2 else []
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(victims) if victims else process.pid, signal.SIGKILL)
        code = process.wait(30)
        none_lives(process.pid)
        if code == 0 or out.exists():  # a kill right after the renaming: it is whole
            break
    ended = cpt(big / "in", out, *flags)
    assert ended.returncode == 0, ended.stderr
    assert content(out) == content(big / f"{target}-whole")
    assert not list(big.glob(f"{out.name}.*"))


def test_the_broken_golden_is_refused_with_its_reason_and_converts_without_its_optimizer(tmp_path: Path) -> None:
    broken = shared_data("ckpt", "mcore-goldens", "bad_fully_reshardable_multibucket")
    ended = command.cpt("convert-ckpt", str(broken), str(tmp_path / "out"), "--to", "atom")
    refused(ended, "main weights are not the model's weights", "megatron-core 0.15.0 to 0.19.2", "`--optimizer none`")
    assert not list(tmp_path.iterdir())
    ended = command.cpt("convert-ckpt", str(broken), str(tmp_path / "out"), "--to", "atom", "--optimizer", "none")
    assert ended.code == 0, ended.err
    assert "optimizer" in ended.out


@pytest.mark.parametrize("middle", ["megatron", "torch_dist", "atom"])
def test_what_only_the_config_says_comes_back_from_every_format(middle: str, tmp_path: Path) -> None:
    model = replace(PLAIN, family="mistral")
    write_hf(tmp_path / "in", model, sliding_window=16, eos_token_id=2, max_position_embeddings=64)
    for source, out, to in (("in", "middle", middle), ("middle", "out", "hf")):
        ended = command.cpt("convert-ckpt", str(tmp_path / source), str(tmp_path / out), "--to", to)
        assert ended.code == 0, ended.err
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert before == after and after["sliding_window"] == 16


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("target", ["torch_dist", "dp_reshardable", "plain", "megatron", "atom"])
def test_weights_of_another_dtype_are_their_main_weights_rounded(
    dtype: str, target: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    flags = [*TARGETS[target], "--dtype", dtype, "--json", "--quiet"]
    ended = command.cpt("convert-ckpt", str(sources["torch_dist"]), str(tmp_path / "out"), *flags)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert "from the fp32 main weights" in report["weights"]
    before = open_any(sources["torch_dist"])
    count = 0
    with Files() as files:
        made = open_any(tmp_path / "out")
        assert not master.check(made, files)
        for name in before.atoms:
            main = values(before, name, "fp32").astype(np.float32)
            wanted = main.astype(np.float16) if dtype == "fp16" else main
            count += int((wanted.astype(np.float32) != main).sum())
            assert made.atoms[name].dtype == {"fp16": "float16", "fp32": "float32"}[dtype]
            if "model" in made.atoms[name].states:
                assert np.array_equal(values(made, name, "model").view(wanted.dtype), wanted)
            assert np.array_equal(values(made, name, "fp32"), main)
    assert report["rounded_values"] >= (0 if target == "atom" else count)
    assert (report["rounded_values"] == 0) == (dtype == "fp32" or target == "atom")


def test_a_hugging_face_folder_takes_the_weights_of_the_model_and_says_so(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for name, extra in (("weights", []), ("main", ["--from-master"])):
        out = str(tmp_path / name)
        flags = ["--to", "hf", "--dtype", "fp32", *extra, "--json", "--quiet"]
        ended = command.cpt("convert-ckpt", str(sources["torch_dist"]), out, *flags)
        assert ended.code == 0, ended.err
        found.append(json.loads(ended.out)["weights"])
    assert "from the model's weights; `--from-master`" in found[0] and "from the fp32 main weights" in found[1]
    made, main = (open_any(tmp_path / name) for name in ("weights", "main"))
    name = next(iter(made.atoms))
    assert not np.array_equal(values(made, name, "model"), values(main, name, "model"))


def test_an_atoms_id_is_that_of_its_state_and_not_of_the_conversion(sources: dict[str, Path], tmp_path: Path) -> None:
    reports = []
    for source in ("torch_dist", "megatron"):
        ended = command.cpt("convert-ckpt", str(sources[source]), str(tmp_path / source), "--to", "atom", "--json")
        assert ended.code == 0, ended.err
        reports.append(json.loads(ended.out))
    assert reports[0]["id"] == reports[1]["id"] == open_any(tmp_path / "megatron").id
    assert reports[0]["conversion_id"] != reports[1]["conversion_id"]
    words = ("convert-ckpt", str(sources["torch_dist"]))
    shown = command.cpt(*words, str(tmp_path / "shown"), "--to", "atom", "--workers", "7").out
    assert f"id          {reports[0]['id'][:12]}" in shown and "in one process" in shown
    there = command.cpt(*words, str(tmp_path / "shown"), "--to", "atom").out
    assert f"(id {reports[0]['id'][:12]})" in there


def test_uneven_stages_of_torch_dist_are_said_to_need_a_layout(sources: dict[str, Path], tmp_path: Path) -> None:
    said = [
        command.cpt("convert-ckpt", str(sources["atom"]), str(tmp_path / "out"), "--to", "torch_dist", *flags).out
        for flags in (["--pp", "3", "--dry-run"], ["--pp", "2", "--dry-run"])
    ]
    assert "4 layers do not divide into 3 parts" in said[0] and "do not divide" not in said[1]
