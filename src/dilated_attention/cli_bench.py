"""The command `dilated-attention bench`: measure, compare with old code, or scale over ranks."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import attrs
import typer

from .console import FAILED, AsJson, as_path, ending_in_order, make_folder, registry
from .core.checks import require_choice
from .core.errors import ConfigError
from .core.explain import columns

if TYPE_CHECKING:
    from .bench.measure import CaseReport

# What each way of calling the command takes; another option is refused, not ignored.
_SCALING: Final = frozenset(
    {"scaling", "gpus", "weak_tokens", "strong_tokens", "longest", "longest_limit", "rounds", "device", "output"}
)
_COMPARING: Final = frozenset(
    {"compare", "ref", "threshold", "memory_threshold", "threads", "case", "backend", "device", "case_seconds"}
)
_MEASURING: Final = frozenset(
    {"case", "backend", "rounds", "device", "output", "save", "peer", "load_library", "case_seconds", "slowest"}
)


def bench(
    ref: Annotated[
        str | None, typer.Argument(help="With --compare: the old code, as git names it. Default: HEAD.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A case; * stands for any letters. Repeatable.")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="List the cases.")] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="NAME, NAME:KERNEL, NAME:OPTION=VALUE or auto. Repeatable. "
            "Default: all that take a case, but math and reference.",
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed calls of each. Default: 7.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: cuda where there is one.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="PATH", help="Folder for results.csv, results.jsonl and results.png."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(parser=as_path, metavar="PATH", help="Append the run to this file.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(metavar="MODULE:ATTR", help="Also what this callable makes. Repeatable.")
    ] = None,
    load_library: Annotated[
        list[Path] | None, typer.Option(parser=as_path, metavar="PATH", help="Load this library first. Repeatable.")
    ] = None,
    case_seconds: Annotated[
        float | None, typer.Option(help="Seconds for a case; fewer rounds (at least 3) then. Default: 10.", min=0)
    ] = None,
    slowest: Annotated[
        float | None, typer.Option(help="Leave a peer out whose step takes more seconds. Default: 10.", min=0)
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare the working tree with REF instead.")] = False,
    threshold: Annotated[float | None, typer.Option(help="A ratio beyond this is slower. Default: 1.05.")] = None,
    memory_threshold: Annotated[
        int | None, typer.Option(help="Bytes by which peak memory may grow. Default: 0.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a CPU's kernels, for --compare. Default: 1.")] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Measure one sequence over several ranks instead.")
    ] = False,
    gpus: Annotated[str | None, typer.Option(help="Numbers of ranks for --scaling. Default: 1,2.")] = None,
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
    fails prints no time and makes the exit status 1. Dense attention stands beside. --compare measures old code and
    new in turns, and exits 1 where the new is slower or takes more memory. --scaling starts ranks by torchrun.
    """
    given = {name: value for name, value in locals().items() if value is not None and value is not False}
    given = {name: value for name, value in given.items() if name not in ("list_cases", "as_json")}
    if list_cases:
        _refuse_others(given, frozenset(), "--list")
        _list(as_json=as_json)
    elif scaling:
        _refuse_others(given, _SCALING, "--scaling")
        with ending_in_order():
            _scale(given, as_json=as_json)
    elif compare:
        _refuse_others(given, _COMPARING, "--compare")
        with ending_in_order():
            _compare(given, as_json=as_json)
    else:
        _refuse_others(given, _MEASURING, "measuring cases")
        _measure(given, as_json=as_json)


def _refuse_others(given: Mapping[str, Any], taken: frozenset[str], what: str) -> None:
    others = sorted(given.keys() - taken)
    if others:
        hints = [f"{_spelt(name) if len(others) > 1 else 'it'} goes with {_ways_of(name)}" for name in others]
        if "ref" in others:
            hints.append(f"a case is named by --case {given['ref']}")
        raise ConfigError(f"{', '.join(map(_spelt, others))}: not for {what}; {'; '.join(hints)}")


def _spelt(name: str) -> str:
    return "the argument REF" if name == "ref" else f"--{name.replace('_', '-')}"


def _ways_of(name: str) -> str:
    """The ways of calling the command that take an option."""
    ways = {"measuring cases": _MEASURING, "--compare": _COMPARING, "--scaling": _SCALING}
    return " or ".join(what for what, taken in ways.items() if name in taken)


def _list(*, as_json: bool) -> None:
    from .bench.cases import CASES

    if as_json:
        rows = [case.to_dict() | {"device": case.device, "is_default": case.is_default} for case in CASES.values()]
        typer.echo(json.dumps(rows, indent=2))
        return
    header = ("case", "on", "measured", "tokens", "heads", "dtype", "causal", "pattern")
    cells = [
        (case.name, case.device, "by default" if case.is_default else "if named", *case.cells())
        for case in CASES.values()
    ]
    for line in columns([header, *cells]):
        typer.echo(line)


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
    if name.startswith("cuda:"):
        torch.cuda.set_device(torch.device(name))
    return name


def _check_backends(names: Sequence[str]) -> None:
    """Raise `ConfigError` for what names no registered backend, before anything is measured or checked out."""
    for name in names:
        backend, colon, option = name.partition(":")
        require_choice("--backend", backend, ("auto", *registry().backends))
        if colon and (backend == "auto" or option.strip().startswith("=") or not option.strip()):
            raise ConfigError(f"--backend must be NAME, NAME:KERNEL, NAME:OPTION=VALUE or auto, got {name!r}")


def _load(paths: Sequence[Path]) -> None:
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


