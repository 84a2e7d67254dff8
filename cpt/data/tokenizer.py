"""The tokenizer of a run: `tokenizer.json` (Hugging Face `tokenizers`) with `tokenizer_config.json` beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.files import canonical_json, hash_file, hash_text, read_json, write_atomic, write_json
from cpt.data.lock import building, publish, writing
from cpt.plan.types import Source

END = "<|endoftext|>"
SMALLEST = 257  # 256 bytes and END
TRAIN_BYTES = 1 << 30  # a new tokenizer sees at most about so much text; documents are chosen by their hash


def tokenizer_json(path: str | Path) -> Path:
    """The `tokenizer.json` in a folder, or the file itself.

    Raises:
        UsageError: there is none.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no tokenizer at `{path}`", "a folder with `tokenizer.json`, or that file, is wanted")
    return file


def load(path: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder or file."""
    from tokenizers import Tokenizer

    file = tokenizer_json(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare `Exception`
        raise UsageError(f"`{file}` is not a tokenizer: {str(error).splitlines()[0]}") from None


def tokenizer_hash(path: str | Path) -> str:
    """Identity of a tokenizer: SHA-256 of its `tokenizer.json`."""
    return hash_file(tokenizer_json(path))


def special_ids(path: str | Path) -> tuple[int | None, int | None]:
    """Ids of the BOS and EOS tokens, None where the tokenizer has none.

    Their names are read from `tokenizer_config.json`, then `special_tokens_map.json` beside the tokenizer; without
    either the ids of the model's `config.json` count.
    """
    file = tokenizer_json(path)
    ids = _token_ids(str(file), file.stat().st_mtime_ns)
    found: list[int | None] = []
    settings = [_settings(file.parent / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    model = _settings(file.parent / "config.json")
    for name in ("bos_token", "eos_token"):
        token = next((_content(s[name]) for s in settings if s.get(name)), None)
        if token is not None:
            found.append(ids.get(token))
        elif any(name in s for s in settings):
            found.append(None)  # said to have none
        else:
            value = model.get(f"{name}_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and value in set(ids.values()):
                found.append(value)
            else:
                found.append(ids.get(END) if name == "eos_token" else None)
    return found[0], found[1]


def auto_bos_eos(path: str | Path, bos: bool | None = None, eos: bool | None = None) -> tuple[bool, bool]:
    """Whether documents get a BOS and an EOS token. None follows the tokenizer.

    A BOS is put where the tokenizer itself puts one (`add_bos_token`, or the template of its post-processor), an EOS
    wherever the tokenizer has one: it is what ends a document for the model.

    Raises:
        UsageError: one is asked for that the tokenizer does not have.
    """
    bos_id, eos_id = special_ids(path)
    file = tokenizer_json(path)
    if bos is None:
        says = _settings(file.parent / "tokenizer_config.json").get("add_bos_token")
        puts = says if isinstance(says, bool) else _begins_with(read_json(file).get("post_processor"), bos_id, file)
        bos = bos_id is not None and puts and bos_id != eos_id
    if eos is None:
        eos = eos_id is not None
    for wanted, found, name in ((bos, bos_id, "bos"), (eos, eos_id, "eos")):
        if wanted and found is None:
            raise UsageError(f"`data.{name}` is on, but the tokenizer in `{file.parent}` names no {name.upper()} token")
    return bos, eos


def vocab_size(path: str | Path) -> int:
    """One more than the largest id."""
    file = tokenizer_json(path)
    return max(_token_ids(str(file), file.stat().st_mtime_ns).values()) + 1


def same_ids(own: str | Path, other: str | Path) -> float:
    """The share of the tokens of `own` that have the same id in `other` [fraction]."""
    files = tokenizer_json(own), tokenizer_json(other)
    ids, others = (_token_ids(str(file), file.stat().st_mtime_ns) for file in files)
    return sum(others.get(token) == number for token, number in ids.items()) / max(1, len(ids))


@lru_cache(maxsize=8)
def _token_ids(file: str, _mtime: int) -> dict[str, int]:
    try:
        value = read_json(file)
        vocab = value["model"].get("vocab", {})
        ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        return ids | {t["content"]: int(t["id"]) for t in value.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"`{file}` is not a tokenizer") from None


def _settings(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise UsageError(f"`{path}` is not JSON") from None
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _begins_with(processor: Any, bos_id: int | None, file: Path) -> bool:
    """Whether a post-processor puts the BOS token first."""
    if not isinstance(processor, dict) or bos_id is None:
        return False
    if processor.get("type") == "Sequence":
        return any(_begins_with(p, bos_id, file) for p in processor.get("processors", []))
    single = processor.get("single") or []
    first = single[0].get("SpecialToken", {}).get("id") if single and isinstance(single[0], dict) else None
    return first is not None and _token_ids(str(file), file.stat().st_mtime_ns).get(first) == bos_id


def train(sources: Sequence[Source], vocab_size: int, cache: str | Path) -> str:
    """Train a byte-level BPE tokenizer on the train split of sources; give the path of its `tokenizer.json`.

    `<|endoftext|>` is id 0 and ends documents. Held-out documents are left out. The result is cached by what the
    sources hold, the size of the vocabulary and the version of the library.

    Args:
        sources: what to train on.
        vocab_size: of the new tokenizer.
        cache: folder of prepared things.
    """
    from cpt.data import catalog

    if vocab_size < SMALLEST:
        raise UsageError(f"`tokenizer.vocab_size` is {vocab_size}; 256 bytes and `{END}` need at least {SMALLEST}")
    found = find_trained(sources, vocab_size, cache)
    if found:
        return found
    root = Path(cache) / "tokenizers"
    stamp = _stamp(sources, vocab_size)
    with writing(cache):
        name = _name([catalog.raw_hash(s, cache) for s in sources], sources, vocab_size)
        with building(root, name, lambda folder: (folder / "tokenizer.json").is_file()) as folder:
            if folder is not None:
                _train(sources, vocab_size, Path(cache), folder)
                publish(folder, root / name)
        write_json(Path(cache) / "lookup" / f"{stamp}.json", {"tokenizer": name})
    return str(root / name / "tokenizer.json")


def find_trained(sources: Sequence[Source], vocab_size: int, cache: str | Path) -> str | None:
    """Path of the tokenizer that `train` would give, if it was trained before and the files look untouched. Cheap."""
    try:
        name = read_json(Path(cache) / "lookup" / f"{_stamp(sources, vocab_size)}.json")["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    file = Path(cache) / "tokenizers" / str(name) / "tokenizer.json"
    return str(file) if file.is_file() else None


def _stamp(sources: Sequence[Source], vocab_size: int) -> str:
    from cpt.data import catalog

    return _name([catalog.stamp(s) for s in sources], sources, vocab_size)


def _name(identities: Sequence[Any], sources: Sequence[Source], vocab_size: int) -> str:
    from importlib.metadata import version

    options = [[s.text, s.valid if not s.valid_paths else 0.0] for s in sources]
    return hash_text(
        canonical_json(["tokenizer", 1, list(identities), options, vocab_size, TRAIN_BYTES, version("tokenizers")])
    )[:32]


def _train(sources: Sequence[Source], vocab_size: int, cache: Path, folder: Path) -> None:
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train_texts(sources, cache), trainer)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": int(1e9),
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def train_texts(sources: Sequence[Source], cache: Path) -> Iterator[list[str]]:
    """Texts of the train splits in small lists, at most about `TRAIN_BYTES` of them, chosen by hash."""
    from cpt.data import catalog, split

    total = sum(catalog.raw_bytes(s, cache) for s in sources)
    keep = split.limit(min(1.0, TRAIN_BYTES / max(1, total)))
    for source in sources:
        held = held_out_limit(source, cache)
        for batch in _batches(source, cache):
            hashed = [(split.document_hash(data), t) for t, data in map(split.utf8, batch)]
            # mixed once more, because the hash itself decides what is held out
            yield [t for h, t in hashed if h >= held and (h * 0x9E3779B97F4A7C15) % split.SPACE < keep]


def held_out_limit(source: Source, cache: Path) -> int:
    """The hash below which documents of a source are held out; at least one is, where there are two or more."""
    from cpt.data import split

    if source.valid_paths or not source.valid:
        return 0
    limit = split.limit(source.valid)
    least, train, held_out = split.SPACE, 0, 0
    for batch in _batches(source, cache):
        for text in filter(None, batch):
            number = split.document_hash(split.utf8(text)[1])
            least = min(least, number)
            held_out += number < limit
            train += number >= limit
            if train and held_out:
                return limit
    return split.settled(limit, least, train, held_out)


def _batches(source: Source, cache: Path) -> Iterable[list[str]]:
    from cpt.data import pieces, readers

    for piece in pieces.pieces(readers.files(source, cache), source.text):
        yield pieces.texts(piece, source.text)
