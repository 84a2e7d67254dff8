"""Text taken out of installed packages, written once into the cache as JSON lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cpt.base.files import canonical_json, hash_text, write_atomic
from cpt.data.lock import building, publish

FORMAT = 1


def extracted(name: str, stamp: Any, documents: Callable[[], Iterable[tuple[str, str]]], cache: str | Path) -> str:
    """Path of the JSON lines file with these documents; made when it is not there.

    Args:
        name: of the reader.
        stamp: what the text is taken from; another one is another file.
        documents: gives (id, text) pairs in a fixed order. Exact copies are left out; equal ids are numbered.
        cache: folder of prepared things.
    """
    root = Path(cache) / "text"
    folder_name = f"{name}-{hash_text(canonical_json([FORMAT, stamp]))[:16]}"
    with building(root, folder_name, lambda folder: (folder / "text.jsonl").is_file()) as folder:
        if folder is not None:
            texts: set[str] = set()
            names: Counter[str] = Counter()
            lines = []
            for document, text in documents():
                digest = hash_text(text)
                if digest in texts:
                    continue
                texts.add(digest)
                names[document] += 1
                number = names[document]
                full = document if number == 1 else f"{document}#{number}"
                lines.append(json.dumps({"id": full, "text": text}, ensure_ascii=False) + "\n")
            write_atomic(folder / "text.jsonl", "".join(lines))
            publish(folder, root / folder_name)
    return str(root / folder_name / "text.jsonl")
