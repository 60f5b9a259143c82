"""The journal of a run: written as it goes, readable at any moment, true after a crash and after going back."""

import io
import json
import math
import os
import platform
import subprocess
import sys
import time

import pytest
import torch

from emsplat.config import BackprojectConfig, ReconstructConfig, change, configure
from emsplat.errors import InputError, Interrupted, OutputError
from emsplat.fitting.course import Score, Stage
from emsplat.programs import image_engine
from emsplat.programs.reconstruct import backproject, reconstruct
from emsplat.programs.run import Fits, Fitted, Run
from emsplat.report.read import read_convergence, read_scores
from emsplat.run.files import JOURNAL, TRACE
from emsplat.run.history import History, write_tables
from emsplat.run.journal import (
    Begun,
    Ended,
    Journal,
    Judged,
    Loss,
    Part,
    Progress,
    Rewound,
    Scored,
    Spent,
    Warned,
    read_journal,
)
from emsplat.run.log import Log
from emsplat.run.profile import last_session, time_line
from emsplat.run.stop import Checkpoints, StopRequest

BEGUN = Begun("emsplat reconstruct", "0.1.0", "Å/\udcffparticles.star", False)
ONE_OF_EACH = (
    BEGUN,
    Part("fits", ""),
    Spent("fits", 0, 1.75e9, 2.5, 4.0, 300.0, 12),
    Progress("half1", 3, 12, "images", "epoch 1"),
    Loss("half1", 20, 1, 100, 0.1 + 0.2),
    Loss("half1", 40, 2, 200, math.nan),
    Scored("half1 and half2", 10, 1, 400, 0.75),
    Judged("half1 and half2", 10, 400, 1, 0.75, math.nan, math.nan, True),
    Warned("two\nlines"),
    Ended("interrupted", "stopped in half1", 1.5),
)


def what(folder, *kinds):
    return [row.what for row in read_journal(folder) if not kinds or isinstance(row.what, kinds)]


def test_rows_come_back_as_they_were(tmp_path):
    journal = Journal(tmp_path)
    for one in ONE_OF_EACH:
        journal.add(one)
        assert repr(what(tmp_path)[-1]) == repr(one)  # on disk at once; repr: NaN is not equal to itself
    assert len(read_journal(tmp_path)) == len(ONE_OF_EACH)
    times = [row.time for row in read_journal(tmp_path)]
    assert times == sorted(times)
    # For programs that are not emsplat: JSON without words of its own for undefined numbers, one object per line.
    lines = (tmp_path / JOURNAL).read_text(encoding="ascii").splitlines()
    objects = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [one["kind"] for one in objects][:4] == ["begun", "part", "spent", "progress"]
    assert objects[5]["loss"] is None


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_a_crash_cut_off_does_not_count(tmp_path, cut):
    journal = Journal(tmp_path)
    for step in (1, 2):
        journal.add(Loss("half1", step, 1, step, 0.5))
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-cut])
    assert what(tmp_path) == [Loss("half1", 1, 1, 1, 0.5)]
    # Whoever goes on begins a line of its own.
    Journal(tmp_path).add(Loss("half1", 3, 1, 3, 0.25))
    assert what(tmp_path) == [Loss("half1", 1, 1, 1, 0.5), Loss("half1", 3, 1, 3, 0.25)]


def test_rewound_rows_are_left_out_and_stay_on_disk(tmp_path):
    journal = Journal(tmp_path)
    journal.rewind("half1", 0)  # nothing to take back: nothing to write
    assert what(tmp_path) == []
    for name in ("half1", "half2"):
        for step in (1, 2, 3):
            journal.add(Loss(name, step, 1, step, 1 / step))
    journal.add(Scored("half1 and half2", 3, 1, 400, 0.5))
    journal.rewind("half1", 1)
    journal.add(Loss("half1", 2, 1, 2, 7.0))
    found = [(one.fit, one.step, one.loss) for one in what(tmp_path, Loss)]
    assert found == [("half1", 1, 1.0), *[("half2", step, 1 / step) for step in (1, 2, 3)], ("half1", 2, 7.0)]
    assert what(tmp_path, Rewound) == [Rewound("half1", 1)]
    assert len(what(tmp_path, Scored)) == 1
    journal.rewind("half1 and half2", 0)
    assert what(tmp_path, Scored) == []
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 10


