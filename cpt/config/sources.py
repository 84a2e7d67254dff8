"""Typed values of `sources`, `tokenizer` and `data` to the plan's types: files found, sizes looked up or estimated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt.base.errors import CptError, UsageError
from cpt.config.base import Checkpoint
from cpt.config.kinds import AUTO
from cpt.config.read import complete
from cpt.config.schema import SOURCE
from cpt.plan.check import OtherTokenizer
from cpt.plan.types import DataOptions, Source, Tokenizer


def build_sources(values: Mapping[str, Any], cwd: Path, errors: list[CptError]) -> dict[str, Source]:
    """The sources with their files found and their identity; what is wrong goes to `errors`."""
    found = {}
    for name, given in values.items():
        try:
            found[name] = _source(name, complete(SOURCE, given), cwd)
        except CptError as error:
            errors.append(type(error)(f"source `{name}`: {error.message}", *error.hints, more=error.more))
            found[name] = Source(name=name)
    return found


def _source(name: str, full: Mapping[str, Any], cwd: Path) -> Source:
    from cpt.data import catalog, readers

    reader = readers.READERS.get(full["reader"])
    if reader.wants_paths and not full["paths"]:
        raise UsageError("no files are named", f"`sources.{name}.paths='data/*.jsonl'`")
    if not reader.wants_paths and full["paths"]:
        raise UsageError(
            f"`paths` would have no effect: the reader `{full['reader']}` finds its text by itself",
            f"`sources.{name}.reader=files` reads files",
        )
    source = Source(
        name=name,
        reader=full["reader"],
        patterns=full["paths"],
        paths=readers.expand(full["paths"], cwd) if full["paths"] else (),
        text=full["text"],
        valid=full["valid"],
        valid_paths=readers.expand(full["valid_paths"], cwd) if full["valid_paths"] else (),
        allow_special=full["allow_special"],
        licence=full["licence"],
    )
    if not source.valid_paths and source.valid == 1:
        raise UsageError("`valid` is 1: nothing is left to train on")
    return dataclasses.replace(source, identity=catalog.identity(source))


def build_tokenizer(
    values: Mapping[str, Any], base: Checkpoint | None, sources: Mapping[str, Source], cache: Path, cwd: Path
) -> Tokenizer:
    """The run's tokenizer: the one that is named, the base's, or the one that is to be trained (found if it was).

    Raises:
        UsageError: there is none, or the keys contradict each other.
    """
    from cpt.base.registry import unknown
    from cpt.data import tokenizer as tokenizers

    path, train_on, size = values.get("path"), tuple(values.get("train_on") or ()), values.get("vocab_size")
    if train_on:
        if path is not None:
            raise UsageError("`tokenizer` has both `path` and `train_on`", "`~tokenizer.path` trains a new one")
        if base is not None:
            raise UsageError("`tokenizer.train_on` needs `base: scratch`: a base checkpoint has its own tokenizer")
        if size is None:
            raise UsageError("`tokenizer.vocab_size` is missing", "such as `tokenizer.vocab_size=32000`")
        if size < tokenizers.SMALLEST:
            raise UsageError(
                f"`tokenizer.vocab_size` is {size}, wanted at least {tokenizers.SMALLEST}: 256 bytes and one end"
            )
        for name in train_on:
            if name not in sources:
                error = unknown("source", name, sources)
                raise UsageError(f"`tokenizer.train_on`: {error.message}", *error.hints)
        trained = tokenizers.find_trained([sources[n] for n in train_on], size, cache)
        if trained is None:
            return Tokenizer(train_on=train_on, vocab_size=size)
        return Tokenizer(path=trained, train_on=train_on, vocab_size=size, hash=tokenizers.tokenizer_hash(trained))
    if size is not None:
        raise UsageError(
            "`tokenizer.vocab_size` would have no effect: no tokenizer is trained",
            "`tokenizer.train_on=[...]` trains one",
        )
    place = (cwd / Path(path).expanduser()).resolve() if path is not None else base.tokenizer if base else None
    if place is None:
        raise UsageError(
            "the run has no tokenizer" + (": there is none beside the base checkpoint" if base else ""),
            "`tokenizer=path/to/tokenizer.json` names one"
            + ("" if base else ", `tokenizer.train_on=[...]` trains one"),
        )
    file = tokenizers.tokenizer_json(place)
    return Tokenizer(path=str(file), hash=tokenizers.tokenizer_hash(file), vocab_size=tokenizers.vocab_size(file))


def fit(beside: Path | None, tokenizer: Tokenizer) -> OtherTokenizer | None:
    """How the run's tokenizer compares with the one beside a checkpoint; None when it is the same, or none is there."""
    from cpt.data import tokenizer as tokenizers

    if beside is None or tokenizer.path is None or tokenizers.tokenizer_hash(beside) == tokenizer.hash:
        return None
    return OtherTokenizer(tokenizers.vocab_size(beside), tokenizers.same_ids(beside, tokenizer.path))


def build_data(full: Mapping[str, Any], tokenizer: Tokenizer) -> DataOptions:
    """Packing options with `auto` resolved.

    Raises:
        UsageError: a token is asked for that the tokenizer does not have.
    """
    from cpt.data.tokenizer import auto_bos_eos

    bos, eos = (None if full[k] == AUTO else full[k] for k in ("bos", "eos"))
    if tokenizer.path is not None:
        bos, eos = auto_bos_eos(tokenizer.path, bos, eos)
    else:  # a new tokenizer has one special token, which ends documents
        bos, eos = bool(bos), True if eos is None else eos
    return DataOptions(bos=bos, eos=eos, reset_positions=full["reset_positions"], mask_documents=full["mask_documents"])


def with_facts(
    sources: Mapping[str, Source], tokenizer: Tokenizer, data: DataOptions, cache: Path, errors: list[CptError]
) -> dict[str, Source]:
    """The sources with their sizes: of the prepared corpus if there is one, else estimated."""
    from cpt.data import catalog

    found = {}
    for name, source in sources.items():
        facts = None
        if source.identity:
            try:
                facts = catalog.find(source, tokenizer.hash, data, str(cache)) or catalog.estimate(source, tokenizer)
            except CptError as error:
                errors.append(type(error)(f"source `{name}`: {error.message}", *error.hints, more=error.more))
        found[name] = dataclasses.replace(source, facts=facts)
    return found
