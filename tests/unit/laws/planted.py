"""Tokenizers trained on known mixtures of sources, and text of the same sources that they were not trained on."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LANGUAGES = {"german": "german_de", "chinese": "chinese_zh", "english": "general_en"}


def halves(folder: Path, corpus: str) -> tuple[list[str], list[str]]:
    """Documents of a shared corpus, dealt to two halves by their hash."""
    found: tuple[list[str], list[str]] = ([], [])
    for text in _texts(folder / corpus):
        found[hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % 2].append(text)
    return found


def _texts(folder: Path) -> list[str]:
    if (folder / "train.parquet").is_file():
        import pyarrow.parquet as pq

        return [str(text) for text in pq.read_table(folder / "train.parquet", columns=["text"]).column(0).to_pylist()]
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def first_bytes(texts: Sequence[str], num_bytes: int) -> list[str]:
    """Texts up to so many UTF-8 bytes, the last one cut."""
    found, left = [], num_bytes
    for text in texts:
        data = text.encode()
        found.append(data[:left].decode("utf-8", "ignore"))
        left -= len(data)
        if left <= 0:
            return found
    raise AssertionError(f"{left} bytes short")


def train(
    texts: Mapping[str, Sequence[str]], shares: Mapping[str, float], total: int, merges: int, path: Path, kind: str
) -> dict[str, float]:
    """A BPE tokenizer of so many merges, trained on so many bytes of a mixture.

    Args:
        shares: of UTF-8 bytes.
        kind: `byte` (byte-level) or `letter` (with ▁ for spaces).

    Returns:
        The shares of bytes that it really saw.
    """
    drawn = {name: first_bytes(texts[name], round(share * total)) for name, share in shares.items()}
    if kind == "byte":
        tokenizer, alphabet = Tokenizer(models.BPE()), sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        size, special = merges + 256, []
    else:
        tokenizer, alphabet = Tokenizer(models.BPE(unk_token="<unk>")), []
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        letters = {letter for part in drawn.values() for text in part for letter in text}
        size, special = merges + len(letters) + 2, ["<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator((text for part in drawn.values() for text in part), trainer)
    tokenizer.save(str(path))
    sizes = {name: sum(len(text.encode()) for text in part) for name, part in drawn.items()}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def made_language(seed: int, letters: str, documents: int, words: int = 900) -> list[str]:
    """Documents in a language of its own: words of its letters, frequent ones first (Zipf)."""
    rng = np.random.default_rng(seed)
    weight = rng.dirichlet(np.full(len(letters), 0.5))
    lexicon = ["".join(rng.choice(list(letters), rng.integers(2, 9), p=weight)) for _ in range(words)]
    often = 1 / np.arange(1, words + 1)
    drawn = rng.choice(words, (documents, 120), p=often / often.sum())
    return [" ".join(lexicon[i] for i in row) for row in drawn]
