"""A source becomes a corpus: read, split, encode, write, put into the catalog. A killed attempt leaves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.files import canonical_json, hash_text, write_json
from cpt.data import catalog, encode, pieces, readers, split
from cpt.data import tokenizer as tokenizers
from cpt.data.corpus import CATALOG, FORMAT, Corpus
from cpt.data.lock import building, publish, writing
from cpt.data.pool import Work, encode_pieces
from cpt.data.shards import ShardWriter, token_dtype
from cpt.data.worker import Encoded, Task
from cpt.plan.types import DataOptions, Source

SMALL = 64 << 20  # text below which one process is done before others have started [bytes]

PLAIN = (("lines", None), ("text", None))


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
        data: BOS and EOS options; of no effect on Megatron data, which is tokenised already.
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
    tokenizers.auto_bos_eos(tokenizer_file, data.bos, data.eos)
    say = report or (lambda _: None)

    def tell(note: str) -> None:
        say(Preparing(source.name, 0, 0, 0, 0, note))

    with writing(cache):
        if not readers.reader(source).wants_paths:
            tell("taking its text out of installed packages")
        total = catalog.raw_bytes(source, cache)
        # Taken before the files are read: a file that changes meanwhile misses the lookup next time.
        lookup = catalog.lookup(source, tokenizer_hash, data, cache)
        raw = catalog.raw_hash(source, cache)
        key = catalog.corpus_key(raw, source, tokenizer_hash, data)
        root = Path(cache) / "corpora"
        whole = lambda folder: Corpus.find(folder) is not None  # noqa: E731
        with building(root, key, whole, lambda: tell("waiting for another process that is preparing it")) as folder:
            if folder is not None:
                _Builder(source, tokenizer_file, data, Path(cache), folder, workers, total, say).build(raw)
                publish(folder, root / key)
        catalog.keep_tokenizer(tokenizer_file, tokenizer_hash, cache)
        write_json(lookup, {"source": source.name, "corpus": key})
    return Corpus.open(root / key)


def _no_text(source: Source, documents: int, blank: int) -> UsageError:
    """The error for a source with nothing to train on.

    Args:
        source: what was read.
        documents: those with text, all of them held out.
        blank: those without.
    """
    count = f"{documents + blank:,} document" + ("s" if documents + blank != 1 else "")
    if documents:
        return UsageError(f"source `{source.name}` has no text to train on: {count}, those with text all held out")
    what = f": {count}, {'all ' if blank != 1 else ''}blank in column `{source.text}`" if blank else ": no documents"
    return UsageError(f"source `{source.name}` has no text to train on{what}")


class _Differs(Exception):
    """The fast encoder gave other ids than the reference."""


@dataclass
class _Builder:
    """Fills an empty folder with the corpus of a source."""

    source: Source
    tokenizer: str
    data: DataOptions
    cache: Path
    folder: Path
    workers: int
    total: int  # raw bytes
    say: Report
    least: int = split.SPACE  # smallest document hash seen

    def build(self, raw: str) -> None:
        """Write shards and catalog.

        Args:
            raw: hash of the raw files.
        """
        source = self.source
        paths = readers.files(source, self.cache)
        result = self._link(raw) if readers.is_megatron(paths) else self._encode_all()
        blank = result.pop("blank_documents", 0)
        held_out = result["valid"]["documents"]
        if not result["tokens"] or blank == result["documents"] + held_out:
            raise _no_text(source, result["documents"] + held_out - blank, blank + result.get("empty_documents", 0))
        tokenizer_hash = tokenizers.tokenizer_hash(self.tokenizer)
        content = [result.pop("train_hash"), result.pop("valid_hash"), tokenizer_hash]
        files = {p.name: p.stat().st_size for p in sorted(self.folder.iterdir())}
        write_json(
            self.folder / CATALOG,
            {
                "format": FORMAT,
                "source": source.name,
                "reader": source.reader,
                "licence": source.licence or readers.reader(source).licence,
                **result,
                "vocab_size": tokenizers.vocab_size(self.tokenizer),
                "tokenizer_hash": tokenizer_hash,
                "source_hash": raw,
                "content_hash": hash_text(canonical_json([*content, result["bos_id"], result["eos_id"]])),
                "text": source.text,
                "held_out": None if source.valid_paths else source.valid,
                "read": [Path(path).name for path in [*paths, *readers.both(source.valid_paths)]],
                "files": files,
            },
        )

    def _link(self, raw: str) -> dict[str, Any]:
        """The counts of existing Megatron data, of which only indexes are written."""
        from cpt.data import megatron

        def say(documents: int, tokens: int) -> None:
            self.say(Preparing(self.source.name, 0, self.total, documents, tokens))

        share, held_out = self.source.valid, self.source.valid_paths
        return megatron.build(self.source.paths, held_out, share, self.tokenizer, raw, self.folder, say)

    def _encode_all(self) -> dict[str, Any]:
        """Write shards from text; with the reference when the fast encoder was wrong once."""
        bos_id, eos_id = tokenizers.special_ids(self.tokenizer)
        encoding = encode.Encoding(
            tokenizer=self.tokenizer,
            bos_id=bos_id if self.data.bos else None,
            eos_id=eos_id if self.data.eos else None,
            dtype=token_dtype(tokenizers.vocab_size(self.tokenizer)).name,
            allow_special=self.source.allow_special,
        )
        encoder, note = encode.choose(encoding)
        limit = 0 if self.source.valid_paths else split.limit(self.source.valid)
        while True:
            try:
                result = self._pass(Task(encoding, encoder, self.source.text, limit))
            except _Differs as error:
                encoder, note = encode.REFERENCE, str(error)
                self.say(Preparing(self.source.name, 0, self.total, 0, 0, f"{note}; all is encoded by the reference"))
                continue
            settled = split.settled(limit, self.least, result["documents"], result["valid"]["documents"])
            if settled != limit:  # a small source: one document is held out, or none
                limit = settled
                continue
            break
        result["encoder"] |= {"version": version(encoder), "note": note}
        return result | {"bos_id": encoding.bos_id, "eos_id": encoding.eos_id, "dtype": encoding.dtype}

    def _pass(self, task: Task) -> dict[str, Any]:
        """One pass over the source; gives the counts for the catalog."""
        dtype = np.dtype(task.encoding.dtype)
        train = ShardWriter(self.folder / "train", dtype)
        valid = ShardWriter(self.folder / "valid", dtype)
        counts = dict.fromkeys(("train_bytes", "valid_bytes", "empty", "blank", "checked", "read"), 0)
        small = SMALL if task.encoder == encode.FAST else SMALL // 8
        workers = 0 if self._text_bytes() < small else self.workers
        try:
            with open(self.folder / "valid.bytes", "wb") as valid_bytes:
                for part in encode_pieces(task, self._work(), workers):
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
            "blank_documents": counts["blank"],
            "encoder": {"name": task.encoder, "checked": counts["checked"]},
            "train_hash": hashes[0],
            "valid_hash": hashes[1],
        }

    def _text_bytes(self) -> int:
        """About how much text there is; what is packed counts four times its size."""
        paths = [*readers.files(self.source, self.cache), *self.source.valid_paths]
        return sum(readers.stat_file(p)[1] * (1 if pieces.file_kind(p) in PLAIN else 4) for p in paths)

    def _work(self) -> Iterator[Work]:
        """Pieces with the side that they go to."""
        files = readers.files(self.source, self.cache)
        side = False if self.source.valid_paths else None
        for number, piece in enumerate(pieces.pieces(files, self.source.text)):
            yield piece, number == 0, side
        for piece in pieces.pieces(self.source.valid_paths, self.source.text):
            yield piece, False, True

    def _add(self, part: Encoded, train: ShardWriter, valid: ShardWriter, counts: dict[str, int]) -> None:
        if part.differ:
            raise _Differs(f"gigatoken gave other ids than the reference for {part.differ} of {part.checked} documents")
        train.add(*part.train)
        valid.add(*part.valid)
        self.least = min(self.least, part.least)
        counts["train_bytes"] += part.train_bytes
        counts["valid_bytes"] += int(part.valid_bytes.sum())
        counts["empty"] += part.empty
        counts["blank"] += part.blank
        counts["checked"] += part.checked
        counts["read"] += part.size
        done = min(counts["read"], self.total)
        self.say(Preparing(self.source.name, done, self.total, train.documents + valid.documents, train.tokens))
