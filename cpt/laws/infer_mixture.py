"""Which mixture of texts a byte-pair tokenizer was trained on, read from the order of its merges (arXiv:2407.16607).

Each merge took the pair that was the most frequent one in the training text at that time. With the rates c of pairs in
a sample of every source, counted after the merges before, the shares a must therefore satisfy at every step i, for
every pair p

    sum_j a_j (c_j,merged(i) - c_j,p) + v_i + u_p >= 0,      a >= 0,  sum a = 1,

up to slacks of the step and of the pair, whose sum is made as small as possible: a linear programme. It is solved as
its dual, which has one row a step or pair, with only those places that a solution so far violates (lazy constraints).

Rates are per byte of UTF-8 text, so that shares are shares of bytes; per token or per character they would say less
for Chinese, whose letters have three bytes. The interval is a jackknife over parts of the documents: it holds what
another draw of documents would change, and not what texts of another kind would.

Array suffixes: J sources, K columns (a part of a sample), S steps, P pairs, R places (step, pair).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt.base.errors import UsageError
from cpt.data.merges import Merges
from cpt.laws.pair_counts import Ints, PairCounts, count
from cpt.laws.pair_replay import Replay
from cpt.laws.rows import Floats

PARTS = 10  # of the documents of a sample, for the interval
MOST_A_STEP = 6  # places that a round adds for one step
MOST_ROUNDS = 20
SETTLED = 5e-4  # change of every share between rounds [fraction]
STRIDES = 8, 1  # of the steps in the first programmes and in the last ones
INTERVAL_STRIDE = 4  # of the steps whose places the interval uses
ENCODED = 1 << 18  # bytes of a source that are encoded
ALIKE = 0.01  # sources whose rates differ by less are one, however much text there is [fraction]
MOST_NOISE = 0.3  # halves of few documents may differ by more, which says nothing [fraction]
PART_OF = 0.05  # sources with a smaller part in an imitation are not named [fraction]
T_QUANTILE = 2.262  # 97.5 % of Student's t with PARTS - 1 degrees of freedom


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text of one source, counted.

    Args:
        words: how often each word occurs, by part of the documents.
        num_bytes: UTF-8 bytes of each part's text.
        documents: how many there are.
        bytes_per_token: of the tokenizer on this text.
    """

    name: str
    words: Sequence[Counter[str]]
    num_bytes: Sequence[int]
    documents: int
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """What was read from the merges.

    Args:
        shares: of each source in the tokenizer's training text, in UTF-8 bytes [fraction].
        token_shares: the same in tokens of the tokenizer, as mixtures of a recipe are meant [fraction].
        intervals: 95 % by documents; empty when a source has too few documents.
        merges: that were used.
        unseen: share of them whose pair no sample has; they come from text of another kind [fraction].
        slack: sum of all slacks against the sum of the merged pairs' rates [fraction]; 0 = the order fits exactly.
        places: constraints that were needed.
        settled: whether the last round still changed a share by less than `SETTLED`.
        alike: groups of sources whose texts differ no more than documents of one source do, so that only the sum of
            their shares means anything.
        no_interval: why `intervals` is empty; empty when it is not.
    """

    shares: dict[str, float]
    token_shares: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    merges: int
    unseen: float
    slack: float
    places: int
    settled: bool
    alike: tuple[tuple[str, ...], ...] = ()
    no_interval: str = ""


def sample(name: str, documents: Sequence[str], merges: Merges) -> Sample:
    """Count the words of documents, dealt to parts in turn."""
    words: list[Counter[str]] = [Counter() for _ in range(PARTS)]
    num_bytes = [0] * PARTS
    for i, text in enumerate(documents):
        words[i % PARTS].update(merges.words(text))
        num_bytes[i % PARTS] += len(text.encode("utf-8", "replace"))
    return Sample(
        name=name,
        words=words,
        num_bytes=num_bytes,
        documents=len(documents),
        bytes_per_token=_bytes_per_token(documents, merges),
    )


