"""Reconstruction fixed points of high-capacity beta-VAEs (proposition 4, appendices A and B).

A basis of m tiles of the latent square has a reconstruction vector psi_a each; the map F takes them
to the means of the data that they are responsible for. Everything that sums over data comes out of
`geco_fast.ops.equilibrium_map` and its gradients, which stream: no n by m matrix exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geco_fast import ops


def tile_centres(side: int) -> Tensor:
    """Centres ``[side * side, 2]`` of equal tiles of the latent square [-1/2, 1/2]^2, float64."""
    centre = (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5
    return torch.cartesian_prod(centre, centre)


def initial_vectors(side: int, seed: int, noise: float = 0.1) -> Tensor:
    """Vectors at the tiles' centres plus uniform noise in [-noise, noise] (appendix A)."""
    centres = tile_centres(side)
    generator = torch.Generator().manual_seed(seed)
    return centres + noise * (2 * torch.rand(centres.shape, generator=generator).double() - 1)


@dataclass(frozen=True)
class Trajectory:
    """Vectors ``[t, m, d]`` from the first to the last, and whether they stopped moving."""

    vectors: Tensor
    converged: bool

    @property
    def last(self) -> Tensor:
        return self.vectors[-1]

    @property
    def steps(self) -> int:
        return len(self.vectors) - 1


def iterate(
    x: Tensor,
    psi: Tensor,
    beta: float,
    *,
    smoothing: float = 0.9,
    most_steps: int = 400,
    tolerance: float = 1e-3,
    lipschitz: Lipschitz | None = None,
) -> Trajectory:
    """Iterate ``psi <- smoothing * psi + (1 - smoothing) * F(psi)`` (appendix A).

    Parameters
    ----------
    x : Tensor
        Data ``[n, d]``.
    psi : Tensor
        First vectors ``[m, d]``, of the same dtype.
    beta : float
        Temperature, in units of the data squared.
    smoothing : float
        Weight of the vectors before.
    most_steps : int
        Steps after which it ends in any case.
    tolerance : float
        It ends after a step that is shorter, in the Frobenius norm.
    lipschitz : Lipschitz, optional
        Constraint whose projection follows F (proposition 6); its multipliers move.
    """
    path = [psi]
    for _ in range(most_steps):
        if lipschitz is None:
            mapped, _ = ops.equilibrium_map(x, psi, beta)
        else:
            mapped = lipschitz.project(*map_and_mass(x, psi, beta), len(x), beta)
        following = smoothing * psi + (1 - smoothing) * mapped
        if lipschitz is not None:
            lipschitz.ascend(following)
        length = float((following - psi).norm())
        psi = following
        path.append(psi)
        if length < tolerance:
            return Trajectory(torch.stack(path), True)
    return Trajectory(torch.stack(path), False)


