"""Planted mixtures of German, Chinese and English against what `cpt infer-mixture` reads from the tokenizer's merges.

    python -m benchmarks.infer_mixture [--merges 3000] [--bytes 3e6] [--json]

Tokenizers are trained here on one half of the documents of `$CPT_SHARED` (or `../shared`); pairs are counted on the
other half. Shares are of UTF-8 bytes. Target: every share within 3 points. The last row leaves the Chinese text out of
the candidates: the shares are then those among the rest, and the merges that no source has are told.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cpt.base.units import parse_count
from cpt.data import merges
from cpt.laws import infer_mixture
from tests.unit.laws.planted import LANGUAGES, first_bytes, halves, train

TARGET = 3.0  # [points]
TRAINED = 5_000_000  # bytes that a tokenizer is trained on
PLANTED = [
    ({"german": 0.5, "chinese": 0.3, "english": 0.2}, "byte"),
    ({"german": 0.1, "chinese": 0.2, "english": 0.7}, "byte"),
    ({"german": 0.3, "chinese": 0.5, "english": 0.2}, "byte"),
    ({"german": 0.34, "chinese": 0.33, "english": 0.33}, "byte"),
    ({"german": 0.9, "chinese": 0.05, "english": 0.05}, "byte"),
    ({"german": 0.3, "chinese": 0.2, "english": 0.5}, "letter"),
]


def measure(folder: Path, corpora: Path, steps: int, num_bytes: int) -> Iterator[dict[str, Any]]:
    """Planted and inferred shares, row by row."""
    texts = {name: halves(corpora, corpus) for name, corpus in LANGUAGES.items()}
    cases = [(shares, kind, tuple(LANGUAGES)) for shares, kind in PLANTED]
    cases.append((*PLANTED[0], ("german", "english")))
    for shares, kind, candidates in cases:
        path = folder / "tokenizer.json"
        seen = {name: half for name, (half, _) in texts.items()}
        saw = train(seen, shares, TRAINED, steps + 200, path, kind)
        start = time.process_time()
        read = merges.read(path)
        samples = [infer_mixture.sample(n, first_bytes(texts[n][1], num_bytes), read) for n in candidates]
        inferred = infer_mixture.infer(read, samples, steps)
        among = {name: saw[name] / sum(saw[n] for n in candidates) for name in candidates}
        yield {
            "kind": kind,
            "planted": among,
            "inferred": inferred.shares,
            "intervals": inferred.intervals,
            "off": max(100 * abs(inferred.shares[n] - share) for n, share in among.items()),
            "unseen": inferred.unseen,
            "slack": inferred.slack,
            "merges": inferred.merges,
            "seconds": time.process_time() - start,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when the target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.infer_mixture")
    parser.add_argument("--merges", type=parse_count, default=3000)
    parser.add_argument("--bytes", type=parse_count, default=3_000_000)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    shared = Path(os.environ.get("CPT_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    corpora = shared / "data" / "corpora"
    if not corpora.is_dir():
        print(f"skipped: no corpora at {corpora}; set CPT_SHARED")
        return 0
    if not chosen.json:
        print(
            f"{'tokenizer':<10} {'planted':<42} {'inferred':<42} {'off by':>7} {'unseen':>7} {'slack':>6} {'time':>6}"
        )
    found = []
    with tempfile.TemporaryDirectory(prefix="cpt-bench-") as name:
        for row in measure(Path(name), corpora, chosen.merges, chosen.bytes):
            found.append(row)
            if not chosen.json:
                print(_line(row), flush=True)
    ok = all(row["off"] <= TARGET for row in found)
    if chosen.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"target     every share within {TARGET:g} points: {'met' if ok else 'MISSED'}")
    return 0 if ok else 1


def _line(row: dict[str, Any]) -> str:
    planted, inferred = (
        ", ".join(f"{n} {100 * s:.1f}" for n, s in row[key].items()) for key in ("planted", "inferred")
    )
    return (
        f"{row['kind']:<10} {planted:<42} {inferred:<42} {row['off']:>7.2f} {100 * row['unseen']:>5.1f} % "
        f"{100 * row['slack']:>4.1f} % {row['seconds']:>4.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
