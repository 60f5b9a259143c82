"""Damaged files by the million: every reader gives a result or an `InputError` of one line, whatever the file holds.

    python -m tests.fuzz --inputs 10_000_000 --seed 0 --workers 2 -o fuzz_failures

An input follows from (seed, number) alone: one of a handful of small valid files, mutated. It fails where a reader
raises anything but `InputError`; where the message has two lines or does not name the file; where numbers that are not
finite come back; where a file of a few kB makes the process allocate hundreds of MB or compute for seconds; where the
process dies; and where reading does anything beside reading: writing, starting a program, importing, running code.

Each failing input and what it did is saved in the folder given with ``-o``, as is the progress: the same command goes
on where it was stopped. ``--only NUMBER`` makes one input again. The exit code is 1 where any input failed.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import math
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unicodedata  # noqa: F401 (Python's parser imports it at the first name that is not ASCII)
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from emsplat.errors import InputError
from emsplat.fitting.checkpoint import load_checkpoint, save_checkpoint
from emsplat.fitting.state import State
from emsplat.io.columns import read_latents
from emsplat.io.dcd import open_dcd
from emsplat.io.mrc import read_stored_map, write_map, writing_stack
from emsplat.io.mrc_arrays import StackFile
from emsplat.io.particles import read_particles
from emsplat.io.ply import read_ply, write_ply
from emsplat.io.relion.write import write_particles_star
from emsplat.maths.geometry import random_rotations
from emsplat.models.gaussians import Bounds
from emsplat.models.starts import ball
from emsplat.types import Grid, Optics, Poses

COUNT = 3  # particles of a seed
CPU_SECONDS = 5  # of one input: more is a hang
ADDRESS_SPACE = 512 * 2**20  # bytes that one input may ask for
RESIDENT = 96 * 1024  # kB by which the process may grow over one input
RECYCLE = 200_000  # inputs after which a worker gives way to a fresh one
MESSAGE = 1000  # characters of the longest message


# Seeds: small valid files of every kind.


def seeds(data: Path | None) -> dict[str, list[bytes]]:
    """Valid files of each kind, made here; with ``data`` also the first rows of files of other programs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = torch.Generator().manual_seed(0)
        for dtype in ("float32", "float16"):
            with writing_stack(folder / f"{dtype}.mrcs", COUNT, Grid(4, 2.0), dtype) as write:
                write(torch.randn(COUNT, 4, 4, generator=rng))
        write_map(folder / "map.mrc", torch.randn(6, 6, 6, generator=rng), 2.0)
        gaussians = torch.randn(3, 3), torch.ones(3, 3), torch.randn(3, 4), torch.ones(3)
        write_ply(folder / "g.ply", *gaussians, Grid(8, 2.0), "x")
        save_checkpoint(folder / "c.safetensors", State.begin(ball(4, Grid(8, 2.0), Bounds(16.0, 1.0, 1.0), 0)))
        _write_star(folder / "p.star", rng)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole, own, through = _cs_tables()
    star, old = files["p.star"], _OLD_STAR.encode()
    found = {
        "star": [star, old, _PAIRS_STAR.encode(), *_spellings(star), *_spellings(old)],
        "map": [
            *(files["map.mrc"], _swapped(files["map.mrc"]), _of_bytes(files["map.mrc"], 6**3, "<")),
            *(_of_bytes(files["map.mrc"], 6**3, ">"), gzip.compress(files["map.mrc"]), bz2.compress(files["map.mrc"])),
        ],
        "stack": [
            *(files["float32.mrcs"], files["float16.mrcs"], _swapped(files["float32.mrcs"])),
            _of_bytes(files["float32.mrcs"], COUNT * 4**2, "<"),
        ],
        "cs": [whole, _cs(_multi_class())],
        "needs passthrough": [own],  # not mutated itself
        "passthrough": [through, whole],
        "poses": [pickle.dumps(_POSES, protocol) for protocol in range(6)],
        "ctf": [pickle.dumps(_CTF, protocol) for protocol in range(6)],
        "ply": [files["g.ply"]],
        "checkpoint": [files["c.safetensors"]],
        "dcd": [dcd(order, marker, cell) for order in "<>" for marker in (4, 8) for cell in (False, True)],
        "latents": [_LATENTS.encode(), b"\xef\xbb\xbf" + _LATENTS.replace("\n", "\r\n").encode()],
        "z": [pickle.dumps(_CTF, protocol) for protocol in range(6)],
    }
    found["poses"].append(pickle.dumps(_POSES[0], 4))
    if data is not None:
        for path in sorted((data / "formats").glob("*.star")):
            lines = path.read_bytes().splitlines(keepends=True)[:400]
            first = next(i for i, line in enumerate(lines) if b"@" in line)
            found["star"].append(b"".join(lines[: first + 2]))
        for path in sorted((data / "formats").glob("*.cs")):
            found["cs"].append(_cs(np.load(path, max_header_size=100_000)[:2]))
    return found