def map_and_mass(x: Tensor, psi: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """F(psi) ``[m, d]``, and the data that each tile answers for, ``pi_a sum_i m_ia`` ``[m]``.

    The latter is the gradient of the summed log normalisers to the log prior.
    """
    log_prior = torch.full((len(psi),), -math.log(len(psi)), dtype=x.dtype, requires_grad=True)
    mapped, log_normaliser = ops.equilibrium_map(x, psi, beta, log_prior=log_prior)
    (mass,) = torch.autograd.grad(log_normaliser.sum(), log_prior)
    return mapped.detach(), mass


def error_and_kl(x: Tensor, psi: Tensor, beta: float) -> tuple[float, float]:
    """Expected squared error u(beta) = E ||x - g||^2 and average KL in nats, over data and tiles.

    With Z the normaliser of a point, d ln Z / d beta is its expected energy over beta^2, and its KL
    to the prior is -u / beta - ln Z.
    """
    temperature = torch.tensor(beta, dtype=x.dtype, requires_grad=True)
    _, log_normaliser = ops.equilibrium_map(x, psi, temperature)
    mean = log_normaliser.double().mean()
    (slope,) = torch.autograd.grad(mean, temperature)
    error = beta**2 * slope.item()
    return error, -error / beta - mean.item()


@dataclass(frozen=True)
class Occupation:
    """Solution of proposition 5: probabilities of the partition's elements under the prior.

    ``residual`` is how far ``sum_i exp(-H_ia/beta) / sum_b exp(-H_ib/beta) gamma_b`` over n is from
    1, at most, where gamma is above ``kept`` of an equal share; ``excess`` how far it is above 1
    anywhere, which a maximum of the likelihood does not allow.
    """

    gamma: Tensor
    residual: float
    excess: float
    steps: int


def occupation(
    x: Tensor,
    psi: Tensor,
    beta: float,
    *,
    tolerance: float = 1e-3,
    most_steps: int = 20_000,
    kept: float = 1e-3,
) -> Occupation:
    """Solve ``sum_i exp(-H_ia/beta) / sum_b exp(-H_ib/beta) gamma_b = n`` by expectation and
    maximisation, of which it is the fixed point.

    Parameters
    ----------
    x, psi, beta
        As of `iterate`; psi are distinct.
    tolerance : float
        It ends with a residual and an excess below.
    most_steps : int
        Steps after which it ends in any case.
    kept : float
        Elements whose gamma has gone below this part of an equal share are left out of the
        residual: they vanish, and the equation holds for those that stay.
    """
    gamma = torch.full((len(psi),), 1 / len(psi), dtype=x.dtype)
    step = 0
    while step < most_steps:
        step += 1
        log_prior = gamma.log().requires_grad_()
        _, log_normaliser = ops.equilibrium_map(x, psi, beta, log_prior=log_prior)
        (mass,) = torch.autograd.grad(log_normaliser.sum(), log_prior)
        ratio = mass / (gamma * len(x))
        stays = gamma > kept / len(psi)
        residual = float((ratio[stays] - 1).abs().max())
        excess = float((ratio - 1).max())
        if max(residual, excess) < tolerance:
            break
        gamma = (mass / len(x)).clamp_min(torch.finfo(x.dtype).tiny)
    return Occupation(gamma, residual, excess, step)


def distinct(psi: Tensor, distance: float) -> Tensor:
    """Means ``[k, d]`` of the groups of vectors that hang together at a distance."""
    from sklearn.cluster import DBSCAN

    label = torch.from_numpy(DBSCAN(eps=distance, min_samples=1).fit(psi.numpy()).labels_)
    return torch.stack([psi[label == k].mean(0) for k in range(int(label.max()) + 1)])


class Lipschitz:
    r"""Constraint ``||g(z) - g(z')|| <= L ||z - z'||`` on latent points closer than a radius.

    Parameters
    ----------
    side : int
        Tiles in each direction; the grid is that of `tile_centres`.
    bound : float
        L: the smaller, the stronger.
    radius : float
        Pairs of tiles whose centres are farther apart are free.
    rate : float
        Step of a multiplier's logarithm per unit of constraint.
    most : float
        Largest step of a logarithm.
    first : float
        First value of the multipliers.

    Notes
    -----
    Rezende and Viola, "Taming VAEs" (2018), appendix B, equation 8 and proposition 6. How the
    multipliers move is open there; here by exponentiated ascent, as GECO's do. The projection is
    ``(D + Lap)^-1 D F(psi)`` with the Laplacian of the weights Omega C.
    """

    def __init__(
        self,
        side: int,
        bound: float,
        radius: float,
        *,
        rate: float = 0.2,
        most: float = 0.1,
        first: float = 1e-4,
    ) -> None:
        centres = tile_centres(side)
        squared = torch.cdist(centres, centres).square()
        # The mean squared distance of two points of tiles of side h is h^2 / 3 larger.
        self.inverse = 1 / (bound**2 * (squared + 1 / (3 * side**2)))
        self.bound_pairs = (squared <= radius**2) & ~torch.eye(len(centres), dtype=torch.bool)
        self.log_omega = torch.full_like(squared, math.log(first))
        self.rate, self.most = rate, most

    def violations(self, psi: Tensor) -> Tensor:
        """``C_ab ||psi_a - psi_b||^2 - 1`` ``[m, m]``; at most 0 where the constraint is met."""
        return self.inverse * torch.cdist(psi, psi).square() - 1

    def fraction_violated(self, psi: Tensor, slack: float = 0.05) -> float:
        """Part of the constrained pairs that break it by more than ``slack``."""
        return float((self.violations(psi)[self.bound_pairs] > slack).double().mean())

    def project(self, mapped: Tensor, mass: Tensor, count: int, beta: float) -> Tensor:
        """Return ``(D + Lap)^-1 D F(psi)``, whose rows' weights sum to 1."""
        weights = torch.where(self.bound_pairs, self.log_omega.exp(), 0) * self.inverse
        # A tile without data follows its neighbours alone.
        data = mass.clamp_min(torch.finfo(mass.dtype).tiny) / (beta * count)
        system = torch.diag(data + weights.sum(1)) - weights
        return torch.linalg.solve(system, data[:, None] * mapped)

    def ascend(self, psi: Tensor) -> None:
        """Move the multipliers along the constraint's violations."""
        step = (self.rate * self.violations(psi)).clamp(-self.most, self.most)
        self.log_omega = (self.log_omega + step).clamp(-30.0, 10.0)
