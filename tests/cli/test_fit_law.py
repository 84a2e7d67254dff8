"""`cpt fit-law` and `cpt predict` on tables: names, keys, fields, warnings, refusals, exit codes."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.command import Ended, cpt, tree
from tests.unit.laws import set_m
from tests.unit.laws.test_table import mutated

FAST = ("bootstrap=0", "--no-compare")
FIELDS = ("law", "rows", "objective", "params", "intervals", "heldout", "outliers", "warnings", "recommendation")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return set_m.write(tmp_path / "runs.csv")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A law that was fitted and saved, and how the command ended."""
    folder = tmp_path_factory.mktemp("law")
    table = set_m.write(folder / "runs.csv")
    asked = ("n_params=1.8B", "tokens=10B", "tolerance=3%", "base_general=2.296", "bootstrap=30")
    return folder / "out", cpt("fit-law", f"data={table}", *asked, "--no-compare", f"out={folder / 'out'}")


def with_row(row: int, column: str, value: str, rows: list[str] | None = None) -> list[str]:
    found = [line.split(",") for line in rows or set_m.lines()]
    found[row][set_m.HEAD.split(",").index(column)] = value
    return [",".join(line) for line in found]


def test_the_ratio_of_known_laws_is_found_with_its_interval(saved: tuple[Path, Ended]) -> None:
    folder, ended = saved
    assert ended.code == 0, ended.err
    law = json.loads((folder / "law.json").read_text())
    ratio = law["recommendation"]["ratio"]
    assert ratio["value"] == pytest.approx(0.726071, abs=0.02)
    assert ratio["low"] < 0.726071 < ratio["high"]
    assert f"answer   r_domain {ratio['value']:.3f} (" in ended.out and "replay   " in ended.out
    assert "verdict  fit for use" in ended.out and "Traceback" not in ended.err


def test_the_saved_folder_holds_law_table_and_page(saved: tuple[Path, Ended]) -> None:
    folder, ended = saved
    assert {"law.json", "table.csv", "law.html"} <= {p.name for p in folder.iterdir()}
    assert f"cpt predict {folder / 'law.json'} n_params=4.00B tokens=20.0B r_domain=0.5" in ended.out
    again = cpt("fit-law", f"data={folder / 'table.csv'}", *FAST, "--json")
    law = json.loads((folder / "law.json").read_text())
    assert json.loads(again.out)["objective"]["domain"] == pytest.approx(
        law["targets"]["domain"]["objective"], rel=1e-6
    )


def test_predictions_are_those_of_the_known_law_with_intervals(saved: tuple[Path, Ended]) -> None:
    folder, _ = saved
    ended = cpt("predict", str(folder), "n_params=1.8B", "tokens=10B", "r_domain=0.5", "--json")
    assert ended.code == 0 and ended.err == ""
    found = json.loads(ended.out)
    assert found["losses"]["domain"]["value"] == pytest.approx(1.760831, rel=0.002)
    assert found["losses"]["general"]["value"] == pytest.approx(2.317466, rel=0.002)
    assert found["losses"]["domain"]["low"] < found["losses"]["domain"]["value"] < found["losses"]["domain"]["high"]
    assert found["inside"] is True and found["asked"]["shares"] == {"domain": 0.5, "general": 0.5}
    other = cpt("predict", str(folder / "law.json"), "n_params=1.8e9", "tokens=1e10", "r_general=50%", "--json")
    assert json.loads(other.out)["losses"] == found["losses"]
    text = cpt("predict", str(folder), "n_params=1.8B", "tokens=10B", "r_domain=0.5").out
    assert "asked    1.80B parameters · 10.0B tokens · r_domain 0.5" in text and "95 % interval" in text


def test_without_a_ratio_the_recommended_one_is_given_for_the_run_that_is_asked_about(
    saved: tuple[Path, Ended],
) -> None:
    folder, _ = saved
    found = [
        json.loads(cpt("predict", str(folder), "n_params=1.8B", "tokens=10B", *more, "--json").out)["recommendation"]
        for more in ((), ("tolerance=1%",), ("tolerance=5%",), ("domain_tokens=1B",))
    ]
    values = [one["ratio"]["value"] for one in found]
    assert values[:3] == pytest.approx([0.726071, 0.511577, 0.823355], abs=0.02)
    assert found[3]["usage"] == "limited"