_POSES = (np.eye(3, dtype=np.float32)[None].repeat(COUNT, 0), np.zeros((COUNT, 2), np.float32))
_CTF = np.array([[4, 2, 15000, 14000, 30, 300, 2.7, 0.1, 0]] * COUNT, np.float32)
_OLD_STAR = """
data_

loop_
_rlnImageName #1
_rlnMicrographName #2
_rlnAngleRot #3
_rlnAngleTilt #4
_rlnAnglePsi #5
_rlnOriginX #6
_rlnOriginY #7
_rlnDefocusU #8
_rlnDefocusV #9
_rlnDefocusAngle #10
_rlnVoltage #11
_rlnSphericalAberration #12
_rlnAmplitudeContrast #13
_rlnMagnification #14
_rlnDetectorPixelSize #15
_rlnRandomSubset #16
_rlnBeamTiltX #17
000001@a.mrcs 'm 1.mrc' 1.5 2.5 3.5 0.5 -0.5 15000 14000 30 300 2.7 0.1 10000 14 1 0.1
000002@a.mrcs "m 2.mrc" 1.5 2.5 3.5 0.5 -0.5 15000 14000 30 300 2.7 0.1 10000 14 2 0.1
"""
_PAIRS_STAR = """# version 30001
data_optics
_rlnOpticsGroup 1
_rlnOpticsGroupName opticsGroup1
_rlnImagePixelSize 2.0
_rlnImageSize 4
_rlnVoltage 300
_rlnSphericalAberration 2.7
_rlnAmplitudeContrast 0.1
_rlnOddZernike [0,0.1,0]
data_particles
_rlnImageName 1@a.mrcs
_rlnOpticsGroup 1
_rlnAngleRot 0
_rlnAngleTilt 0
_rlnAnglePsi 0
_rlnOriginXAngst 0
_rlnOriginYAngst 0
_rlnDefocusU 10000
_rlnDefocusV 10000
_rlnDefocusAngle 0
"""


_LATENTS = 'row,half,z1,z2,class,gain\n1,1,0.5,-1.25,1,3.5\n2,2,1e-3,4,"2",0\n3,1,0,0,,-1\n'


def dcd(order: str = "<", marker: int = 4, cell: bool = True, frames: int = 2, atoms: int = COUNT) -> bytes:
    """A trajectory whose atom a of frame f is at (a, f, 0.5) Å."""

    def record(content: bytes) -> bytes:
        length = struct.pack(order + ("i" if marker == 4 else "q"), len(content))
        return length + content + length

    words = [frames, 1, 1, *[0] * 7, int(cell), *[0] * 8, 24]
    parts = [b"CORD" + struct.pack(order + "20i", *words), struct.pack(order + "i", 1) + b"a title".ljust(80)]
    parts.append(struct.pack(order + "i", atoms))
    for frame in range(frames):
        parts += [struct.pack(order + "6d", 9, 90, 9, 90, 90, 9)] * cell
        parts += [struct.pack(f"{order}{atoms}f", *axis) for axis in (range(atoms), [frame] * atoms, [0.5] * atoms)]
    return b"".join(map(record, parts))


def _write_star(path: Path, rng: torch.Generator) -> None:
    one = torch.ones(COUNT, dtype=torch.float64)
    write_particles_star(
        path,
        [f"{i + 1}@a.mrcs" for i in range(COUNT)],
        [f"m{i}.mrc" for i in range(COUNT)],
        Poses(random_rotations(COUNT, rng), torch.randn(COUNT, 2, generator=rng).double()),
        Optics(*(v * one for v in (300, 2.7, 0.1, 15000, 14000, 0.6, 0, 0, 1))),
        Grid(4, 2.0),
        torch.tensor([1, 2, 1]),
    )


def _cs(table: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, table)
    return file.getvalue()


def _table(columns: dict[str, Any]) -> np.ndarray[Any, Any]:
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    table = np.zeros(COUNT, [(name, a.dtype, a.shape[1:]) for name, a in arrays.items()])
    for name, values in arrays.items():
        table[name] = values
    return table


def _columns() -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of an alignment and those that pass through it."""

    def of(*values: float) -> np.ndarray[Any, Any]:
        return np.full(
            (COUNT, *([len(values)] if len(values) > 1 else [])), values if len(values) > 1 else values[0], "f4"
        )

    own = {
        "uid": np.arange(COUNT, dtype="u8"),
        "alignments3D/split": np.array([0, 1, 0], "u4"),
        "alignments3D/shift": of(0.5, 0.25),
        "alignments3D/pose": of(0.1, 0.2, 0.3),
        "alignments3D/psize_A": of(2),
    }
    through = {
        "uid": np.arange(COUNT, dtype="u8")[::-1].copy(),
        "blob/path": np.array([b">J1/a.mrcs"] * COUNT),
        "blob/idx": np.arange(COUNT, dtype="u4"),
        "blob/shape": np.full((COUNT, 2), 4, "u4"),
        "blob/psize_A": of(2),
        "blob/sign": of(-1),
        "ctf/accel_kv": of(300),
        "ctf/cs_mm": of(2.7),
        "ctf/amp_contrast": of(0.1),
        "ctf/df1_A": of(15000),
        "ctf/df2_A": of(14000),
        "ctf/df_angle_rad": of(0.5),
        "ctf/exp_group_id": np.zeros(COUNT, "u4"),
        "ctf/tilt_A": of(0.5, 0.0),
        "location/micrograph_path": np.array([b"m.mrc"] * COUNT),
        "sym_expand/src_uid": np.array([1, 2, 1], "u8"),
    }
    return own, through


def _cs_tables() -> tuple[bytes, bytes, bytes]:
    """A whole table, one that needs another, and the other."""
    own, through = _columns()
    return _cs(_table({**through, **own})), _cs(_table(own)), _cs(_table(through))


def _multi_class() -> np.ndarray[Any, Any]:
    own, through = _columns()
    classes = {
        f"alignments3D_multi/{name}": np.stack([own[f"alignments3D/{name}"]] * 2, 1)
        for name in ("shift", "pose", "psize_A", "split")
    }
    return _table({**through, **classes, "alignments3D_multi/class_posterior": np.full((COUNT, 2), 0.5, "f4")})


def _swapped(content: bytes) -> bytes:
    """An MRC file of mode 2 in the other byte order."""
    head = np.frombuffer(content[:1024], "<u4").copy()
    words = [*range(52), 54, 55]  # all but text and machine stamp
    head[words] = head[words].byteswap()
    data = np.frombuffer(content[1024:], "<u4").byteswap()
    return head.tobytes()[:212] + b"\x11\x11\0\0" + head.tobytes()[216:] + data.tobytes()


def _of_bytes(content: bytes, count: int, order: str) -> bytes:
    """The same MRC file in mode 0, with IMOD's stamp."""
    content = content if order == "<" else _swapped(content)
    head = bytearray(content[:1024])
    for at, word in ((12, 0), (152, 1146047817), (156, 1)):
        head[at : at + 4] = struct.pack(order + "i", word)
    return bytes(head) + bytes(range(256))[:count]


