"""The `torch_dist` format: any block of any tensor, damaged files named, no code of a pickle ever run."""

from __future__ import annotations

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint import main_weights, torch_dist, unpickle
from cpt.checkpoint.torch_dist import Chunk, Folder
from tests.shared import shared_data


def written(folder: Path, tensors: dict[str, Any], cuts: int = 2) -> Path:
    """A checkpoint of whole tensors, each cut along axis 0 into `cuts` chunks, by two ranks."""
    folder.mkdir()
    records = []
    for rank in range(2):
        chunks = []
        for key, tensor in tensors.items():
            parts = tensor.tensor_split(cuts) if tensor.dim() else [tensor]
            at = 0
            for i, part in enumerate(parts):
                if i % 2 == rank and part.numel():
                    offset = (at, *[0] * (tensor.dim() - 1)) if tensor.dim() else ()
                    chunks.append(Chunk(key, tuple(tensor.shape), offset, tuple(part.shape), part))
                at += len(part) if tensor.dim() else 0
        objects = {"layer._extra_state/shard_0_1": None} if rank else {}
        records += torch_dist.write_records(folder, f"__{rank}_0.distcp", chunks, objects)[0]
    torch_dist.finish(folder, records, {"iteration": 3, "optimizer": {"step": 7}})
    return folder


def test_every_block_of_every_tensor_reads_back(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(7, 5, 3),
        "b.weight": torch.randn(9, 4).to(torch.bfloat16),
        "c.bytes": torch.arange(11, dtype=torch.uint8),
        "d.half": torch.randn(6).half(),
    }
    tensors["a.weight"][0, 0, 0], tensors["a.weight"][1, 0, 0] = -0.0, float("nan")
    folder = Folder(written(tmp_path / "x", tensors, cuts=3))
    assert set(folder) == set(tensors) and folder.common() == {"iteration": 3, "optimizer": {"step": 7}}
    chance = random.Random(5)
    for key, tensor in tensors.items():
        whole = folder.read(key)
        assert whole.dtype == tensor.dtype and bytes(whole.view(torch.uint8).numpy()) == bytes(
            tensor.contiguous().view(torch.uint8).numpy()
        )
        for _ in range(20):
            offset = [chance.randrange(n) for n in tensor.shape]
            size = [chance.randint(1, n - o) for n, o in zip(tensor.shape, offset, strict=True)]
            block = tensor[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
            assert folder.read(key, offset, size).nan_to_num(9).equal(block.nan_to_num(9))
    beyond = folder.read("b.weight", (8, 0), (3, 4))
    assert beyond[0].equal(tensors["b.weight"][8]) and not beyond[1:].any()


def test_torch_itself_reads_what_is_written(tmp_path: Path) -> None:
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    tensors = {"a": torch.randn(7, 5), "b": torch.randn(9, 4).to(torch.bfloat16)}
    folder = written(tmp_path / "x", tensors)
    found = {k: torch.zeros_like(t) for k, t in tensors.items()}
    load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    assert all(found[k].equal(t) for k, t in tensors.items())


def test_chunks_that_do_not_tile_a_tensor_are_never_sealed(tmp_path: Path) -> None:
    import torch

    whole = torch.zeros(4, 2)
    for chunks, words in (
        ([Chunk("a", (4, 2), (0, 0), (2, 2), whole[:2])], "hold 4 of 8"),
        ([Chunk("a", (4, 2), (0, 0), (2, 2), whole[:2])] * 2, "written twice"),
        ([Chunk("a", (4, 2), (3, 0), (2, 2), whole[:2])], "outside"),
    ):
        folder = tmp_path / words.replace(" ", "_")
        folder.mkdir()
        records, _ = torch_dist.write_records(folder, "__0_0.distcp", chunks, {})
        with pytest.raises(AssertionError, match=words):
            torch_dist.finish(folder, records, {})


def test_two_writes_of_the_same_state_give_the_same_files(tmp_path: Path) -> None:
    import torch

    tensors = {"a": torch.randn(7, 5), "b": torch.randn(9, 4)}
    one, other = written(tmp_path / "x", tensors), written(tmp_path / "y", tensors)
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "metadata.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt"])
def test_damaged_files_end_in_one_clear_error(name: str, tmp_path: Path) -> None:
    import torch

    good = written(tmp_path / "x", {"a": torch.randn(40, 5), "b": torch.randn(9, 4)})
    data = (good / name).read_bytes()
    chance = random.Random(3)
    for cut in [0, 1, len(data) // 2, len(data) - 1, *(chance.randrange(len(data)) for _ in range(40))]:
        (good / name).write_bytes(data[:cut])
        with pytest.raises(UsageError) as raised:
            folder = Folder(good)
            folder.common()
            for key in folder:
                folder.read(key)
        assert name in raised.value.message
    (good / name).unlink()
    with pytest.raises(UsageError, match=r"missing|cannot be read|no `.metadata`"):
        folder = Folder(good)
        folder.common()
        folder.read("a")
    (good / "metadata.json").unlink()
    with pytest.raises(UsageError, match=r"unfinished|no `.metadata`"):
        Folder(good)


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_names_a_command_runs_nothing(tmp_path: Path) -> None:
    import argparse

    import torch

    sign = tmp_path / "it_ran"
    value = unpickle.load(io.BytesIO(pickle.dumps({"a": Evil(str(sign)), "b": [1, "x"]})), "test")
    assert value["b"] == [1, "x"] and isinstance(value["a"], unpickle.Inert)
    hidden = [
        b"cposix\nsystem\n(S'touch " + str(sign).encode() + b"'\ntR.",
        b'cbuiltins\neval\n(S\'__import__("os").system("touch ' + str(sign).encode() + b"\")'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch._utils\n__dict__\n.",
    ]
    for data in hidden:
        found = unpickle.load(io.BytesIO(data), "test")
        assert isinstance(found, unpickle.Inert) or (isinstance(found, type) and issubclass(found, unpickle.Inert))
    folder = written(tmp_path / "x", {"a": torch.randn(4, 2)})
    torch.save({"iteration": 5, "args": argparse.Namespace(lr=0.1), "bad": Evil(str(sign))}, folder / "common.pt")
    common = Folder(folder).common()
    assert common["iteration"] == 5 and common["args"].lr == 0.1
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(str(sign))))
    with pytest.raises(UsageError, match="not the metadata"):
        Folder(folder)
    assert not sign.exists()


