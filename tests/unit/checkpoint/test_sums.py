"""Checksums that are put together while values are read: every byte counts, and counts once."""

from __future__ import annotations

import dataclasses
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint import find, sums, verify
from cpt.checkpoint.content import Layout
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.job import planning
from cpt.checkpoint.job.convert import convert
from cpt.checkpoint.sums import Sum, Summing, Summings, file_sums
from tests.made_checkpoints import LLAMA, MOE, content, write
from tests.shared import shared_data

GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    position_embedding="learned",
    normalization="layernorm",
    activation="gelu",
    tie_embeddings=True,
    num_query_groups=4,
    head_dim=4,
    ffn_hidden_size=64,
    qkv_bias=True,
    linear_bias=True,
)
MIXTRAL = dataclasses.replace(MOE, ffn_hidden_size=10)  # as its config can say
MODELS = {"llama": LLAMA, "tied": dataclasses.replace(LLAMA, tie_embeddings=True), "moe": MIXTRAL, "gpt2": GPT2}
CASES = [
    (model, name, layout)
    for model in MODELS
    for name, layout in (("hf", Layout()), ("torch_dist", Layout()), ("megatron", Layout(tp=2)), ("atom", Layout()))
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors, too, are read in many pieces."""
    monkeypatch.setattr(verify, "_BLOCK", 256)
    monkeypatch.setattr(verify, "_TURN", 1000)
    monkeypatch.setattr(sums, "_READ", 100)


def made(folder: Path, model: str, name: str, layout: Layout) -> Path:
    """A checkpoint with checksums of all its files."""
    writing = Writing(vocabulary_multiple=16 // layout.tp, layout=layout)
    given = content(folder / "made", MODELS[model], optimizer=name != "hf")
    source = write(given, "torch_dist", folder / "source", dataclasses.replace(writing, layout=Layout()))
    return convert(planning.plan(planning.Request(source=source, out=folder / "out", to=name, writing=writing))).folder


@pytest.mark.parametrize(("model", "name", "layout"), CASES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("workers", [1, 4])
def test_each_byte_of_a_good_checkpoint_is_read_once(
    tmp_path: Path, model: str, name: str, layout: Layout, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path, model, name, layout)
    beside: list[int] = []  # bytes summed that no value lies in
    crc32_of = sums._crc32_of

    def counted(file: Any, start: int, end: int, watch: sums.Watch) -> int | None:
        beside.append(end - start)
        return crc32_of(file, start, end, watch)

    monkeypatch.setattr(sums, "_crc32_of", counted)
    listed = file_sums(folder)
    data = [s for s in listed if s.file.suffix in (".safetensors", ".distcp", ".pt") and s.file.name != "common.pt"]
    read: list[int] = []
    report = verify.inspect(folder, workers=workers, watch=read.append)
    assert report.is_good and not report.unseen, report
    assert sum(read) == report.nbytes == sum(s.length for s in listed)
    form = find.known()[report.format].open(folder, Reading())
    places = {p for a in form.atoms.values() for x in (*a.states.values(), *a.pad.values()) for p in x.places}
    held = sum(p.rows * p.columns for p in places) * (2 if name == "hf" else 4)
    small = sum(s.length for s in listed if s not in data)
    assert sum(beside) <= 2 * small + sum(s.length for s in data) - held * (1 if name == "hf" else 0.8)


@pytest.mark.parametrize("name", ["td_model_tp2pp2", "td_nodistopt_tp2", "td_fully_reshardable_dp2", "legacy_tp2pp2"])
def test_checksums_of_formats_themselves_are_put_together_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Summings] = []
    monkeypatch.setattr(verify, "Summings", lambda of: found.append(Summings(of)) or found[-1])
    report = verify.inspect(shared_data("ckpt", "mcore-goldens", name, "iter_0000007"), workers=3)
    assert report.is_good and report.nbytes == sum(s.of.length for s in found[0].all) > 10_000


@pytest.mark.parametrize(("model", "name", "layout"), CASES[:8], ids=lambda v: v if isinstance(v, str) else "")
def test_any_byte_that_is_changed_is_found(tmp_path: Path, model: str, name: str, layout: Layout) -> None:
    folder = made(tmp_path, model, name, layout)
    chance = random.Random(f"{model} {name}")
    listed = [s for s in file_sums(folder) if s.length]
    told = 0
    for turn in range(30):
        one = listed[turn % len(listed)] if turn < len(listed) else max(listed, key=lambda s: s.length)
        good = one.file.read_bytes()
        at = chance.choice([0, one.length - 1, *(chance.randrange(one.length) for _ in range(6))])
        one.file.write_bytes(good[:at] + bytes([good[at] ^ 1 << chance.randrange(8)]) + good[at + 1 :])
        wrong = verify.verify(folder)
        assert wrong, at
        told += wrong[0].startswith(f"`{one.name}` has other bytes than were written (checksum ")
        one.file.write_bytes(good)
    assert verify.verify(folder) == []
    assert told >= 10  # others are headers that could not be opened


def test_damaged_bytes_explain_whatever_the_values_are(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama", "torch_dist", Layout())
    (file,) = [s.file for s in file_sums(folder) if s.file.suffix == ".distcp"]
    (place,) = find.known()["torch_dist"].open(folder, Reading()).atoms["lm_head.weight"].states["fp32"].places
    data = file.read_bytes()
    file.write_bytes(data[: place.start] + b"\xff" * 400 + data[place.start + 400 :])
    report = verify.inspect(folder, workers=2)
    assert len(report.wrong) == 1 and report.wrong[0].startswith(f"`{file.name}` has other bytes than were written")
    assert report.odd == () and not any(d.startswith("values of") for d in report.done)


def test_a_turn_that_fails_leaves_the_sums_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path, "llama", "torch_dist", Layout())
    block = verify._Looker._block
    calls: list[int] = []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 500:
            raise UsageError("the disk is gone")
        return block(*args)

    monkeypatch.setattr(verify._Looker, "_block", failing)
    report = verify.inspect(folder, workers=4)
    assert report.wrong == ("the disk is gone",)
    assert report.nbytes == sum(s.length for s in file_sums(folder))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_in_any_order_from_any_thread_give_the_sum_of_all(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(3000)
    (tmp_path / "file").write_bytes(data)
    start, end = chance.randrange(500), 3000 - chance.randrange(500)
    wanted = zlib.crc32(data[start:end])
    one, read = Summing(Sum(tmp_path / "file", "file", start, end - start, wanted, "x")), []
    asked = [(at, at + chance.choice([1, 7, 64, 300])) for at in chance.choices(range(3000), k=chance.choice([0, 60]))]

    def add(piece: tuple[int, int]) -> None:
        for first, last in one.take(*piece):
            read.append(last - first)
            one.note(first, last, zlib.crc32(data[first:last]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, asked))
    assert one.why_wrong(read.append) is None and sum(read) == end - start
    assert len(one._done) == 1 and len(one._taken) <= 60


def test_every_byte_of_a_sum_counts_wherever_pieces_begin(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(300)
    wanted = zlib.crc32(data)
    for at in range(300):
        changed = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        (tmp_path / "file").write_bytes(changed)
        one = Summing(Sum(tmp_path / "file", "file", 0, 300, wanted, "x", 300))
        for piece in ((40, 90), (90, 130), (200, 300), (10, 40)):
            for first, last in one.take(*piece):
                one.note(first, last, zlib.crc32(changed[first:last]))
        assert "has other bytes than were written (checksum" in (one.why_wrong() or "")


def test_sums_that_overlap_are_all_compared(tmp_path: Path) -> None:
    data = bytes(range(200))
    (tmp_path / "file").write_bytes(data)
    all_of = [
        Sum(tmp_path / "file", "file", start, length, zlib.crc32(data[start : start + length]), "x")
        for start, length in ((0, 100), (50, 100), (100, 50), (150, 50), (20, 0))
    ]
    found = Summings(all_of)
    assert [s.of for s in found.crossing(str(tmp_path / "file"), 90, 160)] == [all_of[0], all_of[2], all_of[3]]
    assert len(found.all) == 5 and all(s.why_wrong() is None for s in found.all)
    assert "was cut off" in (Summing(Sum(tmp_path / "file", "file", 150, 51, 0, "x")).why_wrong() or "")
