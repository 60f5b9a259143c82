"""CryoSPIRE: a decoder of states and a latent for each image, fitted to the images of one half-set.

Two stages, as published: a coarse mixture finds out what moves alike, a fine one moves with anchors that follow from it
(`models.cryospire`, `parts`). The separable decoder (`models.decoder`) may take the place of the networks; its fine
mixture lies within the coarse one's Gaussians. Nothing passes between half-sets: latents of the other half are found
under a model that stays (`place_latents`).

Of several processes each has the latents of its own particles (`Shares`), and all have the decoder, whose gradients
are summed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emsplat.errors import EmsplatError, InputError
from emsplat.fitting.checkpoint import spread_state
from emsplat.fitting.images import ImageObjective, noise_weight
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Optimiser, Plan, State
from emsplat.heterogeneity.density import Density
from emsplat.heterogeneity.evidence import Gain, mean_gain
from emsplat.heterogeneity.parts import cluster, find_anchors
from emsplat.imaging.ctf import Observed, in_image, observe
from emsplat.imaging.project import project, voxelize
from emsplat.maths.fourier import hermitian_weight
from emsplat.models import decoder as separable
from emsplat.models.base import Model, ParameterGroup
from emsplat.models.conformations import Conformations, StateDecoder, read_conformations
from emsplat.models.cryospire import Hierarchy, NetworkShape, PartDiscovery
from emsplat.models.decoder import Decoder
from emsplat.models.starts import dense_part
from emsplat.parallel import ALONE, EVERYTHING, Portion, World
from emsplat.particles.noise import estimate_noise
from emsplat.particles.stack import ParticleStack
from emsplat.types import Batch, Gaussians, Grid, Poses

_SPREAD = 0.1  # of latents that start at random
# Times the learning rate: an epoch moves a latent once. Random ones have far to go, given ones are lost by large steps.
_FROM_RANDOM, _FROM_GIVEN = 50.0, 10.0
_BRIGHT = 512  # images that the brightness of the start, and the gain, are judged by
_POINTS = 32  # states that the gain is judged by
_STATES = 128  # images whose states say which Gaussians are used
_LESSONS, _OF_LESSON = 400, 16  # steps by which rigid motions follow the first stage, and states of each
_TEACH = 2e-2  # their rate
_SOME = 0.02  # of the largest density of a mixture: less is nothing
_READ = 64  # images at a time where nothing is fitted


@dataclass(frozen=True)
class Pass:
    """One stage: how many Gaussians of which width, and how long and how fast they are fitted."""

    gaussians: int
    width: float  # at the start, of the box
    epochs: int
    learning_rate: float
    last: float = 0.1  # of the rate, at the end: noise dominates every gradient, and a falling rate averages it out

    def plan(self, first: int = 0) -> Plan:
        """The stage after ``first`` epochs of others."""
        return Plan(self.epochs, self.learning_rate, self.last ** (1 / max(self.epochs, 1)), first)


@dataclass(frozen=True)
class ConformationOptions:
    """Numbers of the fit; those of the supplement where it has them (24 features, 4 latents, counts, widths)."""

    decoder: Literal["perceptron", "separable"] = "perceptron"
    features: int = 24
    latents: int = 4  # where none are given
    hidden: int = 64
    parts: int | None = None  # None: from the data (`parts.count_clusters`)
    threshold: float | None = None  # density below which no Gaussian starts; None: three deviations of the surroundings
    batch: int = 64
    latent_rate: float | None = None  # times the learning rate; None: 50 from random latents, 10 from given ones
    penalty: float = 1e-3  # of the mean squared feature offset, beside the squared error per pixel
    weighted: bool = False  # by the noise spectrum; the paper's error is plain
    seed: int = 0
    coarse: Pass = Pass(2048, 0.02, 20, 5e-3)
    fine: Pass = Pass(8192, 0.01, 10, 5e-3)


@dataclass(frozen=True)
class ImageStart:
    """What a fit begins with: a consensus map of the same half-set on the stack's grid, latents where there are some.

    ``latent`` has a row for each view of the stack's particles, in their order; None draws them at random.
    """

    volume: Float[Tensor, "z y x"]
    latent: Float[Tensor, "v q"] | None = None


@dataclass(frozen=True, eq=False)
class Shares:
    """Which particles of a stack are this process's ``own`` (None: all), with their rows of the table, and which
    ``views``, each with a latent."""

    world: World = ALONE
    own: Bool[Tensor, " p"] | None = None
    rows: Int[Tensor, " m"] | None = None
    all_rows: Int[Tensor, " p"] | None = None
    views: Portion = EVERYTHING

    def part(self, state: State[Conformations]) -> State[Conformations]:
        """A state of all latents with the own ones alone."""
        return self._with(state, self.rows, self.views.of)

    def whole(self, state: State[Conformations]) -> State[Conformations]:
        """A state of the own latents with those of all processes, in each of them."""
        return self._with(state, self.all_rows, self.views.whole)

    def _with(
        self, state: State[Conformations], rows: Tensor | None, among: Callable[[Tensor], Tensor]
    ) -> State[Conformations]:
        model = state.model
        if rows is None:
            return state
        latent = among(model.latent.detach())
        other = Conformations(model.decoder, latent, rows.to(latent.device), elements=model.elements, rate=model.rate)
        moments = state.optimiser.moments()
        moments |= {
            name: among(own) for name, own in moments.items() if name in ("latent.exp_avg", "latent.exp_avg_sq")
        }
        return state.with_model(other, moments)


def shares(stack: ParticleStack, world: World = ALONE) -> Shares:
    """Who has which particles: all rows of one are with the same process, as everywhere."""
    if world.size == 1:
        return Shares()
    mine, elements = stack.shared(world), stack.symmetry.order
    own = torch.zeros(len(stack), dtype=torch.bool)
    own[mine] = True
    views = (mine[:, None] * elements + torch.arange(elements)).flatten()
    return Shares(world, own, stack.rows[mine], stack.rows, Portion(world, views, len(stack) * elements))


def fit_images(
    stack: ParticleStack, options: ConformationOptions, start: ImageStart
) -> tuple[Conformations, Float[Tensor, "v q"]]:
    """The model of one half-set and the latents of its views, after both stages.

    Raises:
        InputError: the start does not go with the stack, or the images do not show it.
        EmsplatError: the fit diverged.
    """
    state = None
    for state in follow_images(stack, options, start):  # noqa: B007 (its last is the result)
        pass
    if state is None:
        raise InputError("no epochs at all; expected at least one in a stage")
    return state.model, state.model.latent.detach()


def follow_images(
    stack: ParticleStack,
    options: ConformationOptions,
    start: ImageStart,
    resumed: State[Conformations] | None = None,
    among: Shares | None = None,
) -> Iterator[State[Conformations]]:
    """`fit_images` step by step, from the beginning or from where a checkpoint left off (read by `read_conformations`).

    There are ``coarse.epochs`` + ``fine.epochs`` epochs of ⌈images / batch⌉ steps. ``start`` and ``resumed`` are of all
    views; the states that come have the latents of this process (`Shares.whole`).

    Raises:
        as `fit_images`.
    """
    among = among or Shares()
    world = among.world
    noise = estimate_noise(stack) if options.weighted else None
    images = ImageObjective(stack, batch=options.batch, seed=options.seed, noise=noise, world=world, own=among.own)
    objective = _WithPenalty(images, options.penalty)
    state = among.part(resumed or State.begin(_begin(stack, options, start, world)))
    coarse, fine = options.coarse, options.fine
    turn = coarse.epochs * objective.steps_per_epoch
    if state.step < turn:
        for state in fit(state, objective, coarse.plan(), world=world):  # noqa: B020
            yield state
    if not fine.epochs:
        return
    if state.step == turn:
        state = among.part(_turned(among.whole(state), stack.grid, options, world))
    yield from fit(state, objective, fine.plan(coarse.epochs), world=world)


def steps_of(stack: ParticleStack, options: ConformationOptions) -> int:
    """How many steps `follow_images` takes in all."""
    return (options.coarse.epochs + options.fine.epochs) * math.ceil(len(stack) / options.batch)


class _WithPenalty:
    """An objective on images and what feature offsets cost."""

    def __init__(self, images: ImageObjective, weight: float) -> None:
        self.images, self.weight = images, weight if images.world.first else 0.0  # one process's terms add it
        self.steps_per_epoch = images.steps_per_epoch

    def __call__(self, model: Model, step: int) -> dict[str, Tensor]:
        terms = self.images(model, step)
        if isinstance(model, Conformations) and isinstance(model.decoder, Hierarchy):
            terms["offsets"] = self.weight * model.decoder.penalty()
        return terms


def _generator(seed: int, stage: int) -> torch.Generator:
    return torch.Generator().manual_seed(2 * seed + stage)


def _begin(stack: ParticleStack, options: ConformationOptions, start: ImageStart, world: World) -> Conformations:
    """The first stage before its first step, as bright as fits the images."""
    grid, elements, rng = stack.grid, stack.symmetry.order, _generator(options.seed, 0)
    views = elements * len(stack)
    if start.volume.shape != (grid.size,) * 3:
        raise InputError(f"a start of {tuple(start.volume.shape)} voxels; expected {grid.size}³ as the images have")
    if start.latent is None:
        latent = _SPREAD * torch.randn(views, options.latents, generator=rng)
    elif len(start.latent) == views and bool(torch.isfinite(start.latent).all()):
        latent = start.latent.float().clone()
    else:
        raise InputError(f"{len(start.latent)} latents to start from; expected {views} finite rows, one for each view")
    count, width = options.coarse.gaussians, options.coarse.width * grid.length
    centre = seeds(start.volume, grid, count, options.threshold, rng)
    decoder: StateDecoder
    if options.decoder == "separable":
        own = separable.Shape(latent.shape[1], **({} if options.parts is None else {"parts": options.parts}))
        decoder = Decoder(centre, torch.full((count,), width), torch.ones(count), own, generator=rng)
    else:
        shape = NetworkShape(options.features, latent.shape[1], options.hidden)
        decoder = PartDiscovery(centre, shape, length=width, generator=rng)
    rate = options.latent_rate or (_FROM_RANDOM if start.latent is None else _FROM_GIVEN)
    model = Conformations(decoder, latent, stack.rows, elements=elements, rate=rate).to(stack.device)
    model = _as_first(State.begin(model), world, stack.device).model
    model.decoder.unit *= _brightness(stack, model, world)
    return model


def _as_first(state: State[Conformations] | None, world: World, device: torch.device) -> State[Conformations]:
    if state is not None and world.size == 1:
        return state
    return spread_state(state, world, device=device, read=read_conformations)


def _turned(
    state: State[Conformations], grid: Grid, options: ConformationOptions, world: World
) -> State[Conformations]:
    """Between the stages; the first process makes the second one."""
    made = State.begin(_refined(state.model, grid, options), state.step) if world.first else None
    return _as_first(made, world, state.model.latent.device)


def _refined(model: Conformations, grid: Grid, options: ConformationOptions) -> Conformations:
    """The second stage before its first step: anchors and a denser mixture from what the first one has found."""
    before, latent, rng = model.decoder, model.latent.detach(), _generator(options.seed, 1)
    count, width = options.fine.gaussians, options.fine.width * grid.length
    after: StateDecoder
    if isinstance(before, Decoder):
        after = copy.deepcopy(before).cpu().split(max(1, count // len(before)), width, rng)
    elif isinstance(before, PartDiscovery):
        reference = model.reference()
        after = _hierarchy(before, latent, reference, grid, options, rng)
    else:
        raise EmsplatError("a second stage can only follow a first one")
    after = after.to(latent.device)
    return Conformations(after, latent.clone(), model.rows, elements=model.elements, rate=model.rate)


def _hierarchy(
    before: PartDiscovery,
    latent: Float[Tensor, "v q"],
    reference: Float[Tensor, "1 q"],
    grid: Grid,
    options: ConformationOptions,
    rng: torch.Generator,
) -> Hierarchy:
    """Positions are those of the state ``reference``, weights means over states: what comes and goes is in the map."""
    before, reference = copy.deepcopy(before).cpu(), reference.cpu()
    some = latent[torch.linspace(0, len(latent) - 1, min(_STATES, len(latent)), device=latent.device).long()].cpu()
    used = before.used(some)
    if not bool(used.any()):
        raise EmsplatError("the first stage has left no Gaussian; try a smaller --learning-rate or another start")
    with torch.no_grad():
        position, mass = before(reference)[0][0], before(some)[1].mean(0)
    anchors = find_anchors(before, position, mass, used, options.parts, rng)
    variance = before.widths().detach()[used].square()
    seen = Gaussians(position[used], variance[:, None, None] * torch.eye(3), mass[used])
    volume = voxelize(seen, grid)
    # This map has no noise: what counts is where there is something at all.
    threshold = _SOME * float(volume.max()) if options.threshold is None else options.threshold
    centre = seeds(volume, grid, options.fine.gaussians, threshold, rng)
    near = torch.cat([torch.cdist(part, seen.mean).argmin(1) for part in torch.split(centre, 1024)])
    after = Hierarchy(
        centre,
        anchors.member[used][near],
        anchors.feature,
        anchors.position,
        anchors.part,
        before.shape,
        length=options.fine.width * grid.length,
        unit=before.unit,
        generator=rng,
    )
    inherit(after, before, anchors.member, mass, latent.cpu(), reference, rng)
    with torch.no_grad():  # as heavy as before
        after.unit *= float(seen.amplitude.sum() / after(some)[1].mean(0).sum())
    return after


def inherit(
    after: Hierarchy,
    before: PartDiscovery,
    member: Int[Tensor, " n"],
    weight: Float[Tensor, " n"],
    latent: Float[Tensor, "v q"],
    reference: Float[Tensor, "1 q"],
    generator: torch.Generator,
) -> None:
    """A second stage takes on how the first moves and changes, without looking at images.

    ``member`` is the anchor of each Gaussian of the first stage, -1 for none. What its network says of an anchor's
    feature is a shift of all that hangs on the anchor. From there, rigid motions come as close as they can to the
    motions of these Gaussians, counted by ``weight``. In the state ``reference`` everything is where it was put.
    """
    with torch.no_grad():
        after.modulation.load_state_dict(before.modulation.state_dict())
        for name in ("feature", "latent", "bias"):
            getattr(after.rigid, name).copy_(getattr(before.displacement, name))
        scale = before.length / after.length
        after.rigid.weight[6:] = scale * before.displacement.weight
        after.rigid.constant[6:] = scale * before.displacement.constant
        rows = (member >= 0).nonzero()[:, 0]
        share = (weight[rows] / weight[rows].sum())[:, None]
        start = before(reference)[0][0, rows] / after.length
    optimiser = Optimiser([ParameterGroup(dict(after.rigid.named_parameters()))])
    for _ in range(_LESSONS):
        some = latent[torch.randint(len(latent), (_OF_LESSON,), generator=generator)]
        with torch.no_grad():
            seen = before(some)[0][:, rows] / after.length
        optimiser.forget()
        error = (share * (after.carried(start, member[rows], some) - seen).square()).sum()
        error.backward()
        optimiser.step(_TEACH)
    with torch.no_grad():
        rotation, shift = (both[0, after.anchor] for both in after.motions(reference))
        place, anchor = after.centre - after.displacement(after.features(), reference)[0], after.position[after.anchor]
        after.centre.copy_(((place - anchor - shift)[:, None] @ rotation).squeeze(1) + anchor)


def seeds(
    volume: Float[Tensor, "z y x"], grid: Grid, count: int, threshold: float | None, generator: torch.Generator
) -> Float[Tensor, "g 3"]:
    """Positions (Å) drawn from the voxels above a threshold, with probabilities in proportion to density (supplement
    D), anywhere within the voxel. None takes what exceeds the surroundings by three of their standard deviations.

    Raises:
        InputError: no density is above the threshold.
    """
    if threshold is None:
        smooth, dense = dense_part(volume.numpy())
        density = torch.from_numpy(smooth) * torch.from_numpy(dense)
    else:
        density = torch.where(volume > threshold, volume, 0.0)
    density = density.flatten()
    inside = (density > 0).nonzero()[:, 0]
    if not len(inside):
        said = "no density" if threshold is None else f"no density above {threshold:g}"
        raise InputError(f"{said} to put Gaussians on; expected a consensus map of bright protein")
    up_to = density[inside].double().cumsum(0)  # `multinomial` takes 2²⁴ choices at most
    drawn = torch.searchsorted(up_to, up_to[-1] * torch.rand(count, generator=generator, dtype=torch.float64))
    voxel, size = inside[drawn.clamp(max=len(inside) - 1)], grid.size
    index = torch.stack([voxel % size, voxel // size % size, voxel // size**2], 1).float()
    index += torch.rand(count, 3, generator=generator) - 0.5
    return (index - size // 2) * grid.pixel_size


@torch.no_grad()
def _brightness(stack: ParticleStack, model: Conformations, world: World) -> float:
    """The factor with which the model's reference state fits some images best.

    Raises:
        InputError: it is not positive.
    """
    mixture = model.gaussians()
    some = stack.take(torch.linspace(0, len(stack) - 1, min(_BRIGHT, len(stack))).long())
    weight = hermitian_weight(stack.grid.size, device=stack.device)
    both = own = 0.0
    for batch in _batches(some, world):
        seen = observe(batch, stack.grid, corner=True)
        shown = seen.transfer * torch.fft.rfft2(_projected(mixture, batch, stack.grid))
        both += float(((shown.conj() * seen.spectrum).real * weight).sum())
        own += float((shown.abs().square() * weight).sum())
    sums = torch.tensor([both, own], dtype=torch.float64)
    world.sum_(sums)
    both, own = float(sums[0]), float(sums[1])
    if not both > 0:
        raise InputError(
            "the images do not show the map to start from (their correlation is not positive); is the contrast right "
            "(--invert), and does the map belong to these poses?"
        )
    return both / own


def _batches(stack: ParticleStack, world: World) -> Iterator[Batch]:
    """What this process of a ``world`` looks at, in order."""
    mine = stack if world.size == 1 else stack.take(stack.shared(world))
    yield from mine.sequential(_READ) if len(mine) else ()


def _projected(mixture: Gaussians, batch: Batch, grid: Grid) -> Float[Tensor, "p y x"]:
    """As `ImageObjective.loss` does it: images are moved by their shifts."""
    rotation = in_image(batch.poses.rotation, batch.optics)
    return project(mixture, Poses(rotation, torch.zeros_like(batch.poses.shift)), grid)


@torch.no_grad()
def misfits(stack: ParticleStack, shown: Sequence[Model | Gaussians], world: World = ALONE) -> Float[Tensor, "p k"]:
    """-log p(image) in nats, up to a constant of the image, for several models or mixtures, by the noise spectrum.

    Rows are the stack's particles in order; processes of a ``world`` look at a share each. Differences between columns
    are log likelihood ratios; those of a model's own latents are the largest that it can have, not the evidence, which
    integrates over latents.
    """
    weight = noise_weight(estimate_noise(stack), stack.grid)
    size = stack.grid.size
    parts = [torch.empty(0, len(shown))]
    for batch in _batches(stack, world):
        seen = observe(batch, stack.grid, corner=True)
        own = weight[batch.optics_group]
        if batch.share is not None:
            own = own * batch.share[:, None, None]
        mixtures = (one if isinstance(one, Gaussians) else one.gaussians(batch) for one in shown)
        found = torch.stack([_misfit(_projected(m, batch, stack.grid), seen, own, size) for m in mixtures], 1)
        parts.append(found.cpu())
    together = torch.cat(parts)
    return together if world.size == 1 else world.gathered(together, stack.shared(world), len(stack))


@torch.no_grad()
def image_gain(model: Conformations, density: Density, stack: ParticleStack, world: World = ALONE) -> Gain:
    """What the states say of images that the model was not fitted to: their log-likelihood under a density of states
    over that under the mean of these states, nats per image. At most 512 images and the 32 heaviest points are used.
    """
    heavy = density.weight.argsort(descending=True)[:_POINTS]
    weight = density.weight[heavy] / density.weight[heavy].sum()
    mixtures = model.mixtures(density.point[heavy].float().to(model.latent.device))
    mean = Gaussians(
        torch.cat([one.mean for one in mixtures]),
        torch.cat([one.covariance for one in mixtures]),
        torch.cat([float(share) * one.amplitude for share, one in zip(weight, mixtures, strict=True)]),
    )
    some = stack.take(torch.linspace(0, len(stack) - 1, min(_BRIGHT, len(stack))).long())
    gains = []
    for turned in _views(some):
        likely = -misfits(turned, [mean, *mixtures], world).double()
        gains.append(torch.logsumexp(likely[:, 1:] + weight.log(), 1) - likely[:, 0])
    image = torch.arange(len(some)).repeat(len(gains))
    return mean_gain(torch.cat(gains), image)


def _views(stack: ParticleStack) -> Iterator[ParticleStack]:
    """The particles under each element of their symmetry."""
    poses = stack.table.poses[stack.rows]
    for element in stack.symmetry.elements:
        yield stack.with_poses(Poses(poses.rotation @ element, poses.shift)).without_symmetry()


def _misfit(projection: Tensor, seen: Observed, weight: Tensor, size: int) -> Float[Tensor, " p"]:
    residual = torch.fft.rfft2(projection) * seen.transfer - seen.spectrum
    power: Tensor = (residual.abs().square() * weight).sum(1) @ hermitian_weight(size, device=projection.device)
    return power / (2 * size**2)


def place_latents(
    model: Conformations,
    stack: ParticleStack,
    options: ConformationOptions,
    *,
    candidates: int = 16,
    epochs: int = 5,
    among: Shares | None = None,
    look: Callable[[], None] = lambda: None,
) -> Conformations:
    """Latents of images that a model was not fitted to, by their likelihood; its decoder stays.

    Each view starts from that of some ``candidates`` among the model's own latents, spread by k-means, which it fits
    best, and is then moved downhill. The result's ``latent`` has a row for each view of the stack, whichever process
    has found it; after each step all ``look``.
    """
    among = among or Shares()
    world = among.world
    decoder = copy.deepcopy(model.decoder).requires_grad_(False)
    known = model.latent.detach()
    spread = cluster(known.cpu(), torch.ones(len(known)), candidates, _generator(options.seed, 0)).centroid
    tried = known[torch.cdist(spread.to(known.device), known).argmin(1)]
    world.spread_(tried)
    mixtures = decoder.mixtures(tried)
    best = [misfits(turned, mixtures, world).argmin(1) for turned in _views(stack)]
    latent = tried[torch.stack(best, 1).flatten().to(tried.device)].clone()
    rows = stack.rows.to(latent.device)
    rate = options.latent_rate or _FROM_GIVEN
    placed = Conformations(decoder, latent, rows, elements=stack.symmetry.order, rate=rate)
    noise = estimate_noise(stack) if options.weighted else None
    objective = ImageObjective(stack, batch=options.batch, seed=options.seed, noise=noise, world=world, own=among.own)
    state = among.part(State.begin(placed))
    for state in fit(state, objective, replace(options.fine, epochs=epochs).plan(), world=world):  # noqa: B007, B020
        look()
    return among.whole(state).model
