"""Law stages of a recipe: which proxies they become, which values later stages take, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.config import build
from cpt.config.law_grid import spread
from cpt.laws import table
from cpt.laws.again import asked_again
from cpt.laws.analyse import analyse
from cpt.laws.saved import SavedLaw
from cpt.laws.settings import Settings
from cpt.plan.budget import proxy_cost
from cpt.plan.types import RunPlan, StagePlan, Train
from cpt.report.plan_text import plan_text
from cpt.stages import law_values
from cpt.stages.law import LawStage
from cpt.stages.law_file import for_target
from tests.command import write_base, write_corpus, write_project
from tests.unit.laws import set_m

RECIPE = """\
# A law for the mixture of two corpora
base: {checkpoint: base}
sources:
  news: {paths: data/news.jsonl, valid: 10%}
  law: {paths: data/law.jsonl, valid: 10%}
train: {seq_length: 64, global_batch_size: 8, micro_batch_size: 2, precision: fp32}
stages:
  mix: {kind: law, tokens: 20k, every: 4k, domain: [law]}
  domain:
    from: base
    keep: [weights]
    tokens: 2M
    mixture: "${law:mix.mixture}"
    lr: {schedule: constant, peak: 1e-3, warmup: 10%}
  anneal:
    from: domain
    keep: [weights, optimizer, cursor, lr]
    tokens: 100k
    mixture: {law: 1}
    replay: {from: base, share: "${law:mix.replay}", sources: [news]}
    lr: {schedule: linear, end: 0}
"""
FITTED = {"ratio": 0.75, "replay": 0.25, "low": 0.6, "high": 0.8, "mixture": {"law": 0.75, "news": 0.25}}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a base, two corpora and the recipe `two`."""
    return write_project(tmp_path, RECIPE)


def plan(project: Path, *overrides: str, laws: Mapping[str, Path] | None = None) -> RunPlan:
    return build.plan(None, [f"recipe={project / 'recipes' / 'two.yaml'}", *overrides], cwd=project, laws=laws)


def refused(project: Path, *overrides: str) -> CptError:
    with pytest.raises(CptError) as caught:
        plan(project, *overrides)
    assert caught.value.exit_code == 2
    return caught.value


def proxies(found: RunPlan, law: str = "mix") -> dict[str, StagePlan]:
    return {n: s for n, s in found.stages.items() if s.group == law}


def train(found: RunPlan, stage: str) -> Train:
    one = found.stages[stage].train
    assert one is not None
    return one


def test_each_ratio_is_a_proxy_before_the_law_which_comes_before_the_stage_that_takes_its_mixture(
    project: Path,
) -> None:
    found = plan(project)
    assert list(found.stages) == ["mix-r0", "mix-r25", "mix-r50", "mix-r75", "mix-r100", "mix", "domain", "anneal"]
    assert [train(found, n).mixture for n in proxies(found)] == [
        {"news": 1.0},
        {"law": 0.25, "news": 0.75},
        {"law": 0.5, "news": 0.5},
        {"law": 0.75, "news": 0.25},
        {"law": 1.0},
    ]
    assert found.stages["mix"].after == tuple(proxies(found))


def test_proxies_have_equal_tokens_a_constant_lr_after_their_warmup_and_are_measured_on_the_way(project: Path) -> None:
    found = plan(project)
    for name, stage in proxies(found).items():
        one = train(found, name)
        assert (one.tokens, one.steps) == (39 * 512, 39)
        assert (one.lr.schedule, one.lr.points[1:]) == ("constant", (1e-3, 1e-3))
        assert one.lr.points[0] < 1e-3
        assert (one.evaluate.sources, one.evaluate.every_steps, one.evaluate.at_start) == (("law", "news"), 8, True)
        assert (stage.parent, stage.keep) == ("base", ("weights",))
        assert one.seed == train(found, "domain").seed
    options = found.stages["mix"].options
    assert options["warmup"] == 2 * 512
    assert (options["target_tokens"], options["target_decays"]) == (train(found, "domain").tokens, False)


