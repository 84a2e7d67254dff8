"""`cpt convert-ckpt` as a person starts it: refusals, kills, stops, full disks, and the same bytes after them all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from cpt.base import lock, processes
from cpt.base.files import read_lines
from cpt.checkpoint import find
from tests import checkpoints, command
from tests.checkpoints import PLAIN, write_hf
from tests.command import Ended

ROOT = Path(__file__).resolve().parents[2]
BIG = replace(PLAIN, num_layers=6, hidden_size=320, ffn_hidden_size=904, vocab_size=4001)  # about 40 MB


def words(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "cpt", "convert-ckpt", *map(str, arguments)]


def cpt(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words(*arguments), cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command in a session of its own."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(words(*arguments), env=environ, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(ended: subprocess.CompletedProcess[str] | Ended, *said: str, code: int = 2) -> None:
    if not isinstance(ended, Ended):
        ended = Ended(ended.returncode, ended.stdout, ended.stderr)
    assert ended.code == code, ended
    assert "Traceback" not in ended.err and "fault of `cpt`" not in ended.err, ended.err
    assert any(line.startswith("error: ") for line in ended.err.splitlines()) and ended.out == ""
    for text in said:
        assert text in ended.err, ended.err


def nothing_left(out: Path) -> None:
    """Neither OUT nor anything half-written lies there."""
    assert not list(out.parent.glob(f"{out.name}*")), sorted(out.parent.iterdir())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_hf(tmp_path / "in", PLAIN)
    return tmp_path / "in"


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose conversion takes long enough to be killed at many moments."""
    folder = tmp_path_factory.mktemp("big")
    write_hf(folder / "in", BIG, shards=3)
    return folder


FLAGS = ("--to", "hf", "--dtype", "bf16", "--file-size", "1MB", "--block", "64KiB")


@pytest.fixture(scope="module")
def undisturbed(big: Path) -> dict[str, bytes]:
    """What one worker makes of it, never disturbed."""
    ended = cpt(big / "in", big / "undisturbed", *FLAGS, "--workers", "1")
    assert ended.returncode == 0, ended.stderr
    made = content(big / "undisturbed")
    assert sum(name.endswith(".safetensors") for name in made) > 10, "too few files to be killed between"
    return made


def test_another_dtype_is_rounded_and_counted(small: Path, tmp_path: Path) -> None:
    ended = cpt(small, tmp_path / "out", "--to", "hf", "--dtype", "bf16", "--json", "--quiet")
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    report = json.loads(ended.stdout)
    before, after = checkpoints.read_safetensors(small), checkpoints.read_safetensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = 0
    for name, (dtype, shape, data) in after.items():
        given = np.frombuffer(before[name][2], "<u4")
        kept = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        assert dtype == "BF16" and shape == before[name][1]
        assert np.abs(kept.view("f4") - given.view("f4")).max() <= np.abs(given.view("f4")).max() / 256
        changed += int((kept != given).sum())
    assert report["rounded_values"] == changed > 0
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["conversion"]
    assert record["id"] == report["id"] and record["options"] == {"dtype": "bfloat16"}
    assert record["verdict"]["rounded_values"] == changed
    assert record["source"]["format"] == "hf" and record["source"]["path"] == "../in"
    there = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != "conversion.json"}
    assert {name: f["size"] for name, f in record["files"].items()} == there


def test_the_report_for_people_and_the_same_command_again(small: Path, tmp_path: Path) -> None:
    first = cpt(small, tmp_path / "out", "--to", "hf", "--verify", "full")
    assert first.returncode == 0 and first.stderr == "", first.stderr
    heads = [line.split("  ")[0] for line in first.stdout.splitlines()]
    assert heads == ["written", "size", "time", "memory", "checked", "id"]
    made = content(tmp_path / "out")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = cpt(small, tmp_path / "out", "--to", "hf")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert content(tmp_path / "out") == made
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times
    other = cpt(small, tmp_path / "out", "--to", "hf", "--dtype", "fp16")
    refused(other, "holds another conversion", "`--dtype` is not given there, `float16` here")
    assert content(tmp_path / "out") == made