def test_kinds_of_a_later_version_are_left_out(tmp_path):
    Journal(tmp_path).add(Part("fits", ""))
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(
            '{"kind": "pose", "time": 1.0, "angle": 3}\n{"kind": "part", "time": 2, "name": "x", "text": "", "z": 1}\n'
        )
    assert what(tmp_path) == [Part("fits", ""), Part("x", "")]
    assert read_journal(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "line",
    [
        b"not JSON",
        b"[]",
        b"3",
        b'{"kind": ["loss"], "time": 1}',
        b'{"kind": "loss", "time": 1}',
        b'{"kind": "part", "time": "now", "name": "x", "text": ""}',
        b'{"kind": "part", "time": 1, "name": 7, "text": ""}',
        b'{"kind": "rewound", "time": 1, "fit": "half1", "step": true}',
        b'{"kind": "rewound", "time": 1, "fit": "half1", "step": 1.5}',
        b'{"kind": "part", "name": "x", "text": "", "time": 1' + b"0" * 400 + b"}",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_damage_is_one_line_with_its_place(tmp_path, line):
    Journal(tmp_path).add(Part("fits", ""))
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=r"journal\.jsonl, line 2: not a row of a journal"):
        read_journal(tmp_path)


def test_a_journal_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / JOURNAL).mkdir()
    with pytest.raises(OutputError, match=r"journal\.jsonl: cannot be written"):
        Journal(tmp_path).add(Part("fits", ""))


def test_reading_needs_no_pytorch():
    code = "import sys; from emsplat.run.journal import read_journal; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_log_keeps_progress_warnings_and_the_end(tmp_path):
    log = Log(io.StringIO())
    log.warn("before there is a folder")
    log.keep_in(tmp_path, BEGUN)
    with log.to_the_end(), log.part("fits", "fitting"):
        log.warn("assumed")
        with log.progress("half1", 100, 20) as update:
            for done in range(21, 100):
                update(done, "")
    begun, first, *_, last, spent, ended = what(tmp_path)
    assert (begun, first) == (BEGUN, Part("fits", "fitting"))
    assert (spent.name, spent.depth) == ("fits", 0)
    assert what(tmp_path, Warned) == [Warned("assumed")]
    progress = what(tmp_path, Progress)
    assert progress[0] == Progress("half1", 20, 100, "images", "")
    assert last == progress[-1] == Progress("half1", 99, 100, "images", "")
    assert (ended.how, ended.text) == ("finished", "")
    log.warn("after the end")
    assert what(tmp_path)[-1] == ended


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (Interrupted("stopped in half1; go on with --resume"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (InputError("row 3: no image"), "failed"),
        (MemoryError(), "failed"),
    ],
)
def test_the_end_says_how(tmp_path, error, how):
    log = Log(io.StringIO())
    log.keep_in(tmp_path, BEGUN)
    with pytest.raises(type(error)), log.to_the_end():
        raise error
    [_, ended] = what(tmp_path)
    assert (ended.how, ended.text) == (how, str(error) or type(error).__name__)


class Clock:
    """A clock that the test turns on."""

    strftime = staticmethod(time.strftime)

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1e9 + self.now


