"""The command `dilated-attention dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, as_path, registry, show
from .core.config import read_mapping
from .core.errors import ConfigError
from .core.explain import amount
from .dashboard import check_can_render, make_page


def dashboard(
    history: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="PATH", help="Runs that `bench --save` appended.", show_default=False),
    ] = None,
    counters: Annotated[
        Path | None,
        typer.Option(
            parser=as_path,
            metavar="PATH",
            help="A run's counters: attention.counters().to_dict() as JSON.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            parser=as_path,
            metavar="PATH",
            help="A TOML or JSON config file. Default: LongNet, 131,072 tokens.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(parser=as_path, metavar="PATH", help="The page.")] = Path("dashboard.html"),
    machine: Annotated[
        bool, typer.Option("--machine/--no-machine", help="Also the plan, the ring's costs and pictures of patterns.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write one page with all there is to see.

    The plan of this machine with every refusal, speed against the floor and against peers, history with regressions
    marked, memory, bytes on the wire, patterns, and a run's counters. The page needs no network and no server.
    """
    if config is not None and not machine:
        raise ConfigError("--config is what --machine plans; give no --no-machine with it")
    check_can_render(out, history, counters, config)
    data = make_page(
        out,
        history=history,
        counters=counters,
        config=None if config is None else read_mapping(config),
        registry=registry if machine else None,
    )
    show(f"{data['page']}: {amount(data['nbytes'], 'B')}", data, as_json=as_json)
