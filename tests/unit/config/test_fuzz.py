"""Five hundred mutated recipes and command lines: each ends as a plan or as clear errors, and nothing is written."""

from __future__ import annotations

import copy
import difflib
import random
import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.config.compose import shipped
from tests.command import RECIPE, Ended, cpt, tree, write_project

SEED = 20260729
COUNT = 500
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    3.7,
    1e308,
    float("nan"),
    float("inf"),
    10**40,
    "",
    " ",
    "abc",
    "10 bananas",
    "1e999",
    "-5B",
    "5%%",
    "150%",
    [],
    {},
    [[1]],
    [None],
    {"a": 1},
    {"a": {"b": [1, {"c": 2}]}},
    "???",
    "no/such/file.jsonl",
    "/dev/null",
    "/",
    "~",
]
HOSTILE = [
    "../../../etc/passwd",
    "$(touch owned)",
    "`touch owned`; rm -rf .",
    "\x1b[2J\x1b[31mred",
    "a\nerror: not ours",
    "a\tb\rc",
    "${oc.env:HOME}",
    "${hydra:runtime.cwd}",
    "${oc.create:{a: 1}}",
    "${train.seed}",
    "${nothing.here}",
    "${stages}",
    "${name}",
    "${",
    "${law:share}",
    "%s%s%n{0}{}",
    "{{7*7}}",
    "a" * 5000,
    "\u202egnp.exe",
    "日本語",
    "\ud800",
    "\x00",
    "!!python/object/apply:os.system ['touch owned']",
    "__class__.__mro__",
]
BOOLEANS = ["on", "off", "yes", "no", "true", "No", "ON", "y", "n", "null", "1", "1.5", "~"]
OVERRIDES = [
    "=",
    "==",
    "=1",
    "+",
    "~",
    "++",
    "+=",
    "~=1",
    "a",
    "a==b",
    "..=1",
    "stages..tokens=1",
    "stages.=1",
    ".stages=1",
    "stages=",
    "stages=null",
    "stages=[]",
    "stages={}",
    "stages=3",
    "stages.domain=3",
    "stages.domain=null",
    "stages.domain",
    "stages[domain].tokens=1",
    "x=[1",
    "x={a:",
    'x="a',
    "x=${",
    "x=${a",
    "x=[" * 3000,
    "{" * 200 + "=1",
    "sources={}",
    "sources=a",
    "~sources",
    "~stages",
    "~base",
    "~train",
    "train=null",
    "train=5",
    "recipe=a,b",
    "recipe=two,two",
    "recipe=[two]",
    "recipe={}",
    "recipe=",
    "+recipe=two",
    "~recipe",
    "recipe=tow",
    "recipe=/nonexistent.yaml",
    "recipe=../recipes",
    "recipe=base/config.json",
    "hydra.run.dir=owned",
    "hydra/launcher=joblib",
    "+hydra.searchpath=[/tmp]",
    "hydra=1",
    "a@b=1",
    "launcher@x=local",
    "launcher=slrm",
    "launcher=[local]",
    "launcher.nodes=3",
    "launcher={}",
    "model=llama-1m",
    "model=lama-1m",
    "train.seed=1,2",
    "train.seed=range(1,3)",
    "train.seed=choice(1,2)",
    "train.seed=glob(*)",
    "train.seed=int(3)",
    "stages.domain.mixture={}",
    "stages.domain.mixture={law: 0}",
    "stages.domain.mixture={law: -1}",
    "stages.domain.mixture={lwa: 1}",
    "stages.domain.mixture=[law,law]",
    "stages.domain.mixture=law",
    "stages.domain.mixture={true: 1}",
    "stages.domain.mixture={law: .inf}",
    "stages.domain.from=anneal",
    "stages.domain.from=domain",
    "stages.domain.from=base@5",
    "stages.anneal.from=domain@99999",
    "stages.anneal.from=domain@0",
    "stages.anneal.from=domain@pre_anneal",
    "stages.anneal.from=domain@@",
    "stages.anneal.from=/",
    "stages.anneal.from=.",
    "stages.anneal.from=data/",
    "stages.anneal.from=base/",
    "stages.export.from=export",
    "stages.export.to=onnx",
    "stages.export.to=[hf]",
    "stages.export.kind=trian",
    "stages.export.kind=train",
    "stages.domain.keep=[]",
    "stages.domain.keep=[weights,weights]",
    "stages.domain.keep=[optimizer]",
    "stages.domain.keep=all",
    "stages.domain.keep=null",
    "stages.domain.keep=[weights,lr]",
    "stages.domain.replay=50%",
    "stages.domain.replay=1",
    "stages.domain.replay={share: 2}",
    "stages.domain.replay={from: anneal, share: 0.1}",
    "stages.domain.replay={share: 0.1, sources: [nwes]}",
    "stages.domain.parallel={tp: 3}",
    "stages.domain.parallel={tp: 0}",
    "stages.domain.parallel={pp: 9}",
    "stages.domain.parallel={pp: 2, layers: [1, 2]}",
    "stages.domain.parallel={vp: 2}",
    "stages.domain.parallel={dp: 3}",
    "stages.domain.parallel={dp: 1000000}",
    "stages.domain.parallel={sequence_parallel: true}",
    "stages.domain.methods={ewc: {}}",
    "stages.domain.methods=[ewc]",
    "stages.domain.stop_if={source: law}",
    "stages.domain.stop_if={source: lwa, loss_rises: 3%}",
    "stages.domain.stop_if=law",
    "stages.domain.evaluate.sources=[lwa]",
    "stages.domain.tokens=1",
    "stages.domain.tokens=1e30",
    "stages.domain.lr=wds",
    "stages.domain.lr=3e-4",
    "stages.domain.lr={peak: 1e-3}",
    "stages.domain.lr={schedule: cosine}",
    "stages.domain.lr={schedule: cosine, peak: -1}",
    "stages.domain.lr={schedule: cosine, peak: nan}",
    "stages.domain.lr={schedule: wsd, peak: 1e-3, decay: 200%}",
    "stages.domain.lr={schedule: wsd, peak: 1e-3, warmup: 1e30}",
    "stages.domain.lr.counter=epoch",
    "stages.domain.lr.end=5",
    "stages.*.tokens=3",
    "stages.0.tokens=3",
    "+stages.more={from: domain}",
    "+stages.base={from: domain}",
    "+stages.a b=1",
    "+stages.domain={from: base}",
    "+sources.more=data/law.jsonl",
    "+sources.more={}",
    "sources.law.paths=data/*.parquet",
    "sources.law.paths=data/lwa.jsonl",
    "sources.law.paths=[]",
    "sources.law.paths=base/config.json",
    "sources.law.paths=base/model.safetensors",
    "sources.law.reader=fils",
    "sources.law.reader=icd10cm",
    "sources.law.text=body",
    "sources.law.valid=100%",
    "sources.law.valid_paths=data/nope.jsonl",
    "base=scratch",
    "base=bsae",
    "base=data",
    "base=data/law.jsonl",
    "base.format=native",
    "base.format=pt",
    "tokenizer=data/law.jsonl",
    "tokenizer=base/config.json",
    "tokenizer=nope",
    "tokenizer={train_on: [law], vocab_size: 300}",
    "tokenizer.vocab_size=10",
    "data.bos=true",
    "data.eos=maybe",
    "model={family: llama, num_layers: 9}",
    "checkpoint.retain.every=1k",
    "checkpoint.every=0",
    "train.anomalies.spike=rollback",
    "train.optimizer.betas=[0.9]",
    "train.optimizer.betas=[0.9,1.0]",
    "train.optimizer.lr=1e-3",
    "cache=/proc/nothing",
    "runs=/proc/nothing",
    "name=../up",
    "name=.hidden",
    "name=on",
    "tracking.wandb=off",
    "tracking.wandb=on",
    "tracking=online",
]  # fmt: skip