def test_a_dry_run_writes_nothing(small: Path, tmp_path: Path) -> None:
    ended = cpt(small, tmp_path / "out", "--to", "hf", "--dry-run")
    assert ended.returncode == 0 and "model.safetensors" in ended.stdout
    as_json = json.loads(cpt(small, tmp_path / "out", "--to", "hf", "--dry-run", "--json").stdout)
    assert as_json["files"].keys() == {"model.safetensors"} and not as_json["there_already"]
    nothing_left(tmp_path / "out")


def test_a_terminal_sees_how_far_it_is(big: Path, tmp_path: Path) -> None:
    import pty

    parent, child = pty.openpty()
    line = words(big / "in", tmp_path / "out", *FLAGS, "--workers", "2")
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=child, close_fds=True)
    os.close(child)
    text = b""
    with contextlib.suppress(OSError):
        while data := os.read(parent, 4096):
            text += data
    assert process.wait(60) == 0
    assert b"writing: " in text and b" MB/s" in text and b".weight" in text
    assert text.endswith(b"\r\x1b[K"), "the moving line is taken away at the end"


def test_events_as_json(big: Path, tmp_path: Path) -> None:
    ended = cpt(big / "in", tmp_path / "out", *FLAGS, "--json")
    events = [json.loads(line) for line in ended.stderr.splitlines()]
    files = [e for e in events if e["event"] == "file"]
    assert files[-1]["done"] == files[-1]["of"] == len(files)
    told = [e["tensor"] for e in events if e["event"] == "progress"]  # once a second, and when a phase begins
    assert told and all(name.startswith(("model.", "lm_head.")) for name in told if name)
    assert json.loads(ended.stdout)["files"] == len(files) + 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["in", "out", "--to", "hff"], "did you mean `hf`?"),
        (["in", "out", "--to", "ds-universal"], "is read, not written"),
        (["in", "out", "--to", "hf", "--dtype", "bf61"], "did you mean `bf16`?"),
        (["in", "out", "--to", "hf", "--verify", "ful"], "did you mean `full`?"),
        (["in", "out", "--to", "torch_dist", "--optimizer", "fully_resharable"], "did you mean `fully_reshardable`?"),
        (["in", "out", "--to", "torch_dist", "--optimizer", "plain"], "has no optimizer state"),
        (["in", "out", "--to", "torch_dist", "--spec", "locl"], "did you mean `local`?"),
        (["in", "out", "--to", "hf", "--tp", "2"], "`hf` has no ranks"),
        (["in", "out", "--to", "atom", "--pipeline-layout", "1,2"], "`atom` has no ranks"),
        (["in", "out", "--to", "hf", "--optimizer", "plain"], "holds no optimizer state"),
        (["in", "out", "--to", "atom", "--pad", "keep"], "is for `--to hf`"),
        (["in", "out", "--to", "hf", "--sha256"], "is for `--to atom`"),
        (["in", "out", "--to", "hf", "--spec", "te"], "`--spec te` means nothing"),
        (["in", "out", "--to", "atom", "--spec", "cpt"], "`--spec cpt` means nothing"),
        (["in", "out", "--to", "torch_dist", "--etp", "2"], "the model has no experts"),
        (["in", "out", "--to", "torch_dist", "--dp", "2"], "`--dp` is for `--optimizer dp_reshardable`"),
        (["in", "out", "--to", "megatron", "--dp", "2"], "`--dp` is for `--optimizer dp_reshardable`"),
        (["in", "out", "--to", "torch_dist", "--bucket-size", "1k"], "is for `--optimizer dp_reshardable`"),
        (["in", "out", "--to", "hf", "--untie"], "nothing to untie"),
        (["in", "out", "--to", "hf", "--config", "gpt2"], "is of a `gpt2` model, and `in/config.json` of a `llama`"),
        (["in", "out", "--to", "torch_dist", "--tp", "3"], "possible: tp 1, tp 2, tp 4"),
        (["in", "out", "--to", "hf", "--from-master"], "has no fp32 main weights"),
        (["in", "out", "--to", "hf", "--block", "1kB"], "is too small"),
        (["in", "out", "--to", "hf", "--block", "much"], "is not an amount of bytes"),
        (["in", "out", "--to", "hf", "--tp", "0"], "`--tp 0` is too small, the least is 1"),
        (["in", "out", "--to", "hf", "--tp", "two"], "`--tp two`: wanted is a whole number"),
        (["in", "out", "--to", "hf", "--step", "seven"], "`--step`: `seven` is not a count"),
        (["in", "out", "--to", "hf", "--block", "1q"], "`--block`: `1q` is not an amount of bytes"),
        (["in", "out", "--to", "hf", "--file-size", "-5"], "`--file-size`: `-5` is not an amount of bytes"),
        (["", "out", "--to", "hf"], "the path of a checkpoint is empty"),
        (["../heer/in", "out", "--to", "hf"], "did you mean `../here/in`?"),
        (["in", "out", "--to", "hf", "--tpp", "2"], "unknown flag `--tpp`"),
        (["in", "out"], "`--to` is missing"),
        (["ther", "out", "--to", "hf"], "did you mean `there`?"),
        (["in/config.json", "out", "--to", "hf"], "is a file"),
        (["in", "in", "--to", "hf"], "both what is read and what is written"),
        (["in", "../here/in", "--to", "hf"], "both what is read and what is written"),
        (["in", "in/below/out", "--to", "hf"], "lies inside"),
        (["in", "there", "--to", "hf"], "exists already"),
        (["in", "in/config.json/out", "--to", "hf"], "lies inside"),
        (["in", "file/out", "--to", "hf"], "is a file"),
        (["in", "taken", "--to", "hf"], "taken.partial` is there and is no folder"),
        (["in", "o" * 250, "--to", "hf"], "name too long"),
        (["in", "o" * 300, "--to", "hf"], "name too long"),
        (["there", "out", "--to", "hf"], "is no checkpoint"),
        (["half.partial", "out", "--to", "hf"], "unfinished conversion"),
        (["in", "out", "--to", "torch_dist", "--tp", "3"], "does not divide"),
        (["in", "out", "--to", "torch_dist", "--pp", "2", "--pipeline-layout", "1,1"], "2 parts with 2 layers"),
        (["in", "out", "--to", "megatron", "--pp", "2"], "do not divide"),
        (["in", "out", "--to", "hf", "--step", "7"], "step"),
    ],
)
def test_wrong_commands_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    here = tmp_path / "here"
    write_hf(here / "in", PLAIN)
    (here / "there").mkdir()
    (here / "there" / "notes.txt").write_text("mine")
    (here / "file").write_text("mine")
    (here / "taken.partial").write_text("mine")
    (here / "gpt2").mkdir()
    (here / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (here / "half.partial").mkdir()
    before = content(tmp_path)
    monkeypatch.chdir(here)
    refused(command.cpt("convert-ckpt", *arguments), said)
    assert content(tmp_path) == before and not (here / "out.partial").exists()


def test_a_folder_that_is_no_unfinished_conversion_is_not_touched(small: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    refused(cpt(small, tmp_path / "out", "--to", "hf"), "is no unfinished conversion", "thesis.tex")
    assert content(mine) == {"thesis.tex": b"mine"}


def spoil(folder: Path, tensor: str, at: int, value: float) -> None:
    """Set one value of a float32 tensor."""
    from cpt.checkpoint.safetensors_files import read_headers

    place = read_headers(folder)[tensor]
    with open(place.file, "rb+") as file:
        file.seek(place.start + 4 * at)
        file.write(np.float32(value).tobytes())


def test_nan_is_refused_by_name_count_and_index_and_goes_on_when_allowed(tmp_path: Path) -> None:
    model = replace(PLAIN, num_layers=2)
    write_hf(tmp_path / "in", model)
    name = "model.layers.1.mlp.down_proj.weight"  # [40, 68]
    spoil(tmp_path / "in", name, 68 * 3 + 5, float("nan"))
    spoil(tmp_path / "in", name, 68 * 9 + 1, float("-inf"))
    flags = ("--to", "hf", "--file-size", "20kB")
    refused(
        cpt(tmp_path / "in", tmp_path / "out", *flags, "--workers", "1"),
        name,
        "2 values are NaN or infinite, the first at [3, 5]",
        "--allow-nonfinite",
    )
    assert not (tmp_path / "out").exists()
    again = cpt(tmp_path / "in", tmp_path / "out", *flags, "--workers", "2")
    refused(again, name)
    allowed = cpt(tmp_path / "in", tmp_path / "out", *flags, "--allow-nonfinite")
    assert allowed.returncode == 0, allowed.stderr
    assert "goes on" in allowed.stderr and "NaN or infinite" in allowed.stderr
    before, after = checkpoints.read_safetensors(tmp_path / "in"), checkpoints.read_safetensors(tmp_path / "out")
    assert before == after
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["conversion"]
    assert record["verdict"]["values"] == [
        {"kind": "nonfinite", "tensor": name, "state": "model", "count": 2, "first": [3, 5]}
    ]


def test_a_value_too_large_for_fp16_is_refused_and_nothing_is_left(small: Path, tmp_path: Path) -> None:
    spoil(small, "model.norm.weight", 7, 1e6)
    refused(cpt(small, tmp_path / "out", "--to", "hf", "--dtype", "fp16"), "model.norm.weight", "too large for float16")
    nothing_left(tmp_path / "out")


def test_zero_and_constant_tensors_are_named(small: Path, tmp_path: Path) -> None:
    from cpt.checkpoint.safetensors_files import read_headers

    for name, value in (("model.layers.0.self_attn.v_proj.weight", 0.0), ("model.norm.weight", 1.0)):
        place = read_headers(small)[name]
        with open(place.file, "rb+") as file:
            file.seek(place.start)
            file.write(np.full(place.nbytes // 4, value, "<f4").tobytes())
    ended = cpt(small, tmp_path / "out", "--to", "hf")
    assert ended.returncode == 0
    assert "all values are zero in 1 tensor: `model.layers.0.self_attn.v_proj.weight`" in ended.stderr
    assert "all values are equal in 1 tensor: `model.norm.weight`" in ended.stderr


def children(process: subprocess.Popen[str]) -> list[int]:
    try:
        return [c.pid for c in psutil.Process(process.pid).children()]
    except psutil.NoSuchProcess:
        return []


def none_lives(session: int, seconds: float = 20.0) -> None:
    """Within some seconds no process of a session is left."""
    deadline = time.monotonic() + seconds
    while left := processes.session_members(session):
        assert time.monotonic() < deadline, f"{left} live on"
        time.sleep(0.01)


def journal(out: Path) -> list[object]:
    """Finished files."""
    return [line for line in read_lines(out.with_name(out.name + ".partial") / "journal.jsonl") if "file" in line]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(
    big: Path, undisturbed: dict[str, bytes], workers: str
) -> None:
    chance = random.Random(int(workers))
    out = big / f"killed{workers}"
    kept = 0
    for attempt in range(8):
        process = start(big / "in", out, *FLAGS, "--workers", workers)
        before = len(journal(out))
        wait = before + chance.randrange(0, 4)  # kill somewhere inside a file, not at the same one each time
        while process.poll() is None and len(journal(out)) < wait:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        victims = children(process) if attempt % 2 and workers == "2" else []
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(victims) if victims else process.pid, signal.SIGKILL)
        code = process.wait(30)
        none_lives(process.pid)
        if code == 0 or out.exists():  # a kill right after the renaming: it is whole
            break
        assert code in (-signal.SIGKILL, 1), process.stderr.read() if process.stderr else ""
        kept = max(kept, len(journal(out)))
    ended = cpt(big / "in", out, *FLAGS, "--workers", workers)
    assert ended.returncode == 0, ended.stderr
    assert kept > 0, "no kill came after a finished file: the test shows nothing"
    assert content(out) == undisturbed
    assert not list(big.glob(f"{out.name}.*"))


def test_killed_right_around_the_renaming_it_is_whole_or_goes_on(big: Path, undisturbed: dict[str, bytes]) -> None:
    out = big / "renamed"
    process = start(big / "in", out, *FLAGS)
    while process.poll() is None and not out.exists():
        pass
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    ended = cpt(big / "in", out, *FLAGS)
    assert ended.returncode == 0 and "nothing to do" in ended.stdout
    assert content(out) == undisturbed


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, "1"), (signal.SIGTERM, "2"), (signal.SIGINT, "2")])
def test_a_stop_is_saved_and_says_how_to_go_on(
    big: Path, undisturbed: dict[str, bytes], number: signal.Signals, workers: str
) -> None:
    out = big / f"stopped{number}{workers}"
    process = start(big / "in", out, *FLAGS, "--workers", workers)
    while process.poll() is None and not journal(out):
        time.sleep(0.002)
    os.killpg(process.pid, number)  # as a terminal does: to all of them
    text = process.communicate(timeout=120)[1]
    assert process.returncode == 75, text
    assert "files are finished" in text and "the same command goes on" in text and "Traceback" not in text
    none_lives(process.pid)
    folder = out.with_name(out.name + ".partial")
    assert not (folder / lock.NAME).exists() and not out.exists()
    ended = cpt(big / "in", out, *FLAGS, "--recheck")
    assert ended.returncode == 0 and "goes on" in ended.stderr
    assert content(out) == undisturbed


