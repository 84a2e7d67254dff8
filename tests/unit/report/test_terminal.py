"""The same fields in the same order in a pipe and in a terminal; nothing that a stream does ends a run."""

import io
import re

import pytest

from cpt.base.events import stage_events
from cpt.report.terminal import fields, make_display, sentence
from cpt.stages.attempt import read_plan
from tests import made_run

FIELDS = ["step", "tokens", "loss", "lr", "tokens/s", "memory", "stage left", "run left"]


@pytest.fixture
def run(tmp_path):
    return made_run.make(tmp_path)


def play(run, display):
    for stage in read_plan(run).stages:
        for event in stage_events(run / "stages" / stage):
            display.event(stage, event)
    display.close()
    display.close()


def test_a_pipe_gets_one_line_every_so_many_steps_with_the_fields_in_one_order(run):
    stream = io.StringIO()
    play(run, make_display(read_plan(run), stream, False, every=25))
    lines = [line for line in stream.getvalue().splitlines() if re.match(r"\w+  step ", line)]
    assert len(lines) == 6 + 5 + 2
    for line in lines:
        assert (
            re.findall("|".join(re.escape(f) for f in sorted(FIELDS, reverse=True)), line.split("  ", 1)[1]) == FIELDS
        )
    assert "\x1b" not in stream.getvalue()
    assert lines[0].startswith("base  step 25/150  tokens 102K/614K  loss ")


def test_without_a_wish_a_short_stage_gives_about_twenty_lines(run):
    stream = io.StringIO()
    play(run, make_display(read_plan(run), stream, False))
    assert 18 <= sum(line.startswith("base  step ") for line in stream.getvalue().splitlines()) <= 24


def test_what_matters_has_a_line_of_its_own(run):
    stream = io.StringIO()
    play(run, make_display(read_plan(run), stream, False))
    text = stream.getvalue()
    assert "base  starts · 150 steps, 614K tokens · tp 1 × pp 1 × dp 2" in text
    assert "domain  goes on from step 60" in text
    assert "warning: domain: loss spike at step 31: 5.91 against a mean of 3.87" in text
    assert re.search(r"domain  evaluation at step 20: general 4\.155 \(\+0\.497\), medical", text)
    assert "anneal  done at step 50 after 90 s" in text