def test_far_extrapolation_is_warned_about(saved: tuple[Path, Ended]) -> None:
    ended = cpt("predict", str(saved[0]), "n_params=70B", "tokens=10B", "r_domain=0.5")
    assert ended.code == 0 and "warning: " in ended.err and "extrapolates far" in ended.err


def test_a_base_loss_given_for_one_size_is_not_that_of_another(saved: tuple[Path, Ended]) -> None:
    asked = ("predict", str(saved[0]), "tokens=10B", "r_domain=0.5")
    assert "%" in cpt(*asked, "n_params=1.8B").out.splitlines()[-1]
    ended = cpt(*asked, "n_params=70B")
    assert "%" not in ended.out.splitlines()[-1]
    assert "given for 1.80B parameters and are not used for 70.0B; `base_general=` gives them" in ended.err
    again = cpt(*asked, "n_params=70B", "base_general=1.9")
    assert "%" in again.out.splitlines()[-1] and "are not used" not in again.err
    refused = cpt("predict", str(saved[0]), "tokens=10B", "n_params=70B")
    assert refused.code == 2 and "general loss before training is" in refused.err


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["n_params=-1", "r_domain=0.5"], "`n_params` is -1, wanted more than 0"),
        (["n_params=0", "r_domain=0.5"], "`n_params` is 0, wanted more than 0"),
        (["tokens=0", "r_domain=0.5"], "`tokens` is 0, wanted more than 0"),
        (["r_domain=1.2"], "`r_domain` is 1.2, wanted 0 to 1"),
        (["r_domain=-0.1"], "`r_domain` is -0.1, wanted 0 to 1"),
        (["r_domain=50"], "did you mean `r_domain=50%`?"),
        (["r_domain=half"], "`r_domain`: `half` is not a number"),
        (["r_domain=0.5", "r_general=0.5"], "both say the mixture"),
        (["mixture={domain: 0.5, general: 0.4}"], "sum to 0.9, wanted 1"),
        (["mixture={web: 1}"], "`mixture` names `web`, and the law was fitted on `domain`, `general`"),
        (["r_domian=0.5"], "did you mean `r_domain`?"),
        (["tolerance=-1%"], "`tolerance` is -0.01, wanted 0 or more"),
        (["tolerance=1%", "eps_g=0.1"], "`tolerance` and `eps_g` both limit"),
    ],
)
def test_questions_outside_the_physical_range_are_refused(
    saved: tuple[Path, Ended], texts: list[str], said: str
) -> None:
    ended = cpt("predict", str(saved[0]), *texts)
    assert ended.code == 2 and said in ended.err and ended.out == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "is a saved law of version 99 (cpt 0.1.0), and cpt"),
        ({"format": "other"}, "is not a saved law"),
        ({"law": "dcp"}, "did you mean `dcpt`?"),
        ({"corpora": ["web", "code"]}, "is for the corpora `web`, `code`, and its table has `domain`, `general`"),
        ({"targets": {}}, "holds the law of no loss"),
        ({"settings": {"seed": 0, "colour": 1}}, "is damaged"),
    ],
)
def test_a_saved_law_of_another_version_or_other_columns_is_refused(
    saved: tuple[Path, Ended], change: dict[str, object], said: str, tmp_path: Path
) -> None:
    law = json.loads((saved[0] / "law.json").read_text()) | change
    (tmp_path / "law.json").write_text(json.dumps(law))
    ended = cpt("predict", str(tmp_path / "law.json"), "r_domain=0.5")
    assert ended.code == 2 and said in ended.err and ended.out == "", ended


def test_constants_of_another_form_of_the_law_are_named_beside_its_own(
    saved: tuple[Path, Ended], tmp_path: Path
) -> None:
    law = json.loads((saved[0] / "law.json").read_text())
    law["targets"]["domain"]["parameters"][1] = "Q"
    (tmp_path / "law.json").write_text(json.dumps(law))
    ended = cpt("predict", str(tmp_path), "r_domain=0.5")
    assert ended.code == 2 and "holds `E`, `Q`, " in ended.err and "which has `E`, `A`, " in ended.err


