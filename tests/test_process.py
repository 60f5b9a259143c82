"""What surrounds emsplat: the cores it was granted, streams, signals, caches, and a process that is somebody else's."""

import errno
import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from emsplat import process
from emsplat.config import AssessConfig, BackprojectConfig, configure
from emsplat.errors import InputError, Interrupted
from emsplat.granted import Granted, free_memory, granted_cores
from emsplat.process import run, shared_out, started
from emsplat.programs import opening
from emsplat.programs.assess import reassess
from emsplat.programs.finish import exit_code
from emsplat.programs.reconstruct import backproject
from emsplat.run.log import Log, data_size, duration
from emsplat.run.stop import interruptible

NOWHERE = (Path("/nowhere/cgroup"), Path("/nowhere"))


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=300, snr=1.0)


# Cores


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)


@pytest.mark.parametrize(
    ("environment", "allowed", "expected"),
    [
        ({}, 128, Granted(128, "")),
        ({}, 4, Granted(4, "CPU affinity")),
        ({"SLURM_CPUS_PER_TASK": "6"}, 128, Granted(6, "SLURM_CPUS_PER_TASK")),
        # A task's share, not the node's, where both are said.
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "12"}, 128, Granted(6, "SLURM_CPUS_PER_TASK")),
        ({"SLURM_CPUS_ON_NODE": "12"}, 128, Granted(12, "SLURM_CPUS_ON_NODE")),
        ({"NCPUS": "8"}, 128, Granted(8, "NCPUS")),
        ({"PBS_NUM_PPN": "3"}, 128, Granted(3, "PBS_NUM_PPN")),
        ({"LSB_DJOB_NUMPROC": "5"}, 128, Granted(5, "LSB_DJOB_NUMPROC")),
        ({"NSLOTS": "7"}, 128, Granted(7, "NSLOTS")),
        ({"OMP_NUM_THREADS": "2", "SLURM_CPUS_PER_TASK": "6"}, 128, Granted(2, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "4,2"}, 128, Granted(4, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "500"}, 128, Granted(128, "")),
        ({"OMP_NUM_THREADS": "0", "NSLOTS": "", "SLURM_CPUS_PER_TASK": "many"}, 16, Granted(16, "CPU affinity")),
    ],
)
def test_cores_that_were_granted(many_cores, environment, allowed, expected):
    assert granted_cores(environment, allowed, NOWHERE) == expected


@pytest.mark.parametrize(
    ("memberships", "files", "cores"),
    [
        ("0::/job\n", {"job/cpu.max": "250000 100000\n"}, 3),
        ("0::/job\n", {"job/cpu.max": "50000 100000\n"}, 1),
        ("0::/job\n", {"job/cpu.max": "max 100000\n"}, 128),
        # The quota of a group that this one lies in.
        ("0::/slurm/job/step\n", {"slurm/job/cpu.max": "400000 100000", "slurm/job/step/cpu.max": "max 100000"}, 4),
        # A container sees its own group at the root, under a name from outside.
        ("0::/docker/0123\n", {"cpu.max": "200000 100000"}, 2),
        ("4:cpu,cpuacct:/job\n1:name=systemd:/\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                                                    "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/docker/0123\n", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 128),
        ("4:cpuset:/job\nnonsense\n", {"cpu.max": "1 0", "cpu/cpu.cfs_quota_us": "x"}, 128),
    ],
)  # fmt: skip
def test_quota_of_control_groups(many_cores, tmp_path, memberships, files, cores):
    (tmp_path / "memberships").write_text(memberships)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    expected = Granted(cores, "CPU quota" if cores < 128 else "")
    assert granted_cores({}, 128, (tmp_path / "memberships", tmp_path / "mount")) == expected


@pytest.mark.parametrize(
    ("memberships", "files", "free"),
    [
        ("0::/job\n", {}, 8e9),
        ("0::/job\n", {"job/memory.max": "max", "job/memory.current": "5", "job/memory.stat": ""}, 8e9),
        # Pages of files can be given back.
        ("0::/job\n", {"job/memory.max": "3000000000", "job/memory.current": "1200000000",
                       "job/memory.stat": "anon 200000000\ninactive_file 1000000000\n"}, 2.8e9),
        ("0::/slurm/job\n", {"slurm/memory.max": "2000000000", "slurm/memory.current": "500000000",
                             "slurm/memory.stat": "", "slurm/job/memory.max": "max"}, 1.5e9),
        ("9:memory:/docker/0123\n", {"memory/memory.limit_in_bytes": "1000000000", "memory/memory.usage_in_bytes": "0",
                                     "memory/memory.stat": "total_inactive_file 0\n"}, 1e9),
        ("9:memory:/job\n", {"memory/job/memory.limit_in_bytes": str(2**63 - 4096),
                             "memory/job/memory.usage_in_bytes": "0", "memory/job/memory.stat": ""}, 8e9),
        ("0::/job\n", {"job/memory.max": "nonsense"}, 8e9),
    ],
)  # fmt: skip
def test_memory_that_is_free(tmp_path, memberships, files, free):
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    7812500 kB\n")
    (tmp_path / "memberships").write_text(memberships)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path / "meminfo", (tmp_path / "memberships", tmp_path / "mount")) == free


