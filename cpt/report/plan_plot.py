"""The lr over all stages, drawn with plain characters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cpt.plan.types import RunPlan
from cpt.report import show

HEIGHT = 13  # odd: the middle line is half the highest lr
SMALLEST = 40  # columns


def lr_plot(plan: RunPlan, curves: Mapping[str, Callable[[int], float]], columns: int) -> str:
    """The lr by step, stage after stage in the order in which they are done.

    Args:
        plan: whose train stages are drawn, without the proxies of laws.
        curves: by stage, its lr as a function of its step.
        columns: width of the terminal.
    """
    trains = {n: s.train for n, s in plan.stages.items() if s.train is not None and s.group is None}
    steps = sum(t.steps for t in trains.values())
    if not steps:
        return ""
    top = max(t.lr.points[1] for t in trains.values())
    label = len(show.lr(top))
    width = max(SMALLEST, min(columns, 120) - label - 3)
    grid = [[" "] * width for _ in range(HEIGHT)]
    names: list[tuple[int, str]] = []
    done = 0
    for name, train in trains.items():
        first, last = done * width // steps, max(done * width // steps + 1, (done + train.steps) * width // steps)
        names.append((first, name))
        if first:
            for row in grid:
                row[min(first, width - 1)] = ":"
        for column in range(first, min(last, width)):
            a = (column - first) * train.steps // (last - first)
            b = max(a + 1, (column - first + 1) * train.steps // (last - first))
            values = [curves[name](s) for s in _some(a, min(b, train.steps))]
            low, high = (round(v / top * (HEIGHT - 1)) if top else 0 for v in (min(values), max(values)))
            for level in range(low, high + 1):
                grid[HEIGHT - 1 - level][column] = "*"
        done += train.steps
    lines = []
    for i, row in enumerate(grid):
        value = top * (HEIGHT - 1 - i) / (HEIGHT - 1)
        axis = show.lr(value) if i in (0, (HEIGHT - 1) // 2, HEIGHT - 1) else ""
        lines.append(f"{axis:>{label}} |{''.join(row)}".rstrip())
    lines.append(" " * label + " +" + "-" * width)
    lines += [" " * label + "  " + line for line in _names(names, width)]
    return "\n".join(lines) + "\n"


def _some(a: int, b: int, most: int = 32) -> list[int]:
    """Up to so many steps from a to before b, both ends among them."""
    count = min(most, b - a)
    return sorted({a + i * (b - 1 - a) // max(1, count - 1) for i in range(count)})


def _names(names: list[tuple[int, str]], width: int) -> list[str]:
    """Stage names under the start of their part; names that would overlap go one line down."""
    lines: list[str] = []
    for column, name in names:
        text = show.plain(name, 24)
        column = max(0, min(column, width - len(text)))
        for i, line in enumerate(lines):
            if len(line) < column:
                lines[i] = line.ljust(column) + text
                break
        else:
            lines.append(" " * column + text)
    return lines
