"""Particle stacks: halves, batches, normalisation, noise, bad images, memory."""

import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path

import mrcfile
import pytest
import torch

from emsplat.errors import InputError
from emsplat.io.mrc import writing_stack
from emsplat.io.relion.write import write_particles_star
from emsplat.maths.geometry import random_rotations
from emsplat.maths.groups import parse_symmetry
from emsplat.particles.background import is_bad
from emsplat.particles.copies import draw_halves
from emsplat.particles.noise import estimate_noise
from emsplat.particles.open import open_particles
from emsplat.types import Grid, Optics, Poses

COUNT, GRID = 40, Grid(16, 2.0)


def make(folder, images=None, *, star_pixel_size=2.0, half=None, stacks=2, names=None):
    """A stack of 40 images in files of equal length; image i of the table holds values about i."""
    rng = torch.Generator().manual_seed(0)
    if images is None:
        images = torch.randn(COUNT, 16, 16, generator=rng) + torch.arange(COUNT)[:, None, None]
    each = len(images) // stacks
    for i in range(stacks):
        with writing_stack(folder / f"s{i}.mrcs", each, GRID) as write:
            write(images[i * each : (i + 1) * each])
    values = (300, 2.7, 0.1, 15000, 14000, 0.6, 0, 0, 1)
    count = len(images)
    write_particles_star(
        folder / "p.star",
        names or [f"{i % each + 1}@s{i // each}.mrcs" for i in range(count)],
        [f"m{i // 5}.mrc" for i in range(count)],
        Poses(random_rotations(count, rng), torch.zeros(count, 2).double()),
        Optics(*(torch.full((count,), float(v), dtype=torch.float64) for v in values)),
        Grid(16, star_pixel_size),
        half,
    )
    return folder / "p.star"


def rows_of(batches):
    return torch.cat([batch.index for batch in batches])


def test_an_epoch_presents_each_particle_once(tmp_path):
    stack = open_particles(make(tmp_path))
    rows = rows_of(stack.batches(7, seed=1))
    assert rows.sort().values.tolist() == list(range(COUNT))
    assert rows.tolist() != list(range(COUNT))
    assert torch.equal(rows, rows_of(stack.batches(7, seed=1)))
    assert not torch.equal(rows, rows_of(stack.batches(7, seed=1, epoch=1)))
    assert not torch.equal(rows, rows_of(stack.batches(7, seed=2)))


def test_skipping_batches_gives_exactly_the_later_ones(tmp_path):
    stack = open_particles(make(tmp_path), symmetry=parse_symmetry("D2"))
    whole = list(stack.batches(7, seed=3, epoch=2))
    for a, b in zip(whole[2:], stack.batches(7, seed=3, epoch=2, skip=2), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.poses.rotation, b.poses.rotation)


def test_every_pose_is_the_file_s_times_a_group_element(tmp_path):
    stack = open_particles(make(tmp_path), symmetry=parse_symmetry("D3"))
    group = parse_symmetry("D3").elements.float()
    used = set()
    for epoch in range(3):
        for batch in stack.batches(10, seed=0, epoch=epoch):
            element = stack.table.poses.rotation[batch.index].float().mT @ batch.poses.rotation
            distance = (element[:, None] - group).abs().amax((2, 3))
            assert distance.min(1).values.max() < 1e-5
            used |= set(distance.argmin(1).tolist())
    assert used == set(range(6))
    plain = rows_of(stack.sequential(10))
    assert plain.tolist() == list(range(COUNT))


