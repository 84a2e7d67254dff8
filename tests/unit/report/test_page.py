"""One page that opens without network, whatever a run wrote into its events."""

import html.parser
import re

import pytest

from cpt.base.errors import UsageError
from cpt.base.files import read_json, write_json
from cpt.report import charts
from cpt.report.facts import report_json
from cpt.report.page import write_page
from cpt.report.table import final_table
from tests import made_run

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"


class Reader(html.parser.HTMLParser):
    """Collects tags, links and text; complains about tags that are left open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(run):
    return write_page(run).read_text(encoding="utf-8")


def test_the_page_has_everything_a_person_asks_for(tmp_path):
    text = " ".join(Reader(page(made_run.make(tmp_path))).text)
    for title in (
        "Gained and forgotten",
        "Validation loss by source",
        "Training loss by source",
        "Validation loss after each stage",
        "Stability gap",
        "Learning rate",
        "Throughput",
        "Mixture, asked and given",
        "Lineage",
        "Warnings, skips and stops",
    ):
        assert title in text, title
    assert "-2.908" in text and "forgetting" in text and "general (replay)" in text
    assert "5.0e-04 → 1.0e-03 → 5.0e-04" in text and "NaN in the gradient" in text


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    text = page(made_run.make(tmp_path))
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text
    assert len(text) < 200_000


def test_hostile_names_and_messages_are_only_text(tmp_path):
    run = made_run.make(tmp_path, names=(HOSTILE, "medical & 'co'"), note=HOSTILE)
    (run / "command.txt").write_text(f"cpt run name={HOSTILE}\n")
    plan = read_json(run / "plan.json")
    write_json(run / "plan.json", {**plan, "name": HOSTILE, "recipe": HOSTILE})
    state = read_json(run / "stages" / "anneal" / "state.json")
    write_json(run / "stages" / "anneal" / "state.json", {**state, "status": "failed", "reason": HOSTILE})
    text = page(run)
    read = Reader(text)
    assert not {"script", "img"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "".join(read.text).count("<script>alert(1)</script>") >= 6
    assert "{{ 7 * 7 }}" in "".join(read.text) and "49" not in read.text
    assert "\x1b" not in final_table(run)


@pytest.mark.parametrize("until", [("base", 0), ("base", 1), ("base", 30), ("domain", 45), ("anneal", 49)])
def test_an_unfinished_run_has_a_page(tmp_path, until):
    run = made_run.make(tmp_path, until=until)
    assert "Gained and forgotten" in page(run)
    assert final_table(run)
    assert report_json(run)["run"] == "demo-7c1e92"


def test_a_run_that_never_began_has_a_page(tmp_path):
    run = made_run.make(tmp_path, until=("base", 0))
    for events in run.rglob("events.jsonl"):
        events.unlink()
    assert "No losses have been recorded yet" in page(run)
    assert final_table(run) == "nothing to compare: nothing has been measured yet\n"


def test_damaged_events_are_passed_over(tmp_path):
    run = made_run.make(tmp_path)
    events = run / "stages" / "domain" / "attempt_2" / "events.jsonl"
    with open(events, "a") as file:
        file.write('[1]\n"x"\n{"kind":"step"}\n{"kind":"step","losses":3,"lr":"x","tokens":null}\n{"kind":"eval","lo')
    assert "-2.908" in page(run)


def test_the_page_is_made_again_from_events(tmp_path):
    run = made_run.make(tmp_path)
    first = page(run)
    (run / "report.html").unlink()
    assert page(run) == first


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a run folder"):
        write_page(tmp_path)


def test_the_table_says_what_was_gained_and_what_is_noise(tmp_path):
    lines = final_table(made_run.make(tmp_path)).splitlines()
    assert lines[0] == "validation loss after `anneal`, against the end of `base`"
    general, medical = (next(x for x in lines if x.startswith(n)) for n in ("general ", "medical "))
    assert re.split(r"\s{2,}", general) == ["general", "replayed", "3.612", "3.620", "+0.008", "+0.003", "within noise"]
    assert re.split(r"\s{2,}", medical)[-1] == "gained"
    units, head = lines[2:4]
    assert head.split() == ["source", "before", "after", "change", "change"]
    assert [part.strip("-") for part in units.split()] == ["", "nats/token", "", "bits/byte"]
    assert units.index("-") == head.index("before") and len(units) == len(head)
    assert max(map(len, lines)) <= 80


def test_a_long_line_is_thinned_and_keeps_its_extremes():
    points = [(float(i), 100.0 if i == 5003 else 1.0) for i in range(20_000)]
    mean, lowest, highest = charts.thin(points)
    assert len(mean) <= charts.MOST_POINTS and max(y for _, y in highest) == 100.0 and min(y for _, y in lowest) == 1.0


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (2.3, 5.2, [2, 3, 4, 5, 6]), (0, 3e-5, [0, 1e-5, 2e-5, 3e-5])],
)
def test_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert charts.nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-9])
def test_a_flat_line_still_has_an_axis(value):
    ticks = charts.nice_ticks(value, value)
    assert len(ticks) >= 2 and ticks[0] <= value <= ticks[-1]


def test_ticks_never_share_a_label():
    for low, high in [(0, 3e-4), (1.2, 1.21), (0, 6400), (0, 2e6), (2.4, 9.1)]:
        ticks = charts.nice_ticks(low, high)
        labels = [charts.tick_label(t, charts.tick_digits(ticks)) for t in ticks]
        assert len(set(labels)) == len(labels), labels


def test_a_line_goes_on_from_the_parents_end_where_a_stage_was_not_measured_at_its_start(tmp_path):
    from cpt.evaluate import measurements
    from cpt.report.history import read_run
    from cpt.report.page import _end_of_parent

    run = read_run(made_run.make(tmp_path))
    end = measurements(run.events["base"])[-1]
    assert _end_of_parent(run, "domain", "general") == [(0.0, end.losses["general"].loss)]
    assert _end_of_parent(run, "base", "general") == []


def test_sources_keep_the_colour_of_their_place_in_the_plan(tmp_path):
    from cpt.report.history import read_run
    from cpt.report.sections import Colours

    for until in (None, ("domain", 45)):
        run = read_run(made_run.make(tmp_path / str(until), names=("web", "medical"), until=until))
        colours = Colours(run)
        found = ["medical", "web (replay)", "other", "web"]
        assert colours.ordered(found) == ["web", "web (replay)", "medical", "other"]
        assert [colours.of(name) for name in found] == [1, 0, 2, 0]


def test_the_page_names_the_stage_that_its_guard_ended_and_what_it_saw(tmp_path):
    run = made_run.make(tmp_path, until=("domain", 45))
    state = read_json(run / "stages" / "domain" / "state.json")
    guard = {"source": "general", "loss_rises": 0.1}
    write_json(run / "stages" / "domain" / "state.json", {**state, "status": "failed", "guard": guard})
    event = {"kind": "guard", "source": "general", "before": 4.0, "now": 5.0, "limit": 4.4, "step": 45}
    made_run._append(run / "stages" / "domain" / "attempt_1" / "events.jsonl", [event])
    text = " ".join(Reader(page(run)).text)
    assert "1 of 4 stages done, domain was ended by its guard" in text
    assert "rose from 4.000 to 5.000 nats/token (+25.0 %), above the limit of 4.400 (+10.0 %)" in text
    assert "from the first event to the last" in text
    assert '<span class="badge failed">ended by its guard</span>' in page(run)
