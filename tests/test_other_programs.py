"""Poses and CTF number by number as the programs that wrote the files, or that also read them, understand them.

starfile and cryosparc-tools are the extra ``interop``. cryoDRGN needs an environment of its own: its interpreter is
named in EMSPLAT_CRYODRGN_PYTHON, and only its commands are run.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from emsplat.io.particles import read_particles
from emsplat.io.pickles import load_arrays

STARS = [
    "bgal/particles.star",
    "formats/FinalRefinement-OriginalParticles-PfCRT.star",
    "formats/relion31.6opticsgroups.star",
    "formats/relion31.star",
    "formats/relion31.v2.star",
    "formats/relion5.star",
    "formats/sample_particles_relion30.star",
    "formats/sample_particles_relion31.star",
]
CS = "formats/cryosparc_P12_J24_001_particles.cs"


def largest(found, expected):
    """The largest difference in units of float32's precision at the largest number."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1) / np.finfo(np.float32).eps)


def turn(found, expected):
    """The largest difference of two angles in radians."""
    return float(np.abs(np.angle(np.exp(1j * (np.asarray(found) - np.asarray(expected))))).max())


@pytest.mark.parametrize("name", STARS)
def test_star_files_as_starfile_reads_them(shared_data, name):
    starfile = pytest.importorskip("starfile", reason="starfile is not installed; pip install 'emsplat[interop]'")
    path = shared_data / name
    ours = read_particles(path, need_stacks=False)
    tables = starfile.read(path, always_dict=True)
    rows = next(table for table in tables.values() if "rlnImageName" in table)
    count = len(rows)
    if "optics" in tables:
        extra = [c for c in tables["optics"] if c not in rows or c == "rlnOpticsGroup"]
        rows = rows.merge(tables["optics"][extra], on="rlnOpticsGroup", how="left")
    assert len(ours) == count == len(rows)

    def column(name, default=None):
        return rows[name].to_numpy(float) if name in rows or default is None else np.full(count, default)

    angles = np.stack([column(f"rlnAngle{n}") for n in ("Rot", "Tilt", "Psi")], 1)
    matrix = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().transpose(0, 2, 1)
    assert np.abs(ours.poses.rotation.numpy() - matrix).max() < 1e-12
    if "rlnOriginXAngst" in rows:
        shift = np.stack([column("rlnOriginXAngst"), column("rlnOriginYAngst")], 1)
    else:
        pixel_size = np.array([ours.groups[group].pixel_size for group in ours.optics_group.tolist()])
        shift = np.stack([column("rlnOriginX"), column("rlnOriginY")], 1) * pixel_size[:, None]
        assert largest(pixel_size, 1e4 * column("rlnDetectorPixelSize") / column("rlnMagnification")) == 0
    optics = ours.optics
    pairs = [
        (ours.poses.shift, shift),
        (optics.voltage, column("rlnVoltage")),
        (optics.cs, column("rlnSphericalAberration")),
        (optics.amplitude_contrast, column("rlnAmplitudeContrast", 0)),
        (optics.defocus_u, column("rlnDefocusU")),
        (optics.defocus_v, column("rlnDefocusV")),
        (optics.b_factor, column("rlnCtfBfactor", 0)),
        (optics.scale, column("rlnCtfScalefactor", 1)),
    ]
    assert max(largest(found, expected) for found, expected in pairs) == 0
    assert turn(optics.defocus_angle, np.deg2rad(column("rlnDefocusAngle"))) < 1e-12
    assert turn(optics.phase_shift, np.deg2rad(column("rlnPhaseShift", 0))) < 1e-12
    parts = rows["rlnImageName"].str.split("@")
    assert (ours.image + 1).tolist() == [int(number) for number, _ in parts]
    assert [ours.stacks[stack].name for stack in ours.stack.tolist()] == [Path(file).name for _, file in parts]
    if ours.half is not None:
        assert ours.half.tolist() == rows["rlnRandomSubset"].tolist()


