"""Runs every benchmark one after the other: `python -m benchmarks [NAME ...]`. Each prints its own table."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; gives 1 when one of them says that a target was missed."""
    known = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")]
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.stderr.write(f"error: no benchmark `{unknown[0]}`\n\nhint: known: {', '.join(known)}\n")
        return 2
    missed = 0
    for name in names or known:
        print(f"== {name}", flush=True)
        missed |= int(importlib.import_module(f"benchmarks.{name}").main([]) or 0)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
