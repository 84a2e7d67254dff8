"""A corpus over existing Megatron data. No token is copied: `train.bin` and `valid.bin` are links to the person's file,
and only the indexes are written, each naming its own documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.files import hash_text
from cpt.data import split
from cpt.data import tokenizer as tokenizers
from cpt.data.readers import pair
from cpt.data.shards import Shard, write_index

_LOOK = 1000  # documents whose ids and ends are looked at


@dataclass(frozen=True)
class Ends:
    """How the documents of existing data begin and end. None: not with that token."""

    bos_id: int | None
    eos_id: int | None


def ends(shard: Shard, tokenizer: str) -> Ends:
    """Whether documents hold BOS and EOS, judged by the first ones.

    Raises:
        UsageError: ids that the tokenizer does not have.
    """
    vocab = tokenizers.vocab_size(tokenizer)
    bos_id, eos_id = tokenizers.special_ids(tokenizer)
    documents = [d for d in range(min(_LOOK, len(shard))) if shard.lengths[d] > 0]
    if not documents:
        raise UsageError(f"`{shard.prefix}.idx` has no documents with tokens")
    largest = max(int(shard.read(d).max()) for d in documents)
    if largest >= vocab or np.dtype(shard.dtype).kind not in "iu":
        raise UsageError(
            f"`{shard.prefix}.bin` was made with another tokenizer: it holds id {largest}, the run's has {vocab} tokens"
        )
    first = {int(shard.read(d, 0, 1)[0]) for d in documents}
    last = {int(shard.read(d, int(shard.lengths[d]) - 1)[0]) for d in documents}
    return Ends(bos_id if first == {bos_id} and bos_id != eos_id else None, eos_id if last == {eos_id} else None)


def build(
    paths: Sequence[str],
    valid_paths: Sequence[str],
    share: float,
    tokenizer: str,
    raw: str,
    folder: Path,
    say: Callable[[int, int], None],
) -> dict[str, Any]:
    """Fill `folder` with links and indexes; give the counts for the catalog.

    Args:
        paths: one pair.
        valid_paths: another pair, all held out, or none.
        share: of documents to hold out where there is no other pair [fraction].
        tokenizer: path of `tokenizer.json` that the data was made with.
        raw: hash of the raw files.
        folder: empty.
        say: called with documents and tokens looked at.
    """
    shard = Shard(pair(paths[0])[0].removesuffix(".bin"))
    found = ends(shard, tokenizer)
    held_out = np.zeros(len(shard), bool)
    valid = shard
    if valid_paths:
        valid = Shard(pair(valid_paths[0])[0].removesuffix(".bin"))
        ends(valid, tokenizer)
    elif share:
        held_out = _held_out(shard, share, say)
    keep = {"train": (shard, ~held_out), "valid": (valid, held_out if valid is shard else np.ones(len(valid), bool))}
    for name, (part, chosen) in keep.items():
        (folder / f"{name}.bin").symlink_to(Path(f"{part.prefix}.bin").resolve())
        write_index(folder / f"{name}.idx", part.dtype, part.lengths[chosen], part.starts[chosen])
    train_shard, valid_shard = Shard(folder / "train"), Shard(folder / "valid")
    sizes = _text_bytes(valid_shard, range(len(valid_shard)), tokenizer)
    (folder / "valid.bytes").write_bytes(np.asarray(sizes, "<i8").tobytes())
    sample = range(0, len(train_shard), max(1, len(train_shard) // 200))
    per_token = sum(_text_bytes(train_shard, sample, tokenizer)) / max(
        1, sum(int(train_shard.lengths[d]) for d in sample)
    )
    return {
        "documents": len(train_shard),
        "tokens": train_shard.tokens,
        "bytes": round(train_shard.tokens * per_token),
        "valid": {"documents": len(valid_shard), "tokens": valid_shard.tokens, "bytes": sum(sizes)},
        "empty_documents": int((shard.lengths == 0).sum()),
        "encoder": {"name": "megatron", "version": "1", "checked": 0, "note": "tokenised elsewhere"},
        "bos_id": found.bos_id,
        "eos_id": found.eos_id,
        "dtype": shard.dtype.name,
        "train_hash": hash_text(f"{raw} train {np.flatnonzero(held_out).tolist()}"),
        "valid_hash": hash_text(f"{raw} valid"),
    }


def _held_out(shard: Shard, share: float, say: Callable[[int, int], None]) -> np.ndarray[Any, Any]:
    """Which documents are held out, by the hash of their ids; at least one where there are two."""
    limit = split.limit(share)
    hashes = np.empty(len(shard), np.uint64)
    tokens = 0
    for document in range(len(shard)):
        ids = shard.read(document)
        hashes[document] = split.document_hash(ids.tobytes())
        tokens += len(ids)
        if document % 10_000 == 0:
            say(document, tokens)
    chosen = (hashes < np.uint64(min(limit, split.SPACE - 1))) & (shard.lengths > 0)
    full = np.flatnonzero(shard.lengths)
    if not chosen.any() and len(full) > 1:
        chosen[full[np.argmin(hashes[full])]] = True
    return chosen


def _text_bytes(shard: Shard, documents: Sequence[int], tokenizer: str) -> list[int]:
    """Bytes of UTF-8 text of documents, special tokens left out."""
    model = tokenizers.load(tokenizer)
    return [len(model.decode(shard.read(d).tolist(), skip_special_tokens=True).encode()) for d in documents]