def _spellings(star: bytes) -> list[bytes]:
    """The same STAR file as it comes out of other systems, a spreadsheet, R or gzip, and with words that CIF would not
    take."""
    lines = star.split(b"\n")
    quoted = [b'"' + line.replace(b" #", b'"\t"#') + b'"' if line.startswith(b"_") else line for line in lines]
    return [
        star.replace(b"\n", b"\r\n"),
        star.replace(b"\n", b"\r"),
        b"\xef\xbb\xbf" + star,
        star.decode().encode("utf-16"),
        b"Table 1,,\n\n" + b"\t\t\t\n".join(lines),
        b"\n".join(quoted).replace(b" ", b"\t"),
        star.replace(b"_optics", b"_optics NA NA").replace(b"loop_", b"loop_ NA"),
        re.sub(rb"m ?(\d)", rb"data_\1", star),
        re.sub(rb"m ?(\d)", rb"_\1", star).replace(b"a.mrcs", b"$x/save_/loop_/'a.mrcs"),
        gzip.compress(star, mtime=0),
    ]


# Mutations.

_NUMBERS = (0, 1, 2, 3, 4, 127, 128, 255, 1024, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
_FLOATS = (math.inf, math.nan, 1e30, 1e300, -1e30, 1e-30, 1e-320, 2**31, 2**63)
_TOKENS = [
    *("nan", "inf", "-inf", "1e999", "-1e999", "-0", "1e-320", "1e38", "1e300", "1_000", "0x10", "1e", ".", "+", "1,5"),
    *("9" * 20, "9" * 5000, "-1", "0", "1", "2", "3", "4294967297", "٣", "½", "é.mrc", "\u2028", "\ud800", "\x00"),
    *("'", '"', "''", "'a b'", '"a', "#", "a#b"),
    *("?", "[1,2]", "[", "$x", ";", "\n;\ntext\nmore\n;\n", "data_", "data_x"),
    *("loop_", "save_", "save_x", "stop_", "global_", "data_optics", "data_particles", "_rlnImageName", "_rlnAngleRot"),
    *("_rlnOpticsGroup", "_rlnVoltage", "_rlnImagePixelSize", "_rlnRandomSubset", "_rlnHelicalTubeID", "_", "__"),
    *("_rlnTomoName", "_rlnCoordinateZ", "_rlnImageDimensionality"),
    *("@", "1@", "@a.mrcs", "0@a.mrcs", "1@a.mrcs@b", "a.mrcs", "a.mrc", "1@a.mrc", "1@./a.mrcs", "1@>a.mrcs"),
    *("999999999@a.mrcs", "9999999999@a", "1@/", "1@..", "1@" + "a/" * 3000),
    *("data_raw/1.mrc", "loop_x", "_a", "$g/a", "'a", 'a"', "'a'b", "\"a 'b", "NA", "#1", "a;b"),
    *("\x0b", "1.5e4", "1" * 17),
    *("True", "None", "1.0", "1.5", "\ufeff", "\r", "\n", "\t", "\x1a", "\x85"),
]  # fmt: skip
_NPY_TOKENS = [
    *("(", ")", "()", "(-1,)", "(3,3)", "(0,)", "(1,)", "(2,)", "(100000000000,)", "(9223372036854775807,)", "(3.0,)"),
    *("(18446744073709551616,)", "(True,)", "[3]", "{}", "None", "True", "False", "1", "'", '"', ",", "#", "\\", "\n"),
    *("'<f8'", "'|O'", "'>f4'", "'<U3'", "'|S0'", "'|V8'", "'<c8'", "'<M8[s]'", "'<m8[as]'", "'|b1'", "'<f2'", "'<i8'"),
    *("'<f16'", "'<f3'", "'|S999999999'", "'<U536870911'", "'f4,f4'", "(3,)f4'", "'x'", "''", "'descr'", "'shape'"),
    *("(1000000,1000000)", "(0,)", "(2147483647,)", "-" * 3000, "(" * 300, "[" * 150, "9" * 5000, "1e5", "lambda:0"),
    *("__import__('os').system('x')", "'blob/path'", "'blob/idx'", "'uid'", "'ctf/df1_A'", "'alignments3D/pose'"),
]  # fmt: skip
_PLY_TOKENS = [
    *("ply", "format", "binary_little_endian", "ascii"),
    *("comment", "comment box 8 pixel_size 1e999", "element", "vertex"),
    *("property", "float", "double", "uchar", "list", "x", "scale_0", "rot_0", "amplitude", "end_header\n", "0", "1"),
    *("-1", "999999999", "9" * 30, "nan", "٣", "\n", " ", "comment box 0 pixel_size 0", "box", "é"),
]  # fmt: skip
_JSON_TOKENS = [
    *("{", "}", "[", "]", ":", ",", '"', "null"),
    *("true", "1e999", "NaN", "-1", "0", "9" * 30, '"F64"', '"BOOL"', '"F32"'),
    *('"I64"', '"BF16"', '"data_offsets"', "[0,0]", "[0,18446744073709551615]", '"model.mean"', '"\\ud800"', "[" * 500),
    *("[4294967296,4294967296]", "[0]", "[3,3]", "[2305843009213693952]", "step", "bounds", "rotation", '\\"', "{}"),
]  # fmt: skip
_CSV_TOKENS = [
    *("row,z1\n1,2\n", "z1", ",", '"', '""', "\r", "z2,z2", "z01", "z", "z99999999999", "row", "class", ",,,,,"),
    *("z1,z2,z3,z4,z5,z6,z7", "0x1p3", "1e999", "infinity", "1,1,0.5,-1.25,1,3.5\n", "\n" * 50, '"a\nb"', "x" * 140000),
]  # fmt: skip
_FILES = {
    "star": "p.star",
    "map": "map.mrc",
    "stack": "s.mrcs",
    "cs": "p.cs",
    "passthrough": "J1_passthrough_particles.cs",
    "poses": "poses.pkl",
    "ctf": "ctf.pkl",
    "ply": "g.ply",
    "checkpoint": "c.safetensors",
    "dcd": "t.dcd",
    "latents": "latents.csv",
    "z": "z.pkl",
}
KINDS = tuple(_FILES)
# STAR, .cs and pickles are where mutations differ most.
_TURNS = (
    "star",
    "cs",
    "poses",
    "stack",
    "star",
    "cs",
    "ctf",
    "map",
    "passthrough",
    "ply",
    "star",
    "poses",
    "checkpoint",
    "dcd",
    "latents",
    "z",
)


def make(files: dict[str, list[bytes]], seed: int, number: int, kinds: tuple[str, ...] = _TURNS) -> tuple[str, bytes]:
    """Kind and content of one input."""
    kind = kinds[number % len(kinds)]
    rng = random.Random((seed << 40) + number)
    own = files[kind]
    content = rng.choice(own)
    special = _SPECIAL[kind]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = special(rng, content) if rng.random() < 0.6 else _bytes(rng, content, own)
    return kind, content


def _number_bytes(rng: random.Random) -> bytes:
    value = rng.choice(_NUMBERS)
    if rng.random() < 0.3:
        value += rng.randint(-2, 2)
    order = rng.choice("<>")
    return rng.choice(
        (
            lambda: struct.pack(order + "Q", value % 2**64),
            lambda: struct.pack(order + "I", value % 2**32),
            lambda: struct.pack(order + "H", value % 2**16),
            lambda: struct.pack(
                order + "f", rng.choice((math.nan, math.inf, -math.inf, 1e38, 1e-45, -0.0, float(value)))
            ),
            lambda: struct.pack(order + "d", rng.choice((math.nan, math.inf, 1e308, 5e-324, -1.0))),
        )
    )()


def _bytes(rng: random.Random, content: bytes, own: list[bytes]) -> bytes:
    """One change that knows nothing of the format."""
    size = len(content)
    at = rng.randrange(size + 1)
    some = min(size, at + rng.choice((1, 1, 2, 4, 8, 40, 200)))
    deed = rng.randrange(9)
    if deed == 0 and at < size:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if deed == 1 and at < size:
        return content[:at] + bytes([rng.choice((0, 1, 10, 32, 127, 128, 255, rng.randrange(256)))]) + content[at + 1 :]
    if deed == 2:
        return content[:at] + content[some:]
    if deed == 3:
        return content[:at] + rng.randbytes(rng.choice((1, 2, 4, 8, 30))) + content[at:]
    if deed == 4:
        return content[:some] + content[at:some] * rng.choice((1, 1, 2, 20)) + content[some:]
    if deed == 5 and rng.random() < 0.3:
        return content[:at]
    if deed == 6:
        other = rng.choice(own)
        return content[:at] + other[rng.randrange(len(other)) if rng.random() < 0.5 else at :]
    new = _number_bytes(rng)
    return content[:at] + new + content[at + len(new) :]


_SPACES = re.compile(rb"(\s+)")


def _replaced(rng: random.Random, content: bytes, head: int) -> bytes:
    """A number in the first bytes put to another one; often the same in all records of its size."""
    new = struct.pack(rng.choice("<>") + "i", min(rng.choice(_NUMBERS) + rng.randint(-2, 2), 2**31 - 1))
    at = 4 * rng.randrange(min(head, max(4, len(content))) // 4)
    if rng.random() < 0.3 and len(content) > at + 4:
        return content.replace(content[at : at + 4], new, rng.choice((1, 2, 100)))
    return content[:at] + new + content[at + 4 :]


def _words(tokens: list[str], head: bytes | None = None) -> Callable[[random.Random, bytes], bytes]:
    """A mutator of words, in the text before ``head`` only."""
    raw = [token.encode("utf-8", "surrogatepass") for token in tokens]

    def mutate(rng: random.Random, content: bytes) -> bytes:
        text, found, rest = content.partition(head) if head else (content, b"", b"")
        words = _SPACES.split(text)
        at, other = rng.randrange(len(words)), rng.randrange(len(words))
        deed = rng.randrange(12)
        if deed < 4:
            words[at - at % 2] = rng.choice(raw)
        elif deed > 7:  # another number where there was one
            numbers = [i for i, word in enumerate(words) if word[:1] in b"-.0123456789" and word[:1]]
            words[rng.choice(numbers or [at])] = repr(
                rng.choice((rng.randint(-3, 400), rng.gauss(0, 1), *_FLOATS))
            ).encode()
        elif deed == 4:
            words.insert(at, b" " + rng.choice(raw) + b" ")
        elif deed == 5:
            words[at], words[other] = words[other], words[at]
        elif deed == 6:
            del words[at]
        else:
            lines = text.split(b"\n")
            first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[first : first + 1] = rng.choice(([], [lines[first]] * 2, [lines[second]]))
            words = [b"\n".join(lines)]
        return b"".join(words) + found + rest

    return mutate


_ENDS = (b"\t", b"\t\t\t", b" ", b" # remark", b"\r", b" NA", b",,", b";", b'"', b"\x1a", b"\v")


def _star(rng: random.Random, content: bytes) -> bytes:
    """Words, or what spreadsheets, scripts and copying do to whole files; also within what gzip packed."""
    packed = content.startswith(b"\x1f\x8b")
    if packed:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return content
    deed = rng.randrange(24)
    end, lines = rng.choice(_ENDS), content.split(b"\n")
    at = rng.randrange(len(lines))
    if deed == 0:
        content = (
            rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"Sheet 1\t\t\n", b"\n_rlnX 1\nloop_\n", b"x\n\n")) + content
        )
    elif deed == 1:
        content = (end + b"\n").join(lines)
    elif deed == 2:
        content = content + rng.choice((b"", b"\n", b"data_x\n", b"x ")) + content
    elif deed == 3:
        content = content.replace(b" ", rng.choice((b"\t", b",", b"  ", b"\x0b", b"\xc2\xa0")))
    elif deed == 4:
        lines[at] = rng.choice((b'"' + lines[at] + b'"', lines[at] + end, b"#" + lines[at], b"", b"'" + lines[at]))
        content = b"\n".join(lines)
    elif deed == 5:
        lines.insert(
            at, rng.choice((b"", b"loop_", b"_rlnX #1", b"_rlnX 5", b"data_", b"data_x/1 2", b"# x", b"stop_"))
        )
        content = b"\n".join(lines)
    elif deed == 6 and len(content) < 10_000:
        content = gzip.compress(content, 1, mtime=0)
    else:
        content = _STAR_WORDS(rng, content)
    return gzip.compress(content, 1, mtime=0) if packed else content


