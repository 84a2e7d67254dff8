"""Tables of runs: what is read, what is noted, what is refused and in which words."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpt.base.errors import CptError, UsageError
from cpt.laws import table
from cpt.laws.table import Table
from tests.shared import shared_data

HEAD = "run,n_params,tokens,r_domain,loss_domain,loss_general"
LINES = [
    "a,1e9,1e9,0.25,2.5,2.1",
    "a,1e9,2e9,0.25,2.4,2.0",
    "b,1e9,1e9,0.5,2.3,2.2",
    "b,1e9,2e9,0.5,2.2,2.15",
    "c,2e9,1e9,0.75,2.1,2.3",
    "c,2e9,2e9,0.75,2.0,2.25",
]


def write(folder: Path, *lines: str, head: str = HEAD, name: str = "runs.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def refused(path: Path, **options: object) -> UsageError:
    with pytest.raises(UsageError) as error:
        table.read(path, **options)  # type: ignore[arg-type]
    return error.value


def with_value(row: int, column: str, value: str) -> list[str]:
    lines = [line.split(",") for line in LINES]
    lines[row][HEAD.split(",").index(column)] = value
    return [",".join(line) for line in lines]


def test_the_share_is_that_of_the_corpus_the_loss_is_measured_on(tmp_path: Path) -> None:
    found = table.read(write(tmp_path, *LINES))
    assert found.rows("domain").share_R.tolist() == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]  # type: ignore[union-attr]
    assert found.rows("general").share_R.tolist() == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]  # type: ignore[union-attr]
    assert found.corpora == ("domain", "general") and found.num_runs == 3
    assert found.rows("domain").run_R.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.line.tolist() == [2, 3, 4, 5, 6, 7]


def test_formats_hold_the_same_table(tmp_path: Path) -> None:
    first = table.read(write(tmp_path, *LINES))
    keys = HEAD.split(",")
    records = [dict(zip(keys, line.split(","), strict=True)) for line in LINES]
    numbers = [{k: v if k == "run" else float(v) for k, v in r.items()} for r in records]
    lines = "\n".join(json.dumps(r) for r in numbers)
    (tmp_path / "runs.jsonl").write_text(lines)
    (tmp_path / "runs.json").write_text(json.dumps(numbers))
    (tmp_path / "runs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(numbers), tmp_path / "runs.parquet")
    write(tmp_path, *(line.replace(",", "\t") for line in LINES), head=HEAD.replace(",", "\t"), name="runs.tsv")
    write(tmp_path, *(line.replace(",", ";") for line in LINES), head=HEAD.replace(",", ";"), name="semicolon.csv")
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "runs.csv").read_bytes().replace(b"\n", b"\r\n"))
    names = ["runs.jsonl", "runs.json", "runs.jsonl.gz", "runs.parquet", "runs.tsv", "semicolon.csv", "bom.csv"]
    for name in names:
        assert table.read(tmp_path / name).fingerprint == first.fingerprint, name


def test_a_table_written_as_csv_reads_back_the_same(tmp_path: Path) -> None:
    base = ["base,1e9,0,,2.9,1.9", "base,2e9,0,,2.7,1.8"]
    found = table.read(write(tmp_path, *base, *LINES[:3], "b,1e9,2e9,0.5,,2.15", *LINES[4:]))
    (tmp_path / "again.csv").write_text(found.csv())
    again = table.read(tmp_path / "again.csv")
    assert again.fingerprint == found.fingerprint and again.base == found.base and len(again) == 6
    assert np.isnan(again.losses["domain"][3]) and len(again.rows("domain")) == 5


def test_the_fingerprint_does_not_depend_on_the_order_of_rows_or_columns(tmp_path: Path) -> None:
    first = table.read(write(tmp_path, *LINES))
    turned = [",".join(reversed(line.split(","))) for line in reversed(LINES)]
    other = table.read(write(tmp_path, *turned, head=",".join(reversed(HEAD.split(","))), name="other.csv"))
    assert other.fingerprint == first.fingerprint
    changed = table.read(write(tmp_path, *with_value(0, "loss_domain", "2.51")))
    assert changed.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "head",
    [
        "run,N,D,r_d,L_d,L_g",
        "run_id,params,train_tokens,domain_ratio,domain_loss,general_loss",
        "Run,Model Size,Tokens,domain-share,loss_new,loss_old",
    ],
)
def test_other_names_are_understood_and_said(head: str, tmp_path: Path) -> None:
    found = table.read(write(tmp_path, *LINES, head=head))
    assert found.fingerprint == table.read(write(tmp_path, *LINES)).fingerprint
    assert any(note.startswith("columns read: ") for note in found.notes)


def test_quantities_and_percents_are_read_as_people_write_them(tmp_path: Path) -> None:
    lines = [line.replace("1e9,1e9", "1B,1B").replace("0.25,", "25%,").replace("2e9,", "2000M,") for line in LINES]
    assert table.read(write(tmp_path, *lines)).fingerprint == table.read(write(tmp_path, *LINES)).fingerprint


def test_own_names_are_given_as_columns(tmp_path: Path) -> None:
    path = write(tmp_path, *LINES, head="run,n_params,tokens,x,y,z")
    given = {"r_general": "x", "loss_domain": "y", "loss_general": "z"}
    found = table.read(path, columns=given)
    assert found.shares["general"].tolist()[:3] == [0.25, 0.25, 0.5]
    error = refused(path, columns={"x": "r_domain"})
    assert error.hints == ("did you mean `columns={r_domain: x}`?",)
    assert refused(path, columns={"r_domain": "xx"}).message == "unknown column `xx` in `columns`"
    assert refused(path, columns={"r_dmain": "x"}).hints == ("did you mean `r_domain`?",)


def test_a_ratio_that_does_not_say_of_which_corpus_is_refused(tmp_path: Path) -> None:
    error = refused(write(tmp_path, *LINES, head=HEAD.replace("r_domain", "ratio")))
    assert error.message == "column `ratio` does not say whose share it is"
    assert "columns={r_general: ratio}" in error.hints[0]


def test_several_corpora_are_read_from_w_columns(tmp_path: Path) -> None:
    head = "run,w_web,w_code,w_law,loss_web,loss_code,loss_law"
    found = table.read(write(tmp_path, "1,0.5,0.5,0,2,1,3", "2,0.2,0.3,0.5,2.1,1.1,2.5", head=head))
    assert found.corpora == ("web", "code", "law") and list(found.losses) == ["web", "code", "law"]
    rows = found.rows("law")
    assert rows.share_R.tolist() == [0, 0.5]  # type: ignore[union-attr]
    assert rows.shares_RK.tolist() == [[0.5, 0.5, 0], [0.2, 0.3, 0.5]]  # type: ignore[union-attr]


def test_rounded_shares_are_scaled_and_said_and_wrong_ones_refused(tmp_path: Path) -> None:
    head = "run,w_a,w_b,loss_a,loss_b"
    found = table.read(write(tmp_path, "1,0.333,0.664,2,1", "2,0.5,0.5,2.1,1.1", head=head))
    assert found.shares["a"][0] + found.shares["b"][0] == pytest.approx(1)
    assert found.warnings == ("shares of 1 rows sum to 0.997 to 1 instead of 1; they were scaled to 1",)
    error = refused(write(tmp_path, "1,0.33,0.66,2,1", "2,0.5,0.5,2.1,1.1", head=head))
    assert error.message == "`runs.csv`, row 1 (line 2): `w_a` + `w_b` is 0.99, and shares sum to 1"
    both = HEAD.replace("r_domain", "r_domain,r_general")
    error = refused(write(tmp_path, *(line.replace(",2.", ",0.7,2.", 1) for line in LINES), head=both))
    assert "`r_domain` + `r_general` is 0.95" in error.message


def test_rows_before_training_are_the_base(tmp_path: Path) -> None:
    found = table.read(write(tmp_path, "base,1e9,0,,2.9,1.9", "base,2e9,0,,2.7,1.8", *LINES))
    assert found.base_loss("general", 1e9) == 1.9 and found.base_loss("domain", 2e9) == 2.7
    assert found.base_loss("general", 1.004e9) == 1.9  # as `1.00B` would be typed
    assert found.base_loss("general", 5e9) is None and found.base_loss("general") is None
    assert found.rows("general").base_R.tolist() == [1.9, 1.9, 1.9, 1.9, 1.8, 1.8]  # type: ignore[union-attr]
    assert len(found) == 6
    flagged = found.with_base({"general": 2.0}, 2e9)
    assert flagged.base_loss("general", 2e9) == 2.0 and flagged.base_loss("domain", 2e9) == 2.7
    assert flagged.base_loss("general", 1e9) == 1.9 and flagged.base_loss("general", 5e9) is None


def test_every_run_may_begin_with_the_base(tmp_path: Path) -> None:
    head = HEAD.replace("tokens", "step,tokens")
    lines = [line.replace("e9,", "e9,10,", 1).replace("e9,10,2e9", "e9,20,2e9") for line in LINES]
    starts = ["a,1e9,0,0,0.25,2.9,1.9", "b,1e9,0,0,0.5,2.9,1.901"]
    found = table.read(write(tmp_path, *starts, *lines, head=head), where="step >= 20")
    assert found.base_loss("general", 1e9) == pytest.approx(1.9005)
    assert len(found) == 3  # the base rows are exempt from comparisons on steps
    starts[1] = starts[1].replace("1.901", "1.95")
    assert "disagree on `loss_general`" in table.read(write(tmp_path, *starts, *lines, head=head)).warnings[0]


def test_where_selects_rows_before_they_are_checked(tmp_path: Path) -> None:
    head, lines = HEAD + ",bad", [line + ",0" for line in LINES]
    found = table.read(
        write(tmp_path, *lines, "d,x,y,7,-1,nan,1", head=head), where="bad==0 and D>=2e9".replace("D", "tokens")
    )
    assert found.line.tolist() == [3, 5, 7]
    assert found.notes == ("`where` keeps 3 of 7 rows",)
    assert "no row meets `bad == 5`" in refused(tmp_path / "runs.csv", where="bad==5").message


def test_runs_without_a_label_are_rows_of_one_size_and_ratio(tmp_path: Path) -> None:
    lines = [line.split(",", 1)[1] for line in LINES]
    found = table.read(write(tmp_path, *lines, head=HEAD.split(",", 1)[1]))
    assert found.num_runs == 3 and found.rows("domain").run_R.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("loss_domain", "0", "column `loss_domain` is 0, and a loss is above 0"),
        ("loss_domain", "-2.5", "is -2.5, and a loss is above 0"),
        ("loss_domain", "nan", "is `nan`, and a loss is a finite number"),
        ("loss_general", "inf", "column `loss_general` is `inf`, and a loss is a finite number"),
        ("loss_general", "2,1".replace(",", "."), ""),
        ("loss_domain", "good", "is `good`, and a loss is a finite number"),
        ("r_domain", "1.2", "column `r_domain` is 1.2, and a share lies between 0 and 1"),
        ("r_domain", "-0.1", "is -0.1, and a share is 0 or more"),
        ("r_domain", "half", "is `half`, and a share is a finite number"),
        ("r_domain", "", "is empty, and a share is wanted"),
        ("tokens", "-1", "is -1, and a number of tokens is above 0"),
        ("tokens", "", "is empty, and a number of tokens is wanted"),
        ("n_params", "0", "is 0, and a number of parameters is above 0"),
        ("n_params", "-7e9", "is -7e+09, and a number of parameters is above 0"),
        ("n_params", "big", "is `big`, and a number of parameters is a finite number"),
    ],
)
def test_a_wrong_value_is_named_with_file_row_and_column(column: str, value: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, *with_value(2, column, value))
    if not said:
        assert len(table.read(path)) == 6
        return
    message = refused(path).message
    assert message.startswith(f"`runs.csv`, row 3 (line 4), column `{column}` ") and message.endswith(said)


def test_all_wrong_values_are_named_at_once(tmp_path: Path) -> None:
    lines = [line.replace("2.", "-2.") for line in LINES]
    error = refused(write(tmp_path, *lines))
    assert len(error.more) == 5 and error.more[-1].message == "7 more values are wrong"


def test_percents_get_the_advice_to_divide(tmp_path: Path) -> None:
    lines = [line.replace(",0.25,", ",25,").replace(",0.5,", ",50,").replace(",0.75,", ",75,") for line in LINES]
    error = refused(write(tmp_path, *lines))
    assert error.message == "`runs.csv`, column `r_domain` holds 75, and a share lies between 0 and 1"
    assert "divide by 100" in error.hints[0] and not error.more


def test_slips_of_units_are_warned_about(tmp_path: Path) -> None:
    lines = [line.replace("1e9,", "7,", 1).replace("2e9,", "13,", 1) for line in LINES]
    found = table.read(write(tmp_path, *lines))
    assert found.warnings[0].startswith(
        "`runs.csv`, row 1 (line 2), column `n_params` is 7, below 10,000, as in 5 more"
    )
    assert "`7B`" in found.warnings[0]


def test_a_loss_may_be_missing_in_a_row_but_not_all(tmp_path: Path) -> None:
    assert len(table.read(write(tmp_path, *with_value(0, "loss_domain", ""))).rows("domain")) == 5
    lines = with_value(0, "loss_domain", "")
    lines[0] = lines[0].removesuffix("2.1")
    assert refused(write(tmp_path, *lines)).message.endswith(
        "row 1 (line 2) has no loss in `loss_domain`, `loss_general`"
    )


def test_equal_doubles_are_merged_and_unlike_ones_refused(tmp_path: Path) -> None:
    found = table.read(write(tmp_path, *LINES, LINES[0]))
    assert len(found) == 6 and "1 row repeated others and was merged" in found.notes
    error = refused(write(tmp_path, *LINES, LINES[0].replace("2.5", "2.6")))
    assert error.message == (
        "`runs.csv`, row 7 (line 8), column `loss_domain` is 2.6, and row 1 has 2.5 for the same run at tokens 1e+09"
    )
    halves = ["a,1e9,1e9,0.25,2.5,", "a,1e9,1e9,0.25,,2.1", *LINES[1:]]
    assert table.read(write(tmp_path, *halves)).losses["general"][0] == 2.1


def test_nothing_to_fit_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    assert refused(tmp_path / "empty.csv").message == "`empty.csv` is empty"
    assert refused(write(tmp_path)).message == "`runs.csv` has no rows"
    assert "has a single row to fit" in refused(write(tmp_path, LINES[0])).message
    constant = [",".join([*line.split(",")[:4], "2.5", line.split(",")[5]]) for line in LINES]
    assert "column `loss_domain` is 2.5 in all 6 rows" in refused(write(tmp_path, *constant)).message
    assert "no column of losses" in refused(write(tmp_path, "a,1", head="run,x")).message
    assert "base losses only" in refused(write(tmp_path, "a,1e9,0,0.5,2,3")).message


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    write(tmp_path, *LINES)
    assert refused(tmp_path / "run.csv").hints == (f"did you mean `{tmp_path / 'runs.csv'}`?",)
    assert "is a folder" in refused(tmp_path).message
    assert "has 3 values, and the head names 6 columns" in refused(write(tmp_path, "a,1,2")).message
    assert "two columns `run`" in refused(write(tmp_path, *LINES, head=HEAD.replace("tokens", "run"))).message
    (tmp_path / "x.csv").write_bytes(b"run,loss\na,\xff\xfe\n")
    assert refused(tmp_path / "x.csv").message == "`x.csv`, line 2 is not UTF-8 text"
    (tmp_path / "x.jsonl").write_text('{"run": 1}\n{"run": \n')
    assert "line 2 is not JSON" in refused(tmp_path / "x.jsonl").message
    (tmp_path / "x.jsonl").write_text("[1]\n3\n")
    assert (
        "is no JSON object" in refused(tmp_path / "x.jsonl").message
        or "not JSON" in refused(tmp_path / "x.jsonl").message
    )
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    assert "cannot be read as Parquet" in refused(tmp_path / "x.parquet").message


def test_a_lone_loss_has_no_share_and_that_is_said(tmp_path: Path) -> None:
    found = table.read(
        write(tmp_path, *(line.rsplit(",", 1)[0] for line in LINES), head="run,n_params,tokens,r_domain,loss")
    )
    assert found.rows("loss").share_R is None and any("does not say which corpus" in note for note in found.notes)


def test_a_table_in_memory_gets_the_same_checks() -> None:
    columns = {"run": ["a", "b", "c"], "tokens": np.array([0, 1e9, 2e9]), "loss": [3.0, 2.5, None]}
    with pytest.raises(UsageError, match="row 3 has no loss in `loss`"):
        Table.of(columns, "proxies")
    found = Table.of(columns | {"loss": [3.0, 2.5, 2.4]})
    assert found.base_loss("loss") == 3.0 and len(found) == 2


def test_labels_of_evaluation_and_domain_are_kept(tmp_path: Path) -> None:
    lines = [f"{line},{'v1' if i < 3 else 'v2'},code,5.0,0.1" for i, line in enumerate(LINES)]
    found = table.read(write(tmp_path, *lines, head=HEAD + ",eval_id,domain,k1,k2"))
    assert set(found.eval_id or ()) == {"v1", "v2"} and found.rows("domain").domain_R.tolist() == [0] * 6  # type: ignore[union-attr]
    assert found.rows("domain").k1_R.tolist() == [5.0] * 6  # type: ignore[union-attr]


def test_300_mutated_tables_give_a_table_or_a_usage_error(tmp_path: Path) -> None:
    rng = random.Random(7)
    head = HEAD.replace("tokens", "step,tokens")
    good = "\n".join([head, *(line.replace("e9,", "e9,10,", 1) for line in LINES)]).encode()
    lines = [json.dumps(dict(zip(HEAD.split(","), line.split(","), strict=True))) for line in LINES]
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), tmp_path / "good.parquet")
    seeds = {".csv": good, ".jsonl": "\n".join(lines).encode(), ".parquet": (tmp_path / "good.parquet").read_bytes()}
    read = 0
    for i in range(300):
        ending = rng.choice([".csv", ".csv", ".jsonl", ".parquet"])
        path = tmp_path / f"m{i}{ending}"
        path.write_bytes(mutated(seeds[ending], rng))
        try:
            found = table.read(path)
            for target in found.losses:
                found.rows(target).in_order()
            found.fingerprint, found.csv()
            read += 1
        except CptError as error:
            assert isinstance(error, UsageError) and len(error.message) > 10
    assert 0 < read < 300


WORDS = [
    b"nan",
    b"inf",
    b"-1",
    b"0",
    b"1e999",
    b"",
    b",",
    b"\n",
    b'"',
    b"\x00",
    b"\xff",
    b"25",
    b"1e-400",
    b"null",
    b"[]",
]
WORDS += [b"7", b"{}", b"\r", b"tokens", b"1_0", "½".encode(), b"9" * 5000, b"=1+1", b"true", b"-", b"r_domain", b";"]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few random changes: cells, bytes, lines, cuts."""
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(6)
        at = rng.randrange(len(data) + 1)
        if kind == 0:
            data = data[:at] + rng.choice(WORDS) + data[at:]
        elif kind == 1:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + data[at + rng.randint(1, 30) :]
        elif kind == 3:
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = b"\n".join(lines)
        elif kind == 4:
            lines = data.split(b"\n")
            cells = (line := rng.choice(lines)).split(b",")
            cells[rng.randrange(len(cells))] = rng.choice(WORDS)
            data = data.replace(line, b",".join(cells), 1)
        else:
            data = data[:at] if rng.random() < 0.3 else data + data[at:]
    return data


