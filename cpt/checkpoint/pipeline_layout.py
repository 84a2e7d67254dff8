"""How many layers each pipeline part holds, as a person writes it.

3,5,4            of every part; chunk 0 of all pipeline ranks first, then chunk 1, ...
first=3,last=4   of the first and the last rank; the ranks between share the rest equally
Ett|ttt*2|tL     Megatron's own: E embedding, t layer, L loss, `|` between parts, `*n` repeats, `(tt|)*3` too
"""

from __future__ import annotations

import re

from cpt.base.errors import UsageError
from cpt.checkpoint.layouts import wrong_parts

FORMS = "`3,5,4`, `first=3,last=4`, `Ett|ttt|tL`"
_MOST = 1_000_000  # characters of a layout written out


def parse(text: str, *, pp: int, vp: int, num_layers: int) -> tuple[int, ...]:
    """Layers of each part, chunk 0 of all pipeline ranks first.

    Raises:
        UsageError: not one of the forms, or the parts or layers are not as many as they must be.
    """
    given = "".join(text.split())
    if re.fullmatch(r"\d{1,6}(,\d{1,6})*", given):
        counts = tuple(int(n) for n in given.split(","))
    elif "=" in given:
        counts = _ends(given, pp, vp, num_layers)
    elif re.fullmatch(r"[EtL|*\d(),]+", given):
        written = _written_out(given)
        if not re.fullmatch(r"E[t|]*L", written):
            raise UsageError(f"the pipeline layout `{text}` needs one `E` at its start and one `L` at its end")
        counts = tuple(part.count("t") for part in written.split("|"))
    else:
        raise UsageError(f"`{text}` is not a pipeline layout; accepted forms: {FORMS}")
    if len(counts) != pp * vp or sum(counts) != num_layers:
        raise wrong_parts(f"the pipeline layout `{text}`", counts, pp, vp, num_layers)
    return counts


def _ends(text: str, pp: int, vp: int, num_layers: int) -> tuple[int, ...]:
    found: dict[str, int] = {}
    for pair in text.split(","):
        match = re.fullmatch(r"(first|last)=(\d{1,6})", pair)
        if match is None or match[1] in found:
            raise UsageError(f"`{text}` is not a pipeline layout; accepted forms: {FORMS}")
        found[match[1]] = int(match[2])
    between = pp - len(found)
    rest = num_layers - sum(found.values())
    if rest < 0:
        raise UsageError(f"`{text}` asks for {sum(found.values())} layers, the model has {num_layers}")
    if between < 0 or (rest and not between) or (between and rest % between):
        raise UsageError(
            f"`{text}` leaves {rest} of {num_layers} layers for {max(0, between)} ranks: they cannot be shared equally"
        )
    each = rest // between if between else 0
    ranks = [found["first"]] if "first" in found else []
    ranks += [each] * between
    ranks += [found["last"]] if "last" in found else []
    uneven = next((n for n in ranks if n % vp), None)
    if uneven is not None:
        raise UsageError(f"`{text}` gives a rank {uneven} layers, which vp {vp} does not divide")
    return tuple(n // vp for _ in range(vp) for n in ranks)


def _written_out(text: str) -> str:
    """A layout of Megatron without its repetitions."""
    text = text.replace(",", "")
    for pattern in (r"\(([^()]*)\)\*(\d{1,5})", r"([EtL|])\*(\d{1,5})"):
        while match := re.search(pattern, text):
            if len(match[1]) * int(match[2]) + len(text) > _MOST:
                raise UsageError(f"the pipeline layout repeats too often: `{match[0]}`")
            text = text[: match.start()] + match[1] * int(match[2]) + text[match.end() :]
    if re.search(r"[^EtL|]", text):
        raise UsageError(f"`{text[:60]}` is not a pipeline layout; accepted forms: {FORMS}")
    return text
