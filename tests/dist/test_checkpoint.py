"""Native checkpoints on real ranks: saved at one layout, loaded at another, every bit and every next step the same."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cpt.base.errors import EnvironmentProblem, StageFailed
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint import store, verify
from cpt.checkpoint.manifest import Origin
from cpt.checkpoint.torch_dist import Folder
from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import Optimizer, Retain, Saving
from tests.dist.ranks import RankFailed, run_ranks
from tests.shared import shared_data

LLAMA = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=44,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=90,
    max_position_embeddings=64,
    norm_eps=1e-5,
)
TIED = dataclasses.replace(LLAMA, tie_embeddings=True, num_layers=5)
NEOX = dataclasses.replace(
    LLAMA,
    family="gpt_neox",
    num_query_groups=4,
    linear_bias=True,
    qkv_bias=True,
    normalization="layernorm",
    activation="gelu",
    parallel_residual=True,
    rotary_percent=0.5,
)
OPTIMIZER = Optimizer()


class Run:
    """A rank that trains on made tokens which depend on the step alone."""

    def __init__(self, model: ModelConfig, parallel: Parallel, precision: str, seed: int = 7) -> None:
        from cpt.engine import megatron

        if parallel.overlap_grad_reduce:
            # Tiny models fit into one bucket of the usual size.
            config = functools.partial(megatron.DistributedDataParallelConfig, bucket_size=3000)
            megatron.DistributedDataParallelConfig = config  # type: ignore[misc, assignment]
        self.engine = megatron.build(model, parallel, precision=precision, optimizer=OPTIMIZER, seed=seed)

    def padded_buckets(self) -> int:
        """Buckets before the last of their buffer that end in padding: where megatron-core's own save goes wrong."""
        buffers = [b for part in self.engine.optimizer.chained_optimizers for b in part.buffers]
        return sum(b.grad_data.numel() > b.numel_unpadded for buffer in buffers for b in buffer.buckets[:-1])

    def steps(self, first: int, count: int) -> list[float]:
        """Mean loss of each step [nats/token]."""
        import torch
        from megatron.core import parallel_state

        from cpt.engine import megatron

        losses = []
        for step in range(first, first + count):
            tokens = torch.randint(0, 90, (12, 17), generator=torch.Generator().manual_seed(step))
            share = 12 // self.engine.parallel.dp
            rank = parallel_state.get_data_parallel_rank()
            mine = tokens[rank * share : (rank + 1) * share]
            batches = megatron.microbatches(mine, micro_batch_size=2, device=self.engine.device)
            found = megatron.forward_backward(self.engine, batches)
            sums, counts = megatron.reduce_by_source(self.engine, found, [0] * share, 1)
            megatron.update(self.engine, 1e-2, megatron.grad_norm(self.engine))
            losses.append(sums[0] / counts[0])
        return losses


def progress(step: int) -> Any:
    from cpt.engine.ports import Progress

    return Progress(step=step, tokens=step * 100, cursors={"web": {"epoch": 1}}, losses=[1.5, 2.5])


def train_save_go_on(model: ModelConfig, parallel: Parallel, precision: str, folder: str) -> tuple[list[float], int]:
    from cpt.checkpoint import native

    run = Run(model, parallel, precision)
    padded = run.padded_buckets() if parallel.distributed_optimizer else 0
    run.steps(0, 3)
    native.save(run.engine, folder, progress=progress(3))
    return run.steps(3, 3), padded


def load_save_go_on(model: ModelConfig, parallel: Parallel, precision: str, folder: str, copy: str) -> Any:
    from cpt.checkpoint import native

    warnings: list[str] = []
    run = Run(model, parallel, precision, seed=99)
    run.steps(50, 1)  # whatever the engine held before is overwritten
    found = native.load(run.engine, folder, warn=warnings.append)
    assert found == progress(3)
    native.save(run.engine, copy, progress=found)
    return run.steps(3, 3), warnings


def assert_equal_tensors(one: Path, other: Path) -> None:
    import torch

    a, b = Folder(one), Folder(other)
    names = {k for k in a if not k.startswith("cpt.rng")}
    assert names == {k for k in b if not k.startswith("cpt.rng")} and len(names) > 20
    vocabulary = 0
    for key in names:
        x, y = a.read(key), b.read(key)
        assert x.dtype == y.dtype
        if x.shape != y.shape:  # padding of the vocabulary follows tp
            vocabulary += 1
            n = min(len(x), len(y))
            assert (
                not x[n:].any() and not y[n:].any() and key.endswith(("word_embeddings.weight", "output_layer.weight"))
            )
            x, y = x[:n], y[:n]
        assert torch.equal(x, y), key
    assert vocabulary in (0, 4, 8)


