"""Simulated particles in many states, after CryoBench's recipe (128 pixels of 3 Å, SNR 0.04 over the whole image,
defocus 0.8 to 2.5 µm, shifts of 3 Å, white noise).

| set | what | states |
|---|---|---|
| igg, igg5 | IgG (1HZH), one Fab turned about its hinge through 360° | 100, with 200 and with 1,000 images each |
| rl | IgG, one Fab at random angles about random axes through the hinge | 100, 200 images each |
| assembly | 50S subunit, blocks missing at three places (2 × 2 × 3) | 12, 1,000 images each |
| spike | 6VXX to 6VSB in straight lines, residues that both have | 20, 500 images each |
| adk | adenylate kinase from closed to open along a path of dynamics | 50, 200 images each |
| mixture | IgG, turned through 90° and with or without the other Fab | 2 × 10, 500 images each |
| grey | igg with 20 % variation of the grey scale and 2° of pose errors | 100, 200 images each |
| null, null_pose, null_noise | one state; with 2° of pose errors; noise alone | 1, 5,000 images |
| the same with _2 and _3 | two further seeds of each | 1, 5,000 images |

Usage: heterogeneity_data.py FOLDER_OF_MODELS OUTPUT [SET ...]
"""

import sys
import time
from pathlib import Path

import gemmi
import numpy as np
from scipy.spatial.transform import Rotation

from emsplat.config import SimulateConfig, configure
from emsplat.programs.simulate import simulate

RECIPE = {
    "box": 128,
    "pixel_size": 3.0,
    "snr": 0.04,
    "defocus_min": 8000.0,
    "defocus_max": 25000.0,
    "shift": 3.0,
    "overwrite": True,
}
FAB = "(chain H and resid 1-213) or chain L"
HINGE = ("213", "244")
# Places of the 50S subunit: the central protuberance (5S rRNA, L5, L18) with the helices of 23S rRNA below it; the
# stalk of L1 with L9; the base of the stalk of L7/L12 (L11 and its RNA), without which L6, L36, L14 and helices of
# domain V may be missing too.
BLOCKS = (
    "chain RA EB VA or (chain QA and resid 890-960) or (chain QA and resid 2250-2420)",
    "chain XA or (chain QA and resid 1830-1890) or (chain QA and resid 2093-2220)",
    "chain YA or (chain QA and resid 1010-1150) or (chain QA and resid 2460-2500)",
    "chain WA UB AB or (chain QA and resid 2630-2800)",
)
LACKING = ("none", "1", "2", "1+2", "3", "1+3", "2+3", "1+2+3", "3+4", "1+3+4", "2+3+4", "1+2+3+4")


def make(folder, seed, model=None, particles=5000, **options):
    """One set; its time and speed are printed."""
    start = time.perf_counter()
    simulate(configure(SimulateConfig, **RECIPE | {"seed": seed, "particles": particles} | options), model, folder)
    seconds = time.perf_counter() - start
    print(f"{folder}: {particles:,} images in {seconds:.0f} s, {particles / seconds:.0f} images/s", flush=True)


def merged(folder, output):
    """The parts of the 50S subunit as one model, whose chains are the segments of the parts."""
    whole = gemmi.Model(1)
    for path in sorted(folder.glob("*.pdb.gz")):
        for chain in gemmi.read_structure(str(path), merge_chain_parts=False)[0]:
            own = whole.find_chain(chain[0].segment) or whole.add_chain(gemmi.Chain(chain[0].segment))
            for residue in chain:
                if not residue.is_water():
                    own.add_residue(residue)
    structure = gemmi.Structure()
    structure.add_model(whole)
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(output))
    return output


def atoms_by_name(path):
    """Atoms of polymers by chain, residue and name."""
    structure = gemmi.read_structure(str(path))
    structure.remove_hydrogens()
    structure.remove_ligands_and_waters()
    return {
        (site.chain.name, site.residue.seqid.num, site.residue.name, site.atom.name): site.atom.pos.tolist()
        for site in structure[0].all()
    }


def superposed(moving, fixed, core):
    """``moving`` brought onto ``fixed`` by the atoms of a core (Kabsch)."""
    a, b = moving[core] - moving[core].mean(0), fixed[core] - fixed[core].mean(0)
    turn, _ = Rotation.align_vectors(b, a)
    return turn.apply(moving - moving[core].mean(0)) + fixed[core].mean(0)


