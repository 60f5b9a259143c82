"""Starts on both half-sets, one after the other, until two that share nothing agree.

A start climbs without symmetry until it has settled, with several maps that compete for the images where that is
asked for; the one that most images go to goes on, with these. Where the particle has a symmetry, its axes are found in
the map, which is turned into RELION's setting, and the climb goes on with it. Where none is asked for, axes that it
seems to have are examined (`equivalents`): the climb goes on with those that it has, and with its symmetry broken where
it only looks like it. A pair of starts, one of each half, is compared (`verdict`); the first that agrees is taken. The
worst that can happen is that many starts are made in vain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.maths.fourier import irfft, rfft, shell_index, shell_radius, sum_by_shell
from emsplat.maths.groups import C1, Symmetry
from emsplat.parallel import ALONE, World
from emsplat.poses.abinitio import Ascent, AscentStage, chosen
from emsplat.poses.axes import Turning, find_frame, find_symmetry, in_frame
from emsplat.poses.compare import PoseComparison, compare_poses
from emsplat.poses.equivalents import examine, find_poses, remade
from emsplat.poses.verdict import Verdict, agreement, brought_over, decide, last_shell, shell_correlation
from emsplat.sums.spectra import Spectra

_BEGUN, _SEEN, _DONE = 5.6, 8.8, 10.6  # cycles per diameter of the particle: first, end of the climb, end of a start
_SAMPLE = 100  # images of each half that poses are compared on
_TURN = 12.0  # degrees between the rotations of that
_SEEDS = 7919  # between starts
_MARCH = 4  # of the steps of a climb one in so many goes to finer frequencies, the others stay there
_BLOCK, _SETTLED = 25, 0.02  # steps, and the part of the likelihood that so many gain where a climb has settled
_SEEMS = 0.4  # agreement of a map with itself turned from which on axes are worth an examination
_LOOKS = 3  # for groups: larger ones, or those that are left where one was refused


@dataclass(frozen=True)
class StartPlan:
    """How starts are made."""

    radius: float  # cycles per box for a diameter of the particle
    spread: float  # standard deviation of shifts, Å, at first
    diameter: float  # of the mask, Å
    largest: int  # finest frequency that the images hold, cycles per box
    steps: int = 240
    batch: int = 200
    classes: int = 1

    def stages(self) -> tuple[AscentStage, AscentStage, AscentStage]:
        """Climb without symmetry, what is repeated until it has settled, and what follows with the symmetry."""
        begun, seen, done = (min(self.largest, self.radius * cycles) for cycles in (_BEGUN, _SEEN, _DONE))
        return (
            AscentStage(max(2, self.steps // _MARCH), self.batch, (begun, seen)),
            AscentStage(min(_BLOCK, max(2, self.steps // _MARCH)), self.batch, (seen, seen)),
            AscentStage(max(2, self.steps // 15), self.batch, (seen, done), (0.6, 1.0), turn=(18.0, 15.0)),
        )

    @property
    def compared(self) -> float:
        """The frequency up to which starts are compared."""
        return min(self.largest, self.radius * _SEEN)


@dataclass(frozen=True)
class Start:
    """A map that a start came to."""

    half: int
    number: int
    volume: Float[Tensor, "z y x"]
    noise: Float[Tensor, " s"]
    spread: float
    likelihood: float  # mean of the last steps, nats per image
    axes: float  # agreement of the map with the axes of the symmetry, 1 without
    group: Symmetry  # the symmetry that was asked for, or that the images support
    steps: int  # until it had settled
    share: float  # of the images that went to this map and not to the others of its start
    others: Float[Tensor, "c z y x"]  # these


_TENSORS = ("volume", "noise", "others")  # of a start
_NUMBERS = ("half", "number", "spread", "likelihood", "axes", "steps", "share")


def packed_start(start: Start) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What JSON can hold of a start, and tensors by name: for a file or another process."""
    tensors = {name: getattr(start, name).contiguous() for name in _TENSORS} | {"elements": start.group.elements}
    return {name: getattr(start, name) for name in _NUMBERS} | {"group": start.group.symbol}, tensors


