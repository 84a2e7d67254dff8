"""What `key=value` texts mean."""

from __future__ import annotations

from typing import Any

import pytest

from cpt.base.errors import UsageError
from cpt.config.overrides import apply, parse

RECIPE: dict[str, Any] = {
    "base": "scratch",
    "sources": {"pubmed": {"paths": "a.jsonl"}, "web": {"paths": "b.jsonl"}},
    "train": {"seed": 1, "optimizer": {"clip": 1.0, "eps": 1e-8}},
    "stages": {
        "domain": {
            "tokens": "10B",
            "mixture": {"pubmed": 0.7, "web": 0.3},
            "lr": {"schedule": "rewarm", "peak": 3e-5, "warmup": "1%"},
            "replay": {"share": 0.05, "sources": ["web"]},
        },
        "anneal": {"lr": "linear"},
    },
}


def after(*texts: str) -> dict[str, Any]:
    config = RECIPE
    for override in parse(texts).values:
        config = apply(config, override)
    return config


def refused(*texts: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        after(*texts)
    return caught.value


def test_a_value_is_set_and_the_recipe_stays_as_it_was() -> None:
    assert after("stages.domain.tokens=2B")["stages"]["domain"]["tokens"] == "2B"
    assert RECIPE["stages"]["domain"]["tokens"] == "10B"


def test_a_key_need_not_be_in_the_recipe() -> None:
    assert after("train.seq_length=64")["train"]["seq_length"] == 64


def test_a_mapping_for_a_mixture_replaces_the_sources() -> None:
    assert after("stages.domain.mixture={pubmed: 1}")["stages"]["domain"]["mixture"] == {"pubmed": 1}


def test_a_single_share_keeps_the_others() -> None:
    assert after("stages.domain.mixture.web=0.5")["stages"]["domain"]["mixture"] == {"pubmed": 0.7, "web": 0.5}


def test_a_mapping_for_lr_or_replay_replaces() -> None:
    stages = after("stages.domain.lr={schedule: cosine, peak: 1e-4}", "stages.domain.replay={share: 0.1}")["stages"]
    assert stages["domain"]["lr"] == {"schedule": "cosine", "peak": 1e-4}
    assert stages["domain"]["replay"] == {"share": 0.1}


def test_a_mapping_for_lr_replaces_inside_of_a_stage_too() -> None:
    domain = after("stages.domain={lr: {schedule: wsd}, tokens: 1B}")["stages"]["domain"]
    assert domain["lr"] == {"schedule": "wsd"} and domain["tokens"] == "1B" and "mixture" in domain


def test_another_mapping_is_merged() -> None:
    assert after("train.optimizer={clip: 2}")["train"]["optimizer"] == {"clip": 2, "eps": 1e-8}


def test_a_name_where_a_section_is_wanted_replaces_it() -> None:
    assert after("stages.domain.lr=wsd")["stages"]["domain"]["lr"] == "wsd"
    lr = after("stages.domain.lr=wsd", "stages.domain.lr.peak=1e-3")["stages"]["domain"]["lr"]
    assert lr == {"schedule": "wsd", "peak": 1e-3}


def test_a_key_below_a_plain_value_writes_it_out() -> None:
    assert after("base.format=hf")["base"] == {"checkpoint": "scratch", "format": "hf"}
    assert after("stages.anneal.lr.end=0")["stages"]["anneal"]["lr"] == {"schedule": "linear", "end": 0}


def test_plus_adds_and_tilde_takes_away() -> None:
    config = after("+stages.long={from: domain, tokens: 1B}", "~stages.anneal", "+sources.new.paths=c.jsonl")
    assert list(config["stages"]) == ["domain", "long"]
    assert config["sources"]["new"] == {"paths": "c.jsonl"}


def test_a_stage_that_is_not_there_is_suggested_or_added_with_plus() -> None:
    error = refused("stages.anneall.tokens=1B")
    assert error.message == "unknown stage `anneall`"
    assert error.hints == ("did you mean `anneal`?", "`+stages.anneall={...}` adds one")


def test_plus_for_what_is_there_and_tilde_for_what_is_not_are_refused() -> None:
    assert "is there already" in refused("+stages.domain={}").message
    assert "did you mean `~stages.anneal`?" in refused("~stages.aneal").hints


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=3e-5", 3e-5),
        ("a=10B", "10B"),
        ("a=true", True),
        ("a=on", "on"),
        ("a=null", None),
        ("a='1'", "1"),
        ("a=[x, y]", ["x", "y"]),
        ("a={x: 1, y: [2]}", {"x": 1, "y": [2]}),
        ("a=data/*.jsonl.zst", "data/*.jsonl.zst"),
        ("a=~/data/[ab].jsonl", "~/data/[ab].jsonl"),
        ("a=what is this!", "what is this!"),
        ("a=b=c", "b=c"),
        ("a=${law:share}", "${law:share}"),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse([text]).values[0].value == value


@pytest.mark.parametrize("text", ["train.seed=1,2", "train.seed=range(1,3)", "train.seed=choice(1,2)", "a=x,y!"])
def test_several_values_are_refused_without_a_flag_that_cpt_does_not_have(text: str) -> None:
    error = refused(text)
    assert "has several values, and a run takes one" in error.message
    assert not any("--" in hint for hint in error.hints)


def test_several_recipes_are_refused_with_how_to_start_them() -> None:
    error = refused("recipe=a,b")
    assert error.message == "one run takes one recipe, and 2 were given: `a`, `b`"
    assert error.hints == ("to start several, call `cpt run` once for each: `cpt run recipe=a` `cpt run recipe=b`",)
    assert refused("recipe=a", "recipe=b").message == error.message


@pytest.mark.parametrize("text", ["hydra.run.dir=x", "hydra/launcher=joblib", "+hydra.searchpath=[x]", "hydra=1"])
def test_settings_of_hydra_are_refused(text: str) -> None:
    assert "would have no effect" in refused(text).message


@pytest.mark.parametrize(
    "text", ["=1", "a..b=1", ".a=1", "a", "a b=1", "launcher@x=y", "a/b=c", "a=[1", "a={x", "a=", "~a=1"]
)
def test_texts_that_mean_nothing_are_refused(text: str) -> None:
    assert refused(text).exit_code == 2