def test_images_arrive_normalised_and_with_the_right_sign(tmp_path):
    images = torch.randn(COUNT, 16, 16, generator=torch.Generator().manual_seed(1)) * 3 + 5
    images[:, 7:10, 7:10] += 40
    star = make(tmp_path, images)
    stack = open_particles(star, diameter=20.0)
    axis = (torch.arange(16) - 8) * 2.0
    outside = (axis[:, None] ** 2 + axis**2).sqrt() > 10
    for sign, chosen in ((1, stack), (-1, stack.inverted()), (-1, open_particles(star, diameter=20.0, invert=True))):
        batch = next(chosen.sequential(COUNT))
        background = batch.images[:, outside]
        torch.testing.assert_close(background.mean(1), torch.zeros(COUNT), atol=1e-5, rtol=0)
        torch.testing.assert_close(background.std(1, correction=0), torch.ones(COUNT), atol=1e-4, rtol=0)
        assert float(batch.images[:, 8, 8].mean()) * sign > 5


def test_halves_are_whole_micrographs_disjoint_and_balanced():
    micrograph = torch.arange(30).repeat_interleave(
        torch.randint(1, 20, (30,), generator=torch.Generator().manual_seed(0))
    )
    half = draw_halves(micrograph, seed=4)
    assert set(half.tolist()) == {1, 2}
    for name in range(30):
        assert len(half[micrograph == name].unique()) == 1
    assert abs(int((half == 1).sum()) - int((half == 2).sum())) <= 20
    assert torch.equal(half, draw_halves(micrograph, seed=4))
    assert not torch.equal(half, draw_halves(micrograph, seed=5))
    alone = draw_halves(torch.zeros(11, dtype=torch.int64), seed=0)
    assert sorted([int((alone == 1).sum()), int((alone == 2).sum())]) == [5, 6]


def test_half_sets_of_the_file_are_honoured(tmp_path):
    half = torch.tensor([1, 2, 2, 1] * 10)
    stack = open_particles(make(tmp_path, half=half)).with_halves(0)
    one, two = stack.only(1), stack.only(2)
    assert one.rows.tolist() == (half == 1).nonzero()[:, 0].tolist()
    assert sorted(one.rows.tolist() + two.rows.tolist()) == list(range(COUNT))
    assert set(rows_of(one.batches(8, seed=0)).tolist()) == set(one.rows.tolist())
    lonely = open_particles(make(tmp_path, half=torch.tensor([1] * 39 + [2])))
    with pytest.raises(InputError, match="half-set 2 has 1 particle; expected at least 2"):
        lonely.only(2)


def test_bad_images_are_named(tmp_path):
    images = torch.randn(COUNT, 16, 16, generator=torch.Generator().manual_seed(1))
    star = make(tmp_path, images)
    images[4, 3, 3] = torch.inf
    images[9] = 2.5
    images[30, 0, 0] = torch.nan
    for number in range(2):  # emsplat itself writes no such values
        with star.with_name(f"s{number}.mrcs").open("r+b") as file:
            file.seek(1024)
            file.write(images[20 * number : 20 * (number + 1)].numpy().tobytes())
    stack = open_particles(star)
    with pytest.raises(InputError, match=r"row 5: 3 of 40 images .*.*--skip-bad"):
        next(stack.sequential(COUNT))
    good, bad = stack.without_bad()
    assert bad.tolist() == [4, 9, 30]
    assert len(rows_of(good.sequential(16))) == 37
    assert is_bad(images).nonzero()[:, 0].tolist() == [4, 9, 30]


def test_masked_images_are_refused(tmp_path):
    """Without background there is no noise to measure; scaled by it, they would be 10¹⁰ times too strong."""
    images = torch.randn(COUNT, 16, 16, generator=torch.Generator().manual_seed(1))
    axis = torch.arange(16) - 8
    images[:, (axis[:, None] ** 2 + axis**2).sqrt() > 6] = 0
    stack = open_particles(make(tmp_path, images))
    with pytest.raises(InputError, match=r"40 of 40 images .* were masked; .*--diameter"):
        next(stack.sequential(COUNT))
    (tmp_path / "again").mkdir()
    within = open_particles(make(tmp_path / "again", images), diameter=stack.grid.pixel_size * 9)
    assert float(next(within.sequential(COUNT)).images.abs().max()) < 100


