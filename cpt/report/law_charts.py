"""Pictures of a fitted law, drawn by matplotlib: one small panel a picture, so that letters keep a readable size when a
page puts panels beside each other on a wide screen and below each other on a phone.

Colours are those of the report page; in an SVG that stands in a page they are names of its palette, so that it follows
a dark screen. Series differ by marker too. Names from files are plain text: no markup of matplotlib's is read in them.

Array suffixes: D draws, G points of a curve, R rows.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.files import write_atomic
from cpt.base.units import show_count
from cpt.laws.question import asked_size, asked_tokens, loss_along
from cpt.laws.result import LEVEL, Analysis, TargetFit
from cpt.laws.rows import Floats, points
from cpt.laws.table import DOMAIN
from cpt.report import show

SIZE = 4.7, 3.35  # [inches]
MOST_TARGETS = 6
MOST_LEVELS = 4  # token counts or sizes in one panel
MOST_PANELS = 3  # sizes
TEXT, DIM, RULE, PAPER = "#1c2024", "#5d6672", "#dfe3e8", "#ffffff"
COLOURS = ("#0b62b8", "#c2500a", "#13795b", "#a3307f", "#8a6d00", "#5b4bc4")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)), "-", "-")
_PALETTE = {TEXT: "var(--text)", DIM: "var(--dim)", RULE: "var(--rule)", PAPER: "var(--bg)"}
_PALETTE |= {colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One panel.

    Args:
        name: of its files, without suffix.
        group: pictures of one kind stand together.
        title: plain text, in the page and for those who cannot see the picture.
        svg: a whole SVG file.
        png: the same as pixels, on white.
    """

    name: str
    group: str
    title: str
    svg: str
    png: bytes

    @property
    def inline(self) -> str:
        """The SVG as it stands in a page: without its own head, in the page's letters and colours."""
        text = self.svg[self.svg.index("<svg") :]
        head, body = text[: text.index(">")], text[text.index(">") :]
        head = re.sub(r' (?:width|height)="[^"]*"', "", head)
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = body.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
        return head + re.sub("|".join(_PALETTE), lambda match: _PALETTE[match[0]], body)


def pictures(analysis: Analysis) -> list[Picture]:
    """All pictures that an analysis has something to show in."""
    import matplotlib as mpl

    style: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans"],
        "font.size": 10.0,
        "axes.edgecolor": RULE,
        "axes.labelcolor": DIM,
        "axes.labelsize": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "text.color": TEXT,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": DIM,
        "ytick.labelcolor": DIM,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "lines.linewidth": 1.7,
        "legend.frameon": False,
        "legend.fontsize": 9.0,
        "legend.labelcolor": TEXT,
    }
    found: list[Picture] = []
    with mpl.rc_context(style), np.errstate(all="ignore"):
        for name, group, title, draw in _panels(analysis):
            found.append(_drawn(_file_name(name, found), group, title, draw))
    return found


def write(drawn: Sequence[Picture], folder: Path) -> list[Path]:
    """Each picture as SVG and PNG in a folder."""
    written = []
    for picture in drawn:
        for suffix, data in (("svg", picture.svg), ("png", picture.png)):
            path = folder / f"{picture.name}.{suffix}"
            write_atomic(path, data)
            written.append(path)
    return written


Draw = Callable[[Any], None]


