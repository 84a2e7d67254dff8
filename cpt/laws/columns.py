"""What the columns of a table mean: which name stands for which quantity.

| quantity | names that are understood (upper or lower case; `-` and space as `_`) |
|---|---|
| run | `run`, `run_id`, `run_name` |
| n_params | `n_params`, `params`, `parameters`, `model_size`, `size`, `N`, ... [parameters] |
| tokens | `tokens`, `train_tokens`, `D`, ... [tokens of the training that the law is about] |
| step | `step`, `steps`, `iteration` |
| r_domain, r_general | `r_domain`, `r_d`, `domain_ratio`, ...; `r_general`, `r_g`, `general_ratio`, `replay`, ... |
| w_<corpus> | shares of several corpora |
| loss_domain, loss_general | `loss_domain`, `domain_loss`, `L_d`, ...; `loss_general`, ... [nats/token] |
| loss_<corpus>, loss | losses of several corpora, or one loss without a name |
| unique_<corpus>_tokens | distinct tokens of a corpus; `unique_tokens` with a lone `loss` |
| weight, eval_id, tokenizer, lr, schedule, domain, k1, k2 | as named |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cpt.base.errors import UsageError
from cpt.base.registry import nearest, unknown

NAMES: dict[str, tuple[str, ...]] = {
    "run": ("run", "run_id", "run_name", "experiment"),
    "n_params": (
        *("n_params", "num_params", "params", "parameters", "n_parameters", "num_parameters", "model_params"),
        *("non_embedding_params", "model_size", "size", "n"),
    ),
    "tokens": (
        "tokens",
        "n_tokens",
        "num_tokens",
        "train_tokens",
        "training_tokens",
        "tokens_seen",
        "total_tokens",
        "d",
    ),
    "step": ("step", "steps", "iteration", "iter"),
    "weight": ("weight", "row_weight"),
    "eval_id": ("eval_id", "validation_id", "eval_set", "validation_set"),
    "tokenizer": ("tokenizer", "tokenizer_hash"),
    "lr": ("lr", "learning_rate"),
    "schedule": ("schedule", "lr_schedule"),
    "domain": ("domain", "domain_name"),
    "k1": ("k1",),
    "k2": ("k2",),
    "r_domain": ("r_domain", "r_d", "domain_ratio", "domain_share", "ratio_domain", "share_domain", "domain_fraction"),
    "r_general": (
        *("r_general", "r_g", "general_ratio", "general_share", "ratio_general", "share_general", "general_fraction"),
        *("replay", "replay_share", "replay_ratio"),
    ),
    "loss_domain": ("loss_domain", "domain_loss", "l_d", "loss_d", "loss_new", "new_loss", "domain_val_loss"),
    "loss_general": ("loss_general", "general_loss", "l_g", "loss_g", "loss_old", "old_loss", "general_val_loss"),
    "loss": ("loss", "val_loss", "valid_loss", "validation_loss", "eval_loss", "final_loss"),
    "unique_tokens": ("unique_tokens", "unique"),
}
OFTEN = ("n_params", "tokens", "r_domain", "r_general", "loss_domain", "loss_general", "unique_tokens")
UNNAMED_RATIOS = ("r", "ratio", "share", "mixture_ratio")  # of which corpus? the likeliest silent mistake
_FAMILY = re.compile(r"(?:(w|loss)_(.+)|unique_(.+)_tokens)", re.IGNORECASE)


@dataclass(frozen=True)
class Meaning:
    """Which column holds which quantity.

    Args:
        columns: quantity (`n_params`, `w_web`, `loss_domain`, ...) to the name in the file.
        unused: names that stand for nothing.
        notes: names that were taken for something else than they say.
    """

    columns: Mapping[str, str]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def meaning(names: Iterable[str], given: Mapping[str, str] | None = None) -> Meaning:
    """The quantities that columns of these names hold.

    Args:
        names: as in the file.
        given: quantity to name, where a person says so.

    Raises:
        UsageError: `given` names a quantity or a column that is not there, or a ratio does not say of which corpus.
    """
    names = list(names)
    found = _given(names, given or {})
    spelled: dict[str, str] = {}
    for name in names:
        spelled.setdefault(_plain(name), name)
    for quantity, aliases in NAMES.items():
        if quantity not in found:
            free = [spelled[a] for a in aliases if a in spelled and spelled[a] not in found.values()]
            if free:
                found[quantity] = free[0]
    taken = set(found.values())
    for name in names:
        match = _FAMILY.fullmatch(name)
        if match and name not in taken:
            kind = match[1].lower() if match[1] else "unique"
            found[f"unique_{match[3]}_tokens" if kind == "unique" else f"{kind}_{match[2]}"] = name
    found, notes = _agree(found, given or {})
    _refuse_unnamed_ratio(spelled, found)
    renamed = [f"`{name}` as `{key}`" for key, name in found.items() if _plain(name) != _plain(key)]
    if renamed:
        notes.insert(0, "columns read: " + ", ".join(renamed))
    return Meaning(found, tuple(name for name in names if name not in found.values()), tuple(notes))


def meant(names: Iterable[str], found: Iterable[str]) -> dict[str, str]:
    """Quantities that no column holds, by the unused column that almost has their name."""
    held = set(found)
    if any(key.startswith(("r_", "w_")) for key in held):
        held |= {"r_domain", "r_general"}  # one share says the other
    lacking = {alias: key for key in OFTEN if key not in held for alias in NAMES[key] if len(alias) > 2}
    told: dict[str, str] = {}
    for name in names:
        near = nearest(_plain(name), [alias for alias in lacking if lacking[alias] not in told.values()])
        if near is not None and _plain(name) not in UNNAMED_RATIOS:
            told[name] = lacking[near]
    return told


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _given(names: list[str], given: Mapping[str, str]) -> dict[str, str]:
    for quantity, name in given.items():
        if quantity not in NAMES and not _FAMILY.fullmatch(quantity):
            if name in NAMES or _FAMILY.fullmatch(name):
                raise UsageError(
                    f"`columns` maps quantities to names in the file, and `{quantity}` is no quantity",
                    f"did you mean `columns={{{name}: {quantity}}}`?",
                )
            error = unknown("quantity", quantity, NAMES)
            raise UsageError(f"{error.message} in `columns`", *error.hints)
        if name not in names:
            error = unknown("column", name, names)
            raise UsageError(f"{error.message} in `columns`", *error.hints)
    return dict(given)


def _agree(found: dict[str, str], given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Two corpora or several: what is not of the kind is left out, with a note."""
    notes: list[str] = []
    ratios = [k for k in found if k in ("r_domain", "r_general")]
    shares = [k for k in found if k.startswith("w_")]
    if ratios and shares:
        left, kept = (ratios, shares) if any(k.startswith("w_") for k in given) else (shares, ratios)
        notes.append(f"shares are read from {_listed(kept)}; not used: {_listed(left)}")
        found = {k: v for k, v in found.items() if k not in left}
    pair = [k for k in ("loss_domain", "loss_general") if k in found]
    if not any(k.startswith("w_") for k in found) and pair:
        wanted = {*pair, *(k for k in given if k.startswith("loss"))}
        found = {k: v for k, v in found.items() if not k.startswith("loss") or k in wanted}
    elif any(k.startswith("loss_") for k in found) and "loss" not in given:
        found.pop("loss", None)
    return found, notes


def _refuse_unnamed_ratio(spelled: Mapping[str, str], found: Mapping[str, str]) -> None:
    if any(k.startswith(("r_", "w_")) for k in found):
        return
    for alias in UNNAMED_RATIOS:
        if alias in spelled and spelled[alias] not in found.values():
            name = spelled[alias]
            raise UsageError(
                f"column `{name}` does not say whose share it is",
                f"`columns={{r_domain: {name}}}` or `columns={{r_general: {name}}}` says so",
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)