def test_the_time_line_follows_the_parts(tmp_path, monkeypatch):
    """The table adds up what has one name in one place; the trace nests as the steps did, by its times."""
    clock = Clock()
    monkeypatch.setattr("emsplat.run.log.time", clock)
    log = Log(io.StringIO(), began=clock.now - 2.0)
    with log.step("particles"):
        pass  # before there is a folder
    log.keep_in(tmp_path, BEGUN)
    with log.to_the_end(profile=True):
        with log.part("fits"):
            for _ in range(3):
                with log.step("stage"):
                    clock.now += 0.5
        with log.step("stage"), log.progress("half1", 4) as update:
            update(4, "")
    rows = read_journal(tmp_path)
    lines = time_line(rows)
    assert [(one.name, one.depth, one.times) for one in lines] == [
        ("imports", 0, 1),
        ("particles", 0, 1),
        ("fits", 0, 1),
        ("stage", 1, 3),
        ("stage", 0, 1),
    ]
    imports, _, fits, stages, _ = lines
    assert imports.seconds == pytest.approx(2.0)
    assert stages.seconds == pytest.approx(1.5)
    assert fits.seconds == pytest.approx(1.5)
    assert "    stage (3 times)" in log.stream.getvalue()
    text = (tmp_path / TRACE).read_text(encoding="utf-8")
    events = json.loads(text, parse_constant=pytest.fail)["traceEvents"]
    assert {one["tid"] for one in events if one["ph"] == "X"} == {os.getpid()}
    spans = [(one["name"], one["ts"], one["ts"] + one["dur"]) for one in events if one["ph"] == "X"]
    assert [name for name, *_ in spans] == ["imports", "particles", "fits", "stage", "stage", "stage", "stage"]
    (_, start, end), *within = spans[2:6]
    assert all(start <= own_start and own_end <= end + 200 for _, own_start, own_end in within)  # rounded to 1e-4 s
    assert [one["args"] for one in events if one["ph"] == "C"] == [{"images": 0}, {"images": 4}]
    # A run that goes on has a time line of its own.
    log = Log(io.StringIO())
    log.keep_in(tmp_path, BEGUN)
    with log.to_the_end(), log.part("report"):
        pass
    assert [one.name for one in time_line(last_session(read_journal(tmp_path)))] == ["report"]


def test_history_goes_on_where_the_fit_does(tmp_path):
    journal = Journal(tmp_path)
    history = History(journal, "half1")
    history.rewind(0)
    assert history.loss == ""
    for step in range(1, 51):
        history.add(step, torch.tensor(float(step)), 25, 10 * step)
    expected = [(20, 1, 10.5), (25, 1, 23.0), (45, 2, 35.5), (50, 2, 48.0)]
    assert [(one.step, one.epoch, one.loss) for one in what(tmp_path, Loss)] == expected
    again = History(Journal(tmp_path), "half1")
    again.rewind(30)
    assert again.recent == 23.0
    again.add(31, torch.tensor(1.0), 31, 310)
    write_tables(tmp_path)
    assert read_convergence(tmp_path) == {"half1": ([20.0, 25.0, 31.0], [10.5, 23.0, 1.0])}
    assert not (tmp_path / "scores.csv").exists()
    journal.add(Scored("half1 and half2", 50, 5, 400, 0.5))
    write_tables(tmp_path)
    assert read_scores(tmp_path) == {"all": [(5.0, 400.0, 0.5)]}


class Stop(StopRequest):
    """Asked to stop at the n-th look."""

    def __init__(self, after):
        self.left = after

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def test_checkpoints_are_due_by_the_clock_and_when_asked_to_stop(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    moment = Checkpoints(60.0, Stop(3))
    assert not moment.due()
    now[0] = 61.0
    assert moment.due()
    now[0] = 100.0  # saving takes its time
    moment.saved("anywhere")
    now[0] = 150.0
    assert not moment.due()
    assert moment.due()
    with pytest.raises(Interrupted, match="stopped in half1"):
        moment.saved("in half1")


def test_what_stages_hand_on_is_frozen():
    assert all(kind.__dataclass_params__.frozen for kind in (Run, Fits, Fitted, Stage, Score))


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=60)