def test_index_outside_the_stack(tmp_path):
    names = [f"{i % 20 + 1}@s{i // 20}.mrcs" for i in range(COUNT)]
    names[24] = "21@s1.mrcs"
    with pytest.raises(InputError, match=r'row 25: "21@s1\.mrcs" asks for image 21, .* has 20 images'):
        open_particles(make(tmp_path, names=names))


def test_pixel_sizes_that_disagree(tmp_path):
    star = make(tmp_path, star_pixel_size=2.5)
    with pytest.raises(InputError, match=r"pixel size 2 Å in the stack's header and 2\.5 Å .*--trust-star-pixel-size"):
        open_particles(star)
    assert open_particles(star, trust_star_pixel_size=True).grid.pixel_size == 2.5


def test_several_boxes(tmp_path):
    star = make(tmp_path)
    with writing_stack(tmp_path / "s1.mrcs", 20, Grid(12, 2.0)) as write:
        write(torch.randn(20, 12, 12))
    with pytest.raises(InputError, match="images of 12 pixels; expected 16"):
        open_particles(star)


def test_a_diameter_without_background_is_refused(tmp_path):
    with pytest.raises(InputError, match="--diameter"):
        open_particles(make(tmp_path), diameter=40.0)


def test_reader_ends_when_nobody_listens(tmp_path):
    stack = open_particles(make(tmp_path))
    before = threading.active_count()
    batches = stack.batches(1, seed=0)
    next(batches)
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("slope", [0.0, 3.0])
def test_noise_spectrum(tmp_path, slope):
    rng = torch.Generator().manual_seed(2)
    spectrum = torch.fft.rfft2(torch.randn(400, 16, 16, generator=rng))
    k = (torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.rfftfreq(16) ** 2).sqrt()
    images = torch.fft.irfft2(spectrum * (1 + slope * (0.5 - k).clamp(min=0)), s=(16, 16))
    noise = estimate_noise(
        open_particles(make(tmp_path, images, names=[f"{i % 200 + 1}@s{i // 200}.mrcs" for i in range(400)]))
    )[0]
    assert noise.shape == (9,)
    expected = (1 + slope * (0.5 - torch.arange(9) / 16)) ** 2
    ratio = (noise / expected)[2:]
    assert float(ratio.std() / ratio.mean()) < 0.15
    if slope == 0:
        assert float(noise[2:].mean()) == pytest.approx(1, abs=0.1)


LARGE = """
import sys
from pathlib import Path
import torch
from emsplat.particles.open import open_particles
from emsplat.run.log import peak_memory
stack = open_particles(Path(sys.argv[1]))
batches = stack.sequential(50)
next(batches)
before = peak_memory()
for _ in range(60):
    next(batches)
print(peak_memory() - before, before)
"""


@pytest.mark.slow
def test_a_hundred_thousand_images_stay_on_disk(tmp_path):
    """A sparse stack of 100,000 x 256²: 3,000 images are read in constant memory."""
    count, size = 100_000, 256
    with writing_stack(tmp_path / "s.mrcs", 1, Grid(size, 1.0)) as write:
        write(torch.zeros(1, size, size))
    header = bytearray((tmp_path / "s.mrcs").read_bytes()[:1024])
    header[8:12] = count.to_bytes(4, "little")
    with (tmp_path / "s.mrcs").open("wb") as file:
        file.write(header)
        file.truncate(1024 + count * size**2 * 4)
    rng = torch.randn(3100, size, size, generator=torch.Generator().manual_seed(0))
    with mrcfile.mmap(tmp_path / "s.mrcs", mode="r+") as file:
        file.data[:3100] = rng.numpy()
    one = torch.ones(count, dtype=torch.float64)
    write_particles_star(
        tmp_path / "p.star",
        [f"{i + 1}@s.mrcs" for i in range(count)],
        ["m.mrc"] * count,
        Poses(torch.eye(3).double().expand(count, 3, 3), torch.zeros(count, 2).double()),
        Optics(*(v * one for v in (300, 2.7, 0.1, 15000, 14000, 0.6, 0, 0, 1))),
        Grid(size, 1.0),
        None,
    )
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "p.star")], capture_output=True, text=True, check=True
    )
    growth, resident = map(float, done.stdout.split())
    assert growth < 300
    assert resident < 2000


