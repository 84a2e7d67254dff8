"""Plans, help and error texts kept as files, so that every change of a text is seen. `make golden` writes them anew."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from cpt.config import machine
from cpt.config.compose import shipped
from cpt.plan.budget import Devices
from tests.command import Ended, cpt, write_project

FOLDER = Path(__file__).parent / "texts"
GIVEN = {
    "medical": ("medical", "general"),
    "code": ("code", "text_about_code", "general"),
    "language": ("target", "first"),
    "infinite": ("first", "second", "third"),
}
GPUS = Devices(kind="gpu", flops_per_s=400e12, memory=80 * 10**9, basis="40% of the peak of a made GPU assumed")
CORES = Devices(kind="cpu", flops_per_s=20e9, memory=16 * 10**9, basis="20 GFLOP/s a core assumed", cores=2)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CPT_CACHE", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(machine, "devices", lambda *_: CORES)
    monkeypatch.setattr(machine, "measured", lambda plan: {})
    return write_project(tmp_path)


def same(name: str, text: str, project: Path) -> None:
    """Compare with the kept text; ids and folders differ between machines and are left out."""
    text = text.replace(str(project), "FOLDER").replace(str(shipped()[1]), "SHIPPED/conf")
    text = re.sub(r"id (≈?)[0-9a-f]{6}", r"id \1IDIDID", text)
    text = re.sub(r"(runs/[\w-]+)-[0-9a-f]{6}\b", r"\1-IDIDID", text)
    path = FOLDER / f"{name}.txt"
    if os.environ.get("CPT_GOLDEN") == "write":
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"`make golden` writes {path.name}"
    assert text == path.read_text(encoding="utf-8")


def shown(arguments: list[str], ended: Ended) -> str:
    return f"$ cpt {' '.join(arguments)}\n{ended.out}{ended.err}[exit {ended.code}]\n"


def test_help(project: Path) -> None:
    same("help", cpt("--help").out, project)


def test_plan_of_demo(project: Path) -> None:
    # How much text Python and its packages carry differs between versions.
    text = re.sub(r" *corpus +passes so far| *≈[\d.]+[KMB]? +≈[\d.]+", " ≈", cpt("plan", "recipe=demo", "--plot").out)
    same("plan_demo", text, project)


def test_plan_with_a_law(project: Path) -> None:
    text = cpt("plan", "recipe=demo-law", "--plot").out
    same("plan_demo-law", re.sub(r" *corpus +passes so far| *≈[\d.]+[KMB] +≈\d+\.\d\d", " ≈", text), project)


@pytest.mark.parametrize("recipe", GIVEN)
def test_plans_of_the_other_recipes(recipe: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "devices", lambda *_: GPUS)
    given = [f"sources.{name}=data/law.jsonl" for name in GIVEN[recipe]]
    same(f"plan_{recipe}", cpt("plan", f"recipe={recipe}", "base=base", *given, "--plot").out, project)


def test_plan_as_json(project: Path) -> None:
    value = json.loads(cpt("plan", "recipe=two", "--json").out)

    def skeleton(v: object) -> object:
        if isinstance(v, dict):
            return {k: skeleton(below) for k, below in v.items()}
        return [skeleton(v[0])] if isinstance(v, list) and v else type(v).__name__

    same("plan_json_keys", json.dumps(skeleton(value), indent=1) + "\n", project)


def test_every_key_of_a_recipe(project: Path) -> None:
    same("recipes_show", cpt("recipes", "show", "two", "stages.anneal.tokens=8k").out, project)


def test_a_new_recipe(project: Path) -> None:
    cpt("recipes", "new", "clinic", "--from", "medical")
    same("recipes_new", (project / "recipes" / "clinic.yaml").read_text(), project)


def test_diff(project: Path) -> None:
    ended = cpt("diff", "two", "two train.seed=3 'stages.domain.mixture={law: 1}' train.parallel.dp=4")
    assert ended.code == 0, ended.err
    same("diff", re.sub(r"[0-9a-f]{6}", "IDIDID", ended.out), project)


WRONG = [
    [],
    ["recipe=tow"],
    ["recipe=a,b"],
    ["recipe=medical"],
    ["recipe=two", "hydra.run.dir=x"],
    ["recipe=two", "lr=3e-5"],
    ["recipe=two", "stages.anneal.token=1B"],
    ["recipe=two", "stages.aneal.tokens=1B"],
    ["recipe=two", "stages.domain.tokens=lots"],
    ["recipe=two", "stages.domain.lr=cosin"],
    ["recipe=two", "stages.domain.lr={schedule: cosine, peak: 1e-3, decay: 10%}"],
    [
        "recipe=two",
        "stages.domain.mixture={lwa: 1}",
        "stages.anneal.keep=[optimizer,lr]",
        "+stages.anneal.parallel.tp=3",
    ],
    ["recipe=two", "~stages.domain.keep", "~train.seq_length"],
    ["recipe=two", "stages.domain.from=anneal"],
    ["recipe=two", "stages.anneal.from=domain@pre_anneal"],
    ["recipe=two", "sources.law=data/lwa.jsonl"],
    ["recipe=two", "base=bse"],
    ["recipe=two", "train.seed=1,2"],
    ["recipe=two", "name=${oc.env:HOME}"],
    ["recipe=two", "+stages.anneal.methods={x: {_target_: os.system}}"],
    ["recipe=two", "+stages.export.tokens=1B"],
    ["recipe=two", "launcher=pbs"],
    ["recipe=two", "launcher.devices=1", "+stages.domain.parallel={tp: 2}"],
]


def test_errors(project: Path) -> None:
    texts = [shown(["plan", *arguments], cpt("plan", *arguments)) for arguments in WRONG]
    (project / "recipes" / "no.yaml").write_text("base: scratch\nsources:\n  no: {paths: x}\n")
    texts.append(shown(["plan", "recipe=no"], cpt("plan", "recipe=no")))
    same("errors", "\n".join(texts), project)
