"""A saved law says the same after it was read back, or is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.laws import table
from cpt.laws.analyse import analyse
from cpt.laws.result import Analysis
from cpt.laws.saved import SavedLaw
from cpt.laws.settings import Settings
from cpt.report import law_text
from tests.unit.laws import set_m

GROUPS = {"domain": {"pubmed": 3.0, "icd": 1.0}, "general": {"web": 1.0}}


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    found = table.read(set_m.write(tmp_path_factory.mktemp("law") / "runs.csv"))
    asked = Settings(
        tolerance=0.03, base_losses={"general": 2.296}, n_params=1.8e9, tokens=1e10, bootstrap=8, compare=False
    )
    return analyse(found, "dcpt", asked)


@pytest.fixture
def path(analysis: Analysis, tmp_path: Path) -> Path:
    SavedLaw.of(analysis, GROUPS).save(tmp_path / "law.json")
    return tmp_path / "law.json"


def test_a_law_read_back_predicts_the_same_in_every_draw(analysis: Analysis, path: Path) -> None:
    saved = SavedLaw.load(path)
    for target, fit in analysis.fits.items():
        shares = {"domain": 0.3, "general": 0.7}
        point = saved.points(target, n_params=1.8e9, tokens=1e10, shares=shares)
        assert point.share_R is not None and point.share_R.tolist() == [shares[target]]
        assert saved.predict(target, point).tolist() == fit.loss(point).tolist()
        assert len(saved.predict(target, point)) == 9
        assert saved.targets[target].rows.loss_R.tolist() == fit.rows.loss_R.tolist()


def test_saving_twice_gives_the_same_bytes(path: Path) -> None:
    first = path.read_bytes()
    SavedLaw.load(path).save(path)
    assert path.read_bytes() == first


def test_recipes_get_ratio_interval_losses_and_the_share_of_every_source(analysis: Analysis, path: Path) -> None:
    values = SavedLaw.load(path).values()
    assert analysis.recommendation is not None and analysis.recommendation.ratio is not None
    ratio = analysis.recommendation.ratio
    assert values["ratio"] == ratio.value and values["replay"] == 1 - ratio.value
    assert (values["low"], values["high"]) == (ratio.low, ratio.high)
    assert values["mixture"] == pytest.approx(
        {"pubmed": 0.75 * ratio.value, "icd": 0.25 * ratio.value, "web": 1 - ratio.value}
    )
    assert sum(values["mixture"].values()) == pytest.approx(1)
    assert values["tokens"] == 1e10 and values["n_params"] == 1.8e9 and values["verdict"] == "fit"
    assert values["loss_domain"] == analysis.recommendation.losses["domain"].value
    assert json.loads(path.read_text())["values"] == values


def test_a_law_without_a_recommendation_gives_its_verdict_alone(analysis: Analysis, tmp_path: Path) -> None:
    asked = Settings(bootstrap=0, compare=False)
    saved = SavedLaw.of(analyse(analysis.table, "dcpt", asked))
    saved.save(tmp_path / "law.json")
    again = SavedLaw.load(tmp_path / "law.json")
    assert again.values() == {"law": "dcpt", "verdict": "fit"} and again.recommendation is None
    assert "nothing was asked" in again.no_recommendation


def test_an_unfit_law_gives_no_values_and_marks_its_answer(analysis: Analysis, tmp_path: Path) -> None:
    unfit = dataclasses.replace(analysis, unfit=("it falls where the runs rise",))
    SavedLaw.of(unfit, GROUPS).save(tmp_path / "law.json")
    written = json.loads((tmp_path / "law.json").read_text())
    assert written["values"] == {"law": "dcpt", "verdict": "unfit"} and written["recommendation"] is not None
    assert SavedLaw.load(tmp_path / "law.json").values() == written["values"]
    assert "answer   (unfit) r_domain 0.7" in law_text.text(unfit)
    assert "answer   r_domain 0.7" in law_text.text(analysis)


def test_the_size_of_base_losses_that_were_given_is_kept(analysis: Analysis, path: Path) -> None:
    saved = SavedLaw.load(path)
    assert saved.settings.base_n_params == 1.8e9
    assert saved.table.base_loss("general", 1.801e9) == 2.296 and saved.table.base_loss("general", 7e10) is None


def test_the_headline_and_what_it_is_made_of_stand_in_the_text(analysis: Analysis) -> None:
    held = analysis.fits["domain"].heldout
    text = law_text.text(analysis)
    assert f"left out: mean of the {len(held.by)} below" in text and f"{100 * held.error:.3g} %" in text


def test_a_folder_stands_for_the_law_in_it(path: Path) -> None:
    assert SavedLaw.load(path.parent).law == "dcpt"


def test_measurements_that_were_changed_after_the_fit_are_noticed(path: Path) -> None:
    value = json.loads(path.read_text())
    value["table"]["records"][3]["loss_domain"] += 0.01
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match="were changed after the law was fitted"):
        SavedLaw.load(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("[]", "is not a saved law"),
        ("{", "is cut off"),
        ('{"format": "cpt-law"}', "of version None"),
        ('{"format": "cpt-law", "version": 2, "cpt": "9.9"}', r"of version 2 \(cpt 9.9\), and cpt .* reads version 1"),
        ('{"format": "cpt-law", "version": 1}', "is damaged: `settings` is missing"),
        ("[" * 100_000, "is not a saved law"),
    ],
)
def test_files_that_are_no_law_of_this_version_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        SavedLaw.load(tmp_path / "law.json")


def test_options_that_the_law_does_not_have_are_refused_naming_both(path: Path) -> None:
    value = json.loads(path.read_text())
    value["targets"]["domain"]["options"]["has_k"] = True
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"options `has_d`, `has_k`, `has_n`, and this version has `has_d`, `has_n`"):
        SavedLaw.load(path)


def test_a_law_that_was_cut_off_anywhere_says_so_and_no_damage_shows_pythons_words(path: Path) -> None:
    text = path.read_text()
    for part in (0.1, 0.37, 0.5, 0.81, 0.999):
        path.write_text(text[: int(part * len(text))])
        with pytest.raises(UsageError, match="is cut off"):
            SavedLaw.load(path)
    for key in ("settings", "table", "targets", "values", "corpora"):
        for wrong in (None, 3, "x", [1]):
            path.write_text(json.dumps(json.loads(text) | {key: wrong}))
            with pytest.raises(UsageError) as caught:
                SavedLaw.load(path)
            assert not re.search(r"Error|object|NoneType|__init__|argument|subscript", caught.value.message)


def test_100_damaged_laws_are_read_or_refused_without_a_traceback(path: Path) -> None:
    rng = random.Random(5)
    good = json.loads(path.read_text())
    odd = [None, -1, 0, 1e308, "x", [], {}, [[]], True, "nan", 10**400, {"value": "x"}]
    refused = 0
    for _ in range(100):
        value = json.loads(json.dumps(good))
        here = value
        for _ in range(rng.randint(1, 6)):
            key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
            if not isinstance(here[key], dict | list) or not here[key] or rng.random() < 0.2:
                break
            here = here[key]
        else:
            key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        if isinstance(here, dict) and rng.random() < 0.3:
            del here[key]
        else:
            here[key] = rng.choice(odd)
        path.write_text(json.dumps(value))
        try:
            saved = SavedLaw.load(path)
            saved.values()
            saved.to_json()
            point = saved.points("general", n_params=1.8e9, tokens=1e10, shares={"domain": 0.5, "general": 0.5})
            assert saved.predict("general", point).shape[1] == 1 if "general" in saved.targets else True
        except UsageError:
            refused += 1
    assert 20 < refused < 100


def test_a_point_needs_no_columns_that_the_law_left_out(analysis: Analysis, tmp_path: Path) -> None:
    one_size = [line for line in set_m.lines() if line.startswith("1.8B")]
    found = table.read(set_m.write(tmp_path / "runs.csv", one_size))
    saved = SavedLaw.of(analyse(found, "dcpt", Settings(bootstrap=0, compare=False)))
    saved.save(tmp_path / "law.json")
    again = SavedLaw.load(tmp_path / "law.json")
    point = again.points("domain", tokens=1e10, shares={"domain": 0.5, "general": 0.5})
    assert np.isclose(again.predict("domain", point)[0, 0], 1.760831, rtol=0.004)
