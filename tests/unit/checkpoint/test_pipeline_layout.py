"""Pipeline layouts in every form give the layers of each part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint.pipeline_layout import parse


@pytest.mark.parametrize(
    ("text", "pp", "vp", "layers", "wanted"),
    [
        ("3,5,4", 3, 1, 12, (3, 5, 4)),
        (" 1, 2,2 ,1", 2, 2, 6, (1, 2, 2, 1)),
        ("first=3,last=1", 4, 1, 8, (3, 2, 2, 1)),
        ("last=2", 3, 1, 8, (3, 3, 2)),
        ("first=1,last=2", 3, 1, 4, (1, 1, 2)),
        ("first=2", 1, 1, 2, (2,)),
        ("first=2,last=2", 3, 2, 8, (1, 2, 1, 1, 2, 1)),
        ("Et|tt|tL", 3, 1, 4, (1, 2, 1)),
        ("Et*3|t*2|L", 3, 1, 5, (3, 2, 0)),
        ("E|(t|)*4L", 6, 1, 4, (0, 1, 1, 1, 1, 0)),
        ("Ett|(tt|)*2,t,L", 4, 1, 7, (2, 2, 2, 1)),
    ],
)
def test_forms(text: str, pp: int, vp: int, layers: int, wanted: tuple[int, ...]) -> None:
    assert parse(text, pp=pp, vp=vp, num_layers=layers) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2", "2 parts with 3 layers; wanted: 3 parts with 4 layers (pp 3)"),
        ("1,1,3", "3 parts with 5 layers"),
        ("first=3,last=3", "asks for 6 layers, the model has 4"),
        ("first=1,first=2", "accepted forms"),
        ("middle=1", "accepted forms"),
        ("a,b,c", "accepted forms"),
        ("", "accepted forms"),
        ("1;2;1", "accepted forms"),
        ("Et*99999*99999|t|tL", "3 parts with 199999 layers"),
        ("Et|t|tt", "needs one `E` at its start and one `L` at its end"),
        ("EtL|t|tt", "needs one `E`"),
        ("tE|tt|tL", "needs one `E`"),
        ("EEt|tt|tLL", "needs one `E`"),
        ("((((t*99999)*99999)*99999)*99999)|t|t", "repeats too often"),
        ("(t|t", "accepted forms"),
    ],
)
def test_wrong_ones_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text, pp=3, vp=1, num_layers=4)
    assert said in " ".join([error.value.message, *error.value.hints])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_a_list_and_megatrons_notation_say_the_same(counts: list[int]) -> None:
    written = "E" + "|".join("t" * n for n in counts) + "L"
    numbers = ",".join(map(str, counts))
    for text in (written, numbers):
        assert parse(text, pp=len(counts), vp=1, num_layers=sum(counts)) == tuple(counts)
