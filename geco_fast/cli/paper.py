"""The command that regenerates the paper's results."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from geco_fast.experiments.paper import EXPERIMENTS, SCALES, run_experiment


def _names() -> str:
    return "; ".join(f"{name}: {found.title}" for name, found in EXPERIMENTS.items())


@click.command("experiment", epilog=f"{_names()}.")
@click.argument("name", type=click.Choice([*EXPERIMENTS, "all"]))
@click.option(
    "--scale",
    type=click.Choice(SCALES),
    default="small",
    show_default=True,
    help="What two cores manage in minutes, or full size, for a GPU and days.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="runs/paper-SCALE",
    help="Folder that the experiments share; each has its own below it.",
)
@click.option(
    "--data-root",
    type=click.Path(exists=True, file_okay=False),
    help="Folder that holds MNIST's and CIFAR-10's files, and CelebA's for full size. Without it "
    "scikit-learn's digits stand in for MNIST's, and photographs are left out.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    show_default="the experiment's own number",
    help="How many, from 0 on; the claims are checked of all of them.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    show_default="torch's choice",
    help="CPU threads; as many trainings run side by side.",
)
def experiment_command(
    name: str,
    scale: str,
    out: Path | None,
    data_root: str | None,
    seeds: int | None,
    threads: int | None,
) -> None:
    """Regenerate the paper's result NAME, or all, and check what the paper says of it.

    Writes figure.png, figure.svg, results.csv and results.json. After an interruption the same
    command goes on.
    """
    out = out or Path("runs", f"paper-{scale}")
    names = list(EXPERIMENTS) if name == "all" else [name]
    if threads is not None:
        torch.set_num_threads(threads)
    if scale == "small":
        minutes = sum(EXPERIMENTS[each].minutes_with(seeds) for each in names)
        time = "a minute" if minutes == 1 else f"{minutes} minutes"
        click.echo(f"about {time} on two cores, less what is in {out} already")
    else:
        click.echo("full size: days on a GPU")
    for each in names:
        click.echo(f"{each}: {EXPERIMENTS[each].title}")
        command = f"geco-fast experiment {each}" + ("" if scale == "small" else f" --scale {scale}")
        command += f" --seeds {seeds}" if seeds else ""
        command += " --data-root DATA" if data_root else ""
        claims = run_experiment(
            each,
            out,
            scale=scale,
            data_root=data_root,
            seeds=seeds,
            threads=threads,
            command=command,
            say=click.echo,
        )
        for claim in claims:
            click.echo(f"  {claim}")
    click.echo(f"everything is in {out}")
