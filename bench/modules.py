"""Problems that are more than one operator: layers and training steps, each with its rivals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import geco_fast as gf
from geco_fast.bench.baselines import conv_draw, conv_lstm, coupling, geco, nvp_vae
from geco_fast.bench.entrants import (
    BOTH,
    COMPILED,
    DIRECTIONS,
    FORWARD,
    PLAIN,
    Entrant,
    Results,
    Step,
    as_tuple,
    differentiated,
)
from geco_fast.bench.limits import Work
from geco_fast.bench.rivals import Rival
from geco_fast.ops.conv_lstm import WINOGRAD_BOUND


@dataclass(frozen=True)
class ModuleCase:
    """One module on inputs of one size.

    Parameters
    ----------
    module : str
        Name of the module; what `--op` takes.
    name : str
        What is special about the case.
    make : callable
        Makes ours; the generator is seeded before.
    inputs : callable
        Draws the inputs, a tuple of tensors.
    plain : callable
        From ours, a module that computes the same in PyTorch's own operations.
    rivals : mapping
        The others; their `build` takes ours.
    training : bool
        Whether the module returns a loss, and a step is one of training: forward, backward and the
        optimiser's step. Otherwise the gradients are those to inputs and parameters.
    bound : float, optional
        Relative error in the Frobenius norm that ours may have instead of the accuracy rule's.
    """

    module: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[nn.Module], nn.Module]
    rivals: Mapping[str, Rival]
    training: bool = False
    bound: float | None = None

    def __str__(self) -> str:
        return f"{self.module}-{self.name}"


class ModuleProblem:
    """A module case, in float32."""

    def __init__(self, case: ModuleCase, device: str = "cpu") -> None:
        self.case = case
        self.device = device
        self.operator = case.module
        # Winograd's domain is the CPU's.
        self.bound = case.bound if device == "cpu" else None
        self.directions = (BOTH,) if case.training else DIRECTIONS
        self.rivals = {"eager": PLAIN, "compile": COMPILED, **case.rivals}
        self._work: dict[str, Work] = {}

    def __str__(self) -> str:
        return str(self.case)

    def _ours(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.case.make().to(self.device)

    def _inputs(self) -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return tuple(tensor.to(self.device) for tensor in self.case.inputs())

    def build(self, side: str) -> Entrant:
        module = self._ours()
        if side in ("eager", "compile"):
            module = self.case.plain(module)
            if side == "compile":
                module.compile(fullgraph=True)
        elif side not in ("ours", "self"):
            module = self.rivals[side].build(module)
            if hasattr(module, "entrant"):
                return module.entrant(self._inputs())
        kind = TrainingEntrant if self.case.training else LayerEntrant
        return kind(module, self._inputs(), side in self.rivals and self.rivals[side].permuted)

    def expected(self, seed: int) -> tuple[Results, Results]:
        kind = TrainingEntrant if self.case.training else LayerEntrant
        plain = self.case.plain(self._ours())
        same = kind(plain, self._inputs()).results(seed, BOTH)
        wide = tuple(tensor.double() for tensor in self._inputs())
        return same, kind(plain.double(), wide).results(seed, BOTH)

    def seeds(self) -> range:
        return range(1)

    def work(self, direction: str) -> Work | None:
        """Operations of the products and convolutions of the plain form; bytes aren't counted."""
        if direction not in self._work:
            plain = self.case.plain(self._ours())
            leaves = [tensor.requires_grad_(not self.case.training) for tensor in self._inputs()]
            with FlopCounterMode(display=False) as counter:
                total = sum(value.sum() for value in as_tuple(plain(*leaves)))
                if direction == BOTH:
                    total.backward()
            self._work[direction] = Work(0.0, float(counter.get_total_flops()))
        work = self._work[direction]
        return work if work.operations else None