def test_a_law_that_is_not_there_is_told_how_to_make_one(tmp_path: Path) -> None:
    ended = cpt("predict", str(tmp_path / "law.json"), "r_domain=0.5")
    assert ended.code == 2 and "there is no saved law" in ended.err and "cpt fit-law" in ended.err


def test_a_run_stands_for_the_law_of_its_one_law_stage(
    saved: tuple[Path, Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("mix", "mix2"):
        folder = tmp_path / "runs" / "mine" / "stages" / stage
        folder.mkdir(parents=True)
        if stage == "mix":
            (folder / "law.json").write_bytes((saved[0] / "law.json").read_bytes())
    for name in ("mine", "runs/mine", "runs/mine/stages/mix"):
        assert cpt("predict", name, "r_domain=0.5").code == 0, name
    (folder / "law.json").write_bytes((saved[0] / "law.json").read_bytes())
    ended = cpt("predict", "mine", "r_domain=0.5")
    assert ended.code == 2 and "`mine` has 2 laws" in ended.err and "stages/mix/law.json" in ended.err


def test_json_is_one_value_with_the_named_fields(runs: Path) -> None:
    ended = cpt("fit-law", "data=runs.csv", "law=dcpt", *FAST, "--json")
    found = json.loads(ended.out, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert ended.code == 0 and set(FIELDS) <= set(found)
    assert found["rows"] == {"domain": 72, "general": 72} and found["law"] == "dcpt"
    assert set(found["params"]["domain"]) == {"E", "A", "alpha", "B", "beta", "eta", "C", "eps", "gamma"}


def test_nothing_is_written_without_out(runs: Path) -> None:
    before = tree(runs.parent)
    assert cpt("fit-law", "data=runs.csv", *FAST).code == 0
    assert tree(runs.parent) == before


@pytest.mark.parametrize("law", ["dcpt", "l1", "mixing", "chinchilla", "cmr", "replay"])
def test_laws_of_two_corpora_go_by_their_names(law: str, runs: Path) -> None:
    size = ["where=n_params==1.8B"]
    one = {"mixing": ["where=n_params==1.8B and tokens==10B"], "cmr": size, "replay": size}.get(law, [])
    ended = cpt("fit-law", "data=runs.csv", f"law={law}", "base_general=2.3", "base_domain=2.9", *one, *FAST)
    assert ended.code == 0 and ended.out.startswith(f"law      {law}: "), ended.err


def test_where_and_columns_reach_the_table(runs: Path) -> None:
    set_m.write(runs, head=set_m.HEAD.replace("r_domain", "mix"))
    ended = cpt("fit-law", "data=runs.csv", "columns={r_domain: mix}", "where=tokens>=5B", *FAST, "--json")
    assert json.loads(ended.out)["rows"]["domain"] == 54
    assert "note: `where` keeps 54 of 72 rows" in ended.err


def test_a_tilde_is_the_home_folder(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(runs.parent))
    one_size = ("law=mixing", "where=tokens==1e10 and n_params==1.8e9")
    assert cpt("fit-law", "data=~/runs.csv", *one_size, *FAST).code == 0


def test_rows_without_any_of_the_measured_corpus_are_used(runs: Path) -> None:
    found = json.loads(cpt("fit-law", "data=runs.csv", *FAST, "--json").out)
    zeros = sum(",0," in line for line in set_m.lines())
    assert zeros == 12 and found["rows"]["domain"] == 72


def test_one_loss_alone_is_fitted_and_a_tolerance_on_it_refused(runs: Path) -> None:
    rows = [line.rsplit(",", 1)[0] for line in set_m.lines()]
    set_m.write(runs, rows, set_m.HEAD.rsplit(",", 1)[0])
    assert list(json.loads(cpt("fit-law", "data=runs.csv", *FAST, "--json").out)["params"]) == ["domain"]
    ended = cpt("fit-law", "data=runs.csv", "tolerance=3%", *FAST)
    assert ended.code == 2 and "`loss_general` is not in the table" in ended.err and ended.out == ""


BAD_VALUES = [
    ("loss_domain", "0", "and a loss is above 0"),
    ("loss_domain", "-1", "and a loss is above 0"),
    ("loss_general", "nan", "is `nan`, and a loss is a finite number"),
    ("loss_general", "inf", "is `inf`, and a loss is a finite number"),
    ("loss_general", "low", "is `low`, and a loss is a finite number"),
    ("r_domain", "1.01", "is 1.01, and a share lies between 0 and 1"),
    ("r_domain", "-0.2", "is -0.2, and a share is 0 or more"),
    ("r_domain", "60", "if these are percent, divide by 100"),
    ("tokens", "-5", "is -5, and a number of tokens is above 0"),
    ("n_params", "0", "is 0, and a number of parameters is above 0"),
    ("n_params", "-7e9", "and a number of parameters is above 0"),
]


@pytest.mark.parametrize(("column", "value", "said"), BAD_VALUES)
def test_a_wrong_value_ends_with_2_and_names_file_row_and_column(
    column: str, value: str, said: str, runs: Path
) -> None:
    set_m.write(runs, with_row(4, column, value))
    ended = cpt("fit-law", "data=runs.csv", "law=dcpt")
    assert ended.code == 2 and ended.out == "" and said in ended.err
    first = ended.err.splitlines()[0]
    assert first.startswith("error: `runs.csv`") and f"column `{column}`" in first
    assert "row 5 (line 6)" in first or value == "60"


def test_slips_of_units_are_warnings(runs: Path) -> None:
    rows = [
        line.replace("5e+08", "5", 1).replace("1.8e+09", "18", 1).replace("4e+09", "40", 1) for line in set_m.lines()
    ]
    set_m.write(runs, rows)
    ended = cpt("fit-law", "data=runs.csv", *FAST)
    assert ended.code == 0 and "column `n_params` is 5, below 10,000" in ended.err


def test_shares_that_do_not_sum_to_one(runs: Path) -> None:
    head = set_m.HEAD.replace("r_domain", "r_domain,r_general")
    for general, code, said in (("0.6", 2, "`r_domain` + `r_general` is 0.8"), ("0.803", 0, "they were scaled to 1")):
        rows = []
        for line in set_m.lines():
            cells = line.split(",")
            rest = general if cells[3] == "0.2" else f"{1 - float(cells[3]):g}"
            rows.append(",".join([*cells[:4], rest, *cells[4:]]))
        set_m.write(runs, rows, head)
        ended = cpt("fit-law", "data=runs.csv", *FAST)
        assert ended.code == code and said in ended.err, ended


def test_doubles_of_a_run_and_step(runs: Path) -> None:
    rows = set_m.lines()
    set_m.write(runs, [*rows, rows[3]])
    ended = cpt("fit-law", "data=runs.csv", *FAST)
    assert ended.code == 0 and "note: 1 row repeated others and was merged" in ended.err
    set_m.write(runs, [*rows, with_row(3, "loss_domain", "2.5")[3]])
    ended = cpt("fit-law", "data=runs.csv", *FAST)
    assert ended.code == 2 and "row 73 (line 74), column `loss_domain` is 2.5, and row 4 has" in ended.err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        (set_m.lines()[:1], "has a single row to fit"),
        ([",".join([*line.split(",")[:4], "2", "3"]) for line in set_m.lines()], "is 2 in all 72 rows"),
        ([line for line in set_m.lines() if ",0.2," in line], "ratio"),
        ([line for line in set_m.lines() if ",0.2," in line or ",0.4," in line], "ratios are too few"),
        (set_m.lines()[::7], "rows"),
    ],
)
def test_tables_with_nothing_to_fit_are_refused_with_what_is_missing(rows: list[str], said: str, runs: Path) -> None:
    set_m.write(runs, rows)
    ended = cpt("fit-law", "data=runs.csv", "law=dcpt", *FAST)
    assert ended.code == 2 and ended.out == "" and said in ended.err.splitlines()[0], ended.err


def test_an_empty_file_is_refused(runs: Path) -> None:
    runs.write_text("")
    ended = cpt("fit-law", "data=runs.csv")
    assert ended.code == 2 and "`runs.csv` is empty" in ended.err


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "no table was given"),
        (["runs.csv"], "did you mean `data=runs.csv`?"),
        (["data=run.csv"], "did you mean `runs.csv`?"),
        (["data=runs.csv", "law=dcp"], "did you mean `dcpt`?"),
        (["data=runs.csv", "tolerence=3%"], "did you mean `tolerance`?"),
        (["data=runs.csv", "tolerance=-3%"], "`tolerance` is -0.03, wanted 0 or more"),
        (["data=runs.csv", "tolerance=3"], "did you mean `tolerance=3%`?"),
        (["data=runs.csv", "eps_g=3%"], "wanted nats per token"),
        (["data=runs.csv", "tolerance=3%", "bootstrap=0", "--no-compare"], "give `base_general=`"),
        (["data=runs.csv", "base_web=2"], "unknown key `base_web`"),
        (["data=runs.csv", "base_general=-2"], "`base_general` is -2, wanted a loss above 0"),
        (["data=runs.csv", "n_params=-1"], "`n_params` is -1, wanted more than 0"),
        (["data=runs.csv", "where=step=3"], "equality is written `==`"),
        (["data=runs.csv", "where=__import__('os')"], "cannot be read"),
        (["data=runs.csv", "columns=x"], "mappings are written"),
        (["data=runs.csv", "columns={r_domain: y}"], "unknown column `y` in `columns`"),
        (["data=runs.csv", "data=runs.csv"], "`data` is given twice"),
        (["data=runs.csv", "out=law.json"], "`out` is a folder"),
        (["data=runs.csv", "--loss=cubic"], "wanted `log` or `linear`"),
        (["data=runs.csv", "seed=-1"], "`seed`: "),
        (["data=\x00"], "null byte"),
    ],
)
def test_a_wrong_command_ends_with_2_and_a_way_on(texts: list[str], said: str, runs: Path) -> None:
    ended = cpt("fit-law", *texts)
    assert ended.code == 2 and ended.out == "" and said in ended.err, ended.err


