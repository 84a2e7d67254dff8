"""`cpt infer-mixture`: which mixture of texts a byte-pair tokenizer was trained on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.base.errors import UsageError
from cpt.cli import law_keys as keys
from cpt.cli.flags import Json, result, result_json, talk, warning

if TYPE_CHECKING:
    from cpt.laws.infer_mixture import Inferred
    from cpt.plan.types import Source

MERGES, BYTES = 3000, "3MB"
LEAST = 300  # merges; fewer say little
UNSEEN, SLACK = 0.05, 0.25  # above these the tokenizer knows text that no source is like [fraction]
_OF_SOURCE = ("paths", "text", "reader")

Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="sources.NAME=FILES ...", help="Candidate corpora, two or more.", show_default=False),
]


def command(
    tokenizer: Annotated[
        str, typer.Argument(metavar="TOKENIZER", help="`tokenizer.json`, or a folder with it, such as a base model's.")
    ],
    overrides: Keys = None,
    json: Json = False,
) -> int:
    """Estimate in which shares candidate corpora were in the text that a BPE tokenizer was trained on.

    \b
    sources.german='de/*.jsonl'   text like what the tokenizer may have seen, by name; lists as '[a.txt, b.txt]'
    sources.german.text=body      column that holds the text
    sources.docs.reader=NAME      another reader than files
    merges=3000                   how many merges to use, from the first on; more are slower and a little more exact
    bytes=3MB                     how much text of each source is counted

    Shares are of UTF-8 bytes and sum to 1 over the candidates. The data of a model may differ from its tokenizer's.
    """
    values = keys.parse(
        overrides or [], {"merges": keys.count, "bytes": _bytes}, {"sources.": keys.text}, "cpt infer-mixture"
    )
    sources = _sources(keys.family(values, "sources."))
    steps = values.get("merges", MERGES)
    if steps < LEAST:
        raise UsageError(f"`merges` is {steps}, wanted at least {LEAST}", f"without it {MERGES:,} are used")
    found = _infer(tokenizer, sources, values.get("bytes") or _bytes("bytes", BYTES), steps)
    for text in _warnings(found, steps):
        warning(text)
    if json:
        result_json(to_json(found))
    else:
        result(table(found))
    return 0


def to_json(found: Inferred) -> dict[str, Any]:
    """The result as plain values."""
    return {
        "shares": found.shares,
        "intervals": found.intervals or None,
        "token_shares": found.token_shares,
        "merges": found.merges,
        "unseen": found.unseen,
        "slack": found.slack,
        "places": found.places,
        "settled": found.settled,
        "alike": [list(group) for group in found.alike],
        "no_interval": found.no_interval or None,
        "replay_sources": None if found.alike else replay_sources(found),
    }


def replay_sources(found: Inferred) -> dict[str, float]:
    """`sources` of a replay that is mixed like the tokenizer's text, in tokens as mixtures of recipes are."""
    return {name: round(share, 4) for name, share in found.token_shares.items() if share >= 0.00005}


def table(found: Inferred) -> str:
    """The result as text for a terminal."""
    from cpt.report import show
    from cpt.report.table import aligned

    rows = [["source", "share of bytes", "95 % by documents", "share of tokens"]]
    for name, share in sorted(found.shares.items(), key=lambda pair: -pair[1]):
        low, high = found.intervals.get(name, (None, None))
        between = f"{show.share(low)} to {show.share(high)}" if low is not None else show.NOTHING
        rows.append([show.plain(name, 60), show.share(share), between, show.share(found.token_shares[name])])
    why = ["", f"no interval: {found.no_interval}"] if found.no_interval else []
    return "\n".join(
        [
            *aligned(rows, right=(1, 2, 3)),
            *why,
            "",
            f"merges  the first {found.merges:,}; {show.share(found.unseen)} of them occur in none of the sources",
            f"slack   {show.share(found.slack)} of the merged pairs' rates; 0 % = their order fits exactly",
            "",
            *_next(found),
        ]
    )