_STAR_WORDS = _words(_TOKENS)
_NPY_PARTS = re.compile(r"('[^']*'|\d+|[(),\[\]{}:]|True|False)")


def _npy(rng: random.Random, content: bytes) -> bytes:
    """The header of a .npy file: a Python literal."""
    wide = content[6:7] in (b"\x02", b"\x03")
    start = 12 if wide else 10
    length = int.from_bytes(content[8:start], "little")
    text, body = content[start : start + length].decode("latin1"), content[start + length :]
    if rng.random() < 0.4 and len(body) > 8:  # the values alone
        at = start + length + rng.randrange(len(body) - 8)
        new = _number_bytes(rng)
        return content[:at] + new + content[at + len(new) :]
    parts = _NPY_PARTS.split(text)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(parts))
        deed = rng.randrange(7)
        if deed < 3:
            parts[at] = rng.choice(_NPY_TOKENS)
        elif deed == 3:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif deed == 4:
            shape = rng.choice(("(0,)", "(1,)", "(2,)", "(4,)", "(100000000000,)", "(3, 1)", "()", "(-3,)", "3"))
            parts = _NPY_PARTS.split("".join(parts).replace(f"({COUNT},)", shape))
        elif deed == 5:
            parts[at] *= rng.choice((0, 2, 50))
        else:  # another type
            kinds = [i for i, part in enumerate(parts) if part[1:2] in ("<", "|", ">")]
            parts[rng.choice(kinds or [at])] = rng.choice(
                ("'<f8'", "'>f4'", "'<f4'", "'<u4'", "'|S4'", "'|b1'", "'<i4'")
            )
    raw = "".join(parts).encode("latin1", "replace")
    version = rng.choice((1, 1, 2, 3, 3, 4, 0)) if rng.random() < 0.3 else content[6] if len(content) > 6 else 1
    wide = version in (2, 3) or len(raw) > 60_000
    raw = (
        raw.rstrip() + b" " * (-(len(raw.rstrip()) + (13 if wide else 11)) % 64) + b"\n" if rng.random() < 0.8 else raw
    )
    size = struct.pack("<I" if wide else "<H", len(raw) % (2**32 if wide else 2**16))
    if rng.random() < 0.1:
        body = body[: rng.randrange(len(body) + 1)] if rng.random() < 0.5 else body * 3
    return content[:6] + bytes([2 if wide and version == 1 else version, 0]) + size + raw + body


