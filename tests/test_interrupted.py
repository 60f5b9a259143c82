"""Interrupted runs go on where they were, to the same bits at one thread; and several processes share a run out."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open

from emsplat.config import ReconstructConfig, RefineConfig, SimulateConfig, change, configure
from emsplat.errors import InputError, Interrupted, OutputError
from emsplat.fitting.checkpoint import load_states
from emsplat.io import tensors
from emsplat.io.mrc import read_map
from emsplat.io.particles import read_particles, write_used
from emsplat.maths.geometry import vector_to_matrix
from emsplat.parallel import _SILENCE, World
from emsplat.particles.open import open_particles
from emsplat.programs.reconstruct import reconstruct
from emsplat.programs.refine import refine
from emsplat.programs.simulate import simulate
from emsplat.run.files import checkpoint_name, coarse_model_name, start_name
from emsplat.run.folder import read_summary
from emsplat.run.journal import Foreseen, Judged, Part, Scored, read_journal
from emsplat.run.stop import Checkpoints, StopRequest, checkpoints, time_limit
from emsplat.types import Poses
from processes import SLOW, SLOW_FIT, ends, start, wait_for

ONE_PASS = configure(ReconstructConfig, epochs=3, gaussians=200, growth=1, threads=1)
IMAGES = configure(ReconstructConfig, engine="images", epochs=3, gaussians=100, batch=16, split_after=(1,), threads=1)
MAPS = ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc", "run_class001.mrc")


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=60)


@pytest.fixture(scope="module")
def whole(particles, tmp_path_factory):
    """Runs that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    made = {}

    def give(config):
        name = config.fit.engine or "one-pass"
        if name not in made:
            made[name] = folder / name
            reconstruct(config, particles, made[name])
            expected_parts_came(made[name])
        return made[name]

    return give


def stopped_at(monkeypatch, look):
    """The work is asked to stop at its n-th look."""
    due, asked = Checkpoints.due, []

    def counted(self):
        asked.append(None)
        if len(asked) == look:
            self._stop.number = signal.SIGTERM
        return due(self)

    monkeypatch.setattr(Checkpoints, "due", counted)


def interrupted(config, particles, folder, monkeypatch, look, program=reconstruct):
    """A run that is stopped at its n-th look, and goes on."""
    with monkeypatch.context() as patch:
        stopped_at(patch, look)
        with pytest.raises(Interrupted, match="go on with --resume"):
            program(config, particles, folder)
    program(change(config, resume=True), particles, folder)
    return folder


def expected_parts_came(folder):
    """What a run was expected to do is what it did, in that order."""
    rows = [row.what for row in read_journal(folder)]
    expected, came = ([row for row in rows if isinstance(row, kind)] for kind in (Foreseen, Part))
    turns = [next(one.turn for one in expected if one.name == part.name) for part in came]
    assert turns == sorted(turns)
    assert {part.name for part in came} | {"report"} == {one.name for one in expected} | {"report"}


def same_maps(one, other):
    for name in MAPS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# Looks: 1 and 2 are the sums, then 40 steps of the halves (two epochs, two more after growth), then those of all.
@pytest.mark.parametrize("look", [1, 49, *(pytest.param(look, marks=pytest.mark.slow) for look in (6, 22, 24, 42, 82))])
def test_the_one_pass_engine_goes_on_to_the_same_bits(particles, whole, tmp_path, monkeypatch, look):
    """Interrupted in the sums, within an epoch, at the end of a stage, right after growth, and in the fit of all."""
    expected, found = whole(ONE_PASS), interrupted(ONE_PASS, particles, tmp_path / "cut", monkeypatch, look)
    same_maps(found, expected)
    for kind in (Scored, Judged):
        rows = [[row.what for row in read_journal(one) if isinstance(row.what, kind)] for one in (expected, found)]
        assert len(rows[0]) == len(rows[1])
        assert str(rows[0]) == str(rows[1])
    assert read_summary(found)["course"] == read_summary(expected)["course"]
    assert not list(found.glob("*checkpoint*"))


