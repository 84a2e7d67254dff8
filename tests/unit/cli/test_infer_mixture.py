"""`cpt infer-mixture` as a person calls it: the table, the JSON, what to paste, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.command import cpt, write_base, write_project
from tests.unit.laws import planted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two made languages, 0.7 and 0.3 of a tokenizer's text, and other documents of them in files."""
    folder = tmp_path_factory.mktemp("mixture")
    texts = {"news": planted.made_language(1, "abcdefghij", 900), "law": planted.made_language(2, "fghijklmno", 900)}
    seen = {name: part[:500] for name, part in texts.items()}
    planted.train(seen, {"news": 0.7, "law": 0.3}, 250_000, 400, folder / "tokenizer.json", "byte")
    for name, part in texts.items():
        lines = [json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(part[500:])]
        (folder / f"{name}-1.jsonl").write_text("".join(lines[:200]))
        (folder / f"{name}-2.jsonl").write_text("".join(lines[200:]))
    return folder


def keys(folder: Path) -> list[str]:
    found = [f"sources.{name}={folder}/{name}-*.jsonl" for name in ("news", "law")]
    return [str(folder), *found, "sources.news.text=body", "sources.law.text=body", "merges=400", "bytes=200kB"]


def test_shares_come_as_a_table_and_as_json(folder: Path) -> None:
    ended = cpt("infer-mixture", *keys(folder))
    assert ended.code == 0, ended.err
    assert re.search(r"news +(6[789]|7[0123])\.\d % .* to .*", ended.out) and "merges  the first 400" in ended.out
    told = json.loads(cpt("infer-mixture", *keys(folder), "--json").out)
    assert told["shares"]["news"] == pytest.approx(0.7, abs=0.03)
    assert set(told["intervals"]) == {"news", "law"} and told["settled"] is True
    assert sum(told["replay_sources"].values()) == pytest.approx(1, abs=1e-3)


def test_what_it_says_to_paste_is_a_replay_that_a_plan_takes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = re.search(r"replay: (\{.*\})", cpt("infer-mixture", *keys(folder)).out)
    assert said is not None
    monkeypatch.chdir(write_project(tmp_path))
    ended = cpt("plan", "recipe=two", f"stages.anneal.replay={said[1]}", "--json")
    assert ended.code == 0, ended.err
    replay = json.loads(ended.out)["plan"]["stages"]["anneal"]["train"]["replay"]
    told = json.loads(cpt("infer-mixture", *keys(folder), "--json").out)
    assert replay["share"] == 0.05 and replay["sources"] == pytest.approx(told["replay_sources"], abs=1e-3)


def test_the_same_call_gives_the_same_bytes(folder: Path) -> None:
    one, other = (cpt("infer-mixture", *keys(folder), "--json").out for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["merges=20"], "`merges` is 20, wanted at least 300"),
        (["bytes=12"], "so little text has no rates"),
        (["sources.news.txt=body"], "unknown key of source `news`: `txt`"),
        (["source.law=x"], "unknown key `source.law`"),
        (["sources.third.text=body"], "source `third` names no files"),
        (["sources.third=nothing/*.jsonl"], "no file matches"),
        (["sources.third.reader=filez"], "unknown reader `filez`"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(folder: Path, changed: list[str], says: str) -> None:
    keep = [k for k in keys(folder) if k.partition("=")[0] not in {c.partition("=")[0] for c in changed}]
    ended = cpt("infer-mixture", *keep, *changed)
    assert ended.code == 2 and says in ended.err and "Traceback" not in ended.err, ended.err


def test_one_source_and_other_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    ended = cpt("infer-mixture", str(folder), f"sources.news={folder}/news-1.jsonl")
    assert ended.code == 2 and "a mixture has at least two sources, and one is given" in ended.err
    ended = cpt("infer-mixture", str(write_base(tmp_path / "base")), *keys(folder)[1:])
    assert ended.code == 2 and "has no merges" in ended.err
    ended = cpt("infer-mixture", str(tmp_path / "nowhere"), *keys(folder)[1:])
    assert ended.code == 2 and "no tokenizer at" in ended.err


def test_candidates_that_cannot_be_told_apart_are_named_and_give_no_line_to_paste(folder: Path) -> None:
    twice = [f"sources.again={folder}/news-*.jsonl", "sources.again.text=body"]
    ended = cpt("infer-mixture", *keys(folder), *twice)
    assert ended.code == 0 and "`news` and `again` cannot be told apart" in ended.err
    assert "replay:" not in ended.out and "give `news` and `again` as one source" in ended.out
    assert json.loads(cpt("infer-mixture", *keys(folder), *twice, "--json").out)["replay_sources"] is None


def test_text_of_another_kind_in_the_tokenizer_is_warned_of(folder: Path, tmp_path: Path) -> None:
    other = [json.dumps({"text": t}) + "\n" for t in planted.made_language(3, "pqrstuvwxyz", 300)]
    (tmp_path / "x.jsonl").write_text("".join(other))
    files = [f"sources.x={tmp_path}/x.jsonl", f"sources.law={folder}/law-1.jsonl", "sources.law.text=body"]
    ended = cpt("infer-mixture", str(folder), *files, "merges=400")
    assert ended.code == 0 and "of the merges occur in none of the sources" in ended.err
    assert "take the shares below as a guess" in ended.out
