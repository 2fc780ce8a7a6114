"""The commands; their options come from the configuration's fields."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from geco_fast import BackendUnavailable
from geco_fast.cli.paper import experiment_command
from geco_fast.cli.tools import bench_command, info_command
from geco_fast.experiments import Interrupted, TrainConfig, TrainError, evaluate, train


class _Group(click.Group):
    """Turns what a user can mend into one line and exit status 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
        except click.Abort:
            click.echo("Aborted.", err=True)
        raise SystemExit(2)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TrainError, BackendUnavailable) as error:
            click.echo(f"Error: {error}", err=True)
            raise SystemExit(2) from error
        except Interrupted as interruption:
            if os.environ.get("RANK", "0") == "0":
                click.echo(str(interruption), err=True)
            raise SystemExit(128 + interruption.signum) from interruption


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def cli() -> None:
    """Train and measure constrained variational autoencoders (GECO)."""


cli.add_command(info_command)
cli.add_command(bench_command)
cli.add_command(experiment_command)


def _option(field: dataclasses.Field[Any]) -> Callable[..., Any]:
    """The command-line option of a configuration field."""
    limits, many = field.metadata, isinstance(field.default, tuple)
    kind: Any = next(k for k in (bool, int, float, str) if k.__name__ in str(field.type))
    if "choices" in limits:
        kind = click.Choice(limits["choices"])
    elif field.name == "data_root":
        kind = click.Path(exists=True, file_okay=False)
    return click.option(
        f"--{field.name.replace('_', '-')}",
        field.name,
        type=None if kind is bool else kind,
        is_flag=kind is bool,
        multiple=many,
        default=field.default,
        show_default=limits.get("auto", kind is not bool),
        help=f"{limits['help']}.",
    )


def _config_options(command: Callable[..., None]) -> Callable[..., None]:
    for field in reversed(dataclasses.fields(TrainConfig)):
        command = _option(field)(command)
    return command


@cli.command("train")
@_config_options
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="runs/DATA-MODEL-OBJECTIVE",
    help="Folder of the run.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in --out; its options need not be given again.",
)
@click.pass_context
def train_command(ctx: click.Context, out: Path | None, resume: bool, **options: Any) -> None:
    """Train a model; without options: ConvDraw on built-in digits, a few minutes on two cores."""
    given = {
        name: value
        for name, value in options.items()
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    if out is None:
        out = Path("runs", "-".join(options[name] for name in ("data", "model", "objective")))
    earlier = TrainConfig.from_file(out / "config.json") if resume else None
    try:
        config = dataclasses.replace(earlier, **given) if earlier else TrainConfig(**given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    summary = train(config, out, resume=resume)
    if summary:
        _print_summary(summary, out)


@cli.command("evaluate")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--images",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Held-out images to measure; 0 for all.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--data-root",
    type=click.Path(exists=True, file_okay=False),
    show_default="where they were in training",
    help="Folder that holds the data set's files.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate_command(
    run: Path, images: int, device: str, data_root: str | None, as_json: bool
) -> None:
    """Measure the last checkpoint of RUN on held-out images."""
    measured = evaluate(run, images=images, device=device, data_root=data_root)
    if as_json:
        click.echo(json.dumps(measured, indent=2))
    else:
        _print_table(_held_out_rows(measured), f"{run}, step {measured['step']}")


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    course = summary["training"]
    rows = [("trained", f"{summary['step']} steps, {summary['seconds']:.0f} s")]
    for name, value in course.items():
        if name.startswith("lambda_"):
            label = name.replace("_", " ")
            rows.append((label, f"at most {value['max']:.4g}, last {value['last']:.4g}"))
    if course["step_first_satisfied"] is None:
        rows.append(("first satisfied", "never, by a batch in the log"))
    else:
        rows.append(("first satisfied", f"step {course['step_first_satisfied']}"))
        kl = f"{course['kl_first_satisfied']:.1f} then, {course['kl_last']:.1f} at the end"
        rows.append(("KL in training", f"{kl} (nats per image)"))
    _print_table(rows, "Training")
    _print_table(_held_out_rows(summary["held_out"]), "Held-out images")
    click.echo(f"\nEverything is in {out}")


def _held_out_rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("images", f"{measured['images']}"),
        ("squared error per pixel", f"{measured['re']:.5f}"),
        ("KL", f"{measured['kl']:.1f} nats per image"),
        ("NLL", f"{measured['nll']:.1f} nats per image at sigma {measured['sigma']:.3f} (learned)"),
        ("NLL, best sigma", f"{measured['nll_sigma_optimal']:.1f} nats per image"),
    ]
    for name, constraint in measured["constraints"].items():
        verdict = "satisfied" if constraint["satisfied"] else "not satisfied"
        ratio = constraint.get("re_over_kappa2")
        text = f"C = {constraint['value']:+.5f} at kappa {constraint['kappa']:g}: {verdict}"
        if ratio is not None:
            text += f", error / kappa^2 = {ratio:.3f}"
        rows.append((f"constraint {name}", f"{text}; {constraint['fraction']:.0%} of the images"))
    return rows


def _print_table(rows: list[tuple[str, str]], title: str) -> None:
    width = max(len(name) for name, _ in rows)
    click.echo(f"\n{title}")
    for name, value in rows:
        click.echo(f"  {name:{width}}  {value}")
