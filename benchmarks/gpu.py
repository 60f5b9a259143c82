"""Everything about emsplat on a GPU in one command: correctness first, then speed, memory and their bounds.

Usage: gpu.py                all of it, five to ten minutes on an H200; writes results/gpu.json
       gpu.py --smoke        the same in small, on whatever device there is, to try the script itself; writes nothing
       gpu.py --only tests kernels step accumulation poses readers fit reconstruct

Order: `pytest -m gpu --error-for-skips` (nothing is timed if it fails); the kernels alone against the CPU's, with the
part of the roofline that they reach (roofline.py has the arithmetic: instructions of the splatting kernels, counted in
their machine code; bytes of the transforms; atomic additions of the insertion); the image-domain step from batches in
the device's memory (forward, CTF, loss, backward, optimiser) with its peak memory; the accumulation from memory and
from files; a search for poses; a volume fit to convergence; and a whole `reconstruct` of 100,000 images of 256², which
are generated on the device as they are asked for. Peak memory is what PyTorch allocated (`max_memory_allocated`).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

import roofline
from common import globule, random_poses, save
from emsplat.config import ReconstructConfig, SimulateConfig, configure
from emsplat.fitting.images import ImageObjective
from emsplat.fitting.loop import fit
from emsplat.fitting.state import Plan, State
from emsplat.fitting.volume import VolumeObjective, support_size
from emsplat.imaging.ctf import observe
from emsplat.imaging.project import project, voxelize
from emsplat.io.particles import read_particles
from emsplat.io.relion.write import write_particles_star
from emsplat.kernels import backend
from emsplat.maths.fourier import irfft, rfft, shift_phase
from emsplat.maths.geometry import random_rotations
from emsplat.maths.groups import C1
from emsplat.models.gaussians import Bounds
from emsplat.models.starts import from_gaussians, from_map
from emsplat.particles.images import ImageFiles
from emsplat.particles.noise import estimate_noise
from emsplat.particles.open import open_particles
from emsplat.particles.stack import ParticleStack
from emsplat.poses.local import PoseViews, Prior, descend, make_reference
from emsplat.programs import opening
from emsplat.programs.reconstruct import reconstruct
from emsplat.programs.simulate import simulate
from emsplat.run.log import Log
from emsplat.simulation.images import random_halves, random_optics
from emsplat.simulation.images import random_poses as simulated_poses
from emsplat.sums.spectra import Spectra, half_plane
from emsplat.sums.statistics import FourierStatistics, accumulate, begin
from emsplat.types import Batch, Gaussians, Grid

COUNTS = (2_048, 10_000, 30_000, 50_000, 500_000)
STEPS = 0.3  # seconds that a timing takes at least


@dataclass(frozen=True)
class Bench:
    """A device, what its data sheet or itself says of it, and the rows of results so far."""

    device: torch.device
    machine: roofline.Machine
    rows: list[dict[str, object]]
    smoke: bool

    def report(self, **row: object) -> None:
        self.rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work) -> float:
        """Mean time of a call among many, the host and the device both waited for at the ends only."""
        work()
        self.wait()
        calls, start = 0, time.perf_counter()
        while calls < 3 or time.perf_counter() - start < STEPS:
            work()
            calls += 1
            if calls % 20 == 0:
                self.wait()
        self.wait()
        return (time.perf_counter() - start) / calls

    def peak(self, work) -> float:
        """Most memory in MiB that the device holds during a call, beyond nothing."""
        if self.device.type != "cuda":
            work()
            return float("nan")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / 2**20


def optics(count):
    return random_optics(SimulateConfig(particles=count)).to(torch.float32)


def a_batch(grid, count, device):
    """A batch as `ParticleStack` gives it, of noise."""
    poses = random_poses(count)
    index = torch.zeros(count, dtype=torch.int64)
    images = torch.randn(count, grid.size, grid.size, generator=torch.Generator().manual_seed(3))
    parts = (images.to(device), poses.to(device=device), optics(count).to(device=device), index.to(device), index)
    return Batch(*parts)


def a_model(count, grid, device):
    mixture = globule(count, grid, roofline.spacing(grid.size, count))
    return from_gaussians(mixture, Bounds(grid.length, 1.0, 0.3 * grid.pixel_size)).to(device)


class Endless:
    """What an objective asks its stack for."""

    def __init__(self, grid):
        self.grid = grid

    def __len__(self):
        return sys.maxsize


class Batches(ImageObjective):
    """The image-domain objective with one batch in the device's memory in place of a stack of files."""

    steps_per_epoch = 10**9

    def __init__(self, grid, batch):
        self.held, self.batch, self.cutoff, self._weight = batch, len(batch), 4.0, None
        self.stack = Endless(grid)

    def _load(self, step):
        return self.held


