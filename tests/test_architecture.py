"""The import direction of the parts, read from the source, and what a fast command may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "cpt"
ORDER = ["base", "plan", "data", "laws", "schedules", "methods", "engine", "checkpoint", "evaluate", "launch", "stages"]
ORDER += ["report", "doctor", "config", "cli"]
RANK = {name: i for i, name in enumerate(ORDER)} | dict.fromkeys(("worker", "__main__"), len(ORDER))
FILES = sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, whether it is imported when the file is loaded) of every import; `if TYPE_CHECKING` does not load."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, at_top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
                found.append((child.module, at_top))
                found.extend((f"{child.module}.{alias.name}", at_top) for alias in child.names)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, at_top and not inside and not typing_only)

    visit(tree, True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_part_imports_only_from_its_left(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    wrong = []
    for module, at_top in imports(ast.parse(path.read_text())):
        pieces = module.split(".")
        if pieces[0] == "cpt" and len(pieces) > 1 and pieces[1] in RANK:
            other = pieces[1]
            if other != part and RANK[other] >= RANK[part]:
                wrong.append(f"{part} imports {module}, which is to its right")
        if pieces[0] in ("torch", "megatron", "transformers") and part != "engine" and at_top:
            wrong.append(f"{module} at the top of a file outside engine")
        if pieces[0] == "hydra" and part != "config":
            wrong.append("Hydra is imported outside config")
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_has_a_name_that_says_nothing(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "common", "misc", "manager", "handler"}


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


def test_help_loads_nothing_heavy() -> None:
    code = "from cpt.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert not loaded_by(code) & {"torch", "megatron", "hydra", "omegaconf", "numpy", "pyarrow", "scipy", "matplotlib"}


def test_plan_loads_no_torch() -> None:
    code = "from cpt.cli import main\ntry:\n    main(['plan', 'recipe=demo'])\nexcept SystemExit:\n    pass"
    assert not loaded_by(code) & {"torch", "megatron", "transformers"}


def test_a_plain_pytest_run_collects_every_folder_of_tests() -> None:
    """pytest passes over folders called `dist` unless it is told not to."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(here / "dist")]
    done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True)
    from_above = subprocess.run(
        [*command[:-1], "--ignore-glob=*/unit/*", "--ignore-glob=*/cli/*"],
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert "test_kill_resume.py" in done.stdout and "test_kill_resume.py" in from_above.stdout
