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


def utf8(text: str) -> tuple[str, bytes]:
    """A text and its UTF-8 bytes. Half surrogate pairs, which JSON escapes can spell, become U+FFFD."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text, text.encode()