Case = tuple[str, str, list[str], str | None]  # what it is, recipe text, overrides, the name that must be suggested


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything below the root."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [p for key, below in items for p in leaves(below, (*path, key))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def typo(word: str, dice: random.Random) -> str:
    """One letter lost, doubled, swapped or changed."""
    i = dice.randrange(len(word))
    letter = dice.choice(string.ascii_lowercase)
    changed = dice.choice([word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + letter + word[i + 1 :]])
    return changed if changed != word else word + "z"


def dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def key_typo(dice: random.Random) -> Case:
    recipe = yaml.safe_load(RECIPE)
    keys = [p for p in leaves(recipe) if isinstance(p[-1], str) and len(p[-1]) >= 4 and not _is_name(p)]
    path = dice.choice(keys)
    parent = at(recipe, path[:-1])
    wrong = typo(path[-1], dice)
    if wrong in parent:
        wrong += "q"
    parent[wrong] = parent.pop(path[-1])
    near = difflib.SequenceMatcher(None, wrong, path[-1]).ratio() >= 0.75
    return "typo in a key", dump(recipe), [], path[-1] if near else None


def _is_name(path: tuple[Any, ...]) -> bool:
    """Names of sources and stages, which a person chooses, and the shares by name."""
    return (len(path) == 2 and path[0] in ("sources", "stages")) or "mixture" in path[:-1]


