"""`cpt lineage CKPT|RUN`: the chain of a checkpoint back to its base model."""

from __future__ import annotations

from typing import Annotated

import typer

from cpt.cli.flags import Json, result, result_json

Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT|RUN", help="Checkpoint, export, stage or run folder, or the name of a run.")
]


def command(checkpoint: Checkpoint, json: Json = False) -> None:
    """The chain of a checkpoint's parents back to the base model, with tokens, mixture, lrs and losses at each link."""
    from cpt.report.lineage import chain, find, lineage_json, lineage_text

    links = chain(find(checkpoint))
    if json:
        result_json(lineage_json(links))
    else:
        result(lineage_text(links))
