"""`cpt ckpt` and `cpt sample` through the real entry point."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cpt.base.files import write_json
from cpt.checkpoint import store
from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import Optimizer, Saving
from tests.dist.ranks import run_ranks
from tests.made_checkpoints import content, write
from tests.shared import shared_data


def cpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def a_model(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=2,
        num_query_groups=1,
        head_dim=8,
        vocab_size=vocab_size,
        max_position_embeddings=12,
        norm_eps=1e-5,
        init_std=1.0,
    )


def save_steps(root: str, vocab_size: int, tokenizer_hash: str) -> None:
    from cpt.checkpoint.manifest import Origin
    from cpt.checkpoint.store import StageStore
    from cpt.engine import megatron
    from cpt.engine.ports import Progress

    engine = megatron.build(a_model(vocab_size), Parallel(dp=2), precision="fp32", optimizer=Optimizer(), seed=3)
    origin = Origin(stage="domain", tokenizer_hash=tokenizer_hash, plan_id="abcdef12", fingerprint="123456")
    keeper = StageStore(Path(root) / "stages" / "domain", Saving(), origin=origin)
    for step in (5, 10):
        keeper.save(engine, Progress(step=step, tokens=step * 1000, lr={"last": 3e-5}), phase="train")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints and a small tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from cpt.data.tokenizer import tokenizer_hash

    root = tmp_path_factory.mktemp("runs") / "demo-123456"
    (root / "tokenizer").mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, über die Straße 你好"] * 5, trainer)
    file = root / "tokenizer" / "tokenizer.json"
    tokenizer.save(str(file))
    run_ranks(Parallel(dp=2), save_steps, str(root), tokenizer.get_vocab_size(), tokenizer_hash(file))
    write_json(root / "prepared.json", {"tokenizer": str(file)})
    write_json(root / "plan.json", {"stages": {"domain": {}}, "data": {"bos": False}})
    return root


def test_list_shows_which_checkpoints_are_whole(run: Path) -> None:
    half = run / "stages" / "domain" / "checkpoints" / "iter_0000015"
    half.mkdir()
    try:
        done = cpt("ckpt", "list", str(run))
        assert done.returncode == 0 and done.stderr == ""
        lines = done.stdout.splitlines()
        assert len(lines) == 4 and "tp 1 × pp 1 × dp 2" in lines[1] and "5,000" in lines[1]
        assert "not whole" in lines[3] and "its save never finished" in lines[3]
        rows = json.loads(cpt("ckpt", "list", str(run), "--json").stdout)
        assert [(r["step"], r["whole"]) for r in rows] == [(5, True), (10, True), (15, False)]
    finally:
        half.rmdir()


def test_show_says_what_a_checkpoint_is(run: Path) -> None:
    done = cpt("ckpt", "show", str(run))
    assert done.returncode == 0
    for words in ("domain, step 10, 10.0K tokens, train", "Adam, 0 updates", "lr         3e-05", "abcdef", "torch "):
        assert words in done.stdout
    assert json.loads(cpt("ckpt", "show", str(run), "--json").stdout)["step"] == 10


def test_verify_finds_one_wrong_byte(run: Path) -> None:
    folder = run / "stages" / "domain" / "checkpoints" / store.folder_name(10)
    done = cpt("ckpt", "verify", str(run))
    assert done.returncode == 0 and done.stdout.startswith(f"{folder}: good (torch_dist: structure, ")
    assert "main weights against model weights of 2" in done.stdout
    shard = folder / "__1_0.distcp"
    good = shard.read_bytes()
    try:
        shard.write_bytes(good[:3000] + bytes([good[3000] ^ 1]) + good[3001:])
        done = cpt("ckpt", "verify", str(folder))
        assert done.returncode == 1 and "`__1_0.distcp` has other bytes than were written" in done.stdout
        shard.write_bytes(good[:-1])
        done = cpt("ckpt", "verify", str(folder), "--json")
        assert done.returncode == 1 and not json.loads(done.stdout)["good"]
        assert cpt("ckpt", "show", str(folder)).returncode == 2
    finally:
        shard.write_bytes(good)


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training state as each format that is written, and the weights of another."""
    root = tmp_path_factory.mktemp("formats")
    made = content(root / "made")
    found = {name: write(made, name, root / name) for name in ("hf", "atom", "torch_dist", "megatron")}
    found["other"] = write(content(root / "made2", seed=5, optimizer=False), "hf", root / "other")
    return found


