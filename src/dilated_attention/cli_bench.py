"""The command `dilated-attention bench`."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson
from .core.errors import ConfigError

_PEERS_HELP = "Also measure what this callable makes: MODULE:ATTR. Repeatable."


def bench(
    case: Annotated[list[str] | None, typer.Option(help="A case; * stands for any letters. Repeatable.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="List the cases.")] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="NAME, NAME:KERNEL or auto. Repeatable. Default: all that take a case.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed calls of each.", min=1)] = 7,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: cuda where there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for results.csv, results.jsonl and results.png.")] = None,
    save: Annotated[Path | None, typer.Option(help="Append the run to this file.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=_PEERS_HELP)] = None,
    load_library: Annotated[list[Path] | None, typer.Option(help="Load this library first. Repeatable.")] = None,
    case_seconds: Annotated[
        float, typer.Option(help="Fewer rounds (at least three) where a case's would take longer.")
    ] = 10.0,
    slowest: Annotated[float, typer.Option(help="Leave a peer out whose step would take more seconds.")] = 10.0,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Measure one sequence over several ranks instead.")
    ] = False,
    gpus: Annotated[str, typer.Option(help="Numbers of ranks for --scaling: 1,2,4.")] = "1,2",
    weak_tokens: Annotated[int | None, typer.Option(help="Tokens a rank, growing with the ranks.")] = None,
    strong_tokens: Annotated[int | None, typer.Option(help="Tokens in all, shared by the ranks.")] = None,
    longest: Annotated[
        bool, typer.Option("--longest", help="Also double a LongNet layer's sequence to the end.")
    ] = False,
    longest_limit: Annotated[int | None, typer.Option(help="Tokens at which --longest stops; a CPU needs it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure every backend on named cases, correct results only.

    A result is compared with the float64 oracle, and with the others at the full length, before it is timed; one that
    fails prints no time and makes the exit status 1. Dense attention stands beside.
    """
    if list_cases:
        _list(as_json=as_json)
        return
    if scaling:
        _scale(
            _device(device), gpus, weak_tokens, strong_tokens, rounds, longest, longest_limit, output, as_json=as_json
        )
        return
    _load(load_library or ())
    failed = _run(
        case or (), tuple(backend or ()), rounds, _device(device), output, save, peer or (), case_seconds, slowest,
        as_json=as_json,
    )  # fmt: skip
    if failed:
        raise typer.Exit(1)


def _scale(
    device: str,
    gpus: str,
    weak_tokens: int | None,
    strong_tokens: int | None,
    rounds: int,
    longest: bool,
    longest_limit: int | None,
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """`--scaling`; a CPU gets a small case unless it is told otherwise."""
    from .bench.output import require_matplotlib
    from .bench.ring_settings import RingSettings
    from .bench.scaling import run_scaling, text_of, write_scaling

    try:
        sizes = tuple(int(part) for part in gpus.split(","))
    except ValueError as error:
        raise ConfigError(f"--gpus must be integers with commas between them, got {gpus!r}") from error
    if output is not None:
        require_matplotlib()
        output.mkdir(parents=True, exist_ok=True)
    on_cpu = device == "cpu"
    settings = RingSettings(
        sizes=sizes,
        device="cpu" if on_cpu else "cuda",
        weak_tokens=weak_tokens or (4096 if on_cpu else 1 << 17),
        strong_tokens=strong_tokens or (8192 if on_cpu else 1 << 20),
        num_heads=4 if on_cpu else 16,
        dtype="float32" if on_cpu else "bfloat16",
        first=256 if on_cpu else 2048,
        rounds=rounds,
        longest=longest,
        longest_limit=longest_limit,
        trace=str(output.resolve()) if output is not None and not on_cpu else None,
    )
    report = run_scaling(settings, lambda line: typer.echo(line, err=True))
    files = write_scaling(output, report) if output is not None else []
    if as_json:
        typer.echo(json.dumps(report | {"files": [str(path) for path in files]}, indent=2))
        return
    typer.echo(text_of(report))
    if files:
        typer.echo("written: " + ", ".join(str(path) for path in files))


def _list(*, as_json: bool) -> None:
    from .bench.cases import CASES

    if as_json:
        rows = [case.to_dict() | {"device": case.device, "is_default": case.is_default} for case in CASES.values()]
        typer.echo(json.dumps(rows, indent=2))
        return
    for case in CASES.values():
        typer.echo(f"{case.device:5} {'' if case.is_default else '(if named) '}{case}")


def _device(name: str | None) -> str:
    import torch

    from .registry.device import describe_device

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = describe_device(name)
    if found.torch_name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu, cuda or cuda:INDEX, got {name!r}")
    if not found.available:
        raise ConfigError(f"--device {name}: there is none on this machine")
    if found.torch_name != "cpu":
        torch.cuda.set_device(torch.device(name))
    return name


def _load(paths: list[Path] | tuple[()]) -> None:
    """Libraries of operators that no installed package brings; a CUDA runtime for all that come after it."""
    import torch

    for path in paths:
        try:
            if "libcudart" in path.name:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            else:
                torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError as error:
            raise ConfigError(f"--load-library {path}: {error}") from error


def _run(
    names: list[str] | tuple[()],
    backends: tuple[str, ...],
    rounds: int,
    device: str,
    output: Path | None,
    save: Path | None,
    peers: list[str] | tuple[()],
    case_seconds: float,
    slowest: float,
    *,
    as_json: bool,
) -> bool:
    """Measure and print; whether anything failed."""
    from .bench import output as out
    from .bench.cases import named_cases
    from .bench.history import append_run
    from .bench.measure import CaseReport, Settings, floor_of, measure_case
    from .bench.peers import dense_sdpa, load_peer

    if output is not None:
        out.require_matplotlib()  # before minutes are spent
    settings = Settings(
        device=device,
        rounds=rounds,
        backends=backends,
        makers=(dense_sdpa, *(load_peer(text) for text in peers)),
        case_seconds=case_seconds,
        slowest_seconds=slowest,
    )
    cases = named_cases(names, settings.device_type)
    floors: dict[str, float] = {}
    reports: list[CaseReport] = []
    for case in cases:
        if case.dtype not in floors:
            floors[case.dtype] = floor_of(case, device)
            typer.echo(f"floor: {floors[case.dtype]:.3g} TFLOP/s, a matrix product in {case.dtype}", err=True)
        report = measure_case(case, settings, floor_tflops=floors[case.dtype])
        reports.append(report)
        for line in (*report.notes, *(f"FAILED {line}" for line in report.failures)):
            typer.echo(line, err=True)
        if not as_json:
            out.print_report(report)
    run = out.make_run(reports, device, floors[cases[0].dtype] if len(floors) == 1 else None)
    if save is not None:
        append_run(save, run)
    files = out.write_files(output, run) if output is not None else []
    if as_json:
        extra = {"cases": [out.report_data(report) for report in reports], "files": [str(path) for path in files]}
        typer.echo(json.dumps({**json.loads(run.to_json()), **extra}, indent=2, ensure_ascii=False))
    elif files:
        typer.echo("written: " + ", ".join(str(path) for path in files))
    return any(report.failures for report in reports) or not all(_has_ours(report) for report in reports)


def _has_ours(report: object) -> bool:
    from .bench.measure import CaseReport

    assert isinstance(report, CaseReport)
    return any(not result.peer for result in report.results)
