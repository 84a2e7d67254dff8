"""A prepared corpus: a folder with train and held-out documents as Megatron shards, and what they are.

train.bin train.idx valid.bin valid.idx     token ids, one sequence a document, BOS and EOS included
valid.bytes                                 text bytes of each held-out document (int64, little endian)
catalog.json                                written last: documents, tokens, hashes, tokenizer, encoder, licence
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import UsageError
from cpt.base.files import read_json
from cpt.plan.types import SourceFacts

if TYPE_CHECKING:
    import numpy as np

    from cpt.data.shards import Shard

FORMAT = 1
CATALOG = "catalog.json"


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. Opening one reads a small JSON file; shards are mapped when they are first read."""

    folder: Path
    catalog: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """The corpus in a folder.

        Raises:
            UsageError: there is none, or it is not whole.
        """
        found = cls.find(folder)
        if found is None:
            raise UsageError(f"no whole corpus in `{folder}`", "`cpt data prepare` makes it again")
        return found

    @classmethod
    def find(cls, folder: str | Path) -> Corpus | None:
        """The corpus in a folder, or None when there is none or a file of it is missing or cut."""
        folder = Path(folder)
        try:
            catalog = read_json(folder / CATALOG)
            whole = catalog["format"] == FORMAT and all(
                (folder / name).stat().st_size == size for name, size in catalog["files"].items()
            )
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            return None
        return cls(folder, catalog) if whole else None

    @cached_property
    def train(self) -> Shard:
        """Documents to train on."""
        from cpt.data.shards import Shard

        return Shard(self.folder / "train")

    @cached_property
    def valid(self) -> Shard:
        """Held-out documents."""
        from cpt.data.shards import Shard

        return Shard(self.folder / "valid")

    def valid_bytes(self) -> np.ndarray[Any, Any]:
        """Bytes of UTF-8 text of each held-out document."""
        import numpy as np

        return np.fromfile(self.folder / "valid.bytes", "<i8")

    @property
    def content_hash(self) -> str:
        """What the shards hold: token ids, documents, tokenizer."""
        return str(self.catalog["content_hash"])

    @property
    def bos_id(self) -> int | None:
        """The token before each document, if there is one."""
        found: int | None = self.catalog["bos_id"]
        return found

    @property
    def eos_id(self) -> int | None:
        """The token after each document, if there is one."""
        found: int | None = self.catalog["eos_id"]
        return found

    @property
    def facts(self) -> SourceFacts:
        """Size of the train split, exact."""
        c = self.catalog
        return SourceFacts(
            tokens=c["tokens"],
            documents=c["documents"],
            bytes=c["bytes"],
            estimated=False,
            content_hash=c["content_hash"],
            valid_tokens=c["valid"]["tokens"],
        )