def test_experimental_particles(shared_data):
    stack = open_particles(shared_data / "bgal" / "particles.star", symmetry=parse_symmetry("D2"))
    assert (len(stack), stack.grid) == (2374, Grid(64, 3.54))
    assert [len(stack.only(half)) for half in (1, 2)] == [1187, 1187]
    noise = estimate_noise(stack)[0]
    assert float(noise[1] / noise[-1]) > 3  # far from white


def test_optics_groups_of_several_pixel_sizes(tmp_path):
    star = make(tmp_path)
    lines = star.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("1 opticsGroup1"))
    other = lines[first].replace("1 opticsGroup1", "2 other").replace("2.000000", "2.200000")
    text = "\n".join([*lines[: first + 1], other, *lines[first + 1 :]]) + "\n"
    star.write_text(text)
    assert len(open_particles(star)) == COUNT  # a group that no particle uses does no harm
    star.write_text(text.replace("m7.mrc 1 ", "m7.mrc 2 "))
    with pytest.raises(InputError, match=r"pixel size 2 Å in the stack's header and 2\.2 Å in"):
        open_particles(star)
    stack = open_particles(star, trust_star_pixel_size=True)
    assert stack.grid == Grid(16, 2.0)
    first, second = stack.parts()
    assert (first.grid, second.grid) == (Grid(16, 2.0), Grid(16, 2.2))
    assert len(first) + len(second) == COUNT == len(set(first.rows.tolist()) | set(second.rows.tolist()))
    assert len(next(second.sequential(50)).images) == len(second)
    with pytest.raises(InputError, match=r"16 px of 2 Å, 16 px of 2\.2 Å\).*--engine one-pass"):
        next(stack.sequential(5))


def test_too_few_particles(tmp_path):
    with pytest.raises(InputError, match="2 particles; expected at least 4, which are 2 in each half-set; take"):
        open_particles(make(tmp_path, torch.randn(2, 16, 16)))


def test_halves_stay_together_when_particles_are_left_out(tmp_path):
    stack = open_particles(make(tmp_path)).with_halves(3)
    fewer = stack.take(torch.arange(0, COUNT, 3))
    for half in (1, 2):
        expected = [row for row in range(0, COUNT, 3) if stack.table.half[row] == half]
        assert fewer.only(half).rows.tolist() == expected
    with pytest.raises(InputError, match="no half-sets"):
        open_particles(make(tmp_path)).only(1)


def test_a_batch_says_how_its_poses_were_turned(tmp_path):
    stack = open_particles(make(tmp_path), symmetry=parse_symmetry("C3"))
    batch = next(stack.batches(COUNT, seed=1))
    turned = stack.table.poses.rotation[batch.index] @ stack.symmetry.elements[batch.element]
    torch.testing.assert_close(batch.poses.rotation, turned.float())
    assert set(batch.element.tolist()) == {0, 1, 2}
    assert not next(stack.sequential(COUNT)).element.any()


def test_a_stack_introduces_itself(tmp_path):
    stack = open_particles(make(tmp_path), symmetry=parse_symmetry("C3"))
    assert repr(stack).endswith("p.star, 16 px of 2 Å, no half-sets, symmetry C3>")
    assert f"half-sets {COUNT // 2} + {COUNT - COUNT // 2}" in repr(stack.with_halves(0).without_symmetry())


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_what_a_stack_stores(tmp_path, dtype, size):
    stack = open_particles(make(tmp_path))
    with writing_stack(stack.table.stacks[0], COUNT, stack.grid, dtype) as write:
        write(torch.randn(COUNT, 16, 16))
    stack = open_particles(tmp_path / stack.table.sources[0].name)
    assert stack.stored == COUNT * 16**2 * size
    assert stack.take(torch.arange(3)).stored == 3 * 16**2 * size