def test_quiet_leaves_only_warnings(run):
    stream = io.StringIO()
    play(run, make_display(read_plan(run), stream, False, quiet=True))
    assert stream.getvalue().splitlines() == ["warning: domain: loss spike at step 31: 5.91 against a mean of 3.87"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_block_with_the_same_fields(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    play(run, make_display(read_plan(run), stream, True))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = text[text.rindex("base") :]
    for field in FIELDS:
        assert field in last
    assert all(len(line) <= 100 for line in text.replace("\r", "\n").splitlines())


@pytest.mark.parametrize("columns", ["30", "60", "200"])
def test_a_small_terminal_is_never_overrun(run, monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    play(run, make_display(read_plan(run), stream, True))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert max(len(line) for line in text.replace("\r", "\n").splitlines()) <= int(columns)


def test_no_color_means_no_colour(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    play(run, make_display(read_plan(run), stream, True))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", stream.getvalue())


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(run, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    play(run, make_display(read_plan(run), stream, True))
    assert "\x1b" not in stream.getvalue() and "base  step 7/150" in stream.getvalue()


def test_escape_sequences_in_messages_do_not_reach_the_terminal(tmp_path):
    run = made_run.make(tmp_path, note="\x1b]0;owned\x07 [bold red]x[/] \r\nerror: fake")
    for terminal in (False, True):
        stream = Terminal() if terminal else io.StringIO()
        play(run, make_display(read_plan(run), stream, terminal))
        assert "\x1b]0;" not in stream.getvalue() and "\x07" not in stream.getvalue()
        assert "[bold red]x[/]" in stream.getvalue()
        assert "\nerror: fake" not in stream.getvalue()


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_that_went_away_does_not_end_the_run(run, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    play(run, make_display(read_plan(run), Broken(), terminal))


def test_an_event_of_unknown_shape_is_passed_over(run):
    display = make_display(read_plan(run), io.StringIO(), False)
    for event in ({}, {"kind": "step"}, {"kind": "eval", "losses": [1]}, {"kind": "step", "loss": None, "step": "x"}):
        display.event("base", event)
    display.event("nowhere", {"kind": "step", "step": 1})


def test_time_left_is_what_the_rest_takes_at_this_speed(run):
    from cpt.report.progress import Progress

    progress = Progress(read_plan(run))
    for event in stage_events(run / "stages" / "base"):
        now = progress.take("base", event)
        if event.get("kind") == "step" and event["step"] == 100:
            break
    assert now.seconds_left == pytest.approx(50 * 0.6, rel=0.01)
    assert progress.seconds_left == pytest.approx((50 + 120 + 50) * 0.6, rel=0.01)
    assert list(fields(now, progress)) == FIELDS


def test_an_evaluation_is_compared_with_the_parents_end_where_the_start_was_not_measured(tmp_path):
    from cpt.report.progress import Progress
    from cpt.report.runs import find_run
    from cpt.stages.attempt import read_plan

    progress = Progress(read_plan(find_run(str(made_run.make(tmp_path)))))
    progress.take("base", {"kind": "eval", "when": "end", "step": 150, "losses": {"general": {"loss": 3.0}}})
    now = progress.take("domain", {"kind": "eval", "when": "during", "step": 5, "losses": {"general": {"loss": 3.5}}})
    assert now.first_losses == {"general": 3.0} and now.losses == {"general": 3.5}


def said(stage, event):
    from pathlib import Path

    from cpt.report.progress import StageNow

    return sentence(stage, event, StageNow(plan=made_run.plan(Path("runs")).stages[stage]))


def test_a_guard_gives_before_now_and_limit_in_one_unit_and_in_percent():
    event = {"kind": "guard", "source": "general", "before": 4.0, "now": 5.0, "limit": 4.4, "step": 45}
    assert said("domain", event) == (
        "warning: domain at step 45: the validation loss of `general` rose from 4.000 to 5.000 nats/token (+25.0 %), "
        "above the limit of 4.400 (+10.0 %): `stop_if` ends the run"
    )
    assert "rose above its limit" in said("domain", {"kind": "guard", "source": "general", "before": None})


def test_a_short_time_is_not_zero_and_an_export_has_no_steps():
    assert said("base", {"kind": "save", "step": 20, "seconds": 0.04}) == "base  saved at step 20 in 0.1 s"
    assert said("base", {"kind": "stage_end", "step": 150, "seconds": 61.2}) == "base  done at step 150 after 61 s"
    assert said("export", {"kind": "save", "step": 0, "seconds": 1.26}) == "export  written in 1.3 s"
    assert said("export", {"kind": "stage_end", "step": 0, "seconds": 1.3}) == "export  done after 1.3 s"


def test_the_end_of_a_stage_is_said_once(run):
    from cpt.cli.run import Screen

    screen = Screen(quiet=False, every=None)
    stream = io.StringIO()
    screen.display = make_display(read_plan(run), stream, False)
    screen.tell({"kind": "stage_end", "stage": "base", "attempt": 1, "step": 150, "seconds": 90.0})
    screen.tell({"kind": "stage", "stage": "base", "status": "done", "reason": ""})
    screen.tell({"kind": "stage", "stage": "domain", "status": "done", "reason": ""})  # of an earlier command
    assert stream.getvalue().splitlines() == ["base  done at step 150 after 90 s", "domain  done"]


LAW = {
    "kind": "law",
    "law": "dcpt",
    "verdict": "fit",
    "reasons": [],
    "heldout": 0.0123,
    "values": {"ratio": 0.7063, "low": 0.69, "high": 0.72, "loss_general": 4.046, "loss_domain": 3.31},
}


def test_a_law_is_told_with_its_share_interval_and_predictions():
    assert sentence("mix", LAW, None) == (
        "mix  law dcpt · domain share 0.706 (95 %: 0.690 to 0.720) · predicted losses general 4.046, domain 3.310 · "
        "missed by 1.2 % on runs left out"
    )


def test_an_unfit_law_is_a_warning_that_says_why():
    unfit = {**LAW, "verdict": "unfit", "reasons": ["it loses to a line between its neighbours"]}
    assert sentence("mix", unfit, None) == (
        "warning: mix: the law `dcpt` is unfit: it loses to a line between its neighbours"
    )


def test_a_weight_average_is_told_by_its_mixture():
    event = {"kind": "eval", "step": 3, "mixture": {"web": 0.75, "pubmed": 0.25}, "losses": {"web": {"loss": 3.5}}}
    assert sentence("mix-merged", event, None) == "mix-merged  average of web 0.75, pubmed 0.25: web 3.500"