def odd_value(dice: random.Random) -> Case:
    recipe = yaml.safe_load(RECIPE)
    path = dice.choice(leaves(recipe))
    at(recipe, path[:-1])[path[-1]] = copy.deepcopy(dice.choice(ODD_VALUES))
    return f"odd value at {path}", dump(recipe), [], None


def hostile(dice: random.Random) -> Case:
    recipe = yaml.safe_load(RECIPE)
    path, text = dice.choice(leaves(recipe)), dice.choice([h for h in HOSTILE if h not in ("\ud800",)])
    parent = at(recipe, path[:-1])
    if dice.random() < 0.5 and isinstance(parent, dict):
        parent[text] = parent.pop(path[-1])
    else:
        parent[path[-1]] = text
    return f"hostile text at {path}", dump(recipe), [], None


def lost_key(dice: random.Random) -> Case:
    recipe = yaml.safe_load(RECIPE)
    path = dice.choice(leaves(recipe))
    del at(recipe, path[:-1])[path[-1]]
    return f"without {path}", dump(recipe), [], None


def boolean_name(dice: random.Random) -> Case:
    word = dice.choice(BOOLEANS)
    name = dice.choice(["domain:", "anneal:", "law:", "export:", "mixture:", "from:", "[news]", "weights", "rewarm"])
    text = RECIPE.replace(name, word + ":" if name.endswith(":") else f"[{word}]" if name[0] == "[" else word, 1)
    return f"{word} for {name}", text, [], None


def target(dice: random.Random) -> Case:
    recipe = yaml.safe_load(RECIPE)
    places = [p for p in leaves(recipe) if isinstance(at(recipe, p), dict)]
    at(recipe, dice.choice(places))["_target_"] = "os.system"
    return "_target_", dump(recipe), [], None


def broken_text(dice: random.Random) -> Case:
    i = dice.randrange(len(RECIPE))
    junk = dice.choice(
        ["\t", "{", "]", ":", "&a", "*a", "!x ", "%", "@", "\n- a\n", "'", '"', "\x07", "? ", "<<: ", "---\n"]
    )
    kind = dice.randrange(3)
    text = RECIPE[:i] + junk + RECIPE[i:] if kind == 0 else RECIPE[:i] if kind == 1 else RECIPE[:i] + RECIPE[i + 7 :]
    return "broken text", text, [], None


FILES = [
    "",
    "[]",
    "- a\n- b",
    "3",
    "null",
    "a: &x [*x]",
    "defaults: [nothing]",
    "defaults: 3",
    "defaults: [{a: b}]",
    "defaults: [two]",
    "defaults: ['']",
    "defaults: [{override hydra/launcher: joblib}]",
    "defaults: [/launcher: ${oc.env:HOME}]",
    "defaults: [/launcher: slrum]",
    "defaults: [demo, _self_]\nbase: base",
    "hydra: {run: {dir: owned}}",
    "a: " + "[" * 2000,
    "x: !!python/name:os.system",
    "stages: {a: {from: a}}",
    "? [a, b]\n: c",
    "1: 2",
]


def strange_file(dice: random.Random) -> Case:
    return "strange file", dice.choice(FILES), [], None


TYPED = [
    "stages.domain.tokens=4k",
    "train.seq_length=64",
    "stages.anneal.mixture={law: 1}",
    "train.optimizer.clip=2",
    "sources.news.valid=1%",
    "train.micro_batch_size=1",
    "checkpoint.retain.last=3",
    "stages.domain.lr.peak=1e-3",
    "stages.domain.lr.warmup=1%",
    "tracking.project=x",
    "train.parallel.tp=1",
    "data.mask_documents=true",
]


def key_override_typo(dice: random.Random) -> Case:
    key, _, value = dice.choice(TYPED).partition("=")
    parts = key.split(".")
    i = dice.randrange(len(parts))
    word = parts[i]
    parts[i] = typo(word, dice)
    near = len(word) >= 4 and difflib.SequenceMatcher(None, parts[i], word).ratio() >= 0.75
    return "typo in an override", RECIPE, [f"{'.'.join(parts)}={value}"], word if near else None


