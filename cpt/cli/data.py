"""`cpt data`: prepare the corpora of a recipe, list what is prepared, look into one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.base.errors import UsageError
from cpt.base.units import show_bytes, show_count
from cpt.cli.flags import Json, Overrides, note, result, result_json, talk

if TYPE_CHECKING:
    from cpt.data.catalog import Entry
    from cpt.data.corpus import Corpus

Cache = Annotated[
    str | None,
    typer.Option("--cache", help="Folder of prepared corpora.", show_default="`CPT_CACHE` or ./.cpt/cache"),
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Processes that tokenise.", min=1, show_default="one a core")
]
_TEXT_LIMIT = 600  # characters of a document that are shown


def prepare(overrides: Overrides = None, workers: Workers = None, json: Json = False) -> int:
    """Tokenise the sources of a recipe. Its tokenizer is trained first if need be; what is prepared is kept."""
    from cpt.config import build
    from cpt.data.corpus import Corpus
    from cpt.stages import prepare as stage

    plan = build.plan(None, overrides or [])
    prepared = stage.prepare(plan, Progress(), workers)
    corpora = {name: Corpus.open(folder) for name, folder in prepared.corpora.items()}
    if json:
        result_json({"tokenizer": prepared.tokenizer, "sources": {n: facts(c) for n, c in corpora.items()}})
    elif not corpora:
        result("no stage of this recipe reads a source")
    else:
        result(table([(name, corpus) for name, corpus in corpora.items()]))
        result(f"\ntokenizer  {prepared.tokenizer}\ncache      {plan.cache}")
    return 0


def list_corpora(cache: Cache = None, json: Json = False) -> int:
    """List the prepared corpora of the cache."""
    from cpt.data import catalog

    folder = _cache(cache)
    entries = sorted(catalog.entries(folder), key=lambda e: (e.names, e.corpus.folder.name))
    if json:
        result_json([{"names": list(e.names), **facts(e.corpus)} for e in entries])
    elif entries:
        result(table([(", ".join(e.names), e.corpus) for e in entries]))
    else:
        note(f"nothing is prepared in `{folder}`; `cpt data prepare recipe=NAME` does it")
    return 0


def show(
    corpus: Annotated[str, typer.Argument(metavar="SOURCE|FOLDER", help="Name of a source, or a corpus folder.")],
    documents: Annotated[int, typer.Option("--documents", "-n", help="How many documents to print.", min=0)] = 3,
    held_out: Annotated[bool, typer.Option("--held-out", help="Print held-out documents instead.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder with `tokenizer.json` to decode with.")
    ] = None,
    cache: Cache = None,
    json: Json = False,
) -> int:
    """Show one corpus: facts, and a few documents decoded from their tokens."""
    found = _find(corpus, _cache(cache))
    texts = _decoded(found, documents, held_out, tokenizer)
    if json:
        result_json({**facts(found), "shown": texts})
        return 0
    for name, value in facts(found).items():
        result(f"{name.replace('_', ' '):<16} {_value(name, value)}")
    for text in texts:
        result(f"\n--- document {text['document']}, {text['tokens']:,} tokens{' (beginning)' if text['cut'] else ''}")
        result("".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text["text"]))
    return 0


commands = {"": list_corpora, "prepare": prepare, "list": list_corpora, "show": show}


class Progress:
    """Prints how preparing goes to stderr: one line that moves in a terminal, one line a source elsewhere."""

    def __init__(self) -> None:
        self._moving = sys.stderr.isatty() and not talk.quiet
        self._width = 0

    def __call__(self, kind: str, **fields: Any) -> None:
        if kind == "note":
            self._clear()
            note(fields["text"])
        elif kind == "data" and not fields.get("done"):
            if self._moving and fields["total_bytes"]:
                share = fields["bytes"] / fields["total_bytes"]
                self._move(f"{fields['source']}: {share:.0%}, {show_count(fields['tokens'])} tokens")
        elif kind == "data":
            self._clear()
            note(f"source `{fields['source']}`: {fields['tokens']:,} tokens, {fields['seconds']:.1f} s")

    def _move(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def _clear(self) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            self._width = 0


def facts(corpus: Corpus) -> dict[str, Any]:
    """What a person wants to know about a corpus."""
    c = corpus.catalog
    return {
        "folder": str(corpus.folder),
        "documents": c["documents"],
        "tokens": c["tokens"],
        "bytes": c["bytes"],
        "held_out": c["valid"],
        "empty_documents": c["empty_documents"],
        "encoder": c["encoder"],
        "vocab_size": c["vocab_size"],
        "bos_id": c["bos_id"],
        "eos_id": c["eos_id"],
        "tokenizer_hash": c["tokenizer_hash"],
        "source_hash": c["source_hash"],
        "content_hash": c["content_hash"],
        "licence": c["licence"],
        "read": c["read"],
    }


def table(rows: list[tuple[str, Corpus]]) -> str:
    """Corpora, one a line."""
    head = ["source", "documents", "tokens", "text", "held out", "encoder", "corpus"]
    lines = [head]
    for name, corpus in rows:
        c = corpus.catalog
        counts = f"{c['documents']:,}", f"{c['tokens']:,}", show_bytes(c["bytes"]), f"{c['valid']['documents']:,}"
        lines.append([name, *counts, c["encoder"]["name"], corpus.folder.name[:12]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = {0, 5, 6}  # columns to the left; numbers to the right
    cells = [
        [x.ljust(w) if i in texts else x.rjust(w) for i, (x, w) in enumerate(zip(y, widths, strict=True))]
        for y in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _cache(given: str | None) -> Path:
    return Path(given or os.environ.get("CPT_CACHE") or ".cpt/cache").expanduser().resolve()


def _find(name: str, cache: Path) -> Corpus:
    """The corpus that a source's name, a folder or the beginning of its name in the cache means; the newest."""
    from cpt.base.registry import unknown
    from cpt.data import catalog
    from cpt.data.corpus import Corpus

    if os.path.isdir(name):
        return Corpus.open(Path(name).resolve())
    entries = list(catalog.entries(cache))
    named = [e.corpus for e in entries if name in e.names]
    named = named or [e.corpus for e in entries if len(name) >= 4 and e.corpus.folder.name.startswith(name)]
    if not named:
        raise _unknown(name, entries, cache, unknown)
    named.sort(key=lambda c: (c.folder / "catalog.json").stat().st_mtime, reverse=True)
    if len(named) > 1:
        others = ", ".join(f"`{c.folder.name[:12]}`" for c in named[1:])
        note(f"`{name}` was prepared {len(named)} times; this is the newest, the others are {others}")
    return named[0]


