"""wandb: there, and whether it knows a key. Nothing here goes to the network."""

from __future__ import annotations

import netrc
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from cpt.doctor.check import Check


def checks(environ: Mapping[str, str]) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every check of this file, with its name."""
    yield "wandb", lambda: _wandb(environ)


def _wandb(environ: Mapping[str, str]) -> Check:
    try:
        found = f"wandb {version('wandb')}"
    except PackageNotFoundError:
        return Check("warn", "wandb", "not installed", "runs go on without it; `pip install wandb`")
    if environ.get("WANDB_API_KEY") or _has_login():
        return Check("ok", "wandb", f"{found}, a key is set")
    return Check("ok", "wandb", f"{found}, no key: `tracking.wandb=offline` works, `online` needs `wandb login`")


def _has_login() -> bool:
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
