"""`cpt fit-law recipe=NAME` as far as its plan: what it runs, short keys, and recipes with no law or several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cpt.cli import proxy_grid
from cpt.config import build
from tests.command import cpt, tree, write_project
from tests.unit.config.test_laws import RECIPE


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_project(tmp_path, RECIPE))
    return tmp_path


def without_law(project: Path) -> None:
    path = project / "recipes" / "two.yaml"
    text = path.read_text().replace('"${law:mix.mixture}"', "{law: 1}").replace('"${law:mix.replay}"', "10%")
    path.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("  mix:")))


def test_only_the_law_and_what_it_needs_is_run(project: Path) -> None:
    before = tree(project)
    done = cpt("fit-law", "recipe=two", "--dry-run")
    assert done.code == 0
    assert "1 stage and 5 proxies" in done.out
    assert "4.8 % of the real run's compute" in done.out
    assert "next    `cpt fit-law recipe=two`" in done.out
    assert tree(project) == before
    whole = build.plan("two")
    pruned = proxy_grid.only(whole, "mix")
    assert [*pruned.stages] == [*whole.stages][:6]
    assert all(pruned.stages[n].fingerprint == whole.stages[n].fingerprint for n in pruned.stages)
    assert pruned.id != whole.id and pruned.name == f"two-{pruned.id[:6]}"


def test_what_the_law_starts_from_is_run_too(project: Path) -> None:
    path = project / "recipes" / "two.yaml"
    warm = (
        "  warm: {from: base, keep: [weights], tokens: 10k, mixture: {news: 1}, lr: {schedule: constant, peak: 1e-3}}\n"
    )
    path.write_text(path.read_text().replace("  domain:\n    from: base", f"{warm}  domain:\n    from: warm"))
    assert next(iter(proxy_grid.only(build.plan("two"), "mix").stages)) == "warm"


def test_keys_of_the_law_can_be_written_in_short(project: Path) -> None:
    done = cpt(
        "fit-law", "recipe=two", "tokens=24k", "ratios=[0,0.2,0.5,1]", "tolerance=2%", "lr.peak=5e-4", "--dry-run"
    )
    assert done.code == 0, done.err
    assert "mix: 4 proxies of 24.1K tokens" in done.out
    assert "law 0, 20, 50, 100 %" in done.out
    assert "at most 2.0 % above" in done.out
    wrong = cpt("fit-law", "recipe=two", "tokns=24k", "--dry-run")
    assert (wrong.code, "unknown key `tokns`" in wrong.err) == (2, True)


def test_keys_that_belong_elsewhere_say_where(project: Path) -> None:
    one = cpt("fit-law", "recipe=two", "ratio=[0,1]", "--dry-run")
    assert (one.code, "did you mean `ratios`?" in one.err) == (2, True)
    both = cpt("fit-law", "recipe=two", "data=runs.csv", "--dry-run")
    assert (both.code, "`recipe=` and `data=` exclude each other" in both.err) == (2, True)


def test_a_plan_of_proxies_of_a_few_steps_does_not_offer_to_run_them(project: Path) -> None:
    short = cpt("fit-law", "recipe=two", "tokens=3k", "every=512", "--dry-run")
    assert short.code == 0 and "next " not in short.out
    assert "no command is offered: proxies of 6 steps say little; `tokens=10.2K` makes them 20 steps" in short.err


def test_a_recipe_without_a_law_gets_one_for_its_first_stage_with_replay(project: Path) -> None:
    without_law(project)
    done = cpt("fit-law", "recipe=two", "stages.anneal.tokens=400k", "every=2k", "--dry-run")
    assert done.code == 0, done.err
    assert "mix: 5 proxies of 20.0K tokens" in done.out
    assert "dcpt for anneal" in done.out
    assert "note: the recipe has no law stage: one for `anneal` is planned" in done.err


def test_a_recipe_whose_stages_tell_no_domain_apart_says_what_to_give(project: Path) -> None:
    without_law(project)
    path = project / "recipes" / "two.yaml"
    path.write_text("".join(x for x in path.read_text().splitlines(keepends=True) if "replay:" not in x))
    done = cpt("fit-law", "recipe=two", "--dry-run")
    assert done.code == 2
    assert "no train stage of the recipe has both domain and general sources" in done.err
    given = cpt("fit-law", "recipe=two", "for=domain", "domain=[law]", "tokens=20k", "--dry-run")
    assert given.code == 0, given.err
    assert "law 0, 25, 50, 75, 100 %" in given.out


def test_of_several_laws_one_is_named(project: Path) -> None:
    second = "+stages.more={kind: law, for: anneal, domain: [law], tokens: 10k, every: 2k}"
    done = cpt("fit-law", "recipe=two", second, "--dry-run")
    assert (done.code, "`stage=mix` or `stage=more` names one" in done.err) == (2, True)
    named = cpt("fit-law", "recipe=two", second, "stage=more", "stages.mix.file=null", "--dry-run")
    assert named.code == 2 or "more: 5 proxies" in named.out


def test_help_and_plan_of_a_law_do_not_import_torch(project: Path) -> None:
    code = (
        "import sys\nfrom cpt.cli import main\n"
        "calls = ['fit-law', '--help'], ['fit-law', 'recipe=two', '--dry-run'], ['plan', 'recipe=two']\n"
        "codes = [main(call) for call in calls]\n"
        "heavy = {'torch', 'megatron'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if heavy or any(codes) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
