"""Texts to token ids: `tokenizers` is the reference, `gigatoken` does the same many times faster where installed.

The fast encoder is never believed blindly: a probe text (special tokens, scripts, spaces, digits) is compared before
it is used, and of every source the first few documents and 1 in 1,000 after that are encoded by both (`check`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

REFERENCE, FAST = "tokenizers", "gigatoken"
CHECK_EVERY = 1000
CHECK_FIRST = 4

_PROBE = (
    "The quick brown fox's 12,345.678 jumps — don't stop!  Two  spaces,\ttab\r\n\n\n  indented\n"
    "def f(x):\n    return x**2 + 1  # π ≈ 3.14159\n Ünïcödé é e\u0301 ﬁ ½ № ① ﷺ İ ß ſ "
    "中文字符，测试。日本語テキスト 한국어 русский текст العربية עברית हिन्दी ไทย "
    "👩‍👩‍👧‍👦🇩🇪 \u200b\u00a0\u3000end \u2028 _x_ ▁ Ġ "
)


class Encoder(Protocol):
    """Encodes many texts at once, without BOS and EOS."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Ids of all texts one after the other, and the tokens of each."""
        ...


@dataclass(frozen=True)
class Encoding:
    """How texts become documents; picklable.

    `bos_id`, `eos_id`: put around each document; None leaves it out. `allow_special`: strings like `<|endoftext|>` in a
    text become that token instead of plain text.
    """

    tokenizer: str  # path of tokenizer.json
    bos_id: int | None
    eos_id: int | None
    dtype: str
    allow_special: bool = False


class Reference:
    """The Hugging Face library."""

    name = REFERENCE

    def __init__(self, encoding: Encoding) -> None:
        from cpt.data.tokenizer import load

        self._tokenizer = load(encoding.tokenizer)
        self._tokenizer.encode_special_tokens = not encoding.allow_special
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        found = [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, found), np.int32, len(found))
        ids = np.fromiter((i for ids in found for i in ids), np.int64, int(lengths.sum(dtype=np.int64)))
        return ids, lengths


class Fast:
    """gigatoken, on one thread. Its cache of words grows without bound: whoever holds one must let go of it in time."""

    name = FAST

    def __init__(self, encoding: Encoding) -> None:
        import gigatoken

        with open(encoding.tokenizer, encoding="utf-8") as file:
            value = json.load(file)
        if not encoding.allow_special:
            value["added_tokens"] = [t for t in value.get("added_tokens") or [] if not t.get("special")]
        value["truncation"] = value["padding"] = None
        self._tokenizer = gigatoken.Tokenizer.from_json(json.dumps(value))

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int32)
        layout = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets).astype(np.int32)


def choose(encoding: Encoding) -> tuple[str, str | None]:
    """Name of the encoder to use, and why it is not the fast one when that is installed."""
    from importlib.util import find_spec

    if find_spec("gigatoken") is None:
        return REFERENCE, None
    probe = probes(encoding.tokenizer)
    try:
        same = equal(Fast(encoding).encode(probe), Reference(encoding).encode(probe))
    except (Exception, BaseException) as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return REFERENCE, f"gigatoken cannot read this tokenizer ({str(error).splitlines()[0][:120]})"
    return (FAST, None) if same else (REFERENCE, "gigatoken gave other ids for the probe text")


def probes(tokenizer: str) -> list[str]:
    """Texts on which encoders tend to differ, with every special token of the tokenizer in them."""
    with open(tokenizer, encoding="utf-8") as file:
        added = [t["content"] for t in json.load(file).get("added_tokens") or []]
    return [_PROBE, _PROBE * 3, " leading", "trailing ", "", "a", "".join(f"x{t} y {t}{t}" for t in added)]


def equal(
    a: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], b: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
) -> bool:
    """Whether two encodings are the same ids in the same documents."""
    return np.array_equal(a[1], b[1]) and np.array_equal(a[0], b[0])


def wrap(
    ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], encoding: Encoding
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Put BOS and EOS around each document.

    Shapes:
        ids [tokens], lengths [documents] → the same with the added tokens, ids in the type of the shard
    """
    bos, eos = encoding.bos_id, encoding.eos_id
    dtype = np.dtype(encoding.dtype)
    if bos is None and eos is None:
        return ids.astype(dtype), lengths
    sizes = (lengths + ((bos is not None) + (eos is not None))).astype(np.int32)
    ends = np.cumsum(sizes, dtype=np.int64)
    out = np.empty(int(ends[-1]) if len(ends) else 0, dtype)
    text = np.ones(len(out), bool)
    for value, places in ((bos, ends - sizes), (eos, ends - 1)):
        if value is not None:
            out[places] = value
            text[places] = False
    out[text] = ids
    return out, sizes
