"""`fusetune info`: what it reports agrees with the parts that it asks, and it works where they are missing."""

import importlib.metadata
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fusetune
from fusetune import _native, _tune, backend, info


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch):
    monkeypatch.delenv("FUSETUNE_BACKEND", raising=False)
    monkeypatch.delenv("FUSETUNE_ISA", raising=False)


def fresh(code="", **environment):
    """The report and its text in a fresh process, after running code there."""
    code += "\nimport json\nfrom fusetune import info\nreport = info.report()"
    code += "\nprint(json.dumps([report, info._text(report)]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_versions_and_machine():
    report = info.report()
    assert report["fusetune"] == fusetune.__version__ == importlib.metadata.version("fusetune")
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert set(report["packages"]) == {"torch", "transformers", "peft", "triton"}
    assert report["cpu"]["name"]
    assert report["cpu"]["cores"] >= 1
    assert report["extension"]["compiler"]


def test_threads_are_those_that_the_kernels_get():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert info.report()["cpu"]["threads"] == _native.threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", _native.extension().isa_available())
def test_isa_in_use(level, monkeypatch):
    extension = _native.extension()
    before = extension.isa()
    try:
        extension.set_isa(level)
        monkeypatch.setenv("FUSETUNE_ISA", level)
        report = info.report()
    finally:
        extension.set_isa(before)
    assert (report["isa"]["in_use"], report["isa"]["forced"]) == (level, level)
    assert report["isa"]["available"] == extension.isa_available()
    assert report["isa"]["built"] == extension.isa_built()
    assert f"FUSETUNE_ISA={level}" in info._text(report)


def test_unknown_isa_is_a_problem():
    report, text = fresh(FUSETUNE_ISA="sse9")
    assert report["isa"]["in_use"] is None
    assert any("FUSETUNE_ISA: must be one of" in problem and "sse9" in problem for problem in report["problems"])
    assert "problem: FUSETUNE_ISA: must be one of" in text


@pytest.mark.parametrize("device_type", info.DEVICES)
@pytest.mark.parametrize("op", backend.BACKENDS)
def test_backends_are_those_that_ops_take(op, device_type):
    choice = info.report()["backends"][op][device_type]
    missing = {name: backend.why_not(name, device_type) for name in backend.BACKENDS[op][device_type]}
    assert choice["why_not"] == {name: why for name, why in missing.items() if why}
    if len(choice["why_not"]) == len(missing):
        assert choice["takes"] is None
    else:
        assert choice["takes"] == backend.choose(op, torch.device(device_type))


@pytest.mark.parametrize(("forced", "takes"), [("reference", "reference"), ("abacus", None)])
def test_forced_backend(forced, takes, monkeypatch):
    monkeypatch.setenv("FUSETUNE_BACKEND", forced)
    report = info.report()
    assert {choice["takes"] for devices in report["backends"].values() for choice in devices.values()} == {takes}
    assert any("FUSETUNE_BACKEND: must be one of" in problem for problem in report["problems"]) == (takes is None)


def test_reasons_are_printed():
    text = info._text(info.report())
    for op, devices in backend.BACKENDS.items():
        assert any(line.startswith(op + " ") for line in text.splitlines())
        for device, names in devices.items():
            for name in names:
                if why := backend.why_not(name, device):
                    assert any(f"{name} on {device}" in line and why in line for line in text.splitlines())


def test_without_torch():
    report, text = fresh(
        "import sys; sys.modules['torch'] = None"
    )  # its metadata is there, as in a broken installation
    assert report["cpu"]["name"]
    assert report["backends"] == {}
    assert len(report["problems"]) == 1
    assert "torch cannot be imported" in report["problems"][0]
    assert "problem: torch cannot be imported" in text


def test_without_extension():
    report, text = fresh("import sys; sys.modules['fusetune._C'] = None")
    assert any("the compiled extension cannot be imported" in problem for problem in report["problems"])
    assert report["isa"]["in_use"] is None
    assert all(devices["cpu"]["takes"] != "cpu" for devices in report["backends"].values())
    assert "problem: fusetune: the compiled extension cannot be imported" in text


def test_one_openmp_runtime():
    (runtime,) = fresh()[0]["openmp"]  # the extension shares torch's
    assert "libgomp" in runtime


def test_two_openmp_runtimes_are_a_problem(monkeypatch):
    monkeypatch.setattr(info, "_openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libgomp-a34b3233.so.1"])
    problems = info.report()["problems"]
    assert len(problems) == 1
    assert "2 OpenMP runtimes are loaded" in problems[0]
    assert "/b/libgomp-a34b3233.so.1" in problems[0]


def test_gpu(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_tune, "measured", lambda device: {"flash_attention, a case": f"cuda on {device}"})
    report = info.report()
    assert report["gpu"] == {
        "devices": [{"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 141.0}],
        "why_not": None,
    }
    assert "NVIDIA H200 (sm_90, 141.0 GiB)" in info._text(report)
    assert "flash_attention, a case  cuda on cuda:0" in info._ops_text(report)


def test_no_gpu_has_a_reason():
    if not torch.cuda.is_available():
        assert info.report()["gpu"]["why_not"] == backend.why_not("cuda", "cuda") is not None


def test_json_is_the_report(capsys):
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.report()


def test_unknown_argument(capsys):
    with pytest.raises(SystemExit) as exit:
        info.main(["--yaml"])
    assert exit.value.code == 2
    assert "--yaml" in capsys.readouterr().err


def test_ops_says_why(capsys):
    assert info.main(["--ops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    attention = next(line for line in lines if line.startswith("flash_attention"))
    assert attention.split()[:3] == ["flash_attention", "cpu", "cpu"]
    assert len(attention.split()) > 6
    for op in backend.BACKENDS:
        assert any(line.startswith(f"{op} ") for line in lines)


def test_ops_says_what_is_forced(monkeypatch):
    monkeypatch.setenv("FUSETUNE_BACKEND", "cpu")
    assert "FUSETUNE_BACKEND forces it" in info._ops_text(info.report())
