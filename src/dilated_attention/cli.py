"""The command `dilated-attention`.

Data goes to stdout, diagnostics to stderr. `_STATUSES` are the exit statuses. torch is imported only by the commands
that need a device.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
import typer.core

from .cli_bench import bench
from .cli_dashboard import dashboard
from .cli_pattern import pattern_app
from .console import CONTEXT, FAILED, AsJson, as_path, given, registry, show
from .core.config import named_values, read_mapping
from .core.errors import (
    ConfigError,
    DilatedAttentionError,
    NoBackendError,
    PatternFileError,
    UnsafePathError,
)
from .core.version import VERSION
from .pattern_flags import DilationRates, Kind, Parameters, SegmentLengths, pattern_of
from .report import (
    backends_data,
    backends_text,
    doctor_data,
    doctor_text,
    plugins_data,
    plugins_text,
    progress_bar,
)

if TYPE_CHECKING:
    from .core.plan import AttentionPlan
    from .registry.discovery import Registry

_STATUSES: Final = (
    "Exit status: 0 done; 1 a check or a measurement failed, `pattern list` or `pattern verify` could not read a file, "
    "a plugin broke, or stdout could not be written; 2 usage: options, configurations, other places that cannot be "
    "read or written; 3 no backend fits; 4 a pattern file that is bad, unsafe or missing, or does not fit."
)
_MOST_PLANNED: Final = 1 << 26  # tokens; at 1 << 32 LongNet's plan takes minutes, and its ranks' costs a second
_EXIT: Final[dict[type[DilatedAttentionError], int]] = {
    ConfigError: 2,
    NoBackendError: 3,
    PatternFileError: 4,
    UnsafePathError: 4,
}


class _Commands(typer.core.TyperGroup):
    """The commands, whose errors about a value show it: releases of typer that check by pydantic leave it out."""

    def invoke(self, ctx: Any) -> Any:
        """As the base class, which reads the options of a command here."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if details := getattr(error.__cause__, "errors", None):
                error.message += f", got {details()[0]['input']!r}"
            raise


app = typer.Typer(
    name="dilated-attention",
    cls=_Commands,
    help="Exact attention for long sequences: what this machine can run, and why.",
    epilog=_STATUSES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: boxes cut the names of options on a narrow terminal
    context_settings=CONTEXT,
)


def main() -> None:
    """Run the command line and exit with its status; errors that users can mend are one message, no traceback."""
    try:
        app(prog_name="dilated-attention")
    except DilatedAttentionError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(next((code for kind, code in _EXIT.items() if isinstance(error, kind)), FAILED))
    except OSError as error:  # a disk that is full, say
        typer.echo(f"error: {error}", err=True)
        _forget_stdout()
        sys.exit(FAILED)


def _forget_stdout() -> None:
    """What could not be written is not tried again, with a traceback, when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[Path, typer.Option(parser=as_path, metavar="PATH", help="Folder for the pictures.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: as many as fit into a minute.")] = None,
    as_json: AsJson = False,
) -> None:
    """See it work: explain, measure, train, draw.

    Explains this machine, measures against dense attention, trains a small model and draws what it did. Takes about
    two minutes on two CPU cores and needs no network.
    """
    from .demo import run

    run(output, steps=steps, json_output=as_json)


@app.command()
def backends(as_json: AsJson = False) -> None:
    """List the backends and what each supports."""
    found = registry()
    show(backends_text(found), backends_data(found), as_json=as_json)


@app.command()
def plugins(as_json: AsJson = False) -> None:
    """List the plugins, and what is wrong with any.

    A plugin is a module or object behind an entry point of the group `dilated_attention`. One that is broken is named
    with its distribution, version and cause, and hurts nothing else.
    """
    found = registry()
    show(plugins_text(found), plugins_data(found), as_json=as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Examine the installation: versions, devices, libraries."""
    data = doctor_data(registry())
    show(doctor_text(data), data, as_json=as_json)