def _next(found: Inferred) -> list[str]:
    """A line to paste into a recipe, unless the shares mean nothing one by one."""
    if found.alike:
        names = " and ".join(f"`{name}`" for name in found.alike[0])
        return [f"next    give {names} as one source: their shares cannot be told apart, only their sum"]
    rough = found.unseen > UNSEEN or found.slack > SLACK or not found.settled
    sources = ", ".join(f"{name}: {share:g}" for name, share in replay_sources(found).items())
    return [
        *(["rough   the sources do not explain this tokenizer: take the shares below as a guess"] if rough else []),
        "next    in a stage that continues from this base model (shares of tokens):",
        f"        replay: {{from: base, share: 5%, sources: {{{sources}}}}}",
    ]


def _warnings(found: Inferred, asked: int) -> list[str]:
    said = []
    if found.merges < asked:
        said.append(f"the tokenizer has {found.merges:,} merges, fewer than {asked:,}")
    if found.unseen > UNSEEN:
        said.append(
            f"{100 * found.unseen:.0f} % of the merges occur in none of the sources: the tokenizer was trained on text "
            "of another kind too, and the shares are those among the sources given"
        )
    if found.slack > SLACK:
        said.append(
            f"the order of the merges fits badly (slack {100 * found.slack:.0f} %): the sources are not like the text "
            "that the tokenizer was trained on"
        )
    for group in found.alike:
        share = sum(found.shares[name] for name in group)
        said.append(
            f"{' and '.join(f'`{name}`' for name in group)} cannot be told apart by their texts: together they have "
            f"{100 * share:.1f} % of the bytes, and how it is split among them means nothing"
        )
    if not found.settled:
        said.append("the shares still moved in the last round")
    return said


def _bytes(key: str, value: str) -> int:
    from cpt.base.units import parse_bytes

    found = parse_bytes(value)
    if found < 10_000:
        raise UsageError(f"`{key}` is {value}, and so little text has no rates to compare", f"`{key}={BYTES}`")
    return found


def _sources(values: Mapping[str, str]) -> list[Source]:
    from cpt.base.registry import unknown
    from cpt.data import readers
    from cpt.plan.types import Source

    given: dict[str, dict[str, str]] = {}
    for key, value in values.items():
        name, _, part = key.partition(".")
        if part and part not in _OF_SOURCE:
            raise unknown(f"key of source `{name}`:", part, _OF_SOURCE)
        given.setdefault(name, {})[part or "paths"] = value
    if len(given) < 2:
        raise UsageError(
            "a mixture has at least two sources" + (", and one is given" if given else ""),
            "`cpt infer-mixture tokenizer.json sources.english='en/*.jsonl' sources.german='de/*.jsonl'`",
        )
    found = []
    for name, parts in given.items():
        reader = parts.get("reader", "files")
        if readers.READERS.get(reader).wants_paths and "paths" not in parts:
            raise UsageError(f"source `{name}` names no files", f"`sources.{name}='data/*.jsonl'`")
        paths = readers.expand(_list(parts["paths"]), Path.cwd()) if "paths" in parts else ()
        found.append(Source(name=name, reader=reader, paths=paths, text=parts.get("text", "text")))
    return found


def _list(value: str) -> list[str]:
    if value.startswith("[") and value.endswith("]"):
        return [part.strip().strip("\"'") for part in value[1:-1].split(",") if part.strip()]
    return [value]


def _infer(tokenizer: str, sources: list[Source], num_bytes: int, steps: int) -> Inferred:
    import os

    from cpt.data import draw, merges
    from cpt.laws import infer_mixture

    read = merges.read(tokenizer)
    cache = Path(os.environ.get("CPT_CACHE") or ".cpt/cache")
    samples = []
    for source in sources:
        _say(f"counting words of `{source.name}`")
        samples.append(infer_mixture.sample(source.name, draw.documents(source, num_bytes, cache), read))
    _say(f"applying {steps:,} merges and solving")
    found = infer_mixture.infer(read, samples, steps)
    _say("")
    return found


def _say(text: str) -> None:
    """One line that moves in a terminal, nothing elsewhere."""
    if sys.stderr.isatty() and not talk.quiet:
        sys.stderr.write("\r\x1b[K" + text)
        sys.stderr.flush()
