"""The page of a fitted law: the answer first, whole without network, and safe whatever a table is called."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cpt.laws.analyse import analyse
from cpt.laws.result import Analysis, Warn
from cpt.laws.settings import Settings
from cpt.laws.table import Table
from cpt.report import law_charts, law_page
from tests.unit.laws.tables import BASE_GENERAL, columns

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }} $\\frac{a$"


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text; complains about tags that are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def found() -> Analysis:
    given = columns(ratios=(0.1, 0.3, 0.5, 0.7, 0.9), sizes=(5e8, 4e9), tokens=(1e9, 4e9, 1.6e10))
    settings = Settings(tolerance=0.03, base_losses={"general": BASE_GENERAL}, bootstrap=12, compare=False)
    return analyse(Table.of(given, name="runs.csv"), "dcpt", settings)


@pytest.fixture(scope="module")
def written(found: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return law_page.write(found, tmp_path_factory.mktemp("law"))


@pytest.fixture(scope="module")
def drawn(found: Analysis) -> list[law_charts.Picture]:
    return law_charts.pictures(found)


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(Reader(page.read_text(encoding="utf-8")).text))


def test_the_answer_stands_first_with_its_interval_and_its_distance_from_the_data(
    found: Analysis, written: Path
) -> None:
    answer = found.recommendation
    assert answer is not None and answer.ratio is not None
    text = text_of(written)
    share = f"{100 * answer.ratio.value:.1f} % domain text"
    places = [share, "95 % interval of the domain share", "Distance from the data", "Warnings", "How far to trust it"]
    at = [text.index(place) for place in places]
    assert at == sorted(at)
    assert f"{answer.losses['general'].value:.4f}" in text and f"{answer.limits['general']:.4f}" in text


def test_the_error_on_unseen_rows_comes_before_the_constants(found: Analysis, written: Path) -> None:
    text = text_of(written)
    error = (
        f"{100 * found.fits['domain'].heldout.error:.3g} % mean error of the domain loss on rows that the fit had not"
    )
    assert text.index(error) < text.index("The law and its constants")
    for name, value in found.fits["general"].params.items():
        assert f"{name} {value.value:.5g}" in text or f"{name} (on its bound) {value.value:.5g}" in text


def test_every_picture_is_in_the_page_and_beside_it_as_svg_and_png(
    drawn: list[law_charts.Picture], written: Path
) -> None:
    assert {p.group for p in drawn} == {"answer", "ratio", "iso", "residuals"}
    assert Reader(written.read_text(encoding="utf-8")).tags.count("svg") == len(drawn)
    for picture in drawn:
        ElementTree.fromstring(picture.svg)
        assert (written.parent / "pictures" / f"{picture.name}.svg").read_text(encoding="utf-8") == picture.svg
        assert (written.parent / "pictures" / f"{picture.name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_loads_nothing_and_runs_nothing(written: Path) -> None:
    page = Reader(written.read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert (value or "").startswith("#")
    assert "default-src 'none'" in written.read_text(encoding="utf-8")


def test_the_same_analysis_gives_the_same_bytes(
    found: Analysis, drawn: list[law_charts.Picture], written: Path
) -> None:
    assert law_page.render(found, drawn) == written.read_text(encoding="utf-8")


def test_an_unfit_law_says_so_before_its_answer(found: Analysis) -> None:
    unfit = dataclasses.replace(found, unfit=("a line between two ratios predicts the `domain` loss better",))
    text = re.sub(r"\s+", " ", law_page.render(unfit, []))
    assert text.index("Do not use this law") < text.index("Recommendation")
    assert "<code>domain</code> loss better" in text


def test_names_from_files_are_text_and_nothing_else(found: Analysis, tmp_path: Path) -> None:
    given = columns(ratios=(0.0, 0.25, 0.5, 0.75, 1.0), sizes=(5e8,), tokens=(1e10,))
    share, domain, general = given["r_domain"], given["loss_domain"], given["loss_general"]
    third = [0.0] * len(share)
    third[1], rest = 0.1, [1 - float(r) for r in share]  # type: ignore[arg-type]
    rest[1] -= 0.1
    named = {f"w_{HOSTILE}": share, "w_b": rest, "w_c": third, f"loss_{HOSTILE}": domain, "loss_b": general}
    named |= {"run": [HOSTILE + str(i) for i in range(len(share))]}
    rows = {key: [*values, *values] for key, values in named.items() if key != "run"}
    rows["run"] = [f"{HOSTILE}{i}" for i in range(2 * len(share))]
    told = analyse(Table.of(rows, name=HOSTILE), "mixing", Settings(bootstrap=0, compare=False))
    told = dataclasses.replace(told, warnings=(Warn("x", HOSTILE, HOSTILE),), notes=(HOSTILE,), unfit=(HOSTILE,))
    page = law_page.write(told, tmp_path)
    read = Reader(page.read_text(encoding="utf-8"))
    assert "script" not in read.tags and "img" not in read.tags
    assert not any(name.startswith("on") for name, _ in read.attributes)
    assert any(HOSTILE[:20] in part for part in read.text)
    for picture in (tmp_path / "pictures").iterdir():
        assert re.fullmatch(r"[\w-]+\.(svg|png)", picture.name)
        if picture.suffix == ".svg":
            tags = {element.tag.split("}")[-1] for element in ElementTree.parse(picture).iter()}
            assert "script" not in tags and "img" not in tags


def test_pictures_say_when_token_counts_are_left_out_and_when_there_are_no_dots(found: Analysis) -> None:
    counts = tuple(float(10 ** (9 + i / 5)) for i in range(9))
    given = columns(ratios=(0.1, 0.3, 0.6, 0.9), sizes=(5e8, 1.8e9, 4e9), tokens=counts)
    settings = Settings(n_params=1e9, bootstrap=0, compare=False)
    titles = [p.title for p in law_charts.pictures(analyse(Table.of(given, name="runs.csv"), "dcpt", settings))]
    assert any(f"{law_charts.MOST_LEVELS} of 9 token counts are shown" in title for title in titles)
    assert any("nothing was measured at this size" in title for title in titles)
    usual = [p.title for p in law_charts.pictures(found)]
    assert not any("are shown" in title for title in usual)
    assert any("dots are measurements" in title for title in usual)


def test_a_law_of_size_and_tokens_is_drawn_over_both(tmp_path: Path) -> None:
    rows = {"n_params": [], "tokens": [], "loss": []}
    for n in (1e8, 3e8, 1e9, 3e9):
        for d in (2e9, 6e9, 2e10, 6e10):
            rows["n_params"].append(n)
            rows["tokens"].append(d)
            rows["loss"].append(1.8 + 400 / n**0.34 + 2000 / d**0.37)
    told = analyse(Table.of(rows), "chinchilla", Settings(bootstrap=0, compare=False))
    titles = [p.title for p in law_charts.pictures(told)]
    assert titles == [
        "loss against tokens",
        "loss over size and tokens; dots are measurements",
        "Residuals of the loss",
    ]
    assert "There is none: the table has no column of ratios" in text_of(law_page.write(told, tmp_path))