def test_a_column_that_was_not_understood_is_told_with_what_it_almost_says(runs: Path) -> None:
    text = runs.read_text().replace("loss_general", "gen_los", 1)
    runs.write_text(text)
    ended = cpt("fit-law", f"data={runs}", "base_general=2.3", "tolerance=3%")
    assert ended.code == 2 and "did you mean `loss_general` by `gen_los`?" in ended.err
    assert ended.err.index("gen_los") < ended.err.index("error:")
    runs.write_text(text.replace("loss_domain", "dom_los", 1))
    ended = cpt("fit-law", f"data={runs}")
    assert ended.code == 2 and "`loss_domain` by `dom_los`" in ended.err


def test_a_mixture_asked_about_with_a_tolerance_is_told_whether_it_keeps_it(saved: tuple[Path, Ended]) -> None:
    law = str(saved[0])
    assert "this mixture is within the tolerance" in cpt("predict", law, "r_domain=0.5", "tolerance=3%").out
    assert "this mixture is not within the tolerance" in cpt("predict", law, "r_domain=0.95", "tolerance=1%").out
    assert json.loads(cpt("predict", law, "r_domain=0.95", "tolerance=1%", "--json").out)["admissible"] is False
    assert "limit " not in cpt("predict", law, "r_domain=0.5").out