def kernels(bench):
    """Each kernel alone beside the CPU's on the same input; time and part of the roofline."""
    size, count, views = (48, 500, 4) if bench.smoke else (256, 30_000, 128)
    grid = Grid(size, 1.0)
    mixture, poses = globule(count, grid, roofline.spacing(size, count)), random_poses(views)
    few = 2
    upstream = torch.randn(views, size, size, generator=torch.Generator().manual_seed(5))
    solid = torch.randn(size, size, size, generator=torch.Generator().manual_seed(6))
    loops = {
        name: roofline.splat_loops(name) for name in ("project", "project_gradient", "voxelize", "voxelize_gradient")
    }

    def flat(where, images):
        parts = (mixture.mean, mixture.covariance, mixture.amplitude, poses.rotation[:images], poses.shift[:images])
        return [part.to(where) for part in parts]

    cpu = torch.device("cpu")
    for name in loops:
        seconds, error = {}, None
        results = {}
        for where in dict.fromkeys((cpu, bench.device)):
            images = few if where == cpu and not bench.smoke else views
            inputs, given, volume = flat(where, images), upstream[:images].to(where), solid.to(where)
            call = {
                "project": lambda i=inputs, w=where: backend(w).project(*i, size, 1.0, 4.0),
                "project_gradient": lambda i=inputs, g=given, w=where: backend(w).project_gradient(
                    *i, g, 1.0, 4.0, False
                ),
                "voxelize": lambda i=inputs, w=where: backend(w).voxelize(*i[:3], size, 1.0, 4.0),
                "voxelize_gradient": lambda i=inputs, v=volume, w=where: backend(w).voxelize_gradient(
                    *i[:3], v, 1.0, 4.0
                ),
            }[name]
            seconds[where.type] = bench.seconds(call) / (images if "project" in name else 1)
            same = few if name == "project" else None
            if name != "project_gradient":
                results[where.type] = call()[:same].cpu() if same else [t.cpu() for t in _listed(call())]
        if len(results) == 2:
            pairs = zip(_listed(results["cpu"]), _listed(results[bench.device.type]), strict=True)
            error = max(float((one - other).norm() / one.norm()) for one, other in pairs)
        if "project" in name:
            work = roofline.project_instructions(loops[name], mixture, random_poses(4), grid)
        else:
            work = roofline.voxelize_instructions(loops[name], mixture, grid)
        own = seconds[bench.device.type]
        bench.report(
            what=f"kernel {name}",
            box=size,
            gaussians=count,
            milliseconds=round(1000 * own, 4),
            cpu_over_gpu=round(seconds["cpu"] / own, 1),
            relative_difference_from_cpu=None if error is None else float(f"{error:.1e}"),
            roofline=round(work / bench.machine.issue / own, 3),
        )


