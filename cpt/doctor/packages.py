"""Python and the packages, by their versions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from cpt.doctor.check import Check

_EXTRAS = {"gigatoken": "fast", "simple-icd-10-cm": "demo", "transformers": "eval"}


def checks() -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every check of this file, with its name."""
    yield "python", _python
    yield "packages", _packages
    yield "extras", _extras


def _python() -> Check:
    return Check("ok", "python", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def _packages() -> Check:
    """Every requirement is there in a version that it allows."""
    from packaging.requirements import Requirement

    wrong = []
    for text in requires("cpt") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} is not {wanted.specifier}")
    if wrong:
        return Check("fail", "packages", "; ".join(wrong), "`pip install cpt` again in this environment")
    return Check("ok", "packages", "all there, in versions that fit")


def _extras() -> Check:
    missing = []
    for name, extra in _EXTRAS.items():
        try:
            version(name)
        except PackageNotFoundError:
            missing.append((name, extra))
    if not missing:
        return Check("ok", "extras", "fast, demo, eval")
    names = ", ".join(f"{name} (for `{extra}`)" for name, extra in missing)
    extras = ",".join(dict.fromkeys(extra for _, extra in missing))
    return Check("warn", "extras", f"not installed: {names}", f"`pip install 'cpt[{extras}]'` where you need them")