def test_a_path_that_leaves_the_checkpoint_is_refused(tmp_path: Path) -> None:
    import torch

    folder = written(tmp_path / "x", {"a": torch.randn(4, 2)})
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data.replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(UsageError, match="outside the checkpoint"):
        Folder(folder)


@pytest.mark.parametrize(
    ("name", "count"), [("td_fully_reshardable_dp2", 9), ("td_nodistopt_tp2", 9), ("td_model_tp2pp2", 0)]
)
def test_good_checkpoints_of_megatron_core_pass_the_main_weight_check(name: str, count: int) -> None:
    from safetensors.torch import load_file

    folder = Folder(shared_data("ckpt", "mcore-goldens", name, "iter_0000007"))
    assert main_weights.check_main_weights(folder) == count
    truth = load_file(shared_data("ckpt", "mcore-goldens", "expected.safetensors"))
    weights = [k for k in folder if not k.startswith("optimizer.")]
    assert len(weights) == 9
    assert all(folder.read(k).equal(truth[f"{k}.fp32"].to(folder.read(k).dtype)) for k in weights)


def test_the_known_fault_of_megatron_core_is_refused_and_named() -> None:
    folder = Folder(shared_data("ckpt", "mcore-goldens", "bad_fully_reshardable_multibucket", "iter_0000007"))
    with pytest.raises(UsageError, match=r"main weights are not the model's weights in 7 of 9") as raised:
        main_weights.check_main_weights(folder)
    assert "megatron-core 0.15.0 to 0.19.2" in raised.value.hints[0]
    found = 0
    for part in range(3):
        try:
            main_weights.check_main_weights(folder, part=part, parts=3)
        except UsageError:
            found += 1
    assert found, "ranks that share the reading find it too"


def test_rounding_compares_every_bit_that_matters() -> None:
    import torch

    main = torch.tensor([1.0, -0.0, 1 + 2**-9, float("nan"), 3.0e38])
    assert main_weights.same_after_rounding(main, main.bfloat16())
    other = main.bfloat16()
    other[2] = 1 + 2**-7
    assert not main_weights.same_after_rounding(main, other)


def test_a_file_that_cannot_grow_is_the_systems_error_wherever_it_ends(tmp_path: Path) -> None:
    import resource

    import torch

    shapes = {"a": (3, 1100), "b": (7,)}
    chunks = [Chunk(k, shape, (0,) * len(shape), shape, torch.ones(shape)) for k, shape in shapes.items()]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(0, 15_000, 331):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            with pytest.raises(OSError, match="File too large"):
                torch_dist.write_records(tmp_path, "__0_0.distcp", chunks, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    torch_dist.write_records(tmp_path, "__0_0.distcp", chunks, {})
    assert (tmp_path / "__0_0.distcp").stat().st_size > 15_000
