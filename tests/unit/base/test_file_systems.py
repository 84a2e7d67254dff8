"""The file system of a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.base.file_systems import file_system, is_network

MOUNTS = """\
22 1 0:20 / / rw,relatime - ext4 /dev/sda rw
30 22 0:30 / /home rw - nfs4 server:/home rw
31 30 0:31 / /home/me/fast\\040disk rw - tmpfs tmpfs rw
32 22 0:32 / /data rw - ext4 /dev/sdb rw
33 22 0:33 / /data rw shared:1 - lustre mds:/data rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/me/runs", "nfs4"), ("/homes", "ext4"), ("/home/me/fast disk/runs", "tmpfs"), ("/data/x", "lustre")],
)
def test_the_file_system_is_that_of_the_nearest_and_last_mount(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


def test_a_path_is_on_some_file_system_here(tmp_path: Path) -> None:
    assert file_system(tmp_path / "not" / "there")


def test_network_file_systems() -> None:
    assert all(is_network(kind) for kind in ("nfs4", "lustre", "gpfs", "beegfs_nodev", "fuse.sshfs", "fuse"))
    assert not any(is_network(kind) for kind in ("ext4", "xfs", "tmpfs", "overlay", "fuseblk", ""))