def _bytes_per_token(documents: Sequence[str], merges: Merges) -> float:
    """Over about `ENCODED` bytes of the documents."""
    each = max(1, ENCODED // max(1, len(documents)))
    some = [text[:each] for text in documents[:ENCODED]]
    tokens = sum(len(e.ids) for e in merges.tokenizer.encode_batch_fast(some, add_special_tokens=False))
    return sum(len(text.encode("utf-8", "replace")) for text in some) / max(1, tokens)


def infer(merges: Merges, samples: Sequence[Sample], steps: int) -> Inferred:
    """The shares of sources in the text that a tokenizer was trained on.

    Args:
        steps: how many merges to use, from the first on.

    Raises:
        UsageError: fewer than two sources, a source without text, or merges that none of them has.
    """
    _check(samples)
    steps = min(steps, len(merges.merges))
    counts = count(merges, [words for s in samples for words in s.words], steps)
    whole = Replay(counts, _weights(samples))
    used_S = counts.merged_SK.sum(axis=1) > 0
    if not used_S.any():
        raise UsageError(f"none of the first {steps:,} merges of `{merges.path}` occurs in these sources")
    found = _solve(whole, used_S)
    merged = float((whole.merged_SJ @ found.share_J)[used_S].sum())
    token_J = found.share_J / np.array([s.bytes_per_token for s in samples])
    names = [s.name for s in samples]
    return Inferred(
        shares=dict(zip(names, found.share_J.tolist(), strict=True)),
        token_shares=dict(zip(names, (token_J / token_J.sum()).tolist(), strict=True)),
        intervals=_intervals(samples, whole, found),
        merges=steps,
        unseen=float(1 - used_S.mean()),
        slack=found.slack / merged,
        places=len(found.step_R),
        settled=found.settled,
        alike=_alike(samples, counts, used_S),
        no_interval=_no_interval(samples),
    )


def _alike(samples: Sequence[Sample], counts: PairCounts, used_S: NDArray[np.bool_]) -> tuple[tuple[str, ...], ...]:
    """Sources that a mixture of the others imitates as well as one half of their documents does the other half.

    Differences of rates are weighed as those of counts, by the square root of the mean rate.
    """
    from scipy.optimize import nnls

    merged_SK = counts.merged_SK[used_S]
    left_out = (), tuple(range(0, PARTS, 2)), tuple(range(1, PARTS, 2))
    rates_SJ, one_SJ, other_SJ = (merged_SK @ _weights(samples, parts) for parts in left_out)
    scale_S1 = 1 / np.sqrt(np.maximum(rates_SJ.mean(axis=1, keepdims=True), 1e-300))
    rates_SJ, one_SJ, other_SJ = rates_SJ * scale_S1, one_SJ * scale_S1, other_SJ * scale_S1
    size_J = np.maximum(np.linalg.norm(rates_SJ, axis=0), 1e-300)
    both_J = (one_SJ.sum(axis=0) > 0) & (other_SJ.sum(axis=0) > 0)  # a single document has no halves
    noise_J = np.where(both_J, np.linalg.norm(one_SJ - other_SJ, axis=0) / size_J, 0.0).clip(max=MOST_NOISE)
    groups: list[set[int]] = []
    for j in range(len(samples)):
        rest = [i for i in range(len(samples)) if i != j]
        part, miss = nnls(rates_SJ[:, rest], rates_SJ[:, j])
        named = {i for i, x in zip(rest, part, strict=True) if x > PART_OF}
        if not named or miss / size_J[j] > max(ALIKE, noise_J[j], *noise_J[list(named)]):
            continue
        group = named | {j}
        for older in [g for g in groups if g & group]:
            groups.remove(older)
            group |= older
        groups.append(group)
    return tuple(tuple(samples[j].name for j in sorted(group)) for group in sorted(groups, key=min))


def _check(samples: Sequence[Sample]) -> None:
    if len(samples) < 2:
        raise UsageError("a mixture has at least two sources", "name candidates as `sources.german=de/*.jsonl`")
    for s in samples:
        if not sum(s.num_bytes):
            raise UsageError(f"source `{s.name}` has no text")


def _weights(samples: Sequence[Sample], without: tuple[int, ...] = ()) -> Floats:
    """Rates per million bytes: weight_KJ, with the documents of some parts left out."""
    weight_KJ = np.zeros((sum(len(s.words) for s in samples), len(samples)))
    k = 0
    for j, s in enumerate(samples):
        keep = np.array([part not in without for part in range(len(s.words))])
        weight_KJ[k : k + len(keep), j] = keep * 1e6 / max(1, np.asarray(s.num_bytes)[keep].sum())
        k += len(keep)
    return weight_KJ


@dataclass(frozen=True, eq=False)
class _Solution:
    share_J: Floats
    slack: float
    step_R: Ints
    pair_R: Ints
    settled: bool


def _solve(replay: Replay, used_S: NDArray[np.bool_]) -> _Solution:
    """The shares, by adding violated places until they stay."""
    num_sources = replay.weight_KJ.shape[1]
    share_J = np.full(num_sources, 1 / num_sources)
    slack_S, slack_P = np.zeros(len(used_S)), np.zeros(len(replay.counts.names_P))
    place_R, excess_RJ = np.empty(0, np.int64), np.empty((0, num_sources))
    slack = 0.0
    for stride in STRIDES:  # a small programme finds where the large one begins
        some_S = used_S & (np.arange(len(used_S)) % stride == 0)
        settled = not some_S.any()
        rounds = 0
        while not settled and rounds < MOST_ROUNDS:
            rounds += 1
            new = replay.violations(share_J, slack_S, slack_P, some_S, MOST_A_STEP)
            place = new.step_R * len(slack_P) + new.pair_R
            fresh = ~np.isin(place, place_R)
            settled = not fresh.any()
            if settled:
                break
            place_R = np.concatenate([place_R, place[fresh]])
            excess_RJ = np.concatenate([excess_RJ, new.excess_RJ[fresh]])
            before = share_J
            share_J, slack_S, slack_P = _programme(place_R, excess_RJ, len(slack_S), len(slack_P))
            slack = float(slack_S.sum() + slack_P.sum())
            settled = bool(np.abs(share_J - before).max() < SETTLED)
    place_R = np.sort(place_R)
    return _Solution(share_J, slack, place_R // len(slack_P), place_R % len(slack_P), settled)


def _programme(place_R: Ints, excess_RJ: Floats, num_steps: int, num_pairs: int) -> tuple[Floats, Floats, Floats]:
    """Solve the dual: the largest `least` such that every source's matched excess is at least that.

    Places are matched, in parts, to steps and pairs, each of which may be taken once. The prices of the rows are the
    shares and the slacks.
    """
    import scipy.sparse as sparse
    from scipy.optimize import linprog

    size, num_sources = excess_RJ.shape
    step_U, step_R = np.unique(place_R // num_pairs, return_inverse=True)
    pair_U, pair_R = np.unique(place_R % num_pairs, return_inverse=True)
    once = np.arange(size)
    rows = [sparse.csr_matrix(-excess_RJ.T)]
    rows.append(sparse.csr_matrix((np.ones(size), (step_R, once)), (len(step_U), size)))
    rows.append(sparse.csr_matrix((np.ones(size), (pair_R, once)), (len(pair_U), size)))
    least = np.zeros((num_sources + len(step_U) + len(pair_U), 1))
    least[:num_sources] = 1
    limit = np.ones(len(least))
    limit[:num_sources] = 0
    answer = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=sparse.hstack([sparse.vstack(rows), sparse.csr_matrix(least)]).tocsc(),
        b_ub=limit,
        bounds=[(0, None)] * size + [(None, None)],
        method="highs-ds",
    )
    if answer.x is None:
        raise RuntimeError(f"the linear programme was not solved: {answer.message}")
    price = -np.asarray(answer.ineqlin.marginals)
    share_J = np.maximum(price[:num_sources], 0)
    slack_S, slack_P = np.zeros(num_steps), np.zeros(num_pairs)
    slack_S[step_U] = price[num_sources : num_sources + len(step_U)]
    slack_P[pair_U] = price[num_sources + len(step_U) :]
    return share_J / share_J.sum(), slack_S, slack_P


def _no_interval(samples: Sequence[Sample]) -> str:
    """Why there can be no interval; empty when there can."""
    for s in samples:
        if s.documents < PARTS:
            many = "1 document" if s.documents == 1 else f"{s.documents} documents"
            return f"`{s.name}` has {many}, and an interval by documents needs {PARTS} of each source"
        if not all(s.num_bytes):
            return f"too many documents of `{s.name}` are empty"
    return ""


def _intervals(samples: Sequence[Sample], whole: Replay, found: _Solution) -> dict[str, tuple[float, float]]:
    """95 % intervals: a jackknife that leaves out one part of the documents of all sources at a time."""
    if _no_interval(samples):
        return {}
    some = found.step_R % INTERVAL_STRIDE == 0
    step_R, pair_R = found.step_R[some], found.pair_R[some]
    place_R = step_R * len(whole.counts.names_P) + pair_R
    size = len(whole.counts.own_S), len(whole.counts.names_P)
    if not len(place_R):
        return {}
    share_GJ = np.array(
        [
            _programme(place_R, Replay(whole.counts, _weights(samples, (part,))).excess(step_R, pair_R), *size)[0]
            for part in range(PARTS)
        ]
    )
    spread_J = np.sqrt((PARTS - 1) / PARTS * ((share_GJ - share_GJ.mean(axis=0)) ** 2).sum(axis=0))
    low_J = np.maximum(found.share_J - T_QUANTILE * spread_J, 0)
    high_J = np.minimum(found.share_J + T_QUANTILE * spread_J, 1)
    return {s.name: (float(a), float(b)) for s, a, b in zip(samples, low_J, high_J, strict=True)}