def strange_override(dice: random.Random) -> Case:
    texts = dice.sample(OVERRIDES, dice.choice([1, 1, 1, 2, 3]))
    return "strange overrides", RECIPE, texts, None


def hostile_override(dice: random.Random) -> Case:
    key = dice.choice(
        ["name", "stages.domain.from", "sources.law.paths", "train.seed", "+stages.x", "base", "cache", "x"]
    )
    return "hostile override", RECIPE, [f"{key}={dice.choice(HOSTILE)}"], None


MAKERS: list[Callable[[random.Random], Case]] = [
    key_typo,
    odd_value,
    odd_value,
    hostile,
    lost_key,
    boolean_name,
    target,
    broken_text,
    strange_file,
    key_override_typo,
    strange_override,
    strange_override,
    hostile_override,
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("fuzz"))


def complaint(case: Case, ended: Ended) -> str | None:
    """What is wrong with how a command ended; None when all is well."""
    what, _, _, near = case
    if ended.code not in (0, 2):
        return f"exit {ended.code}"
    for word in (
        "Traceback",
        "error: unexpected ",
        "omegaconf",
        "OmegaConf",
        "hydra._",
        "HydraException",
        "line 1, in ",
    ):
        if word in ended.err:
            return f"says {word!r}"
    if ended.code == 0:
        return None if ended.out.startswith("plan ") else "no plan"
    if ended.out:
        return "an error with output"
    lines = ended.err.splitlines()
    if not lines[0].startswith("error: ") or not all(re.match(r"(error|hint): .*[^.]$|$", line) for line in lines):
        return "lines that are no errors and no hints"
    if any(not c.isprintable() and c != "\n" for c in ended.err):
        return "control characters"
    if near is not None and not any(near in line for line in lines if line.startswith("hint:")):
        return f"`{near}` is not suggested"
    return "nothing is refused" if what == "_target_" and "_target_" not in ended.err else None


def test_500_mutated_recipes_and_overrides_end_as_a_plan_or_as_clear_errors(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("CPT_CACHE", raising=False)
    dice = random.Random(SEED)
    file = project / "recipes" / "two.yaml"
    plain = RECIPE
    bad, refused = [], 0
    for number in range(COUNT):
        case = MAKERS[number % len(MAKERS)](dice)
        file.write_text(case[1], encoding="utf-8", errors="surrogatepass")
        before = tree(project)
        ended = cpt("plan", "recipe=two", *case[2])
        after = tree(project)
        refused += ended.code == 2
        wrong = complaint(case, ended) or ("something was written" if before != after else None)
        if wrong:
            bad.append(
                f"#{number} {case[0]} {case[2]}: {wrong}\n{ended.err[:1500]}\n{case[1] if case[1] != plain else ''}"
            )
    assert not bad, f"{len(bad)} of {COUNT} (seed {SEED}):\n" + "\n----\n".join(bad[:20])
    assert refused > COUNT / 2  # the mutations are not harmless


@pytest.mark.parametrize("recipe", ["demo", "medical", "code", "language", "infinite"])
def test_a_typo_in_any_key_of_a_shipped_recipe_is_found(
    recipe: str, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    text = (shipped()[0] / f"{recipe}.yaml").read_text()
    keys = [m for m in re.finditer(r"^\s+(\w{5,}):", text, re.MULTILINE) if m[1] in KNOWN_KEYS]
    assert keys
    for match in keys:
        wrong = match[1][:2] + match[1][3:]
        (tmp_path / "recipes" / "wrong.yaml").write_text(text[: match.start(1)] + wrong + text[match.end(1) :])
        ended = cpt("plan", "recipe=wrong")
        assert ended.code == 2
        assert re.search(rf"[.`]{wrong}[.`]", ended.err), ended.err
        # A `${...}` that names the mistyped key is shown the other spelling; everything else the right one.
        hints = "".join(line for line in ended.err.splitlines() if line.startswith("hint"))
        assert match[1] in hints or wrong in hints, ended.err


KNOWN_KEYS = {
    "checkpoint",
    "paths",
    "seq_length",
    "global_batch_size",
    "micro_batch_size",
    "precision",
    "evaluate",
    "tokens",
    "mixture",
    "replay",
    "parallel",
    "stop_if",
}
