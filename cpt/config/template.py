"""The text of a new recipe that inherits from another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpt.config.compose import compose, recipe_folders
from cpt.config.read import UNFILLED
from cpt.config.schema import node_at


def new_recipe(name: str, recipe: str, parent: Path) -> str:
    """A short commented recipe.

    Args:
        name: of the new recipe.
        recipe: that it inherits from, as typed.
        parent: that recipe's file.
    """
    config = compose([f"recipe={recipe}"]).config
    base = parent.stem if parent.parent in [f.resolve() for f in recipe_folders()] else str(parent)
    lines = [
        f"# {name}: what `{recipe}` does, on my own data",
        "#",
        f"# What is not here comes from `{base}`; `cpt recipes show {name}` lists every key with its origin.",
        f"defaults: [{base}, _self_]",
        "",
    ]
    unfilled = list(_unfilled(config, ()))
    if unfilled:
        lines += ["# Yours to give:", *_tree({p: _example(p) for p in unfilled}), ""]
    lines += ["# Often changed:", *_commented(config)]
    return "\n".join(lines) + "\n"


def _unfilled(value: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    if value == UNFILLED:
        return [path]
    if isinstance(value, dict):
        return [found for key, below in value.items() for found in _unfilled(below, (*path, key))]
    return []


def _example(path: tuple[str, ...]) -> str:
    return "???   # for example " + (getattr(node_at(path), "refill", "") or "...")


def _tree(values: dict[tuple[str, ...], str], depth: int = 0) -> list[str]:
    """Dotted keys as nested YAML."""
    lines: list[str] = []
    for head in dict.fromkeys(path[0] for path in values):
        below = {path[1:]: text for path, text in values.items() if path[0] == head}
        indent = "  " * depth
        if () in below:
            lines.append(f"{indent}{head}: {below[()]}")
        else:
            lines += [f"{indent}{head}:", *_tree(below, depth + 1)]
    return lines


def _commented(config: dict[str, Any]) -> list[str]:
    """The length, mixture and peak of each train stage, commented out."""
    lines = ["# stages:"]
    for name, stage in (config.get("stages") or {}).items():
        if not isinstance(stage, dict) or stage.get("kind", "train") != "train":
            continue
        lines.append(f"#   {name}:")
        for key in ("tokens", "mixture", "replay", "lr"):
            if key in stage:
                lines.append(f"#     {key}: {_flow(stage[key])}")
    return lines


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) and "${" in value else str(value)
