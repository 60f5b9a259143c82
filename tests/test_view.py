"""The live view: who is let in, what is never sent, what a journal that grows says; and the page in a browser."""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from PIL import Image

from browser import browsing
from emsplat.errors import InputError, OutputError
from emsplat.io.mrc_arrays import read_array
from emsplat.run.files import slices_name
from emsplat.run.journal import (
    Begun,
    Ended,
    Following,
    Foreseen,
    Gained,
    Journal,
    Judged,
    Loss,
    Part,
    Progress,
    Resolved,
    Rewound,
    Scored,
    Warned,
    read_journal,
)
from emsplat.viewer.compared import compare, difference, matched
from emsplat.viewer.folders import Walk, has_file, inside
from emsplat.viewer.pictures import Pictures, pictures_of
from emsplat.viewer.serving import is_local, serve
from emsplat.viewer.site import Request, Site
from emsplat.viewer.watched import Watched, is_alive

HOST = {"host": "127.0.0.1:8765"}
SECRET = "nobody must read this"
FULL_MAP, REPORT = "run_class001.mrc", "report.html"


def begun(program: str = "reconstruct", process: int | None = None, host: str | None = None) -> Begun:
    own = platform.node() if host is None else host
    return Begun(f"emsplat {program}", "1.0", "particles.star", False, own, os.getpid() if process is None else process)


def make_run(folder: Path, *rows: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    for row in rows or (begun(), Ended("finished", "", 12.0)):
        journal.add(row)
    return folder


def write_volume(path: Path, values: np.ndarray, pixel_size: float = 2.0) -> None:
    with mrcfile.new(path, values.astype(np.float32), overwrite=True) as file:
        file.voxel_size = pixel_size


def watched(folder: Path) -> Watched:
    run = Watched(folder.parent.resolve(), folder.name)
    run.refresh()
    return run


def find_runs(root: Path, **bounds: int) -> Walk:
    walk = Walk(root, **bounds)
    walk.go_on()
    assert walk.ended
    return walk


def cookies(site: Site) -> dict[str, str]:
    found = site.answer(Request("GET", "/", {"token": site.token}, HOST)).headers["Set-Cookie"]
    name, _, value = found.partition(";")[0].partition("=")
    return {name: value}


def get(site: Site, path: str, query: dict[str, str] | None = None, **headers: str) -> Any:
    return site.answer(Request("GET", path, query or {}, HOST | headers, cookies(site)))


def listed(site: Site) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in json.loads(get(site, "/api/runs").body)["runs"]}


# The journal while it grows


def test_a_journal_is_read_while_it_grows(tmp_path):
    make_run(tmp_path, begun(), Part("fits", ""))
    following = Following(tmp_path / "journal.jsonl")
    anew, rows = following.new_rows()
    assert (anew, rows) == (False, read_journal(tmp_path))
    assert following.new_rows() == (False, [])
    line = json.dumps({"kind": "warned", "time": 1.0, "text": "look"}).encode()
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(line[:20])
        file.flush()
        assert following.new_rows() == (False, [])
        file.write(line[20:] + b"\n")
    assert [row.what for row in following.new_rows()[1]] == [Warned("look")]
    assert following.position == (tmp_path / "journal.jsonl").stat().st_size


def test_another_journal_in_its_place_is_read_from_its_beginning(tmp_path):
    make_run(tmp_path / "run", begun(), *(Part(str(i), "") for i in range(5)))
    following = Following(tmp_path / "run" / "journal.jsonl")
    following.new_rows()
    for rows in ((begun("refine"), Part("a", "")), (begun("abinitio"), *(Part(str(i), "again") for i in range(50)))):
        (tmp_path / "run" / "journal.jsonl").write_bytes(b"")  # the same file, as a system may give it anew
        with (tmp_path / "run" / "journal.jsonl").open("ab"):
            make_run(tmp_path / "run", *rows)
        anew, found = following.new_rows()
        assert anew
        assert [row.what for row in found] == list(rows)


@pytest.mark.parametrize(
    "damage",
    [b"no json\n", b'{"kind": "part"}\n', b'{"kind": "loss", "time": "x"}\n', b"\xff\xfe\n", b"[" * 5000 + b"\n"],
)
def test_what_is_damaged_is_left_out_and_named(tmp_path, damage):
    folder = make_run(tmp_path / "run", begun())
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(damage)
    make_run(folder, Part("fits", ""))
    run = watched(folder)
    assert "journal.jsonl, line 2" in run.warnings()[0]
    assert [part["name"] for part in run.detail()["parts"]][:1] == ["fits"]