def _panels(analysis: Analysis) -> Iterator[tuple[str, str, str, Draw]]:
    """(name, group, title, drawing) of every panel."""
    fits = list(analysis.fits.values())[:MOST_TARGETS]
    curved = [f for f in fits if _has_curve(f)]
    if analysis.recommendation is not None and analysis.recommendation.ratio is not None:
        for f in curved:
            yield f"answer-{f.name}", "answer", f"{_loss(f)} at the run that is asked about", _answer(analysis, f)
    for size in _some(analysis.table.n_params, MOST_PANELS):
        of = f", {show_count(size)} parameters" if size is not None else ""
        for f in curved:
            if size is None or f.rows.n_params_R is None or _near(f.rows.n_params_R, size).any():
                some = _left_out(f, size)
                yield f"ratio-{f.name}", "ratio", f"{_loss(f)} against ratio{of}{some}", _ratio(f, size)
    for f in curved:
        if f.rows.tokens_R is not None and _depends_on_tokens(f):
            size = asked_size(analysis.table, analysis.settings)
            of = f", {show_count(size)} parameters" if size is not None else ""
            dots = "dots are measurements" if _here(f, size).any() else "nothing was measured at this size"
            title = f"{_loss(f)} over ratio and tokens{of}; {dots}"
            yield f"iso-{f.name}", "iso", title, _iso_ratio(analysis, f)
    for f in fits:
        if f not in curved and set(f.law.needs) == {"n_params", "tokens"}:
            yield f"tokens-{f.name}", "ratio", f"{_loss(f)} against tokens", _against_tokens(f)
            title = f"{_loss(f)} over size and tokens; dots are measurements"
            yield f"iso-{f.name}", "iso", title, _iso_size(f)
    for f in fits:
        yield f"residuals-{f.name}", "residuals", f"Residuals of the {_loss(f)}", _residuals(f)


def _drawn(name: str, group: str, title: str, draw: Draw) -> Picture:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.tick_params(length=0)
    draw(axes)
    with mpl.rc_context({"svg.hashsalt": name}):
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
    return Picture(name=name, group=group, title=title, svg=svg.getvalue(), png=png.getvalue())