def random_upstream(values: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of a module's results, the same for every side."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(v.shape, generator=generator, dtype=torch.float32).to(v) for v in values]


def _flat(gradients: Any, permuted: bool) -> Tensor:
    """All gradients as one vector; sorted where a rival holds its parameters in another order."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return flat.sort().values if permuted else flat


class LayerEntrant:
    """A module that returns a tensor or a tuple of tensors."""

    def __init__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], permuted: bool = False
    ) -> None:
        self.module = module
        self.inputs = inputs
        self.permuted = permuted

    def step(self, direction: str) -> Step:
        module, inputs = self.module, self.inputs
        if direction == FORWARD:

            def forward() -> object:
                with torch.no_grad():
                    return module(*inputs)

            return forward
        leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        upstream = random_upstream(as_tuple(module(*leaves)))
        wanted = [*leaves, *module.parameters()]
        return lambda: differentiated(as_tuple(module(*leaves)), wanted, upstream)

    def results(self, seed: int, direction: str) -> Results:
        if direction == FORWARD:
            with torch.no_grad():
                return Results(list(as_tuple(self.module(*self.inputs))), [])
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        values = as_tuple(self.module(*leaves))
        found = differentiated(
            values, [*leaves, *self.module.parameters()], random_upstream(values)
        )
        own = _flat(found[len(leaves) :], self.permuted)
        return Results([v.detach() for v in values], [*found[: len(leaves)], own])


class TrainingEntrant:
    """A module that returns a loss, trained by Adam."""

    def __init__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], permuted: bool = False
    ) -> None:
        self.module = module
        self.inputs = inputs
        self.permuted = permuted

    def step(self, direction: str) -> Step:
        module, inputs = self.module, self.inputs
        # What a CUDA graph can hold, on a GPU.
        capturable = any(tensor.is_cuda for tensor in inputs)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-5, capturable=capturable)

        def step() -> object:
            optimizer.zero_grad()
            loss = module(*inputs)
            loss.backward()
            optimizer.step()
            return loss

        return step

    def results(self, seed: int, direction: str) -> Results:
        # One number can agree by luck; the gradients of all parameters can't.
        found = torch.autograd.grad(self.module(*self.inputs), list(self.module.parameters()))
        return Results([], [_flat(found, self.permuted)])


def _coupling(scale_map: str, features: int = 64) -> ModuleCase:
    def make() -> nn.Module:
        layer = gf.nn.AffineCoupling(features, scale_map=scale_map)
        # The last layer starts at zero, where every scale map is the same.
        nn.init.normal_(layer.layers[-1].weight, std=0.02)
        nn.init.normal_(layer.layers[-1].bias, std=0.02)
        return layer

    return ModuleCase(
        "AffineCoupling",
        f"4096x{features}-512-512-{scale_map}",
        make,
        lambda: (torch.randn(4096, features),),
        coupling.PlainAffineCoupling,
        coupling.RIVALS[scale_map],
    )


def _flow(batch: int, features: int, context: int) -> ModuleCase:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = gf.nn.ConditionalRealNVP(features, context)
            for layer in self.flow.layers:
                nn.init.normal_(layer.layers[-1].weight, std=0.02)
                nn.init.normal_(layer.layers[-1].bias, std=0.02)

        def forward(self, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return self.flow.sample_and_log_prob(context, noise=noise)

    return ModuleCase(
        "ConditionalRealNVP",
        f"{batch}x{features}-context-{context}-8-couplings",
        Flow,
        lambda: (torch.randn(batch, features), torch.randn(batch, context)),
        lambda module: coupling.PlainRealNVP(module.flow),
        coupling.FLOW_RIVALS,
    )


def _cell(channels: int, size: int, batch: int = 32) -> ModuleCase:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = gf.nn.ConvLSTMCell(channels, channels, 5)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            return self.cell(x, (h, c))

    shape = (batch, channels, size, size)
    return ModuleCase(
        "ConvLSTMCell",
        f"{batch}x{channels}x{size}x{size}-5x5",
        Cell,
        lambda: tuple(torch.randn(shape) for _ in range(3)),
        lambda module: conv_lstm.PlainCell(module.cell),
        conv_lstm.CELL_RIVALS,
        bound=WINOGRAD_BOUND,
    )


def _sequence(channels: int, size: int, batch: int = 32, steps: int = 8) -> ModuleCase:
    """A layer over several steps, whose weight is made ready once."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = gf.nn.ConvLSTM(channels, channels, 5)

        def forward(self, x: Tensor) -> Tensor:
            outputs, _ = self.cell(x)
            return outputs

    return ModuleCase(
        "ConvLSTM",
        f"{steps}x{batch}x{channels}x{size}x{size}-5x5",
        Sequence,
        lambda: (torch.randn(steps, batch, channels, size, size),),
        lambda module: conv_lstm.PlainSequence(conv_lstm.PlainCell(module.cell.cell)),
        conv_lstm.SEQUENCE_RIVALS,
        bound=WINOGRAD_BOUND,
    )


def _with_class(kind: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """The same parameters under another class's `forward`."""

    def plain(module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module)
        module.model.__class__ = kind
        return module

    return plain


class _Loss(nn.Module):
    """The negative evidence bound of a model, as a function of images, noise and context."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> Tensor:
        output = self.model(x, context, noise=noise)
        return gf.objectives.elbo(output, x).mean()


def _conv_draw(name: str, image: tuple[int, int, int], batch: int, **options: Any) -> ModuleCase:
    def inputs() -> tuple[Tensor, ...]:
        steps, downsample = options["steps"], options["downsample"]
        size = (image[1] // downsample, image[2] // downsample)
        given = [
            torch.rand(batch, *image),
            torch.randn(steps, batch, options["latent_channels"], *size),
        ]
        if options.get("context_channels"):
            given.append(torch.randn(batch, options["context_channels"], *size))
        return tuple(given)

    return ModuleCase(
        "ConvDraw",
        name,
        lambda: _Loss(gf.nn.ConvDraw(image, **options)),
        inputs,
        _with_class(conv_draw.PlainConvDraw),
        {},
        training=True,
        bound=WINOGRAD_BOUND,
    )


MODULES = [
    *(_coupling(scale_map) for scale_map in ("tanh", "exp", "sigmoid")),
    _flow(256, 64, 256),
    _cell(64, 8),
    _cell(128, 8),
    _cell(64, 16),
    _sequence(64, 8),
    _sequence(128, 8),
    _sequence(64, 16),
    ModuleCase(
        "GECO",
        "1-constraint-64",
        geco.Problem,
        lambda: (torch.randn(64),),
        geco.PlainProblem,
        geco.RIVALS,
        training=True,
    ),
    _conv_draw(
        "28x28-hidden-64-batch-32",
        (1, 28, 28),
        32,
        hidden_channels=64,
        latent_channels=8,
        steps=8,
        downsample=2,
    ),
    _conv_draw(
        "64x64-context-256-hidden-128-batch-8",
        (3, 64, 64),
        8,
        hidden_channels=128,
        latent_channels=8,
        steps=8,
        downsample=4,
        context_channels=256,
    ),
    ModuleCase(
        "NVPVAE",
        "28x28-latent-64-8-couplings-batch-64",
        lambda: _Loss(gf.nn.NVPVAE((1, 28, 28))),
        lambda: (torch.rand(64, 1, 28, 28), torch.randn(64, 64)),
        _with_class(nvp_vae.PlainNVPVAE),
        {},
        training=True,
    ),
]


def module_problems(module: str | None = None) -> list[ModuleProblem]:
    """The modules' problems, of one module or of all, on the CPU."""
    return [ModuleProblem(case) for case in MODULES if module in (None, case.module)]
