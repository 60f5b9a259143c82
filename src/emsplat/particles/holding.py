"""Which process reads which images, where machines hold different stacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emsplat.errors import InputError
from emsplat.io.table import ParticleTable
from emsplat.parallel import World
from emsplat.particles.copies import particle_numbers
from emsplat.particles.images import ImageFiles, StackFacts
from emsplat.run.log import counted


@dataclass(frozen=True, eq=False)
class Holding:
    """Who of a ``world`` reads the images of each row of a table. What is measured in images everywhere else, is
    measured here by each process in its own, and summed."""

    world: World
    reader: Int[Tensor, " n"]  # rank, of each row
    text: str  # for the user

    def own(self, rows: Int[Tensor, " q"]) -> Bool[Tensor, " q"]:
        """Whether this process reads the images of these rows."""
        return self.reader[rows] == self.world.rank


def hold(table: ParticleTable, files: ImageFiles, world: World) -> Holding | None:
    """None where every process has all stacks that the table uses. Otherwise who reads what: all rows of a particle
    lie with one process, and each gets as many as the stacks allow. ``files`` know then what others say of stacks that
    are not here.

    Raises:
        InputError: nobody has a stack, two have different ones of the same name, or no process has all images of a
            particle.
    """
    if world.size == 1:
        return None
    used = torch.unique(table.stack)
    here = torch.tensor([table.stacks[number].is_file() for number in used.tolist()])
    if not world.agree(not bool(here.all())):
        return None
    has = torch.zeros(world.size, len(table.stacks), dtype=torch.int64)
    has[world.rank, used[here]] = 1
    world.sum_(has)
    _tell_of_stacks(table, files, used[here].tolist(), world)
    lacking = used[has.sum(0)[used] == 0]
    if len(lacking):
        raise InputError(
            f"{table.name}: {len(lacking)} of {counted(len(used), 'image stack')} are with none of the {world.size} "
            f'processes, the first is "{table.stacks[int(lacking[0])]}"; give the folder that the paths start from '
            "with --datadir, {host} or {rank} in its name where machines have different ones"
        )
    reader = readers(particle_numbers(table), table.stack, has.bool())
    if bool((reader < 0).any()):
        raise InputError(
            f"{table.place(int((reader < 0).nonzero()[0]))}: the images of this particle lie with several processes, "
            "and none has all of them; keep them together, as those of one tilt series"
        )
    shares = torch.bincount(reader, minlength=world.size).tolist()
    said = ", ".join(f"{count:,} with {world.name_of(rank)}" for rank, count in enumerate(shares))
    return Holding(world, reader, f"images lie with different processes: {said}")


def _tell_of_stacks(table: ParticleTable, files: ImageFiles, here: list[int], world: World) -> None:
    """What each process sees in the headers of its stacks, in all of them.

    Raises:
        InputError: two processes see different things.
    """
    own = torch.full((len(table.stacks), 5), -1.0, dtype=torch.float64)
    for number in here:
        facts = files.facts(number)
        size = table.stacks[number].stat().st_size
        said = [facts.count, facts.box, facts.pixel_size or 0.0, facts.image_bytes, size]
        own[number] = torch.tensor(said, dtype=torch.float64)
    largest = own.clone()
    world.most_(largest)
    differs = [number for number in here if not torch.equal(own[number], largest[number])]
    worst = torch.tensor([differs[0] if differs else -1])
    world.most_(worst)
    if int(worst) >= 0:
        raise InputError(
            f"{table.stacks[int(worst)].name}: processes have different files of this name (size, number of images, "
            "box or pixel size); all copies have to be the same"
        )
    for number, (count, box, pixel_size, image_bytes, _) in enumerate(largest.tolist()):
        if box > 0:
            files.elsewhere[number] = StackFacts(int(count), int(box), pixel_size or None, int(image_bytes))


def readers(particle: Int[Tensor, " n"], stack: Int[Tensor, " n"], has: Bool[Tensor, "w s"]) -> Int[Tensor, " n"]:
    """The rank that reads each row, from who has which stacks; -1 where nobody has all of its particle's images."""
    count = int(particle.max()) + 1
    rows = torch.bincount(particle, minlength=count)
    able = torch.ones(len(has), count, dtype=torch.int64)
    for rank, own in enumerate(has):
        able[rank].scatter_reduce_(0, particle, own[stack].long(), "amin")
    reader, load = torch.full((count,), -1), torch.zeros(len(has), dtype=torch.float64)
    kinds, kind = torch.unique(able, dim=1, return_inverse=True)
    # Those first that fewest can read: the others make up for what these leave uneven.
    for number in sorted(range(kinds.shape[1]), key=lambda one: int(kinds[:, one].sum())):
        ranks = kinds[:, number].nonzero()[:, 0]
        if not len(ranks):
            continue
        members = (kind == number).nonzero()[:, 0]
        room = _filled(load[ranks], float(rows[members].sum()))
        ends, before = torch.cumsum(room, 0), torch.cumsum(rows[members], 0) - rows[members]
        turn = torch.searchsorted(ends, before.double(), right=True).clamp(max=len(ranks) - 1)
        reader[members] = ranks[turn]
        load += torch.bincount(reader[members], weights=rows[members].double(), minlength=len(has))
    return reader[particle]


def _filled(load: Tensor, more: float) -> Tensor:
    """How much of ``more`` each takes, so that those with least have equally much in the end."""
    order = torch.sort(load).values
    levels = (more + torch.cumsum(order, 0)) / torch.arange(1, len(load) + 1)
    level = levels[levels > order][-1] if more > 0 else order[0]
    return (level - load).clamp(min=0)