@pytest.mark.parametrize("name", ["hf", "atom", "torch_dist", "megatron"])
def test_every_format_is_shown_and_verified(formats: dict[str, Path], name: str) -> None:
    done = cpt("ckpt", "show", str(formats[name]))
    assert done.returncode == 0 and "llama, 8,176 parameters, 3 layers of 16, vocabulary 45" in done.stdout
    assert ("Adam, 7 updates" in done.stdout) == (name != "hf")
    shown = json.loads(cpt("ckpt", "show", str(formats[name]), "--json").stdout)
    assert shown["model"]["head_dim"] == 6
    if name == "torch_dist":  # ours has a manifest that says more
        assert shown["kind"] == name and shown["optimizer"]["step"] == 7
    else:
        assert shown["kind"] == name and shown["dtypes"] == {"bfloat16": 30} and "30: 30 bfloat16" in done.stdout
    done = cpt("ckpt", "verify", str(formats[name]), "--json", "--workers", "2")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["good"] and report["kind"] == name and not report["wrong"]
    assert bool(report["not_seen"]) == (name == "hf")


@pytest.mark.parametrize("name", ["atom", "torch_dist", "megatron"])
def test_one_training_state_is_equal_in_all_formats(formats: dict[str, Path], name: str) -> None:
    other = {"atom": "torch_dist", "torch_dist": "megatron", "megatron": "atom"}[name]
    done = cpt("ckpt", "diff", str(formats[name]), str(formats[other]), "--json")
    found = json.loads(done.stdout)
    assert not found["tensors"] and found["compared"] == 4 * 30 + 4 * 2, found
    done = cpt("ckpt", "diff", str(formats["hf"]), str(formats[name]), "--weights")
    assert done.returncode == 0 and done.stdout == f"equal: 30 weights of hf and {name}\n", done.stdout


def test_a_difference_is_told_with_index_and_values(formats: dict[str, Path]) -> None:
    done = cpt("ckpt", "diff", str(formats["hf"]), str(formats["other"]), "--weights")
    assert done.returncode == 1 and done.stdout.startswith("30 of 30 weights differ\n")
    assert "`model.embed_tokens.weight` model: 720 of 720 values differ, first at [0, 0]: " in done.stdout
    assert len(done.stdout.splitlines()) == 12 and "  and 20 more tensors and states; `--json` names all" in done.stdout
    done = cpt("ckpt", "diff", str(formats["hf"]), str(formats["atom"]))
    assert done.returncode == 1 and "only in" in done.stdout and "exp_avg of `model.embed_tokens.weight`" in done.stdout
    assert "equal values in all 30 tensors and states that both have" in done.stdout
    assert "`--weights` compares the model and its weights only" in done.stderr


def test_folders_of_steps_of_every_format_are_listed(formats: dict[str, Path], tmp_path: Path) -> None:
    for name in ("torch_dist", "megatron"):
        for step in (3, 10):
            shutil.copytree(formats[name], tmp_path / name / f"iter_{step:07d}")
            (tmp_path / name / f"iter_{step:07d}" / "manifest.json").unlink(missing_ok=True)  # as Megatron leaves it
        shutil.copytree(formats[name], tmp_path / name / "release")
    (tmp_path / "torch_dist" / "release" / "manifest.json").unlink()
    (tmp_path / "torch_dist" / "iter_0000010" / "metadata.json").unlink()
    for name, whole in (("torch_dist", [True, False, True]), ("megatron", [True] * 3)):
        rows = json.loads(cpt("ckpt", "list", str(tmp_path / name), "--json").stdout)
        assert [(r["kind"], r["step"], r["whole"]) for r in rows] == [
            (name, step, good) for step, good in zip((3, 10, None), whole, strict=True)
        ]
    done = cpt("ckpt", "list", str(tmp_path / "torch_dist"))
    assert "not whole" in done.stdout.splitlines()[2] and "its save never finished" in done.stdout
    for name in ("hf", "atom"):
        (row,) = json.loads(cpt("ckpt", "list", str(formats[name]), "--json").stdout)
        assert (row["kind"], row["whole"], row["bytes"] > 10_000) == (name, True, True)
        assert row["step"] == (7 if name == "atom" else None)


