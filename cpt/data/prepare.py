"""A source becomes a corpus: read, split, encode, write, put into the catalog. A killed attempt leaves nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import EnvironmentProblem, UsageError
from cpt.base.files import canonical_json, hash_text, write_json
from cpt.data import catalog, encode, pieces, readers, split
from cpt.data import tokenizer as tokenizers
from cpt.data.corpus import CATALOG, FORMAT, Corpus
from cpt.data.lock import building, publish
from cpt.data.pool import Work, encode_pieces
from cpt.data.shards import ShardWriter, token_dtype
from cpt.data.worker import Encoded, Task
from cpt.plan.types import DataOptions, Source

_SMALL = 16 << 20  # raw bytes below which starting processes costs more than it gains


@dataclass(frozen=True)
class Preparing:
    """How far a source is: for live displays. `note` is a line for people when something is worth one."""

    source: str
    bytes: int  # of the raw files
    total_bytes: int
    documents: int
    tokens: int
    note: str | None = None


Report = Callable[[Preparing], None]


class _Differs(Exception):
    """The fast encoder gave other ids than the reference."""


def prepare(
    source: Source,
    tokenizer_path: str | Path,
    data: DataOptions,
    cache: str | Path,
    workers: int = 1,
    report: Report | None = None,
) -> Corpus:
    """The corpus of a source, made when the cache does not have it. Several processes may ask at once.

    Args:
        source: what to read.
        tokenizer_path: folder with `tokenizer.json`, or the file.
        data: BOS and EOS options.
        cache: folder of prepared things.
        workers: processes that encode. The result does not depend on it.
        report: called now and then.

    Raises:
        UsageError: a file that is missing or broken, named with its line; nothing to train on.
        EnvironmentProblem: no space left, or a process was killed.
    """
    tokenizer_file = str(tokenizers.tokenizer_json(tokenizer_path))
    tokenizer_hash = tokenizers.tokenizer_hash(tokenizer_file)
    found = catalog.find_corpus(source, tokenizer_hash, data, cache)
    if found:
        return found
    say = report or (lambda _: None)
    total = catalog.raw_bytes(source, cache)
    # Taken before the files are read: a file that changes meanwhile misses the lookup next time.
    lookup = catalog.lookup(source, tokenizer_hash, data, cache)
    raw = catalog.raw_hash(source, cache)
    key = catalog.corpus_key(raw, source, tokenizer_hash, data)
    root = Path(cache) / "corpora"

    def waiting() -> None:
        say(Preparing(source.name, 0, total, 0, 0, "another process is preparing it: waiting"))

    try:
        with building(root, key, lambda folder: Corpus.find(folder) is not None, waiting) as folder:
            if folder is not None:
                _build(source, tokenizer_file, data, Path(cache), folder, workers, total, raw, tokenizer_hash, say)
                publish(folder, root / key)
        write_json(lookup, {"source": source.name, "corpus": key})
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                f"no space left while preparing source `{source.name}` in `{root}`",
                "free some, or set `CPT_CACHE` to a folder on another disk",
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise EnvironmentProblem(
                f"cannot write to the cache `{cache}`: {error.strerror}", "set `CPT_CACHE` to a folder of yours"
            ) from None
        raise
    return Corpus.open(root / key)


def _build(
    source: Source,
    tokenizer: str,
    data: DataOptions,
    cache: Path,
    folder: Path,
    workers: int,
    total: int,
    raw: str,
    tokenizer_hash: str,
    say: Report,
) -> None:
    """Fill `folder` with the corpus."""
    bos_id, eos_id = tokenizers.special_ids(tokenizer)
    tokenizers.auto_bos_eos(tokenizer, data.bos, data.eos)
    vocab = tokenizers.vocab_size(tokenizer)
    encoding = encode.Encoding(
        tokenizer=tokenizer,
        bos_id=bos_id if data.bos else None,
        eos_id=eos_id if data.eos else None,
        dtype=token_dtype(vocab).name,
        allow_special=source.allow_special,
    )
    encoder, note = encode.choose(encoding)
    limit = 0 if source.valid_paths else split.limit(source.valid)
    build = _Builder(source, cache, folder, 0 if total < _SMALL else workers, total, say)
    while True:
        try:
            result = build.run(Task(encoding, encoder, source.text, limit))
        except _Differs as error:
            encoder, note = encode.REFERENCE, str(error)
            say(Preparing(source.name, 0, total, 0, 0, f"{note}; encoding it all with the reference"))
            continue
        if limit and not result["valid"]["documents"] and result["documents"] > 1:
            limit = build.least + 1  # a small source: the document with the smallest hash is held out
            continue
        break
    if not result["tokens"]:
        raise UsageError(f"source `{source.name}` has no text to train on in column `{source.text}`")
    result["encoder"] |= {"version": _version(encoder), "note": note}
    hashes = [result.pop("train_hash"), result.pop("valid_hash")]
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    write_json(
        folder / CATALOG,
        {
            "format": FORMAT,
            "source": source.name,
            **result,
            "tokenizer_hash": tokenizer_hash,
            "vocab_size": vocab,
            "dtype": encoding.dtype,
            "bos_id": encoding.bos_id,
            "eos_id": encoding.eos_id,
            "source_hash": raw,
            "content_hash": hash_text(canonical_json([hashes, tokenizer_hash, encoding.bos_id, encoding.eos_id])),
            "licence": source.licence,
            "reader": source.reader,
            "files_read": [Path(p).name for p in readers.files(source, cache)],
            "files": files,
        },
    )


class _Builder:
    """One or more passes over a source into the same folder."""

    def __init__(self, source: Source, cache: Path, folder: Path, workers: int, total: int, say: Report) -> None:
        self.source, self.cache, self.folder = source, cache, folder
        self.workers, self.total, self.say = workers, total, say
        self.least = split.SPACE

    def work(self) -> Iterator[Work]:
        """Pieces with the side that they go to."""
        files = readers.files(self.source, self.cache)
        side = False if self.source.valid_paths else None
        for number, piece in enumerate(pieces.pieces(files, self.source.text)):
            yield piece, number == 0, side
        for piece in pieces.pieces(self.source.valid_paths, self.source.text):
            yield piece, False, True

    def run(self, task: Task) -> dict[str, Any]:
        """Write the shards; give the counts for the catalog."""
        dtype = np.dtype(task.encoding.dtype)
        train = ShardWriter(self.folder / "train", dtype)
        valid = ShardWriter(self.folder / "valid", dtype)
        counts = dict.fromkeys(("train_bytes", "valid_bytes", "empty", "checked", "read"), 0)
        try:
            with open(self.folder / "valid.bytes", "wb") as valid_bytes:
                for part in encode_pieces(task, self.work(), self.workers):
                    self._add(part, train, valid, counts)
                    valid_bytes.write(part.valid_bytes.tobytes())
            hashes = train.finish(), valid.finish()
        finally:
            train.close()
            valid.close()
        return {
            "documents": train.documents,
            "tokens": train.tokens,
            "bytes": counts["train_bytes"],
            "valid": {"documents": valid.documents, "tokens": valid.tokens, "bytes": counts["valid_bytes"]},
            "empty_documents": counts["empty"],
            "encoder": {"name": task.encoder, "checked": counts["checked"]},
            "train_hash": hashes[0],
            "valid_hash": hashes[1],
        }

    def _add(self, part: Encoded, train: ShardWriter, valid: ShardWriter, counts: dict[str, int]) -> None:
        if part.differ:
            raise _Differs(f"gigatoken gave other ids than the reference for {part.differ} of {part.checked} documents")
        train.add(*part.train)
        valid.add(*part.valid)
        self.least = min(self.least, part.least)
        counts["train_bytes"] += part.train_bytes
        counts["valid_bytes"] += int(part.valid_bytes.sum())
        counts["empty"] += part.empty
        counts["checked"] += part.checked
        counts["read"] += part.size
        done = min(counts["read"], self.total)
        self.say(Preparing(self.source.name, done, self.total, train.documents + valid.documents, train.tokens))


def _version(encoder: str) -> str:
    from importlib.metadata import version

    return version(encoder)
