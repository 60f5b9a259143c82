"""Latents that follow the images and not the molecule are named; real motion is not."""

import pytest
import torch

from emsplat.heterogeneity.entanglement import Circumstances, describe, entanglement, moving_whole, remedy, scaling
from emsplat.maths.geometry import random_rotations

VIEWS, MICROGRAPHS = 3000, 60


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    micrograph = torch.arange(VIEWS) // (VIEWS // MICROGRAPHS)
    own = torch.rand(MICROGRAPHS, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, VIEWS, generator=generator, dtype=torch.float64)
    grey = torch.randn(MICROGRAPHS, generator=generator, dtype=torch.float64)
    return Circumstances(
        random_rotations(VIEWS, generator),
        1e4 + 1e4 * own[micrograph] + 100 * noise[0],
        1 + 0.1 * grey[micrograph] + 0.2 * noise[1],
        micrograph,
    )


def real(images, seed):
    """Posterior means of a motion on a circle that is half invisible from some sides, and from far focus less so."""
    generator = torch.Generator().manual_seed(seed)
    turn = 6.28 * torch.rand(VIEWS, generator=generator, dtype=torch.float64)
    latent = torch.stack([turn.cos(), turn.sin()], 1)
    precision = 0.2 + 4 * images.rotation[:, 2, :2].square() * (images.defocus[:, None] / 1e4)
    noise = torch.randn(VIEWS, 2, generator=generator, dtype=torch.float64)
    return (precision * latent + precision.sqrt() * noise) / (precision + 2)


@pytest.mark.parametrize("seed", range(5))
def test_real_motion_is_not_called_entangled(images, seed):
    found = entanglement(real(images, seed), images, seed)
    assert len(found) == 5
    assert not any(one.warns for one in found)
    assert max(one.share for one in found) < 0.02


def follow(images, what):
    """Something of the images, with variance 1."""
    value = {
        "defocus": images.defocus,
        "grey scale of micrographs": images.brightness,
        "viewing direction": images.rotation[:, 2, 2].square(),
        "angle in the image": torch.cos(torch.atan2(images.rotation[:, 1, 2], -images.rotation[:, 0, 2])),
        "micrograph": torch.randn(MICROGRAPHS, generator=torch.Generator().manual_seed(9)).double()[images.micrograph],
    }[what]
    return (value - value.mean()) / value.std()


@pytest.mark.parametrize(
    "what", ["defocus", "grey scale of micrographs", "viewing direction", "angle in the image", "micrograph"]
)
def test_what_latents_follow_is_named(images, what):
    latent = real(images, 1)
    latent[:, 1] += 0.8 * latent[:, 1].std() * follow(images, what)
    found = {one.what: one for one in entanglement(latent, images, 0)}
    own = found[what]
    assert own.warns
    assert own.p == pytest.approx(1e-3)
    assert own.component == 2
    # 0.8² of 1 + 0.8² is theirs; brightness is half noise, which micrographs do not share.
    right = 0.8**2 / (1 + 0.8**2)
    assert own.share == pytest.approx(right if what != "grey scale of micrographs" else right * 0.2, rel=0.3)
    assert what in describe(own)
    assert remedy(own).startswith("latents follow the images")
    others = {"micrograph"} if what in ("defocus", "grey scale of micrographs") else set()
    assert {name for name, one in found.items() if one.warns} == {what} | others


def test_without_micrographs_images_are_shuffled(images):
    latent = real(images, 2)
    latent[:, 0] += 0.8 * latent[:, 0].std() * follow(images, "defocus")
    alone = Circumstances(images.rotation, images.defocus, images.brightness, None)
    found = entanglement(latent, alone, 0)
    assert [one.what for one in found if one.warns] == ["defocus"]
    assert {one.shuffled for one in found} == {"images"}
    assert len(found) == 3


def test_a_latent_that_makes_the_molecule_brighter():
    generator = torch.Generator().manual_seed(3)
    mean = torch.rand(8, 8, 8, generator=generator)
    block = torch.zeros(8, 8, 8)
    block[2:4] = mean[2:4]
    share, _ = scaling(torch.stack([mean, -block]))
    assert share < 0.5  # a block that comes and goes
    noise = 0.03 * torch.randn(8, 8, 8, generator=generator)
    share, direction = scaling(torch.stack([mean, -block, 0.3 * mean + noise]))
    assert share > 0.8
    assert abs(direction[1]) > 0.9


def test_a_molecule_that_moves_as_a_whole_is_told_from_one_that_changes():
    """Shifts and turns of the mean map, beside an arm of it that swings."""
    axis = torch.arange(24.0) - 12
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")

    def blob(cx, cy, cz, width=2.0):
        return torch.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * width**2))

    def body(dx=0.0):
        places = torch.randint(-7, 8, (16, 3), generator=torch.Generator().manual_seed(1)).tolist()
        return sum(blob(cx + dx, cy, cz) for cx, cy, cz in places)

    mean = body() + blob(0, -6, 0)
    shifted = body(0.5) + blob(0.5, -6, 0) - mean
    swung = blob(1, -6, 0) - blob(-1, -6, 0)
    noise = torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.02
    share, direction = moving_whole(torch.stack([mean, swung, shifted + 0.1 * noise]))
    assert share > 0.9
    assert abs(direction[1]) > 0.9
    share, _ = moving_whole(torch.stack([mean, swung + 0.1 * noise]))
    assert share < 0.7