@pytest.mark.parametrize("look", [5, *(pytest.param(look, marks=pytest.mark.slow) for look in (3, 12))])
def test_the_engine_of_images_goes_on_to_the_same_bits(particles, whole, tmp_path, monkeypatch, look):
    expected = whole(IMAGES)
    same_maps(interrupted(IMAGES, particles, tmp_path / "cut", monkeypatch, look), expected)


REFINE = configure(
    RefineConfig, rounds=2, refine="poses,defocus,scale,tilt", epochs=2, growth=0, gaussians=150, threads=1
)


@pytest.fixture(scope="module")
def wrong(simulated):
    """Particles in poses that are off."""
    star = simulated(particles=160, box=32, pixel_size=4.0, snr=0.5)
    stack = open_particles(star)
    poses, drawn = stack.table.poses, torch.Generator().manual_seed(1)
    turn, move = (torch.randn(160, count, generator=drawn, dtype=torch.float64) for count in (3, 2))
    moved = Poses(vector_to_matrix(math.radians(4) * turn) @ poses.rotation, poses.shift + 3 * move)
    write_used(stack.with_poses(moved).table, star.parent / "wrong.star", stack.table.half)
    return star.parent / "wrong.star"


@pytest.fixture(scope="module")
def refined(wrong, tmp_path_factory):
    """A refinement that nobody interrupts."""
    folder = tmp_path_factory.mktemp("refined") / "whole"
    refine(REFINE, wrong, folder)
    expected_parts_came(folder)
    return folder


# Looks: 4 at the sums, then per round 2 at the poses, 2 at the tilt, 2 at the optics and 4 at sums; 28 are before fits.
@pytest.mark.slow
@pytest.mark.parametrize("look", [3, 5, 12, 15, 22, 37, 64])
def test_a_refinement_goes_on_to_the_same_bits(wrong, refined, tmp_path, monkeypatch, look):
    """Interrupted in the first sums, in each part of a round, and in the fits of the halves and of all."""
    found = interrupted(REFINE, wrong, tmp_path / "cut", monkeypatch, look, refine)
    same_maps(found, refined)
    assert (found / "poses.csv").read_bytes() == (refined / "poses.csv").read_bytes()
    assert len(read_summary(found)["refinement"]["rounds"]) == 2
    assert read_summary(found)["refinement"] == read_summary(refined)["refinement"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("7:50:00", 28200), ("1-0", 86400), ("2-03:30", 185400), ("1-00:00:01", 86401)],
)
def test_time_limits_are_those_of_batch_systems(text, seconds):
    assert time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "1:2:3:4", "0", "1-", "٣"])
def test_what_is_no_time_limit_is_refused(text):
    with pytest.raises(InputError, match="--time-limit"):
        time_limit(text)


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_checkpoints_that_cannot_be_are_refused(seconds):
    with pytest.raises(InputError, match="--checkpoint-every"), checkpoints(seconds):
        pass