def test_no_admissible_share_is_an_answer_with_its_reason_and_the_extrapolation(saved: tuple[Path, Ended]) -> None:
    ended = cpt("predict", str(saved[0]), "tokens=10", "tolerance=3%")
    assert ended.code == 0 and "no recommendation: no share keeps the general loss" in ended.out
    assert "the prediction extrapolates far" in ended.err
    told = json.loads(cpt("predict", str(saved[0]), "tokens=10", "tolerance=3%", "--json").out)
    assert told["recommendation"] is None and "no share keeps" in told["no_recommendation"]


def test_all_wrong_keys_are_told_at_once(runs: Path) -> None:
    ended = cpt("fit-law", f"data={runs}", "toks=3", "tolerance=x", "law=dcpt", "law=l1")
    assert ended.code == 2 and ended.err.count("error:") == 3
    for said in ("unknown key `toks`", "did you mean `tokens`?", "`tolerance`: `x`", "`law` is given twice"):
        assert said in ended.err
    ended = cpt("predict", str(runs), "r_domian=3", "tokens=zz")
    assert ended.code == 2 and "did you mean `r_domain`?" in ended.err and "`tokens`: `zz`" in ended.err


def test_a_fit_that_does_not_converge_prints_no_parameters(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.laws.dcpt import DCPT

    real = DCPT.loss
    monkeypatch.setattr(DCPT, "loss", lambda self, theta, rows: tuple(np.nan * a for a in real(self, theta, rows)))
    ended = cpt("fit-law", "data=runs.csv", "law=dcpt", *FAST)
    assert ended.code == 2 and ended.out == "" and "does not converge" in ended.err


def test_losses_of_several_validation_sets_are_warned_about(runs: Path) -> None:
    rows = [f"{line},{'a' if i % 2 else 'b'}" for i, line in enumerate(set_m.lines())]
    set_m.write(runs, rows, set_m.HEAD + ",eval_id")
    assert "2 validation sets (`a`, `b`)" in cpt("fit-law", "data=runs.csv", *FAST).err


def test_other_sizes_need_three_sizes_or_force(runs: Path) -> None:
    rows = [line for line in set_m.lines() if not line.startswith("4B")]
    set_m.write(runs, rows)
    asked = ("data=runs.csv", "n_params=7B", "tokens=10B", "tolerance=3%", "base_general=2.296", *FAST)
    ended = cpt("fit-law", *asked)
    assert ended.code == 2 and "two model sizes say nothing about others" in ended.err and "`--force`" in ended.err
    forced = cpt("fit-law", *asked, "--force", "out=law")
    assert forced.code == 0 and "extrapolates" in forced.err
    ended = cpt("predict", "law", "n_params=7B", "tokens=10B", "r_domain=0.5")
    assert ended.code == 2 and "two model sizes say nothing about others" in ended.err
    assert cpt("predict", "law", "n_params=7B", "tokens=10B", "r_domain=0.5", "--force").code == 0


def test_the_order_of_rows_changes_nothing(runs: Path) -> None:
    first = cpt("fit-law", "data=runs.csv", "bootstrap=10", "--no-compare", "--json").out
    set_m.write(runs, list(reversed(set_m.lines())))
    second = cpt("fit-law", "data=runs.csv", "bootstrap=10", "--no-compare", "--json").out
    drop = ("line", "row")

    def without_places(value: object) -> object:
        if isinstance(value, dict):
            return {k: without_places(v) for k, v in value.items() if k not in drop}
        return [without_places(v) for v in value] if isinstance(value, list) else value

    assert without_places(json.loads(first)) == without_places(json.loads(second))


def test_neither_torch_nor_hydra_is_loaded(runs: Path) -> None:
    code = f"from cpt.cli import main\nimport sys\nmain(['fit-law', 'data={runs}', *{FAST!r}])\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "megatron", "matplotlib"} & {m.split(".")[0] for m in done.stdout.split()}


def test_every_setting_has_a_key_or_a_flag() -> None:
    from cpt.cli.fit_law import KINDS
    from cpt.laws.settings import Settings

    flags = {"base_losses", "options", "scale", "compare", "force"}  # `base_...`, `options....`, `--loss` and so on
    flags.add("base_n_params")  # the size asked about when `base_...` was given
    assert {f.name for f in dataclasses.fields(Settings)} == flags | set(KINDS) - {
        "data",
        "law",
        "where",
        "columns",
        "out",
    }


CELLS = ["0", "1", "0.5", "1e-9", "1e300", "5e12", "2.5", "0.999999", "", "100", "2.3", "25%", "1B", "-0", "1e5", "x"]


def gently_mutated(rows: list[str], rng: random.Random) -> list[str]:
    """A few changes that leave a table: cells, whole columns, rows away or doubled, columns swapped."""
    cells = [row.split(",") for row in rows]
    for _ in range(rng.randint(1, 3)):
        kind, row, column = rng.randrange(5), rng.randrange(1, len(cells)), rng.randrange(len(cells[0]))
        if kind == 0:
            cells[row][column] = rng.choice(CELLS)
        elif kind == 1 and len(cells) > 4:
            del cells[row]
        elif kind == 2:
            value = rng.choice(CELLS)
            for line in cells[1:]:
                line[column] = value
        elif kind == 3:
            cells.insert(row, list(cells[row]))
        else:
            other = rng.randrange(len(cells[0]))
            for line in cells:
                line[column], line[other] = line[other], line[column]
    return [",".join(line) for line in cells]


def test_300_mutated_tables_end_the_command_without_a_traceback(runs: Path) -> None:
    rng = random.Random(11)
    small = [line for line in set_m.lines() if line.startswith("1.8B") or ",1e+10," in line]
    ends = []
    for _ in range(300):
        rows = gently_mutated([set_m.HEAD, *small], rng)
        if rng.random() < 0.2:
            runs.write_bytes(mutated("\n".join(rows).encode(), rng))
        else:
            set_m.write(runs, rows[1:], rows[0])
        law = rng.choice((["law=mixing", "where=tokens==1e10 and n_params==1.8e9"], ["law=chinchilla"]))
        more = rng.choice(([], ["tolerance=3%", "base_general=2.3"], ["compute=1e20", "ratio=0.5"]))
        ended = cpt("fit-law", "data=runs.csv", *law, *more, *FAST, "--json")
        assert ended.code in (0, 2), (rows, ended)
        assert bool(ended.out) == (ended.code == 0)
        ends.append(ended.code)
    assert 50 < sum(code == 0 for code in ends) < 250


def several(path: Path) -> Path:
    """24 mixtures of three corpora with losses of a known exponential law; code and law help each other."""
    rng = np.random.default_rng(0)
    slopes = {"web": (-0.9, -0.1, -0.1), "code": (-0.1, -1.2, -0.3), "law": (-0.2, -0.3, -1.0)}
    rows = []
    for i, h in enumerate(rng.dirichlet([1, 1, 1], 24).round(4)):
        h[2] = 1 - h[0] - h[1]
        losses = [2 + float(np.exp(np.dot(t, h))) for t in slopes.values()]
        rows.append(",".join([f"m{i}", *(f"{x:.6f}" for x in (*h, *losses))]))
    return set_m.write(path, rows, "run,w_web,w_code,w_law,loss_web,loss_code,loss_law")


def test_several_corpora_get_a_mixture_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    several(tmp_path / "mix.csv")
    asked = ("goal={code: 1}", "limits={law: 2.7}", "bootstrap=20", "--no-compare", "out=law")
    ended = cpt("fit-law", "data=mix.csv", *asked)
    assert ended.code == 0 and ended.out.startswith("law      mixing: "), ended.err
    law = json.loads((tmp_path / "law" / "law.json").read_text())
    shares = {k: v["value"] for k, v in law["recommendation"]["mixture"].items()}
    assert sum(shares.values()) == pytest.approx(1) and shares["web"] == pytest.approx(0, abs=1e-3)
    assert law["values"]["mixture"] == shares
    assert law["recommendation"]["losses"]["law"]["value"] <= 2.7 + 1e-6
    ended = cpt("predict", "law", "mixture={web: 0.2, code: 0.5, law: 0.3}", "--json")
    exact = 2 + np.exp(np.dot((-0.1, -1.2, -0.3), (0.2, 0.5, 0.3)))
    assert json.loads(ended.out)["losses"]["code"]["value"] == pytest.approx(exact, rel=1e-4)
    free = json.loads(cpt("predict", "law", "goal={web: 1}", "limits={law: 3}", "--json").out)
    assert free["recommendation"]["mixture"]["web"]["value"] == pytest.approx(1, abs=1e-3)
    assert "fitted on `web`, `code`, `law`" in cpt("predict", "law", "r_domain=0.5").err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("goal={cod: 1}", "did you mean `code`?"),
        ("caps={web: lots}", "`caps.web`: `lots` is not a number"),
        ("limits={web: 3, web: 2}", "`limits` names `web` twice"),
        ("limits={}", "the value of `limits` is empty"),
        ("limits={web 3}", "cannot be read from `web 3` on"),
    ],
)
def test_mappings_that_make_no_sense_are_refused(text: str, said: str, tmp_path: Path) -> None:
    ended = cpt("fit-law", f"data={several(tmp_path / 'mix.csv')}", text, *FAST)
    assert ended.code == 2 and said in ended.err and ended.out == "", ended.err