def test_the_shares_inside_the_groups_are_those_of_the_target(project: Path) -> None:
    for name in ("books", "web"):
        write_corpus(project / "data" / f"{name}.jsonl", word=name.upper())
    three = [f"+sources.{n}={{paths: data/{n}.jsonl, valid: 10%}}" for n in ("books", "web")]
    target = ["~stages.mix.domain", "stages.domain.mixture={law: 3, books: 1}"]
    target += ["stages.domain.replay={from: base, share: '${law:mix.replay}', sources: {news: 1, web: 1}}"]
    found = plan(project, *three, *target)
    assert train(found, "mix-r50").mixture == {"law": 0.375, "books": 0.125, "news": 0.25, "web": 0.25}
    domain = train(found, "domain")
    assert domain.mixture == {"law": 0.75, "books": 0.25}
    assert domain.replay is not None and domain.replay.share == 0.5


def test_until_the_law_is_there_a_half_stands_in_and_the_stage_says_so(project: Path) -> None:
    found = plan(project)
    assert train(found, "domain").mixture == {"law": 0.5, "news": 0.5}
    assert found.stages["domain"].assumed and found.stages["anneal"].assumed
    assert found.stages["domain"].law == {"mixture": "mix.mixture"}
    assert found.stages["anneal"].law == {"replay.share": "mix.replay"}
    assert not any(s.assumed for s in proxies(found).values())


