"""Tokenising a corpus end to end against the raw batch speed of `tokenizers`, on two cores of this machine.

    python -m benchmarks.tokenise [--rounds 3] [--vocab 8192] [--json]

Ours: hash the raw files, read and parse them, split, encode, check, write shards, sync, catalog: what `cpt data
prepare` does with an empty cache, which at this size is one process; and the same forced into two processes. Theirs:
`Tokenizer.encode_batch_fast` over texts that are in memory already, with all its threads. Both run in turns, so that
other load meets both; the ratio is the median of the ratios of the rounds. Then all our ids are compared with theirs.

Text: the 12 textbooks of `$CPT_SHARED` (or `../shared`) where that is there, else the documentation on this machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt.data import prepare, readers, split, tokenizer
from cpt.data.corpus import Corpus
from cpt.plan.types import DataOptions, Source

TARGET = 4.0
SMALL = prepare.SMALL


def raw_lines(cache: Path) -> tuple[bytes, str]:
    """The corpus as JSON lines, and what it is."""
    shared = Path(os.environ.get("CPT_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    book = shared / "data" / "corpora" / "general_en" / "train.jsonl.gz"
    if book.is_file():
        return gzip.decompress(book.read_bytes()), "12 textbooks"
    docs = readers.files(Source(name="docs", reader="python_docs"), cache)[0]
    return Path(docs).read_bytes() * 3, "library documentation, three times"


def ours(source: Source, model: str, folder: Path, processes: bool) -> tuple[float, Corpus]:
    """Seconds of a whole preparation into an empty cache, and its result."""
    shutil.rmtree(folder, ignore_errors=True)
    prepare.SMALL = 0 if processes else SMALL
    start = time.perf_counter()
    corpus = prepare.prepare(source, model, DataOptions(), folder, workers=2)
    return time.perf_counter() - start, corpus


def theirs(texts: list[str], model: Any) -> tuple[float, list[Any]]:
    """Seconds of the raw library for the same texts, and its encodings."""
    start = time.perf_counter()
    found = model.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - start, found


def same_ids(corpus: Corpus, texts: list[str], encodings: list[Any], share: float) -> bool:
    """Whether every document of the corpus holds the ids of the raw library and EOS, in order."""
    places = {True: 0, False: 0}
    for text, encoding in zip(texts, encodings, strict=True):
        held_out = split.document_hash(text.encode()) < split.limit(share)
        shard = corpus.valid if held_out else corpus.train
        if shard.read(places[held_out]).tolist() != [*encoding.ids, corpus.eos_id]:
            return False
        places[held_out] += 1
    return places == {True: len(corpus.valid), False: len(corpus.train)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when the target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenise")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)  # inherited by the workers, and by the library's threads
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(len(cores))
    with tempfile.TemporaryDirectory(prefix="cpt-bench-") as name:
        found = measure(Path(name), chosen.rounds, chosen.vocab)
    ok = found["ratio"] >= TARGET and found["same_ids"]
    if chosen.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"text        {found['text']}, {found['megabytes']:.1f} MB, {found['documents']:,} documents")
        print(f"tokenizer   {chosen.vocab:,} tokens, encoder {found['encoder']}, {len(cores)} cores")
        for form, value in found["forms"].items():
            print(
                f"{form:<11} end to end {value['ours']:6.1f} MB/s   raw tokenizers {value['theirs']:5.1f} MB/s", end=""
            )
            print(f"   ratio {value['ratio']:.1f}  (rounds {', '.join(f'{r:.1f}' for r in value['ratios'])})")
        print(f"ids         {'identical' if found['same_ids'] else 'DIFFERENT'}")
        print(f"target      ≥ {TARGET:.1f} and identical ids: {'met' if ok else 'MISSED'}")
    return 0 if ok else 1


def measure(folder: Path, rounds: int, vocab: int) -> dict[str, Any]:
    """All figures."""
    data, what = raw_lines(folder / "cache")
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    size = sum(len(text.encode()) for text in texts) / 1e6
    plain, packed = folder / "corpus.jsonl", folder / "corpus.jsonl.gz"
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data, 6))
    sources = {path.name[7:]: Source(name="bench", paths=(str(path),)) for path in (plain, packed)}
    sources["2 workers"] = sources["jsonl"]
    model = tokenizer.train([sources["jsonl"]], vocab, folder / "cache")
    raw = tokenizer.load(model)
    raw.encode_special_tokens = True
    forms: dict[str, dict[str, Any]] = {form: {"ours": [], "theirs": [], "ratios": []} for form in sources}
    same, encoder = True, ""
    for number in range(rounds):
        for form, source in sources.items():
            seconds, corpus = ours(source, model, folder / "out", form == "2 workers")
            raw_seconds, encodings = theirs(texts, raw)
            forms[form]["ours"].append(size / seconds)
            forms[form]["theirs"].append(size / raw_seconds)
            forms[form]["ratios"].append(raw_seconds / seconds)
            encoder = f"{corpus.catalog['encoder']['name']} {corpus.catalog['encoder']['version']}"
            if number == 0:
                same = same and same_ids(corpus, texts, encodings, source.valid)
    for value in forms.values():
        value["ratio"] = statistics.median(value["ratios"])
        value["ours"], value["theirs"] = statistics.median(value["ours"]), statistics.median(value["theirs"])
    return {
        "text": what,
        "megabytes": size,
        "documents": len(texts),
        "encoder": encoder,
        "forms": forms,
        "ratio": min(value["ratio"] for value in forms.values()),
        "same_ids": same,
    }


if __name__ == "__main__":
    sys.exit(main())
