"""What is a hang, who is to be looked at, and what makes an attempt slow."""

from __future__ import annotations

from cpt.launch.watch import Beat, judge, notes

NOW = 1000.0


def beat(rank: int, **changes: object) -> Beat:
    plain: dict[str, object] = {"doing": "step", "step": 7, "count": 2, "t": NOW - 1, "moved": NOW - 2}
    return Beat(rank=rank, pid=100 + rank, host=f"node{rank}", **{**plain, **changes})  # type: ignore[arg-type]


def beats(*all_beats: Beat) -> dict[int, Beat]:
    return {b.rank: b for b in all_beats}


def test_as_long_as_one_rank_moves_nothing_hangs() -> None:
    assert judge(beats(beat(0), beat(1, moved=0.0)), NOW, 60) is None
    assert judge(beats(beat(0, moved=NOW - 60), beat(1, moved=NOW - 61)), NOW, 60) is None
    assert judge({}, NOW, 60) is None


def test_a_rank_without_a_sign_of_life_is_the_one_to_look_at() -> None:
    found = judge(beats(beat(0, moved=900.0), beat(1, moved=890.0, t=892.0)), NOW, 60)
    assert found is not None and (found.rank, found.silent, found.behind, found.since) == (1, (1,), (), 900.0)
    assert "rank 1 on `node1` is without a sign of life, others wait in `step` of step 7" in found.text
    assert found.text.startswith("nothing has moved for 100 s")


def test_else_the_rank_that_is_behind() -> None:
    stood = {"moved": 900.0}
    found = judge(beats(beat(0, **stood), beat(1, **stood, count=1), beat(2, **stood)), NOW, 60)
    assert found is not None and (found.rank, found.behind, found.silent) == (1, (1,), ())
    assert "rank 1 is behind the others, in `step` of step 7" in found.text


def test_of_one_step_the_save_comes_after_the_step_and_the_evaluation_after_the_save() -> None:
    at = {"moved": 0.0}
    ranks = beats(beat(0, **at, doing="eval"), beat(1, **at, doing="save"), beat(2, **at, doing="step"))
    found = judge(ranks, NOW, 60)
    assert found is not None and found.behind == (2,)
    assert [r["doing"] for r in found.ranks] == ["eval", "save", "step"]


def test_where_all_stand_at_one_place_all_are_named() -> None:
    found = judge(beats(beat(0, moved=0.0, doing="save"), beat(1, moved=0.0, doing="save")), NOW, 60)
    assert found is not None and found.behind == () and "all ranks are in `save` of step 7" in found.text


def test_work_that_says_nothing_may_last() -> None:
    quiet = beats(beat(0, doing="start", moved=0.0), beat(1, doing="end", moved=0.0))
    assert judge(quiet, NOW, 60) is None
    assert judge(beats(beat(0, moved=0.0)), NOW, 0) is None, "switched off"


def test_one_that_ended_is_not_waited_for() -> None:
    found = judge(beats(beat(0, doing="end", moved=0.0, t=0.0), beat(1, moved=0.0)), NOW, 60)
    assert found is not None and found.rank == 1 and found.silent == ()


def test_a_slow_rank_and_one_that_waits_for_data_are_noted() -> None:
    ranks = beats(*(beat(r, own_s=0.1) for r in range(3)), beat(3, own_s=0.16), beat(4, data_share=0.3))
    assert [name for name, _ in notes(ranks)] == ["slow 3", "starving 4"]
    texts = [text for _, text in notes(ranks)]
    slow = "rank 3 on `node3` is slow: 0.16 s for its part of a step, others 0.1 s; all wait for it: a busy machine?"
    assert texts[0] == slow
    assert texts[1] == "rank 4 on `node4` waits for data 30% of the time: a slow disk?"
    assert notes(beats(beat(0, own_s=0.1), beat(1, own_s=0.14))) == []


def test_a_rank_that_stops_before_its_first_word_is_found_all_the_same() -> None:
    found = judge(beats(beat(0, doing="start", moved=0.0), beat(1, doing="start", moved=0.0, t=900.0)), NOW, 60)
    assert found is not None and (found.rank, found.silent) == (1, (1,))
