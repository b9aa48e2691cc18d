"""The doctor finds what is here and what is missing, and says what to do about it."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from histostream.benchmarks.cli import main
from histostream.runtime import doctor
from histostream.runtime.cuda import driver
from histostream.runtime.doctor import examine
from histostream.runtime.engines import cpu, cuda
from histostream.runtime.engines.onnxruntime import TINY_MODEL
from histostream.runtime.finding import ABSENT, BROKEN, MISSING, OK, Finding
from histostream.runtime.hardware import hardware
from histostream.wsi.optional import install_command


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def set_driver(monkeypatch: pytest.MonkeyPatch, *, present: bool) -> None:
    """Let the machine have no driver, or one that sees no GPU."""

    def get_version(number: Any) -> int:
        number._obj.value = 13000
        return 0

    library = SimpleNamespace(cuDriverGetVersion=get_version) if present else None
    problem = "the driver sees no GPU" if present else "no NVIDIA driver (libcuda.so.1 is not here)"
    monkeypatch.setattr(driver, "_start_driver", lambda: (library, 0, problem))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make modules look as if they were not installed."""

    def hide(*names: str) -> None:
        for name in names:
            for loaded in list(sys.modules):
                if loaded.startswith(f"{name}."):
                    monkeypatch.delitem(sys.modules, loaded)
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_doctor_finds_this_machine_whole() -> None:
    done = bench("doctor")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {OK, ABSENT, MISSING}
    names = [line[8:].split(":")[0] for line in lines]
    assert len(names) == len(set(names)), "one thing, one line"
    assert {
        "Python",
        "processor",
        "NVIDIA driver",
        "ONNX Runtime",
        "OpenVINO",
        "large-image",
        "decoding",
        "cache folder",
    } <= set(names)
    for line in lines:
        if line.startswith(MISSING):
            assert "; " in line, f"no advice: {line}"
    assert names[-1] == "verdict"
    assert "ready: CPU" in lines[-1]


@pytest.mark.parametrize("present", [False, True])
def test_doctor_looks_for_what_a_gpu_needs_only_where_a_gpu_could_be(
    present: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_driver(monkeypatch, present=present)
    monkeypatch.setattr(cuda, "find_cuda_library", lambda name: name == "cudart" and "cudart.so")
    found = by_name(examine())
    for name in ("CUDA libraries", "CUDAExecutionProvider", "TensorRT", "cuda-python"):
        assert (name in found) is present, name
    if present:
        libraries = found["CUDA libraries"]
        assert (libraries.status, libraries.said) == (
            MISSING,
            "no cublas, cublasLt, cufft, curand, nvrtc, cudnn; found cudart.so",
        )
    assert found["verdict"].said == "ready: CPU"
    assert "pip" in found["verdict"].advice
    assert "[cuda]" in found["verdict"].advice


def test_the_verdict_knows_a_gpu_that_works() -> None:
    findings = [Finding("NVIDIA driver", OK, ""), Finding("CUDAExecutionProvider", OK, "ran")]
    assert str(doctor.verdict(findings)) == "ok      verdict: ready: CPU and GPU"
    broken = [*findings, Finding("large-image", BROKEN, "cannot be loaded")]
    assert doctor.verdict(broken).status == BROKEN


def test_doctor_says_in_json_what_it_says_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("a", OK, "here"), Finding("b", MISSING, "not here", "install it")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    done = bench("doctor", "--json")
    assert done.exit_code == 0
    assert [Finding(**row) for row in json.loads(done.stdout)] == findings


def test_doctor_goes_without_everything_that_is_optional(without: Any) -> None:
    without("tensorrt", "tensorrt_rtx", "openvino", "torch", "onnx", "matplotlib", "cuda")
    found = by_name(examine())
    assert {f.status for f in found.values()} <= {OK, ABSENT, MISSING}
    extras = {"OpenVINO": "openvino", "torch": "export", "onnx": "export", "matplotlib": "bench"}
    for name, extra in extras.items():
        assert found[name].status == MISSING
        assert install_command(extra) in found[name].advice
    assert found["CPUExecutionProvider"].status == OK


def test_doctor_says_that_it_is_broken_without_what_is_needed(without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without("onnxruntime", "large_image")
    found = by_name(examine())
    assert found["ONNX Runtime"].status == found["large-image"].status == BROKEN
    monkeypatch.setattr(doctor, "examine", lambda: list(found.values()))
    assert bench("doctor").exit_code == 1


def test_doctor_finds_two_packages_that_overwrite_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "1.22.0" if n.startswith("onnxruntime") else real(n))
    found = {f.name: f for f in cpu.check()}
    assert found["ONNX Runtime"].status == BROKEN
    assert "onnxruntime 1.22.0 and onnxruntime-gpu 1.22.0" in found["ONNX Runtime"].said
    assert "pip uninstall" in found["ONNX Runtime"].advice


def test_an_error_that_nobody_foresaw_costs_one_line_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(folder: Path) -> None:
        raise ZeroDivisionError("no disk")

    monkeypatch.setattr("shutil.disk_usage", fails)
    found = by_name(examine())
    assert found["disk"].status == BROKEN
    assert "no disk" in found["disk"].said
    assert found["decoding"].status == OK


def test_the_tiny_model_of_the_doctor_is_a_valid_graph() -> None:
    onnx.checker.check_model(onnx.load_from_string(TINY_MODEL))


def test_hardware_names_what_there_is() -> None:
    machine = hardware()
    assert machine["cpu"]
    assert isinstance(machine["cores"], int)
    assert machine["cores"] >= 1
    assert isinstance(machine["gpus"], list)
    json.dumps(machine)