def test_a_time_limit_is_a_request_to_stop(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    moment = Checkpoints(60.0, StopRequest(), limit=130.0)
    assert not moment.due()
    now[0] = 131.0
    assert moment.due()
    with pytest.raises(Interrupted, match="--time-limit is reached: stopped in half1") as caught:
        moment.saved("in half1")
    assert caught.value.exit_code == 128 + signal.SIGUSR1


def test_a_signal_that_comes_while_others_answer_counts_the_next_time():
    """They have answered without it: one would write a checkpoint while the others go on."""

    class Waiting(World):
        def most_(self, tensor):
            stop.number = signal.SIGTERM  # what the others have said is in the tensor already

    stop = StopRequest()
    moment = Checkpoints(60.0, stop, Waiting(1, 2))
    assert not moment.due()
    assert moment.due()


def test_a_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch):
    """Also where the library that writes has errors of its own."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OutputError, match=r"sums.safetensors: cannot be written \(.*No space left.*; free some space"):
        tensors.write_tensors(tmp_path / "sums.safetensors", {}, {})
    assert not list(tmp_path.iterdir())


# Several processes. Each of these starts some, and takes more than 5 s.


def the_same(volume, other, within):
    a, b = read_map(volume)[0], read_map(other)[0]
    return float((a - b).norm() / b.norm()) < within


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_a_back_projection_out(particles, tmp_path, size):
    (alone,) = ends(start(1, "backproject", particles, "-o", tmp_path / "one", "--keep-statistics"))
    assert alone[0] == 0
    said = ends(start(size, "backproject", particles, "-o", tmp_path / "many", "--keep-statistics"))
    assert [(code, errors) for code, _, errors in said] == [(0, "")] * size
    assert f"shared out over {size} processes on 1 machine" in said[0][1]
    assert [text for _, text, _ in said[1:]] == [""] * (size - 1)
    for name in MAPS:
        assert the_same(tmp_path / "many" / name, tmp_path / "one" / name, 1e-5)
    assert (tmp_path / "many" / "run_half1_statistics.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("engine", ["one-pass", "images"])
def test_processes_share_a_reconstruction_out(particles, whole, tmp_path, engine, size):
    config = {"one-pass": ONE_PASS, "images": IMAGES}[engine]
    expected = whole(config)
    words = ["--epochs", "3", "--threads", "1", "--gaussians"]
    words += ["200", "--growth", "1"] if engine == "one-pass" else ["100", "--engine", "images", "--batch", "16"]
    words += ["--split-after", "1"] if engine == "images" else []
    said = ends(start(size, "reconstruct", particles, "-o", tmp_path / "many", *words))
    assert [(code, errors) for code, _, errors in said] == [(0, "")] * size
    assert [text for _, text, _ in said[1:]] == [""] * (size - 1)
    found, before = read_summary(tmp_path / "many"), read_summary(expected)
    for name, fit in before["fits"].items():
        assert found["fits"][name]["gaussians"] == fit["gaussians"]
        assert found["fits"][name]["steps"] == fit["steps"]
        assert found["fits"][name]["loss"] == pytest.approx(fit["loss"], rel=1e-3)
    for name in MAPS:
        # Adam divides by the size of a gradient: where that is rounding alone, so is the step.
        assert the_same(tmp_path / "many" / name, expected / name, 2e-2)


REFINE_WORDS = [
    "--refine",
    "poses,defocus,scale,tilt",
    "--epochs",
    "2",
    "--growth",
    "0",
    "--gaussians",
    "150",
    "--threads",
    "1",
]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_a_refinement_out(wrong, tmp_path, size):
    """Against maps, which follow from the sums without steps that rounding turns."""
    words = [*REFINE_WORDS, "--rounds", "2", "--reference", "map"]
    options = {"rounds": 2, "reference": "map", "refine": "poses,defocus,scale,tilt", "epochs": 2}
    config = configure(RefineConfig, **options, growth=0, gaussians=150, threads=1)
    expected = refine(config, wrong, tmp_path / "one")
    said = ends(start(size, "refine", wrong, "-o", tmp_path / "many", *words))
    assert [(code, errors) for code, _, errors in said] == [(0, "")] * size
    assert [text for _, text, _ in said[1:]] == [""] * (size - 1)
    assert f"shared out over {size} processes" in said[0][1]
    found = read_summary(tmp_path / "many")
    one, many = (own["refinement"]["rounds"] for own in (expected, found))
    assert len(one) == len(many) == 2
    for before, after in zip(one, many, strict=True):
        assert before.keys() == after.keys()
        # Sums in another order differ by 1e-7, which decides for single images where they end: one of 150 is 0.7 % of
        # all that is counted. (References that differ by 1e-7 give the same scatter in one process.)
        for name in ("compared_to", "angle_error", "shift_error", "score", "defocus_spread"):
            assert after[name] == pytest.approx(before[name], rel=1e-2), name
        assert after["gained"] == pytest.approx(before["gained"], abs=1e-3)
        assert after["kept"] == before["kept"]
    poses, own = (read_particles(tmp_path / name / "run_data.star") for name in ("many", "one"))
    assert torch.equal(poses.image, own.image)
    # Rounding may decide which step of a particle is the last: of the next few hundredths of a nat are expected.
    away = (poses.poses.rotation - own.poses.rotation).abs().amax((1, 2))
    assert away.quantile(0.9) < 1e-3
    assert away.max() < 0.1
    for name in MAPS:
        assert the_same(tmp_path / "many" / name, tmp_path / "one" / name, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 2])
def test_a_killed_process_ends_a_refinement_and_any_number_goes_on(wrong, refined, tmp_path, dying):
    words = ["refine", wrong, "-o", tmp_path / "cut", *REFINE_WORDS, "--rounds", "2"]
    running = start(3, *words, program=SLOW)
    wait_for((tmp_path / "cut" / "refinement.safetensors").is_file, running)
    running[dying].kill()
    said = ended_together(running)
    for rank, (code, _, errors) in enumerate(said):
        if rank != dying:
            assert code == 1
            assert re.fullmatch(rf"emsplat, rank {rank} of 3 \(.*\): rank {dying} of 3 \(.*--resume.*\n", errors)
    resumed = ends(start(2, *words, "--resume"))
    assert [code for code, *_ in resumed] == [0, 0]
    assert "resuming after round 1" in resumed[0][1]
    one, many = (read_summary(own)["refinement"]["rounds"] for own in (refined, tmp_path / "cut"))
    assert [own["score"] for own in many] == pytest.approx([own["score"] for own in one], abs=2e-3)


@pytest.fixture(scope="module")
def mixed(simulated, tmp_path_factory):
    """Particles of a molecule, and some of it lacks a part."""
    folder = tmp_path_factory.mktemp("mixed")
    places = [torch.randn(300, 3, generator=torch.Generator().manual_seed(n)) * 5 for n in (1, 2)]
    lines = [
        f"ATOM  {300 * chain + n + 1:5d}  CA  ALA {'AB'[chain]}{n + 1:4d}    {x + 20 * chain:8.3f}{y:8.3f}{z:8.3f}"
        "  1.00  0.00           C\n"
        for chain, own in enumerate(places)
        for n, (x, y, z) in enumerate(own.tolist())
    ]
    (folder / "model.pdb").write_text("".join([*lines, "END\n"]))
    known = {"particles": 300, "box": 32, "pixel_size": 3.0, "snr": 0.3, "missing": ("chain B",), "seed": 1}
    return simulate(configure(SimulateConfig, **known), folder / "model.pdb", folder / "particles")


# Decoders of few Gaussians, and of fewer steps: what is looked at is who does what.
QUICK_STATES = """
import sys
from emsplat.process import settle
settle()
import emsplat.heterogeneity.states as states
states._FIRST, states._FINE = 256, (0.4, 0.1)
from emsplat.__main__ import main
sys.exit(main())
"""
STATES_WORDS = ["--components", "1", "--points", "3", "--resolution", "8", "--gaussians", "64", "--threads", "1"]


@pytest.mark.slow
def test_processes_share_a_search_for_states_out_and_any_number_goes_on(mixed, tmp_path):
    words = ["heterogeneity", mixed, *STATES_WORDS]
    (alone,) = ends(start(1, *words, "-o", tmp_path / "one", program=QUICK_STATES))
    assert alone[0] == 0, alone
    said = ends(start(3, *words, "-o", tmp_path / "many", program=QUICK_STATES))
    assert [(code, errors) for code, _, errors in said] == [(0, "")] * 3
    assert [text for _, text, _ in said[1:]] == [""] * 2
    expected_parts_came(tmp_path / "many")
    one, many = (read_summary(tmp_path / name)["heterogeneity"] for name in ("one", "many"))
    assert one["found"]
    assert one["states_confirmed"] > 1
    for before, after in zip(one["gain_by_components"], many["gain_by_components"], strict=True):
        assert after["value"] == pytest.approx(before["value"], rel=1e-4)
    assert many["gain"] == pytest.approx(one["gain"], rel=1e-4)
    for name in ("components", "points", "states_tried", "states_confirmed", "classes"):
        assert many[name] == one[name]
    # The decoder's steps turn on rounding, as with other numbers of threads.
    assert many["states_gain"] == pytest.approx(one["states_gain"], abs=one["states_gain_error"])
    assert the_same(tmp_path / "many" / "consensus.mrc", tmp_path / "one" / "consensus.mrc", 1e-2)
    # One is killed once a coarse model is written; another number goes on.
    running = start(2, *words, "-o", tmp_path / "cut", program=QUICK_STATES)
    wait_for((tmp_path / "cut" / coarse_model_name(2)).is_file, running)
    running[1].kill()
    said = ended_together(running)
    assert said[0][0] == 1
    assert re.fullmatch(r"emsplat, rank 0 of 2 \(.*\): rank 1 of 2 \(.*--resume.*\n", said[0][2])
    resumed = ends(start(3, *words, "-o", tmp_path / "cut", "--resume", program=QUICK_STATES))
    assert [code for code, *_ in resumed] == [0] * 3, resumed
    assert "resuming: the linear stage is done" in resumed[0][1]
    assert read_summary(tmp_path / "cut")["heterogeneity"]["states_confirmed"] == one["states_confirmed"]


@pytest.mark.slow
def test_processes_fit_states_to_images_and_a_signal_ends_all_alike(mixed, tmp_path):
    words = ["heterogeneity", mixed, *STATES_WORDS, "--engine", "images", "--epochs", "3", "1"]
    (alone,) = ends(start(1, *words, "-o", tmp_path / "one"))
    assert alone[0] == 0, alone
    running = start(2, *words, "-o", tmp_path / "cut", "--checkpoint-every", "0.1", program=SLOW_FIT)
    wait_for((tmp_path / "cut" / checkpoint_name("half2")).is_file, running)
    running[1].send_signal(signal.SIGUSR1)
    said = ended_together(running)
    assert [code for code, *_ in said] == [128 + signal.SIGUSR1] * 2, said
    assert re.fullmatch(r"emsplat: stopped in half2 at step \d+; go on with --resume\n", said[0][2])
    resumed = ends(start(3, *words, "-o", tmp_path / "cut", "--resume"))
    assert [(code, errors) for code, _, errors in resumed] == [(0, "")] * 3
    assert "resuming half2: goes on after step" in resumed[0][1]
    expected_parts_came(tmp_path / "one")
    one, many = (read_summary(tmp_path / name)["heterogeneity"] for name in ("one", "cut"))
    for name in ("components", "points", "states_tried", "states_confirmed", "classes"):
        assert many[name] == one[name]
    assert many["states_gain"] == pytest.approx(one["states_gain"], abs=one["states_gain_error"])
    assert the_same(tmp_path / "cut" / "consensus.mrc", tmp_path / "one" / "consensus.mrc", 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("struck", [0, 1])
def test_a_signal_that_cuts_a_search_for_states_ends_all_alike(mixed, tmp_path, struck, number):
    running = start(2, "heterogeneity", mixed, "-o", tmp_path / "run", *STATES_WORDS)
    log = tmp_path / "run" / "run.log"
    wait_for(lambda: log.is_file() and "linear stage:" in log.read_text(), running)
    running[struck].send_signal(number)
    said = ended_together(running)
    assert [code for code, *_ in said] == [128 + number] * 2, said
    name = signal.Signals(number).name
    assert re.fullmatch(rf"emsplat.*: stopped by {name}.*\n", said[struck][2])
    ended = rf"emsplat.*rank {struck} of 2 .*has ended: stopped by {name}.*--resume.*\n"
    assert re.fullmatch(ended, said[1 - struck][2])


# A start in two steps, whose verdict is given: what is looked at is who does what.
QUICK_STARTS = """
import sys
from emsplat.process import settle
settle()
import emsplat.poses.starts as starts
from emsplat.poses.verdict import Verdict
starts._LOOKS = 0
starts.decide = lambda *_: Verdict("uncertain", 0.4, 8, 1.0, 0.1)
from emsplat.__main__ import main
sys.exit(main())
"""
STARTS_WORDS = ["--starts", "1", "--steps", "2", "--batch", "40", "--sample", "110", "--threads", "1"]


@pytest.mark.slow
def test_processes_make_a_start_each_and_any_number_goes_on(simulated, tmp_path):
    words = ["abinitio", simulated(particles=240, snr=1.0, shift=2.0), *STARTS_WORDS]
    (alone,) = ends(start(1, *words, "-o", tmp_path / "one", program=QUICK_STARTS))
    assert alone[0] == 0, alone
    said = ends(start(3, *words, "-o", tmp_path / "many", program=QUICK_STARTS))
    assert [(code, errors) for code, _, errors in said] == [(0, "")] * 3
    assert [text for _, text, _ in said[1:]] == [""] * 2
    expected_parts_came(tmp_path / "many")
    one, many = (read_summary(tmp_path / name)["abinitio"] for name in ("one", "many"))
    assert one["starts"] == many["starts"] == 2
    assert many["verdict"] == one["verdict"]
    for half in (1, 2):
        name = start_name(f"half{half}", 1)
        starts = (read_tensors(tmp_path / own / name) for own in ("one", "many"))
        for before, after in zip(*(own.values() for own in starts), strict=True):
            assert torch.equal(before, after)
    poses, own = (read_particles(tmp_path / name / "run_data.star").poses for name in ("many", "one"))
    assert (poses.rotation - own.rotation).abs().amax((1, 2)).quantile(0.9) < 1e-4
    assert the_same(tmp_path / "many" / MAPS[0], tmp_path / "one" / MAPS[0], 2e-2)
    # Without its end the run goes on from the starts that were made.
    (tmp_path / "many" / "summary.json").unlink()
    resumed = ends(start(2, *words, "-o", tmp_path / "many", "--resume", program=QUICK_STARTS))
    assert [(code, errors) for code, _, errors in resumed] == [(0, "")] * 2
    assert "resuming with 2 starts" in resumed[0][1]
    assert read_summary(tmp_path / "many")["abinitio"] == many


@pytest.mark.slow
def test_a_signal_during_a_start_stops_all_in_order(simulated, tmp_path):
    slow = QUICK_STARTS.replace(
        "starts._LOOKS = 0",
        "starts._LOOKS = 0; import time; plain = starts.make_start\n"
        "starts.make_start = lambda *given: (print('begun', flush=True), time.sleep(60), plain(*given))[2]",
    )
    words = ["abinitio", simulated(particles=240, snr=1.0, shift=2.0), *STARTS_WORDS, "-o", tmp_path / "run"]
    running = start(2, *words, program=slow)
    while "begun" not in running[1].stdout.readline():
        pass
    running[1].send_signal(signal.SIGTERM)
    said = ended_together(running)
    assert [code for code, *_ in said] == [128 + signal.SIGTERM] * 2, said
    assert said[0][2] == ("emsplat: stopped during a start; go on with --resume (finished starts are kept)\n")


def read_tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def ended_together(processes):
    """What all have ended with, and how long that took."""
    began = time.monotonic()
    said = ends(processes)
    assert time.monotonic() - began < 60
    return said


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_killed_process_ends_the_others_and_any_number_goes_on(particles, tmp_path, dying):
    _, folder = ends(start(1, "backproject", particles, "-o", tmp_path / "whole")), tmp_path / "cut"
    words = ["backproject", particles, "-o", folder, "--checkpoint-every", "0.2"]
    saved = folder / "run_half1_statistics.safetensors"
    running = start(3, *words, program=SLOW)
    wait_for(saved.is_file, running)
    running[dying].kill()
    said = ended_together(running)
    assert said[dying][0] == -signal.SIGKILL
    for rank, (code, _, errors) in enumerate(said):
        if rank != dying:
            assert code == 1
            assert re.fullmatch(rf"emsplat, rank {rank} of 3 \(.*\): rank {dying} of 3 \(.*--resume.*\n", errors)
    (folder / ".run_half1_statistics.safetensors.77.part").write_bytes(b"half a file")
    (resumed,) = ends(start(1, *words, "--resume"))
    assert not list(folder.glob(".*"))
    assert resumed[0] == 0
    assert "particles were accumulated before" in resumed[1]
    for name in MAPS:
        assert the_same(folder / name, tmp_path / "whole" / name, 1e-5)


@pytest.mark.slow
def test_a_machine_that_sleeps_ends_nothing(particles, tmp_path):
    """All of its processes stand still for longer than one of them may be silent, and go on."""
    running = start(2, "backproject", particles, "-o", tmp_path / "run", "--checkpoint-every", "0.2", program=SLOW)
    wait_for((tmp_path / "run" / "run_half1_statistics.safetensors").is_file, running)
    for process in running:
        process.send_signal(signal.SIGSTOP)
    time.sleep(_SILENCE + 3)
    for process in running:
        process.send_signal(signal.SIGCONT)
    assert [(code, errors) for code, _, errors in ends(running)] == [(0, "")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_in_order(particles, tmp_path, number):
    words = ["reconstruct", particles, "-o", tmp_path, "--epochs", "3", "--gaussians", "200", "--growth", "1"]
    running = start(2, *words, "--checkpoint-every", "0.2", program=SLOW_FIT)
    course = tmp_path / "course_halves.checkpoint.safetensors"
    wait_for(course.is_file, running)
    running[1].send_signal(number)
    said = ended_together(running)
    assert [code for code, *_ in said] == [128 + number] * 2, said
    assert re.fullmatch(r"emsplat: stopped in half1 and half2 after step \d+; go on with --resume\n", said[0][2])
    assert said[1][1:] == ("", "")
    states, _ = load_states(course)  # whole
    assert states["half1.last"].step == states["half2.last"].step > 0
    assert all(code == 0 for code, *_ in ends(start(3, *words, "--resume")))
    assert read_summary(tmp_path)["fits"]["class001"]["steps"] > 0


@pytest.mark.slow
def test_a_time_limit_stops_all_processes(particles, tmp_path):
    words = ["backproject", particles, "-o", tmp_path, "--time-limit", "0:20", "--checkpoint-every", "0.2"]
    slower = SLOW.replace("sleep(0.1)", "sleep(4)")
    said = ends(start(2, *words, program=slower))
    assert [code for code, *_ in said] == [128 + signal.SIGUSR1] * 2, said
    assert said[0][2].startswith("emsplat: --time-limit is reached: stopped after ")


@pytest.mark.slow
def test_a_full_disk_of_the_first_process_ends_all(particles, tmp_path):
    """No file may be larger than a limit, which the sums are."""

    def limited(rank):
        return ["prlimit", "--fsize=100000"] if rank == 0 else []

    try:
        subprocess.run(["prlimit", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no prlimit")
    words = ["backproject", particles, "-o", tmp_path / "run", "--checkpoint-every", "0.2"]
    ignoring = SLOW.replace(
        "import sys, time", "import signal, sys, time\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    )
    said = ended_together(start(2, *words, program=ignoring, before=limited))
    assert said[0][0] == 2, said
    assert said[0][2].startswith(f"emsplat: {tmp_path / 'run'}")
    assert "cannot be written" in said[0][2]
    assert said[1][0] == 1
    assert re.match(r"emsplat, rank 1 of 2 \(.*\): rank 0 of 2 \(.*\) has ended: .*cannot be written", said[1][2])
    assert not list((tmp_path / "run").glob("*.part"))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_ends_all_with_its_reason(particles, tmp_path):
    (tmp_path / "file").write_text("")
    said = ended_together(start(2, "backproject", particles, "-o", tmp_path / "file" / "run"))
    assert said[0][0] == 2
    assert "cannot be made" in said[0][2]
    assert said[1][0] == 1
    assert "rank 0 of 2" in said[1][2]


@pytest.mark.slow
def test_more_processes_than_particles_are_refused(particles, tmp_path):
    half = open_particles(particles).half
    rows = [row for number in (1, 2) for row in (half == number).nonzero()[:2, 0].tolist()]
    (tmp_path / "four.txt").write_text("\n".join(map(str, rows)))
    words = ["backproject", particles, "-o", tmp_path / "run", "--subset", tmp_path / "four.txt"]
    said = ended_together(start(5, *words))
    assert [code for code, *_ in said] == [2] * 5
    assert "5 processes for 4 particles" in said[0][2]
    assert [errors for *_, errors in said[1:]] == [""] * 4
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_other_particles_or_options_are_named(particles, tmp_path):
    def own(rank):
        return ["--seed", str(rank)]

    said = ended_together(start(2, "backproject", particles, "-o", tmp_path / "run", each=own))
    assert [code for code, *_ in said] == [2, 2]
    assert re.search(r"rank 1 of 2 \(.*\) has another --seed than rank 0 \(1; expected 0\)", said[0][2])
    lists = [tmp_path / f"{rank}.txt" for rank in range(2)]
    for rank, path in enumerate(lists):
        path.write_text("\n".join(map(str, range(rank, rank + 40))))
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        f"link = Path(r'{tmp_path}') / (os.environ['RANK'] + '.txt')\n"
        "import emsplat.programs.opening as opening\n"
        "plain = opening.open_stack\n"
        "opening.open_stack = lambda own, *given, **named: plain(opening.change(own, subset=link), *given, **named)\n"
        "from emsplat.__main__ import main\nsys.exit(main())\n"
    )
    said = ended_together(start(2, "backproject", particles, "-o", tmp_path / "run", program=program))
    assert [code for code, *_ in said] == [2, 2]
    assert "has another list of particles than rank 0" in said[0][2]


@pytest.mark.slow
def test_each_process_finds_its_own_copy_of_the_images(particles, tmp_path):
    for rank in range(2):
        (tmp_path / f"disk{rank}").mkdir()
        (tmp_path / f"disk{rank}" / "particles.mrcs").write_bytes((particles.parent / "particles.mrcs").read_bytes())
    (tmp_path / "star").mkdir()
    star = tmp_path / "star" / "particles.star"
    star.write_text(particles.read_text())
    said = ends(start(2, "backproject", star, "-o", tmp_path / "run", "--datadir", tmp_path / "disk{rank}"))
    assert [(code, errors) for code, _, errors in said] == [(0, "")] * 2


@pytest.mark.slow
def test_a_cut_link_between_two_machines_ends_both(particles, tmp_path):
    """Two network namespaces with a pair of virtual cards; one of these goes down."""
    names = [f"emsplat{rank}_{time.time_ns() % 10**6}" for rank in range(2)]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add one netns {names[0]} type veth peer name two netns {names[1]}"]
    for name, card, number in zip(names, ("one", "two"), (1, 2), strict=True):
        commands += [f"ip -n {name} addr add 10.77.0.{number}/24 dev {card}"]
        commands += [f"ip -n {name} link set {own} up" for own in (card, "lo")]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("no network namespaces here")

        def inside(rank):
            card = ("one", "two")[rank]
            return ["ip", "netns", "exec", names[rank], "env", f"GLOO_SOCKET_IFNAME={card}"]

        words = ["backproject", particles, "-o", tmp_path / "run", "--checkpoint-every", "0.2"]
        slower = SLOW.replace("sleep(0.1)", "sleep(1)")
        running = start(2, *words, program=slower, before=inside, MASTER_ADDR="10.77.0.1", MASTER_PORT="29500")
        wait_for((tmp_path / "run" / "run_half1_statistics.safetensors").is_file, running)
        subprocess.run(["ip", "-n", names[1], "link", "set", "two", "down"], check=True)
        said = ended_together(running)
        for rank, (code, _, errors) in enumerate(said):
            assert code == 1
            assert re.match(rf"emsplat, rank {rank} of 2 \(.*\): rank {1 - rank} of 2 \(.*no sign of life", errors)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_torchrun_starts_it(particles, tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "emsplat", "backproject", str(particles)]
    environment = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words, "-o", str(tmp_path / "run")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("half1: 30 particles accumulated") == 1
