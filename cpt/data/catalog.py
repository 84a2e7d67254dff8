"""Prepared corpora in the cache, and how a source finds its own without reading it.

    corpora/<key>/         a corpus (see `data.corpus`); the key is a hash over the raw files' content, the options that
                           change token ids or the split, and the tokenizer
    lookup/<stamp>.json    which corpus belongs to (paths, sizes, times of change, the same options, the tokenizer)

A source whose files were only touched misses its lookup, is hashed, finds its corpus by content and gets a new lookup.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.files import canonical_json, hash_text, read_json, write_atomic
from cpt.data import readers
from cpt.data.corpus import FORMAT, Corpus
from cpt.plan.types import DataOptions, Source, SourceFacts, Tokenizer

_SAMPLE_BYTES = 1 << 17  # text that an estimate looks at
_BYTES_PER_TOKEN = 4.0  # of an estimate without a tokenizer


@dataclass(frozen=True)
class Entry:
    """One prepared corpus of the cache, with the names that sources gave it."""

    corpus: Corpus
    names: tuple[str, ...]


def stamp(source: Source) -> Any:
    """What the raw files of a source are, by path, size and time of change. Reads no content.

    Raises:
        UsageError: a file that cannot be read.
    """
    held_out = [readers.stat_file(path) for path in readers.both(source.valid_paths)]
    return [source.reader, readers.reader(source).stamp(source), held_out]


def identity(source: Source) -> str:
    """Cheap identity of a source for plans: names relative to their common folder, sizes, times, options."""
    found = stamp(source)
    if readers.reader(source).wants_paths:
        found[1] = [[Path(path).name, *rest] for path, *rest in found[1]]
    found[2] = [[Path(path).name, *rest] for path, *rest in found[2]]
    return hash_text(canonical_json([found, _options(source)]))


def raw_hash(source: Source, cache: str | Path) -> str:
    """Hash over the content of the raw files of a source, read in full."""
    from concurrent.futures import ThreadPoolExecutor

    from cpt.base.files import hash_file

    paths = readers.files(source, cache)
    try:
        with ThreadPoolExecutor(4) as pool:
            hashes = list(pool.map(hash_file, [*paths, *readers.both(source.valid_paths)]))
    except OSError as error:
        raise UsageError(f"cannot read `{error.filename}`: {error.strerror}") from None
    return hash_text(canonical_json([hashes[: len(paths)], hashes[len(paths) :]]))


def raw_bytes(source: Source, cache: str | Path) -> int:
    """Size of the raw files of a source [bytes]."""
    return sum(
        readers.stat_file(path)[1] for path in [*readers.files(source, cache), *readers.both(source.valid_paths)]
    )


def corpus_key(raw: str, source: Source, tokenizer_hash: str, data: DataOptions) -> str:
    """Name of the corpus that these raw files, options and tokenizer make."""
    return hash_text(canonical_json(["corpus", FORMAT, raw, *_making(source, tokenizer_hash, data)]))[:32]


def find(source: Source, tokenizer_hash: str | None, data: DataOptions, cache: str | Path) -> SourceFacts | None:
    """Facts of a source's corpus, if it was prepared and its files look untouched. Reads only small JSON files."""
    corpus = find_corpus(source, tokenizer_hash, data, cache)
    return corpus.facts if corpus else None


