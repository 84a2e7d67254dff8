"""Where recipes are found, what is refused in them, and where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.config import build
from cpt.config.compose import compose, recipe_names, shipped
from tests.command import write_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_project(tmp_path)


def write(project: Path, name: str, text: str) -> None:
    path = project / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def refused(*texts: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        compose(texts)
    return caught.value


def test_a_mistyped_recipe_key_is_answered_with_the_right_one() -> None:
    with pytest.raises(UsageError) as caught:
        compose(["recpe=medical"])
    assert caught.value.message == "unknown key `recpe`" and caught.value.hints == ("did you mean `recipe=medical`?",)
    with pytest.raises(UsageError, match="unknown key `recpe`") as caught:
        build.plan("demo", ["recpe=medical"])
    assert caught.value.hints[0] == "did you mean `recipe`?"


def test_shipped_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"demo", "medical", "code", "language", "infinite"} <= set(recipe_names())
    assert compose(["recipe=demo"]).file.parent == shipped()[0]


def test_own_recipes_come_before_shipped_ones(project: Path) -> None:
    write(project, "recipes/demo", "base: scratch\nname: mine\n")
    assert compose(["recipe=demo"]).config == {"base": "scratch", "name": "mine"}


def test_a_recipe_is_given_by_path_too(project: Path) -> None:
    write(project, "elsewhere/own", "defaults: [two, _self_]\nname: own\n")
    composed = compose(["recipe=elsewhere/own.yaml"])
    assert composed.recipe == "own" and composed.config["name"] == "own" and "stages" in composed.config


def test_own_config_groups_are_found_and_picked(project: Path) -> None:
    write(project, "conf/train/tiny", "seq_length: 8\n")
    assert compose(["recipe=two", "train=tiny"]).config["train"]["seq_length"] == 8


def test_a_registered_class_is_a_config_group_without_a_file(project: Path) -> None:
    write(project, "recipes/own", "defaults: [/launcher: local, /schedule@stages.a.lr: wsd, _self_]\nbase: scratch\n")
    config = compose(["recipe=own"]).config
    assert config["launcher"] == {"name": "local"} and config["stages"]["a"]["lr"] == {"schedule": "wsd"}


def test_an_inherited_mixture_shows_the_merged_sources(project: Path) -> None:
    write(project, "recipes/own", "defaults: [two, _self_]\nstages: {domain: {mixture: {more: 1}}}\n")
    assert compose(["recipe=own"]).config["stages"]["domain"]["mixture"] == {"law": 0.8, "news": 0.2, "more": 1}


def test_every_value_has_an_origin(project: Path) -> None:
    write(project, "recipes/own", "defaults: [two, _self_]\ntrain: {seed: 5}\n")
    composed = compose(["recipe=own", "train.seq_length=32"])
    assert composed.origin(("train", "seed")) == "own.yaml"
    assert composed.origin(("train", "precision")) == "two.yaml"
    assert composed.origin(("train", "seq_length")) == "command line"
    assert composed.origin(("train", "recompute")) == "default"
    assert composed.origin(("stages", "domain", "mixture")) == "two.yaml"


def test_other_keys_are_filled_in_and_laws_stay_text(project: Path) -> None:
    config = compose(["recipe=two", "stages.anneal.tokens=${stages.domain.tokens}", "train.seed=${law:seed}"]).config
    assert config["stages"]["anneal"]["tokens"] == "20k" and config["train"]["seed"] == "${law:seed}"


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${hydra:runtime.cwd}", "${ oc.decode:x }", "${oc.create:[1]}"])
def test_resolvers_of_others_are_refused(project: Path, text: str) -> None:
    assert "which is not allowed" in refused("recipe=two", f"name='{text}'").message


def test_a_target_is_refused_wherever_it_stands(project: Path) -> None:
    write(project, "recipes/own", "base: scratch\nstages: {a: {methods: {x: {_target_: os.system}}}}\n")
    assert refused("recipe=own").message.startswith("`stages.a.methods.x._target_` is refused")


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "Yes", "NO"])
def test_a_yaml_boolean_as_a_name_is_refused_with_the_hint_to_quote_it(project: Path, word: str) -> None:
    write(project, "recipes/own", f"base: scratch\nsources: {{{word}: {{paths: x}}}}\n")
    error = refused("recipe=own")
    assert "is not a text" in error.message and "in quotes" in error.hints[0]
    write(project, "recipes/own", f'base: scratch\nsources: {{"{word}": {{paths: x}}}}\n')
    assert list(compose(["recipe=own"]).config["sources"]) == [word]


def test_settings_of_hydra_in_a_recipe_are_refused(project: Path) -> None:
    for text in ("hydra: {run: {dir: x}}\n", "defaults: [override hydra/launcher: basic]\n"):
        write(project, "recipes/own", text)
        assert "would have no effect" in refused("recipe=own").message


def test_an_unknown_recipe_suggests_the_nearest(project: Path) -> None:
    assert "did you mean `medical`?" in refused("recipe=medcal").hints


def test_no_recipe_says_so(project: Path) -> None:
    assert refused().message == refused("train.seed=1").message == "no recipe was given"


def test_broken_yaml_names_file_and_line(project: Path) -> None:
    write(project, "recipes/own", "base: scratch\nstages: {a: [}\n")
    assert refused("recipe=own").message.startswith("`own.yaml` is not valid YAML at line 2")


def test_all_wrong_overrides_are_reported_together(project: Path) -> None:
    error = refused("recipe=two", "hydra.x=1", "train.seed=1,2", "nonsense")
    assert len([error, *error.more]) == 3


def test_composing_writes_nothing(project: Path) -> None:
    before = sorted(p for p in project.rglob("*"))
    compose(["recipe=demo"])
    assert sorted(p for p in project.rglob("*")) == before
