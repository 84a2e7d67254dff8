"""Training and reading tokenizers; BOS and EOS follow them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.base.files import hash_file
from cpt.data import split, tokenizer
from cpt.data.encode import Encoding, Fast, Reference, equal, probes
from cpt.plan.types import Source
from tests.shared import shared_data

WORDS = ["river", "mountain", "Zwölf", "naïve", "东京", "don't", "12,345", "foo_bar", "👍", "end."]


def source(folder: Path, count: int = 200, valid: float = 0.1, name: str = "words") -> Source:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    documents = [" ".join(WORDS[(i * k + j) % 10] for j in range(3 + i % 17) for k in (1, 3)) for i in range(count)]
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return Source(name=name, paths=(str(path),), valid=valid)


def test_a_new_tokenizer_is_cached_deterministic_and_loads_in_transformers(tmp_path: Path) -> None:
    corpus = source(tmp_path)
    assert tokenizer.find_trained([corpus], 300, tmp_path / "1") is None
    path = tokenizer.train([corpus], 300, tmp_path / "1")
    assert (
        tokenizer.find_trained([corpus], 300, tmp_path / "1") == path == tokenizer.train([corpus], 300, tmp_path / "1")
    )
    code = "import sys; from cpt.data import tokenizer; from cpt.plan.types import Source; "
    code += f"print(tokenizer.train([Source(name='w', paths={corpus.paths!r}, valid=0.1)], 300, sys.argv[1]))"
    other = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "2"], text=True, capture_output=True, check=True
    ).stdout.strip()
    assert hash_file(path) == hash_file(other)
    model = tokenizer.load(path)
    assert model.get_vocab_size() == 300 == tokenizer.vocab_size(path)
    assert model.token_to_id("<|endoftext|>") == 0
    text = "Ünknown  text,\n\twith 日本 and <|endoftext|>"
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(Path(path).parent))
    assert loaded.eos_token_id == 0 and loaded.decode(loaded.encode(text)) == text
    assert tokenizer.special_ids(path) == (0, 0) and tokenizer.auto_bos_eos(path) == (False, True)


def test_touched_files_find_their_tokenizer_again(tmp_path: Path) -> None:
    corpus = source(tmp_path)
    path = tokenizer.train([corpus], 300, tmp_path / "c")
    Path(corpus.paths[0]).touch()
    assert tokenizer.find_trained([corpus], 300, tmp_path / "c") is None
    before = Path(path).stat().st_mtime_ns
    assert tokenizer.train([corpus], 300, tmp_path / "c") == path and Path(path).stat().st_mtime_ns == before
    assert tokenizer.find_trained([corpus], 300, tmp_path / "c") == path


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    corpus = source(tmp_path)
    texts = {t for batch in tokenizer.train_texts([corpus], tmp_path) for t in batch}
    everything = {json.loads(line)["text"] for line in Path(corpus.paths[0]).read_text().splitlines()}
    assert texts == {t for t in everything if split.document_hash(t.encode()) >= split.limit(0.1)}
    assert 0 < len(everything - texts) < 50


def test_the_one_held_out_document_of_a_tiny_source_is_left_out_too(tmp_path: Path) -> None:
    corpus = source(tmp_path, count=5, valid=1e-9)
    assert sum(len(batch) for batch in tokenizer.train_texts([corpus], tmp_path)) == 4


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 257"):
        tokenizer.train([source(tmp_path)], 256, tmp_path / "c")


def made(folder: Path, config: dict | None, processor: dict | None = None) -> Path:
    """A tokenizer with <s> 0, </s> 1, <|endoftext|> 2."""
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    model = Tokenizer(models.BPE({"a": 3}, []))
    model.add_special_tokens(["<s>", "</s>", "<|endoftext|>"])
    value = json.loads(model.to_str())
    names = ["<s>", "</s>", "<|endoftext|>"]
    for i, (token, name) in enumerate(zip(value["added_tokens"], names, strict=True)):
        token |= {"id": i, "content": name}
    value["post_processor"] = processor
    (folder / "tokenizer.json").write_text(json.dumps(value))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    "config, processor, ids, auto",
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, None, (0, 1), (False, True)),
        ({"bos_token": "<s>", "eos_token": "</s>"}, TEMPLATE, (0, 1), (True, True)),
        (
            {"bos_token": "<s>", "eos_token": "</s>"},
            {"type": "Sequence", "processors": [TEMPLATE]},
            (0, 1),
            (True, True),
        ),
        ({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}, None, (0, 1), (True, True)),
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, TEMPLATE, (0, 1), (False, True)),
        ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, None, (2, 2), (False, True)),
        ({"bos_token": None, "eos_token": "<|endoftext|>"}, None, (None, 2), (False, True)),
        ({"bos_token": None, "eos_token": None}, None, (None, None), (False, False)),
        (None, None, (None, 2), (False, True)),
    ],
)
def test_bos_and_eos_follow_the_tokenizer(
    tmp_path: Path, config: dict | None, processor: dict | None, ids: tuple, auto: tuple
) -> None:
    folder = made(tmp_path / "t", config, processor)
    assert tokenizer.special_ids(folder) == ids
    assert tokenizer.auto_bos_eos(folder) == auto
    assert tokenizer.auto_bos_eos(folder, eos=False)[1] is False


def test_the_models_config_names_ids_where_nothing_else_does(tmp_path: Path) -> None:
    folder = made(tmp_path / "t", None)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))
    assert tokenizer.special_ids(folder) == (0, 1)


def test_asking_for_a_token_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "t", {"bos_token": None, "eos_token": "</s>"})
    with pytest.raises(UsageError, match=r"`data.bos` is on.*no BOS"):
        tokenizer.auto_bos_eos(folder, bos=True)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 3}', "\x00"])
def test_a_broken_tokenizer_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    for call in (tokenizer.load, tokenizer.special_ids, tokenizer.vocab_size):
        with pytest.raises(UsageError, match="is not a tokenizer"):
            call(tmp_path)
    with pytest.raises(UsageError, match="no tokenizer at"):
        tokenizer.load(tmp_path / "nothing")


def encoders(path: Path, allow: bool) -> tuple[Reference, Fast]:
    pytest.importorskip("gigatoken")
    encoding = Encoding(str(path), None, None, "int32", allow)
    return Reference(encoding), Fast(encoding)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("model", ["trained", "stories260K", "tiny-general-1m"])
def test_both_encoders_agree_on_special_strings(tmp_path: Path, model: str, allow: bool) -> None:
    if model == "trained":
        path = Path(tokenizer.train([source(tmp_path)], 300, tmp_path / "c"))
    else:
        path = shared_data("models", model) / "tokenizer.json"
    reference, fast = encoders(path, allow)
    texts = [*probes(str(path)), "a <|endoftext|>b", "</s><s>", "x"]
    assert equal(reference.encode(texts), fast.encode(texts))
    ids = reference.encode(["z<|endoftext|>" if model != "stories260K" else "z</s>"])[0].tolist()
    special = tokenizer.special_ids(path)[1]
    assert (special in ids) == allow
