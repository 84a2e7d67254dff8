"""What a BPE tokenizer says about its own training: its merges in the order in which they were found, and how it cuts
text into the words inside of which pairs were counted.

Files converted from other formats list several merges for one token (every way to cut it in two). Only one of them was
found in training: the one that the earlier merges leave. The rest are dropped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError

SPACE = "▁"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Merge:
    """Two tokens that became one."""

    left: str
    right: str
    token: str


@dataclass(frozen=True)
class Merges:
    """The merges of a byte-pair tokenizer, and its way to cut text.

    Args:
        path: the `tokenizer.json`.
        merges: in the order of training.
        prefix: what tokens that go on inside of a word begin with (`##`), else empty.
        suffix: what tokens at the end of a word end with (`</w>`), else empty.
        dropped: merges of the file that training cannot have found.
    """

    path: Path
    merges: tuple[Merge, ...]
    prefix: str
    suffix: str
    dropped: int
    tokenizer: Any

    def words(self, text: str) -> Iterable[str]:
        """The words of a text as the tokenizer cuts it; pairs never reach over their borders."""
        normalizer, cut = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        if cut is not None:
            return [word for word, _ in cut.pre_tokenize_str(text)]
        return _before_spaces(text) if SPACE in text else [text]

    def symbols(self, word: str) -> list[str]:
        """A word as the tokens that merging begins with."""
        last = len(word) - 1
        return [
            (self.prefix if i else "") + letter + (self.suffix if i == last else "") for i, letter in enumerate(word)
        ]


def read(path: str | Path) -> Merges:
    """The merges of a tokenizer.

    Args:
        path: a folder with `tokenizer.json`, or that file.

    Raises:
        UsageError: there is none, or it is not of the byte-pair kind.
    """
    from cpt.base.files import read_json
    from cpt.data import tokenizer

    file = tokenizer.tokenizer_json(path)
    loaded = tokenizer.load(file)
    model = read_json(file)["model"]
    kind = model.get("type") or type(loaded.model).__name__
    if kind != "BPE":
        raise UsageError(
            f"`{file}` is a {kind} tokenizer, and only byte-pair merges (BPE) tell the order of what was frequent"
        )
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or ()]
    if not pairs:
        raise UsageError(f"`{file}` has no merges")
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    listed = [Merge(a, b, a + b.removeprefix(prefix)) for a, b in pairs]
    kept = tuple(_found(listed, prefix, suffix))
    return Merges(file, kept, prefix, suffix, len(listed) - len(kept), loaded)


def _found(listed: list[Merge], prefix: str, suffix: str) -> Iterator[Merge]:
    """The merges that training found: of several that make one token the one that the earlier merges leave."""
    ways: dict[str, list[int]] = {}
    for i, merge in enumerate(listed):
        ways.setdefault(merge.token, []).append(i)
    rank = {(m.left, m.right): i for i, m in enumerate(listed)}
    for i, merge in enumerate(listed):
        same = ways[merge.token]
        if len(same) == 1:
            yield merge
        elif i == same[0]:
            left = _merged(merge.token, listed, rank, i, prefix, suffix)
            yield next((listed[k] for k in same if [listed[k].left, listed[k].right] == left), merge)


def _merged(
    token: str, listed: list[Merge], rank: dict[tuple[str, str], int], before: int, prefix: str, suffix: str
) -> list[str]:
    """The parts of a token after all merges before one of them."""
    inner = bool(prefix) and token.startswith(prefix)
    letters = list(token.removeprefix(prefix) if inner else token)
    parts = [(prefix if k or inner else "") + letter for k, letter in enumerate(letters)]
    if suffix and token.endswith(suffix):
        end = len(letters) - len(suffix)
        parts = [*parts[: end - 1], parts[end - 1] + suffix]
    while len(parts) > 1:
        ranks = [rank.get(pair, before) for pair in pairwise(parts)]
        best = min(ranks)
        if best >= before:
            break
        at = ranks.index(best)
        parts[at : at + 2] = [listed[best].token]
    return parts


def _before_spaces(text: str) -> Iterator[str]:
    """Words of a text without a pre-tokenizer: SentencePiece cuts before each space while it trains."""
    start = 0
    for i in range(1, len(text)):
        if text[i] == SPACE:
            yield text[start:i]
            start = i
    yield text[start:]
