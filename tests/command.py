"""The command in this process, through the same path as the console script, and small inputs for it."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from cpt.cli import main

VOCABULARY = 64


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def cpt(*arguments: str) -> Ended:
    """Run `cpt ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return Ended(code, out.getvalue(), err.getvalue())


def write_base(folder: Path, **changes: object) -> Path:
    """A Hugging Face folder as far as plans look into one: config, tokenizer, and a weight file without tensors."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header = b"{}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    vocabulary = {"<|endoftext|>": 0} | {chr(31 + i): i for i in range(1, VOCABULARY)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0,
                "content": "<|endoftext|>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def write_corpus(path: Path, documents: int = 40, word: str = "TEXT") -> Path:
    """JSON lines with a `text` column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{word} {i} " * 20}) + "\n" for i in range(documents)))
    return path


RECIPE = """\
# Two stages on two corpora
base: {checkpoint: base}
sources:
  news: {paths: data/news.jsonl, valid: 10%}
  law: {paths: data/law.jsonl}
train: {seq_length: 64, global_batch_size: 8, micro_batch_size: 2, precision: fp32}
stages:
  domain:
    from: base
    keep: [weights]
    tokens: 20k
    mixture: {law: 0.8, news: 0.2}
    lr: {schedule: rewarm, peak: 1e-3, warmup: 10%}
  anneal:
    from: domain
    keep: [weights, optimizer, cursor, lr]
    tokens: 4k
    mixture: {law: 1}
    replay: {from: domain, share: 20%, sources: [news]}
    lr: {schedule: linear, end: 0}
  export: {kind: convert, from: anneal, to: hf}
"""


def write_project(folder: Path, recipe: str = RECIPE) -> Path:
    """A folder with a base checkpoint, two corpora and `recipes/two.yaml`."""
    write_base(folder / "base")
    write_corpus(folder / "data" / "news.jsonl", word="NEWS")
    write_corpus(folder / "data" / "law.jsonl", word="LAW")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "two.yaml").write_text(recipe)
    return folder


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder with its time of change: what must stay as it was."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}
