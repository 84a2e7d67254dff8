"""A source becomes a corpus: the same for any number of workers, whole or absent, by one process at a time."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cpt.base.errors import EnvironmentProblem, UsageError
from cpt.data import catalog, encode, prepare, split, tokenizer, worker
from cpt.data.corpus import Corpus
from cpt.data.pieces import Piece
from cpt.data.pool import encode_pieces
from cpt.data.prepare import Preparing
from cpt.data.worker import Task
from cpt.plan.types import DataOptions, Source, Tokenizer
from tests.unit.data.test_pieces import write
from tests.unit.data.test_tokenizer import WORDS

DATA = DataOptions()
FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx", "valid.bytes")


def text(number: int) -> str:
    return " ".join(WORDS[(number * k + j) % 10] for j in range(3 + number % 50) for k in (1, 3)) + f" {number}"


@pytest.fixture(scope="module")
def cache(tmp: pytest.TempPathFactory) -> Path:
    return tmp.mktemp("cache")


@pytest.fixture(scope="module")
def source(tmp: pytest.TempPathFactory) -> Source:
    path = tmp.mktemp("raw") / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(3000)), encoding="utf-8")
    return Source(name="words", paths=(str(path),), valid=0.05)


@pytest.fixture(scope="module")
def model(source: Source, cache: Path) -> str:
    return tokenizer.train([source], 300, cache)


@pytest.fixture
def many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes and small pieces, however small the source is."""
    monkeypatch.setattr(prepare, "SMALL", 0)
    cut = prepare.pieces.pieces
    monkeypatch.setattr(prepare.pieces, "pieces", lambda paths, column: cut(paths, column, 20_000))


def same(a: Corpus, b: Corpus) -> bool:
    return all((a.folder / f).read_bytes() == (b.folder / f).read_bytes() for f in FILES)


def with_file(source: Source, path: Path, **changes: object) -> Source:
    return dataclasses.replace(source, paths=(str(path),), **changes)


def test_the_corpus_holds_every_document_once_in_order_with_eos(source: Source, model: str, cache: Path) -> None:
    corpus = prepare.prepare(source, model, DATA, cache)
    reference = tokenizer.load(model)
    texts = [text(i) for i in range(3000)]
    held_out = [split.document_hash(t.encode()) < split.limit(0.05) for t in texts]
    for shard, wanted in ((corpus.train, False), (corpus.valid, True)):
        chosen = [t for t, h in zip(texts, held_out, strict=True) if h == wanted]
        assert len(shard) == len(chosen)
        for d in range(0, len(chosen), 13):
            assert shard.read(d).tolist() == [*reference.encode(chosen[d]).ids, 0]
    assert corpus.facts.tokens == corpus.train.tokens and corpus.facts.documents == len(corpus.train)
    assert corpus.facts.bytes == sum(len(t.encode()) for t, h in zip(texts, held_out, strict=True) if not h)
    assert corpus.valid_bytes().tolist() == [len(t.encode()) for t, h in zip(texts, held_out, strict=True) if h]
    assert 90 < len(corpus.valid) < 220
    assert corpus.catalog["tokenizer_hash"] == tokenizer.tokenizer_hash(model)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_order_and_content_do_not_depend_on_workers(
    source: Source, model: str, cache: Path, tmp_path: Path, many_workers: None, workers: int, packed: bool
) -> None:
    alone = prepare.prepare(source, model, DATA, cache)
    if packed:
        path = tmp_path / "words.jsonl.gz"
        path.write_bytes(gzip.compress(Path(source.paths[0]).read_bytes()))
        source = with_file(source, path)
    told: list[Preparing] = []
    corpus = prepare.prepare(source, model, DATA, tmp_path / "cache", workers, told.append)
    assert same(alone, corpus) and alone.content_hash == corpus.content_hash
    assert len(told) > 5 and told[-1].documents == 3000 and told[-1].total_bytes > 0