def _listed(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def step(bench):
    """Images per second of the image-domain step, its memory and the part of the roofline that it reaches."""
    sizes, counts, batches = ((32,), (500,), (1, 4)) if bench.smoke else ((128, 192, 256), COUNTS, (1, 16, 128))
    loops = [roofline.splat_loops(name) for name in ("project", "project_gradient")]
    for size in sizes:
        grid = Grid(size, 1.0)
        for count in counts:
            mixture = globule(count, grid, roofline.spacing(size, count))
            work = sum(roofline.project_instructions(one, mixture, random_poses(4), grid) for one in loops)
            for views in batches:
                model = a_model(count, grid, bench.device)
                states = fit(State.begin(model), Batches(grid, a_batch(grid, views, bench.device)), Plan(1, 1e-4, 1.0))
                try:
                    memory = bench.peak(lambda s=states: [next(s) for _ in range(3)])
                    seconds = bench.seconds(lambda s=states: next(s))
                except torch.OutOfMemoryError:
                    bench.report(what="step", box=size, gaussians=count, batch=views, images_per_second="out of memory")
                    continue
                bound = roofline.step_seconds(bench.machine, work, size, views)
                bench.report(
                    what="step",
                    box=size,
                    gaussians=count,
                    batch=views,
                    images_per_second=round(views / seconds, 1),
                    peak_mib=round(memory, 1),
                    roofline=round(bound / seconds, 3),
                )


def accumulation(bench):
    """Images per second into the Fourier sums, from batches in memory."""
    for size in (32,) if bench.smoke else (128, 192, 256, 384):
        grid = Grid(size, 1.0)
        batch = a_batch(grid, 8 if bench.smoke else min(256, 2**25 // size**2), bench.device)
        statistics = FourierStatistics(grid, device=bench.device)
        ones = torch.ones(size, size // 2 + 1, device=bench.device)

        def add(batch=batch, grid=grid, statistics=statistics, ones=ones):
            seen = observe(batch, grid)
            weighted = seen.transfer * ones
            statistics.insert(seen.spectrum.mul_(weighted), weighted.mul_(seen.transfer), batch.poses.rotation, grid)

        memory = bench.peak(add)
        seconds = bench.seconds(add) / len(batch)
        bound = roofline.accumulation_seconds(bench.machine, size)
        bench.report(
            what="accumulation from memory",
            box=size,
            images_per_second=round(1 / seconds),
            peak_mib=round(memory, 1),
            roofline=round(bound / seconds, 3),
        )


def poses(bench):
    """Views per second that are compared with slices of a volume, and that are moved by a search, beside the CPU's on
    the same views."""
    for radius, count, steps in ((6, 8, 0),) if bench.smoke else ((20, 4096, 0), (20, 4096, 12), (60, 512, 12)):
        grid, rng = Grid(4 * radius, 1.0), torch.Generator().manual_seed(7)
        volume = torch.randn(3 * (grid.size,), generator=rng)
        frequency, _ = half_plane(radius, 1.0, grid.size)
        noise = [torch.randn(count, len(frequency), generator=rng) for _ in range(3)]
        image, none = torch.arange(count, dtype=torch.int32), torch.zeros(count, 2, dtype=torch.float64)
        rotation = random_rotations(count, rng)
        values = torch.complex(noise[0], noise[1])
        spectra = Spectra(values, noise[2], frequency, image, rotation.float(), torch.ones(count), image, grid.length)
        views = PoseViews(spectra, torch.eye(2).repeat(count, 1, 1), image, rotation, none, rotation, none, grid.length)
        rate, found = {}, {}
        for where in dict.fromkeys((torch.device("cpu"), bench.device)):
            reference = make_reference(volume, grid, radius, device=where)
            own = replace(views, spectra=replace(spectra, values=values.to(where), transfer=noise[2].to(where)))
            rate[where.type] = count / bench.seconds(
                lambda r=reference, v=own, steps=steps, radius=radius: descend(r, v, Prior(0.05, 1.0), radius, steps)
            )
            found[where.type] = descend(reference, own, Prior(0.05, 1.0), radius, 0)
        one, other = found["cpu"], found[bench.device.type]
        bench.report(
            what="poses",
            coefficients=len(frequency),
            steps=steps,
            views_per_second=round(rate[bench.device.type]),
            gpu_over_cpu=round(rate[bench.device.type] / rate["cpu"], 2),
            relative_difference_from_cpu=float(f"{float(((one.before - other.before) / one.power).abs().max()):.1e}"),
        )


def readers(bench):
    """The accumulation from files (in the system's cache after the first pass), beside the CPU's in the same run."""
    box, count = (32, 100) if bench.smoke else (256, 4000)
    with tempfile.TemporaryDirectory() as folder:
        config = SimulateConfig(box=box, pixel_size=4.0 if bench.smoke else 1.0, particles=count, atoms=1500)
        star = simulate(config, None, Path(folder) / "particles")
        rates = {}
        for where in dict.fromkeys((torch.device("cpu"), bench.device)):
            stack = open_particles(star).on(where)
            stack = stack.take(torch.arange(min(count, 1000))) if where.type == "cpu" else stack
            noise = estimate_noise(stack)
            start = time.perf_counter()
            for _ in accumulate(begin(stack), stack, noise):
                pass
            bench.wait()
            rates[where.type] = len(stack) / (time.perf_counter() - start)
    rate = rates[bench.device.type]
    bench.report(
        what="accumulation from files",
        box=box,
        images_per_second=round(rate),
        gigabytes_per_second=round(rate * box**2 * 4 / 1e9, 2),
        gpu_over_cpu=round(rate / rates["cpu"], 1),
    )


class Scene(ParticleStack):
    """Particles of a mixture, whose images are made on the device when they are asked for: there is no disk."""

    mixture: Gaussians
    noise = 10.0  # standard deviations of the signal

    @property
    def stored(self):
        return 0  # nothing is on disk

    def sequential(self, size, *, normalised=True):
        for part in torch.split(torch.arange(len(self)), size):
            rows = self.rows[part]
            poses = self.table.poses[rows].to(torch.float32, self.device)
            lenses = self.table.optics[rows].to(torch.float32, self.device)
            blank = torch.zeros(len(rows), self.grid.size, self.grid.size, device=self.device)
            group = self.table.optics_group[rows].to(self.device)
            transfer = observe(Batch(blank, poses, lenses, group, rows), self.grid).transfer
            centred = replace(poses, shift=torch.zeros_like(poses.shift))
            spectrum = rfft(project(self.mixture, centred, self.grid)) * transfer
            signal = irfft(spectrum * shift_phase(poses.shift, self.grid).conj())
            torch.manual_seed(int(rows[0]))  # the same image each time that it is asked for
            images = signal / signal.std() + self.noise * torch.randn_like(signal)
            yield Batch(self.normalise(images), poses, lenses, group, rows)


def scene(folder, count, grid, device):
    """A stack of so many particles that has a STAR file and no images."""
    config = SimulateConfig(box=grid.size, pixel_size=grid.pixel_size, particles=count)
    star = folder / "particles.star"
    images = [f"{i + 1:06d}@particles.mrcs" for i in range(count)]
    micrographs = [f"micrograph_{i // 100:05d}.mrc" for i in range(count)]
    halves = random_halves(count, torch.Generator().manual_seed(0))
    write_particles_star(star, images, micrographs, simulated_poses(config), random_optics(config), grid, halves)
    table = read_particles(star, need_stacks=False)
    mixture = globule(20_000, grid, 0.01 * grid.size)
    Scene.mixture = Gaussians(*(t.to(device) for t in (mixture.mean, mixture.covariance, mixture.amplitude)))
    rows = torch.arange(count)
    kinds = {"grids": (grid,), "disk": (grid,), "rows": rows, "symmetry": C1, "diameter": 0.9 * grid.length}
    return star, Scene(table, ImageFiles(table), grid, **kinds, device=device)


def volume_fit(bench):
    """A fit of 30,000 Gaussians to the sums of 20,000 images, until an epoch gains less than 3e-4 of the loss."""
    size, images, count = (32, 300, 200) if bench.smoke else (256, 20_000, 30_000)
    grid = Grid(size, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        _, stack = scene(Path(folder), images, grid, bench.device)
    statistics = begin(stack)
    for _ in accumulate(statistics, stack, estimate_noise(stack)):
        pass
    equations = statistics.equations()
    raw = equations.solve()
    objective = VolumeObjective(equations, support_size(int(0.75 * size), size))
    bounds = Bounds(grid.length, 1.0, 0.4 * grid.pixel_size)
    model = from_map(raw.cpu(), grid, count, bounds, 0).to(bench.device)
    model = model.with_unit(objective.best_gain(model))
    took = []

    def converge():
        bench.wait()
        start, before = time.perf_counter(), float("inf")
        for state in fit(State.begin(model), objective, Plan(60, 2e-3, 0.95)):
            if state.step % objective.steps_per_epoch == 0:
                loss = float(state.terms["loss"])
                if before - loss < 3e-4 * abs(loss):
                    break
                before = loss
        took.append((time.perf_counter() - start, state))

    memory = bench.peak(converge)
    seconds, state = took[-1]
    with torch.no_grad():
        found, truth = voxelize(state.model.gaussians(), grid), voxelize(Scene.mixture, grid)
    bench.report(
        what="volume fit",
        box=size,
        gaussians=count,
        steps=state.step,
        seconds=round(seconds, 2),
        milliseconds_per_step=round(1000 * seconds / state.step, 2),
        peak_mib=round(memory, 1),
        correlation_with_truth=round(float(torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1]), 4),
    )


def whole(bench):
    """`reconstruct` with three maps, FSC and report."""
    size, images = (32, 60) if bench.smoke else (256, 100_000)
    grid = Grid(size, 1.0)
    with tempfile.TemporaryDirectory() as name:
        star, stack = scene(Path(name), images, grid, bench.device)
        config = configure(ReconstructConfig, gaussians=200 if bench.smoke else 30_000, device=bench.device.type)
        start = time.perf_counter()
        with mock.patch.object(opening, "open_stack", return_value=stack):
            summary = reconstruct(config, star, Path(name) / "run", Log(sys.stderr))
        seconds = time.perf_counter() - start
        log = (Path(name) / "run" / "run.log").read_text()
    fits = {key: value["seconds"] for key, value in summary["fits"].items()}
    bench.report(
        what="reconstruct, images made on the device",
        box=size,
        images=images,
        seconds=round(seconds, 1),
        seconds_per_fit=fits,
        cross_validated=summary["resolution"]["cross_validated"],
        peak_gpu_mb=summary.get("peak_gpu_memory_mb"),
    )
    print(log)


def tests(bench):
    """The tests that need a GPU; ends everything if one fails or is skipped."""
    if not bench.smoke:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--error-for-skips", "-q"]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True)


def bandwidth(device):
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = torch.ones(2**28, device=device)
    target = torch.empty_like(source)
    seconds = Bench(device, roofline.H100, [], False).seconds(lambda: target.copy_(source))
    return 2 * source.nbytes / seconds


def this_machine(device):
    """The GPU as it says itself; the data sheet's H100 where it does not, and for a smoke test."""
    if device.type != "cuda":
        return roofline.H100, {}
    properties = torch.cuda.get_device_properties(device)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory",
        "--format=csv,noheader,nounits",
    ]
    said = subprocess.run([*query, f"--id={device.index or 0}"], capture_output=True, text=True, check=True).stdout
    driver, clock, _ = (word.strip() for word in said.split(","))
    machine = replace(
        roofline.H100,
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        clock=1e6 * float(clock),
        bandwidth=bandwidth(device),
    )
    import triton

    about = {
        "gpu": properties.name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": machine.multiprocessors,
        "clock_mhz": float(clock),
        "bandwidth": float(f"{machine.bandwidth:.3g}"),
    }
    return machine, about


PARTS = {
    "tests": tests,
    "kernels": kernels,
    "step": step,
    "accumulation": accumulation,
    "poses": poses,
    "readers": readers,
    "fit": volume_fit,
    "reconstruct": whole,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.smoke:
        sys.exit("no CUDA device: nothing to measure here; gpu.py --smoke tries the script itself")
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    machine, about = this_machine(device)
    bench = Bench(device, machine, [], arguments.smoke)
    if arguments.smoke:
        Scene.noise = 1.0
    for name in arguments.only:
        PARTS[name](bench)
        if bench.rows and not arguments.smoke:
            save("gpu", bench.rows, **about)  # after each part: a machine that is taken away leaves what was measured


if __name__ == "__main__":
    main()