def _unknown(name: str, entries: list[Entry], cache: Path, unknown: Callable[..., UsageError]) -> UsageError:
    error = unknown("source", name, {n for e in entries for n in e.names})
    return UsageError(f"{error.message} in the cache `{cache}`", *error.hints, "`cpt data prepare` fills the cache")


def _decoded(corpus: Corpus, count: int, held_out: bool, tokenizer: str | None) -> list[dict[str, Any]]:
    """The first documents as text, cut to what fits a screen."""
    from cpt.data import catalog
    from cpt.data.tokenizer import load, tokenizer_hash

    shard = corpus.valid if held_out else corpus.train
    if not count or not len(shard):
        return []
    path = Path(tokenizer) if tokenizer else catalog.tokenizer_copy(corpus)
    if path is None:
        raise UsageError(
            "the tokenizer of this corpus is not in its cache",
            "`--tokenizer FOLDER` names it, `-n 0` shows no documents",
        )
    if tokenizer_hash(path) != corpus.catalog["tokenizer_hash"]:
        raise UsageError(f"`{path}` is not the tokenizer that this corpus was made with")
    model = load(path)
    found = []
    for document in range(min(count, len(shard))):
        length = int(shard.lengths[document])
        text = model.decode(shard.read(document, 0, min(length, _TEXT_LIMIT)).tolist(), skip_special_tokens=False)
        cut = length > _TEXT_LIMIT or len(text) > _TEXT_LIMIT
        found.append({"document": document, "tokens": length, "cut": cut, "text": text[:_TEXT_LIMIT]})
    return found


def _value(name: str, value: Any) -> str:
    if name == "encoder":
        checked = f", {value['checked']:,} documents checked against the reference" if value["checked"] else ""
        because = f" ({value['note']})" if value["note"] else ""
        return f"{value['name']} {value['version']}{checked}{because}"
    if name == "bytes":
        return f"{value:,} ({show_bytes(value)} of text)"
    if isinstance(value, Mapping):
        return ", ".join(f"{v:,} {k}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return "none" if value is None else f"{value:,}" if isinstance(value, int) and name != "bos_id" else str(value)
