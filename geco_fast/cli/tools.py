"""Commands about the installation itself: what it can do and how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from geco_fast._backend import LIBRARY
from geco_fast._info import info
from geco_fast.bench import report, results
from geco_fast.bench.entrants import OperatorProblem, Problem
from geco_fast.bench.modules import MODULES, ModuleProblem
from geco_fast.bench.paired import Effort, WrongResult, compare
from geco_fast.bench.rivals import ALWAYS, bench_cases, operator_rivals


@click.command("info")
def info_command() -> None:
    """Print versions and backends: which are active and, for the others, why not."""
    click.echo(info())


# More than any line of the table.
_WIDTH = 400


def _names() -> list[str]:
    """Operators and modules that have cases."""
    operators = dict.fromkeys(case.operator for case in bench_cases(device="cuda"))
    return [*operators, *dict.fromkeys(case.module for case in MODULES)]


def _rivals() -> list[str]:
    """Every rival of some case."""
    operators = (name for case in bench_cases() for name in operator_rivals(case, "cuda"))
    return [*dict.fromkeys([*ALWAYS, *operators, *(name for m in MODULES for name in m.rivals)])]


def _problems(names: Sequence[str], part: str, device: str) -> list[Problem]:
    problems: list[Problem] = [
        *(OperatorProblem(case, device) for case in bench_cases(device=device)),
        *(ModuleProblem(case, device) for case in MODULES),
    ]
    return [p for p in problems if (not names or p.operator in names) and part in str(p)]


@click.command("bench")
@click.option(
    "--op",
    "operators",
    multiple=True,
    type=click.Choice(_names()),
    help="Operator or module to measure; repeat for more.  [default: all]",
)
@click.option("--case", "part", default="", help="Only cases with this in their name.")
@click.option(
    "--against",
    "rivals",
    multiple=True,
    type=click.Choice(_rivals()),
    help='Side to compare with; repeat for more; "self" shows the noise.  [default: all]',
)
@click.option(
    "--threads",
    multiple=True,
    type=click.IntRange(min=1),
    default=(1,),
    show_default=True,
    help="Threads to use; repeat for more.",
)
@click.option(
    "--pairs",
    type=click.IntRange(min=3),
    default=Effort.pairs,
    show_default=True,
    help="Most interleaved measurements of each side.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=Effort.seconds,
    show_default=True,
    help="Length of one comparison: long calls get fewer pairs, and longer ones are left out.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    default=Effort.patience,
    show_default=True,
    help="Leave out a side whose first call, compilation included, takes more seconds.",
)
@click.option(
    "--instruction-set",
    type=click.Choice(LIBRARY.instruction_sets() if LIBRARY else []),
    help="Instruction set of our CPU kernels; the rivals keep theirs.  [default: the best]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to measure: this processor, or the current GPU.",
)
@click.option(
    "--graph",
    is_flag=True,
    help="Time replays of CUDA graphs instead of calls.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the rows; those already there stay, but for the same comparisons.",
)
@click.option(
    "--chart",
    "chart_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="SVG file for a bar chart: of each case, the best rival.",
)
@click.option(
    "--render",
    is_flag=True,
    help="Measure nothing; make the documents' tables and chart from bench/results.",
)
def bench_command(
    operators: tuple[str, ...],
    part: str,
    rivals: tuple[str, ...],
    threads: tuple[int, ...],
    pairs: int,
    seconds: float,
    patience: float,
    instruction_set: str | None,
    device: str,
    graph: bool,
    json_path: Path | None,
    chart_path: Path | None,
    render: bool,
) -> None:
    """Time operators and modules in turn with their rivals; keep and show the results."""
    if render:
        _render()
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch sees no GPU")
    if graph and device != "cuda":
        raise click.UsageError("--graph needs --device cuda")
    if LIBRARY is not None and instruction_set is not None:
        LIBRARY.set_instruction_set(instruction_set)
    # Float32 is what both sides promise; convolutions on a GPU round to TF32 by default.
    torch.backends.cudnn.allow_tf32 = False
    effort = Effort(pairs=pairs, seconds=seconds, patience=patience)
    problems = _problems(operators, part, device)
    if not problems:
        raise click.UsageError("no case has that operator and that part of a name")
    try:
        found = _measure(problems, rivals or None, threads, effort, graph, json_path)
        if chart_path is not None:
            report.draw(report.headline(found), chart_path)
    except WrongResult as error:
        raise click.ClickException(f"no time for a wrong result: {error}") from error
    except OSError as error:
        raise click.FileError(str(error.filename), error.strerror or "") from error
    _print(found)


def _measure(
    problems: list[Problem],
    rivals: tuple[str, ...] | None,
    threads: tuple[int, ...],
    effort: Effort,
    graph: bool,
    path: Path | None,
) -> list[results.Row]:
    """Rows of all problems; the file is written after each, so that a long run loses nothing."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    earlier = results.read(path) if path is not None else results.ResultFile([], [])
    run = results.environment(problems[0].device)
    found: list[results.Row] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        rounds = [(problem, count) for problem in problems for count in threads]
        for problem, count in progress.track(rounds, description="measuring"):
            progress.print(f"{problem}, threads: {count}")
            found += compare(problem, rivals=rivals, threads=count, effort=effort, graph=graph)
            found = results.with_run_limits(found)
            if path is not None:
                results.write(path, earlier.merged(run, found))
    return found


def _print(rows: list[results.Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    header, *cells = report.table(rows)
    table = Table(*header, box=box.SIMPLE_HEAD)
    for line in cells:
        table.add_row(*line)
    # Lines stay whole, on a narrow terminal too: numbers in pieces can't be compared.
    Console(width=_WIDTH, markup=False, highlight=False).print(table)
    click.echo(report.LEGEND)
    for note in report.notes(rows):
        click.echo(note)


def _render() -> None:
    if not report.RESULTS.is_dir():
        raise click.ClickException(f"--render works in a checkout; {report.RESULTS} is missing")
    for path in report.render():
        click.echo(f"wrote {path.relative_to(report.ROOT)}")