@app.command()
def explain(
    config: Annotated[
        Path | None,
        typer.Argument(
            parser=as_path,
            help="A TOML or JSON config file; flags replace what it says.",
            show_default=False,
        ),
    ] = None,
    pattern: Kind = None,
    segment_lengths: SegmentLengths = None,
    dilation_rates: DilationRates = None,
    pattern_option: Parameters = None,
    num_heads: Annotated[int | None, typer.Option("--heads", help="Query heads.")] = None,
    num_kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Key-value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Length to plan for.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: torch's.")] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="A CUDA card that need not be here: sm_90, sm_80, ..., or t4, a100, l4, h100, h200, b200.",
            metavar="SM",
        ),
    ] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--no-causal", help="No key at a later position.")] = None,
    dropout: Annotated[
        float | None, typer.Option("--dropout", help="Probability of dropping attention weights.")
    ] = None,
    varlen: Annotated[
        bool | None, typer.Option("--varlen/--no-varlen", help="For padded rows and packed documents.")
    ] = None,
    grad: Annotated[bool | None, typer.Option("--grad/--no-grad", help="To be differentiated.")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic/--no-deterministic", help="The same bits on every run.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="A backend's name, or auto.")] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Also simulate this many ranks that share the sequence: bytes, FLOPs, memory.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Batch size, for --ranks. Default: 1.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which backend a configuration gets, and why.

    Prints a row a backend: chosen, usable, refused with every reason and the smallest change that would admit it, or
    broken. Nothing is built and no tensor allocated. Exit status 3 when no backend fits.

    With --arch, what a card would run that is not here, as far as that can be judged without it.
    """
    from .registry.build import explain as explain_plan
    from .registry.build import preflight

    fields = read_mapping(config) if config else {}
    fields |= given(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        seq_len=seq_len,
        dtype=dtype,
        device=device,
        is_causal=causal,
        dropout_p=dropout,
        varlen=varlen,
        requires_grad=grad,
        deterministic=deterministic,
        backend=backend,
    )
    if batch is not None and ranks is None:
        raise ConfigError(f"--batch is for --ranks, which was not given; got --batch {batch}")
    if ranks is not None and fields.get("seq_len") is None:
        raise ConfigError(f"--ranks {ranks} needs --seq-len: what ranks exchange depends on the sequence's length")
    parallel = {} if fields.get("context_parallel") is None else fields["context_parallel"]
    if not isinstance(parallel, dict):
        raise ConfigError(f"context_parallel must be a table such as {{size = 2}}, got {parallel!r}")
    wanted = pattern_of(pattern, pattern_option, segment_lengths, dilation_rates, of_file=fields.get("pattern"))
    if wanted is not None:
        fields["pattern"] = wanted
    if not config and not {"num_heads", "head_dim"} <= fields.keys():
        raise ConfigError("give a config file, or at least --heads and --head-dim")
    shown: list[str] = []
    data: dict[str, Any] = {}
    if ranks is not None:
        costs = preflight(fields, ranks=ranks, batch=1 if batch is None else batch, registry=registry())
        shown, data = ["", str(costs)], {"preflight": costs.to_dict()} if as_json else {}
        fields["context_parallel"] = parallel | {"size": ranks}
    found = registry()
    with progress_bar("planning"):  # a minute, where a table of blocks comes near Limits.layout_bytes
        if ranks is None:
            plan = explain_plan(fields, arch=arch, registry=found)
        else:
            plan, why = _plan_of_ranks(fields, arch, found)
            if why:
                shown, data = ["", f"planned without the length, {why}", *shown], data | {"planned_without_length": why}
    show("\n".join([plan.explain(), *shown]), json.loads(plan.to_json()) | data, as_json=as_json)
    if plan.backend is None:
        raise typer.Exit(_EXIT[NoBackendError])


def _plan_of_ranks(fields: dict[str, Any], arch: str | None, found: Registry) -> tuple[AttentionPlan, str]:
    """The plan of a ring, and why it is without the length, if it is: ranks share sequences beyond what one plans."""
    from .registry.build import explain as explain_plan

    if fields["seq_len"] <= _MOST_PLANNED:
        return explain_plan(fields, arch=arch, registry=found), ""
    why = f"which may take minutes beyond {_MOST_PLANNED:,} tokens; with it another kernel may be chosen"
    return explain_plan(fields | {"seq_len": None}, arch=arch, registry=found), why


@app.command()
def conformance(
    backend: Annotated[str, typer.Argument(help="The backend's name, as `backends` lists it.", metavar="NAME")],
    quick: Annotated[bool, typer.Option("--quick", help="A smaller grid, of seconds instead of minutes.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Device to test on. Default: one of each type that is declared and here.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern", "-p", metavar="TOML", help="A further pattern, in TOML: '{kind = \"local\", window_size = 8}'."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", metavar="NAME=VALUE", help="An option of the backend: unproven_card=true. Repeatable."
        ),
    ] = None,
    large: Annotated[
        bool, typer.Option("--large", help="Also tensors of more than 2**31 elements (several GB).")
    ] = False,
    drawn: Annotated[
        int, typer.Option(metavar="N", help="Further cases, whose pattern, lengths, heads and dtype are drawn.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of what is drawn: the same cases on every machine.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Hold a backend against all that it declares.

    Every result against float64 on the grid that its capabilities declare, what must hold without an oracle, and the
    contract of plugins. Prints a row a check; exit status 1 when any fails.
    """
    from .registry.conformance import KitSettings, run
    from .registry.conformance.settings import read_pattern

    settings = KitSettings(
        registry=registry(),
        device=device,
        quick=quick,
        patterns=[read_pattern(text, flag="--pattern") for text in pattern or ()],
        options=named_values(option or (), flag="--option"),
        large=large,
        drawn=drawn,
        seed=seed,
    )
    with progress_bar(f"conformance of {backend}") as advance:
        report = run(backend, settings, progress=advance)
    show(str(report), report.to_dict(), as_json=as_json)
    if not report.passed:
        raise typer.Exit(FAILED)


# In the help commands stand in the order in which they are added: what a newcomer tries first comes first.
app.command()(bench)
app.command()(dashboard)
app.add_typer(pattern_app)
