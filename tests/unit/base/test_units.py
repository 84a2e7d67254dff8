"""Quantities as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.base.units import (
    parse_amount,
    parse_bytes,
    parse_count,
    parse_duration,
    parse_share,
    show_bytes,
    show_count,
    show_duration,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [("10B", 10**10), ("500M", 5 * 10**8), ("1.5e9", 1_500_000_000), (2048, 2048), ("4k", 4000), ("1_000", 1000),
     ("2,048", 2048), ("1.2M", 1_200_000), (1e6, 10**6), ("3T", 3 * 10**12), (" 7 ", 7)],
)  # fmt: skip
def test_counts(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "B", "10 bananas", "-1", "1.5", "1e999", "nan", True, None, [1], "5%", "1..2", "0x10"]
)
def test_what_is_not_a_count_is_refused_with_the_accepted_forms(text: object) -> None:
    with pytest.raises(UsageError, match="accepted forms"):
        parse_count(text)


@pytest.mark.parametrize(("text", "share"), [("0.5%", 0.005), (0.05, 0.05), ("100%", 1.0), (0, 0.0), ("1", 1.0)])
def test_shares(text: object, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1.8B", 1.8e9), ("1.5e9", 1.5e9), ("25%", 0.25), ("-3%", -0.03), ("0.1k", 100.0), (6795600349.29, 6795600349.29)],
)
def test_amounts_need_not_be_whole(text: object, amount: float) -> None:
    assert parse_amount(text) == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize("text", ["", "B", "1e999", "1e308T", "nan", True, None, "5 %%", "ten"])
def test_what_is_not_an_amount_is_refused(text: object) -> None:
    with pytest.raises(UsageError, match="accepted forms"):
        parse_amount(text)


@pytest.mark.parametrize("text", ["101%", -0.1, 2, "half", True, "5%%"])
def test_what_is_not_a_share_is_refused(text: object) -> None:
    with pytest.raises(UsageError, match="share"):
        parse_share(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("36h", 129_600), ("90m", 5400), ("2-00:00:00", 172_800), ("1:30:00", 5400), (5, 5), ("1.5d", 129_600)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("512MiB", 512 * 2**20), ("1e9", 10**9), (7, 7)])
def test_bytes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.integers(0, 10**15))
def test_a_count_survives_being_written_as_a_number(count: int) -> None:
    assert parse_count(str(count)) == parse_count(count) == count


@given(st.integers(0, 10**14))
def test_a_shown_count_is_within_half_a_percent(count: int) -> None:
    assert parse_count(show_count(count)) == pytest.approx(count, rel=0.0051)


@given(st.text(max_size=20))
def test_any_text_is_a_number_or_a_usage_error(text: str) -> None:
    for parse in (parse_count, parse_share, parse_bytes, parse_duration):
        try:
            assert parse(text) >= 0
        except UsageError as error:
            assert not error.message.endswith(".")


def test_numbers_for_people() -> None:
    assert [show_count(n) for n in (9536, 10**10, 5 * 10**8, 1_200_000_000)] == ["9,536", "10.0B", "500M", "1.20B"]
    assert [show_bytes(n) for n in (512, 20 * 10**9, 1_200_000)] == ["512 B", "20 GB", "1.2 MB"]
    assert [show_duration(s) for s in (45, 200, 12960, 181440)] == ["45 s", "3 min 20 s", "3.6 h", "2.1 days"]
