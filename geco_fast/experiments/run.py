"""The parts of a run, built from its configuration: data, model, constraints, GECO, optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geco_fast import constraints, data, ops
from geco_fast.constraints import LocalStatistics
from geco_fast.data import Batch, DataNotFoundError, ImageDataset
from geco_fast.experiments.checkpoint import write_atomically
from geco_fast.experiments.config import TrainConfig, TrainError
from geco_fast.experiments.distributed import World
from geco_fast.geco import GECO
from geco_fast.nn import NVPVAE, Classifier, ConvDraw
from geco_fast.objectives import OBJECTIVES, VAEOutput

# Every use of randomness has its own stream, so that none shifts another.
DATA, NOISE, CLASSIFIER, EVALUATION, SAMPLES, MARGINAL = range(6)


def generator(seed: int, *key: int) -> torch.Generator:
    """A generator on the CPU that depends on the seed and the key alone."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, stream: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(length)


def batch_indices(seed: int, stream: int, step: int, batch_size: int, length: int) -> np.ndarray:
    """Which images step number ``step`` uses; every epoch is a fresh permutation of all.

    It depends on the arguments alone, so a resumed run needs nothing but its step.
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(position[0] // length, position[-1] // length + 1)
    order = np.concatenate([_permutation(seed, stream, epoch, length) for epoch in epochs])
    return order[position - epochs[0] * length]


class Run:
    """What training and evaluation share.

    Parameters
    ----------
    config
    out
        Folder of the run; holds ``classifier.safetensors`` where a constraint needs one.
    world
    say
        Receives lines of text on what takes long.

    Raises
    ------
    TrainError
        The data cannot be read, or the model does not fit them.
    """

    def __init__(
        self, config: TrainConfig, out: Path, world: World, say: Callable[[str], None] = print
    ) -> None:
        self.config, self.world = config, world
        self.dtype = getattr(torch, config.dtype)
        try:
            self.train_data = self._load("train")
            self.test_data = self._load("test")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.model = build_model(config, self.train_data)
        except DataNotFoundError as error:
            raise TrainError(f"{error} (--data-root names the folder)") from error
        except (TypeError, ValueError) as error:
            raise TrainError(str(error)) from error
        self.model.to(world.device, self.dtype)
        self.geco = GECO(
            self._constraints(out, say),
            alpha=config.alpha,
            step_size=config.geco_step_size,
            lambda_init=config.lambda_init,
            max_log_step=config.max_log_step,
            process_group=world.group,
        ).to(world.device, self.dtype)
        sigma = self.model.log_sigma
        rest = [value for value in self.model.parameters() if value is not sigma]
        # One scalar with a long way to go from sigma = 1.
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": [sigma], "lr": 10 * config.learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=config.learning_rate)
        options: dict[str, dict[str, Any]] = {
            "beta": {"beta": config.beta},
            "annealed": {"steps": config.anneal_steps},
        }
        self._options = options.get(config.objective, {})

    def training_batch(self, step: int) -> tuple[Batch, Tensor]:
        """This process's part of the images, and of the posterior's noise, of a step."""
        config, world = self.config, self.world
        indices = batch_indices(config.seed, DATA, step, config.batch_size, len(self.train_data))
        noise = self.noise(config.batch_size, NOISE, step)
        batch = self.batch(self.train_data, world.share(indices))
        return batch, world.share(noise, self.model.noise_batch_dim)

    def batch(self, dataset: ImageDataset, indices: np.ndarray) -> Batch:
        """Images, contexts and labels on the run's device, in its floating-point type."""
        image, context, label = dataset.batch(indices)
        device = self.world.device
        return Batch(
            image.to(device, self.dtype),
            None if context is None else context.to(device, self.dtype),
            None if label is None else label.to(device),
        )

    def noise(self, count: int, *key: int) -> Tensor:
        """The posterior's noise for ``count`` images.

        It is drawn on the CPU, so that a seed means the same run on every device.
        """
        draw = generator(self.config.seed, *key)
        return self.model.noise(count, generator=draw, dtype=self.dtype).to(self.world.device)

    def terms(self, batch: Batch, output: VAEOutput) -> dict[str, Tensor]:
        """What is measured on each image, ``[B]`` each: KL, likelihood, error, constraints."""
        terms = {
            "kl": output.kl,
            "log_likelihood": output.log_likelihood,
            "re": ops.squared_error(batch.image, output.reconstruction),
        }
        values = self.geco.evaluate_constraints(batch.image, output.reconstruction, batch.label)
        return terms | {f"constraint_{name}": value for name, value in values.items()}

    def loss(self, batch: Batch, output: VAEOutput, terms: dict[str, Tensor], step: int) -> Tensor:
        """The scalar to minimise."""
        objective = OBJECTIVES[self.config.objective](output, batch.image, step, **self._options)
        if self.config.objective != "geco":
            return objective.mean()
        return self.geco(objective, {n: terms[f"constraint_{n}"] for n in self.config.constraints})

    def sigma_loss(self, batch: Batch, terms: dict[str, Tensor]) -> Tensor:
        """Negative log-likelihood as a function of sigma alone, up to a constant.

        GECO and the annealed objective do not depend on the decoder's learned sigma; with this
        term it follows its maximum likelihood and nothing else changes.
        """
        if self.config.objective in ("elbo", "beta"):
            return torch.zeros((), device=self.world.device, dtype=self.dtype)
        log_sigma = self.model.log_sigma
        error = terms["re"].detach().mean()
        return batch.image[0].numel() * (log_sigma + 0.5 * error * torch.exp(-2 * log_sigma))

    def multipliers(self) -> dict[str, float]:
        """Each constraint's moving average and lambda, and beta for one constraint; GECO only."""
        if self.config.objective != "geco":
            return {}
        names = {"constraint": "average", "lambda": "lambda"}
        row = {}
        for key, value in self.geco.log_dict().items():
            kind, _, name = key.partition("/")
            row[f"{names[kind]}_{name}" if name else key] = value
        return row

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by name."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"geco.{name}": value for name, value in self._geco_buffers().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the tensors of `state`; `TrainError` where they belong to another model."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "geco": {}, "optimizer": {}}
        try:
            for name, value in state.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = value
            self.model.load_state_dict(parts["model"])
            for name, buffer in self._geco_buffers().items():
                buffer.copy_(parts["geco"][name])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise TrainError(f"the checkpoint belongs to another model: {reason}") from error
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, slot = name.partition(".")
            # Adam keeps its step count on the CPU.
            slots.setdefault(int(index), {})[slot] = value.cpu() if slot == "step" else value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})

    def _geco_buffers(self) -> dict[str, Tensor]:
        return dict(self.geco.named_buffers(recurse=False))

    def _load(self, split: str) -> ImageDataset:
        config = self.config
        return data.load(
            config.data,
            config.data_root,
            split=split,
            image_size=config.image_size,
            base=config.data_base,
            seed=config.seed,
            download=config.download,
        )

    def _constraints(self, out: Path, say: Callable[[str], None]) -> dict[str, nn.Module]:
        def build(name: str, kappa: float) -> nn.Module:
            match name:
                case "re":
                    return constraints.ReconstructionError(kappa)
                case "fre":
                    features = self._classifier(out, say).features
                    return constraints.FeatureReconstructionError(features, kappa)
                case "fre-stats":
                    return constraints.FeatureReconstructionError(LocalStatistics(4), kappa)
                case "cla":
                    return constraints.ClassificationAccuracy(self._classifier(out, say), kappa)
                case _:
                    side = min(8, *self.train_data.image_shape[1:])
                    return constraints.PatchNCC(kappa, patch_size=side)

        return {name: build(name, kappa) for name, kappa in self.config.constraints.items()}

    def _classifier(self, out: Path, say: Callable[[str], None]) -> Classifier:
        """The run's classifier: the one in its folder, else one trained now and kept there."""
        dataset, path = self.train_data, out / "classifier.safetensors"
        if dataset.num_classes is None:
            raise TrainError(f"constraints fre and cla need labels, {self.config.data} has none")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = Classifier(dataset.image_shape, dataset.num_classes)
        model.to(self.world.device, self.dtype)
        if self.world.leads and not path.exists():
            self._train_classifier(model, say)
            write_atomically(path, safetensors.torch.save(model.state_dict()))
        self.world.wait()
        try:
            model.load_state_dict(safetensors.torch.load(path.read_bytes()))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise TrainError(f"{path} does not hold this run's classifier: {reason}") from error
        return model

    def _train_classifier(self, model: nn.Module, say: Callable[[str], None]) -> None:
        seed, steps, size = self.config.seed, self.config.classifier_steps, 128
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for step in range(steps):
            indices = batch_indices(seed, CLASSIFIER, step, size, len(self.train_data))
            batch = self.batch(self.train_data, indices)
            assert batch.label is not None
            loss = F.cross_entropy(model(batch.image), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                say(f"classifier: step {step + 1}/{steps}  cross-entropy {loss.item():.4f}")


def build_model(config: TrainConfig, dataset: ImageDataset) -> ConvDraw | NVPVAE:
    """The generative model for the images, and the contexts if any, of a data set."""
    shape = dataset.image_shape
    common: dict[str, Any] = {"context_shape": dataset.context_shape}
    if config.model == "nvp":
        return NVPVAE(
            shape,
            latent_features=config.latent_features,
            couplings=config.couplings,
            hidden_features=(config.hidden_features,) * 2,
            **common,
        )
    if dataset.context_shape is not None:
        common["context_channels"] = config.hidden_channels
    return ConvDraw(
        shape,
        hidden_channels=config.hidden_channels,
        latent_channels=config.latent_channels,
        steps=config.draw_steps,
        downsample=config.downsample or (2 if min(shape[1:]) < 28 else 4),
        **common,
    )
