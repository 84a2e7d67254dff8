"""A continuation of a text by a checkpoint, on this machine in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import UsageError
from cpt.base.files import read_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    With `temperature` 0 the likeliest one; else at random among the likeliest whose probabilities add up to `top_p`.
    """

    tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"`--tokens` is {self.tokens}, at least 1 is wanted")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"`--temperature` is {self.temperature}, 0 or more is wanted")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"`--top-p` is {self.top_p}, more than 0 and at most 1 is wanted")


@dataclass(frozen=True)
class Found:
    """What a person's path leads to: a checkpoint folder, its kind and its tokenizer."""

    folder: Path
    kind: str  # native | hf
    tokenizer: Path


def find(path: str | Path, tokenizer: str | Path | None = None) -> Found:
    """The checkpoint that `path` means and the tokenizer that goes with it. No torch is loaded.

    Args:
        path: as `checkpoint.find.find` takes it; the checkpoint must be one of ours, or a Hugging Face folder.
        tokenizer: folder or `tokenizer.json`; needed when a native checkpoint was moved out of its run.

    Raises:
        UsageError: there is no checkpoint, it is of another format, there is no tokenizer, or it is another one.
    """
    from cpt.checkpoint import find as checkpoints
    from cpt.checkpoint import manifest, tokenizer_files
    from cpt.data.tokenizer import tokenizer_hash, tokenizer_json

    found = checkpoints.find(Path(path))
    folder = found.folder
    if found.format == "hf":
        return Found(folder, "hf", tokenizer_json(tokenizer if tokenizer is not None else folder))
    if not (folder / manifest.NAME).is_file():
        raise UsageError(
            f"`{folder}` is in {checkpoints.known()[found.format].title}, which is not sampled from",
            f"`cpt convert-ckpt {folder} OUT --to hf` makes a folder to sample from",
        )
    if tokenizer is None:
        tokenizer = tokenizer_files.of_checkpoint(folder)
    if tokenizer is None:
        raise UsageError(
            f"the tokenizer of `{folder}` is not known: its run folder is not around it", "give it with `--tokenizer`"
        )
    file = tokenizer_json(tokenizer)
    wanted = manifest.read(folder).origin.tokenizer_hash
    if wanted and tokenizer_hash(file) != wanted:
        raise UsageError(f"`{file}` is not the tokenizer that `{folder}` was trained with")
    return Found(folder, "native", file)


class Model:
    """A checkpoint ready to continue texts. One at a time in a process; `close` when done."""

    def __init__(self, found: Found) -> None:
        from cpt.checkpoint import hf, manifest, native
        from cpt.data.tokenizer import auto_bos_eos, load, special_ids
        from cpt.engine import device
        from cpt.plan.model import Parallel

        device.install()  # before Megatron-core is imported: it also silences the import's warnings
        from cpt.engine import distributed, megatron

        self.tokenizer = load(found.tokenizer)
        bos_id, self.eos_id = special_ids(found.tokenizer)
        self.start = (
            [bos_id] if _begins_with_bos(found, auto_bos_eos(found.tokenizer)[0]) and bos_id is not None else []
        )
        facts = manifest.read(found.folder) if found.kind == "native" else None
        config = facts.model if facts else hf.read_config(found.folder)
        precision = "bf16" if device.has_cuda() and (facts is None or facts.precision == "bf16") else "fp32"
        layout = Parallel()
        distributed.init(layout, 0, 1, address="127.0.0.1:0")
        self.engine = megatron.build(config, layout, precision=precision, optimizer=None)
        if facts:
            native.load(self.engine, found.folder, keep={"weights"})
        else:
            hf.load(self.engine, found.folder)

    def continuation(self, text: str, options: Sampling) -> Iterator[str]:
        """The continuation of `text`, in pieces as they are made.

        Ends at `options.tokens` tokens or before the end-of-text token. Of a longer text only the last tokens that the
        model has positions for are read.
        """
        ids = self.start + self.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            if self.eos_id is None:
                raise UsageError("the text is empty and the tokenizer has no token to begin with")
            ids = [self.eos_id]
        if max(ids) >= self.engine.model.vocab_size:
            raise UsageError("the tokenizer has tokens that the model does not know; is it the model's own?")
        prompt = len(ids)
        choose = _chooser(options)
        shown = self.tokenizer.decode(ids[len(self.start) :])
        for _ in range(options.tokens):
            token = choose(self._next_logits(ids))
            if token == self.eos_id and not options.ignore_eos:
                break
            ids.append(token)
            whole = self.tokenizer.decode(ids[len(self.start) :])
            # Half a character decodes to the replacement character: wait for the rest.
            if not whole.endswith("�") and whole.startswith(shown):
                if whole != shown:
                    yield whole[len(shown) :]
                shown = whole
        whole = self.tokenizer.decode(ids[len(self.start) :])
        if len(ids) > prompt and whole.startswith(shown) and whole != shown:
            yield whole[len(shown) :]

    def _next_logits(self, ids: list[int]) -> torch.Tensor:
        import torch

        from cpt.engine import megatron

        window = ids[-self.engine.model.max_position_embeddings :]
        logits = megatron.logits(self.engine, torch.tensor([window]))
        assert logits is not None
        return logits[0, -1].cpu()

    def close(self) -> None:
        """Leave the process group."""
        from cpt.engine import distributed

        distributed.shutdown()


def _begins_with_bos(found: Found, otherwise: bool) -> bool:
    """Whether the run put a BOS token before each document; else what the tokenizer says."""
    if found.kind == "native":
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError, TypeError):
            return bool(read_json(found.folder.resolve().parents[3] / "plan.json")["data"]["bos"])
    return otherwise


def _chooser(options: Sampling) -> Callable[[Any], int]:
    """Function from the logits [V] of the next token to the token."""
    import torch

    if options.temperature == 0:
        return lambda logits_V: int(logits_V.argmax())
    generator = torch.Generator().manual_seed(options.seed)

    def choose(logits_V: torch.Tensor) -> int:
        p_V, order_V = (logits_V.double() / options.temperature).softmax(0).sort(descending=True, stable=True)
        before_V = p_V.cumsum(0) - p_V
        p_V = p_V * (before_V < options.top_p)
        return int(order_V[torch.multinomial(p_V, 1, generator=generator)])

    return choose
