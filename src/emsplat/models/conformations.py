"""A decoder of states with a latent for each image: conformations on the seam of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emsplat.models import decoder as separable
from emsplat.models.base import ParameterGroup, Saved, rows_of
from emsplat.models.cryospire import Hierarchy, PartDiscovery, read_hierarchy, read_part_discovery
from emsplat.models.decoder import Decoder, read_decoder
from emsplat.types import Batch, Gaussians, Poses

KIND = "conformations"
StateDecoder = PartDiscovery | Hierarchy | Decoder
_READERS: dict[str, Callable[[Saved], StateDecoder]] = {
    PartDiscovery.KIND: read_part_discovery,
    Hierarchy.KIND: read_hierarchy,
    separable.KIND: read_decoder,
}


class Conformations(torch.nn.Module):
    """What each image of a half-set shows: the state of ``decoder`` at the image's own row of ``latent``.

    ``rows`` are the particles' rows in their table. Under a symmetry of ``elements`` elements each view of a particle
    has a latent, the views of a particle being neighbours. A decoder whose parameters need no gradient stays, and the
    latents alone are fitted.
    """

    def __init__(
        self,
        decoder: StateDecoder,
        latent: Float[Tensor, "v q"],
        rows: Int[Tensor, " p"],
        *,
        elements: int = 1,
        rate: float = 1.0,
    ) -> None:
        """``rate`` is that of the latents, times the learning rate of the plan.

        Raises:
            ValueError: there is not one latent for each view.
        """
        super().__init__()
        if len(latent) != elements * len(rows):
            raise ValueError(f"{len(latent)} latents; expected {elements * len(rows)}, one for each view")
        self.decoder, self.elements, self.rate = decoder, elements, rate
        self.latent = torch.nn.Parameter(latent)
        place = torch.full((int(rows.max()) + 1 if len(rows) else 0,), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        self.rows: Tensor
        self.place: Tensor
        self.register_buffer("rows", rows)
        self.register_buffer("place", place, persistent=False)

    def __len__(self) -> int:
        """How many Gaussians a state has."""
        return len(self.decoder)

    def views(self, batch: Batch) -> Int[Tensor, " p"]:
        """Which row of ``latent`` belongs to each particle of a batch."""
        first = self.elements * self.place[batch.index]
        return first if batch.element is None or self.elements == 1 else first + batch.element

    def reference(self) -> Float[Tensor, "1 q"]:
        """The latent of the image that is closest to their mean: a state that there is, where the mean need not be."""
        latent = self.latent.detach()
        return latent[(latent - latent.mean(0)).square().sum(1).argmin()][None]

    def gaussians(self, batch: Batch | None = None) -> Gaussians:
        """A mixture for each image; that of the `reference` without a batch."""
        if batch is None:
            return self.mixtures(self.reference())[0]
        mean, weight = self.decoder(rows_of(self.latent, self.views(batch)))
        variance = self.decoder.widths().square()
        return Gaussians(mean, torch.diag_embed(variance[:, None].expand(-1, 3)), weight)

    def mixtures(self, latent: Float[Tensor, "b q"]) -> list[Gaussians]:
        """The molecule in some states."""
        return self.decoder.mixtures(latent)

    def poses(self, batch: Batch) -> Poses:
        """Those of the batch."""
        return batch.poses

    def groups(self) -> list[ParameterGroup]:
        """The decoder's parameters at one rate, and the latents, whose rows belong to images."""
        own = dict(self._free())
        dense = [ParameterGroup(own)] if own else []
        return [*dense, ParameterGroup({"latent": self.latent}, rate=self.rate, sparse=True)]

    def _free(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.decoder.named_parameters():
            if parameter.requires_grad:
                yield f"decoder.{name}", parameter

    def state(self) -> Saved:
        held = self.decoder.state()
        numbers = {"decoder": held.kind, "numbers": held.numbers, "elements": self.elements, "rate": self.rate}
        tensors = {f"decoder.{name}": tensor for name, tensor in held.tensors.items()}
        return Saved(KIND, numbers, tensors | {"latent": self.latent.detach(), "rows": self.rows})


def read_state_decoder(saved: Saved) -> StateDecoder:
    """A decoder of any kind from what it has saved.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it describes none.
    """
    return _READERS[saved.kind](saved)


def read_conformations(saved: Saved) -> Conformations:
    """The model that `Conformations.state` describes.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it describes another.
    """
    if saved.kind != KIND:
        raise ValueError(f"a model of kind {saved.kind!r}; expected {KIND!r}")
    numbers = saved.numbers
    own = {
        name.removeprefix("decoder."): tensor for name, tensor in saved.tensors.items() if name.startswith("decoder.")
    }
    decoder = read_state_decoder(Saved(numbers["decoder"], numbers["numbers"], own))
    latent, rows = saved.tensors["latent"], saved.tensors["rows"]
    return Conformations(decoder, latent, rows, elements=int(numbers["elements"]), rate=float(numbers["rate"]))