def test_a_finished_file_that_changed_is_written_again_with_recheck(big: Path, undisturbed: dict[str, bytes]) -> None:
    out = big / "rechecked"
    process = start(big / "in", out, *FLAGS, "--workers", "1")
    while process.poll() is None and len(journal(out)) < 2:
        time.sleep(0.002)
    process.kill()
    process.wait(30)
    name = str(journal(out)[0]["file"])  # type: ignore[index]
    with open(out.with_name("rechecked.partial") / name, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff" if undisturbed[name][-1:] != b"\xff" else b"\x00")
    ended = cpt(big / "in", out, *FLAGS, "--recheck")
    assert ended.returncode == 0, ended.stderr
    assert content(out) == undisturbed


def test_two_converters_at_once(big: Path, undisturbed: dict[str, bytes]) -> None:
    out = big / "both"
    first = start(big / "in", out, *FLAGS, "--workers", "1")
    while first.poll() is None and not journal(out):
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    try:
        refused(cpt(big / "in", out, *FLAGS), "is in use by process", str(first.pid))
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert content(out) == undisturbed


def test_a_lock_of_a_dead_process_is_taken_over(big: Path, undisturbed: dict[str, bytes]) -> None:
    out = big / "stale"
    process = start(big / "in", out, *FLAGS)
    while process.poll() is None and not journal(out):
        time.sleep(0.002)
    process.kill()
    process.wait(30)
    assert (big / "stale.partial" / lock.NAME).exists()
    ended = cpt(big / "in", out, *FLAGS)
    assert ended.returncode == 0 and f"taken over from process {process.pid}" in ended.stderr
    assert content(out) == undisturbed


def test_another_conversion_under_way_is_shown_and_kept(big: Path) -> None:
    out = big / "other"
    process = start(big / "in", out, *FLAGS)
    while process.poll() is None and not journal(out):
        time.sleep(0.002)
    process.kill()
    process.wait(30)
    before = content(big / "other.partial")
    ended = cpt(big / "in", out, "--to", "hf", "--dtype", "fp16")
    refused(ended, "is another unfinished conversion", "`--dtype` is `bfloat16` there, `float16` here", "remove")
    after = content(big / "other.partial")
    assert {n: b for n, b in before.items() if "lock" not in n} == {n: b for n, b in after.items() if "lock" not in n}


def test_a_changed_source_is_another_conversion(tmp_path: Path) -> None:
    write_hf(tmp_path / "in", PLAIN)
    assert cpt(tmp_path / "in", tmp_path / "out", "--to", "hf").returncode == 0
    spoil(tmp_path / "in", "model.norm.weight", 0, 2.0)
    refused(cpt(tmp_path / "in", tmp_path / "out", "--to", "hf"), "other files, or they have changed since")


@contextlib.contextmanager
def small_disk(folder: Path, size: str, *options: str) -> Iterator[Path]:
    """A real file system of some size; skips where it may not be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(big: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        ended = cpt(big / "in", disk / "out", *FLAGS)
        refused(ended, "not enough disk space", "needed", "free", code=3)
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_fills_up_keeps_what_is_finished(
    big: Path, undisturbed: dict[str, bytes], tmp_path: Path, workers: str
) -> None:
    with small_disk(tmp_path / "disk", "40m") as disk:
        process = start(big / "in", disk / "out", *FLAGS, "--workers", workers)
        while process.poll() is None and not journal(disk / "out"):
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        for child in (stopped := children(process)):
            os.kill(child, signal.SIGSTOP)
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        for pid in [*stopped, process.pid]:
            os.kill(pid, signal.SIGCONT)
        text = process.communicate(timeout=60)[1]
        assert process.returncode == 3, text
        assert text.startswith("error: not enough disk space for") and "Traceback" not in text
        assert "bytes" in text and "free" in text and "the same command goes on" in text
        none_lives(process.pid)
        kept = len(journal(disk / "out"))
        assert kept and not (disk / "out").exists()
        (disk / "ballast").unlink()
        ended = cpt(big / "in", disk / "out", *FLAGS)
        assert ended.returncode == 0 and f"goes on: {kept} of" in ended.stderr, ended.stderr
        made = content(disk / "out")
        assert {n: b for n, b in made.items() if n != "conversion.json"} == {
            n: b for n, b in undisturbed.items() if n != "conversion.json"
        }


def test_a_read_only_disk(small: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m", "ro") as disk:
        refused(cpt(small, disk / "out", "--to", "hf"), "the file system is read-only", code=3)


def test_neither_torch_nor_anything_slow_is_loaded_before_the_first_byte(small: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom cpt.cli import main\n"
        f"assert main(['convert-ckpt', {str(small)!r}, {str(tmp_path / 'atom')!r}, '--to', 'atom']) == 0\n"
        f"assert main(['convert-ckpt', {str(tmp_path / 'atom')!r}, {str(tmp_path / 'hf')!r}, '--to', 'hf']) == 0\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "assert not loaded & {'torch', 'megatron', 'transformers', 'safetensors', 'scipy', 'hydra'}, sorted(loaded)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert checkpoints.read_safetensors(tmp_path / "hf") == checkpoints.read_safetensors(small)


def test_a_folder_of_steps(small: Path, tmp_path: Path) -> None:
    assert cpt(small, tmp_path / "steps" / "iter_0000007", "--to", "atom").returncode == 0
    assert cpt(small, tmp_path / "steps" / "iter_0000009", "--to", "atom").returncode == 0
    (tmp_path / "steps" / "iter_0000012").mkdir()
    found = find.find(tmp_path / "steps")
    assert found.step == 9 and found.format == "atom"
    ended = cpt(tmp_path / "steps", tmp_path / "out", "--to", "hf")
    assert ended.returncode == 0, ended.stderr
    assert "iter_0000012` was passed over" in ended.stderr and "iter_0000009` is taken" in ended.stderr
    chosen = cpt(tmp_path / "steps", tmp_path / "seven", "--to", "hf", "--step", "7")
    assert chosen.returncode == 0 and chosen.stderr == ""
    refused(cpt(tmp_path / "steps", tmp_path / "eight", "--to", "hf", "--step", "8"), "has no step 8", "there are 7, 9")
    refused(cpt(tmp_path / "steps", tmp_path / "twelve", "--to", "hf", "--step", "12"), "is not whole")