def test_the_reference_gives_the_same_corpus(
    source: Source, model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = prepare.prepare(source, model, DATA, cache)
    monkeypatch.setattr(encode, "choose", lambda encoding: (encode.REFERENCE, None))
    slow = prepare.prepare(source, model, DATA, tmp_path)
    assert slow.catalog["encoder"]["name"] == "tokenizers"
    assert same(fast, slow) and fast.content_hash == slow.content_hash


def test_one_wrong_document_of_the_fast_encoder_sends_the_whole_source_to_the_reference(
    source: Source, model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken")
    right = prepare.prepare(source, model, DATA, cache)
    assert right.catalog["encoder"]["name"] == "gigatoken"
    assert right.catalog["encoder"]["checked"] >= encode.CHECK_FIRST
    true = encode.Fast.encode

    def wrong(self: encode.Fast, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = true(self, texts)
        ids = ids.copy()
        if any(t == text(0) for t in texts):
            ids[0] += 1
        return ids, lengths

    monkeypatch.setattr(encode.Fast, "encode", wrong)
    told: list[Preparing] = []
    corpus = prepare.prepare(source, model, DATA, tmp_path, report=told.append)
    assert corpus.catalog["encoder"]["name"] == "tokenizers" and same(right, corpus)
    assert "other ids than the reference" in corpus.catalog["encoder"]["note"]
    assert any(t.note and "reference" in t.note for t in told)


def test_a_fast_encoder_that_breaks_down_is_replaced(
    source: Source, model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken")

    class Panic(BaseException):
        pass

    true = encode.Fast.encode

    def breaks(self: encode.Fast, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if len(texts) > 100:
            raise Panic
        return true(self, texts)

    monkeypatch.setattr(encode.Fast, "encode", breaks)
    corpus = prepare.prepare(source, model, DATA, tmp_path)
    assert corpus.catalog["encoder"]["name"] == "tokenizers"
    assert same(corpus, prepare.prepare(source, model, DATA, cache))


def test_a_second_time_nothing_is_read(
    source: Source, model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare.prepare(source, model, DATA, cache)
    monkeypatch.setattr(catalog, "raw_hash", lambda *_: pytest.fail("the raw files were read"))
    assert prepare.prepare(source, model, DATA, cache).folder == first.folder
    facts = catalog.find(source, tokenizer.tokenizer_hash(model), DATA, cache)
    assert facts == first.facts and not facts.estimated and facts.content_hash == first.content_hash


def test_touched_or_moved_files_are_hashed_and_found_again(
    source: Source, model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare.prepare(source, model, DATA, cache)
    copy = Path(shutil.copy(source.paths[0], tmp_path / "words.jsonl"))
    moved = with_file(source, copy)
    hash_ = tokenizer.tokenizer_hash(model)
    assert catalog.find(moved, hash_, DATA, cache) is None
    monkeypatch.setattr(prepare, "encode_pieces", lambda *_: pytest.fail("it was encoded again"))
    assert prepare.prepare(moved, model, DATA, cache).folder == first.folder
    os.utime(copy, (1, 1))
    assert catalog.find(moved, hash_, DATA, cache) is None
    assert prepare.prepare(moved, model, DATA, cache).folder == first.folder
    assert catalog.find(moved, hash_, DATA, cache) is not None


@pytest.mark.parametrize("what", ["content", "valid", "eos", "bos", "special"])
def test_what_changes_the_corpus_makes_another(
    source: Source, model: str, cache: Path, tmp_path: Path, what: str
) -> None:
    first = prepare.prepare(source, model, DATA, cache)
    data = DATA
    if what == "content":
        path = tmp_path / "x.jsonl"
        path.write_bytes(Path(source.paths[0]).read_bytes() + b'{"text": "more"}\n')
        source = with_file(source, path)
    elif what in ("eos", "bos"):
        data = DataOptions(bos=what == "bos", eos=what != "eos")
    else:
        source = dataclasses.replace(source, **({"valid": 0.5} if what == "valid" else {"allow_special": True}))
    other = prepare.prepare(source, model, data, cache)
    assert other.folder != first.folder
    assert (other.content_hash == first.content_hash) == (what == "special")  # there is none in the text


def test_packing_options_do_not_make_another_corpus(source: Source, model: str, cache: Path) -> None:
    options = DataOptions(reset_positions=True, mask_documents=True)
    assert prepare.prepare(source, model, options, cache).folder == prepare.prepare(source, model, DATA, cache).folder


@pytest.mark.parametrize("allow", [False, True])
def test_special_strings_in_text_are_plain_text_unless_allowed(
    source: Source, model: str, tmp_path: Path, allow: bool
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a<|endoftext|>b"}\n')
    raw = with_file(source, path, valid=0.0, allow_special=allow)
    corpus = prepare.prepare(raw, model, DataOptions(eos=False), tmp_path / "c")
    assert (0 in corpus.train.read(0).tolist()) == allow
    assert tokenizer.load(model).decode(corpus.train.read(0).tolist(), skip_special_tokens=False) == "a<|endoftext|>b"


def test_a_small_source_has_one_document_held_out_and_empty_ones_are_dropped(
    source: Source, model: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["one", "", "two", None, "three"]))
    corpus = prepare.prepare(with_file(source, path, valid=0.001), model, DATA, tmp_path / "c")
    assert (len(corpus.train), len(corpus.valid), corpus.catalog["empty_documents"]) == (2, 1, 2)
    path.write_text('{"text": "alone"}\n')
    corpus = prepare.prepare(with_file(source, path), model, DATA, tmp_path / "c")
    assert (len(corpus.train), len(corpus.valid)) == (1, 0)


def test_held_out_files_are_held_out_whole(source: Source, model: str, tmp_path: Path) -> None:
    train, valid = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train.write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(20)))
    valid.write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(100, 104)))
    corpus = prepare.prepare(with_file(source, train, valid_paths=(str(valid),)), model, DATA, tmp_path / "c")
    assert (len(corpus.train), len(corpus.valid)) == (20, 4)


def test_a_source_without_text_is_refused_and_leaves_nothing(source: Source, model: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(UsageError, match="`words` has no text"):
        prepare.prepare(with_file(source, path), model, DATA, tmp_path / "c")
    assert not list((tmp_path / "c" / "corpora").glob("[!.]*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupted_line_ends_in_one_error_that_names_it_and_nothing_is_kept(
    source: Source, model: str, tmp_path: Path, many_workers: None, workers: int
) -> None:
    lines = Path(source.paths[0]).read_bytes().splitlines()
    lines[2345] = lines[2345][:-7]
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match=r"broken.jsonl` line 2346 is not JSON"):
        prepare.prepare(with_file(source, path), model, DATA, tmp_path / "c", workers)
    assert not [p for p in (tmp_path / "c" / "corpora").iterdir() if p.is_dir()]


def test_a_corpus_that_lost_bytes_is_made_again(source: Source, model: str, tmp_path: Path) -> None:
    first = prepare.prepare(source, model, DATA, tmp_path)
    whole = (first.folder / "train.bin").read_bytes()
    (first.folder / "train.bin").write_bytes(whole[:-2])
    assert Corpus.find(first.folder) is None
    assert catalog.find(source, tokenizer.tokenizer_hash(model), DATA, tmp_path) is None
    assert (prepare.prepare(source, model, DATA, tmp_path).folder / "train.bin").read_bytes() == whole


SCRIPT = """
import sys, json
from cpt.data import prepare
from cpt.base.records import from_json
from cpt.plan.types import DataOptions, Source
source, model, cache, workers = sys.argv[1:]
prepare.SMALL = 0
cut = prepare.pieces.pieces
prepare.pieces.pieces = lambda paths, column: cut(paths, column, 5000)
print("begun", flush=True)
corpus = prepare.prepare(from_json(Source, json.loads(source)), model, DataOptions(), cache, int(workers))
print(corpus.folder, [m for m in ("torch", "hydra") if m in sys.modules], flush=True)
"""


def start(source: Source, model: str, cache: Path, workers: int) -> subprocess.Popen[str]:
    arguments = [json.dumps(dataclasses.asdict(source)), model, str(cache), str(workers)]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_killed_attempt_leaves_nothing_that_is_trusted_and_no_process(
    source: Source, model: str, cache: Path, tmp_path: Path
) -> None:
    whole = prepare.prepare(source, model, DATA, cache)
    killed = 0
    for attempt in range(4):
        process = start(source, model, tmp_path, 2)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        parts: list[Path] = []
        deadline = time.monotonic() + 60
        while not parts and process.poll() is None and time.monotonic() < deadline:
            parts = list((tmp_path / "corpora").glob(".*.part-*/train.bin")) if (tmp_path / "corpora").exists() else []
            time.sleep(0.01)
        time.sleep(0.15 * attempt)
        children = _children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += not list((tmp_path / "corpora").glob("[!.]*"))
        assert catalog.find(source, tokenizer.tokenizer_hash(model), DATA, tmp_path) is None or killed <= attempt
        gone = time.monotonic() + 60
        while any(_runs(child) for child in children) and time.monotonic() < gone:
            time.sleep(0.05)
        assert not any(_runs(child) for child in children)
    assert killed >= 1
    corpus = prepare.prepare(source, model, DATA, tmp_path)
    assert same(corpus, whole)
    assert not list((tmp_path / "corpora").glob(".*.part-*"))


def _children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _runs(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_two_processes_at_once_make_one_corpus(source: Source, model: str, cache: Path, tmp_path: Path) -> None:
    processes = [start(source, model, tmp_path, 1) for _ in range(3)]
    outputs = [p.communicate(timeout=120)[0].splitlines()[-1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0] and len(set(outputs)) == 1
    assert outputs[0].endswith(" []")  # neither torch nor Hydra were imported
    assert same(Corpus.open(outputs[0].split()[0]), prepare.prepare(source, model, DATA, cache))


def test_a_worker_that_grew_too_large_is_replaced(
    source: Source, model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "SMALL", 0)
    started = []
    from cpt.data import pool

    true = pool._Process.__init__

    def small(self: pool._Process, task: Task) -> None:
        started.append(1)
        true(self, task)

    cut = prepare.pieces.pieces
    monkeypatch.setattr(prepare.pieces, "pieces", lambda paths, column: cut(paths, column, 200_000))
    monkeypatch.setattr(pool._Process, "__init__", small)
    monkeypatch.setattr(
        pool, "_START", pool._START.replace("main(int", "import cpt.data.worker as w; w.MEMORY = 1; main(int")
    )
    corpus = prepare.prepare(source, model, DATA, tmp_path, 2)
    assert len(started) > 5 and same(corpus, prepare.prepare(source, model, DATA, cache))


def test_a_worker_that_is_killed_is_one_clear_error(model: str) -> None:
    task = Task(encode.Encoding(model, None, 0, "uint16"), encode.REFERENCE, "text", 0)
    endless = ((Piece("lines", ("x",), 1, data=b'{"text": "abc"}\n'), False, None) for _ in iter(int, 1))
    answers = encode_pieces(task, endless, 1)
    next(answers)
    (child,) = [c for c in _children(os.getpid()) if b"cpt.data.worker" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(child, signal.SIGKILL)
    with pytest.raises(EnvironmentProblem, match="killed by signal 9"):
        for _ in answers:
            pass


def test_memory_of_a_worker_is_known() -> None:
    assert 1e7 < worker.resident() < 1e11


def test_a_full_disk_is_one_clear_error_and_nothing_is_kept(source: Source, model: str, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let the test mount a small file system")
    try:
        with pytest.raises(EnvironmentProblem, match="no space left in the cache"):
            prepare.prepare(source, model, DATA, small)
        assert not [p for p in (small / "corpora").iterdir() if p.is_dir()]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_cache_that_cannot_be_written_is_one_clear_error(source: Source, model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((EnvironmentProblem, UsageError)):
        prepare.prepare(source, model, DATA, tmp_path / "file" / "cache")


def test_existing_megatron_data_is_used_where_it_lies(source: Source, model: str, cache: Path, tmp_path: Path) -> None:
    ours = prepare.prepare(dataclasses.replace(source, valid=0.0), model, DATA, cache)
    for name in ("train.bin", "train.idx"):
        shutil.copy(ours.folder / name, tmp_path / f"their.v2_{name.replace('train', 'text_document')}")
    theirs = Source(name="theirs", paths=(str(tmp_path / "their.v2_text_document.idx"),), valid=0.05)
    estimate = catalog.estimate(theirs, Tokenizer(path=model))
    corpus = prepare.prepare(theirs, model, DATA, tmp_path / "c")
    assert corpus.train.tokens + corpus.valid.tokens == ours.train.tokens
    assert estimate.tokens == pytest.approx(corpus.facts.tokens, rel=0.1) and 90 < len(corpus.valid) < 220
    assert (corpus.folder / "train.bin").is_symlink() and corpus.eos_id == 0 and corpus.bos_id is None
    documents = {tuple(ours.train.read(d).tolist()) for d in range(len(ours.train))}
    for shard in (corpus.train, corpus.valid):
        assert all(tuple(shard.read(d).tolist()) in documents for d in range(0, len(shard), 7))
    text_bytes = [len(tokenizer.load(model).decode(corpus.valid.read(d).tolist()).encode()) for d in range(5)]
    assert corpus.valid_bytes()[:5].tolist() == text_bytes
    assert corpus.facts.bytes == pytest.approx(ours.facts.bytes * 0.95, rel=0.05)
    assert prepare.prepare(theirs, model, DATA, tmp_path / "c").folder == corpus.folder
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = indexed.IndexedDataset(str(corpus.folder / "valid"))
    assert dataset[3].tolist() == corpus.valid.read(3).tolist()


def test_megatron_data_of_another_tokenizer_is_refused(source: Source, model: str, cache: Path, tmp_path: Path) -> None:
    from tests.unit.data.made import corpus

    made = corpus(tmp_path / "m", [500, 600])
    theirs = Source(name="theirs", paths=(str(made.folder / "train.bin"),))
    with pytest.raises(UsageError, match="another tokenizer"):
        prepare.prepare(theirs, model, DATA, tmp_path / "c")
    (made.folder / "train.idx").unlink()
    with pytest.raises(UsageError, match="pair of files"):
        catalog.identity(theirs)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".feather", ".txt"])
def test_an_estimate_is_near_the_truth(source: Source, model: str, cache: Path, tmp_path: Path, suffix: str) -> None:
    texts = [text(i) for i in range(3000)]
    if suffix == ".txt":
        paths = [tmp_path / f"{i:04}.txt" for i in range(50, 90)]
        for i, path in enumerate(paths):
            path.write_text(" ".join(texts[i * 10 : i * 10 + 9]))
        source = dataclasses.replace(source, paths=tuple(map(str, paths)))
    elif suffix != ".jsonl":
        source = with_file(source, Path(write(tmp_path / f"x{suffix}", texts)))
    found = catalog.estimate(source, Tokenizer(path=model))
    true = prepare.prepare(source, model, DATA, cache).facts
    assert found.estimated and found.content_hash is None
    assert found.tokens == pytest.approx(true.tokens, rel=0.1)
    assert found.documents == pytest.approx(true.documents, rel=0.1)
    assert found.bytes == pytest.approx(true.bytes, rel=0.1)


def test_the_catalog_lists_what_is_prepared(source: Source, model: str, cache: Path) -> None:
    corpus = prepare.prepare(source, model, DATA, cache)
    prepare.prepare(dataclasses.replace(source, name="again"), model, DATA, cache)
    entry = next(e for e in catalog.entries(cache) if e.corpus.folder == corpus.folder)
    assert set(entry.names) >= {"words"}
    assert catalog.tokenizer_copy(corpus) is not None
