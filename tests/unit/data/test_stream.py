"""The mixture stream: what is read, in which order, and that nothing but the plan decides it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.base.errors import PlanError
from cpt.data.corpus import Corpus
from cpt.data.stream import Stream, carry, key
from cpt.plan.types import DataOptions, Replay
from tests.unit.data.made import corpus, train

PLAIN = DataOptions()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    root = tmp_path_factory.mktemp("corpora")
    generator = np.random.default_rng(0)
    sizes = {"a": generator.integers(1, 60, 97), "b": generator.integers(1, 400, 31), "c": generator.integers(5, 9, 50)}
    return {name: corpus(root / name, lengths.tolist(), name=name) for name, lengths in sizes.items()}


class Reads:
    """What a stream read: for every (source, role, epoch) the intervals of each document."""

    def __init__(self) -> None:
        self.rows: dict[int, list] = {}

    def __call__(self, sample, name, segments) -> None:  # type: ignore[no-untyped-def]
        parts = zip(*(part.tolist() for part in segments), strict=True)
        self.rows[sample] = [(key(name), *part) for part in parts]

    def check(self, corpora: dict[str, Corpus]) -> dict[str, int]:
        """Assert that nothing is repeated and nothing skipped; give the epochs that each source was finished in."""
        intervals: dict = defaultdict(list)
        last_epoch: dict[str, int] = {}
        for sample in sorted(self.rows):
            row = self.rows[sample]
            for place, (name, epoch, document, start, stop) in enumerate(row):
                stop -= place == len(row) - 1  # the last token is the first of the next sample
                if stop > start:
                    intervals[name, epoch, document].append((start, stop))
                    last_epoch[name] = max(last_epoch.get(name, 0), epoch)
        for (name, epoch, document), parts in intervals.items():
            lengths = corpora[name.split(" ")[0]].train.lengths
            for (_, before), (after, _) in itertools.pairwise(parts):
                assert before == after, f"{name} epoch {epoch} document {document}: {parts}"
            assert parts[0][0] == 0
            if epoch < last_epoch[name]:
                assert parts[-1][1] == lengths[document]
        for name, last in last_epoch.items():
            documents = corpora[name.split(" ")[0]].train.lengths
            for epoch in range(last):
                seen = {d for n, e, d in intervals if (n, e) == (name, epoch)}
                assert seen == set(np.flatnonzero(documents).tolist()), f"{name} epoch {epoch}"
        return last_epoch


def run(ranks: Stream | list[Stream], steps: int) -> np.ndarray:
    """All rows of some steps, put together from the streams of the data-parallel ranks."""
    ranks = ranks if isinstance(ranks, list) else [ranks]
    rows = []
    for _ in range(steps):
        rows += [stream.batch(rank, len(ranks)).tokens_BS1 for rank, stream in enumerate(ranks)]
        assert all(stream.state() == ranks[0].state() for stream in ranks)
    return np.concatenate(rows)


MIXTURE = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_no_document_is_repeated_or_skipped_within_source_role_and_epoch(corpora: dict[str, Corpus]) -> None:
    reads = Reads()
    stage = train(MIXTURE, Replay(share=0.3, sources={"a": 0.5, "c": 0.5}))
    run(Stream(stage, PLAIN, corpora, record=reads), 300)
    epochs = reads.check(corpora)
    assert set(epochs) == {"a", "b", "c", "a (replay)", "c (replay)"} and min(epochs.values()) >= 1


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_dp_changes_nothing(corpora: dict[str, Corpus], dp: int) -> None:
    stage = train(MIXTURE, Replay(share=0.25, sources={"b": 1.0}))
    one = Stream(stage, PLAIN, corpora)
    many = [Stream(stage, PLAIN, corpora) for _ in range(dp)]
    assert np.array_equal(run(one, 20), run(many, 20))
    assert one.state() == many[0].state()


@given(st.integers(0, 10**6), st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=6))
@settings(max_examples=20)
def test_stopping_and_going_on_at_another_dp_is_the_same_stream(
    corpora: dict[str, Corpus], seed: int, dps: list[int]
) -> None:
    stage = train(MIXTURE, Replay(share=0.3, sources={"a": 1.0}), seed=seed)
    straight = run(Stream(stage, PLAIN, corpora), 3 * len(dps))
    rows, state = [], None
    for dp in dps:
        ranks = [Stream(stage, PLAIN, corpora, state) for _ in range(dp)]
        rows.append(run(ranks, 3))
        state = json.loads(json.dumps(ranks[0].state()))
    assert np.array_equal(np.concatenate(rows), straight)


def test_another_mixture_and_seq_length_at_a_stage_border_repeat_and_skip_nothing(corpora: dict[str, Corpus]) -> None:
    reads = Reads()
    state: dict | None = None
    first_sample = 0
    stages = [
        train(MIXTURE, seq_length=16),
        train({"a": 0.1, "b": 0.9}, seq_length=64, batch=4),
        train({"a": 0.2, "b": 0.1, "c": 0.7}, Replay(share=0.4, sources={"a": 1.0}), seq_length=7, batch=6, seed=99),
        train(MIXTURE, Replay(share=0.4, sources={"a": 1.0}), seq_length=128, batch=2),
    ]
    for stage in stages:

        def record(sample, name, segments, shift=first_sample) -> None:  # type: ignore[no-untyped-def]
            reads(sample + shift, name, segments)

        ranks = [Stream(stage, PLAIN, corpora, carry(state) if state else None, record=record) for _ in range(2)]
        run(ranks, 40)
        first_sample += ranks[0].samples
        state = json.loads(json.dumps(ranks[0].state()))
    assert min(reads.check(corpora).values()) >= 1
    assert state is not None and set(state["cursors"]) == {"a", "b", "c", "a (replay)"}


def test_a_source_that_a_stage_leaves_out_goes_on_where_it_was(corpora: dict[str, Corpus]) -> None:
    first = Stream(train(MIXTURE), PLAIN, corpora)
    run(first, 5)
    second = Stream(train({"a": 1.0}), PLAIN, corpora, carry(first.state()))
    run(second, 5)
    assert second.state()["cursors"]["b"] == first.state()["cursors"]["b"]
    assert second.state()["cursors"]["a"]["tokens"] == first.state()["cursors"]["a"]["tokens"] + 5 * 8 * 16


def test_replay_reads_a_source_in_the_order_it_was_first_read_in(corpora: dict[str, Corpus]) -> None:
    new = run(Stream(train({"a": 1.0}), PLAIN, corpora), 4)
    stream = Stream(train({"b": 1.0}, Replay(share=0.5, sources={"a": 1.0})), PLAIN, corpora)
    batches = [stream.batch() for _ in range(8)]
    replayed = [
        row for b in batches for row, s in zip(b.tokens_BS1, b.source_B, strict=True) if stream.names[s][1] == "replay"
    ]
    assert np.array_equal(np.stack(replayed), new)


def test_given_tokens_follow_the_shares(corpora: dict[str, Corpus]) -> None:
    stage = train({"a": 3.0, "b": 1.0}, Replay(share=0.2, sources={"c": 1.0}))
    stream = Stream(stage, PLAIN, corpora)
    run(stream, 125)
    assert stream.samples == 1000
    wanted = {"a": 600, "b": 200, "c (replay)": 200}
    assert {n: t // 16 for n, t in stream.given.items()} == pytest.approx(wanted, abs=1)


def test_skipping_a_batch_is_reading_it_without_looking(corpora: dict[str, Corpus]) -> None:
    one, two = Stream(train(MIXTURE), PLAIN, corpora), Stream(train(MIXTURE), PLAIN, corpora)
    one.batch()
    two.skip()
    assert one.state() == two.state()
    assert np.array_equal(one.batch().tokens_BS1, two.batch().tokens_BS1)


def test_samples_are_consecutive_tokens_of_documents_in_permuted_order(corpora: dict[str, Corpus]) -> None:
    rows = run(Stream(train({"b": 1.0}, seq_length=32), PLAIN, corpora), 6)
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])  # the next sample begins with the last label
    flat = np.concatenate([rows[0], *(r[1:] for r in rows[1:])])
    pieces = np.split(flat, np.flatnonzero(flat == 0) + 1)
    documents = {tuple(corpora["b"].train.read(d).tolist()) for d in range(31)}
    assert len(pieces) > 3 and all(tuple(p.tolist()) in documents for p in pieces[:-1])


def test_a_corpus_smaller_than_one_sample_is_read_again_and_again(tmp_path: Path) -> None:
    small = corpus(tmp_path / "small", [2, 3])
    reads = Reads()
    rows = run(Stream(train({"s": 1.0}, seq_length=64, batch=2), PLAIN, {"s": small}, record=reads), 3)
    assert rows.shape == (6, 65)
    assert reads.check({"s": small})["s"] == 6 * 64 // 5


def test_empty_documents_and_ones_longer_than_a_sample_are_all_right(tmp_path: Path) -> None:
    odd = corpus(tmp_path / "odd", [0, 1000, 0, 0, 3, 0, 1, 0])
    reads = Reads()
    run(Stream(train({"s": 1.0}, seq_length=32, batch=4), PLAIN, {"s": odd}, record=reads), 20)
    assert reads.check({"s": odd})["s"] >= 2


@given(st.lists(st.integers(0, 70), min_size=1, max_size=12).filter(any), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=40)
def test_any_lengths_are_read_whole(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int, batch: int
) -> None:
    made = corpus(tmp_path_factory.mktemp("any") / "x", lengths)
    reads = Reads()
    run(Stream(train({"s": 1.0}, seq_length=size, batch=batch), PLAIN, {"s": made}, record=reads), 12)
    reads.check({"s": made})


def test_a_corpus_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no tokens"):
        Stream(train({"s": 1.0}), PLAIN, {"s": corpus(tmp_path / "e", [0, 0])})


def test_a_source_that_changed_since_its_cursor_is_refused(tmp_path: Path, corpora: dict[str, Corpus]) -> None:
    stream = Stream(train({"a": 1.0}), PLAIN, corpora)
    stream.batch()
    other = {"a": corpus(tmp_path / "other", [5, 6])}
    with pytest.raises(PlanError, match="`a` changed"):
        Stream(train({"a": 1.0}), PLAIN, other, carry(stream.state()))


def test_positions_and_segments_begin_anew_at_each_document(tmp_path: Path) -> None:
    made = corpus(tmp_path / "seg", [5, 9, 3, 30])
    options = DataOptions(reset_positions=True, mask_documents=True)
    plain = Stream(train({"s": 1.0}, seq_length=12, batch=8), PLAIN, {"s": made}).batch()
    batch = Stream(train({"s": 1.0}, seq_length=12, batch=8), options, {"s": made}).batch()
    assert plain.position_ids_BS is None and plain.segment_ids_BS is None and plain.loss_mask_BS is None
    assert np.array_equal(batch.tokens_BS1, plain.tokens_BS1)
    for tokens, positions, segments, mask in zip(
        batch.tokens_BS1, batch.position_ids_BS, batch.segment_ids_BS, batch.loss_mask_BS, strict=True
    ):
        position = segment = 0
        for i in range(12):
            assert (positions[i], segments[i]) == (position, segment)
            ended = tokens[i] == 0
            assert mask[i] == (not ended)  # the label after an end is of another document
            position, segment = (0, segment + 1) if ended else (position + 1, segment)


def test_shares_set_by_a_controller_are_followed_and_saved(corpora: dict[str, Corpus]) -> None:
    stream = Stream(train({"a": 0.5, "b": 0.5}), PLAIN, corpora)
    run(stream, 10)
    stream.set_shares({("a", "new"): 0.9, ("b", "new"): 0.1})
    again = Stream(train({"a": 0.5, "b": 0.5}), PLAIN, corpora, json.loads(json.dumps(stream.state())))
    before = dict(stream.given)
    run(stream, 100)
    run(again, 100)
    assert stream.given == again.given
    assert (stream.given["a"] - before["a"]) / (100 * 8 * 16) == pytest.approx(0.9, abs=0.01)


def test_building_for_a_trillion_tokens_over_a_thousand_sources_is_quick_and_small(tmp_path: Path) -> None:
    made = corpus(tmp_path / "one", [100] * 50)
    many = {
        f"s{i:04}": Corpus(made.folder, {**made.catalog, "content_hash": f"{i}", "tokens": 10**9}) for i in range(1000)
    }
    stage = train({n: 1 + i % 7 for i, n in enumerate(many)}, seq_length=4096, batch=64)
    stage = dataclasses.replace(stage, tokens=10**12, steps=10**12 // (4096 * 64))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        stream = Stream(stage, PLAIN, many)
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    stream = Stream(stage, PLAIN, many)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(seconds) < 0.05 and used < 50e6, (seconds, used)
    stream.skip()
    json.dumps(stream.state())


def test_a_step_costs_less_than_a_millisecond(corpora: dict[str, Corpus]) -> None:
    stream = Stream(train(MIXTURE, seq_length=256, batch=16), PLAIN, corpora)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        stream.batch(0, 2)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3  # other work on the machine only makes it longer