def test_a_law_of_repeated_data_asks_for_the_distinct_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = []
    for n in (1e8, 1e9, 4e9):
        for unique in (1e9, 4e9, 1e10):
            for epochs in (1, 2, 4, 8):
                fresh = unique * (1 + 15.4 * (1 - np.exp(-(epochs - 1) / 15.4)))
                loss = 1.9 + 482 / n**0.35 + 2085 / fresh**0.37
                rows.append(f"{n:g}-{unique:g}-{epochs},{n:g},{unique * epochs:g},{unique:g},{loss:.6f}")
    set_m.write(tmp_path / "c4.csv", rows, "run,n_params,tokens,unique_tokens,loss")
    ended = cpt("fit-law", "data=c4.csv", "law=repeated", *FAST, "out=law")
    assert ended.code == 0, ended.err
    lacking = cpt("predict", "law", "n_params=1B", "tokens=8B")
    assert lacking.code == 2 and "give `unique_tokens=`" in lacking.err
    found = [
        json.loads(cpt("predict", "law", "n_params=1B", "tokens=8B", f"unique_tokens={u}", "--json").out)
        for u in ("2B", "4B", "8B")
    ]
    losses = [one["losses"]["loss"]["value"] for one in found]
    assert losses[0] > losses[1] > losses[2]