BUCKETS = Parallel(dp=3, overlap_grad_reduce=True)
CASES = {
    "several buckets, dp 3": (LLAMA, BUCKETS, "bf16"),
    "several buckets, dp 2": (NEOX, Parallel(dp=2, overlap_grad_reduce=True), "fp32"),
    "tied embeddings, pp 2, uneven": (TIED, Parallel(pp=2, dp=2, layers=(3, 2)), "bf16"),
    "tied embeddings, tp 2 × pp 2": (TIED, Parallel(tp=2, pp=2), "fp32"),
    "interleaved pipeline": (LLAMA, Parallel(pp=2, vp=2), "bf16"),
    "without distributed optimizer": (LLAMA, Parallel(tp=2, dp=2, distributed_optimizer=False), "bf16"),
    "one rank, no distributed optimizer, fp32": (TIED, Parallel(distributed_optimizer=False), "fp32"),
}
OTHERS = [Parallel(), Parallel(tp=2, dp=2, overlap_grad_reduce=True), Parallel(pp=2), BUCKETS]


@pytest.mark.parametrize("case", CASES)
def test_state_is_bit_equal_at_any_layout_and_training_goes_on_the_same(case: str, tmp_path: Path) -> None:
    model, parallel, precision = CASES[case]
    first = tmp_path / "first" / "iter_0000003"
    results = run_ranks(parallel, train_save_go_on, model, parallel, precision, str(first))
    straight = results[0][0]
    if parallel.overlap_grad_reduce or (model.tie_embeddings and parallel.pp > 1 and parallel.dp > 1):
        assert sum(padded for _, padded in results) > 0, "the case must have what megatron-core gets wrong"
    assert verify.verify(first) == []
    others = [parallel, *OTHERS]
    if precision == "bf16":
        others = [parallel, Parallel(), Parallel(pp=2, dp=2)]
    for n, other in enumerate(others):
        if model is TIED and other.pp == 2 and other.layers is None:
            other = dataclasses.replace(other, layers=(2, 3))
        copy = tmp_path / f"copy_{n}" / "iter_0000003"
        results = run_ranks(other, load_save_go_on, model, other, precision, str(first), str(copy))
        losses, warnings = results[0]
        assert_equal_tensors(first, copy)
        if n == 0:
            assert losses == straight, "bit-identical at the same layout"
            assert warnings == []
        else:
            tolerance = 1e-5 if precision == "fp32" else 2e-2
            assert losses == pytest.approx(straight, abs=tolerance)
            same = (other.tp, other.pp, other.dp, other.vp) == (parallel.tp, parallel.pp, parallel.dp, parallel.vp)
            assert same or "belong to the layout" in warnings[0]


def stored_with(parallel: Parallel, folder: str) -> None:
    from cpt.checkpoint import native

    native.save(Run(LLAMA, parallel, "bf16").engine, folder, progress=progress(1))


def read_by_megatron(parallel: Parallel, folder: str) -> list[float]:
    """Megatron-core's own load of our checkpoint into a fresh engine, then three steps."""
    from megatron.core import dist_checkpointing

    from cpt.checkpoint.states import sharding_metadata

    run = Run(LLAMA, parallel, "bf16", seed=99)
    (chunk,) = run.engine.bare_chunks()
    metadata = sharding_metadata()
    model: Any = chunk
    sharded = {"model": model.sharded_state_dict(metadata=metadata)}
    sharded["optimizer"] = run.engine.optimizer.sharded_state_dict(sharded["model"], is_loading=True, metadata=metadata)
    state = dist_checkpointing.load(sharded, folder)
    model.load_state_dict(state["model"], strict=False)
    run.engine.optimizer.load_state_dict(state["optimizer"])
    assert state["iteration"] == 3 and state["args"].num_layers == LLAMA.num_layers
    return run.steps(3, 3)


def test_megatron_core_itself_loads_our_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000003"
    parallel = Parallel(dp=2)
    straight, _ = run_ranks(parallel, train_save_go_on, LLAMA, parallel, "bf16", str(folder))[0]
    assert run_ranks(parallel, read_by_megatron, parallel, str(folder))[0] == straight
    (other,) = {tuple(r) for r in run_ranks(Parallel(tp=2), read_by_megatron, Parallel(tp=2), str(folder))}
    assert list(other) == pytest.approx(straight, abs=2e-2)


