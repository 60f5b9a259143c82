"""Whether latents form classes: whether two half-sets, each by itself, sort the particles alike.

How sure a model is of its points is no measure. A few points along a continuum are as sure, once they lie far from each
other; but where they lie is chance then, and the model of the other half-set cuts elsewhere. Between states there is
nothing to cut: there both agree.

Two points of a half-set are one state where the data do not tell them apart: where the other half-set's model knows
less than half of what there is to know about which of the two a particle belongs to (mutual information over entropy,
Theil's uncertainty coefficient). They are joined, those first that are told apart least. What is left of both is
matched one to one; in a continuum every group meets several of the other half-set. There have to be as many points as
the images support: the ends of a path alone tell both half-sets where a few lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from emsplat.heterogeneity.embedding import Embedding

_AGREED = 0.9  # Cohen's kappa
_TOLD = 0.5  # of what there is to know


@dataclass(frozen=True)
class Classes:
    """Classes of the points of both half-sets' densities, from 0, and how well both agree on the particles."""

    point: tuple[Int[Tensor, " m"], Int[Tensor, " n"]]
    agreement: float  # Cohen's kappa

    def __len__(self) -> int:
        return 1 + int(self.point[0].max())

    @property
    def told(self) -> bool:
        """Whether they are classes, and no cuts through a continuum."""
        return len(self) > 1 and self.agreement > _AGREED

    def parts(self) -> tuple[Float[Tensor, "m s"], Float[Tensor, "n s"]]:
        """1 for the class of each point."""
        one, other = (torch.nn.functional.one_hot(own, len(self)).double() for own in self.point)
        return one, other

    def merged(self, into: Int[Tensor, " s"]) -> Classes:
        """With other numbers; some may become one."""
        return Classes((into[self.point[0]], into[self.point[1]]), self.agreement)


def common_classes(first: Embedding, second: Embedding) -> Classes:
    """The classes on which both half-sets may agree. The views of both half-sets were placed by the models of both."""
    joint = first.membership.T @ second.others + first.others.T @ second.membership
    joint = joint / joint.sum()
    one = _joined(joint)
    other = _joined((one.T @ joint).T)
    told = one.T @ joint @ other
    # Each group is a class with one of the other half; in a continuum every group meets several.
    rows, columns = (torch.from_numpy(own) for own in linear_sum_assignment(told.numpy(), maximize=True))
    count = len(rows)
    first_class, second_class = torch.full((len(told),), -1), torch.full((told.shape[1],), -1)
    first_class[rows] = second_class[columns] = torch.arange(count)
    # What has no partner goes with what most of it is in.
    first_class = torch.where(first_class < 0, second_class[told.argmax(1)], first_class)
    second_class = torch.where(second_class < 0, first_class[told.argmax(0)], second_class)
    found = (first_class[one.argmax(1)], second_class[other.argmax(1)])
    return Classes(found, kappa(told, rows, columns) if count > 1 else 0.0)


def _joined(joint: Float[Tensor, "m n"]) -> Float[Tensor, "m g"]:
    """Groups of the rows that the columns do not tell apart; 1 where a row belongs to a group."""
    groups = torch.eye(len(joint), dtype=joint.dtype)
    while groups.shape[1] > 1:
        known = _told_apart(groups.T @ joint)
        one, other = divmod(int(known.argmin()), len(known))
        if float(known[one, other]) >= _TOLD:
            break
        groups[:, one] += groups[:, other]
        groups = torch.cat([groups[:, :other], groups[:, other + 1 :]], 1)
    return groups


def _told_apart(joint: Float[Tensor, "g n"]) -> Float[Tensor, "g g"]:
    """What the columns say of which of two rows it is, over the entropy of that; 1 on the diagonal."""

    def inner(share: Tensor) -> Tensor:
        total: Tensor = torch.special.entr(share).sum(-1)
        return total

    mass, own = joint.sum(1), inner(joint)
    both = mass[:, None] + mass
    # H(row) and H(row | column) of the two rows, times their mass.
    which = torch.special.entr(mass)[:, None] + torch.special.entr(mass) - torch.special.entr(both)
    left = own[:, None] + own - inner(joint[:, None] + joint)
    known = torch.where(which > 0, 1 - left / which.clamp(min=1e-300), 0.0)
    return known.fill_diagonal_(1.0)


def kappa(joint: Float[Tensor, "g h"], rows: Int[Tensor, " c"], columns: Int[Tensor, " c"]) -> float:
    """Agreement of two raters beyond chance, from the share of what they put into each pair of groups (Cohen 1960); the
    groups ``rows`` of the one are the groups ``columns`` of the other."""
    chance = float(joint.sum(1)[rows] @ joint.sum(0)[columns])
    return (float(joint[rows, columns].sum()) - chance) / (1 - chance)