def test_a_law_over_domains_is_asked_for_a_domain_by_its_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = []
    for i, (k1, k2) in enumerate([(2.1, 0.3), (2.8, 0.5), (1.7, 0.2), (2.4, 0.8)]):
        for n in (5e8, 2e9):
            for r in (0.1, 0.3, 0.6, 1.0):
                for d in (2e9, 1e10):
                    loss = set_m.loss(set_m.DOMAIN, n, d, r) + 0.4 / (1 / k1 + 0.5 * k2) ** 0.7
                    rows.append(f"d{i}-{n:g}-{r},{n:g},{d:g},{r},{loss:.6f},d{i},{k1},{k2}")
    set_m.write(tmp_path / "domains.csv", rows, "run,n_params,tokens,r_domain,loss_domain,domain,k1,k2")
    asked = ("data=domains.csv", "law=cross_dcpt", "domain_tokens=1B", *FAST)
    ended = cpt("fit-law", *asked)
    assert ended.code == 2 and "`k1=` and `k2=` say which is meant" in ended.err and ended.out == ""
    ended = cpt("fit-law", *asked, "k1=2.2", "k2=0.4", "out=law")
    assert ended.code == 0 and "answer   r_domain" in ended.out, ended.err
    found = json.loads(cpt("predict", "law", "r_domain=0.6", "n_params=2B", "tokens=10B", "--json").out)
    exact = set_m.loss(set_m.DOMAIN, 2e9, 1e10, 0.6) + 0.4 / (1 / 2.2 + 0.2) ** 0.7
    assert found["losses"]["domain"]["value"] == pytest.approx(exact, rel=0.005)
    other = json.loads(cpt("predict", "law", "r_domain=0.6", "n_params=2B", "tokens=10B", "k1=3.5", "--json").out)
    assert other["losses"]["domain"]["value"] > found["losses"]["domain"]["value"]


