"""`cpt sample`: a continuation of a text by a checkpoint."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cpt.cli.flags import Json, note, result_json


def command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A run, its name, a stage, its checkpoint, or a Hugging Face folder.")
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to continue.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the text.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder with `tokenizer.json`.", show_default="the checkpoint's")
    ] = None,
    json: Json = False,
) -> int:
    """Print a continuation of TEXT, as it is made. Of a run the last trained stage is used, its newest checkpoint."""
    from cpt.cli.where import place
    from cpt.evaluate import sample

    options = sample.Sampling(tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, ignore_eos=ignore_eos)
    found = sample.find(place(checkpoint), tokenizer)
    if str(found.folder) != os.path.normpath(checkpoint):
        note(f"using `{found.folder}`")
    model = sample.Model(found)
    try:
        pieces = []
        if not json:
            sys.stdout.write(text)
        for piece in model.continuation(text, options):
            pieces.append(piece)
            if not json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if json:
            result_json({"checkpoint": str(found.folder), "text": text, "continuation": "".join(pieces)})
        else:
            sys.stdout.write("\n")
    finally:
        model.close()
    return 0