GOLDEN = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=22,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    vocab_size=90,
    max_position_embeddings=64,
    norm_eps=1e-5,
)


def load_foreign(folder: str, parallel: Parallel, copy: str) -> int:
    from cpt.checkpoint import native, states
    from cpt.engine import megatron

    engine = megatron.build(GOLDEN, parallel, precision="bf16", optimizer=OPTIMIZER)
    found = native.load(engine, folder, keep={"weights", "optimizer"})
    assert found.step == 7 and states.step_of(engine) == 7
    native.save(engine, copy, progress=found)
    return found.step


@pytest.mark.parametrize("name", ["td_fully_reshardable_dp2", "td_nodistopt_tp2"])
def test_a_good_checkpoint_of_megatron_core_loads_to_the_bit(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = shared_data("ckpt", "mcore-goldens", name, "iter_0000007")
    parallel = Parallel(tp=2, pp=2)
    run_ranks(parallel, load_foreign, str(folder), parallel, str(tmp_path / "iter_0000007"))
    copy = Folder(tmp_path / "iter_0000007")
    truth = load_file(shared_data("ckpt", "mcore-goldens", "expected.safetensors"))
    for key, expected in truth.items():
        key, _, state = key.rpartition(".")
        found = copy.read(f"optimizer.state.{'param' if state == 'fp32' else state}.{key}")
        if key.endswith(("word_embeddings.weight", "output_layer.weight")):
            found = found[: len(expected)]  # another padding of the vocabulary
        assert found.equal(expected), key


def test_the_faulty_checkpoint_of_megatron_core_is_refused(tmp_path: Path) -> None:
    folder = shared_data("ckpt", "mcore-goldens", "bad_fully_reshardable_multibucket", "iter_0000007")
    with pytest.raises(RankFailed, match=r"main weights are not the model's weights in \d of 9 tensors"):
        run_ranks(Parallel(dp=2), load_foreign, str(folder), Parallel(dp=2), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001"
    run_ranks(Parallel(), stored_with, Parallel(), str(folder))
    with pytest.raises(RankFailed, match=r"has no tensor|has shape"):
        run_ranks(Parallel(), load_foreign, str(folder), Parallel(), str(tmp_path / "x"))


def store_many(root: str, asynchronous: bool) -> list[str]:
    """Five saves with retention; a stage's end at a step that was just saved."""
    from cpt.checkpoint.store import StageStore

    warnings: list[str] = []
    run = Run(LLAMA, Parallel(tp=2, pp=2), "bf16")
    saving = Saving(retain=Retain(last=2, every=200), asynchronous=asynchronous)
    keeper = StageStore(root, saving, origin=Origin(stage="domain"), warn=warnings.append, keep_steps=(1,))
    for step in range(1, 6):
        run.steps(step, 1)
        keeper.save(run.engine, progress(step), phase="pre_anneal" if step == 3 else "train")
    keeper.save(run.engine, progress(5), phase="end")
    keeper.wait()
    assert keeper.newest_whole() == Path(root) / "checkpoints" / "iter_0000005"
    return warnings


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_store_keeps_what_was_promised(asynchronous: bool, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "iter_0000009").mkdir(parents=True)
    warnings = run_ranks(Parallel(tp=2, pp=2), store_many, str(tmp_path), asynchronous)[0]
    assert "iter_0000009" in warnings[0] and "never finished" in warnings[0]
    assert [step for step, _ in store.steps(checkpoints)] == [1, 2, 3, 4, 5]
    assert (checkpoints / store.TRACKER).read_text() == "5"
    manifest = manifests.read(checkpoints / "iter_0000005")
    assert manifest.phase == "end" and manifest.origin.stage == "domain" and manifest.progress["tokens"] == 500
    assert manifest.optimizer is not None and manifest.optimizer["step"] == 5
    assert all(verify.verify(folder) == [] for _, folder in store.steps(checkpoints))


def save_while_training_goes_on(root: str) -> bool:
    """Weights change right after an asynchronous save began; what lies on disk is what they were before."""
    import torch

    from cpt.checkpoint import torch_dist
    from cpt.checkpoint.store import StageStore

    write = torch_dist.write_records

    def slow(*args: Any) -> Any:
        time.sleep(1)
        return write(*args)

    torch_dist.write_records = slow  # type: ignore[assignment]
    run = Run(LLAMA, Parallel(dp=2), "fp32")
    run.steps(0, 1)
    keeper = StageStore(root, Saving(asynchronous=True), origin=Origin())
    before = run.engine.bare_chunks()[0].state_dict()["decoder.final_layernorm.weight"].clone()
    folder = keeper.save(run.engine, progress(1), phase="train")
    run.steps(1, 2)
    assert not store.is_whole(folder), "training went on while the save did"
    keeper.wait()
    found = Folder(folder)
    same = torch.equal(found.read("decoder.final_layernorm.weight"), before)
    return same and torch.equal(found.read("optimizer.state.param.decoder.final_layernorm.weight"), before)


def test_an_asynchronous_save_holds_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    assert run_ranks(Parallel(dp=2), save_while_training_goes_on, str(tmp_path)) == [True, True]


def fail_on_one_rank(root: str, asynchronous: bool) -> str:
    import errno
    import os
    import time

    from cpt.checkpoint import torch_dist
    from cpt.checkpoint.store import StageStore

    run = Run(LLAMA, Parallel(dp=2), "fp32")
    keeper = StageStore(root, Saving(asynchronous=asynchronous), origin=Origin())
    keeper.save(run.engine, progress(1), phase="train")
    keeper.wait()
    if os.environ["RANK"] == "1":

        def full(*args: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        torch_dist.write_records = full  # type: ignore[assignment]
    start = time.monotonic()
    try:
        keeper.save(run.engine, progress(2), phase="train")
        keeper.wait()
    except EnvironmentProblem as error:
        assert time.monotonic() - start < 40
        return error.message
    return "nothing was raised"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_on_one_rank_ends_the_save_on_all(asynchronous: bool, tmp_path: Path) -> None:
    one, other = run_ranks(Parallel(dp=2), fail_on_one_rank, str(tmp_path), asynchronous)
    assert one == other and "not enough disk space to save" in one
    assert [step for step, _ in store.steps(tmp_path / "checkpoints")] == [1]
    assert store.is_whole(tmp_path / "checkpoints" / "iter_0000001")


def weights_behind_the_back(root: str) -> str:
    import torch

    from cpt.checkpoint.store import StageStore

    run = Run(LLAMA, Parallel(dp=2), "bf16")
    keeper = StageStore(root, Saving(), origin=Origin())
    with torch.no_grad():
        next(run.engine.bare_chunks()[0].parameters()).add_(0.5)
    try:
        keeper.save(run.engine, progress(1), phase="train")
    except StageFailed as error:
        return error.message
    return ""


def test_a_save_whose_main_weights_are_not_the_models_is_refused(tmp_path: Path) -> None:
    one, other = run_ranks(Parallel(dp=2), weights_behind_the_back, str(tmp_path))
    assert one == other and "is not the model's weight: nothing was saved" in one
    assert store.steps(tmp_path / "checkpoints") == []


def use_the_one_before(root: str) -> tuple[str, list[str], list[str]]:
    from cpt.checkpoint.store import StageStore

    warnings: list[str] = []
    keeper = StageStore(root, Saving(), origin=Origin(), warn=warnings.append)
    found = keeper.newest_whole()
    assert found is not None
    return found.name, warnings, [f.name for _, f in store.steps(Path(root) / "checkpoints")]


def test_a_truncated_shard_is_named_and_the_checkpoint_before_it_is_used(tmp_path: Path) -> None:
    run_ranks(Parallel(tp=2, pp=2), store_many, str(tmp_path), False)
    shard = tmp_path / "checkpoints" / "iter_0000005" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    results = run_ranks(Parallel(dp=2), use_the_one_before, str(tmp_path))
    assert [name for name, _, _ in results] == ["iter_0000004"] * 2
    _, warnings, left = results[0]
    assert len(warnings) == 1 and "`__1_0.distcp` has" in warnings[0] and "`iter_0000004` is used" in warnings[0]
    assert "iter_0000005" in left, "damaged evidence stays"
    assert "__1_0.distcp" in verify.verify(shard.parent)[0]


def die_inside(root: str, where: str) -> None:
    """Save once, then die by SIGKILL inside the second save."""
    import os
    import signal

    from cpt.checkpoint import store as stores
    from cpt.checkpoint import torch_dist
    from cpt.checkpoint.store import StageStore

    def die(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    run = Run(LLAMA, Parallel(dp=2), "bf16")
    keeper = StageStore(root, Saving(retain=Retain(last=1)), origin=Origin())
    keeper.save(run.engine, progress(1), phase="train")
    rank = os.environ["RANK"]
    if where == "shard" and rank == "1":
        torch_dist.os = type("os", (), {"fsync": die})  # type: ignore[attr-defined, assignment]
    if where == "metadata" and rank == "0":
        torch_dist.write_atomic = die  # type: ignore[assignment]
    if where == "manifest" and rank == "0":
        manifests.write = die  # type: ignore[assignment]
    if where == "removal" and rank == "0":
        gone = stores.shutil.rmtree

        def rmtree(path: Path, **kwargs: Any) -> None:
            die() if path.name.endswith("iter_0000001") and path.exists() else gone(path, **kwargs)

        stores.shutil = type("shutil", (), {"rmtree": staticmethod(rmtree)})  # type: ignore[attr-defined, assignment]
    keeper.save(run.engine, progress(2), phase="train")


@pytest.mark.parametrize("where", ["shard", "metadata", "manifest", "removal"])
def test_killed_inside_a_save_the_whole_checkpoint_stays(where: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"died|rank"):
        run_ranks(Parallel(dp=2), die_inside, str(tmp_path), where)
    found, skipped = store.newest_whole(tmp_path / "checkpoints")
    assert found is not None and found.name == ("iter_0000002" if where == "removal" else "iter_0000001")
    assert verify.verify(found) == []
    if where in ("metadata", "manifest"):
        assert skipped == [] and not store.is_whole(tmp_path / "checkpoints" / ".writing-1-iter_0000002")
    left, _, folders = run_ranks(Parallel(dp=2), use_the_one_before, str(tmp_path))[0]
    assert left == found.name and folders == [found.name], "the next attempt cleans up"


def save_for_ever(root: str, asynchronous: bool) -> None:
    import os

    from cpt.checkpoint.store import StageStore

    run = Run(LLAMA, Parallel(dp=2), "bf16")
    keeper = StageStore(root, Saving(retain=Retain(last=2), asynchronous=asynchronous), origin=Origin())
    step = 0
    while True:
        step += 1
        keeper.save(run.engine, progress(step), phase="train")
        if step == 2:  # the first one is whole now, however slow the machine is
            Path(root, f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_random_moments_the_newest_whole_checkpoint_is_good(asynchronous: bool, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for attempt in range(3):
        root = tmp_path / str(attempt)
        root.mkdir()
        victim, delay = chance.randrange(2), chance.uniform(0.2, 1.5)

        def kill(root: Path = root, victim: int = victim, delay: float = delay) -> None:
            pid = root / f"pid_{victim}"
            while not (pid.exists() and pid.read_text()):
                time.sleep(0.01)
            time.sleep(delay)
            os.kill(int(pid.read_text()), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(RankFailed):
            run_ranks(Parallel(dp=2), save_for_ever, str(root), asynchronous)
        killer.join()
        found, _ = store.newest_whole(root / "checkpoints")
        assert found is not None and verify.verify(found) == []
        newest = max(step for step, _ in store.steps(root / "checkpoints"))
        assert int(found.name.removeprefix("iter_")) >= newest - 1


def fill_the_disk(root: str, limit: int) -> tuple[str, list[str]]:
    """Save until a real small file system is full."""
    import os
    import shutil

    from cpt.checkpoint.store import StageStore

    if limit:  # the check before the save is fooled: the disk fills up while writing
        shutil.disk_usage = lambda path: type("usage", (), {"free": 1 << 40})()  # type: ignore[assignment]
    run = Run(LLAMA, Parallel(dp=2), "fp32")
    keeper = StageStore(root, Saving(retain=Retain(last=100)), origin=Origin())
    for step in range(1, 100):
        try:
            keeper.save(run.engine, progress(step), phase="train")
        except EnvironmentProblem as error:
            return error.message, sorted(os.listdir(os.path.join(root, "checkpoints")))
    return "never full", []


@pytest.mark.parametrize("fooled", [False, True])
def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay(fooled: bool, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        results = run_ranks(Parallel(dp=2), fill_the_disk, str(mount), int(fooled))
        message, left = results[0]
        assert results[1][0] == message and "not enough disk space to save" in message
        assert len(left) >= 2 and store.TRACKER in left
        found, skipped = store.newest_whole(mount / "checkpoints")
        assert found is not None and skipped == [] and verify.verify(found) == []
        assert found.name == sorted(n for n in left if n.startswith("iter_"))[-1]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def replace_one(root: str, die: bool) -> list[str]:
    """Resume at a step and save again: the same state, then another one."""
    from cpt.checkpoint import native
    from cpt.checkpoint.store import StageStore

    run = Run(LLAMA, Parallel(dp=2), "fp32")
    StageStore(root, Saving(), origin=Origin()).save(run.engine, progress(1), phase="train")
    before = sorted((Path(root) / "checkpoints" / "iter_0000001").iterdir())
    inode = before[0].stat().st_ino
    keeper = StageStore(root, Saving(), origin=Origin())
    resumed = native.load(run.engine, keeper.newest_whole() or "")
    folder = keeper.save(run.engine, resumed, phase="stop")
    assert before[0].stat().st_ino == inode and manifests.read(folder).phase == "stop", "nothing was written twice"
    keeper = StageStore(root, Saving(), origin=Origin())
    run.steps(0, 1)
    other = progress(1)
    other.losses.append(9.0)
    if die and os.environ["RANK"] == "0":
        manifests.write = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    keeper.save(run.engine, other, phase="train")
    return sorted(os.listdir(folder.parent))


def test_a_checkpoint_that_is_replaced_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    left = run_ranks(Parallel(dp=2), replace_one, str(tmp_path / "a"), False)[0]
    assert left == ["iter_0000001", store.TRACKER]
    folder = tmp_path / "a" / "checkpoints" / "iter_0000001"
    assert manifests.read(folder).progress["losses"][-1] == 9.0 and verify.verify(folder) == []
    with pytest.raises(RankFailed):
        run_ranks(Parallel(dp=2), replace_one, str(tmp_path / "b"), True)
    folder = tmp_path / "b" / "checkpoints" / "iter_0000001"
    assert manifests.read(folder).phase == "stop" and verify.verify(folder) == []
    assert run_ranks(Parallel(), use_the_one_before, str(tmp_path / "b"))[0][0] == "iter_0000001"
    assert sorted(os.listdir(folder.parent)) == ["iter_0000001", store.TRACKER]


def stored(model: ModelConfig, parallel: Parallel, folder: str) -> None:
    from cpt.checkpoint import native
    from cpt.engine import megatron

    native.save(megatron.build(model, parallel, precision="fp32", optimizer=None, seed=5), folder, progress=progress(1))


def imported(model: ModelConfig, source: str, folder: str) -> None:
    from cpt.checkpoint import hf, native
    from cpt.engine import megatron

    engine = megatron.build(model, Parallel(), precision="fp32", optimizer=None, seed=6)
    hf.load(engine, source)
    native.save(engine, folder, progress=progress(1))


@pytest.mark.parametrize("model", [LLAMA, TIED, NEOX], ids=["llama", "tied", "neox"])
def test_export_to_hugging_face_and_back_keeps_every_bit(model: ModelConfig, tmp_path: Path) -> None:
    from cpt.checkpoint import export, hf, native

    parallel = Parallel(tp=2, pp=2, layers=(3, 2) if model is TIED else None)
    first, last = tmp_path / "iter_0000001", tmp_path / "iter_0000002"
    run_ranks(parallel, stored, model, parallel, str(first))
    export.to_hf(first, tmp_path / "hf")
    assert hf.read_config(tmp_path / "hf").num_parameters == model.num_parameters
    run_ranks(Parallel(), imported, model, str(tmp_path / "hf"), str(last))
    found = dict(native.tensors(last))
    names = 0
    for key, tensor in native.tensors(first):
        other = found.pop(key)
        if key.endswith(("word_embeddings.weight", "output_layer.weight")):
            tensor, other = tensor[: model.vocab_size], other[: model.vocab_size]
        assert tensor.equal(other), key
        names += 1
    assert not found and names > 5 * model.num_layers


def test_an_export_without_room_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.checkpoint import export

    run_ranks(Parallel(), stored, LLAMA, Parallel(), str(tmp_path / "iter_0000001"))
    monkeypatch.setattr("os.statvfs", lambda path: type("facts", (), {"f_blocks": 99, "f_bavail": 10, "f_frsize": 100})())
    with pytest.raises(EnvironmentProblem, match="not enough disk space for"):
        export.to_hf(tmp_path / "iter_0000001", tmp_path / "deep" / "hf")
    assert not (tmp_path / "deep").exists()