def test_a_critical_ratio_names_both_conditions_and_which_decides(runs: Path) -> None:
    rows = []
    for r in (0.25, 0.4, 0.5, 0.75):
        for step in range(1, 9):
            t = 12.0 * step  # in units of 0.2e9 tokens
            domain = 2.0 - 0.60 * r**0.3 * t**0.20 + 0.3
            general = 2.5 + r * (0.30 * t**0.35 - 0.14 * t**0.50)
            rows.append(f"r{r:g},{t * 0.2e9:g},{r:g},{domain:.6f},{general:.6f}")
    set_m.write(runs, rows, "run,tokens,r_domain,loss_domain,loss_general")
    asked = ("law=cmr", "base_general=2.5", "base_domain=2.3", "eps_g=0.15", *FAST)
    ended = cpt("fit-law", "data=runs.csv", *asked)
    assert ended.code == 0, ended.err
    (critical,) = [line for line in ended.out.splitlines() if line.startswith("critical ")]
    answer = json.loads(cpt("fit-law", "data=runs.csv", *asked, "--json").out)["recommendation"]
    assert f"{answer['more']['threshold']:.3f} by the limit of the general loss" in critical
    assert f"{answer['more']['turning']['value']:.3f} by where the objective turns" in critical
    assert (
        critical.endswith(f"{answer['decided_by']} decides") and "\nfalls    objective of r_domain 0.25 " in ended.out
    )
