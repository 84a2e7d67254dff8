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
    """Size of a source from its files' sizes and the beginning of the first and last one. Marked as an estimate.

    Raises:
        UsageError: a file that cannot be read, or whose first documents are broken.
    """
    from cpt.data import estimate as estimates

    return estimates.estimate(source, tokenizer)


def _options(source: Source) -> dict[str, Any]:
    held_out = None if source.valid_paths else source.valid
    return {"text": source.text, "valid": held_out, "allow_special": source.allow_special}


def _making(source: Source, tokenizer_hash: str, data: DataOptions) -> list[Any]:
    """What changes the corpus besides the raw files."""
    return [_options(source), tokenizer_hash, {"bos": data.bos, "eos": data.eos}]