def test_what_is_wrong_with_a_checkpoint_is_1_and_what_is_none_is_2(formats: dict[str, Path], tmp_path: Path) -> None:
    for name in ("torch_dist", "atom"):
        shutil.copytree(formats[name], tmp_path / name)
    (tmp_path / "torch_dist" / "__0_0.distcp").unlink()
    (tmp_path / "atom" / "atom.json").unlink()
    for name, words in (("torch_dist", "`__0_0.distcp` is missing"), ("atom", "`atom.json` is missing")):
        done = cpt("ckpt", "verify", str(tmp_path / name))
        assert done.returncode == 1 and words in done.stdout and done.stderr == "", done
    done = cpt("ckpt", "verify", str(tmp_path / "atom"), "--json")
    assert done.returncode == 1 and not json.loads(done.stdout)["good"]
    assert cpt("ckpt", "verify", str(tmp_path)).returncode == 2
    assert cpt("ckpt", "verify", "").returncode == 2


def test_a_config_says_what_a_checkpoint_does_not(formats: dict[str, Path], tmp_path: Path) -> None:
    golden = shared_data("ckpt", "mcore-goldens", "td_nodistopt_tp2", "iter_0000007")
    done = cpt("ckpt", "show", str(golden), "--config", str(formats["hf"]))
    assert done.returncode == 2 and "Traceback" not in done.stderr, "another model"
    for words in (("verify",), ("diff", str(formats["hf"])), ("average", "--out", str(tmp_path / "out"))):
        done = cpt("ckpt", words[0], str(formats["hf"]), *words[1:], "--config", str(formats["hf"]))
        assert done.returncode == 0, done.stderr


def test_an_average_of_two_formats_is_written_whole(formats: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "ckpt",
        "average",
        str(formats["torch_dist"]),
        str(formats["other"]),
        "--weights",
        "1,0",
        "--out",
        str(out),
    )
    done = cpt(*words, "--to", "hf")
    assert done.returncode == 0 and done.stdout.startswith(f"average  1 of {formats['torch_dist']}, 0 of "), done.stderr
    assert "weights only" in done.stdout and "dropped  the optimizer's state of" in done.stdout
    assert cpt("ckpt", "diff", str(out), str(formats["atom"]), "--weights").returncode == 0
    assert "holds this average already" in cpt(*words, "--to", "hf").stdout
    done = cpt(
        "ckpt", "average", str(formats["hf"]), str(formats["other"]), "--out", str(tmp_path / "b"), "--dtype", "fp32"
    )
    assert done.returncode == 0 and not list(tmp_path.glob("*.partial"))
    shown = json.loads(cpt("ckpt", "show", str(tmp_path / "b"), "--json").stdout)
    assert shown["dtypes"] == {"float32": 30} and shown["converted_from"]["options"]["dtype"] == "float32"
    shown_ = cpt("ckpt", "show", str(tmp_path / "b")).stdout
    assert f"average of 0.5 × {formats['hf']}, 0.5 × {formats['other']}" in shown_
    two = ("ckpt", "average", str(formats["megatron"]), str(formats["hf"]), "--out", str(tmp_path / "two"))
    planned = cpt(*two, "--tp", "2", "--dry-run").stdout
    assert planned.startswith("average    0.5 of ") and "mp_rank_01" in planned and not (tmp_path / "two").exists()
    assert "layout   tp 2 × pp 1\n" in cpt(*two, "--tp", "2").stdout
    done = cpt(*two, "--to", "hf", "--tp", "2")
    assert done.returncode == 2 and "`hf` has no ranks, so `--tp` means nothing for it" in done.stderr
    for flags, words_ in (
        (("--weights", "1"), "names 1 numbers for 2"),
        (("--weights", "a,b"), "is not a list of numbers"),
        (("--weights", "1e308,1e308"), "their sum is no number"),
        (("--weights", "inf,1"), "has the weight inf, wanted is a finite number of at least 0"),
        (("--to", "hff"), "did you mean `hf`"),
        (("--dtype", "int8"), "unknown value"),
    ):
        done = cpt("ckpt", "average", str(formats["hf"]), str(formats["other"]), "--out", str(tmp_path / "c"), *flags)
        assert done.returncode == 2 and words_ in done.stderr and not (tmp_path / "c").exists()


