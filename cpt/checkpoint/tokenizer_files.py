"""The files of a tokenizer that lie beside a checkpoint's weights, and go along with them. No torch, no tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.files import read_json

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Those of a tokenizer, and the defaults of generation that Hugging Face folders have beside them.
_NAMES = (
    TOKENIZER,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# What `AutoTokenizer` asks for beside a bare `tokenizer.json`.
PLAIN_SETTINGS = (json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n").encode()


def in_folder(folder: Path) -> dict[str, Path]:
    """The files of a folder by name; may be none."""
    names = (*_NAMES, *sorted(p.name for p in folder.glob("*.tiktoken")))
    return {name: folder / name for name in names if (folder / name).is_file()}


def named(path: Path) -> dict[str, Path]:
    """The files of a tokenizer that a person or a run names: a folder, or a `tokenizer.json` under any name.

    Raises:
        UsageError: there is none, or its settings are not JSON.
    """
    folder = path if path.is_dir() else path.parent
    found = in_folder(folder)
    if path.is_file():
        found[TOKENIZER] = path
    if TOKENIZER not in found:
        raise UsageError(f"there is no `{TOKENIZER}` in `{folder}`")
    if SETTINGS in found:
        try:
            read_json(found[SETTINGS])
        except ValueError:
            raise UsageError(f"`{found[SETTINGS]}` is not JSON") from None
    return found


def of_checkpoint(folder: Path) -> Path | None:
    """The tokenizer of a native checkpoint: beside its files, or the one that its run recorded.

    Args:
        folder: `iter_*`; in a run it is `RUN/stages/<stage>/checkpoints/iter_*`.

    Returns:
        A folder or a `tokenizer.json`; None where neither is there.
    """
    if (folder / TOKENIZER).is_file():
        return folder
    try:
        path = read_json(folder.resolve().parents[3] / "prepared.json")["tokenizer"]
        return Path(path) if path and Path(path).is_file() else None
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None
