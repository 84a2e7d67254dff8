"""Which documents are held out: a function of the document's text alone, so that it stays when files move or grow.

Exact copies of a document fall on the same side.
"""

from __future__ import annotations

import hashlib

SPACE = 1 << 64


def document_hash(text: bytes) -> int:
    """64 bits that look random, the same for equal texts."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def limit(share: float) -> int:
    """Documents whose hash is below this are held out; `share` of them [fraction]."""
    return round(share * SPACE)


def settled(limit: int, least: int, train: int, held_out: int) -> int:
    """The limit that leaves a small source something on both sides; `limit` itself where it does so already.

    Args:
        limit: the wanted one; 0 holds nothing out.
        least: smallest document hash of the source.
        train: documents that `limit` leaves to train on.
        held_out: documents that it holds out.
    """
    if not limit or (train and held_out):
        return limit
    return least + 1 if train + held_out > 1 and limit != least + 1 else 0


def utf8(text: str) -> tuple[str, bytes]:
    """A text and its UTF-8 bytes. Half surrogate pairs, which JSON escapes can spell, become U+FFFD."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text, text.encode()
