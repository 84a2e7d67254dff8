"""Help, flags, exit codes and the one place that turns errors into text."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.base.errors import (
    EnvironmentProblem,
    GuardStop,
    PlanError,
    StageFailed,
    StoppedAndSaved,
    UsageError,
)
from cpt.cli import COMMANDS, available, failures
from tests.command import cpt, tree, write_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CPT_CACHE", raising=False)
    return write_project(tmp_path)


def test_cpt_alone_prints_help_with_the_commands_by_group() -> None:
    alone, asked, short = cpt(), cpt("--help"), cpt("-h")
    assert alone.code == 0 and alone.out == asked.out == short.out
    places = [alone.out.index(f"{group}:") for group in ("plan and run", "look", "data and checkpoints")]
    assert places == sorted(places)
    assert all(f"\n  {name} " in alone.out for name in available())


def test_every_command_has_a_file_and_help_with_the_common_flags() -> None:
    for name in available():
        ended = cpt(name, "-h")
        assert ended.code == 0, ended.err
        assert ended.out == cpt(name, "--help").out
        assert (
            all(flag in ended.out for flag in ("--help", "--quiet", "--verbose", "--debug")) or "Commands:" in ended.out
        )


def test_the_help_of_a_command_is_one_line_without_a_full_stop() -> None:
    assert all(not c.help.endswith(".") and "\n" not in c.help for c in COMMANDS.values())


def test_the_version_is_printed() -> None:
    assert cpt("--version").out.startswith("cpt ")


def test_an_unknown_command_suggests_the_nearest() -> None:
    ended = cpt("pln", "recipe=demo")
    assert ended.code == 2 and not ended.out
    assert ended.err.startswith("error: unknown command `pln`\n\nhint: did you mean `plan`?\n")


def test_a_key_without_a_command_says_which_is_missing() -> None:
    assert "did you mean `cpt plan recipe=demo`?" in cpt("recipe=demo").err


@pytest.mark.parametrize("flag", ["--jsn", "-m", "--multirun", "--config-dir=x"])
def test_an_unknown_flag_is_refused(project: Path, flag: str) -> None:
    ended = cpt("plan", "recipe=two", flag)
    assert ended.code == 2 and ended.err.startswith("error: unknown flag")
    assert "`cpt plan --help` explains the command" in ended.err


def test_an_unknown_subcommand_suggests_the_nearest() -> None:
    assert "did you mean `show`?" in cpt("recipes", "shw").err


def test_flags_work_after_keys_too(project: Path) -> None:
    before, behind = cpt("plan", "--json", "recipe=two"), cpt("plan", "recipe=two", "--json")
    assert before.code == behind.code == 0 and before.out == behind.out
    assert set(json.loads(before.out)) == {"plan", "warnings", "estimates"}


def test_quiet_leaves_the_warnings_out(project: Path) -> None:
    lr = "stages.domain.lr={schedule: constant, peak: 1e-3}"
    assert "warning:" in cpt("plan", "recipe=two", lr).out
    assert "warning:" not in cpt("plan", "recipe=two", lr, "--quiet").out


def test_plot_draws_with_plain_characters(project: Path) -> None:
    drawn = cpt("plan", "recipe=two", "--plot").out.split("next ")[1]
    assert drawn.count("*") > 20 and "domain" in drawn and "anneal" in drawn


def test_a_plan_writes_nothing(project: Path) -> None:
    before = tree(project)
    assert cpt("plan", "recipe=two", "--plot").code == 0
    assert tree(project) == before


def test_debug_shows_the_traceback_of_an_error(project: Path) -> None:
    assert "Traceback" in cpt("plan", "recipe=nothing", "--debug").err
    assert "Traceback" not in cpt("plan", "recipe=nothing").err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a"), 2),
        (PlanError("a"), 2),
        (EnvironmentProblem("a"), 3),
        (StageFailed("a"), 1),
        (GuardStop("a"), 4),
        (StoppedAndSaved("a"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), 3),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), 2),
    ],
)
def test_each_kind_of_error_has_its_exit_code_and_one_line(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert failures.report(work) == code
    lines = capsys.readouterr().err.splitlines()
    word = {75: "note: ", 4: "warning: "}.get(code, "error: ")  # a stop that went as planned is no error
    assert len(lines) == 1 and lines[0].startswith(word)


def raiser(error: Exception) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def test_any_other_exception_is_our_fault_and_leaves_a_traceback_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert failures.report(raiser(ZeroDivisionError("oops"))) == 1
    said = capsys.readouterr().err
    (file,) = tmp_path.glob("cpt-traceback-*.txt")
    assert (
        said.startswith("error: unexpected ZeroDivisionError: oops\n") and f"`{file}`" in said and "report it" in said
    )
    assert "Traceback" not in said and "ZeroDivisionError: oops" in file.read_text()


def test_errors_that_belong_together_are_all_shown_each_with_its_hints() -> None:
    error = UsageError(
        "a", "do b", more=(PlanError("c"), PlanError("c"), UsageError("d", "do e", more=(UsageError("f"),)))
    )
    text = failures.error_text(error)
    assert text == "error: a\n\nhint: do b\n\nerror: c\nerror: d\n\nhint: do e\n\nerror: f\n"


def test_hostile_text_cannot_move_the_cursor_or_flood() -> None:
    text = failures.error_text(UsageError("a\x1b[2J\nerror: b\u202e" + "x" * 10_000))
    assert text.count("\n") == 1 and "\x1b" not in text and "\u202e" not in text and len(text) < 3000


def test_colour_only_in_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    failures.write_error(UsageError("a", "b"), screen)
    assert "\x1b[1;31merror:" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()
    failures.write_error(UsageError("a", "b"), screen)
    assert screen.getvalue() == "error: a\n\nhint: b\n"


def test_recipes_are_listed_with_one_line_each(project: Path) -> None:
    lines = cpt("recipes").out.splitlines()
    assert lines[0].startswith("two ") and "Two stages on two corpora" in lines[0]
    assert {line.split()[0] for line in lines} >= {"demo", "medical", "code", "language", "infinite"}
    assert json.loads(cpt("recipes", "--json").out)["two"]["about"] == "Two stages on two corpora"


def test_show_lists_every_key_with_value_unit_origin_and_help(project: Path) -> None:
    ended = cpt("recipes", "show", "two", "train.seed=7", "--json")
    rows = {row["key"]: row for row in json.loads(ended.out)}
    assert rows["train.seed"] | {"help": ""} == {
        "key": "train.seed",
        "value": "7",
        "unit": "",
        "origin": "command line",
        "help": "",
    }
    assert rows["train.seq_length"]["unit"] == "tokens" and rows["train.seq_length"]["origin"] == "two.yaml"
    assert rows["train.recompute"] | {"help": ""} == {
        "key": "train.recompute",
        "value": "none",
        "unit": "",
        "origin": "default",
        "help": "",
    }
    assert all(row["help"] for row in rows.values()), [k for k, row in rows.items() if not row["help"]]
    text = cpt("recipes", "show", "two", "--only", "stages.domain.lr").out
    assert "warmup" in text and "stages.anneal" not in text


def test_show_names_what_is_left_to_the_person(project: Path) -> None:
    ended = cpt("recipes", "show", "medical")
    assert ended.code == 0 and "(yours to give)" in ended.out


def test_a_new_recipe_inherits_and_can_be_planned(project: Path) -> None:
    ended = cpt("recipes", "new", "mine", "--from", "two")
    assert ended.code == 0 and ended.out == "recipes/mine.yaml\n"
    text = (project / "recipes" / "mine.yaml").read_text()
    assert "defaults: [two, _self_]" in text and text.startswith("# ")
    assert cpt("plan", "recipe=mine").code == 0
    assert cpt("diff", "two", "mine").out.startswith("no difference")
    again = cpt("recipes", "new", "mine", "--from", "two")
    assert again.code == 2 and "is there already" in again.err


def test_a_new_recipe_lists_what_is_still_to_give(project: Path) -> None:
    assert cpt("recipes", "new", "clinic", "--from", "medical").code == 0
    ended = cpt("plan", "recipe=clinic")
    assert ended.code == 2 and "leaves `base.checkpoint`" in ended.err
    assert (
        cpt(
            "plan", "recipe=clinic", "base=base", "sources.medical=data/law.jsonl", "sources.general=data/news.jsonl"
        ).code
        == 0
    )


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "a b", "x" * 99])
def test_a_new_recipe_must_have_a_plain_name(project: Path, name: str) -> None:
    before = tree(project)
    assert cpt("recipes", "new", name, "--from", "two").code == 2
    assert tree(project) == before


def test_diff_says_how_two_plans_differ(project: Path) -> None:
    ended = cpt("diff", "two", "two train.seed=3 stages.anneal.micro_batch_size=1")
    assert ended.code == 0
    assert "stages.domain.seed" in ended.out
    assert next(line for line in ended.out.splitlines() if "micro_batch_size" in line).endswith("same result")
    found = json.loads(cpt("diff", "two", "two train.seed=3", "--json").out)
    assert {d["key"] for d in found["differences"]} == {"stages.domain.seed", "stages.anneal.seed"}


def test_diff_takes_a_run_and_a_plan_file(project: Path) -> None:
    run = project / "runs" / "old"
    run.mkdir(parents=True)
    plan = json.loads(cpt("plan", "recipe=two", "name=old", "--json").out)["plan"]
    (run / "plan.json").write_text(json.dumps(plan))
    for name in ("old", "runs/old", "runs/old/plan.json"):
        assert cpt("diff", name, "two").out.startswith("no difference"), name
    (run / "plan.json").write_text("{}")
    assert cpt("diff", "runs/old/plan.json", "two").code == 2
    assert os.listdir(project / "runs") == ["old"]
