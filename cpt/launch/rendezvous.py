"""Where the ranks of an attempt meet, when whoever started them does not say it (srun).

    rank 0   opens the store on a port that the kernel picks · writes attempt_N/rendezvous.json {host, port}
    others   wait for that file · try the address, so that an unreachable one is named as such

No port is guessed, so two jobs on a node never clash. `MASTER_ADDR` in the environment (torchrun, our own parent of
the ranks) wins: then nothing of this happens.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from cpt.base.errors import EnvironmentProblem
from cpt.base.files import read_json, write_json
from cpt.launch import outcome

NAME = "rendezvous.json"
WAIT_SECONDS = 600.0  # for rank 0: a cold file system takes minutes to import torch on many nodes
_CONNECT_SECONDS = 60.0
_POLL_SECONDS = 0.1
_MOST_POLL_SECONDS = 1.0
# What `/etc/hosts` often gives a machine's own name: no other machine reaches it there.
_OWN_ONLY = ("127.0.0.1", "127.0.1.1", "::1")
_VIRTUAL = ("lo", "docker", "veth", "br-", "virbr", "cni", "flannel", "cali", "tun", "tap")

_kept: list[Any] = []  # the store of rank 0 lives as long as its process


def meet(
    attempt_dir: Path,
    environ: MutableMapping[str, str],
    interfaces: Sequence[str] = (),
    wait_s: float = WAIT_SECONDS,
    connect_s: float = _CONNECT_SECONDS,
) -> None:
    """Set MASTER_ADDR and MASTER_PORT of this rank, unless they are set.

    Args:
        environ: has RANK, WORLD_SIZE and LOCAL_WORLD_SIZE.
        interfaces: network interfaces by name or its beginning; the first that this machine has is taken.
        wait_s: how long the others wait for rank 0 [s].
        connect_s: how long they try to reach it [s].

    Raises:
        EnvironmentProblem: no such interface; rank 0 did not appear, or cannot be reached.
    """
    if "MASTER_ADDR" in environ:
        return
    rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    if size == 1:  # meets nobody and takes any free port when it wants one
        environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
        return
    is_one_node = size == int(environ.get("LOCAL_WORLD_SIZE", str(size)))
    own, interface = ("127.0.0.1", None) if is_one_node else own_address(interfaces)
    if interface is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # it takes whole names only, and no beginnings
    path = attempt_dir / NAME
    if rank == 0:
        host, port = own, _open_store(own, size)
        write_json(path, {"host": host, "port": port, "node": socket.gethostname(), "pid": os.getpid()})
    else:
        host, port = _await(path, rank, wait_s)
        _reach(host, port, rank, connect_s, attempt_dir)
    environ["MASTER_ADDR"], environ["MASTER_PORT"] = host, str(port)
    # torch's own word for "the store is there already": rank 0 joins it instead of opening a second one.
    environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"


def own_address(
    interfaces: Sequence[str] = (),
    addresses: Mapping[str, Sequence[str]] | None = None,
    resolve: Callable[[], str] | None = None,
) -> tuple[str, str | None]:
    """(address that other machines reach this one at, its interface when the host's name does not lead there).

    Args:
        interfaces: wanted, by name or its beginning; empty = what the host's name stands for.
        addresses: IPv4 addresses by interface; None = of this machine.
        resolve: address of the host's name; raises OSError when there is none.

    Raises:
        EnvironmentProblem: none of the interfaces is there.
    """
    found = _addresses() if addresses is None else addresses
    if interfaces:
        for wanted in interfaces:
            for name in sorted(found, key=lambda n: (n != wanted, n)):
                if name.startswith(wanted) and found[name]:
                    return found[name][0], name
        shown = ", ".join(f"`{name}`" for name in sorted(found)) or "none"
        raise EnvironmentProblem(
            f"`{socket.gethostname()}` has no network interface that begins with "
            + " or ".join(f"`{name}`" for name in interfaces)
            + f" (`launcher.interface`), only {shown}",
            "`launcher.interface=[...]` names one that all nodes have, by its name or beginning",
        )
    with contextlib.suppress(OSError):
        address = (resolve or _resolve)()
        if address not in _OWN_ONLY:
            return address, None
    for name in sorted(found):
        if not name.startswith(_VIRTUAL) and found[name] and not found[name][0].startswith(("127.", "169.254.")):
            return found[name][0], name
    raise EnvironmentProblem(
        f"`{socket.gethostname()}` has no address that other machines reach", "`launcher.interface` names a network"
    )


def _resolve() -> str:
    return socket.gethostbyname(socket.gethostname())


def _addresses() -> dict[str, list[str]]:
    import psutil

    up = psutil.net_if_stats()
    return {
        name: [str(a.address) for a in given if a.family == socket.AF_INET]
        for name, given in psutil.net_if_addrs().items()
        if name not in up or up[name].isup
    }


def _open_store(host: str, size: int) -> int:
    """Open the store at which the ranks meet; gives its port."""
    from torch.distributed import TCPStore

    store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
    _kept.append(store)
    return int(store.port)


def _await(path: Path, rank: int, wait_s: float) -> tuple[str, int]:
    """What rank 0 has written, once it has."""
    end, pause = time.monotonic() + wait_s, _POLL_SECONDS
    first = outcome.record_path(path.parent, 0)
    while True:
        with contextlib.suppress(FileNotFoundError):
            found = read_json(path)
            return str(found["host"]), int(found["port"])
        if first.exists():
            raise EnvironmentProblem(
                f"rank {rank}: rank 0 ended before the ranks met", f"its log is `{outcome.log_path(path.parent, 0)}`"
            )
        if time.monotonic() > end:
            raise EnvironmentProblem(
                f"rank {rank}: rank 0 has not said within {wait_s:g} s where the ranks meet: `{path}` is missing",
                f"its log is `{outcome.log_path(path.parent, 0)}`",
                "all nodes of a job must see the same run folder",
            )
        time.sleep(pause)
        pause = min(_MOST_POLL_SECONDS, pause * 1.2)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # a network file system looks again then, and else remembers what was missing


def _reach(host: str, port: int, rank: int, connect_s: float, attempt_dir: Path) -> None:
    """Connect once, because torch does not say what is wrong."""
    end = time.monotonic() + connect_s
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, min(10.0, connect_s))).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise EnvironmentProblem(
                    f"rank {rank} on `{socket.gethostname()}` does not reach rank 0 at {host}:{port}: "
                    f"{error.strerror or error}",
                    "`launcher.interface` names the network that the nodes share, such as `ib` or `eth0`",
                    f"the log of rank 0 is `{outcome.log_path(attempt_dir, 0)}`",
                ) from None
        time.sleep(1.0)