def test_what_a_checkpoint_was_converted_from_is_told_in_every_format(tmp_path: Path) -> None:
    golden = shared_data("ckpt", "mcore-goldens", "td_fully_reshardable_dp2", "iter_0000007")
    before, form = golden, "torch_dist"
    for name in ("torch_dist", "megatron", "atom", "torch_dist"):
        out = tmp_path / f"{name}{before == golden}"
        assert cpt("convert-ckpt", str(before), str(out), "--to", name).returncode == 0
        shown = cpt("ckpt", "show", str(out)).stdout
        folder = out / "iter_0000007" if name != "atom" else out
        wanted = f"{form}, {before}"
        for line in (
            f"from       {wanted}\n",
            "step       7\n",
            "lr         0.001\n",
            "tensors    39: 39 bf",
            "Adam, 7 ",
        ):
            assert line in shown, shown
        assert "scratch" not in shown
        assert f"    from     {wanted}\n" in cpt("lineage", str(out)).stdout
        before, form = folder, name
    chain = cpt("lineage", str(before)).stdout
    heads = [line for line in chain.splitlines() if line and not line.startswith(" ")]
    assert heads == ["converted · step 7"] * 4 + ["base model td_fully_reshardable_dp2/iter_0000007"], chain


def test_what_is_no_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    for arguments, words in (
        (("ckpt", "list", str(tmp_path / "none")), "there is no folder"),
        (("ckpt", "show", str(tmp_path)), "is no checkpoint: it holds nothing"),
        (("ckpt", "verify", str(tmp_path)), "is no checkpoint: it holds nothing"),
        (("ckpt", "diff", str(tmp_path), str(tmp_path)), "is no checkpoint: it holds nothing"),
        (("ckpt", "average", str(tmp_path), "--out", str(tmp_path / "x")), "lies inside"),
        (("ckpt", "average", str(tmp_path), str(tmp_path)), "wants `--out OUT`"),
        (("sample", str(tmp_path), "x"), "is no checkpoint"),
        (("sample", str(tmp_path), "x", "--top-p", "0"), "`--top-p` is 0.0"),
    ):
        done = cpt(*arguments)
        assert done.returncode == 2 and done.stdout == "" and words in done.stderr.splitlines()[0], arguments


CONTINUATIONS = """
import json, sys
from cpt.evaluate.sample import Model, Sampling, find
model = Model(find(sys.argv[1]))
warm = {"temperature": 2, "seed": 4, "ignore_eos": True}
ways = [{}, {"temperature": 1, "top_p": 1e-9}, warm, warm, {"tokens": 3}]
print(json.dumps(["".join(model.continuation(sys.argv[2], Sampling(**{"tokens": 30, **way}))) for way in ways]))
"""


def test_sample_continues_a_text_the_same_way_each_time(run: Path) -> None:
    """More tokens than the model has positions, characters of several tokens."""
    text = "the quick 你好"
    script = subprocess.run([sys.executable, "-c", CONTINUATIONS, str(run), text], capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    greedy, narrow, warm, again, short = json.loads(script.stdout)
    assert greedy and greedy == narrow and warm == again != greedy and greedy.startswith(short.rstrip("�"))
    done = cpt("sample", str(run), text, "--tokens", "30")
    assert done.stdout == f"{text}{greedy}\n"
    # The first line: torch builds for GPUs add a warning of their own where there is none.
    assert done.stderr.splitlines()[0] == f"note: using `{run / 'stages/domain/checkpoints/iter_0000010'}`"


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    text = (run / "tokenizer" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text + " ")
    done = cpt("sample", str(run), "x", "--tokenizer", str(tmp_path))
    assert done.returncode == 2 and "is not the tokenizer that" in done.stderr


def test_a_real_model_tells_its_known_story() -> None:
    folder = shared_data("models", "stories260K")
    expected = json.loads(shared_data("ckpt", "stories260k-hf", "expected.json").read_text())
    ids = next(v for v in expected.values() if isinstance(v, list) and len(v) >= 200 and isinstance(v[0], int))
    done = cpt("sample", str(folder), "", "--tokens", "120", "--json")
    assert done.returncode == 0, done.stderr
    from tokenizers import Tokenizer

    story = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids[:121] if ids[0] == 1 else ids[:120])
    assert json.loads(done.stdout)["continuation"].strip() == story.strip()
