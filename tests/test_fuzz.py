"""Some inputs of the fuzzer in every run of the tests, and the proof that it sees what it looks for."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz
from emsplat.errors import InputError


def run(folder, inputs, *words):
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(inputs), "-o", str(folder), *words]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)


@pytest.mark.parametrize("runs", [("500",), pytest.param(("1,000", "3,000"), marks=pytest.mark.slow)])
def test_damaged_files(tmp_path, runs):
    for inputs in runs:  # the second run goes on where the first ended
        done = run(tmp_path, int(inputs.replace(",", "")))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{inputs} of {inputs} inputs" in done.stdout


def test_damaged_files_of_other_programs(tmp_path, shared_data):
    done = run(tmp_path, 500, "--kinds", "star,cs", "--seed", "1", "--data", str(shared_data))
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_input_follows_from_seed_and_number():
    files = fuzz.seeds(None)
    for number in range(0, 2000, 37):
        assert fuzz.make(files, 3, number) == fuzz.make(files, 3, number)
    assert fuzz.make(files, 3, 5) != fuzz.make(files, 4, 5)


@pytest.fixture(scope="module")
def watched():
    sys.addaudithook(fuzz._watch)


def _refuse(text):
    raise InputError(text)


def _waste(size):
    """Take that much more memory than this process, whatever tests it ran before, ever held at once."""
    bytearray(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + size)


@pytest.mark.parametrize(
    ("reader", "seen"),
    [
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (lambda path: float("nan"), "not finite"),
        (lambda path: _refuse("wrong"), "names no file"),
        (lambda path: path.with_name("x").write_text(""), "more than read"),
        (lambda path: os.system("true"), "more than read"),
        (lambda path: exec("1"), "more than read"),
        (lambda path: _waste(200 * 2**20), "MB of memory"),
        (lambda path: _refuse(f"{path}: refused"), ""),
        (lambda path: None, ""),
    ],
)
def test_every_misdeed_is_seen(tmp_path, monkeypatch, watched, reader, seen):
    files = fuzz.seeds(None)
    reading = fuzz.Reading(tmp_path, files)
    monkeypatch.setattr(reading, "read", lambda kind: reader(Path(reading.paths[kind])))
    monkeypatch.setattr(fuzz.signal, "setitimer", lambda *_: None)  # its signal would end the tests
    wrong = reading.judge("map", b"")[1]
    assert seen in wrong
    assert bool(seen) == bool(wrong)


def _dies(task, at, counts):
    """Stands for a worker whose reader crashes at input 1 and hangs at input 2."""
    for number in range(task.first, task.stop):
        at[:] = number, 1
        if number in (1, 2):
            os.kill(os.getpid(), {1: signal.SIGKILL, 2: signal.SIGPROF}[number])
        at[0] = number + 1


def test_a_crash_and_a_hang_are_seen_and_survived(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "_work", _dies)
    assert fuzz.main(["--inputs", "5", "--kinds", "map", "-o", str(tmp_path)]) == 1
    found = {path.read_text().split()[0]: path.with_suffix(".bin") for path in tmp_path.glob("map-*.txt")}
    assert set(found) == {"crash", "hang"}
    assert found["crash"].read_bytes() == fuzz.make(fuzz.seeds(None), 0, 1, ("map",))[1]


def test_valid_files_are_read(tmp_path):
    files = fuzz.seeds(None)
    reading = fuzz.Reading(tmp_path, files)
    for kind in fuzz.KINDS:
        for content in files[kind]:
            reading.write(kind, content)
            reading.read(kind)
