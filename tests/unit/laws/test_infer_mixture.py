"""The mixture that a tokenizer was trained on, read from the order of its merges."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cpt.base.errors import UsageError
from cpt.data import merges
from cpt.laws import infer_mixture
from cpt.laws.pair_counts import PairCounts, count
from tests.unit.laws import planted

MADE = {"a": (1, "abcdefghij"), "b": (2, "fghijklmno"), "c": (3, "pqrstuvwab")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on 0.6 / 0.3 / 0.1 of three made languages, and texts that it did not see."""
    folder = tmp_path_factory.mktemp("made")
    texts = {name: planted.made_language(seed, letters, 1600) for name, (seed, letters) in MADE.items()}
    seen = {name: part[:1000] for name, part in texts.items()}
    shares = {"a": 0.6, "b": 0.3, "c": 0.1}
    planted.train(seen, shares, 600_000, 400, folder / "tokenizer.json", "byte")
    for name, part in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part[1000:]))
    return folder


def samples_of(folder: Path, read: merges.Merges, names: str = "abc") -> list[infer_mixture.Sample]:
    found = []
    for name in names:
        texts = [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        found.append(infer_mixture.sample(name, texts, read))
    return found


def test_three_made_languages_come_out_as_planted(made: Path) -> None:
    read = merges.read(made)
    found = infer_mixture.infer(read, samples_of(made, read), 400)
    assert found.settled and found.merges == 400
    for name, share in {"a": 0.6, "b": 0.3, "c": 0.1}.items():
        assert found.shares[name] == pytest.approx(share, abs=0.03)
        low, high = found.intervals[name]
        assert low <= found.shares[name] <= high and high - low < 0.2
    error = np.mean([(found.shares[n] - s) ** 2 for n, s in {"a": 0.6, "b": 0.3, "c": 0.1}.items()])
    assert np.log10(error) < -2.5
    assert sum(found.shares.values()) == pytest.approx(1) and sum(found.token_shares.values()) == pytest.approx(1)


def test_samples_of_one_text_are_told_as_alike_and_different_texts_are_not(made: Path) -> None:
    read = merges.read(made)
    a, b, c = samples_of(made, read)
    texts = [json.loads(line)["text"] for line in (made / "a.jsonl").read_text().splitlines()]
    same = infer_mixture.sample("same", texts, read)
    halves = [infer_mixture.sample(f"half {i}", texts[i::2], read) for i in (0, 1)]
    single = [infer_mixture.sample(name, ["\n".join(texts)], read) for name in ("one", "other")]
    mixed = [json.loads(line)["text"] for n in "ab" for line in (made / f"{n}.jsonl").read_text().splitlines()]
    both = infer_mixture.sample("both", mixed, read)
    assert infer_mixture.infer(read, [a, b, c], 400).alike == ()
    assert infer_mixture.infer(read, [a, b, same], 400).alike == (("a", "same"),)
    assert infer_mixture.infer(read, [*halves, b], 400).alike == (("half 0", "half 1"),)
    assert infer_mixture.infer(read, [a, b, both], 400).alike == (("a", "b", "both"),)
    found = infer_mixture.infer(read, [*single, b], 400)
    assert found.alike == (("one", "other"),)
    assert found.intervals == {} and "`one` has 1 document" in found.no_interval


def test_text_that_no_source_is_like_is_told(made: Path) -> None:
    read = merges.read(made)
    whole = infer_mixture.infer(read, samples_of(made, read), 400)
    found = infer_mixture.infer(read, samples_of(made, read, "bc"), 400)
    assert whole.unseen < 0.02 and found.unseen > 0.2


def test_the_order_of_the_sources_changes_nothing(made: Path) -> None:
    read = merges.read(made)
    one = infer_mixture.infer(read, samples_of(made, read), 300)
    other = infer_mixture.infer(read, samples_of(made, read, "cab"), 300)
    assert other.shares == pytest.approx(one.shares, abs=2e-3)


def test_counts_before_every_merge_are_those_of_merging_by_hand(made: Path) -> None:
    read = merges.read(made)
    words = [Counter({w: n for w, n in list(s.words[0].items())[:60]}) for s in samples_of(made, read)]
    words.append(Counter({"aaaa": 3, "aaa": 2, "Ġaaaaa": 1}))
    doubled = merges.Merges(
        read.path, (merges.Merge("a", "a", "aa"), *read.merges), "", "", 0, read.tokenizer
    )  # a token beside itself: `aaa` is merged once
    for chosen in (read, doubled):
        found = count(chosen, words, 80)
        for step, by_hand in enumerate(_by_hand(chosen, words, 80)):
            merge = chosen.merges[step]
            assert found.merged_SK[step].tolist() == [c[merge.left, merge.right] for c in by_hand], step
            kept = set(found.names_P)
            wanted = {(pair, k): n for k, c in enumerate(by_hand) for pair, n in c.items() if pair in kept}
            assert _state(found, step) == wanted, step


def _by_hand(read: merges.Merges, words: list[Counter[str]], steps: int) -> list[list[Counter[tuple[str, str]]]]:
    spelled = [[(read.symbols(word), n) for word, n in part.items()] for part in words]
    found = []
    for merge in read.merges[:steps]:
        counts = []
        for part in spelled:
            counted: Counter[tuple[str, str]] = Counter()
            for i, (tokens, n) in enumerate(part):
                for pair in pairwise(tokens):
                    counted[pair] += n
                done: list[str] = []
                at = 0
                while at < len(tokens):
                    both = tokens[at : at + 2] == [merge.left, merge.right]
                    done.append(merge.token if both else tokens[at])
                    at += 2 if both else 1
                part[i] = (done, n)
            counts.append(counted)
        found.append(counts)
    return found


def _state(found: PairCounts, step: int) -> dict[tuple[tuple[str, str], int], int]:
    """Counts before a step, by pair and column."""
    until = found.first_S[step]
    state = np.zeros((len(found.names_P), found.merged_SK.shape[1]), int)
    np.add.at(state, (found.pair_E[:until], found.column_E[:until]), found.change_E[:until])
    return {(found.names_P[p], int(k)): int(state[p, k]) for p, k in zip(*np.nonzero(state), strict=True)}


def test_of_several_merges_that_make_one_token_the_trained_one_is_kept(tmp_path: Path) -> None:
    vocabulary = {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc", "d", "abcd", "cd"])}
    # as converters write them: every way to cut `abc` and `abcd` in two
    listed = ["a b", "b c", "a bc", "ab c", "abc d", "ab cd", "c d"]
    value = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": listed},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    read = merges.read(tmp_path)
    assert [(m.left, m.right) for m in read.merges] == [("a", "b"), ("b", "c"), ("ab", "c"), ("abc", "d"), ("c", "d")]
    assert read.dropped == 2


def test_words_are_cut_as_the_tokenizer_cuts_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=262, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["an apple, an übermut"] * 5, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = merges.read(tmp_path)
    assert list(read.words("it's über 12.")) == ["it", "'s", "ĠÃ¼ber", "Ġ12", "."]
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    value |= {"pre_tokenizer": None, "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    assert list(merges.read(tmp_path).words("one two  three")) == ["one", "▁two", "▁", "▁three"]


def test_a_tokenizer_of_another_kind_is_refused_by_its_name(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="is a WordPiece tokenizer"):
        merges.read(tmp_path)


def test_sources_without_text_and_single_sources_are_refused(made: Path) -> None:
    read = merges.read(made)
    with pytest.raises(UsageError, match="at least two sources"):
        infer_mixture.infer(read, samples_of(made, read, "a"), 300)
    empty = infer_mixture.sample("none", [], read)
    with pytest.raises(UsageError, match="`none` has no text"):
        infer_mixture.infer(read, [*samples_of(made, read, "ab"), empty], 300)