def _measure(given: Mapping[str, Any], *, as_json: bool) -> None:
    """Measure and print; exit status 1 where anything failed."""
    from .bench import output as out
    from .bench.cases import named_cases
    from .bench.history import append_run, check_appendable
    from .bench.measure import Settings, floor_of, measure_case
    from .bench.peers import dense_sdpa, load_peer

    device, output = _device(given.get("device")), given.get("output")
    if output is not None:
        out.require_matplotlib()  # before minutes are spent
        make_folder(output, out.FILES)
    if "save" in given:
        check_appendable(given["save"])
    _load(given.get("load_library", ()))
    _check_backends(given.get("backend", ()))
    settings = Settings(
        device=device,
        rounds=given.get("rounds", 7),
        backends=tuple(given.get("backend", ())),
        makers=(dense_sdpa, *(load_peer(text) for text in given.get("peer", ()))),
        case_seconds=given.get("case_seconds", 10.0),
        slowest_seconds=given.get("slowest", 10.0),
    )
    floors: dict[str, float] = {}
    reports: list[CaseReport] = []
    for case in named_cases(given.get("case", ()), settings.device_type):
        if case.dtype not in floors:
            floors[case.dtype] = floor_of(case, device)
            typer.echo(f"floor: {floors[case.dtype]:.3g} TFLOP/s, a matrix product in {case.dtype}", err=True)
        reports.append(measure_case(case, settings, floor_tflops=floors[case.dtype]))
        for line in (*reports[-1].notes, *(f"FAILED {line}" for line in reports[-1].failures)):
            typer.echo(line, err=True)
        if not as_json:
            out.print_report(reports[-1])
    run = out.make_run(reports, device, min(floors.values()) if len(floors) == 1 else None)
    files = [] if output is None else [output / name for name in out.FILES]
    near = out.auto_summary(reports)
    extra = {"cases": [out.report_data(report) for report in reports], "auto": near, "files": [str(p) for p in files]}
    if as_json:
        typer.echo(json.dumps({**json.loads(run.to_json()), **extra}, indent=2, ensure_ascii=False))
    else:
        typer.echo(f"auto is within 5% of the fastest in {near['within_5_percent']} of {near['measured']} cases")
    if "save" in given:  # once all is printed: a disk that is full by now takes nothing with it
        append_run(given["save"], run)
    if output is not None:
        out.write_files(output, run)
    if files and not as_json:
        typer.echo("written: " + ", ".join(str(path) for path in files))
    if any(report.failures or all(r.peer for r in report.results) for report in reports):
        raise typer.Exit(FAILED)


def _compare(given: Mapping[str, Any], *, as_json: bool) -> None:
    """Old code against new; exit status 1 where the new is slower, takes more memory, or is wrong."""
    from .bench.cases import named_cases
    from .bench.compare import CompareSettings, compare, compare_text

    backends = given.get("backend", ["auto"])
    if len(backends) > 1:
        raise ConfigError(f"--compare takes one --backend, got {', '.join(backends)}")
    _check_backends(backends)
    settings = CompareSettings(
        ref=given.get("ref", "HEAD"),
        device=_device(given.get("device")),
        backend=backends[0],
        threshold=given.get("threshold", 1.05),
        memory_threshold=given.get("memory_threshold", 0),
        seconds=given.get("case_seconds", 30.0),
        threads=given.get("threads", 1),
    )
    cases = named_cases(given.get("case", ()), settings.device.partition(":")[0])
    found, failures = compare(cases, settings, lambda line: typer.echo(line, err=True))
    for line in failures:
        typer.echo(f"FAILED {line}", err=True)
    if as_json:
        rows = [attrs.asdict(each) for each in found]
        typer.echo(json.dumps({**attrs.asdict(settings), "comparisons": rows, "failures": failures}, indent=2))
    else:
        typer.echo(compare_text(found, settings))
    if failures or not found or any(each.verdict == "slower" or each.has_grown for each in found):
        raise typer.Exit(FAILED)


def _scale(given: Mapping[str, Any], *, as_json: bool) -> None:
    """`--scaling`; a CPU gets a small case unless it is told otherwise."""
    from .bench.output import require_matplotlib
    from .bench.ring_settings import RingSettings
    from .bench.scaling import FILES, run_scaling, text_of, write_scaling

    gpus, output = given.get("gpus", "1,2"), given.get("output")
    try:
        sizes = tuple(int(part) for part in gpus.split(","))
    except ValueError as error:
        raise ConfigError(f"--gpus must be integers with commas between them, got {gpus!r}") from error
    if output is not None:
        require_matplotlib()
        make_folder(output, FILES)
    # Not `_device`, which opens the device: the memory here is the ranks'.
    device = given.get("device") or _device(None)
    on_cpu = device == "cpu"
    settings = RingSettings(
        sizes=sizes,
        device=device,
        weak_tokens=given.get("weak_tokens", 4096 if on_cpu else 1 << 17),
        strong_tokens=given.get("strong_tokens", 8192 if on_cpu else 1 << 20),
        num_heads=4 if on_cpu else 16,
        dtype="float32" if on_cpu else "bfloat16",
        first=256 if on_cpu else 2048,
        rounds=given.get("rounds", 7),
        longest=given.get("longest", False),
        longest_limit=given.get("longest_limit"),
        trace=str(output.resolve()) if output is not None and not on_cpu else None,
    )
    report = run_scaling(settings, lambda line: typer.echo(line, err=True))
    files = [] if output is None else [output / name for name in FILES]
    found = json.dumps(report | {"files": [str(path) for path in files]}, indent=2) if as_json else text_of(report)
    typer.echo(found)
    if output is not None:
        write_scaling(output, report)
    if files and not as_json:
        typer.echo("written: " + ", ".join(str(path) for path in files))