def test_a_file_without_lines_is_no_journal_and_does_not_fill_the_memory(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_bytes(b"x" * (5 * 2**20))
    run = watched(tmp_path / "run")
    run.refresh()
    assert "not a journal" in run.warnings()[0]
    assert run.detail()["parts"] == []


def test_rows_of_earlier_versions_have_no_process(tmp_path):
    old = {
        "kind": "begun",
        "time": 5.0,
        "program": "emsplat refine",
        "version": "0",
        "particles": "p",
        "resumed": False,
    }
    (tmp_path / "journal.jsonl").write_text(json.dumps(old) + "\n")
    assert read_journal(tmp_path)[0].what == Begun("emsplat refine", "0", "p", False, "", 0)


def test_curves_are_kept_in_the_journal(tmp_path):
    row = Resolved("half1 and half2", 10, "cross_validated", 0.5, float("nan"), 64.0, [1.0, 0.5, float("nan")])
    make_run(tmp_path, begun(), row, Rewound("half1 and half2", 10))
    found = read_journal(tmp_path)[1].what
    assert np.array_equal(found.values, row.values, equal_nan=True)
    make_run(tmp_path, Rewound("half1 and half2", 5))
    assert not any(isinstance(one.what, Resolved) for one in read_journal(tmp_path))


# What is known of a run


def test_progress_has_a_rate_and_a_time_left(tmp_path):
    rows = [
        {"kind": "begun", "time": 100.0} | {"program": "emsplat reconstruct", "version": "1", "particles": "p"}
        | {"resumed": False, "host": platform.node(), "process": os.getpid()},
        {"kind": "part", "time": 100.0, "name": "fits", "text": ""},
        *(
            {"kind": "progress", "time": 100.0 + i, "name": "half1", "done": 50 * i, "total": 400, "unit": "steps"}
            | {"remark": "loss 1"}
            for i in range(3)
        ),
    ]  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = watched(tmp_path / "run")
    progress = run._progress_json()
    assert progress is not None
    assert (progress["rate"], progress["left"], progress["done"], progress["name"]) == (50.0, 6.0, 100, "half 1")


def test_the_time_left_of_a_run_follows_from_how_its_parts_compare_with_what_was_expected(tmp_path):
    """Times a pace: what finished parts took over what was expected, and a tenth of the whole as if that were right."""
    parts = (("reading", 10, 0), ("fits", 40, 1), ("judging", 20, 1), ("report", 30, 2))
    expected = [Foreseen(name, float(seconds), turn) for name, seconds, turn in parts]
    rows = [(100, begun()), *((100, one) for one in expected), (100, Part("reading", ""))]
    folder = tmp_path / "run"

    def left(*more: tuple[float, Any]) -> float | None:
        folder.mkdir(exist_ok=True)
        given = [
            {"kind": type(what).__name__.lower(), "time": float(when)} | asdict(what) for when, what in [*rows, *more]
        ]
        (folder / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
        return watched(folder).left()

    assert left() == 100
    assert left((104, Progress("images", 10, 100, "images", ""))) == 96
    slow = (130, Part("fits", ""))  # 30 s in place of 10
    assert left(slow) == pytest.approx(2 * (40 + 20 + 30))
    assert left(slow, (150, Part("judging", "")), (160, Part("fits", ""))) == pytest.approx(2 * 90 - 30)
    assert left(slow, (400, Part("report", ""))) == pytest.approx((300 + 10) / (50 + 10) * 30)
    # A pass that says itself that it takes longer is believed.
    passing = [(when, Progress("page", when - 400, 1000, "figures", "")) for when in (400, 401)]
    assert left(slow, (400, Part("report", "")), *passing) == 999
    # What goes on later does not wait for what it finds done.
    again = [(500, begun()), *((500, one) for one in expected), (500, Part("report", ""))]
    assert left(slow, *again) == 30
    assert left((110, begun())) is None


def test_how_a_run_stands(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stands = {
        "running": (begun(),),
        "finished": (begun(), Ended("finished", "", 1.0)),
        "interrupted": (begun(), Ended("interrupted", "SIGTERM", 1.0)),
        "failed": (begun(), Ended("failed", "no disk", 1.0)),
        "resumed": (begun(), Ended("interrupted", "", 1.0), begun()),
        "killed": (begun(process=gone.pid),),
        "elsewhere": (begun(host="another"),),
    }
    runs = {name: watched(make_run(tmp_path / name, *rows)) for name, rows in stands.items()}
    found = {name: run.status for name, run in runs.items()}
    plain = {name: name for name in ("running", "finished", "interrupted", "failed")}
    assert found == plain | {"resumed": "running", "killed": "running", "elsewhere": "running"}
    for name in ("killed", "elsewhere"):  # long after the last row
        runs[name]._last = time.time() - 3600
    assert (runs["killed"].status, runs["elsewhere"].status) == ("stopped", "quiet")
    runs["running"]._last = time.time() - 3600
    assert runs["running"].status == "running"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process began")
def test_a_number_that_was_given_to_another_process_is_not_the_run():
    assert is_alive(os.getpid(), time.time())
    assert not is_alive(os.getpid(), 1e9)  # before this process was born
    assert not is_alive(2**22 + 7, time.time())


@pytest.mark.parametrize(
    ("program", "parts"),
    [
        ("reconstruct", ["accumulation", "fits", "residuals", "assessment", "report"]),
        ("backproject", ["accumulation", "assessment", "report"]),
        ("refine", ["rounds", "fits", "residuals", "assessment", "report"]),
        ("abinitio", ["reading", "starts", "poses", "accumulation", "assessment", "report"]),
        ("heterogeneity", ["reading", "linear stage", "decoder", "latents", "states", "report"]),
        ("nulltest", ["unaltered", "noise", "phases", "poses"]),
        ("something new", []),
    ],
)
def test_each_program_shows_its_parts(tmp_path, program, parts):
    run = watched(make_run(tmp_path / "run", begun(program), *(Part(name, "") for name in parts[:1])))
    shown = run.detail()["parts"]
    assert [one["name"] for one in shown] == parts
    assert [one["state"] for one in shown] == ["now", *["to come"] * (len(parts) - 1)][: len(parts)]


def test_curves_and_resolution_so_far(tmp_path):
    def resolved(step: int, resolution: float) -> Resolved:
        return Resolved("half1 and half2", step, "cross_validated", 0.5, resolution, 64.0, [1.0, 0.9, 0.7, 0.2])

    folder = make_run(
        tmp_path / "run",
        begun(),
        Part("fits", ""),
        Loss("half1", 20, 1, 100, 3.0),
        Loss("half1", 40, 2, 200, 2.0),
        Scored("half1 and half2", 20, 1, 10, 0.5),
        resolved(20, 32.0),
        Judged("half1 and half2", 40, 10, 2, 0.6, 0.0, 0.0, True),
    )
    run = watched(folder)
    assert [panel["kind"] for panel in run.panels()] == ["fsc", "scores", "loss"]
    assert run.panels()[0]["curves"][0]["y"] == [0.9, 0.7, 0.2]
    assert run.panels()[0]["curves"][0]["x"] == [1 / 64, 2 / 64, 3 / 64]
    assert run.panels()[2]["curves"][0]["y"] == [3.0, 2.0]
    first = run.headline()
    assert first is not None
    assert (first["number"], first["final"]) == ("32.00 Å", False)
    make_run(folder, resolved(60, 21.4), Judged("half1 and half2", 60, 20, 2, 0.4, -0.2, 0.01, False))
    run.refresh()
    assert run.headline() == first  # of the stage that was taken back nothing stays
    make_run(folder, Rewound("half1", 20))
    run.refresh()
    assert run.panels()[2]["curves"][0]["y"] == [3.0]


def test_a_damaged_summary_does_not_hide_the_run(tmp_path):
    folder = make_run(tmp_path / "run")
    for text in ("{", "[]", '{"resolution": 3, "heterogeneity": {"gain": []}}', '{"tests": [1], "warnings": [2]}'):
        (folder / "summary.json").write_text(text)
        (folder / "config.toml").write_text("= [")
        (folder / "fsc.star").write_text("data_\nloop_\n_a\n")
        assert json.dumps(watched(folder).detail(), allow_nan=False)


def test_names_that_no_browser_could_take(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff\n<script>"))
    run = watched(make_run(folder, begun(), Warned("<img src=x onerror=alert(1)> \x1b[2J \udc80")))
    text = json.dumps(run.detail())
    assert run.name == "run\\udcff\\n<script>"
    assert not re.search(r"\\ud[89a-f]|\\u001b", text.replace("\\\\", ""))


# Which folders


def test_runs_are_found_and_links_not_followed(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("a", "deep/er/b", "null/noise/run", ".hidden/c"):
        make_run(root / name)
    make_run(elsewhere / "outside")
    (root / "link").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    (root / "d").mkdir()
    (root / "d" / "journal.jsonl").symlink_to(elsewhere / "outside" / "journal.jsonl")
    (root / "e").mkdir()
    (root / "e" / "nulltest.json").write_text("{}")
    assert set(find_runs(root).runs) == {"a", "deep/er/b", "null/noise/run", "e"}
    assert not find_runs(root).cut


def test_the_walk_is_bounded(tmp_path):
    for i in range(30):
        make_run(tmp_path / f"{i:02d}" / "run")
    assert find_runs(tmp_path, folders=10).cut
    assert find_runs(tmp_path, entries=10).cut
    assert find_runs(tmp_path, depth=1).cut
    found = find_runs(tmp_path)
    assert len(found.runs) == 30
    assert not found.cut
    by_steps = Walk(tmp_path)
    while not by_steps.ended:
        seen = len(by_steps.runs)
        by_steps.go_on(0.0)
        assert len(by_steps.runs) <= seen + 1
    assert by_steps.runs == found.runs


def test_a_run_that_begins_later_appears(tmp_path):
    site = Site(tmp_path)
    site._walking._every = 0.0
    assert listed(site) == {}
    site._walking._next = 0.0
    make_run(tmp_path / "later")
    assert set(listed(site)) == {"later"}
    (tmp_path / "later").rename(tmp_path / "renamed")
    site._walking._next = 0.0
    assert set(listed(site)) == {"renamed"}


def test_thousands_of_runs_keep_nobody_waiting(tmp_path, monkeypatch):
    for i in range(40):
        make_run(tmp_path / f"run{i}")
    site = Site(tmp_path)
    monkeypatch.setattr("emsplat.viewer.site._STEP", 0.0)
    monkeypatch.setattr("emsplat.viewer.site._ROWS", 30)
    monkeypatch.setattr(time, "monotonic", iter(range(10**6)).__next__)
    counts, found = [], {"looking": True}
    while found["looking"]:
        found = json.loads(get(site, "/api/runs").body)
        counts.append(len(found["runs"]) + found["left_out"])
    assert counts == sorted(counts)
    assert len(counts) >= 40
    assert (counts[-1], found["left_out"], len(found["runs"])) == (40, 10, 30)


def test_only_files_of_the_folder_itself_are_inside(tmp_path):
    root = (tmp_path / "root").resolve()
    (root / "run").mkdir(parents=True)
    (tmp_path / "secret").write_text(SECRET)
    (root / "run" / "plain").write_text("")
    (root / "run" / "link").symlink_to(tmp_path / "secret")
    (root / "run" / "own").symlink_to(root / "run" / "plain")
    (root / "way").symlink_to(tmp_path)
    os.mkfifo(root / "run" / "pipe")
    assert inside(root, "run", "plain") == root / "run" / "plain"
    for parts in (
        *(("run", "link"), ("run", "own"), ("way", "secret"), ("..", "secret"), ("run", "..", "..", "secret")),
        *(("run",), ("run", "pipe"), ("run", "none"), ("run", "plain\0"), ("/etc/passwd",), ("x" * 5000,)),
    ):
        with pytest.raises(InputError):
            inside(root, *parts)


# Who is answered


def test_the_token_is_traded_for_a_cookie(tmp_path):
    site = Site(tmp_path)
    welcome = site.answer(Request("GET", "/", {"token": site.token}, HOST))
    assert welcome.status == 200
    assert 'content="0; url=/"' in welcome.body.decode()
    assert re.fullmatch(
        r"emsplat-view-\w+=[\w-]{40,}; Path=/; HttpOnly; SameSite=Strict", welcome.headers["Set-Cookie"]
    )
    assert site.token not in welcome.headers["Set-Cookie"]
    assert get(site, "/").status == 200
    assert len(site.token) > 40
    assert Site(tmp_path).token != site.token


@pytest.mark.parametrize("token", ["", "x", "ä\udc80", "0" * 43])
def test_bad_tokens_and_cookies_are_refused(tmp_path, token):
    make_run(tmp_path / "run")
    site = Site(tmp_path)
    for path in ("/", "/api/runs", "/assets/view.js", "/files/0/report.html"):
        for request in (
            Request("GET", path, {}, HOST),
            Request("GET", path, {"token": token}, HOST),
            Request("GET", path, {"token": token}, HOST, cookies(site)),
            Request("GET", path, {}, HOST, {site.cookie: token}),
            Request("GET", path, {}, HOST, {site.cookie: site.token}),
        ):
            answer = site.answer(request)
            assert answer.status == 403
            assert "Set-Cookie" not in answer.headers
            assert b"run" not in answer.body.replace(b"every run", b"")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:9000", "localhost:8765", "LOCALHOST", "[::1]:8765", "localhost."]
)
def test_this_machine_is_called_by_its_own_names(tmp_path, host):
    assert Site(tmp_path).is_called(host)


@pytest.mark.parametrize(
    "host",
    [
        *(
            "",
            "evil.example",
            "evil.example:8765",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "192.168.0.4:8765",
        ),
        *(
            "127.0.0.1@evil.example",
            "evil.example:127.0.0.1",
            "[::1].evil.example",
            "[::1",
            "0.0.0.0",
            "127.0.0.1, evil",
        ),
    ],
)
def test_a_rebound_name_is_refused(tmp_path, host):
    site = Site(tmp_path)
    for query in ({}, {"token": site.token}):
        answer = site.answer(Request("GET", "/", query, {"host": host}, cookies(site)))
        assert answer.status == 403
        assert "Set-Cookie" not in answer.headers
    assert "can read every run" in answer.body.decode()


def test_a_machine_that_is_shown_to_others_has_a_name_and_addresses(tmp_path):
    site = Site(tmp_path, frozenset({"0.0.0.0"}), everywhere=True)
    assert all(map(site.is_called, ("192.168.0.4:8765", "[fe80::1]:80", platform.node(), "localhost")))
    assert not site.is_called("evil.example")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_known(tmp_path, method):
    site = Site(tmp_path)
    assert site.answer(Request(method, "/", {}, HOST, cookies(site))).status == 405


def test_every_answer_has_the_headers_that_keep_it_from_others(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / REPORT).write_text("<p>report")
    site = Site(tmp_path)
    key = listed(site)["run"]["key"]
    for path in ("/", "/api/runs", "/nothing", f"/api/run/{key}", f"/files/{key}/report.html"):
        headers = get(site, path).headers
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        inline = "'unsafe-inline'" in headers["Content-Security-Policy"]
        assert inline == path.endswith("report.html") == headers["Content-Security-Policy"].startswith("sandbox")
    assert "allow-same-origin" not in get(site, f"/files/{key}/report.html").headers["Content-Security-Policy"]


def test_a_link_from_elsewhere_is_led_on_once(tmp_path):
    site = Site(tmp_path)
    way = {"sec-fetch-mode": "navigate", "sec-fetch-site": "cross-site"}
    answer = site.answer(Request("GET", '//evil.example/"><script>', {}, HOST | way))
    assert answer.status == 403
    assert 'content="0; url=/evil.example/%22%3E%3Cscript%3E"' in answer.body.decode()
    again = site.answer(Request("GET", "/", {}, HOST | way | {"sec-fetch-site": "same-origin"}))
    assert "refresh" not in again.body.decode()


@pytest.mark.parametrize("site_of_origin", ["cross-site", "same-site"])
def test_pages_of_elsewhere_load_nothing_even_with_the_cookie(tmp_path, site_of_origin):
    site = Site(tmp_path)
    assert get(site, "/api/runs", **{"sec-fetch-site": site_of_origin, "sec-fetch-mode": "no-cors"}).status == 403
    assert get(site, "/", **{"sec-fetch-site": site_of_origin, "sec-fetch-mode": "navigate"}).status == 200
    assert get(site, "/api/runs", **{"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}).status == 200


def test_what_has_not_changed_is_not_sent_again(tmp_path):
    make_run(tmp_path / "run")
    site = Site(tmp_path)
    key = listed(site)["run"]["key"]
    first = get(site, f"/api/run/{key}")
    assert get(site, f"/api/run/{key}", **{"if-none-match": first.headers["ETag"]}).status == 304
    make_run(tmp_path / "run", Warned("new"))
    assert get(site, f"/api/run/{key}", **{"if-none-match": first.headers["ETag"]}).status == 200


@contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[str, int, str]]:
    """The command in a process of its own: host, port and token."""
    command = [sys.executable, "-m", "emsplat", "view", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = ""
        while not (match := re.search(r"http://(\S+):(\d+)/\?token=(\S+)", said)):
            line = process.stdout.readline()
            assert line, f"ended before it served: {said}"
            said += line
        yield match[1], int(match[2]), match[3]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a run, a secret beside it, and links to that; and its view."""
    place = tmp_path_factory.mktemp("served")
    (place / "secret.html").write_text(SECRET)
    run = make_run(place / "root" / "run", begun(), Warned("a warning"), Ended("finished", "", 1.0))
    (run / REPORT).write_text("<p>the report")
    (run / "run_data.star").write_text(SECRET)
    (run / "fsc.png").symlink_to(place / "secret.html")
    (run / "link").symlink_to(place)
    linked = make_run(place / "root" / "linked")
    (linked / REPORT).symlink_to(place / "secret.html")
    (linked / "run.log").symlink_to(place / "secret.html")
    (linked / "summary.json").symlink_to(place / "secret.html")
    (linked / FULL_MAP).symlink_to(place / "secret.html")
    with serving(place / "root") as (host, port, token):
        yield place / "root", host, port, token


def ask(
    port: int, path: str, method: str = "GET", cookie: str = "", host: str | None = None, mark: str = ""
) -> tuple[int, bytes, Any]:
    """A path as it stands, which clients would tidy up."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    if cookie:
        connection.putheader("Cookie", cookie)
    connection.putheader("If-None-Match", mark)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers


def cookie_of(port: int, token: str) -> str:
    return str(ask(port, f"/?token={token}")[2]["Set-Cookie"]).partition(";")[0]


def test_a_server_answers_who_has_the_token_alone(served):
    _, host, port, token = served
    assert host == "127.0.0.1"
    assert ask(port, "/")[0] == 403
    assert ask(port, "/?token=wrong")[0] == 403
    cookie = cookie_of(port, token)
    status, body, headers = ask(port, "/", cookie=cookie)
    assert (status, headers["Referrer-Policy"], headers["Server"]) == (200, "no-referrer", None)
    status, empty, headers = ask(port, "/", "HEAD", cookie)
    assert (status, empty, int(headers["Content-Length"])) == (200, b"", len(body))
    mark = ask(port, "/api/runs", cookie=cookie)[2]["ETag"]
    assert ask(port, "/api/runs", cookie=cookie, mark=mark)[:2] == (304, b"")
    assert ask(port, "/", "POST", cookie)[0] == 405
    assert ask(port, "/", "BREW", cookie)[0] == 405
    assert ask(port, "/", cookie=cookie, host="evil.example")[0] == 403
    assert ask(port, f"/?token={token}", host=f"evil.example:{port}")[0] == 403
    assert ask(port, "/", cookie=cookie, host="localhost:9999")[0] == 200  # the other end of a tunnel


@pytest.mark.parametrize(
    "way",
    [
        *(
            "../secret.html",
            "../../secret.html",
            "%2e%2e/secret.html",
            "..%2fsecret.html",
            "%2e%2e%2f%2e%2e%2fsecret.html",
        ),
        *(
            "%252e%252e/secret.html",
            "..\\secret.html",
            "..%5csecret.html",
            "link/secret.html",
            "link/root/run/report.html",
        ),
        *("../report.html", "./report.html", "%2e/report.html", "/report.html", "report.html%00", "report.html/.."),
        *(
            "fsc.png",
            "run_data.star",
            "journal.jsonl",
            "link/report.html",
            "%ff/report.html",
            "..;/report.html",
            "~/report.html",
        ),
    ],
)
def test_no_way_leads_out_of_the_folder(served, way):
    _, _, port, token = served
    cookie = cookie_of(port, token)
    runs = {run["name"]: run["key"] for run in json.loads(ask(port, "/api/runs", cookie=cookie)[1])["runs"]}
    assert ask(port, f"/files/{runs['run']}/report.html", cookie=cookie)[:2] == (200, b"<p>the report")
    for start in (f"/files/{runs['run']}/", "/files/", "/assets/", f"/api/run/{runs['run']}/", "/"):
        status, body, _ = ask(port, start + way, cookie=cookie)
        assert status in (400, 403, 404), (start, way, status)
        assert SECRET.encode() not in body
    for address in (f"/slices/{runs['run']}?map={way}", f"/slices/{runs['linked']}?map={FULL_MAP}"):
        status, body, _ = ask(port, address, cookie=cookie)
        assert status == 404
        assert SECRET.encode() not in body


def test_links_to_files_elsewhere_are_not_followed(served):
    _, _, port, token = served
    cookie = cookie_of(port, token)
    runs = {run["name"]: run for run in json.loads(ask(port, "/api/runs", cookie=cookie)[1])["runs"]}
    assert runs["linked"]["report"] is None
    key = runs["linked"]["key"]
    for path in (f"/files/{key}/report.html", f"/api/run/{key}"):
        assert SECRET.encode() not in ask(port, path, cookie=cookie)[1]


def test_a_port_in_use_is_left_to_who_has_it(served, tmp_path):
    _, _, port, _ = served
    with pytest.raises(OutputError, match=rf"--port {port}: is in use; choose another, or leave it out"):
        serve(tmp_path, port, "127.0.0.1", print)
    with serving(tmp_path) as (_, other, _):
        assert other != port


def test_what_cannot_be_served_is_one_line(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        serve(tmp_path / "none", None, "127.0.0.1", print)
    with pytest.raises(InputError, match="from 1 to 65535"):
        serve(tmp_path, 70000, "127.0.0.1", print)
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.1: cannot be listened on"):
        serve(tmp_path, None, "192.0.2.1", print)


def test_an_address_that_is_not_local_is_warned_of(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("emsplat.viewer.serving._serve", lambda site, sockets: None)
    monkeypatch.setattr("asyncio.run", lambda serving: None)
    monkeypatch.setattr("os.nice", lambda by: 0)
    serve(tmp_path, None, "0.0.0.0", said.append)
    assert any(line.startswith("Warning: 0.0.0.0 is not local") and "can read every run" in line for line in said)
    assert not any("ssh -N" in line for line in said)
    said.clear()
    serve(tmp_path, None, "127.0.0.1", said.append)
    assert any("runs that begin later appear" in line for line in said)
    assert any(line.strip().startswith("ssh -N -L ") for line in said)
    assert [is_local(host) for host in ("127.0.0.2", "::1", "localhost", "0.0.0.0", "node17")] == [True] * 3 + [
        False
    ] * 2


def test_the_view_loads_nothing_heavy():
    code = "import sys, emsplat.viewer.serving; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "matplotlib", "plotly", "skimage", "scipy", "PIL"} & set(done.stdout.split())


# Pictures and comparisons


def test_slices_have_their_first_axis_to_the_right_and_the_second_up(tmp_path):
    folder = make_run(tmp_path / "run")
    values = np.zeros((16, 16, 16))
    values[8, 8, 12] = values[8, 11, 8] = values[10, 8, 8] = 1  # x + 4, y + 3, z + 2
    write_volume(folder / FULL_MAP, values)
    site = Site(tmp_path)
    detail = json.loads(get(site, f"/api/run/{listed(site)['run']['key']}").body)
    address, _, query = detail["pictures"][0]["url"].partition("?")
    png = get(site, address, dict(pair.split("=") for pair in query.split("&"))).body
    (tmp_path / "slices.png").write_bytes(png)
    picture = np.asarray(Image.open(tmp_path / "slices.png"))[..., 0]
    assert picture.shape == (16, 3 * 16 + 2 * 4)
    for column, right, up in ((0, 4, 3), (20, 4, 2), (40, 3, 2)):  # xy, xz, yz
        plane = picture[::-1, column : column + 16]
        assert set(zip(*np.nonzero(plane > 128), strict=True)) == {(8, 8 + right), (8 + up, 8)}


def test_maps_on_their_way_are_shown_until_the_map_is_there(tmp_path):
    folder = make_run(tmp_path / "run")
    with mrcfile.new(
        folder / "run_half1_slices.mrcs", np.random.default_rng(0).normal(size=(3, 8, 8)).astype("f4")
    ) as file:
        file.set_image_stack()
    assert [one.title for one in pictures_of(tmp_path, "run")] == ["half 1, so far"]
    assert Pictures().slices(tmp_path, "run", "run_half1_slices.mrcs").startswith(b"\x89PNG")
    write_volume(folder / "run_half1_class001_unfil.mrc", np.zeros((8, 8, 8)))
    assert [one.name for one in pictures_of(tmp_path, "run")] == ["run_half1_class001_unfil.mrc"]
    (folder / "run_half1_class001_unfil.mrc").write_bytes(b"half a header")
    with pytest.raises(InputError):
        Pictures().slices(tmp_path, "run", "run_half1_class001_unfil.mrc")


def test_the_linear_stage_of_states_is_shown_until_there_are_states(tmp_path):
    folder = make_run(tmp_path / "run", begun("heterogeneity"))
    for name in ("mean", "component1", "component2"):
        with mrcfile.new(folder / slices_name(name), np.zeros((3, 8, 8), "f4")) as file:
            file.set_image_stack()
    titles = ["mean of the linear stage, half 1", "component 1, half 1", "component 2, half 1"]
    assert [one.title for one in pictures_of(tmp_path, "run")] == titles
    journal = Journal(folder)
    for _ in range(2):  # and again by a run that goes on
        for count, gain in ((1, 3.0), (0, 0.0), (2, 2.5)):
            journal.add(Gained("components", count, gain, 0.1))
        journal.add(Gained("points", 4, 5.0, 0.1))
    (panel,) = watched(folder).panels()
    assert [(one["name"], one["x"], one["y"]) for one in panel["curves"]] == [
        ("by components", [0, 1, 2], [0.0, 3.0, 2.5]),
        ("by points", [4], [5.0]),
    ]
    write_volume(folder / "consensus.mrc", np.zeros((8, 8, 8)))
    assert [one.title for one in pictures_of(tmp_path, "run")] == ["consensus"]


def test_a_map_that_is_sharper_in_its_shells_is_no_difference():
    generator = np.random.default_rng(1)
    a = generator.normal(size=(16, 16, 16))
    axis = np.fft.fftfreq(16, 1 / 16)
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    b = np.fft.ifftn(np.fft.fftn(a) * 3 * np.exp(0.2 * np.round(radius))).real + 5
    first, second = matched(a.astype("f4"), b.astype("f4"), 2.0, None)
    assert np.abs(first - second).max() < 1e-4 * first.std() * 10
    limited, _ = matched(a.astype("f4"), b.astype("f4"), 2.0, 8.0)  # shell 4 of 16 voxels of 2 Å
    power = np.abs(np.fft.fftn(limited)) ** 2
    assert power[np.round(radius) > 4].max() < 1e-8 * power.max()


def test_two_runs_are_compared(tmp_path):
    runs = []
    for name, epochs in (("one", 3), ("other", 5)):
        folder = make_run(tmp_path / name, begun(), Loss("half1", 20, 1, 9, 1.0), Scored("h", 20, 1, 9, 0.5))
        (folder / "config.toml").write_text(
            'program = "emsplat 1.0"\ncommand = "reconstruct"\n'
            f'[options]\nsymmetry = "C1"\nepochs = {epochs}\nthreads = {epochs}\n'
        )
        write_volume(folder / FULL_MAP, np.random.default_rng(2).normal(size=(16, 16, 16)))
        runs.append(watched(folder))
    found = compare(*runs)
    assert found["settings"] == [("epochs", "3", "5"), ("threads", "3", "5")]
    assert [[curve["name"] for curve in panel["curves"]] for panel in found["panels"]] == [
        ["A: h", "B: h"],
        ["A: half 1", "B: half 1"],
    ]
    colours = [curve["color"] for curve in found["panels"][0]["curves"]]
    assert len(set(colours)) == 2
    shown = difference(*runs)
    assert "Correlation of the two: 1.0000" in shown.remarks[1]
    assert shown.picture.startswith(b"\x89PNG")
    write_volume(tmp_path / "other" / FULL_MAP, np.ones((8, 8, 8)))
    with pytest.raises(InputError, match="a difference needs one grid"):
        difference(*runs)
    (tmp_path / "other" / FULL_MAP).unlink()
    with pytest.raises(InputError, match="other: has no map yet"):
        difference(*runs)


# The page in a browser


@pytest.mark.slow
def test_the_page_shows_runs_and_only_text(tmp_path):
    evil = "<img src=x onerror=document.title='hit'>"
    rows = [Foreseen("fits", 60.0, 0), Foreseen("report", 3600.0, 1)]
    rows += [Warned(evil), Part("fits", evil), Progress(evil, 1, 4, evil, evil), Loss(evil, 20, 1, 1, 1.0)]
    rows += [Resolved("half1", 1, "cross_validated", 0.5, 10.0, 64.0, [1.0, 0.8, 0.6, 0.2])]
    make_run(tmp_path / "root" / evil.replace("/", ""), begun(), *rows)
    other = make_run(tmp_path / "root" / "other")
    (other / REPORT).write_text(
        "<title>the report</title><script>document.title += ' ran'; "
        "try { localStorage } catch { document.title += ' alone'; }</script>"
    )
    with serving(tmp_path / "root") as (_, port, token), browsing(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{port}/?token={token}")
        page.wait("document.querySelectorAll('.runs tbody tr').length === 2")
        assert "min left of the run" in page.evaluate("document.querySelector('.runs').textContent")
        assert page.evaluate("location.href") == f"http://127.0.0.1:{port}/"
        assert page.evaluate("document.cookie") == ""
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        page.evaluate(
            "[...document.querySelectorAll('.runs a')].find((a) => a.textContent.includes('onerror')).click()"
        )
        page.wait("document.querySelectorAll('.plot svg[tabindex]').length === 2")
        assert page.evaluate("document.querySelector('h1').textContent") == evil
        assert "left of the run" in page.evaluate("document.querySelector('[aria-label=State]').textContent")
        assert page.evaluate("document.querySelector('.warnings').textContent").endswith(evil)
        assert page.evaluate("[...document.images].length") == 0
        assert page.evaluate("document.querySelector('progress').value") == 0.25
        page.evaluate("document.querySelector('.plot svg[tabindex]').focus()")
        page.key("ArrowRight")
        page.wait("document.querySelector('.tip:not([hidden])') !== null")
        assert "0.8" in page.evaluate("document.querySelector('.tip:not([hidden])').textContent")
        # Two runs side by side, by the keyboard alone.
        page.evaluate("location.hash = '#/'")
        page.wait("document.querySelectorAll('.runs input').length === 2")
        for number in range(2):
            page.evaluate(f"document.querySelectorAll('.runs input')[{number}].click()")
            page.wait(f"document.querySelectorAll('.runs input:checked').length === {number + 1}")
        page.wait("!document.querySelector('#compare').disabled")
        page.evaluate("document.querySelector('#compare').click()")
        page.wait("document.body?.textContent.includes('Settings that differ')")
        assert not page.problems
        # The report has scripts of its own, and no more rights than they.
        page.evaluate("location.hash = '#/'")
        page.wait("document.querySelector('.runs a[href$=\"report.html\"]') !== null")
        page.evaluate("document.querySelector('.runs a[href$=\"report.html\"]').click()")
        page.wait("document.title === 'the report ran alone'")
        # From within it a link comes without the cookie, and is led on.
        page.evaluate("location.href = location.href.replace('report.html', 'missing.html')")
        page.wait("document.body?.textContent.includes('Only pages and figures')")
        page.problems.clear()
        page.open(f"http://127.0.0.1:{port}/?token=wrong")
        page.wait("document.body?.textContent.includes('needs the address with the token')")


@pytest.mark.slow
def test_a_run_is_watched_from_its_beginning_to_its_report(tmp_path, simulated):
    particles = simulated(particles=400)
    (tmp_path / "root").mkdir()
    with serving(tmp_path / "root") as (_, port, token), browsing(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{port}/?token={token}")
        page.wait("document.body?.textContent.includes('No runs yet')")
        command = [sys.executable, "-m", "emsplat", "reconstruct", str(particles), "-o", str(tmp_path / "root" / "run")]
        run = subprocess.Popen([*command, "--epochs", "60", "-j", "1"], stdout=subprocess.DEVNULL)
        try:
            page.wait("document.querySelector('.state.running') !== null")
            page.evaluate("document.querySelector('.runs a').click()")
            page.wait("document.querySelector('.number')?.textContent.includes('Å')")
            assert "So far" in page.evaluate("document.querySelector('.headline').textContent")
            page.wait("document.querySelector('progress')?.value > 0")
            page.wait("document.querySelectorAll('img.slices').length > 1")
            page.wait(
                "[...document.querySelectorAll('img.slices')].every((one) => one.complete && one.naturalWidth > 0)"
            )
            first = page.evaluate("document.querySelector('img.slices').dataset.url")
            loss = "[...document.querySelectorAll('.plot')].find((one) => one.textContent.startsWith('Loss'))"
            page.wait(f"{loss} !== undefined")
            length = f"({loss}?.querySelector('svg[tabindex] .curve').getAttribute('d').length ?? 0)"
            short = page.evaluate(length)
            page.wait(f"{length} > {short}")
            page.wait(f"document.querySelector('img.slices').dataset.url !== {json.dumps(first)}")
            page.wait("document.querySelector('.state.finished') !== null")
            assert run.wait() == 0
        finally:
            run.kill()
            run.wait()
        page.wait("[...document.querySelectorAll('a')].some((one) => one.textContent === 'Report')")
        assert "So far" not in page.evaluate("document.querySelector('.headline').textContent")
        assert not list((tmp_path / "root" / "run").glob("*_slices.mrcs"))
        assert has_file((tmp_path / "root").resolve(), "run", REPORT)
        assert read_array(tmp_path / "root" / "run" / FULL_MAP).values.shape == (32, 32, 32)
        page.evaluate("[...document.querySelectorAll('a')].find((one) => one.textContent === 'Report').click()")
        page.wait("document.title === 'emsplat: run' && document.querySelectorAll('.plot .main-svg').length > 3")
        # Slices may be asked for that the map has replaced at that moment.
        assert [one for one in page.problems if "404" not in one] == []
