"""What later stages take from a law: only when it is there and may be used, and without being a change of the plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.base.files import write_json
from cpt.plan.types import RunPlan
from cpt.stages import decide, law_values, parents, state
from cpt.stages.attempt import failure_error
from cpt.stages.state import State
from tests.unit.stages.plans import plan, stage, train

TAKEN = {"mixture": "mix.mixture"}


def looped(assumed: bool, fingerprint: str = "f3", share: float = 0.5) -> RunPlan:
    """A law on two proxies, and a stage that takes its mixture."""
    proxies = [stage(f"mix-r{r}", fingerprint=f"p{r}", group="mix") for r in (0, 100)]
    law = stage("mix", kind="law", fingerprint="f2", after=("mix-r0", "mix-r100"))
    mixed = train(mixture={"pubmed": share, "web": 1 - share})
    return plan(*proxies, law, stage("domain", fingerprint=fingerprint, law=TAKEN, assumed=assumed, train=mixed))


def test_a_law_starts_only_when_every_proxy_is_done(tmp_path: Path) -> None:
    found = looped(assumed=True)
    state.write(tmp_path / "stages" / "mix-r0", State(status=state.DONE))
    with pytest.raises(UsageError, match="stage `mix` reads the result of `mix-r100`, which is pending, not done"):
        parents.resolve(found, found.stages["mix"], tmp_path)
    state.write(tmp_path / "stages" / "mix-r100", State(status=state.DONE))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    based = dataclasses.replace(found, base=dataclasses.replace(found.base, path=str(tmp_path / "base")))
    assert parents.resolve(based, based.stages["mix"], tmp_path) == ("hf", tmp_path / "base")


def test_no_rank_ever_gets_a_value_that_only_stands_in(tmp_path: Path) -> None:
    found = looped(assumed=True)
    with pytest.raises(UsageError, match="takes a value from the law `mix`, which is not there yet"):
        parents.resolve(found, found.stages["domain"], tmp_path)


def test_a_law_stage_is_done_only_with_its_law(tmp_path: Path) -> None:
    law = looped(assumed=True).stages["mix"]
    missing = parents.missing_result(law, tmp_path)
    assert missing is not None and "law.json` is missing" in missing
    (tmp_path / "law.json").write_text("{}")
    assert parents.missing_result(law, tmp_path) is None


def test_what_a_law_gave_is_no_change_of_the_plan() -> None:
    before, after = looped(assumed=True), looped(assumed=False, share=0.7)
    assert decide.changes(before, after) == []
    assert decide.changes(before, after, "domain") == []
    other = looped(assumed=False, fingerprint="f4", share=0.7)
    assert decide.changes(before, other, "domain") == ["`mixture.pubmed` 0.5 → 0.7", "`mixture.web` 0.5 → 0.3"]


def test_a_law_that_must_not_be_used_is_refused_with_why_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = looped(assumed=True)
    monkeypatch.setattr(law_values, "result", lambda folder: ({}, "it loses to a line between two ratios"))
    error = law_values.refusal(found, found.stages["domain"], tmp_path)
    assert error.exit_code == 2
    assert error.message == (
        "stage `domain` takes `mixture` from the law `mix`, which must not be used: "
        "it loses to a line between two ratios"
    )
    assert "law.html" in error.hints[0]
    assert error.hints[1] == "`stages.domain.mixture={pubmed: ..., web: ...}` goes on by hand"


def test_what_a_law_decided_is_told_with_its_interval() -> None:
    found = looped(assumed=False)
    values = {"mixture": {"pubmed": 0.7, "web": 0.3}, "low": 0.65, "high": 0.78, "tokens": 10e9}
    text = law_values.taken(found, "mix", values)
    assert text.startswith("law `mix`: pubmed 70.0%, web 30.0% (95 % interval of the ratio 0.65 to 0.78)")
    assert text.endswith("at 10.0B tokens, for `domain`")


def test_a_law_that_failed_is_told_without_ranks_and_checkpoints(tmp_path: Path) -> None:
    failure = {"rank": 0, "step": None, "kind": "error", "error": "too few rows", "hints": ["more ratios"]}
    write_json(tmp_path / "failure.json", failure | {"exit_code": 2})
    error = failure_error(tmp_path, looped(assumed=False).stages["mix"], "cpt run recipe=two")
    assert (error.message, error.exit_code, error.hints[0]) == ("law `mix` failed: too few rows", 2, "more ratios")
    assert "`cpt run recipe=two` does it again" in error.hints
    assert not any(word in hint for word in ("rank", "checkpoint", "step") for hint in error.hints)