def test_cs_file_as_cryosparc_tools_reads_it(shared_data):
    dataset = pytest.importorskip(
        "cryosparc.dataset", reason="cryosparc-tools is not installed; pip install 'emsplat[interop]'"
    )
    rows = dataset.Dataset.load(shared_data / CS)
    ours = read_particles(shared_data / CS, need_stacks=False)
    assert len(ours) == len(rows)
    matrix = Rotation.from_rotvec(rows["alignments3D/pose"]).as_matrix().transpose(0, 2, 1)
    assert np.abs(ours.poses.rotation.numpy() - matrix).max() < 1e-12
    spacing = rows["alignments3D/psize_A"].astype(float)[:, None]
    optics = ours.optics
    pairs = [
        (ours.poses.shift, rows["alignments3D/shift"].astype(float) * spacing),
        (optics.voltage, rows["ctf/accel_kv"]),
        (optics.cs, rows["ctf/cs_mm"]),
        (optics.amplitude_contrast, rows["ctf/amp_contrast"]),
        (optics.defocus_u, rows["ctf/df1_A"]),
        (optics.defocus_v, rows["ctf/df2_A"]),
        (optics.defocus_angle, rows["ctf/df_angle_rad"]),
        (optics.phase_shift, rows["ctf/phase_shift_rad"]),
        (optics.scale, rows["ctf/scale"].astype(float) * rows["alignments3D/alpha"]),
        (ours.image, rows["blob/idx"]),
    ]
    assert max(largest(found, expected) for found, expected in pairs) == 0
    assert {Path(str(p)).name for p in rows["blob/path"]} == {p.name for p in ours.stacks}
    assert {ours.sign} == set(rows["blob/sign"].tolist())


@pytest.fixture
def cryodrgn(tmp_path):
    """A function that runs a command of cryoDRGN and gives the arrays it writes."""
    python = os.environ.get("EMSPLAT_CRYODRGN_PYTHON")
    if not python:
        pytest.skip("EMSPLAT_CRYODRGN_PYTHON does not name the interpreter of an environment with cryoDRGN")

    def run(command, *words):
        output = tmp_path / f"{command}.pkl"
        words = [str(Path(python).with_name("cryodrgn")), command, *map(str, words), "-o", str(output)]
        subprocess.run(words, check=True, capture_output=True)
        return load_arrays(output)

    return run


def differences(ours, poses, ctf, box, pixel_size):
    """Largest differences from cryoDRGN's arrays, which are float32."""
    rotation, shift = poses
    optics = ours.optics
    found = {"rotation": float(np.abs(ours.poses.rotation.numpy() - rotation).max())}
    found["shift"] = float(np.abs(ours.poses.shift.numpy() - shift.astype(float) * box * pixel_size).max())
    for name, index in (("defocus_u", 2), ("defocus_v", 3), ("voltage", 5), ("cs", 6), ("amplitude_contrast", 7)):
        found[name] = largest(getattr(optics, name), ctf[:, index])
    for name, index in (("defocus_angle", 4), ("phase_shift", 8)):
        found[name] = turn(getattr(optics, name), np.deg2rad(ctf[:, index].astype(float)))
    print({name: f"{value:.2g}" for name, value in found.items()})
    return found


def assert_same(found):
    assert found["rotation"] < 2e-6
    assert found["shift"] < 1e-4  # Å
    assert all(found[name] < 2e-6 for name in ("defocus_angle", "phase_shift"))
    assert all(found[name] < 2 for name in ("defocus_u", "defocus_v", "voltage", "cs", "amplitude_contrast"))


@pytest.mark.parametrize("name", STARS)
def test_star_files_as_cryodrgn_reads_them(shared_data, cryodrgn, name):
    """Where a CTF value stands in both tables cryoDRGN takes that of the optics table (docs/conventions.md, 4); none
    of these files has such a value that differs."""
    path = shared_data / name
    ours = read_particles(path, need_stacks=False)
    box, pixel_size = ours.groups[0].box or 128, ours.groups[0].pixel_size
    given = ["-D", box, "--Apix", pixel_size]
    poses = cryodrgn("parse_pose_star", path, *given)
    # What the file leaves out is 0 to RELION and to us, but not a number to cryoDRGN unless it is told.
    missing = [("-w", ours.optics.amplitude_contrast), ("--ps", ours.optics.phase_shift)]
    given += [word for option, values in missing if not values.any() for word in (option, 0)]
    ctf = cryodrgn("parse_ctf_star", path, *given)
    assert_same(differences(ours, poses, ctf, box, pixel_size))


def test_cs_file_as_cryodrgn_reads_it(shared_data, cryodrgn):
    path = shared_data / CS
    ours = read_particles(path, need_stacks=False)
    box, pixel_size = ours.groups[0].box, ours.groups[0].pixel_size
    poses = cryodrgn("parse_pose_csparc", path, "-D", box)
    ctf = cryodrgn("parse_ctf_csparc", path, "-D", box, "--Apix", pixel_size)
    assert_same(differences(ours, poses, ctf, box, pixel_size))
