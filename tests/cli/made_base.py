"""A base model in the Hugging Face layout, made by transformers with random weights, and text files to go with it.

The text is real and already on the machine: the documentation and the source code of Python's standard library.
"""

from __future__ import annotations

import argparse
import inspect
import json
import pydoc_data.topics
import statistics
import textwrap
import typing
from pathlib import Path

VOCABULARY = 512
_MODULES = ("argparse", "inspect", "statistics", "textwrap", "typing")


def write_corpora(folder: Path) -> dict[str, Path]:
    """Three corpora as JSONL files: documentation topics in two halves, and source code."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    texts = {"topics": topics[0::2], "more_topics": topics[1::2], "code": _functions()}
    paths = {}
    for name, documents in texts.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return paths


def _functions() -> list[str]:
    """Source code of the functions of some modules, a document each."""
    modules = (argparse, inspect, statistics, textwrap, typing)
    members = [value for module in modules for _, value in inspect.getmembers(module, _has_source)]
    return sorted({inspect.getsource(value) for value in members})


def _has_source(value: object) -> bool:
    return inspect.isfunction(value) and value.__module__ in _MODULES


def write_base(folder: Path, corpus: Path) -> Path:
    """A Llama folder with config, weights and a tokenizer trained on `corpus`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
