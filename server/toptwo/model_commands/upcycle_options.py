"""What `toptwo model upcycle` can be told. Without torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class UpcycleOptions:
    """router: None for ridge where there are domains. experts: None for one per domain, or 8."""

    experts: Annotated[
        int | None,
        typer.Option(min=1, max=1024, metavar="N", help="How many (default: 8, or one per domain)."),
    ] = None
    top_k: Annotated[int, typer.Option(min=1, metavar="N", help="How many of them a token visits.")] = 2
    router: Annotated[
        str | None,
        typer.Option(metavar="ridge|random", help="How tokens are sent (default: ridge with domains)."),
    ] = None
    domains: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of texts for each expert, to fit routers on.")
    ] = None
    tokens: Annotated[int, typer.Option(min=1280, metavar="N", help="Tokens of each domain.")] = 4096
    check: Annotated[bool, typer.Option(help="Compare the two on a text, in float32.")] = True
