"""What a training run is: one dataclass, read by the command line and kept in ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geco_fast._checks import check_choice, check_positive
from geco_fast.data import DATASETS
from geco_fast.objectives import OBJECTIVES

KAPPAS = {"re": 0.1, "fre": 0.4, "fre-stats": 0.06, "cla": 0.9, "pncc": 0.9}
"""The constraints by name, each with its default tolerance kappa.

Those of fre and fre-stats are root mean squares over the features; on digits they are about as
strict as 0.1 is for re.
"""


BY_MODEL: dict[str, dict[str, Any]] = {
    "convdraw": {"steps": 600, "learning_rate": 2e-3},
    "nvp": {"steps": 3000, "learning_rate": 1e-3},
}
"""The models by name, each with the defaults that suit it."""


class TrainError(Exception):
    """A run cannot start or go on; the message says why and what to do, in one line."""


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def _by_model(name: str) -> str:
    return ", ".join(f"{model} {values[name]}" for model, values in BY_MODEL.items())


@dataclass(frozen=True)
class TrainConfig:
    """Every choice of a training run; each field is an option of ``geco-fast train``.

    Fields marked ``free`` may change when a run is resumed, the others may not. ``steps`` and
    ``learning_rate`` are chosen by the model where they are None.

    Raises
    ------
    ValueError
        A field is out of its range.
    """

    model: str = _option("convdraw", "Generative model", choices=tuple(BY_MODEL))
    data: str = _option("digits", "Data set", choices=tuple(DATASETS))
    data_root: str | None = _option(None, "Folder that holds the data set's files", free=True)
    download: bool = _option(False, "Fetch files that are missing into --data-root", free=True)
    data_base: str = _option(
        "mnist", "Labelled digits that derived data sets are made of", choices=("mnist", "digits")
    )
    image_size: int | None = _option(
        None, "Side of the images in pixels", auto="the data set's own", least=1
    )
    objective: str = _option("geco", "What is minimised", choices=tuple(OBJECTIVES))
    constraint: tuple[str, ...] = _option(
        ("re",),
        "Constraint; repeat for more, each with its --kappa (pncc and cla leave much of the image "
        "free: add re)",
        choices=tuple(KAPPAS),
    )
    kappa: tuple[float, ...] = _option(
        (),
        "Tolerance of each constraint, in their order",
        auto=", ".join(f"{name} {kappa}" for name, kappa in KAPPAS.items()),
    )
    steps: int = _option(None, "Training steps in all", auto=_by_model("steps"), least=1, free=True)
    batch_size: int = _option(32, "Images per step, over all processes", least=1)
    learning_rate: float = _option(
        None, "Learning rate of Adam", auto=_by_model("learning_rate"), above=0
    )
    hidden_channels: int = _option(32, "ConvDraw: channels of each ConvLSTM", least=1)
    latent_channels: int = _option(4, "ConvDraw: latent channels per step", least=1)
    draw_steps: int = _option(6, "ConvDraw: recurrent steps", least=1)
    downsample: int | None = _option(
        None,
        "ConvDraw: pixels per cell of the recurrent state, each way",
        auto="2 below 28 pixels, else 4",
        least=1,
    )
    latent_features: int = _option(64, "VAE+NVP: latent size", least=2)
    couplings: int = _option(4, "VAE+NVP: coupling layers of the posterior", least=1)
    hidden_features: int = _option(256, "VAE+NVP: width of a coupling's two hidden layers", least=1)
    alpha: float = _option(
        0.9,
        "GECO: decay of the constraints' moving average; the paper's 0.99 suits long runs",
        least=0,
    )
    lambda_init: float = _option(1.0, "GECO: first value of each lambda", above=0)
    step_size: float | None = _option(
        None,
        "GECO: rate of log lambda per unit of constraint",
        auto="0.05 over the most by which a constraint can be satisfied",
        above=0,
    )
    max_log_step: float | None = _option(
        0.05, "GECO: most that log lambda moves in one step", above=0
    )
    beta: float = _option(1.0, "Beta objective: weight of the KL term", above=0)
    anneal_steps: int = _option(200_000, "Annealed objective: steps of the schedule", least=1)
    seed: int = _option(0, "Seed of the weights, the data order and the noise", least=0)
    dtype: str = _option("float32", "Floating-point type", choices=("float32", "float64"))
    device: str = _option("auto", "Auto, cpu or cuda", free=True)
    threads: int | None = _option(None, "CPU threads", auto="torch's choice", least=1, free=True)
    classifier_steps: int = _option(
        400, "FRE, CLA: training steps of the classifier that they look through", least=1
    )
    checkpoint_every: int = _option(250, "Steps between checkpoints", least=1, free=True)
    log_every: int = _option(10, "Steps between rows of metrics.csv", least=1)
    eval_images: int = _option(
        1000, "Held-out images that the summary measures; 0 for all", least=0, free=True
    )

    def __post_init__(self) -> None:
        for name in ("constraint", "kappa"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, value in BY_MODEL.get(self.model, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            for value in values if isinstance(values, tuple) else (values,):
                self._check(field, value)
        if not self.alpha < 1:
            raise ValueError(f"alpha must be < 1, got {self.alpha!r}")
        if not self.constraint or len(set(self.constraint)) < len(self.constraint):
            raise ValueError(f"constraint must name each constraint once, got {self.constraint}")
        if self.kappa and len(self.kappa) != len(self.constraint):
            raise ValueError(
                f"kappa must be given once for each of the {len(self.constraint)} constraints, "
                f"or not at all, got {len(self.kappa)}"
            )
        for name, kappa in self.constraints.items():
            check_positive(f"kappa of {name}", kappa)
            if name in ("cla", "pncc") and kappa >= 1:
                raise ValueError(f"kappa of {name} must be < 1, the best score, got {kappa!r}")

    @staticmethod
    def _check(field: dataclasses.Field[Any], value: Any) -> None:
        if value is None and "None" in str(field.type):
            return
        kind = next(kind for kind in (bool, int, float, str) if kind.__name__ in str(field.type))
        accepted = (int, float) if kind is float else (kind,)
        fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
        if not fits:
            raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
        limits = field.metadata
        if "choices" in limits:
            check_choice(field.name, value, limits["choices"])
        if "above" in limits and not limits["above"] < value < float("inf"):
            raise ValueError(f"{field.name} must be > {limits['above']} and finite, got {value!r}")
        if "least" in limits and not value >= limits["least"]:
            raise ValueError(f"{field.name} must be >= {limits['least']}, got {value!r}")

    @property
    def constraints(self) -> dict[str, float]:
        """Kappa of each constraint, by name."""
        kappas = self.kappa or tuple(KAPPAS[name] for name in self.constraint)
        return dict(zip(self.constraint, kappas, strict=True))

    @property
    def geco_step_size(self) -> float:
        """``step_size``, or what makes log lambda fall by 0.05 a step at a perfect reconstruction.

        A squared error is satisfied by at most kappa^2, a score by at most 1 - kappa; of several
        constraints the one with the least room decides, ``max_log_step`` holds back the others.
        """
        if self.step_size is not None:
            return self.step_size
        return 0.05 / min(
            1 - kappa if name in ("cla", "pncc") else kappa**2
            for name, kappa in self.constraints.items()
        )

    def to_json(self) -> str:
        """The fields as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration with these fields; `ValueError` names an unknown one."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown configuration key {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    @classmethod
    def from_file(cls, path: Path) -> TrainConfig:
        """Read ``config.json``; `TrainError` names the file and what is wrong with it."""
        try:
            values = json.loads(path.read_text())
            if not isinstance(values, dict):
                raise ValueError(f"must hold an object, got {type(values).__name__}")
            return cls.from_dict(values)
        except FileNotFoundError:
            raise TrainError(f"{path.parent} holds no run: {path.name} is missing") from None
        except (OSError, TypeError, ValueError) as error:
            raise TrainError(f"{path}: {error}") from error

    def check_resumes(self, earlier: TrainConfig) -> None:
        """Raise `TrainError` where this run could not have been ``earlier``, carried on."""
        for field in dataclasses.fields(self):
            now, then = getattr(self, field.name), getattr(earlier, field.name)
            if now != then and not field.metadata.get("free"):
                raise TrainError(
                    f"cannot resume with {field.name} {now!r}: the run was started with {then!r}"
                )