ONE_PASS = configure(ReconstructConfig, epochs=3, gaussians=200, growth=1, threads=1)
IMAGES = configure(ReconstructConfig, engine="images", epochs=3, gaussians=200, batch=16, threads=1, checkpoint_every=0)


def steps(folder):
    return [(one.fit, one.step) for one in what(folder, Loss)]


def test_a_run_of_one_pass_is_in_its_journal(particles, tmp_path):
    log = Log(io.StringIO())
    summary = reconstruct(ONE_PASS, particles, tmp_path / "run", log)
    rows = what(tmp_path / "run")
    process = platform.node(), os.getpid()
    assert rows[0] == Begun("emsplat reconstruct", rows[0].version, str(particles), False, *process)
    assert [one.name for one in rows if isinstance(one, Part)] == [
        "accumulation",
        "fits",
        "residuals",
        "assessment",
        "report",
    ]
    ends = {one.name: (one.done, one.total, one.unit) for one in rows if isinstance(one, Progress)}
    assert ends["half1"] == (30, 30, "images")
    assert ends["half1 and half2"] == (80, 80, "steps")  # stages of 2 and 2 epochs, ten steps of both
    assert [one.text for one in rows if isinstance(one, Warned)] == summary["warnings"]
    judged = [one for one in rows if isinstance(one, Judged)]
    assert [one.kept for one in judged] == [stage["kept"] for stage in summary["course"]]
    assert [one.epoch for one in rows if isinstance(one, Scored)] == [1, 2, 3, 4]
    for name in ("half1", "half2", "class001"):
        assert [step for fit_, step in steps(tmp_path / "run") if fit_ == name] == list(
            range(10, summary["fits"][name]["steps"] + 1, 10)
        )
    assert isinstance(rows[-1], Ended)
    assert rows[-1].how == "finished"


def test_a_back_projection_has_a_journal_too(particles, tmp_path):
    backproject(configure(BackprojectConfig, threads=1), particles, tmp_path / "run")
    rows = what(tmp_path / "run")
    assert rows[0].program == "emsplat backproject"
    assert rows[-1].how == "finished"


def test_a_resumed_run_goes_on_in_the_same_journal(particles, tmp_path, monkeypatch):
    """A crash between two checkpoints: what came after the last one is done again and counts once."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    reconstruct(IMAGES, particles, whole)
    config = change(IMAGES, checkpoint_every=1e9)
    save, doubling = image_engine.save_checkpoint, image_engine.fit_doubling

    def crashing(state, *others):
        """Saves after the first epoch, and is gone after the second."""
        for reached in doubling(state, *others):
            if reached.step == 2:
                save(cut / "run_half1.checkpoint.safetensors", reached)
            yield reached
            if reached.step == 4:
                raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(image_engine, "fit_doubling", crashing)
        with pytest.raises(MemoryError):
            reconstruct(config, particles, cut)
    assert steps(cut) == [("half1", 2), ("half1", 4)]
    with (cut / JOURNAL).open("ab") as file:
        file.write(b'{"kind": "loss", "ti')  # and it was cut off
    reconstruct(change(config, resume=True), particles, cut)
    assert steps(cut) == steps(whole)
    assert what(cut, Rewound) == [Rewound("half1", 2)]
    assert [one.resumed for one in what(cut, Begun)] == [False, True]
    assert [one.how for one in what(cut, Ended)] == ["failed", "finished"]
    assert (cut / "convergence.csv").read_bytes() == (whole / "convergence.csv").read_bytes()


@pytest.mark.slow
def test_fits_that_begin_anew_take_back_their_scores(particles, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    reconstruct(ONE_PASS, particles, whole)

    def failing(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("emsplat.programs.reconstruct.write_residuals", failing)
        with pytest.raises(MemoryError):
            reconstruct(ONE_PASS, particles, cut)
    assert len(what(cut, Scored)) == 4
    reconstruct(change(ONE_PASS, resume=True), particles, cut)
    for name in ("convergence.csv", "scores.csv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