def test_a_law_that_is_there_fills_its_values_in_and_changes_no_id(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan(project)
    monkeypatch.setattr(law_values, "result", lambda folder: (FITTED, ""))
    after = plan(project, laws={"mix": project})
    assert (after.id, after.name) == (before.id, before.name)
    assert {n: s.fingerprint for n, s in after.stages.items()} == {n: s.fingerprint for n, s in before.stages.items()}
    assert train(after, "domain").mixture == {"law": 0.75, "news": 0.25}
    replay = train(after, "anneal").replay
    assert replay is not None and replay.share == 0.25
    assert not any(s.assumed for s in after.stages.values())


@pytest.mark.parametrize(("ratio", "mixture"), [(0.0, {"news": 1.0}), (1.0, {"law": 1.0})])
def test_a_ratio_at_the_edge_leaves_the_other_group_out(
    project: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, mixture: dict[str, float]
) -> None:
    edge = {**FITTED, "ratio": ratio, "replay": 1 - ratio}
    monkeypatch.setattr(law_values, "result", lambda folder: (edge, ""))
    if ratio == 0.0:
        with pytest.raises(PlanError, match=r"replay\.share` is 1"):
            plan(project, laws={"mix": project})
        monkeypatch.setattr(law_values, "result", lambda folder: (edge, ""))
        found = plan(project, "~stages.anneal", laws={"mix": project})
    else:
        found = plan(project, laws={"mix": project})
        assert train(found, "anneal").replay is None
    assert train(found, "domain").mixture == mixture
    assert found.id == plan(project, *(["~stages.anneal"] if ratio == 0.0 else [])).id


def test_a_law_that_must_not_be_used_leaves_the_plan_as_it_was(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(law_values, "result", lambda folder: ({}, "it loses to a line between two ratios"))
    found = plan(project, laws={"mix": project})
    assert found.stages["domain"].assumed


def test_the_id_depends_on_what_the_law_is_fitted_on(project: Path) -> None:
    ids = {
        plan(project, *o).stages["domain"].fingerprint
        for o in (
            (),
            ("stages.mix.tokens=24k",),
            ("stages.mix.every=2k",),
            ("stages.mix.ratios=[0, 0.2, 0.5, 1]",),
            ("stages.mix.tolerance=1%",),
            ("stages.mix.law=l1",),
            ("stages.mix.lr=2e-3",),
        )
    }
    assert len(ids) == 7
    assert plan(project, "stages.mix.max_cost=90%").id == plan(project).id


def test_proxies_that_stay_in_a_larger_grid_keep_their_fingerprints(project: Path) -> None:
    few, more = plan(project), plan(project, "stages.mix.ratios=[0, 0.125, 0.25, 0.5, 0.75, 1]")
    for name, stage in proxies(few).items():
        assert more.stages[name].fingerprint == stage.fingerprint


def test_a_share_of_one_source_can_be_taken(project: Path) -> None:
    mixture = "stages.domain.mixture={law: '${law:mix.ratio}', news: '${law:mix.mixture.news}'}"
    found = plan(project, mixture, "~stages.mix.domain")
    assert train(found, "domain").mixture == {"law": 0.5, "news": 0.5}
    assert found.stages["domain"].law == {"mixture.law": "mix.ratio", "mixture.news": "mix.mixture.news"}


WRONG = {
    "stages.domain.mixture='${law:mix.mixtur}'": ("unknown value of a law `mixtur`", "did you mean `mixture`?"),
    "stages.domain.mixture='${law:mixx.mixture}'": ("unknown law stage `mixx`", "did you mean `mix`?"),
    "stages.domain.mixture='${law:anneal.mixture}'": ("`anneal` is a stage of kind `train`, not a law", ""),
    "stages.domain.mixture='${law:mix.ratio}'": ("`${law:mix.ratio}` is not a mixture", "`mixture`"),
    "stages.anneal.replay.share='${law:mix.replai}'": ("unknown value of a law `replai`", "did you mean `replay`?"),
    "stages.anneal.replay.share='${law:mix.mixture}'": ("`${law:mix.mixture}` is not a share", "`replay`"),
    "stages.anneal.replay.share='${law:mix}'": ("names no law", "${law:STAGE.mixture}"),
    "stages.domain.tokens='${law:mix.tokens}'": ("a law gives no value here", "`replay.share`"),
    "stages.anneal.replay.account=additive": ("would depend on the law", "equal_compute"),
    "stages.mix.from=domain": ("wait for each other in a circle", "before the stage that takes its values"),
    "stages.anneal.from=mix": ("which leaves no weights", "${law:mix.mixture}"),
    "stages.mix.for=domian": ("unknown stage `domian`", "did you mean `domain`?"),
    "stages.mix.domain=[laws]": ("unknown source `laws`", "did you mean `law`?"),
    "~stages.mix.domain": ("`stages.mix.domain` is missing", "stages.mix.domain=["),
    "stages.mix.general=[law]": ("both in `domain` and in `general`", ""),
    "stages.mix.ratios=[0, 1]": ("2 mixtures: no law can be fitted to fewer than 3", ""),
    "stages.mix.ratios=[0, 0.5, 1]": ("needs at least 4", "stages.mix.law=mixing"),
    "stages.mix.every=20k": ("5 rows are too few for the law `dcpt`", "a smaller `stages.mix.every`"),
    "stages.mix.law=mixing": ("holds at one size and one token count", "`~stages.mix.every` measures at the end only"),
    "stages.mix.law=additive": ("needs the shares of all corpora", "law=auto"),
    "stages.mix.law=dcptt": ("unknown law `dcptt`", "did you mean `dcpt`?"),
    "stages.mix.how=merg": ("`merg` is not one of", "did you mean `merge`?"),
    "stages.mix.toknes=1k": ("unknown key `stages.mix.toknes`", "did you mean `stages.mix.tokens`?"),
    "~stages.mix.tokens": ("`stages.mix.tokens` is missing", "stages.mix.tokens=30M"),
    "stages.mix.tokens=100": ("less than one step", ""),
    "stages.mix.file=none.json": ("there is no file", ""),
    "stages.mix.keep=[weights]": ("would have no effect: the stage's kind is `law`", ""),
    "stages.mix.bases=[./none]": ("there is no folder `./none`", ""),
    "+stages.mix-r50={kind: convert, from: anneal}": ("which is the name of a proxy", ""),
}


@pytest.mark.parametrize("override", WRONG)
def test_what_cannot_be_is_refused_with_what_is_meant(project: Path, override: str) -> None:
    error = refused(project, override)
    message, hint = WRONG[override]
    assert message in error.message
    assert hint in " ".join(error.hints)
    assert not error.message.endswith(".")


REPLAYING = "stages.domain.replay={from: base, share: 30%, sources: [news]}"


def test_the_mixture_of_a_law_and_replay_of_its_sources_besides_are_refused_with_two_ways_out(project: Path) -> None:
    error = refused(project, REPLAYING)
    assert isinstance(error, PlanError)
    assert "takes its mixture from the law `mix`, which has `news` in it, and replays 30 % besides" in error.message
    hints = " ".join(error.hints)
    assert "`stages.domain.replay.share=0`" in hints
    plan(project, REPLAYING, "stages.domain.replay.share=0")
    ways = ["stages.domain.mixture={law: 1}", "stages.domain.replay.share='${law:mix.replay}'"]
    assert all(f"`{way}`" in hints for way in ways)
    found = plan(project, REPLAYING, *ways)
    assert found.stages["domain"].law == {"replay.share": "mix.replay"}
    for share in ("mixture={law: '${law:mix.ratio}', news: '${law:mix.replay}'}", "replay.share='${law:mix.replay}'"):
        assert "takes its mixture from the law `mix`" in refused(project, REPLAYING, f"stages.domain.{share}").message


def test_replay_of_a_source_that_the_law_does_not_weigh_is_left_alone(project: Path) -> None:
    write_corpus(project / "data" / "books.jsonl", word="BOOKS")
    books = ["+sources.books={paths: data/books.jsonl, valid: 10%}", "stages.mix.general=[news]"]
    found = plan(project, *books, "stages.domain.replay={from: base, share: 30%, sources: [books]}")
    assert found.stages["domain"].law == {"mixture": "mix.mixture"}
    text = plan_text(found, None, [])
    tagged = [line for line in text.splitlines() if "from law `mix`" in line]
    assert tagged and not any(" books " in line for line in tagged)
    assert any(" books " in line and "30.0 %" in line for line in text.splitlines())


def test_the_hint_for_a_missing_domain_does_not_name_the_other_side(project: Path) -> None:
    missing = refused(project, "~stages.mix.domain", REPLAYING)
    assert "`stages.mix.domain=[law]`" in missing.hints[0]
    assert "`stages.mix.domain=[...]`" in refused(project, "~stages.mix.domain").hints[0]


def test_proxies_that_cost_too_much_are_refused_with_how_to_get_under(project: Path) -> None:
    error = refused(project, "stages.mix.tokens=200k")
    cost = proxy_cost(plan(project, "stages.mix.tokens=200k", "stages.mix.max_cost=100%"), "mix")
    assert cost.count == 5 and cost.share is not None and 0.4 < cost.share < 0.6
    assert f"cost {cost.share:.0%} of the real run's compute" in error.message
    fits = error.hints[0].split("`")[1]
    assert fits.startswith("stages.mix.tokens=")
    cheaper = proxy_cost(plan(project, fits), "mix").share
    assert cheaper is not None and 0.3 < cheaper <= 0.35
    plan(project, "stages.mix.tokens=200k", error.hints[1].split("`")[1])


def test_the_cost_is_counted_as_six_times_parameters_times_tokens(project: Path) -> None:
    found = plan(project)
    assert found.model is not None
    cost = proxy_cost(found, "mix")
    assert cost.tokens == 5 * 39 * 512
    assert cost.flops == 6 * found.model.num_parameters * cost.tokens
    real = train(found, "domain").tokens + train(found, "anneal").tokens
    assert cost.share == pytest.approx(cost.tokens / real)


def test_a_proxy_of_another_size_has_its_own_model_and_cost(project: Path) -> None:
    write_base(project / "small", hidden_size=16, intermediate_size=32)
    found = plan(project, "stages.mix.bases=[./small]", "stages.mix.from=base")
    assert found.model is not None
    sizes: dict[int, list[str]] = {}
    for name, stage in proxies(found).items():
        model = found.model_of(stage)
        assert model is not None
        sizes.setdefault(model.hidden_size, []).append(name)
    ratios = [f"r{r}" for r in (0, 25, 50, 75, 100)]
    assert sizes[32] == [f"mix-{r}" for r in ratios]
    assert [n.split("-")[-1] for n in sizes[16]] == ratios
    assert len({n.split("-")[1] for n in sizes[16]}) == 1  # the size, in all names
    small = found.model_of(found.stages[sizes[16][0]])
    assert small is not None
    total = 5 * 39 * 512 * 6 * (small.num_parameters + found.model.num_parameters)
    assert proxy_cost(found, "mix").flops == total
    assert found.stages[sizes[16][0]].parent == str(project / "small")
    only = plan(project, "stages.mix.bases=[./small]")
    assert [found.stages[n].fingerprint for n in sizes[16]] == [s.fingerprint for s in proxies(only).values()]


def test_a_base_with_another_tokenizer_is_refused_for_proxies(project: Path) -> None:
    small = write_base(project / "small", hidden_size=16, intermediate_size=32)
    path = small / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = [w for w in tokenizer["model"]["vocab"] if w != "<|endoftext|>"]
    moved = {w: i for i, w in enumerate(reversed(words), 1)}
    tokenizer["model"]["vocab"] = {"<|endoftext|>": 0, **moved}
    path.write_text(json.dumps(tokenizer))
    error = refused(project, "stages.mix.bases=[./small]")
    assert "has another tokenizer than the run" in error.message


def test_only_proxies_may_start_from_another_shape(project: Path) -> None:
    write_base(project / "small", hidden_size=16, intermediate_size=32)
    error = refused(project, "stages.domain.from=./small", "stages.mix.from=base")
    assert "another shape than the base" in error.message


def test_merging_has_one_proxy_for_each_source_and_a_stage_that_measures_averages(project: Path) -> None:
    found = plan(project, "stages.mix.how=merge")
    assert list(proxies(found)) == ["mix-law", "mix-news", "mix-merged"]
    assert train(found, "mix-law").mixture == {"law": 1.0}
    merged = found.stages["mix-merged"]
    assert (merged.kind, merged.after) == ("merged", ("mix-law", "mix-news"))
    assert len(merged.options["mixtures"]) == 9
    assert found.stages["mix"].options["law"] == "mixing"
    assert found.stages["mix"].after == ("mix-law", "mix-news", "mix-merged")


def test_several_sources_are_spread_over_the_simplex_or_given(project: Path) -> None:
    write_corpus(project / "data" / "books.jsonl", word="BOOKS")
    three = ["+sources.books={paths: data/books.jsonl, valid: 10%}", "~stages.anneal", "~stages.mix.every"]
    found = plan(project, *three, "stages.mix.runs=8")
    assert len(proxies(found)) == 8
    assert train(found, "domain").mixture == pytest.approx({"law": 1 / 3, "news": 1 / 3, "books": 1 / 3})
    assert found.stages["mix"].options["law"] == "mixing"
    mixtures = ["{law: 1}", "{news: 1}", "{books: 2}", "{law: 1, news: 1, books: 2}"]
    mixtures += ["{law: 1, news: 1}", "{law: 1, books: 1}", "{news: 1, books: 1}"]
    given = plan(project, *three, f"stages.mix.mixtures=[{', '.join(mixtures)}]")
    assert [train(given, n).mixture for n in proxies(given)][2:5] == [
        {"books": 1.0},
        {"law": 0.25, "news": 0.25, "books": 0.5},
        {"law": 0.5, "news": 0.5},
    ]
    error = refused(project, *three, f"stages.mix.mixtures=[{', '.join(mixtures[:5])}]")
    assert "law `mixing` over 3 corpora needs 7 rows, found 5" in error.message
    error = refused(project, *three, "stages.mix.runs=8", "stages.domain.mixture={law: '${law:mix.ratio}', news: 1}")
    assert "unknown value of a law `ratio`" in error.message


def test_the_spread_has_corners_and_middle_first_and_is_the_same_every_time() -> None:
    found = spread(["a", "b", "c"], 16, seed=3)
    assert found == spread(["a", "b", "c"], 16, seed=3) != spread(["a", "b", "c"], 16, seed=4)
    assert found[:3] == [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}]
    assert all(math.isclose(sum(m.values()), 1) and min(m.values()) > 0 for m in found)
    distances = [
        sum((p.get(s, 0) - q.get(s, 0)) ** 2 for s in "abc") ** 0.5 for i, p in enumerate(found) for q in found[:i]
    ]
    assert min(distances) > 0.15


LONG = ("stages.domain.tokens=5B", "stages.mix.for=domain")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a law of three sizes, asked for 1.80B parameters and 10.0B tokens; in `any`, one without sizes."""
    folder = tmp_path_factory.mktemp("made")
    asked = Settings(
        tolerance=0.03, base_losses={"general": 2.296}, n_params=1.8e9, tokens=1e10, bootstrap=8, compare=False
    )
    SavedLaw.of(analyse(table.read(set_m.write(folder / "runs.csv")), "dcpt", asked)).save(folder / "law.json")
    rows = [line.replace(",1.8e+09,", ",") for line in set_m.lines() if ",1.8e+09," in line]
    runs = set_m.write(folder / "any.csv", rows, set_m.HEAD.replace("n_params,", ""))
    sizeless = dataclasses.replace(asked, n_params=None)
    (folder / "any").mkdir()
    SavedLaw.of(analyse(table.read(runs), "dcpt", sizeless)).save(folder / "any" / "law.json")
    return folder


def test_a_saved_law_is_used_at_once_and_asked_for_the_stage_that_it_is_for(project: Path, saved: Path) -> None:
    found = plan(project, f"stages.mix.file={saved / 'any'}", *LONG)
    assert list(found.stages) == ["mix", "domain", "anneal"]
    assert plan(project, f"stages.mix.file={saved / 'any' / 'law.json'}", *LONG).id == found.id
    before = SavedLaw.load(saved / "any")
    tokens = train(found, "domain").tokens
    values = asked_again(before, dataclasses.replace(before.settings, tokens=float(tokens))).values()
    assert values["tokens"] == tokens and values["ratio"] != before.values()["ratio"]
    assert train(found, "domain").mixture["law"] == pytest.approx(values["ratio"])
    line = next(line for line in plan_text(found, None, []).splitlines() if line.startswith("law  "))
    assert "any/law.json, asked for 5.00B tokens" in line and f"law {100 * values['ratio']:.1f} % (" in line
    more = plan(project, f"stages.mix.file={saved / 'any'}", *LONG, "stages.mix.tolerance=5%")
    assert train(more, "domain").mixture["law"] > train(found, "domain").mixture["law"]
    far = plan(project, f"stages.mix.file={saved / 'any'}", "stages.domain.tokens=100B", *LONG[1:])
    assert "law `mix`: the token count lies 5 times beyond" in " ".join(build.warnings(far))


def test_a_saved_law_is_asked_for_the_size_of_its_target(saved: Path) -> None:
    law = SavedLaw.load(saved)
    stage = LawStage(target="domain", target_params=4 * 10**9, target_tokens=10**10, tolerance=None)
    with pytest.raises(
        PlanError, match=r"the general loss before training is not known for a model of 4\.00B"
    ) as lacks:
        for_target(law, stage)
    assert "2.296, was given for a model of 1.80B parameters, and `domain` has 4.00B" in lacks.value.hints[0]
    assert "a row of 0 tokens" in lacks.value.hints[1]
    known = dataclasses.replace(law, table=law.table.with_base({"general": 2.2}, 4e9))
    values = for_target(known, stage).values()
    assert values["n_params"] == 4e9 and values["ratio"] != law.values()["ratio"]
    same = for_target(law, dataclasses.replace(stage, target_params=18 * 10**8))
    assert same.values() == law.values() and same.warnings == law.warnings


def test_a_saved_law_without_an_answer_for_the_target_is_refused(project: Path, saved: Path) -> None:
    error = refused(project, f"stages.mix.file={saved}")
    assert "`stages.mix.file`: the law cannot be asked for stage `domain`: the general loss before" in error.message
    assert "2.296, was given for a model of 1.80B parameters" in error.hints[0]


def test_a_saved_law_of_one_size_is_refused_for_another(project: Path, saved: Path) -> None:
    before = SavedLaw.load(saved)
    sizes = before.table.n_params
    assert sizes is not None
    one = table.read(saved / "runs.csv", f"n_params == {sizes.max():g}")
    asked = dataclasses.replace(before.settings, n_params=float(sizes.max()))
    SavedLaw.of(analyse(one, "dcpt", asked)).save(project / "one.json")
    error = refused(project, "stages.mix.file=one.json")
    assert "`stages.mix.file`: the law cannot be asked for stage `domain`: `n_params` is" in error.message
    assert "one model size says nothing about others" in error.message
    assert "it says domain 0." in " ".join(error.hints)


def test_a_saved_law_that_must_not_be_used_is_refused(project: Path, saved: Path) -> None:
    unfit = dataclasses.replace(SavedLaw.load(saved), unfit=("it loses to a line",))
    unfit.save(project / "law.json")
    error = refused(project, "stages.mix.file=law.json")
    assert "must not be used: it loses to a line" in error.message
    assert any("stages.domain.mixture={" in hint for hint in error.hints)


HEAD = "run,tokens,r_domain,loss_domain,loss_general"
BASE_ROW = "base,0,0,3.5,2.296"


def runs(folder: Path, rows: list[str], name: str = "runs.csv", head: str = HEAD) -> str:
    set_m.write(folder / name, rows, head)
    return f"stages.mix.data={name}"


def of_one_size(noise: float = 0.002) -> list[str]:
    return [BASE_ROW, *(line.replace(",1.8e+09,", ",") for line in set_m.lines(noise) if ",1.8e+09," in line)]


def test_a_table_is_known_by_its_content_not_its_place(project: Path) -> None:
    one = plan(project, runs(project, of_one_size()))
    shutil.copy(project / "runs.csv", project / "other.csv")
    assert plan(project, "stages.mix.data=other.csv").id == one.id
    assert plan(project, runs(project, of_one_size(0.004), "other.csv")).id != one.id
    assert not proxies(one)


def test_a_table_that_no_law_can_come_from_is_refused_in_the_plan(project: Path) -> None:
    whole = of_one_size()
    cases = {
        "runs.csv` has no rows": (runs, [], ()),
        "general loss before training is not known": (runs, whole[1:], ()),
        "are too few": (runs, [BASE_ROW, *(line for line in whole if "-0.2," in line or "-0.4," in line)], ()),
        "unknown law `dcptt`": (runs, whole, ("stages.mix.law=dcptt",)),
    }
    for message, (write, rows, more) in cases.items():
        error = refused(project, write(project, rows), *more)
        assert error.message.startswith("`stages.mix.data`: ") and message in error.message
    assert "no limit on the general loss" in plan_text(plan(project, "stages.mix.tolerance=null"), None, [])
    sized = [BASE_ROW.replace("base,", "base,1.8e9,"), *(line for line in set_m.lines() if ",1.8e+09," in line)]
    error = refused(project, runs(project, sized, head=set_m.HEAD))
    assert error.message.startswith("`stages.mix.data`: ") and not any("--force" in hint for hint in error.hints)
    three = ["1,0.2,0.3,0.5,3,3,3", "2,0.3,0.3,0.4,3.1,2.9,2", "3,0.1,0.3,0.6,3.2,2.8,2.5"]
    runs(project, three, head="run,w_a,w_b,w_c,loss_a,loss_b,loss_c")
    assert "is about `a`" in refused(project, "stages.mix.data=runs.csv").message
    assert "there is no file" in refused(project, "stages.mix.data=none.csv").message


def test_what_a_law_cannot_know_is_warned_of_before_its_proxies_run(project: Path) -> None:
    decaying = plan(project, "stages.domain.lr={schedule: rewarm, peak: 1e-3, warmup: 10%}")
    text = " ".join(build.warnings(decaying))
    assert "the lr of `domain` decays, and the proxies of `mix` hold theirs" in text
    assert "`domain` is 100 times as long as the proxies of `mix`: the law is extrapolated" in text
    assert decaying.stages["mix"].options["target_decays"] is True
    assert "decays" not in " ".join(build.warnings(plan(project)))
    assert "have 3 steps" in " ".join(build.warnings(plan(project, "stages.mix.tokens=1.5k", "stages.mix.every=512")))


def test_the_order_in_the_recipe_does_not_matter(project: Path) -> None:
    recipe = project / "recipes" / "two.yaml"
    before = plan(project)
    lines = RECIPE.splitlines(keepends=True)
    law = next(line for line in lines if line.startswith("  mix:"))
    lines.remove(law)
    recipe.write_text("".join([*lines, law]))
    after = plan(project)
    assert after.id == before.id
    assert list(after.stages).index("mix") < list(after.stages).index("domain")


def test_a_recipe_without_a_law_is_planned_as_before(project: Path) -> None:
    found = plan(project, "~stages.mix", "stages.domain.mixture={law: 1}", "~stages.anneal")
    stage = found.stages["domain"]
    assert (stage.group, stage.after, dict(stage.law), stage.assumed, stage.model) == (None, (), {}, False, None)


def test_options_survive_the_plan_file(project: Path) -> None:
    from cpt.base.records import from_json, to_json
    from cpt.stages.law import options_of

    found = plan(project)
    read: Any = from_json(RunPlan, json.loads(json.dumps(to_json(found))))
    assert read == from_json(RunPlan, to_json(found))
    options = options_of(read, "mix")
    assert options.ratios == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert dict(options.domain) == {"law": 1.0} and dict(options.general) == {"news": 1.0}
    assert dataclasses.replace(options, tolerance=None).eps_g is None


def test_a_law_goes_on_when_its_mixture_is_given_by_hand(project: Path) -> None:
    by_hand = ["~stages.anneal", "stages.domain.mixture={law: 0.7, news: 0.3}"]
    found = plan(project, *by_hand)
    assert found.stages["mix"].fingerprint == plan(project).stages["mix"].fingerprint
    assert train(found, "domain").mixture == {"law": 0.7, "news": 0.3}
    error = refused(project, "stages.domain.mixture={law: 1}", "stages.anneal.replay.share=10%")
    assert "`stages.mix.for` is missing: no stage takes a value of the law" in error.message
    assert "stages.mix.for=" in error.hints[0]


def test_both_limits_are_one_too_many(project: Path) -> None:
    with pytest.raises(UsageError, match="both `tolerance` and `eps_g`"):
        plan(project, "stages.mix.tolerance=3%", "stages.mix.eps_g=0.1")