@pytest.mark.parametrize(
    ("name", "rows", "runs", "corpora", "losses"),
    [
        ("chinchilla_245.csv", 245, 245, 0, 1),
        ("cpt_pile_python_70m.csv", 40, 4, 2, 2),
        ("mix2_github_pilecc.csv", 88, 8, 2, 2),
        ("mix5_pile.csv", 1115, 78, 5, 5),
        ("regmix_1m_train.csv", 512, 512, 17, 13),
        ("data_constrained_c4.csv", 229, 229, 0, 1),
        ("tables_replay_german.csv", 6, 6, 2, 2),
    ],
)
def test_published_tables_are_read_without_help(name: str, rows: int, runs: int, corpora: int, losses: int) -> None:
    found = table.read(shared_data("laws", name))
    assert (len(found), found.num_runs, len(found.corpora), len(found.losses)) == (rows, runs, corpora, losses)


def test_the_five_highest_losses_of_chinchilla_can_be_left_out() -> None:
    assert len(table.read(shared_data("laws", "chinchilla_245.csv"), where="top5_loss==0")) == 240


def test_rows_of_two_domains_are_two_runs_where_none_are_named(tmp_path: Path) -> None:
    head = "domain,n_params,tokens,r_domain,loss_domain"
    found = table.read(write(tmp_path, "law,1e9,1e9,0.5,2.5", "code,1e9,1e9,0.5,1.5", "law,1e9,2e9,0.5,2.4", head=head))
    assert found.num_runs == 2 and found.run[0] == found.run[2]


def test_small_counts_of_tokens_are_warned_of_in_files_and_not_in_what_a_program_counted(tmp_path: Path) -> None:
    given = {"run": list("abc"), "tokens": [4096, 8192, 16384], "loss": [3.0, 2.9, 2.8]}
    assert table.Table.of(given).warnings == ()
    lines = [",".join(str(v) for v in row) for row in zip(*given.values(), strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join([",".join(given), *lines]))
    (warned,) = table.read(tmp_path / "runs.csv").warnings
    assert "below 100,000" in warned