def test_other_poses_for_some_particles(tmp_path):
    """They replace those of the file in these rows alone; the stack that they come from stays as it is."""
    stack = open_particles(make(tmp_path)).with_halves(3)
    few, rng = stack.only(2), torch.Generator().manual_seed(5)
    poses = Poses(random_rotations(len(few), rng), torch.randn(len(few), 2, generator=rng))
    moved = few.with_poses(poses)
    batch = next(moved.sequential(len(few)))
    torch.testing.assert_close(batch.poses.rotation, poses.rotation.float())
    torch.testing.assert_close(batch.poses.shift, poses.shift.float())
    assert torch.equal(batch.images, next(few.sequential(len(few))).images)
    rest = (stack.half == 1).nonzero()[:, 0]
    assert torch.equal(moved.table.poses.rotation[rest], stack.table.poses.rotation[rest])
    assert not torch.equal(moved.table.poses.rotation, stack.table.poses.rotation)
    with pytest.raises(ValueError, match=f"{len(few) - 1} poses for {len(few)} particles"):
        few.with_poses(poses[1:])
    with pytest.raises(FrozenInstanceError):
        stack.sign = -1.0


def test_reader_ends_when_the_consumer_fails_or_forgets(tmp_path):
    stack = open_particles(make(tmp_path))
    before = threading.active_count()

    def failing():
        for _ in stack.batches(1, seed=0):
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    next(stack.sequential(1))  # dropped at once
    for thread in threading.enumerate():
        if thread.name == "emsplat-reader":
            thread.join()  # a thread that stays would hang here
    assert threading.active_count() == before


def test_many_stacks_do_not_use_up_the_files_of_a_process(tmp_path):
    images = torch.randn(300, 16, 16, generator=torch.Generator().manual_seed(3))
    stack = open_particles(make(tmp_path, images, stacks=150))
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        pytest.skip("no /proc on this system")
    before = len(list(handles.iterdir()))
    most = 0
    for batch in stack.sequential(10):
        torch.testing.assert_close(batch.images, stack.normalise(images[batch.index]))
        most = max(most, len(list(handles.iterdir())) - before)
    assert most <= 70


def test_each_optics_group_has_its_noise(tmp_path):
    """Groups of 60, 60 and 10 images; the smallest shares the spectrum of all."""
    rng = torch.Generator().manual_seed(2)
    white = torch.randn(130, 16, 16, generator=rng)
    smooth = sum(white.roll((y, x), (1, 2)) for y in (0, 1) for x in (0, 1)) / 2
    images = torch.cat([white[:60], smooth[60:120], white[120:]])
    star = make(tmp_path, images)
    lines = star.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("1 opticsGroup1"))
    lines[first + 1 : first + 1] = [lines[first].replace("1 opticsGroup1", f"{n} other{n}") for n in (2, 3)]
    text = "\n".join(lines) + "\n"
    for i in range(60, 130):
        text = text.replace(
            f"\n{i % 65 + 1}@s{i // 65}.mrcs m{i // 5}.mrc 1 ",
            f"\n{i % 65 + 1}@s{i // 65}.mrcs m{i // 5}.mrc {2 + i // 120} ",
        )
    star.write_text(text)
    stack = open_particles(star)
    assert torch.bincount(stack.table.optics_group).tolist() == [60, 60, 10]
    noise = estimate_noise(stack)
    assert noise.shape == (3, 9)
    assert float(noise[0, 8] / noise[0, 2]) == pytest.approx(1, abs=0.3)
    assert float(noise[1, 8] / noise[1, 2]) < 0.4
    # shell 8 of 60 + 10 white images and 60 smooth ones; alone, the 10 would be as white as the first group
    expected = (70 * noise[0, 8] + 60 * noise[1, 8]) / 130
    assert float(noise[2, 8]) == pytest.approx(float(expected), rel=0.1)
    assert float(noise[2, 8] / noise[0, 8]) < 0.75
