"""The choice of the fastest way, with a clock that is made up."""

import concurrent.futures
import contextlib
import itertools
import json
import threading

import pytest
import torch

from fusetune import _tune

DEVICE = torch.device("cuda", 0)
CASE = (torch.float16, 64, "")
KEY = "op, torch.float16, 64, "


class Clock:
    """Ways by name, and what a call of each takes."""

    def __init__(self, **times):
        self.times, self.calls = times, []
        self.ways = {name: lambda name=name: self.calls.append(name) for name in times}

    def time(self, way):
        way()
        return self.times[self.calls[-1]]

    def fastest(self, case=CASE):
        return _tune.fastest("op", case, DEVICE, self.ways)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A GPU to all appearances, and a cache of its own."""
    monkeypatch.setattr(_tune, "_choices", {})
    monkeypatch.setattr(_tune, "_machine", lambda device: "a GPU")
    monkeypatch.setattr(_tune, "_time", lambda way: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FUSETUNE_TUNE", raising=False)
    return tmp_path / "fusetune" / "fastest.json"


@pytest.fixture
def start(monkeypatch):
    """Starts a clock, as in a new process."""

    def start(**times):
        clock = Clock(**times)
        monkeypatch.setattr(_tune, "_choices", {})
        monkeypatch.setattr(_tune, "_time", clock.time)
        return clock

    return start


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"plain": 1.0, "clever": 0.5}, "clever"),
        ({"plain": 1.0, "clever": 0.9, "cleverer": 0.8}, "cleverer"),
        ({"plain": 1.0, "clever": 1.5}, "plain"),
        ({"plain": 1.0, "clever": 0.99}, "plain"),  # too close to call
        ({"plain": 1.0}, "plain"),
    ],
    ids=str,
)
def test_the_fastest_is_chosen(start, times, chosen):
    assert start(**times).fastest() == chosen


def test_ways_take_turns_and_the_median_counts(start, monkeypatch):
    clock = start(plain=1.0, clever=0.5)
    slow = itertools.count()
    monkeypatch.setattr(_tune, "_time", lambda way: clock.time(way) + (100.0 if next(slow) in (1, 4) else 0.0))
    assert clock.fastest() == "clever"
    assert clock.calls == ["plain", "clever"] * (1 + _tune.ROUNDS)  # the first to compile


def test_a_case_is_measured_once(start, gpu, monkeypatch):
    clock = start(plain=1.0, clever=0.5)
    assert clock.fastest() == clock.fastest() == "clever"
    assert len(clock.calls) == 2 * (1 + _tune.ROUNDS)
    assert json.loads(gpu.read_text()) == {"a GPU": {KEY: "clever"}}
    later = start(plain=0.5, clever=1.0)
    assert later.fastest() == "clever"
    assert not later.calls
    assert later.fastest((1,)) == "plain"
    monkeypatch.setattr(_tune, "_machine", lambda device: "another")
    assert later.fastest() == "plain"
    assert json.loads(gpu.read_text()) == {"a GPU": {KEY: "clever", "op, 1": "plain"}, "another": {KEY: "plain"}}
    assert [path.name for path in gpu.parent.iterdir()] == ["fastest.json"]


def test_threads_measure_once(start, monkeypatch):
    clock = start(plain=1.0, clever=0.5)
    barrier = threading.Barrier(4)
    may_measure = _tune._may_measure
    monkeypatch.setattr(_tune, "_may_measure", lambda device: barrier.wait() >= 0 and may_measure(device))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert {call.result() for call in [pool.submit(clock.fastest) for _ in range(4)]} == {"clever"}
    assert len(clock.calls) == 2 * (1 + _tune.ROUNDS)


def forbid(monkeypatch, how):
    if how == "FUSETUNE_TUNE=0":
        monkeypatch.setenv("FUSETUNE_TUNE", "0")
    elif how == "graph capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif how == "tracing":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif how == "determinism":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setattr("test_tune.DEVICE", torch.device("cpu"))


@pytest.mark.parametrize("how", ["FUSETUNE_TUNE=0", "graph capture", "tracing", "determinism", "cpu"])
def test_where_nothing_may_be_measured_the_first_way_is_taken(start, gpu, monkeypatch, how):
    clock = start(plain=1.0, clever=0.5)
    with monkeypatch.context() as patch:
        forbid(patch, how)
        assert clock.fastest() == "plain"
        assert not clock.calls
        assert not gpu.exists()
    assert clock.fastest() == "clever"  # later, where it may be
    with monkeypatch.context() as patch:
        forbid(patch, how)
        assert clock.fastest() == ("clever" if how in ("graph capture", "tracing") else "plain")


def test_a_way_that_fails_is_not_chosen(start):
    clock = start(plain=1.0, clever=0.1, other=0.5)

    def fail():
        raise RuntimeError("out of resources")

    clock.ways["clever"] = fail
    assert clock.fastest() == "other"


def test_the_first_way_must_work(start, gpu):
    clock = start(plain=1.0, clever=0.1)

    def fail():
        raise RuntimeError("no memory")

    clock.ways["plain"] = fail
    with pytest.raises(RuntimeError, match="no memory"):
        clock.fastest()
    assert not gpu.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"7",
        b'{"a GPU": 3}',
        b'{"a GPU": {"op, torch.float16, 64, ": "a way of an older version"}}',
        b'{"a GPU": {"op, torch.float16, 64, ": ["plain"]}}',
        b"[" * 100000,
    ],
    ids=lambda content: str(content[:40]),
)
def test_a_file_that_is_corrupt_is_replaced(start, gpu, content):
    gpu.parent.mkdir()
    gpu.write_bytes(content)
    assert start(plain=1.0, clever=0.5).fastest() == "clever"
    assert json.loads(gpu.read_text()) == {"a GPU": {KEY: "clever"}}


def test_a_place_that_cannot_be_written_does_not_matter(start, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    clock = start(plain=1.0, clever=0.5)
    assert clock.fastest() == clock.fastest() == "clever"
    assert len(clock.calls) == 2 * (1 + _tune.ROUNDS)


def test_a_disk_that_is_full_leaves_the_file_as_it_was(start, gpu, monkeypatch):
    start(plain=1.0, clever=0.5).fastest()
    before = gpu.read_text()

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(json, "dump", full)
    assert start(plain=1.0, clever=0.5).fastest((1,)) == "clever"
    assert [path.name for path in gpu.parent.iterdir()] == ["fastest.json"]
    assert gpu.read_text() == before


@pytest.mark.parametrize("cache", [None, "", "relative"])
def test_the_folder_without_xdg_cache_home(monkeypatch, tmp_path, cache):
    """The XDG Base Directory Specification has relative paths ignored."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME") if cache is None else monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert _tune._file() == tmp_path / ".cache" / "fusetune" / "fastest.json"


def test_without_a_home(start, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert start(plain=1.0, clever=0.5).fastest() == "clever"


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_tune, "_choices", {})
    monkeypatch.setattr(_tune, "_store", lambda *args: None)
    x = torch.randn(2048, 2048, device=DEVICE)
    ways = {"four": lambda: [x @ x for _ in range(4)], "one": lambda: x @ x}
    assert _tune.fastest("op", ("on a GPU",), DEVICE, ways) == "one"
