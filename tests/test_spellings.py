"""One data set in every spelling that RELION, spreadsheets and microscopes know has the same sums, bit by bit."""

import gzip
import shutil

import mrcfile
import numpy as np
import pytest
import torch

from emsplat.config import BackprojectConfig, SimulateConfig
from emsplat.io.star import read_star_file
from emsplat.particles.choose import open_stack
from emsplat.programs.simulate import simulate
from emsplat.sums.statistics import equations_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Particles whose pixel values are whole numbers below 200, which every format holds exactly."""
    config = SimulateConfig(box=32, pixel_size=4.0, particles=60, snr=0.3, atoms=300, micrograph_particles=20, seed=4)
    star = simulate(config, None, tmp_path_factory.mktemp("made") / "p")
    with mrcfile.open(star.parent / "particles.mrcs", "r+") as file:
        values = np.rint(40 * file.data / file.data.std()).clip(-199, 199)
        file.set_data(values.astype(np.float32))
    return star, sums(star)


def sums(star):
    """All that a reconstruction knows of the images: the normal equations of each half-set."""
    stack = open_stack(BackprojectConfig(), star)
    parts = [equations_of(stack.only(half), None) for half in (1, 2)]
    return [(part.particles, part.solve()) for part in parts]


def texts(star):
    file = read_star_file(star)
    optics, particles = file.table("optics"), file.table("particles")
    return [{tag: table.text(tag) for tag in table.tags} for table in (optics, particles)]


def loop(name, columns):
    rows = "\n".join(" ".join(row) for row in zip(*columns.values(), strict=True))
    head = "\n".join(f"{tag} #{number}" for number, tag in enumerate(columns, 1))
    return f"data_{name}\n\nloop_\n{head}\n{rows}\n\n"


def spelled(optics, particles, spelling):
    pairs = "data_optics\n\n" + "\n".join(f"{tag}   {text[0]}" for tag, text in optics.items()) + "\n\n"
    plain = loop("optics", optics) + "# version 50001\n\n" + loop("particles", particles)
    turned = dict(reversed(list(particles.items())))
    quoted = {tag: [f'"{text}"' for text in column] for tag, column in particles.items()}
    return {
        "particles first": loop("particles", particles) + loop("optics", optics),
        "optics as pairs": pairs + loop("particles", particles),
        "columns turned round": loop("optics", optics) + loop("particles", turned),
        "quoted words": loop("optics", optics) + loop("particles", quoted),
        "CRLF": plain.replace("\n", "\r\n"),
        "byte order mark": "\ufeff" + plain,
        "tabs, also at the ends": plain.replace(" ", "\t").replace("\n", "\t\t\n"),
        "junk above": "Table 1\nparticles 60\n\n" + plain,
        "names that CIF refuses": plain.replace("micrograph", "data_raw/micrograph"),
    }[spelling]


@pytest.mark.parametrize(
    "spelling",
    [
        *("particles first", "optics as pairs", "columns turned round", "quoted words", "CRLF", "byte order mark"),
        *("tabs, also at the ends", "junk above", "names that CIF refuses", "gzip"),
    ],
)
def test_spellings_of_the_metadata(made, tmp_path, spelling):
    star, expected = made
    shutil.copy(star.parent / "particles.mrcs", tmp_path)
    text = spelled(*texts(star), "particles first" if spelling == "gzip" else spelling).encode()
    path = tmp_path / ("p.star.gz" if spelling == "gzip" else "p.star")
    path.write_bytes(gzip.compress(text) if spelling == "gzip" else text)
    assert_same(sums(path), expected)


@pytest.mark.parametrize("kind", ["float16", "int16", "int8", "mrc", "FEI1", "big endian"])
def test_formats_of_the_images(made, tmp_path, kind):
    star, expected = made
    images = mrcfile.read(star.parent / "particles.mrcs")
    name = "particles.mrc" if kind == "mrc" else "particles.mrcs"
    with mrcfile.new(tmp_path / name) as file:
        if kind == "int8":
            images, file_type = np.clip(images, -127, 127), np.int8
        else:
            file_type = {"float16": np.float16, "int16": np.int16}.get(kind, np.float32)
        file.set_data(images.astype(file_type))
        file.set_image_stack()
        file.voxel_size = 4.0
        if kind == "FEI1":
            file.set_extended_header(np.zeros(768 * len(images), np.uint8).view("V768"))
            file.header.exttyp = b"FEI1"
    if kind == "big endian":
        swap(tmp_path / name)
    shutil.copy(star, tmp_path / "p.star")
    if kind == "int8":  # the values differ, so the images of float32 must as well
        with mrcfile.new(tmp_path / "clipped.mrcs") as file:
            file.set_data(images)
            file.set_image_stack()
            file.voxel_size = 4.0
        other = tmp_path / "q.star"
        other.write_text(star.read_text().replace("particles.mrcs", "clipped.mrcs"))
        expected = sums(other)
    assert_same(sums(tmp_path / "p.star"), expected)


def swap(path):
    """The other byte order, for a stack of 4-byte values."""
    content = path.read_bytes()
    head = np.frombuffer(content[:1024], "<u4").copy()
    words = [*range(26), *range(28, 52), 54, 55]  # all but text and machine stamp
    head[words] = head[words].byteswap()
    data = np.frombuffer(content[1024:], "<u4").byteswap()
    path.write_bytes(head.tobytes()[:212] + b"\x11\x11\0\0" + head.tobytes()[216:] + data.tobytes())


def assert_same(found, expected):
    for (count, values), (wanted, right) in zip(found, expected, strict=True):
        assert count == wanted
        assert torch.equal(values, right)
