"""Commands about the installation itself: what it can do and how fast it is."""

from __future__ import annotations

from pathlib import Path

import click

from geco_fast._backend import LIBRARY
from geco_fast._info import info
from geco_fast.bench.paired import RIVALS, Row, bench_cases, compare
from geco_fast.bench.report import markdown, write_json


@click.command("info")
def info_command() -> None:
    """Print versions and backends: which are active and, for the others, why not."""
    click.echo(info())


@click.command("bench")
@click.option(
    "--op",
    "operators",
    multiple=True,
    type=click.Choice(sorted({case.operator for case in bench_cases()})),
    help="Operator to measure; repeat for more.  [default: all]",
)
@click.option(
    "--against",
    "rivals",
    multiple=True,
    type=click.Choice(RIVALS),
    default=RIVALS,
    show_default=True,
    help='Side to compare with; "self" shows the noise.',
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
    type=click.IntRange(min=2),
    default=41,
    show_default=True,
    help="Interleaved measurements of each side.",
)
@click.option(
    "--instruction-set",
    type=click.Choice(LIBRARY.instruction_sets() if LIBRARY else []),
    help="Instruction set of our CPU kernels; the rivals keep theirs.  [default: the best]",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write the results to.",
)
def bench_command(
    operators: tuple[str, ...],
    rivals: tuple[str, ...],
    threads: tuple[int, ...],
    pairs: int,
    instruction_set: str | None,
    json_path: Path | None,
) -> None:
    """Time the operators, forward and forward+backward, in turn with their rivals."""
    if LIBRARY is not None and instruction_set is not None:
        LIBRARY.set_instruction_set(instruction_set)
    rows: list[Row] = []
    chosen = [case for case in bench_cases() if not operators or case.operator in operators]
    for case in chosen:
        for count in threads:
            click.echo(f"measuring {case}, threads: {count}", err=True)
            try:
                rows += compare(case, rivals=rivals, threads=count, pairs=pairs)
            except AssertionError as error:
                raise click.ClickException(f"no time for a wrong result: {error}") from error
    click.echo(markdown(rows))
    if json_path is not None:
        try:
            write_json(json_path, rows)
        except OSError as error:
            raise click.FileError(str(json_path), error.strerror) from error
