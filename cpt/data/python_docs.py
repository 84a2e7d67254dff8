"""Documentation of Python's standard library and of sympy as text, taken from the source files on this machine.

Files are parsed, not imported. Python's help topics come from `pydoc_data/topics.py`. Licences: PSF-2.0 and
BSD-3-Clause; the text is read where it lies and nothing is copied into a package.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Not documentation, or not of Python: tests, the grammar tables of lib2to3, installed packages, compiled files.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}
_LEFT_OUT |= {"idlelib", "pydoc_data", "ensurepip", "config", "lib-dynload"}
_ALONE = 500  # a class or function with at least so many characters is a document of its own


def stamp() -> Any:
    """Which documentation it is: versions of Python and sympy."""
    try:
        sympy = version("sympy")
    except PackageNotFoundError:
        sympy = None
    return ["python_docs", 1, list(sys.version_info[:3]), sympy]


def documents() -> Iterator[tuple[str, str]]:
    """Documents as (id, text): help topics, then each module and each well documented class or function."""
    library = Path(sysconfig.get_path("stdlib"))
    yield from _topics(library / "pydoc_data" / "topics.py")
    for name, root in (("", library), ("sympy", _package("sympy"))):
        if root is not None:
            for path in sorted(root.rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                if not _LEFT_OUT.intersection(parts) and not any(p.startswith("config-") for p in parts):
                    module = ".".join((name, *parts) if name else parts).removesuffix(".__init__")
                    yield from _module(module, path)


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return None  # the library ships a few files that are broken on purpose


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    tree = _parse(path)
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield f"python/topics/{name}", text.strip()


def _module(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """The documents of one module: itself with its small parts, then the large parts."""
    tree = _parse(path)
    if tree is None:
        return
    head = inspect.cleandoc(ast.get_docstring(tree, clean=False) or "")
    small, large = [f"{module}\n\n{head}"] if head else [], []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = "\n\n".join(_object(node, module))
            if len(text) >= _ALONE:
                large.append((f"{module}.{node.name}", text))
            elif text:
                small.append(text)
    if small:
        yield module, "\n\n".join(small)
    yield from large


def _object(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> Iterator[str]:
    """A class or function and what is in it, where they have docstrings: dotted name with arguments, docstring."""
    name = f"{owner}.{node.name}"
    text = ast.get_docstring(node, clean=True)
    if text:
        kind = "class " if isinstance(node, ast.ClassDef) else ""
        arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
        yield f"{kind}{name}{arguments}\n{text}"
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _object(child, name)