def _answer(analysis: Analysis, f: TargetFit) -> Draw:
    answer, settings = analysis.recommendation, analysis.settings
    assert answer is not None and answer.ratio is not None
    ratio = answer.ratio
    size, tokens = asked_size(analysis.table, settings), asked_tokens(analysis.table, settings)
    low_share, high_share = _observed_ratios(f)

    def draw(axes: Any) -> None:
        x_G = _shares(f)
        if answer.usage == "limited" and answer.tokens is not None:
            x_G = x_G[x_G >= max(low_share, 0.005)]
            tokens_G = answer.tokens.value * ratio.value / x_G
            tokens_G = np.minimum(tokens_G, settings.budget or np.inf)
        else:
            tokens_G = np.full(len(x_G), 1.0 if tokens is None else tokens)
        loss_DG = loss_along(f, size)(_own(f, x_G), tokens_G)
        _curve(axes, x_G, loss_DG, 0)
        lines = {"limit": answer.limits.get(f.name), "base": answer.base.get(f.name)}
        known = [v for v in lines.values() if v is not None]
        known += [answer.losses[f.name].value] if f.name in answer.losses else []
        inside = (x_G >= low_share - 1e-9) & (x_G <= high_share + 1e-9)
        _frame(axes, np.concatenate([loss_DG[0, inside], known]), room=0.18)
        for (label, value), side in zip(lines.items(), ("bottom", "top"), strict=True):
            if value is not None:
                axes.axhline(value, color=DIM, linewidth=1.1, linestyle=(0, (4, 3)))
                above = side == "bottom"  # where the curve of a loss does not run
                axes.annotate(
                    f"{label} {value:.3f}",
                    (0.015 if above else 0.985, value),
                    (0, 2 if above else -2),
                    textcoords="offset points",
                    ha="left" if above else "right",
                    va=side,
                    color=DIM,
                    fontsize=9,
                )
        if math.isfinite(ratio.low):
            axes.axvspan(ratio.low, ratio.high, color=COLOURS[1], alpha=0.16, linewidth=0)
        axes.axvline(ratio.value, color=COLOURS[1], linewidth=1.5)
        axes.annotate(
            f"r_domain {ratio.value:.3f}",
            (ratio.value, 1),
            (4 if ratio.value < 0.62 else -4, -1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if ratio.value < 0.62 else "right",
            va="top",
            color=COLOURS[1],
        )
        for left, right in ((-1, low_share), (high_share, 2)):  # nothing was measured there
            axes.axvspan(left, right, color=DIM, alpha=0.1, linewidth=0)
        _ratio_axis(axes)

    return draw


def _ratio(f: TargetFit, size: float | None) -> Draw:
    rows = f.rows
    here = _here(f, size)

    def draw(axes: Any) -> None:
        levels = _some(rows.tokens_R[here], MOST_LEVELS) if rows.tokens_R is not None else [None]
        along, x_G = loss_along(f, size), _shares(f)
        if not _depends_on_tokens(f):
            _curve(axes, x_G, along(_own(f, x_G), np.full(len(x_G), levels[-1] or 1.0)), 0)
        handles = []
        for i, tokens in enumerate(levels):
            if tokens is not None and _depends_on_tokens(f):
                _curve(axes, x_G, along(_own(f, x_G), np.full(len(x_G), tokens)), i)
            at = here if tokens is None or rows.tokens_R is None else here & _near(rows.tokens_R, tokens)
            assert rows.share_R is not None
            label = "measured" if tokens is None else f"{show_count(tokens)} tokens"
            handles.append(_dots(axes, _own(f, rows.share_R[at]), rows.loss_R[at], i, label))
        _frame(axes, rows.loss_R[here])
        _ratio_axis(axes)
        _legend(axes, handles)

    return draw


def _iso_ratio(analysis: Analysis, f: TargetFit) -> Draw:
    rows, size = f.rows, asked_size(analysis.table, analysis.settings)
    assert rows.tokens_R is not None and rows.share_R is not None
    share_R, tokens_R = rows.share_R, rows.tokens_R

    def draw(axes: Any) -> None:
        low, high = _observed_ratios(f)
        asked, answer = asked_tokens(analysis.table, analysis.settings), analysis.recommendation
        if answer is not None and answer.ratio is not None:
            low, high = min(low, answer.ratio.value), max(high, answer.ratio.value)
        x_G = np.linspace(low, high, 81)
        t_G = np.geomspace(tokens_R.min(), max(tokens_R.max(), asked or 0.0), 81)
        x_TG, t_TG = np.meshgrid(x_G, t_G)
        loss_TG = loss_along(f, size)(_own(f, x_TG.ravel()), t_TG.ravel())[0].reshape(x_TG.shape)
        _contours(axes, x_TG, t_TG, loss_TG)
        here = _here(f, size)
        if here.any():  # a line without points would claim room below the axes
            axes.plot(_own(f, share_R[here]), tokens_R[here], ".", color=TEXT, markersize=3.5, clip_on=False)
        if answer is not None and answer.ratio is not None and answer.tokens is not None:
            axes.plot(
                [answer.ratio.value],
                [answer.tokens.value],
                "*",
                color=COLOURS[1],
                markeredgecolor=PAPER,
                markersize=15,
                clip_on=False,
                zorder=5,
            )
        axes.set_xlabel("domain share r_domain")
        _count_axis(axes, "y", "tokens")
        _fill(axes, x_G, t_G)

    return draw


def _against_tokens(f: TargetFit) -> Draw:
    rows = f.rows
    assert rows.n_params_R is not None and rows.tokens_R is not None
    n_params_R, tokens_R = rows.n_params_R, rows.tokens_R

    def draw(axes: Any) -> None:
        handles = []
        t_G = np.geomspace(tokens_R.min(), tokens_R.max(), 121)
        shown = np.zeros(len(rows), bool)
        for i, size in enumerate(_some(n_params_R, MOST_LEVELS)):
            assert size is not None
            here = np.abs(np.log(n_params_R / size)) < 0.1
            shown |= here
            _curve(axes, t_G, f.loss(points(n_params=size, tokens=t_G)), i)
            handles.append(_dots(axes, tokens_R[here], rows.loss_R[here], i, f"{show_count(size)} parameters"))
        _frame(axes, rows.loss_R[shown])
        axes.set_ylabel("loss [nats/token]")
        _count_axis(axes, "x", "tokens")
        _legend(axes, handles)

    return draw


def _iso_size(f: TargetFit) -> Draw:
    rows = f.rows
    assert rows.n_params_R is not None and rows.tokens_R is not None
    n_params_R, tokens_R = rows.n_params_R, rows.tokens_R

    def draw(axes: Any) -> None:
        n_G = np.geomspace(n_params_R.min(), n_params_R.max(), 81)
        t_G = np.geomspace(tokens_R.min(), tokens_R.max(), 81)
        n_TG, t_TG = np.meshgrid(n_G, t_G)
        loss_TG = f.loss(points(n_params=n_TG.ravel(), tokens=t_TG.ravel()))[0].reshape(n_TG.shape)
        _contours(axes, n_TG, t_TG, loss_TG)
        axes.plot(n_params_R, tokens_R, ".", color=TEXT, markersize=3.5, clip_on=False)
        _count_axis(axes, "x", "parameters")
        _count_axis(axes, "y", "tokens")
        _fill(axes, n_G, t_G)

    return draw


def _residuals(f: TargetFit) -> Draw:
    log = f.fit.scale == "log"

    def draw(axes: Any) -> None:
        residual_R = f.fit.residuals_R * (100 if log else 1)
        loss_R = f.fit.predict(f.rows)
        far = np.zeros(len(loss_R), bool)
        far[[o.row for o in f.outliers]] = True
        axes.axhline(0, color=DIM, linewidth=1.1)
        handles = [_dots(axes, loss_R[~far], residual_R[~far], 0, "rows")]
        if far.any():
            handles.append(_dots(axes, loss_R[far], residual_R[far], 1, "far off"))
            _legend(axes, handles)
        axes.set_xlabel("predicted loss [nats/token]")
        axes.set_ylabel("predicted - measured [%]" if log else "predicted - measured [nats/token]")

    return draw


def _has_curve(f: TargetFit) -> bool:
    """Whether the loss can be drawn over one ratio."""
    return (
        f.rows.share_R is not None and len(f.rows.corpora) == 2 and not {"k1", "k2", "unique_tokens"} & set(f.law.needs)
    )


def _depends_on_tokens(f: TargetFit) -> bool:
    tokens_R = f.rows.tokens_R
    if tokens_R is None or tokens_R.min() == tokens_R.max():
        return False
    size = None if f.rows.n_params_R is None else float(f.rows.n_params_R[0])
    two = loss_along(f, size)(np.full(2, 0.5), np.array([tokens_R.min(), tokens_R.max()]))[0]
    return bool(abs(two[0] - two[1]) > 1e-9)


def _own(f: TargetFit, x_G: Floats) -> Floats:
    """Domain share to share of the measured corpus, or back."""
    return x_G if f.name == _axis_corpus(f) else 1 - x_G


def _shares(f: TargetFit) -> Floats:
    """Domain shares to draw a curve over: where the law holds for the measured corpus."""
    lowest = f.lowest_share or 0.0
    return _own(f, np.linspace(lowest, 1, 201)[(1 if lowest else 0) :])


def _axis_corpus(f: TargetFit) -> str:
    return DOMAIN if DOMAIN in f.rows.corpora else f.rows.corpora[0]


def _observed_ratios(f: TargetFit) -> tuple[float, float]:
    assert f.rows.share_R is not None
    x_R = _own(f, f.rows.share_R)
    return float(x_R.min()), float(x_R.max())


def _some(values_R: Floats | None, most: int) -> Sequence[float | None]:
    """Up to so many of the distinct values, the smallest and the largest among them."""
    if values_R is None or not len(values_R):
        return [None]
    distinct = np.unique(values_R)
    wanted = np.geomspace(distinct[0], distinct[-1], min(most, len(distinct)))
    return sorted({float(distinct[np.abs(np.log(distinct / w)).argmin()]) for w in wanted})


def _here(f: TargetFit, size: float | None) -> Any:
    """The rows of one model size; all without a size."""
    rows = f.rows
    return np.ones(len(rows), bool) if size is None or rows.n_params_R is None else _near(rows.n_params_R, size)


def _left_out(f: TargetFit, size: float | None) -> str:
    """That a picture over ratios shows some token counts only; empty when it shows all."""
    if f.rows.tokens_R is None:
        return ""
    tokens_R = f.rows.tokens_R[_here(f, size)]
    shown, all_of_them = len(_some(tokens_R, MOST_LEVELS)), len(np.unique(tokens_R))
    return f"; {shown} of {all_of_them} token counts are shown" if shown < all_of_them else ""


def _fill(axes: Any, x_G: Floats, y_G: Floats) -> None:
    """No empty band around what is filled."""
    for which, grid in (("x", x_G), ("y", y_G)):
        if grid[0] < grid[-1]:
            getattr(axes, f"set_{which}lim")(grid[0], grid[-1])


def _near(values_R: Floats, value: float) -> Any:
    return np.abs(np.log(values_R / value)) < 0.01


def _curve(axes: Any, x_G: Floats, loss_DG: Floats, i: int) -> None:
    """The fit as a line, the draws as a band."""
    i %= len(COLOURS)
    if len(loss_DG) > 1:
        low_G, high_G = np.nanquantile(loss_DG[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        axes.fill_between(x_G, low_G, high_G, color=COLOURS[i], alpha=0.18, linewidth=0)
    axes.plot(x_G, loss_DG[0], color=COLOURS[i], linestyle=DASHES[i])


def _dots(axes: Any, x_R: Floats, y_R: Floats, i: int, label: str) -> Any:
    i %= len(COLOURS)
    return axes.plot(
        x_R,
        y_R,
        MARKERS[i],
        color=COLOURS[i],
        markersize=5,
        markeredgecolor=PAPER,
        markeredgewidth=0.5,
        linestyle="none",
        label=label,
        zorder=4,
    )[0]


def _contours(axes: Any, x: Floats, y: Floats, loss: Floats) -> None:
    """Filled levels, whose lines carry their loss."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(False)
    low, high = np.nanquantile(loss, [0.0, 0.98])
    levels = MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10]).tick_values(low, max(high, low + 1e-6))
    axes.contourf(x, y, loss, levels=levels, cmap="cividis_r", extend="both", alpha=0.55)
    lines = axes.contour(x, y, loss, levels=levels, colors=[TEXT], linewidths=0.8)
    digits = next((d for d in range(5) if abs(np.diff(levels)[0] - round(np.diff(levels)[0], d)) < 1e-9), 4)
    axes.clabel(lines, fmt=lambda v: f"{v:.{digits}f}", fontsize=9, inline_spacing=3)


def _ratio_axis(axes: Any) -> None:
    axes.set_xlim(-0.015, 1.015)
    axes.set_xlabel("domain share r_domain")
    axes.set_ylabel("loss [nats/token]")


def _count_axis(axes: Any, which: str, label: str) -> None:
    """A logarithmic axis with counts as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}label")(label)
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    wide = high > 30 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 3.0) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0)


def _short(value: float) -> str:
    """A round count: 10B instead of 10.0B."""
    text = show_count(value)
    return re.sub(r"\.?0+(?=[KMBT]$)", "", text) if "." in text else text


def _frame(axes: Any, values: Floats, room: float = 0.08) -> None:
    """The y axis around what was measured; curves may run out of the picture."""
    values = values[np.isfinite(values)]
    if len(values):
        span = max(float(values.max() - values.min()), 1e-3 * abs(float(values.max())))
        axes.set_ylim(values.min() - room * span, values.max() + (room + 0.06) * span)


def _legend(axes: Any, handles: Sequence[Any]) -> None:
    axes.figure.legend(
        handles, [h.get_label() for h in handles], loc="outside upper left", ncols=2, handletextpad=0.2, borderpad=0
    )


def _loss(f: TargetFit) -> str:
    return "loss" if f.name == "loss" else f"{show.plain(f.name, 32)} loss"


def _file_name(name: str, taken: Sequence[Picture]) -> str:
    """A name for files from one of unknown origin, not taken yet."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
    names = {p.name for p in taken}
    return next(n for n in (plain, *(f"{plain}-{i}" for i in range(2, 1000))) if n not in names)
