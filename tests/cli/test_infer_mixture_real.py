"""Planted mixtures of real languages, read from merges of tokenizers that are trained here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.data import merges
from cpt.laws import infer_mixture
from tests.shared import shared_data
from tests.unit.laws import planted

REAL = {
    "most-german": ({"german": 0.6, "chinese": 0.15, "english": 0.25}, "byte"),
    "most-english": ({"german": 0.1, "chinese": 0.2, "english": 0.7}, "byte"),
    "most-chinese": ({"german": 0.2, "chinese": 0.5, "english": 0.3}, "letter"),
}


@pytest.mark.parametrize("name", REAL)
def test_planted_shares_of_german_chinese_and_english_are_found_within_3_points(name: str, tmp_path: Path) -> None:
    folder = shared_data("corpora")
    shares, kind = REAL[name]
    texts = {source: planted.halves(folder, corpus) for source, corpus in planted.LANGUAGES.items()}
    seen = {source: half for source, (half, _) in texts.items()}
    saw = planted.train(seen, shares, 3_000_000, 3200, tmp_path / "tokenizer.json", kind)
    read = merges.read(tmp_path)
    samples = [
        infer_mixture.sample(source, planted.first_bytes(other, 1_200_000), read)
        for source, (_, other) in texts.items()
    ]
    found = infer_mixture.infer(read, samples, 3000)
    assert found.merges == 3000
    off = {source: 100 * abs(found.shares[source] - share) for source, share in saw.items()}
    assert max(off.values()) <= 3, off