def find_corpus(source: Source, tokenizer_hash: str | None, data: DataOptions, cache: str | Path) -> Corpus | None:
    """The corpus of a source, if it was prepared and its files look untouched."""
    if tokenizer_hash is None:
        return None
    try:
        value = read_json(lookup(source, tokenizer_hash, data, cache))
        return Corpus.find(Path(cache) / "corpora" / str(value["corpus"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lookup(source: Source, tokenizer_hash: str, data: DataOptions, cache: str | Path) -> Path:
    """The file that names the corpus of a source."""
    name = hash_text(canonical_json(["lookup", FORMAT, stamp(source), *_making(source, tokenizer_hash, data)]))[:32]
    return Path(cache) / "lookup" / f"{name}.json"


def keep_tokenizer(tokenizer_file: str | Path, tokenizer_hash: str, cache: str | Path) -> None:
    """Keep a copy of a tokenizer in the cache, so that its corpora can be decoded later."""
    copy = Path(cache) / "tokenizers" / f"{tokenizer_hash[:32]}.json"
    if not copy.is_file():
        write_atomic(copy, Path(tokenizer_file).read_bytes())


def tokenizer_copy(corpus: Corpus) -> Path | None:
    """The cache's copy of the tokenizer that a corpus was made with."""
    copy = corpus.folder.parent.parent / "tokenizers" / f"{corpus.catalog['tokenizer_hash'][:32]}.json"
    return copy if copy.is_file() else None


def entries(cache: str | Path) -> Iterator[Entry]:
    """All whole corpora of a cache."""
    names: dict[str, set[str]] = {}
    for path in sorted((Path(cache) / "lookup").glob("*.json")):
        try:
            value = read_json(path)
            names.setdefault(value["corpus"], set()).add(value["source"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for folder in sorted((Path(cache) / "corpora").glob("*")):
        corpus = None if folder.name.startswith(".") else Corpus.find(folder)
        if corpus:
            yield Entry(corpus, tuple(sorted(names.get(folder.name, {corpus.catalog["source"]}))))


def estimate(source: Source, tokenizer: Tokenizer | None = None) -> SourceFacts:
    """Size of a source from its files' sizes and the beginning of the first ones. Marked as an estimate.

    Raises:
        UsageError: a file that cannot be read, or whose first documents are broken.
    """
    reader = readers.reader(source)
    if reader.wants_paths and readers.is_megatron(source.paths):
        return _megatron_facts(source)
    if not reader.wants_paths:
        size, documents = reader.size(source)
        per_token = _bytes_per_token([], tokenizer)
    else:
        size, documents, sample = _sample(source)
        per_token = _bytes_per_token(sample, tokenizer)
    held_out = 0.0 if source.valid_paths else source.valid
    tokens = int(size / per_token) + documents
    return SourceFacts(
        tokens=int(tokens * (1 - held_out)),
        documents=max(1, int(documents * (1 - held_out))),
        bytes=int(size * (1 - held_out)),
        valid_tokens=int(tokens * held_out),
    )


def _megatron_facts(source: Source) -> SourceFacts:
    """Size of existing Megatron data: known but for the held-out share."""
    from cpt.data.shards import Shard

    shard = Shard(readers.pair(source.paths[0])[0].removesuffix(".bin"))
    kept = 1 - (0.0 if source.valid_paths else source.valid)
    return SourceFacts(
        tokens=int(shard.tokens * kept),
        documents=int(len(shard) * kept),
        bytes=int(shard.tokens * kept * _BYTES_PER_TOKEN),
        valid_tokens=int(shard.tokens * (1 - kept)),
    )


def _options(source: Source) -> dict[str, Any]:
    held_out = None if source.valid_paths else source.valid
    return {"text": source.text, "valid": held_out, "allow_special": source.allow_special}


def _making(source: Source, tokenizer_hash: str, data: DataOptions) -> list[Any]:
    """What changes the corpus besides the raw files."""
    return [_options(source), tokenizer_hash, {"bos": data.bos, "eos": data.eos}]


def _sample(source: Source) -> tuple[int, int, list[str]]:
    """Bytes of text and documents of all files, and some texts, judged by the start of the first and the last file."""
    from itertools import islice

    from cpt.data.pieces import records

    total = sum(readers.stat_file(path)[1] for path in source.paths)
    texts: list[str] = []
    read = share = 0.0
    for path in {source.paths[0]: 0, source.paths[-1]: 0} if source.paths else {}:
        count, length = 0, 0
        for _, text in islice(records(path, source.text), 2000):
            texts.append(text)
            count, length = count + 1, length + len(text.encode("utf-8", "replace"))
            if length > _SAMPLE_BYTES:
                break
        read += length
        share += _read_share(path, length)
    size = total * read / share if share else 0
    documents = size * len(texts) / read if read else 0
    return int(size), max(1, int(documents)), texts


def _read_share(path: str, length: int) -> float:
    """About how many bytes of a file held `length` bytes of text."""
    from cpt.data.pieces import file_kind

    kind, packed = file_kind(path)
    size = float(Path(path).stat().st_size)
    packing = 3.5 if packed or kind == "parquet" else 1 / 1.05
    return min(size, length / packing)


def _bytes_per_token(texts: list[str], tokenizer: Tokenizer | None) -> float:
    if tokenizer is None or tokenizer.path is None:
        size = tokenizer.vocab_size if tokenizer else None
        return _BYTES_PER_TOKEN if size is None or size > 16_384 else 3.2 if size > 2048 else 2.0
    if not texts:
        from cpt.data.tokenizer import vocab_size

        return _bytes_per_token([], Tokenizer(vocab_size=vocab_size(tokenizer.path)))
    from cpt.data.tokenizer import load

    sample = "\n".join(texts)[: 1 << 15]
    return len(sample.encode("utf-8", "replace")) / max(1, len(load(tokenizer.path).encode(sample).ids))
