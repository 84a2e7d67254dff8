"""The table at the end of a run: what was gained and what was forgotten, by source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpt.evaluate import Account
from cpt.report import show
from cpt.report.history import read_run

VERDICTS = {"gained": "gained", "forgotten": "forgotten", "unchanged": "within noise"}


def final_table(run_dir: str | Path) -> str:
    """What a run gained and forgot, as text for a terminal; ends with a newline."""
    return table(read_run(Path(run_dir)).account)


def table(account: Account) -> str:
    """An account as text."""
    if not account.changes:
        lines = [f"nothing to compare: {account.problem or 'only one measurement so far'}"]
        return "\n".join([*lines, *_beside(account)]) + "\n"
    last = account.rows[-1]
    lines = [f"validation loss after `{last.label}`, against {account.before}", ""]
    head = ["source", "", "before", "after", "change", "   change", ""]
    rows = [
        [
            show.plain(c.domain, 32),
            c.role,
            show.loss(c.before.loss),
            show.loss(c.after.loss),
            show.change(c.nats),
            show.change(c.bits_per_byte),
            VERDICTS[c.verdict],
        ]
        for c in account.changes
    ]
    lines += _with_units(aligned([head, *rows], right=(2, 3, 4, 5)))
    measures = summary(account)
    if measures:
        lines += ["", *aligned([[name, value] for name, value, _ in measures])]
    return "\n".join([*lines, *_beside(account)]) + "\n"


def _beside(account: Account) -> list[str]:
    """Losses that were measured but are no link of the chain: evaluate stages, releases, other branches."""
    if not account.beside:
        return []
    sources = list(dict.fromkeys(source for row in account.beside for source in row.losses))
    rows = [
        [show.plain(row.label, 80), *(show.loss(x.loss if (x := row.losses.get(s)) else None) for s in sources)]
        for row in account.beside
    ]
    head = ["also measured [nats/token]", *(show.plain(s, 32) for s in sources)]
    return ["", *aligned([head, *rows], right=range(1, len(head)))]


def _with_units(lines: list[str]) -> list[str]:
    """The table with a line above its head: what is in nats/token and what in bits/byte."""
    head = lines[0]
    begin, middle = head.rindex("before"), head.index("change", head.rindex("after")) + len("change")
    units = " nats/token ".center(middle - begin, "-")
    return [" " * begin + units + "bits/byte".rjust(len(head) - middle), *lines]


def summary(account: Account) -> list[tuple[str, str, str]]:
    """Measures over all sources: (name, value, what it means)."""
    found: list[tuple[str, str, str]] = []
    matrix = account.matrix
    if matrix is not None:
        backward, forward, forgetting = (
            matrix.backward_transfer(),
            matrix.forward_transfer(),
            matrix.forgetting_of_older(),
        )
        if forgetting.value is not None:
            found.append(
                (
                    "forgetting",
                    f"{show.change(forgetting.value)} nats/token",
                    f"last loss minus best earlier, over {_sources(forgetting.over)} known before; above 0 = forgotten",
                )
            )
        if backward.value is not None:
            found.append(
                (
                    "backward transfer",
                    f"{show.change(backward.value)} nats/token",
                    f"score at the end minus right after learning, over {_sources(backward.over)}; below 0 = forgotten",
                )
            )
        if forward.value is not None:
            found.append(
                (
                    "forward transfer",
                    f"{show.change(forward.value)} nats/token",
                    f"score right before learning minus at the start, over {_sources(forward.over)}; above 0 = helped",
                )
            )
        fuar = matrix.fuar()
        if fuar is not None:
            found.append(("FUAR", f"{fuar:.2f}", "forgotten for each unit gained; lower is better"))
    for stage, domains in account.gaps.items():
        for domain, gap in domains.items():
            if gap.is_gap:
                name = f"stability gap of {show.plain(domain, 32)} in {show.plain(stage, 32)}"
                found.append(
                    (name, gap.text(), "how far the loss rose in the stage, and when it was back [nats/token]")
                )
    return found


def _sources(count: int) -> str:
    return "1 source" if count == 1 else f"{count} sources"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as lines with columns of equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
