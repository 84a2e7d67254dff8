"""Small corpora and stages for tests, made without text or tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpt.base.files import hash_text, write_json
from cpt.data.corpus import FORMAT, Corpus
from cpt.data.shards import ShardWriter
from cpt.plan.model import Parallel
from cpt.plan.types import Lr, Optimizer, Replay, Train


def corpus(folder: Path, lengths: list[int], valid: Sequence[int] = (), name: str = "made", eos: bool = True) -> Corpus:
    """A corpus of documents of these lengths; token t of document d is (1000 d + t) mod 60000 + 1, the last is 0."""
    folder.mkdir(parents=True)
    files = {}
    for split, sizes in (("train", lengths), ("valid", list(valid))):
        writer = ShardWriter(folder / split, np.dtype(np.uint16))
        for number, size in enumerate(sizes):
            ids = (1000 * number + np.arange(size)) % 60000 + 1
            if eos and size:
                ids[-1] = 0
            writer.add(ids, np.array([size]))
        writer.finish()
    np.asarray([4 * v for v in valid], "<i8").tofile(folder / "valid.bytes")
    for path in folder.iterdir():
        files[path.name] = path.stat().st_size
    write_json(
        folder / "catalog.json",
        {
            "format": FORMAT,
            "source": name,
            "documents": len(lengths),
            "tokens": sum(lengths),
            "bytes": 4 * sum(lengths),
            "valid": {"documents": len(valid), "tokens": sum(valid), "bytes": 4 * sum(valid)},
            "bos_id": None,
            "eos_id": 0 if eos else None,
            "content_hash": hash_text(f"{name} {lengths} {list(valid)}"),
            "files": files,
        },
    )
    return Corpus.open(folder)


def train(
    mixture: dict[str, float], replay: Replay | None = None, seq_length: int = 16, batch: int = 8, seed: int = 1
) -> Train:
    """A train stage of which only the data part matters."""
    return Train(
        tokens=1,
        steps=1,
        seq_length=seq_length,
        global_batch_size=batch,
        micro_batch_size=1,
        seed=seed,
        precision="fp32",
        mixture=mixture,
        replay=replay,
        lr=Lr(schedule="constant", options={}),
        optimizer=Optimizer(),
        parallel=Parallel(),
    )
