"""From a recipe to a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.base.errors import CptError
from cpt.base.records import from_json, to_json
from cpt.config import build
from cpt.plan.types import RunPlan
from tests.command import RECIPE, write_base, write_corpus, write_project

SHIPPED = {
    "demo": [],
    "medical": ["medical", "general"],
    "code": ["code", "text_about_code", "general"],
    "language": ["target", "first"],
    "infinite": ["first", "second", "third"],
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CPT_CACHE", raising=False)
    return write_project(tmp_path)


def plan(*overrides: str, recipe: str = "two") -> RunPlan:
    return build.plan(recipe, list(overrides))


def errors(*overrides: str, recipe: str = "two") -> list[str]:
    with pytest.raises(CptError) as caught:
        plan(*overrides, recipe=recipe)
    assert caught.value.exit_code == 2
    found, pending = [], [caught.value]
    while pending:
        one = pending.pop(0)
        found.append(one.message)
        pending += one.more
    return found


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_becomes_a_plan_that_survives_json(project: Path, recipe: str) -> None:
    given = [f"sources.{name}.paths=data/law.jsonl" for name in SHIPPED[recipe]]
    small = ["base=base", "train.parallel.tp=1"] if given else []
    made = plan(*given, *small, recipe=recipe)
    assert from_json(RunPlan, json.loads(json.dumps(to_json(made)))) == made
    assert all(stage.fingerprint for stage in made.stages.values())


@pytest.mark.parametrize("recipe", [name for name, sources in SHIPPED.items() if sources])
def test_a_recipe_with_unfilled_paths_says_so_once_with_the_overrides_to_give(project: Path, recipe: str) -> None:
    with pytest.raises(CptError) as caught:
        plan(recipe=recipe)
    keys = ["base.checkpoint", *(f"sources.{name}.paths" for name in SHIPPED[recipe])]
    assert not caught.value.more
    assert caught.value.message == f"the recipe `{recipe}` leaves {', '.join(f'`{k}`' for k in keys)} to you"
    assert all(f"{k}=" in caught.value.hints[0] for k in keys)


def test_tokens_become_steps_of_whole_batches(project: Path) -> None:
    train = plan("stages.domain.tokens=20k").stages["domain"].train
    assert train is not None
    assert (train.steps, train.tokens) == (39, 39 * 8 * 64)


def test_additive_replay_comes_on_top_of_the_tokens(project: Path) -> None:
    inside = plan("stages.anneal.replay={share: 50%, sources: [news]}").stages["anneal"].train
    on_top = plan("stages.anneal.replay={share: 50%, sources: [news], account: additive}").stages["anneal"].train
    assert inside is not None and on_top is not None and on_top.steps == 2 * inside.steps


def test_replay_of_a_stage_reads_its_mixture(project: Path) -> None:
    train = plan("stages.anneal.replay=10%").stages["anneal"].train
    assert train is not None and train.replay is not None
    assert train.replay.of == "domain" and train.replay.sources == pytest.approx({"law": 0.8, "news": 0.2})


def test_replay_of_the_base_must_name_sources_that_stand_for_it(project: Path) -> None:
    assert any("what `base` was trained on is not known" in e for e in errors("+stages.domain.replay=10%"))


def test_no_replay_is_one_override(project: Path) -> None:
    train = plan("stages.anneal.replay.share=0").stages["anneal"].train
    assert train is not None and train.replay is None


def test_shares_are_normalised_and_a_share_of_0_leaves_out(project: Path) -> None:
    train = plan("stages.domain.mixture={law: 3, news: 1}").stages["domain"].train
    assert train is not None and train.mixture == {"law": 0.75, "news": 0.25}
    train = plan("stages.domain.mixture.news=0").stages["domain"].train
    assert train is not None and train.mixture == {"law": 1.0}


def test_an_anneal_that_keeps_the_lr_starts_at_the_lr_that_its_parent_ended_on(project: Path) -> None:
    stages = plan().stages
    domain, anneal = stages["domain"].train, stages["anneal"].train
    assert domain is not None and anneal is not None
    assert anneal.lr.points[0] == pytest.approx(domain.lr.points[2])
    assert anneal.lr.points[2] == 0


def test_stages_are_ordered_by_what_they_start_from(project: Path) -> None:
    made = plan("stages.domain.from=first", "+stages.first={from: base, keep: [weights], tokens: 5k, "
                "mixture: {news: 1}, lr: {schedule: constant, peak: 1e-4, warmup: 10%}}")  # fmt: skip
    assert list(made.stages) == ["first", "domain", "anneal", "export"]


def test_a_fork_keeps_the_checkpoint_that_it_starts_from(project: Path) -> None:
    lr = "stages.domain.lr={schedule: wsd, peak: 1e-3, decay: 25%}"
    stages = plan(lr, "stages.anneal.from=domain@pre_anneal", "stages.anneal.lr={schedule: linear}").stages
    domain = stages["domain"].train
    assert domain is not None and stages["domain"].keep_steps == (domain.steps - 10,)
    assert plan("stages.anneal.from=domain@7").stages["domain"].keep_steps == (7,)


def test_a_stage_takes_defaults_from_train_and_overrides_any(project: Path) -> None:
    stages = plan("train.optimizer.clip=2", "+stages.anneal.optimizer.eps=1e-6", "+stages.anneal.seq_length=32").stages
    domain, anneal = stages["domain"].train, stages["anneal"].train
    assert domain is not None and anneal is not None
    assert (domain.optimizer.clip, domain.optimizer.eps, domain.seq_length) == (2, 1e-8, 64)
    assert (anneal.optimizer.clip, anneal.optimizer.eps, anneal.seq_length) == (2, 1e-6, 32)


def test_null_in_a_stage_takes_back_what_train_sets(project: Path) -> None:
    stages = plan("+train.evaluate.every=2k", "+stages.anneal.evaluate.every=null").stages
    domain, anneal = stages["domain"].train, stages["anneal"].train
    assert domain is not None and anneal is not None
    assert domain.evaluate.every_steps == 4 and anneal.evaluate.every_steps is None


def test_every_source_with_held_out_text_is_measured(project: Path) -> None:
    train = plan("sources.news.valid=0").stages["domain"].train
    assert train is not None and train.evaluate.sources == ("law",)


def test_the_name_is_recipe_and_id_unless_given(project: Path) -> None:
    made = plan()
    assert made.name == f"two-{made.id[:6]}"
    assert plan("name=mine").name == "mine" and plan("name=mine").id == made.id


def test_cache_and_runs_follow_the_environment_and_the_folder(project: Path) -> None:
    made = build.plan("two", [], environ={"CPT_CACHE": "/elsewhere/cache"})
    assert made.cache == "/elsewhere/cache" and made.runs == str(project / "runs")
    assert plan("cache=here").cache == str(project / "here")


def test_all_broken_rules_are_reported_together(project: Path) -> None:
    found = errors(
        "stages.domain.mixture={lwa: 1}",
        "stages.anneal.keep=[optimizer,lr]",
        "+stages.anneal.parallel={tp: 3}",
        "+stages.anneal.stop_if={source: nobody, loss_rises: 1%}",
    )
    assert len(found) == 4, found


def test_wrong_values_and_unknown_keys_are_reported_together(project: Path) -> None:
    found = errors("train.seq_length=many", "train.presicion=fp32", "stages.domain.tokens=-1", "checkpoint.evry=1B")
    assert len(found) == 4, found


def test_a_key_that_exists_only_elsewhere_is_answered_with_where(project: Path) -> None:
    with pytest.raises(CptError) as caught:
        plan("lr=3e-5")
    assert "`stages.<stage>.lr.peak`" in caught.value.hints[0]
    with pytest.raises(CptError) as caught:
        plan("tokens=1B")
    assert "`stages.<stage>.tokens`" in caught.value.hints[0]


def test_an_option_of_another_schedule_would_have_no_effect(project: Path) -> None:
    found = errors("stages.domain.lr={schedule: cosine, peak: 1e-3, decay: 10%}")
    assert "would have no effect" in found[0] and "`wsd`" in found[0]


def test_a_law_that_is_not_there_yet_is_refused_by_name(project: Path) -> None:
    assert any("${law:share}" in e for e in errors("stages.anneal.replay.share=${law:share}"))


def test_two_corpora_of_one_content_are_one_identity_whatever_the_folder(project: Path) -> None:
    import shutil

    (project / "copy").mkdir()
    shutil.copy2(project / "data" / "law.jsonl", project / "copy" / "law.jsonl")
    assert plan().sources["law"].identity == plan("sources.law.paths=copy/law.jsonl").sources["law"].identity


def test_the_base_is_known_by_content_not_by_its_folder(project: Path) -> None:
    import os
    import shutil

    shutil.copytree(project / "base", project / "same")
    os.utime(project / "same" / "model.safetensors", (1, 1))
    assert plan("base=same").base.identity == plan().base.identity
    write_base(project / "other", rms_norm_eps=1e-6)
    assert plan("base=other").base.identity != plan().base.identity


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": 16, "n_head": 2},
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ],
)
def test_a_base_that_can_only_be_converted_is_refused_in_the_plan(project: Path, config: dict[str, object]) -> None:
    write_base(project / "other", **config)
    with pytest.raises(CptError) as error:
        plan("base=other")
    assert f"models of the family `{config['model_type']}` cannot be trained here yet" in error.value.message
    assert "`cpt convert-ckpt`" in error.value.hints[0]


def test_model_is_compared_with_the_base(project: Path) -> None:
    assert "`model.num_layers` is `3`, but the base checkpoint has `4`" in errors("+model={num_layers: 3}")
    assert plan("+model={num_layers: 4}").id == plan().id


def test_pickled_weights_are_refused(project: Path) -> None:
    (project / "base" / "model.safetensors").rename(project / "base" / "pytorch_model.bin")
    assert "pickled" in errors()[0]


def test_a_source_without_files_and_a_broken_first_line_are_told_before_anything_starts(project: Path) -> None:
    assert "no file matches" in errors("sources.law.paths=data/*.txt")[0]
    (project / "data" / "law.jsonl").write_text('{"text": \n' * 9)
    assert any("law" in e for e in errors())


def test_an_empty_file_is_named_with_its_source(project: Path) -> None:
    (project / "data" / "law.jsonl").write_text("")
    assert errors()[0] == f"source `law`: `{project}/data/law.jsonl` is empty"
    (project / "data" / "second.jsonl").write_text("")
    assert errors("sources.law.paths=[data/law.jsonl,data/second.jsonl]")[0] == "source `law`: all 2 files are empty"


def test_an_empty_file_among_others_and_one_without_text_are_no_surprise(project: Path) -> None:
    (project / "data" / "a.jsonl").write_text("")
    assert plan("sources.law.paths=[data/a.jsonl,data/law.jsonl]").sources["law"].facts is not None
    for content in ("\n", '{"text": ""}\n', '{"text": " "}\n' * 3):
        (project / "data" / "law.jsonl").write_text(content)
        try:
            plan()
        except CptError as error:
            assert "law" in error.message


def prepare_data(made: RunPlan) -> list[str]:
    """Prepare what a plan reads; the notes that are told meanwhile."""
    from cpt.stages.prepare import prepare

    notes: list[str] = []
    prepare(made, lambda kind, **fields: notes.append(fields["text"]) if kind == "note" else None, workers=1)
    return notes


def test_a_source_of_one_document_is_trained_on_and_not_measured(project: Path) -> None:
    write_corpus(project / "data" / "law.jsonl", documents=1)
    assert any("`law` has 1 document" in note for note in prepare_data(plan()))
    made = plan()
    assert all(s.train is None or s.train.evaluate.sources == ("news",) for s in made.stages.values())
    assert any(w.startswith("`law` has 1 document: nothing of it is held out") for w in build.warnings(made))
    found = errors("+stages.domain.evaluate.sources=[law]", "+stages.look={kind: evaluate, from: base, sources: [law]}")
    wanted = "which has 1 document: no held-out documents to measure"
    assert found == [f"`stages.domain.evaluate.sources` has `law`, {wanted}",
                     f"`stages.look.sources` has `law`, {wanted}"]  # fmt: skip


def test_a_source_of_blank_documents_is_refused_before_a_run_folder_is_made(project: Path) -> None:
    law = project / "data" / "law.jsonl"
    law.write_text('{"text": " "}\n' * 5)
    assert "`law`, which has no tokens" in errors()[0]
    law.write_text('{"text": " "}\n{"text": ""}\n' * 40_000)  # too long to be looked at in full
    with pytest.raises(CptError, match="source `law` has no text to train on: 80,000 documents, all blank in column"):
        prepare_data(plan())


def write_tokenizer(path: Path, base: Path, shift: int, size: int) -> None:
    """The base's tokenizer with each letter's id moved on, and another number of tokens."""
    value = json.loads((base / "tokenizer.json").read_text())
    value["model"]["vocab"] = {"<|endoftext|>": 0} | {chr(31 + (i + shift) % 64): i for i in range(1, size)}
    path.write_text(json.dumps(value))


def test_a_tokenizer_of_another_size_whose_ids_mean_other_tokens_is_refused(project: Path) -> None:
    write_tokenizer(project / "other.json", project / "base", shift=7, size=32)
    assert errors("tokenizer=other.json") == [
        f"`{project}/other.json` has 32 tokens, the tokenizer of the base checkpoint 64: "
        "2% of the model's tokens have the same id in it"
    ]
    found = errors("tokenizer=other.json", "stages.domain.from=./base")
    assert any("the tokenizer of what stage `domain` starts from 64" in e for e in found)


def test_another_tokenizer_of_the_same_size_and_a_longer_one_are_warnings(project: Path) -> None:
    write_tokenizer(project / "other.json", project / "base", shift=7, size=64)
    warned = build.warnings(plan("tokenizer=other.json"))
    assert any("other.json` is not the tokenizer of the base checkpoint: 2% of" in w for w in warned)
    write_tokenizer(project / "other.json", project / "base", shift=0, size=60)
    assert any("94% of the model's tokens" in w for w in build.warnings(plan("tokenizer=other.json")))
    assert not any("tokenizer" in w for w in build.warnings(plan()))


def test_a_small_tokenizer_for_a_base_that_has_none_beside_it_is_a_warning(project: Path) -> None:
    write_tokenizer(project / "other.json", project / "base", shift=7, size=20)
    (project / "base" / "tokenizer.json").unlink()
    warned = build.warnings(plan("tokenizer=other.json"))
    assert any("the tokenizer has 20 tokens, the model's vocabulary 64 rows" in w for w in warned)


def test_a_plain_value_that_drops_written_options_is_told(project: Path) -> None:
    warned = build.warnings(plan("stages.anneal.lr=wsd"))
    kept = "`stages.anneal.lr.schedule=wsd` keeps it"
    assert f"`stages.anneal.lr=wsd` replaces all of `stages.anneal.lr`, `end: 0` too; {kept}" in warned
    assert not plan("stages.anneal.lr.schedule=wsd", "base=base").notes


def test_a_key_that_is_given_twice_is_told(project: Path) -> None:
    made = plan("train.seed=1", "launcher=local", "train.seed=2")
    assert made.notes == ("`train.seed` is given 2 times; the last one counts, `train.seed=2`",)
    assert made.id == plan("train.seed=2").id and made.notes[0] in build.warnings(made)


def test_a_warmup_of_one_step_is_named_as_such(project: Path) -> None:
    warned = build.warnings(plan("stages.domain.lr.warmup=1%"))
    assert any("highest lr, 1.0e-03: its `warmup` is only one step of 39" in w for w in warned)
    assert any("a `warmup` is usual" in w for w in build.warnings(plan("stages.domain.lr.warmup=0")))


@pytest.mark.parametrize("key", ["runs", "cache"])
@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", "data/law.jsonl", "data/law.jsonl/x"])
def test_a_folder_that_cannot_be_written_is_refused_by_its_key(project: Path, key: str, folder: str) -> None:
    assert errors(f"{key}={folder}")[0].startswith(f"cannot write the `{key}` folder `{(project / folder).resolve()}`")
    assert not (project / "runs").exists()


def test_a_scratch_run_needs_a_model_and_a_tokenizer(project: Path) -> None:
    found = errors("base=scratch", "stages.domain.keep=[]")
    assert any("tokenizer" in e for e in found), found
    found = errors("base=scratch", "stages.domain.keep=[]", "tokenizer=base")
    assert any("`model.family` is missing" in e for e in found), found
    made = plan("base=scratch", "stages.domain.keep=[]", "tokenizer=base", "model=llama-1m")
    assert made.model is not None and made.model.vocab_size == 64 and made.stages["domain"].parent is None


def test_an_evaluate_stage_takes_the_lengths_of_train(project: Path) -> None:
    stage = plan("+stages.look={kind: evaluate, from: domain, tokens: 1k}").stages["look"]
    assert stage.options["seq_length"] == 64 and stage.options["tokens"] == 1000
    assert list(stage.options["sources"]) == ["news", "law"]


def test_a_second_language_may_be_called_no_in_quotes(project: Path) -> None:
    write_corpus(project / "data" / "no.jsonl")
    text = RECIPE.replace("  law: {paths", '  "no": {paths: data/no.jsonl}\n  law: {paths')
    (project / "recipes" / "two.yaml").write_text(text)
    assert list(plan().sources) == ["news", "no", "law"]