def test_memory_is_not_known_everywhere(tmp_path):
    (tmp_path / "other").write_text("MemTotal: 9000000 kB\n")
    for name in ("missing", "other"):
        assert free_memory(tmp_path / name, NOWHERE) is None


def test_too_little_memory_is_said(particles, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "free_memory", lambda: 1e8)
    log = Log()
    backproject(configure(BackprojectConfig), particles, tmp_path / "run", log)
    assert any("of memory will be needed, and 100 MB are free" in warning for warning in log.warnings)


def test_threads_are_those_asked_for_and_given_back(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(process, "granted_cores", lambda: Granted(2, "CPU affinity"))
    for wanted, found in ((3, 3), (None, 2)):
        with process.threads(wanted):
            assert torch.get_num_threads() == found
        assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError), process.threads(3):
        raise RuntimeError
    assert torch.get_num_threads() == before
    assert process.describe_threads(3) == "3 threads"
    assert process.describe_threads(None) == "2 threads (limited by CPU affinity)"


@pytest.mark.parametrize(
    ("wanted", "processes", "cores", "found"), [(None, 4, 3, 3), (2, 2, 8, 4), (2, 4, 6, 6), (3, 2, 2, 3), (2, 1, 8, 1)]
)
def test_who_goes_on_alone_has_the_threads_of_all(monkeypatch, wanted, processes, cores, found):
    def granted(environment=None):
        return Granted(1 if environment is None else cores, "")

    monkeypatch.setattr(process, "granted_cores", granted)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for _ in range(2):  # said twice it is the same
            process.go_on_alone(wanted, processes)
            assert torch.get_num_threads() == found
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [-1, 0, 100_000])
def test_impossible_numbers_of_threads_are_one_line(wanted, particles, tmp_path):
    with pytest.raises(InputError, match=f"--threads {wanted}: expected from 1"):
        backproject(configure(BackprojectConfig, threads=wanted), particles, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Somebody else's process


def test_import_and_a_run_change_nothing_in_the_process(particles, tmp_path):
    """As in a notebook: environment, signals, warnings, logging and matplotlib stay as they were, under a back end that
    is not installed here and a matplotlibrc that would need LaTeX."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    code = """
import logging, os, signal, sys, warnings
from pathlib import Path
signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
import torch  # which adds filters of its own
torch.set_num_threads(1)
def state():
    return (dict(os.environ), [signal.getsignal(n) for n in signals], logging.root.handlers[:], logging.root.level,
            logging.getLogger("matplotlib").level, sys.stdout.errors, torch.get_num_threads(), Path.cwd(),
            torch.is_grad_enabled(), torch.get_default_dtype())
before, filters = state(), warnings.filters[:]
import emsplat.cli, emsplat.relion_job
assert [f for f in warnings.filters if f not in filters and "emsplat" in str(f)] == []
assert state() == before
from emsplat.config import BackprojectConfig, configure
from emsplat.programs.reconstruct import backproject
backproject(configure(BackprojectConfig, threads=2), Path(sys.argv[1]), Path("run"))
import matplotlib
assert matplotlib.rcParams["font.size"] == 30 and matplotlib.rcParams["text.usetex"]
assert "matplotlib.pyplot" not in sys.modules
assert state() == before, (state(), before)
print("unchanged")
"""
    environment = {**os.environ, "MPLBACKEND": "module://front_end.that_is_not_installed"}
    done = subprocess.run(
        [sys.executable, "-c", code, particles], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.endswith("unchanged\n"), done.stderr[-2000:]
    assert done.stderr == ""
    assert (tmp_path / "run" / "slices.png").is_file()


def test_handlers_of_signals_come_back():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what nohup started ignores it
    try:
        with interruptible() as stop:
            assert not stop
            signal.raise_signal(signal.SIGHUP)
            assert stop
            error = stop.interruption("stopped in half1; go on with --resume")
            stop.number = None
        assert isinstance(error, Interrupted)
        assert error.exit_code == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        # What nohup or a shell's background has switched off stays off.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruptible() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGHUP, hangup)
    found = []
    worker = threading.Thread(target=lambda: found.append(bool(interruptible().__enter__())))
    worker.start()
    worker.join()
    assert found == [False]


# The program


def test_letters_of_the_field_on_a_plain_terminal():
    process.codecs.register_error("emsplat.plain", process._plain)
    text = "7.08 Å, 96² × 3 in 64³ voxels, 0.98 ± 0.01, 2 σ, Müller, ─│╭•, 漢, \udcff.star"
    found = text.encode("ascii", "emsplat.plain").decode()
    assert found == "7.08 A, 96^2 x 3 in 64^3 voxels, 0.98 +- 0.01, 2 sigma, Muller, -|+-, ?, \\xff.star"
    assert text.encode("latin-1", "emsplat.plain").decode("latin-1").startswith("7.08 Å, 96² × 3 in 64³ voxels, 0.98 ±")
    assert text.encode("utf-8", "emsplat.plain").decode() == text.replace("\udcff", "\\xff")


@pytest.fixture
def program(monkeypatch):
    """`run` without what it does to the process of the tests."""
    monkeypatch.setattr(process, "settle", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def start(command):
        return run("emsplat", command)

    return start


def full(buffered):
    """Standard output on a full disk."""
    file = Path("/dev/full").open("wb", buffering=-1 if buffered else 0)  # noqa: SIM115
    return process.Output(file, encoding="utf-8", write_through=not buffered)


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("a.star: is no STAR file"), 2, "emsplat: a.star: is no STAR file\n"),
        (Interrupted("stopped in half1; go on with --resume", signal.SIGTERM), 143,
         "emsplat: stopped in half1; go on with --resume\n"),
        (KeyboardInterrupt(), 130, "emsplat: interrupted\n"),
        (process.Stopped(signal.SIGTERM), 143, "emsplat: stopped by SIGTERM\n"),
        (BrokenPipeError(), 141, ""),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
        (PermissionError(errno.EACCES, "Permission denied", "x.mrc"), 2,
         "emsplat: x.mrc: cannot be used (Permission denied); is there space, and permission?\n"),
    ],
)  # fmt: skip
def test_every_end_is_one_line_and_a_code(program, capsys, error, code, said):
    assert program(raising(error)) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("buffered", [True, False])
def test_output_on_a_full_disk(program, capsys, monkeypatch, buffered):
    monkeypatch.setattr(sys, "stdout", full(buffered))
    assert program(lambda: print("a line")) == 2
    error = capsys.readouterr().err
    assert error.startswith("emsplat: standard output: cannot be written (No space left")
    assert error.count("\n") == 1
    monkeypatch.setattr(sys, "stderr", full(buffered))
    assert program(raising(InputError("nobody can read this"))) == 2


def words_of(*words):
    return [sys.executable, "-m", "emsplat", *map(str, words)]


@pytest.mark.slow
def test_a_command_in_hard_surroundings(particles, tmp_path):
    """ASCII, a notebook's back end, one core asked for by the environment, a home that cannot be made, no temporary
    folder: the same files as ever, times of the whole command, and nothing on standard error."""
    surroundings = {
        "PYTHONIOENCODING": "ascii",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "OMP_NUM_THREADS": "1",
        "HOME": "/proc/nobody",
        "TMPDIR": "/nowhere",
    }
    start = time.monotonic()
    done = subprocess.run(
        words_of("backproject", particles, "-o", tmp_path / "run", "--symmetry", "D3"),
        env={**os.environ, **surroundings},
        capture_output=True,
        check=False,
    )
    whole = time.monotonic() - start
    assert done.stderr == b""
    said = done.stdout.decode("ascii")
    alone = granted_cores().cores == 1  # then that is the limit, whatever the environment asks for
    assert ("1 thread" if alone else "1 thread (limited by OMP_NUM_THREADS)") in said
    assert "8.00 A" in said
    assert (tmp_path / "run" / "report.html").is_file()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # All but the last moments of Python, and more than the parts.
    assert sum(summary["seconds_of_parts"].values()) <= summary["seconds"] + 0.1
    assert summary["seconds"] <= whole + 0.1
    assert f"{summary['seconds']:.0f} s in all" in said
    # The particles have no symmetry: said at the start, at the end and in the report, and exit code 1.
    assert done.returncode == 1
    assert len([line for line in said.splitlines() if line.startswith(("Warning: symmetry D3", "  symmetry D3"))]) == 2
    assert said.splitlines()[-1].startswith("exit code 1: not of symmetry D3, and --force")
    assert summary["symmetry"]["verdict"] == "wrong"
    assert any(text.startswith("symmetry D3") for text in summary["warnings"])
    # Nor does another assessment forget it.
    again = reassess(tmp_path / "run", AssessConfig(), Log(io.StringIO()))
    assert any(text.startswith("symmetry D3") for text in again["warnings"])


def test_symmetry_that_is_meant(particles, tmp_path):
    words = configure(BackprojectConfig, symmetry="C2", force=True)
    log = Log(io.StringIO())
    summary = backproject(words, particles, tmp_path / "run", log)
    assert summary["symmetry"]["verdict"] == "wrong"
    assert exit_code(summary) == 0
    assert "warnings of this run:\n  symmetry C2: " in log.stream.getvalue()
    assert "exit code" not in log.stream.getvalue()
    assert exit_code({**summary, "options": {"force": False}}) == 1
    assert exit_code({**summary, "symmetry": None}) == 0


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full"])
def test_standard_output_that_is_closed_or_full(redirection, particles, tmp_path):
    command = f'"{sys.executable}" -m emsplat check "{particles}" --metadata-only {redirection}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    if redirection == ">&-":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("emsplat: standard output:")


def test_ctrl_c_during_the_imports_is_one_line():
    code = (
        "import sys, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Press:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'emsplat.config': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press()); sys.argv = ['emsplat', '--version']\n"
        "from emsplat.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "emsplat: interrupted\n")


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_after_the_imports_as_before(before):
    """Also where an import fails."""
    was = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        with suppress(ImportError), process.imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()


def test_what_is_registered_for_the_end_is_done():
    code = (
        "import atexit, os, signal, sys; from emsplat.process import leave, settle; settle()\n"
        "atexit.register(lambda: print('last', end=''))\n"
        "print('first', end=' '); leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "first last", "")


def test_a_signal_at_the_end_does_not_change_how_it_ends():
    code = (
        "import atexit, signal, time; from emsplat.process import leave, settle; settle()\n"
        "atexit.register(lambda: [signal.raise_signal(signal.SIGTERM), time.sleep(60)])\n"
        "leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_a_signal_that_nobody_has_looked_for_is_not_lost():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# Times and sizes


def test_time_counts_from_the_start_of_the_process():
    # The least of several: between its two clocks the process may have to wait for a core.
    code = (
        "import time; begun = time.monotonic(); time.sleep(0.3); from emsplat.process import started\n"
        "print(min(started() for _ in range(9)), begun)"
    )
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, begun = (float(word) for word in done.stdout.split())
    # Python had begun before its first line; ticks of the system are a hundredth of a second.
    assert before - 0.02 < first < begun + 0.02
    assert started() <= time.monotonic()


def test_sizes_and_times_are_never_nothing():
    sizes = {0: "less than 1 MB", 2.4e6: "2 MB", 999e6: "999 MB", 2.45e9: "2.5 GB", 3e12: "3,000.0 GB"}
    assert {count: data_size(count) for count in sizes} == sizes
    times = {0.2: "less than a second", 12.3: "12 s", 119: "119 s", 210: "3.5 min", 7560: "2.1 h"}
    assert {seconds: duration(seconds) for seconds in times} == times


@pytest.mark.parametrize("processes", [1, 3, 9])
def test_tasks_are_shared_out(processes):
    tasks = [lambda number=number: f"{number}: {'å' * number}" for number in range(5)]
    assert shared_out(tasks, processes) == [task() for task in tasks]
    assert shared_out([], processes) == []


def test_what_a_copy_fails_at_is_done_here():
    """An error of a task is the caller's, whichever process has met it; one that only a copy meets is nobody's."""
    here = os.getpid()

    def only_here():
        time.sleep(0.02)
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    def wrong():
        time.sleep(0.02)
        raise InputError("no map")

    assert shared_out([only_here] * 4, 3) == ["done"] * 4
    with pytest.raises(InputError, match="no map"):
        shared_out([only_here, only_here, wrong, only_here], 2)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # nobody is left behind