def unpacked_start(about: dict[str, Any], tensors: dict[str, Tensor]) -> Start:
    """From what `packed_start` gives.

    Raises:
        KeyError, TypeError: it is something else.
    """
    group = Symmetry(about["group"], tensors["elements"])
    own: dict[str, Any] = {name: about[name] for name in _NUMBERS} | {name: tensors[name] for name in _TENSORS}
    return Start(**own, group=group)


def spread_start(start: Start | None, world: World, source: int = 0) -> Start:
    """The start that one process has, in all of them."""
    return world.spread_packed(start, packed_start, unpacked_start, source)


def make_start(
    images: Spectra,
    half: int,
    number: int,
    plan: StartPlan,
    symmetry: Symmetry,
    seed: int,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Start:
    """One start on the images of a half."""
    own = seed + _SEEDS * (2 * number + half)
    total = plan.steps + plan.stages()[2].steps
    ascent = Ascent(images, plan.largest, plan.diameter, own, plan.spread, classes=plan.classes)
    steps = 0
    for _ in _settling(ascent, plan):
        steps += 1
        told(steps, total)
    order = ascent.share.argsort(descending=True)
    share, maps = float(ascent.share[order[0]]), ascent.maps[order]
    if plan.classes > 1:
        rows = (kinds(images, maps, ascent.noise, ascent.spread, plan) == 0).nonzero()[:, 0]
        images = chosen(images, rows) if len(rows) >= plan.batch else images
        ascent = _going_on(ascent, images, plan, C1, maps[0], own + 1)
    if symmetry.order > 1:
        ascent, axes = _with_symmetry(ascent, images, plan, symmetry, own)
    else:
        ascent, axes = _examined(ascent, images, plan, own)
    volume = remade(ascent, plan.compared, plan.largest)
    told(total, total)
    ascent = _going_on(ascent, images, plan, ascent.symmetry, volume, own)
    some = torch.linspace(0, ascent.count - 1, min(2 * _SAMPLE, ascent.count)).long()
    return Start(
        half,
        number,
        volume,
        ascent.noise,
        ascent.spread,
        float(ascent.judge(plan.compared, _TURN, some).likelihood.mean()),
        axes,
        ascent.symmetry,
        steps,
        share,
        maps[1:],
    )


def _with_symmetry(
    ascent: Ascent, images: Spectra, plan: StartPlan, symmetry: Symmetry, seed: int
) -> tuple[Ascent, float]:
    """The climb with a symmetry about the axes that fit best, and how well they did."""
    frame = find_frame(turning_of(ascent.volume, images.length, plan), symmetry)
    ascent = _going_on(ascent, images, plan, symmetry, in_frame(ascent.volume, frame), seed + 2)
    _settle(ascent, plan)
    return ascent, frame.agreement


def _examined(ascent: Ascent, images: Spectra, plan: StartPlan, seed: int) -> tuple[Ascent, float]:
    """The climb with the symmetry that images support, or without that which a map only seemed to have."""
    axes = 1.0
    refused: list[Symmetry] = []
    told_apart = False
    for look in range(_LOOKS):
        frame = find_symmetry(turning_of(ascent.volume, images.length, plan), _SEEMS, refused)
        if frame.symmetry.order <= ascent.symmetry.order:
            break
        examined = examine(ascent, frame, plan.compared, plan.largest, seed + look)
        if examined.symmetry.order > 1:
            axes = frame.agreement
            ascent = _going_on(ascent, images, plan, examined.symmetry, examined.volume, seed + 3 + look)
            _settle(ascent, plan)
            continue
        refused.append(frame.symmetry)
        if ascent.symmetry.order == 1:
            # No steps on a coarse grid, which would mix again what was told apart.
            ascent = _going_on(ascent, images, plan, C1, examined.volume, seed + 3 + look)
            told_apart = True
    if ascent.symmetry.order == 1 and not told_apart:
        _settle(ascent, plan)
    return ascent, axes


def _settling(ascent: Ascent, plan: StartPlan) -> Iterator[None]:
    """A climb to the frequency that starts are compared at, and on until its likelihood grows no more."""
    march, block, _ = plan.stages()
    for _ in ascent.climb(march):
        yield
    before = -math.inf
    for _ in range((plan.steps - march.steps) // block.steps):
        seen = []
        for status in ascent.climb(block):
            seen.append(status.likelihood)
            yield
        mean = sum(seen) / len(seen)
        if mean - before < _SETTLED * abs(mean):
            return
        before = mean


def _going_on(
    ascent: Ascent, images: Spectra, plan: StartPlan, symmetry: Symmetry, volume: Tensor, seed: int
) -> Ascent:
    """A climb from a map, with a symmetry."""
    args = (images, plan.largest, plan.diameter, seed, ascent.spread)
    return Ascent(*args, symmetry, volume[None], ascent.noise)


def _settle(ascent: Ascent, plan: StartPlan) -> None:
    """The last steps of a start."""
    for _ in ascent.climb(plan.stages()[2]):
        pass


def kinds(
    images: Spectra, maps: Float[Tensor, "c z y x"], noise: Float[Tensor, " s"], spread: float, plan: StartPlan
) -> Int[Tensor, " i"]:
    """Which map each image fits best."""
    looking = Ascent(images, plan.largest, plan.diameter, 0, spread, maps=maps, noise=noise)
    return looking.judge(plan.compared, _TURN, torch.arange(looking.count)).kind


def turning_of(volume: Float[Tensor, "z y x"], length: float, plan: StartPlan) -> Turning:
    """A map of a box of ``length`` Å, to be compared with itself turned."""
    return Turning(volume, plan.compared, plan.diameter / length * len(volume))


def at_map(images: Spectra, start: Start, plan: StartPlan, symmetry: Symmetry, volume: Tensor | None = None) -> Ascent:
    """Images at the map of a start, or another in its place."""
    own = start.volume if volume is None else volume
    return Ascent(images, plan.largest, plan.diameter, 0, start.spread, symmetry, own[None], start.noise)


@dataclass(frozen=True)
class Pair:
    """Two starts of disjoint halves, compared."""

    starts: tuple[Start, Start]
    comparison: PoseComparison  # of poses of the same images against both
    correlation: Float[Tensor, " s"]  # FSC of the aligned maps
    verdict: Verdict


def compare(halves: tuple[Spectra, Spectra], starts: tuple[Start, Start], plan: StartPlan, symmetry: Symmetry) -> Pair:
    """Poses of the same images against both maps, the maps where they lie on each other, and what each predicts of the
    other half's images."""
    group = common_group(starts, symmetry)
    parts = _sampled(halves[0]), _sampled(halves[1])
    sample, split = _joined(*parts), len(parts[0].values)
    rows = torch.arange(len(sample.values))
    found = [at_map(sample, own, plan, group) for own in starts]
    first, other = (find_poses(own, own.volume, rows, group, plan.compared, plan.largest) for own in found)
    comparison = compare_poses(first, other, group)
    second = brought_over(starts[1].volume, comparison, sample.length)
    curve = shell_correlation(starts[0].volume, second)[: int(plan.compared) + 1]
    of_other = (rows[split:], rows[:split])
    seen = [own.judge(plan.compared, _TURN, its).likelihood for own, its in zip(found, of_other, strict=True)]
    gains = torch.cat([own - _shapeless(parts[1 - half], starts[half], plan, group) for half, own in enumerate(seen)])
    error = float(gains.std()) / len(gains) ** 0.5
    verdict = decide(agreement(comparison), last_shell(curve), float(gains.mean()), error)
    return Pair(starts, comparison, curve, verdict)


def common_group(starts: tuple[Start, Start], symmetry: Symmetry) -> Symmetry:
    """The symmetry that was asked for, or that both starts have found their half of the images to have."""
    first, other = (own.group for own in starts)
    return first if symmetry.order == 1 and first.symbol == other.symbol else symmetry


def _shapeless(images: Spectra, start: Start, plan: StartPlan, symmetry: Symmetry) -> Float[Tensor, " i"]:
    """Log-likelihood of images at the spherical mean of a map, over the poses that its own is taken over."""
    ascent = at_map(images, start, plan, symmetry, spherical_mean(start.volume))
    return ascent.judge(plan.compared, _TURN, torch.arange(ascent.count), alike=True).likelihood


def spherical_mean(volume: Float[Tensor, "z y x"]) -> Float[Tensor, "z y x"]:
    """The map with nothing left but what depends on the distance from the centre."""
    size = len(volume)
    spectrum, shells, radius = rfft(volume, 3).real, shell_index(size, 3), shell_radius(size, 3)
    count = int(shells.max()) + 2
    mean = sum_by_shell(spectrum, shells, count) / sum_by_shell(torch.ones_like(spectrum), shells, count).clamp(min=1)
    # Between shells linearly: steps would not look the same from everywhere.
    low = radius.long()
    part = (radius - low).float()
    return irfft(((1 - part) * mean[low] + part * mean[low + 1]).to(torch.complex64), 3)


def find_pair(
    halves: tuple[Spectra, Spectra],
    plan: StartPlan,
    symmetry: Symmetry,
    seed: int,
    most: int,
    before: dict[tuple[int, int], Start],
    told: Callable[[int, int, int, int], None] = lambda half, number, done, total: None,
    world: World = ALONE,
    look: Callable[[], None] = lambda: None,
) -> Iterator[Start | Pair]:
    """Starts as they are made, and pairs as they are compared; ends with the first that is found, or after ``most`` of
    each half. Starts of ``before`` are not made again.

    Processes of a ``world`` make the next start each, at the same time, and ``look`` together meanwhile; pairs are
    compared in the same order, and the first process says what that says.
    """
    known, made = dict(before), (list[Start](), list[Start]())
    turns = [(half, number) for number in range(most) for half in (0, 1)]

    def make(turn: tuple[int, int] | None) -> Start | None:
        if turn is None:
            return None
        half, number = turn

        def tell(done: int, total: int) -> None:
            told(half, number, done, total)

        return make_start(halves[half], half, number, plan, symmetry, seed, tell)

    for at, (half, number) in enumerate(turns):
        if (half, number) not in known:
            now = [turn for turn in turns[at:] if turn not in known][: world.size]
            own = now[world.rank] if world.rank < len(now) else None
            mine = world.apart(partial(make, own), look)
            for maker, turn in enumerate(now):
                known[turn] = spread_start(mine if maker == world.rank else None, world, maker)
                yield known[turn]
        start = known[half, number]
        made[half].append(start)
        for other in made[1 - half]:
            starts = (other, start) if half else (start, other)
            pair = compare(halves, starts, plan, symmetry)
            verdict = json.loads(world.told(json.dumps(asdict(pair.verdict))))
            pair = replace(pair, verdict=Verdict(**verdict))
            yield pair
            if pair.verdict.word == "found":
                return


def _sampled(images: Spectra) -> Spectra:
    """Some images, evenly."""
    count = len(images.values)
    rows = torch.linspace(0, count - 1, min(_SAMPLE, count)).long()
    return chosen(images, rows)


def _joined(one: Spectra, other: Spectra) -> Spectra:
    count = len(one.values) + len(other.values)
    return replace(
        one,
        values=torch.cat([one.values, other.values]),
        transfer=torch.cat([one.transfer, other.transfer]),
        image=torch.arange(count, dtype=torch.int32),
        rotation=torch.cat([one.rotation, other.rotation]),
        share=torch.cat([one.share, other.share]),
        row=torch.cat([one.row, other.row]),
    )