_DANGERS = [
    *(b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy\nload\n"),
    *(b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy._core.numeric\n_frombuffer\n", b"c_codecs\nencode\n"),
    *(b"\x8c\x05posix\x8c\x06system\x93", b"\x8c\x05numpy\x8c\x05dtype\x93", b"\x93", b"R"),
    *(b"b", b"o", b"\x81", b"\x92"),
    *(b"iposix\nsystem\n", b"(S'true'\nios\nsystem\n", b"S'touch /dev/shm/ran'\n", b"tR"),
    *(b"\x85R", b"0", b"2", b"1", b"("),
    *(b"\x82\x01", b"\x83\x01\x00", b"\x84\xff\xff\xff\x7f", b"Pid\n", b"Q", b"}"),
    *(b"}(", b"u", b"s", b"]", b"e", b"a", b"l"),
    *(b"d", b"\x8f", b"\x90", b"\x91", b"N", b"\x88", b"\x89"),
    *(b"t", b"\x85", b"\x86", b"\x87", b")", b".", b"\x97", b"\x98"),
    *(b"r\xff\xff\xff\xff", b"r\xff\xff\xff\x0f", b"p4294967295\n"),
    *(b"p-1\n", b"j\xff\xff\xff\xff", b"g99999\n", b"\x94"),
    *(b"h\x00", b"h\x01", b"q\xff", b"K\xff"),
    *(b"J\xff\xff\xff\xff", b"M\xff\xff", b"I" + b"9" * 5000 + b"\n", b"I01\n", b"Ix\n"),
    *(b"L1L\n", b"L" + b"9" * 4000 + b"L\n", b"Fnan\n"),
    *(b"F1e999\n", b"G\x7f\xf0\0\0\0\0\0\0", b"\x8a\xff" + b"\x7f" * 255),
    *(b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"\x8e\xff\xff\xff\xff\x1f\0\0\0", b"\x8e" + b"\xff" * 8),
    *(b"\x8d\xff\xff\xff\xff\x1f\0\0\0", b"\x96\xff\xff\xff\xff\x1f\0\0\0", b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f"),
    *(b"T\xff\xff\xff\x7f", b"T\xff\xff\xff\xff"),
    *(b"\x95" + b"\xff" * 8, b"\x95\x00\x00\x00\x01\x00\x00\x00\x00", b"\x95\x04" + b"\0" * 7),
    *(b"\x80\x05", b"\x80\xff", b"C\x04abcd", b"U\x01b"),
    *(b"\x8c\x03|O\x00", b"V\\u0130\n", b"V\\ud800\n", b"S'b'\n", b"S'O'\n"),
    *(b"X\x02\0\0\0f4", b"X\x01\0\0\0O", b"X\x05\0\0\0(9,)O"),
    *(b"X\x08\0\0\0999999f8", b"X\x01\0\0\0<", b"X\x05\0\0\0f4,O8"),
    *(b"]" * 2000, b"(" * 2000, b"N" + b"\x85" * 3000),
    *(b"}N" + b"\x85" * 50_000 + b"Ns", b"]2a", b"(I1\nI2\nt", b"J\xff\xff\xff\x7f"),
    *(b"K\x03K\x03K\x03\x87", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
    *(b"J\0\0\0\x40\x85", b"K\0\x85", b"J\xff\xff\xff\xff\x85"),
    b"cnumpy\nndarray\n(I40000000000\ntR",
    b"cnumpy\nndarray\n((I3\ntS'O'\ntR",
    b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt}S'a'\n(cnumpy\ndtype\n(S'O'\ntRI0\ntsI8\nI1\nI0\ntb",
    b"cnumpy.core.multiarray\n_reconstruct\n}S'__defaults__'\n(I1\nts\x86b",
]  # fmt: skip


def _opcodes(content: bytes) -> list[bytes]:
    """The pieces of a pickle, one per opcode; what cannot be read is the last piece."""
    starts: list[int] = []
    try:
        starts.extend(at for _, _, at in pickletools.genops(content) if at is not None)
    except Exception:  # noqa: BLE001 (the pickle is damaged: what was read is kept)
        starts.append(starts.pop() if starts else 0)
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]


def _pickle(rng: random.Random, content: bytes) -> bytes:
    pieces = _opcodes(content) if len(content) < 4000 else [content]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(pieces) + 1), rng.randrange(len(pieces))
        deed = rng.randrange(8)
        if deed < 4:
            pieces.insert(at, rng.choice(_DANGERS))
        elif deed == 4:
            pieces[other] = rng.choice(_DANGERS)
        elif deed == 5:
            pieces.insert(at, pieces[other])
        elif deed == 6 and len(pieces) > 1:
            del pieces[other]
        else:
            piece = pieces[other]
            pieces[other] = piece[:1] + _number_bytes(rng)[: max(len(piece) - 1, 1)]
    return b"".join(pieces)


# nx ny nz mode, starts, mx my mz, cella, mapc mapr maps, dmin dmax dmean, ispg nsymbt, exttyp, nversion, IMOD's stamp
# and flags, origin, map, machst
_MRC_FIELDS = [
    *range(0, 76, 4),
    *(64, 68, 72, 76, 80, 84, 88, 92, 92, 104, 108, 152, 156, 196, 200, 204, 208, 212),
]
_PACKED = {b"\x1f\x8b": (gzip.decompress, gzip.compress), b"BZh": (bz2.decompress, bz2.compress)}


def _map(rng: random.Random, content: bytes) -> bytes:
    """As `_mrc`, also in what a packed file holds."""
    unpack, pack = next((both for start, both in _PACKED.items() if content.startswith(start)), (bytes, bytes))
    try:
        inside = unpack(content) if rng.random() < 0.7 else content
    except (OSError, EOFError, ValueError, zlib.error):  # damaged before
        return _mrc(rng, content)
    return pack(_mrc(rng, inside)) if inside is not content else _mrc(rng, content)


def _mrc(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.2:  # axes, right or wrong
        axes = [rng.choice((1, 2, 3, 3, 0)) for _ in range(3)] if rng.random() < 0.5 else rng.sample((1, 2, 3), 3)
        order = ">" if content[212:214] == b"\x11\x11" else "<"
        return content[:64] + struct.pack(order + "3i", *axes) + content[76:]
    at = rng.choice(_MRC_FIELDS)
    small = struct.pack("<i", rng.choice((-1, 0, 1, 2, 3, 4, 5, 6, 7, 12, 16, 64, 1024, 101, 401)))
    stamp = rng.choice((b"\x44\x44\0\0", b"\x44\x41\0\0", b"\x11\x11\0\0", b"\0\0\0\0", b"MAP "))
    new = rng.choice((small, small[::-1], _number_bytes(rng), stamp))
    return content[:at] + new + content[at + len(new) :]


def _safetensors(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text, body = content[8 : 8 + length].decode("latin1"), content[8 + length :]
    parts = re.split(r'("[^"]*"|\d+|[\[\]{}:,])', text)
    at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    parts[at] = rng.choice((rng.choice(_JSON_TOKENS), rng.choice(_JSON_TOKENS), parts[other], ""))
    raw = "".join(parts).encode("latin1", "replace")
    return struct.pack("<Q", len(raw) if rng.random() < 0.9 else rng.choice(_NUMBERS)) + raw + body


_SPECIAL: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "star": _star,
    "map": _map,
    "stack": _mrc,
    "cs": _npy,
    "passthrough": _npy,
    "poses": _pickle,
    "ctf": _pickle,
    "ply": _words(_PLY_TOKENS, b"end_header\n"),
    "checkpoint": _safetensors,
    "dcd": lambda rng, content: _replaced(rng, content, 400),
    "latents": _words([*_TOKENS, *_CSV_TOKENS]),
    "z": _pickle,
}


# What must hold.


class Reading:
    """The readers, in a folder where everything but the damaged file is well."""

    def __init__(self, folder: Path, files: dict[str, list[bytes]]) -> None:
        self.folders = {kind: folder / kind for kind in KINDS}
        for own in self.folders.values():
            own.mkdir(exist_ok=True)
        for kind, name, content in (
            ("star", "a.mrcs", files["stack"][0]),
            ("passthrough", "p.cs", files["needs passthrough"][0]),
            ("poses", "s.mrcs", files["stack"][0]),
            ("poses", "ctf.pkl", files["ctf"][4]),
            ("ctf", "s.mrcs", files["stack"][0]),
            ("ctf", "poses.pkl", files["poses"][4]),
        ):
            (self.folders[kind] / name).write_bytes(content)
        self.paths = {kind: str(own / _FILES[kind]) for kind, own in self.folders.items()}
        for path in self.paths.values():
            Path(path).touch()
        self.listings = {kind: sorted(os.listdir(own)) for kind, own in self.folders.items()}  # noqa: PTH208 (speed)

    def write(self, kind: str, content: bytes) -> None:
        with open(self.paths[kind], "wb") as file:  # noqa: PTH123 (speed)
            file.write(content)

    def read(self, kind: str) -> Any:
        folder, path = self.folders[kind], Path(self.paths[kind])
        if kind in ("star", "cs"):
            return read_particles(path, need_stacks=False)
        if kind == "passthrough":
            return read_particles(folder / "p.cs", passthrough=[path], need_stacks=False)
        if kind in ("poses", "ctf"):
            return read_particles(folder / "s.mrcs", poses=folder / "poses.pkl", ctf=folder / "ctf.pkl")
        if kind == "stack":
            stack = StackFile(path)
            out = np.empty((stack.count, stack.box, stack.box), np.float32)
            stack.read_into(out, range(stack.count), range(stack.count))
            stack.close()
            return stack.pixel_size
        if kind == "dcd":
            trajectory = open_dcd(path)
            return tuple(
                map(torch.from_numpy, trajectory.read([0, trajectory.frames - 1], np.arange(trajectory.atoms)))
            )
        if kind in ("latents", "z"):
            return read_latents(path)
        return {"map": read_stored_map, "ply": read_ply, "checkpoint": load_checkpoint}[kind](path)

    def judge(self, kind: str, content: bytes) -> tuple[bool, str]:
        """Whether the input was read, and what is wrong with how it was treated ("" when nothing is)."""
        self.write(kind, content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _deeds.clear()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        wrong, read = "", False
        try:
            _armed[0] = True
            try:
                result = self.read(kind)
            finally:
                _armed[0] = False
            read = True
            wrong = _not_finite(result) if kind != "checkpoint" else ""
        except InputError as error:
            wrong = self._message(kind, error)
        except Exception as error:  # noqa: BLE001 (what the fuzzer is for)
            wrong = "".join(traceback.format_exception(error))[-4000:]
        signal.setitimer(signal.ITIMER_PROF, 0)
        if _deeds:
            wrong = wrong or f"reading did more than read: {_deeds[:3]}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > RESIDENT:
            wrong = wrong or f"{grown // 1024} MB of memory for a file of {len(content)} bytes"
        if sorted(os.listdir(self.folders[kind])) != self.listings[kind]:  # noqa: PTH208 (speed)
            wrong = wrong or "a file was written"
        return read, wrong

    def _message(self, kind: str, error: InputError) -> str:
        text = str(error)
        if not text.isprintable() or len(text) > MESSAGE:
            return f"message of {len(text)} characters that is not one printable line: {text[:300]!r}"
        if str(self.folders[kind]) not in text:
            return f"message that names no file: {text}"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) and not _too_nested(cause):
                return f"memory on the word of the file: {text}"
            cause = cause.__cause__ or cause.__context__
        return ""


def _too_nested(error: MemoryError) -> bool:
    """Python's parser says MemoryError where an expression is nested too deeply."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith("ast.py")


def _not_finite(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return (
            "" if not value.is_floating_point() or bool(torch.isfinite(value).all()) else "values that are not finite"
        )
    if isinstance(value, tuple):
        return next(filter(None, map(_not_finite, value)), "")
    if is_dataclass(value):
        # A place that is not known is NaN.
        names = [field.name for field in fields(value) if field.name not in ("coordinates", "micrograph_pixel_size")]
        return next(filter(None, (_not_finite(getattr(value, name)) for name in names)), "")
    return "values that are not finite" if isinstance(value, float) and not math.isfinite(value) else ""


_armed = [False]
_deeds: list[str] = []
# numpy reads the header of a .npy file with ast.literal_eval, which compiles to a tree and runs nothing.
_HARMLESS = {
    *(
        "mmap.__new__",
        "os.listdir",
        "os.scandir",
        "glob.glob",
        "pathlib.Path.glob",
        "builtins.id",
        "object.__getattr__",
    ),
    "compile",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: notes what a reader does beside reading."""
    if not _armed[0] or event in _HARMLESS:
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
        return
    _deeds.append(f"{event} {arguments}"[:300])


# Workers: a process reads one input after the other; where it dies, the input that it was at is the culprit.


class Task(NamedTuple):
    files: dict[str, list[bytes]]
    seed: int
    kinds: tuple[str, ...]
    first: int  # number of the first input
    step: int
    stop: int
    scratch: Path
    failures: Path


def _work(task: Task, at: Any, counts: Any) -> None:
    """Inputs first, first + step, ...

    ``at`` holds the next number and whether work has begun, ``counts`` how many were read and refused.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()
    scratch = task.scratch / str(task.first % task.step)
    scratch.mkdir(exist_ok=True)
    reading = Reading(scratch, task.files)
    sys.setrecursionlimit(1000)
    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_watch)
    with warnings.catch_warnings():  # first reads import what they need
        warnings.simplefilter("ignore")
        for kind in KINDS:
            for content in [*task.files[kind], b"", task.files[kind][0][:50]]:
                reading.judge(kind, content)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE,) * 2)
    for number in range(task.first, min(task.stop, task.first + RECYCLE * task.step), task.step):
        if os.getppid() != parent:
            return  # nobody asks any more
        at[:] = number, 1
        kind, content = make(task.files, task.seed, number, task.kinds)
        read, wrong = reading.judge(kind, content)
        counts[2 * KINDS.index(kind) + (not read)] += 1
        if wrong:
            save(task.failures, kind, number, content, wrong)
        at[0] = number + task.step


def save(folder: Path, kind: str, number: int, content: bytes, wrong: str) -> None:
    """A failing input and what it did; not more than a few of one sort."""
    sort = re.sub(r"[^A-Za-z]+", "-", f"{kind}-{wrong.strip().splitlines()[-1]}")[:60]
    with (folder / "failures.txt").open("a") as file:
        file.write(f"{number} {sort}\n")
    if len(list(folder.glob(f"{sort}*.txt"))) < 3:
        (folder / f"{sort}_{number}.bin").write_bytes(content)
        (folder / f"{sort}_{number}.txt").write_text(wrong + "\n", errors="backslashreplace")


def failures(folder: Path) -> Counter[str]:
    """How often each sort of failure was seen."""
    path = folder / "failures.txt"
    return Counter(line.split()[1] for line in path.read_text().splitlines()) if path.exists() else Counter()


class Worker:
    """One process after another over the same numbers."""

    def __init__(self, task: Task) -> None:
        self._context = multiprocessing.get_context("fork")  # nothing is imported anew
        self._task = task
        self._at = self._context.Array("q", [task.first, 0], lock=False)
        self.counts = self._context.Array("q", 2 * len(KINDS), lock=False)
        self._start()

    def _start(self) -> None:
        self._at[1] = 0
        task = self._task._replace(first=self.next)
        self.process = self._context.Process(target=_work, args=(task, self._at, self.counts), daemon=True)
        self.process.start()

    @property
    def next(self) -> int:
        return int(self._at[0])

    def goes_on(self) -> bool:
        """False once the last input was read; starts again what has died."""
        if self.process.is_alive():
            return True
        number, task, code = self.next, self._task, self.process.exitcode
        if number >= task.stop:
            return False
        if code != 0:
            if not self._at[1]:
                raise SystemExit(f"a worker did not start (exit code {code})")
            kind, content = make(task.files, task.seed, number, task.kinds)
            what = "hang" if code == -signal.SIGPROF else f"crash (exit code {code})"
            save(task.failures, kind, number, content, what)
            self._at[0] = number + task.step
        self._start()
        return True


def run(inputs: int, seed: int, workers: int, output: Path, *, data: Path | None, kinds: tuple[str, ...]) -> int:
    """All inputs from where the folder says it was stopped; the number of failures."""
    output.mkdir(parents=True, exist_ok=True)
    progress = output / "progress.json"
    same = {"seed": seed, "kinds": kinds, "data": str(data)}
    said = json.loads(progress.read_text()) if progress.exists() else {}
    start = said["next"] if said.get("same") == json.loads(json.dumps(same)) else 0
    memory = Path("/dev/shm")  # a file system in memory, where there is one
    scratch = Path(tempfile.mkdtemp(prefix="emsplat_fuzz_", dir=memory if memory.is_dir() else None))
    files = seeds(data)
    running = [
        Worker(Task(files, seed, kinds, start + i, workers, inputs, scratch, output))
        for i in range(min(workers, inputs))
    ]
    began = spoken = time.monotonic()
    try:
        for _ in _until_done(running):
            now = time.monotonic()
            if now - spoken > 60:
                spoken = now
                _say(running, start, inputs, now - began, output)
                progress.write_text(json.dumps({"same": same, "next": min(worker.next for worker in running)}))
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.join()
        progress.write_text(json.dumps({"same": same, "next": min(min(worker.next for worker in running), inputs)}))
        shutil.rmtree(scratch)
    _say(running, start, inputs, time.monotonic() - began, output)
    return failures(output).total()


def _until_done(running: list[Worker]) -> Iterator[None]:
    while any([worker.goes_on() for worker in running]):  # noqa: C419 (each must be asked)
        yield
        time.sleep(0.05)


def _say(running: list[Worker], start: int, inputs: int, seconds: float, output: Path) -> None:
    counts = np.sum([list(worker.counts) for worker in running], axis=0).reshape(-1, 2)
    done, rate = int(counts.sum()), counts.sum() / seconds
    left = (inputs - start - done) / max(rate, 1e-9)
    end = time.strftime("%d %b %H:%M", time.localtime(time.time() + left))
    found = failures(output)
    each = ", ".join(f"{kind} {r}+{f}" for kind, (r, f) in zip(KINDS, counts.tolist(), strict=True) if r + f)
    print(
        f"{time.strftime('%d %b %H:%M:%S')}  {start + done:,} of {inputs:,} inputs, {rate:.0f}/s, end {end}, "
        f"{found.total()} failures; read+refused: {each}",
        flush=True,
    )
    for sort, times in found.most_common(20):
        print(f"    {times} x {sort}", flush=True)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--kinds", default="", help=f"some of {' '.join(KINDS)}, separated by commas; all by default")
    parser.add_argument("--data", type=Path, help="test data: the first rows of its files serve as seeds too")
    parser.add_argument("--only", type=int, help="make this input in the folder of -o, read it and say what happens")
    parser.add_argument("-o", "--output", type=Path, default=Path("fuzz_failures"))
    given = parser.parse_args(words)
    kinds = tuple(given.kinds.split(",")) if given.kinds else _TURNS
    if given.only is not None:
        files = seeds(given.data)
        kind, content = make(files, given.seed, given.only, kinds)
        given.output.mkdir(parents=True, exist_ok=True)
        sys.addaudithook(_watch)
        print(kind, *Reading(given.output, files).judge(kind, content))
        return 0
    return int(run(given.inputs, given.seed, given.workers, given.output, data=given.data, kinds=kinds) > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # saves the progress on its way out
    sys.exit(main())