def interpolated(first, last, count, output):
    """Models on straight lines between two conformations: not physical, but what two structures allow."""
    output.mkdir(parents=True, exist_ok=True)
    a, b = atoms_by_name(first), atoms_by_name(last)
    keys = [key for key in a if key in b]
    start, end = (np.array([atoms[key] for key in keys]) for atoms in (a, b))
    core = np.array([number > 700 and name == "CA" for _, number, _, name in keys])  # S2 hardly moves
    end = superposed(end, start, core)
    structure = gemmi.read_structure(str(first))
    structure.remove_hydrogens()
    structure.remove_ligands_and_waters()
    for chain in structure[0]:
        for residue in chain:
            names = [atom.name for atom in residue]
            for name in names:
                if (chain.name, residue.seqid.num, residue.name, name) not in b:
                    residue.remove_atom(name, "*", gemmi.Element(name[:1]))
    structure.remove_empty_chains()
    rows = {key: row for row, key in enumerate(keys)}
    paths = []
    for step in range(count):
        place = start + (end - start) * step / (count - 1)
        for site in structure[0].all():
            key = (site.chain.name, site.residue.seqid.num, site.residue.name, site.atom.name)
            site.atom.pos = gemmi.Position(*place[rows[key]])
        paths.append(output / f"{step:03d}.cif")
        structure.make_mmcif_document().write_file(str(paths[-1]))
    return tuple(paths)


def at_random(model, count, output, seed=0):
    """IgG with the Fab turned about the hinge, by any angle about any axis within 60° of the arm's."""
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    structure = gemmi.read_structure(str(model))
    fab = [
        atom
        for chain in structure[0]
        for residue in chain
        if chain.name == "L" or (chain.name == "H" and residue.seqid.num <= 213)
        for atom in residue
    ]
    hinge = np.array(structure[0]["H"]["244"][0]["CA"][0].pos.tolist())
    place = np.array([atom.pos.tolist() for atom in fab]) - hinge
    arm = place.mean(0) / np.linalg.norm(place.mean(0))
    paths = []
    for state in range(count):
        # Directions even over the cap of 60°, and any turn about them.
        height, around, turn = rng.uniform(0.5, 1), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
        side = np.linalg.svd(arm[None])[2][1:]
        goal = height * arm + np.sqrt(1 - height**2) * (np.cos(around) * side[0] + np.sin(around) * side[1])
        tilt = np.cross(arm, goal)
        angle = np.arctan2(np.linalg.norm(tilt), arm @ goal)
        swing = Rotation.from_rotvec(angle * tilt / max(np.linalg.norm(tilt), 1e-9))
        moved = (swing * Rotation.from_rotvec(turn * arm)).apply(place) + hinge
        for atom, position in zip(fab, moved, strict=True):
            atom.pos = gemmi.Position(*position)
        paths.append(output / f"{state:03d}.cif")
        structure.make_mmcif_document().write_file(str(paths[-1]))
    return tuple(paths)


def make_all(models, output, chosen):
    igg, turn = models / "1hzh.pdb.gz", {"rotate": FAB, "about": HINGE, "angles": 100}
    made = output / "models"
    made.mkdir(parents=True, exist_ok=True)

    def assembly(folder):
        model = merged(models / "50s", made / "50s.cif")
        make(folder, 2, model, 12000, missing=BLOCKS, missing_states=LACKING)

    def spike(folder):
        paths = interpolated(models / "6vxx.pdb.gz", models / "6vsb.pdb.gz", 20, made / "spike")
        make(folder, 4, None, 10000, states=paths)

    def adk(folder):
        path = {"trajectory": models / "adk_dims2.dcd", "topology": models / "adk_open.pdb", "frames": 50}
        make(folder, 5, None, 10000, **path, pixel_size=1.5)

    def mixture(folder):
        both = {"rotate": FAB, "about": HINGE, "angles": 10, "turn": 90.0}
        make(folder, 6, igg, 10000, **both, missing=("chain M or (chain K and resid 1-213)",))

    sets = {
        "igg": lambda folder: make(folder, 0, igg, 20000, **turn),
        "igg5": lambda folder: make(folder, 1, igg, 100000, **turn),
        "rl": lambda folder: make(folder, 3, None, 20000, states=at_random(igg, 100, made / "rl")),
        "assembly": assembly,
        "spike": spike,
        "adk": adk,
        "mixture": mixture,
        "grey": lambda folder: make(folder, 7, igg, 20000, **turn, contrast_spread=0.2, pose_error=2.0),
    }
    for suffix, seed in (("", 10), ("_2", 20), ("_3", 30)):
        sets |= {
            f"null{suffix}": lambda folder, seed=seed: make(folder, seed + 1, igg),
            f"null_pose{suffix}": lambda folder, seed=seed: make(folder, seed + 2, igg, pose_error=2.0),
            f"null_noise{suffix}": lambda folder, seed=seed: make(folder, seed + 3, igg, noise_only=True),
        }
    unknown = set(chosen) - set(sets)
    if unknown:
        sys.exit(f"no such set: {' '.join(sorted(unknown))}; there are {' '.join(sets)}")
    for name in chosen or sets:
        sets[name](output / name)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
