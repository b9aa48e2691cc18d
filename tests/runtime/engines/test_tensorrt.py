"""Engines are really built here, by TensorRT-RTX, which needs no GPU; none can be run here."""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from histostream.runtime.bundle.card import CardError, read_card, write_card
from histostream.runtime.cuda import driver
from histostream.runtime.engines.tensorrt import build as tensorrt
from histostream.runtime.engines.tensorrt.build import (
    build_engine,
    build_plan,
    check_engine,
    choose_targets,
    default_profile,
    engine_name,
    engine_paths,
    fitting_engine,
)
from histostream.runtime.engines.tensorrt.file import (
    EngineHeader,
    Profile,
    read_engine,
    read_header,
    write_engine,
)
from histostream.runtime.engines.tensorrt.library import Library, find_library
from histostream.runtime.errors import EngineError
from histostream.wsi.errors import OutputError
from histostream.wsi.files import locked

pytestmark = pytest.mark.full

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx builds the engines; not installed")
STATIC = Profile(2, 2, 2, 128, 128, 3)


@pytest.fixture
def library() -> Library:
    return find_library("rtx")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's cache folder of a test; the real one is left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "histostream"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise AssertionError("an engine was built")

    monkeypatch.setattr(tensorrt, "build_plan", refuse)


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineHeader]:
    """Return the tiny bundle's engine, built once for the tests that only look at it."""
    out = tmp_path_factory.mktemp("built") / "model.fp32.rtx.engine"
    library = find_library("rtx")
    return out, build_engine(tiny_bundle, read_card(tiny_bundle), "fp32", library=library, out=out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Building


def test_an_engine_is_built_and_says_from_what(
    built: tuple[Path, EngineHeader], tiny_bundle: Path, library: Library
) -> None:
    path, header = built
    card = read_card(tiny_bundle)
    found, plan = read_engine(path)
    assert found == header
    assert plan.startswith(b"vtrt")
    assert len(plan) > 10_000
    assert header.card == card.digest()
    assert header.onnx_sha256 == hashlib.sha256((tiny_bundle / "model.onnx").read_bytes()).hexdigest()
    assert (header.library, header.library_version) == ("tensorrt-rtx", trt.__version__)
    assert header.profile == default_profile(card)
    assert check_engine(header, card, "fp32", library=library) == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_plan_carries_the_identity(built: tuple[Path, EngineHeader]) -> None:
    header, plan = read_engine(built[0])
    assert plan.count(header.identity.encode()) == 1
    assert json.loads(header.identity)["card"] == header.card


def test_a_static_build_is_repeatable_byte_for_byte(tiny_bundle: Path, library: Library, tmp_path: Path) -> None:
    """Not asserted for a range of batches: TensorRT-RTX 1.7.1 then orders the shape tensors of an
    Ampere plan by chance, so that two builds differ in a few names and offsets.
    """
    card = read_card(tiny_bundle)
    for name in ("one", "two"):
        build_engine(tiny_bundle, card, "fp32", library=library, profile=STATIC, out=tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_engine_that_is_already_there_is_kept(
    built: tuple[Path, EngineHeader], tiny_bundle: Path, library: Library, no_build: None
) -> None:
    path, header = built
    before = path.stat()
    card = read_card(tiny_bundle)
    assert build_engine(tiny_bundle, card, "fp32", library=library, out=path) == header
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_precision_that_the_bundle_has_not_is_named(
    tiny_bundle: Path, library: Library, tmp_path: Path, no_build: None
) -> None:
    card = read_card(tiny_bundle)
    with pytest.raises(CardError, match=r"has no model\.fp16\.onnx; it has model\.onnx"):
        build_engine(tiny_bundle, card, "fp16", library=library, out=tmp_path / "engine")
    with pytest.raises(EngineError, match="'fp8': use fp32, fp16, int8"):
        build_engine(tiny_bundle, card, "fp8", library=library, out=tmp_path / "engine")


def test_a_damaged_graph_is_not_built(bundle: Path, library: Library, tmp_path: Path, no_build: None) -> None:
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    with pytest.raises(CardError, match="does not match"):
        build_engine(bundle, read_card(bundle), "fp32", library=library, out=tmp_path / "engine")


def test_a_place_that_cannot_be_written_is_an_output_error(
    tiny_bundle: Path, library: Library, tmp_path: Path, no_build: None
) -> None:
    (tmp_path / "file").touch()
    card = read_card(tiny_bundle)
    with pytest.raises(OutputError, match="cannot write"):
        build_engine(tiny_bundle, card, "fp32", library=library, out=tmp_path / "file" / "engine")


def graph(*nodes: onnx.NodeProto, width: int = 128) -> bytes:
    tiles = helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", 128, width, 3])
    scores = helper.make_tensor_value_info("scores", TensorProto.UINT8, ["N", 3, 128, width])
    model = helper.make_model(
        helper.make_graph(list(nodes), "graph", [tiles], [scores]),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    content: bytes = model.SerializeToString()
    return content


PERMUTE = [
    helper.make_node("Cast", ["tiles"], ["float"], to=TensorProto.FLOAT),
    helper.make_node("Transpose", ["float"], ["moved"], perm=[0, 3, 1, 2]),
    helper.make_node("Cast", ["moved"], ["scores"], to=TensorProto.UINT8),
]


def test_a_graph_that_the_library_cannot_take_is_an_error_that_names_the_node(
    library: Library,
) -> None:
    early = helper.make_node("Transpose", ["tiles"], ["scores"], perm=[0, 3, 1, 2], name="early")
    with pytest.raises(EngineError, match=r"tensorrt-rtx 1.* node 'early' \(Transpose\)"):
        build_plan(graph(early), library=library, profile=STATIC, name="x")


def test_what_is_not_onnx_is_an_error(library: Library) -> None:
    with pytest.raises(EngineError, match="refuses the graph"):
        build_plan(b"no graph", library=library, profile=STATIC, name="x")


def test_a_graph_of_another_shape_is_an_error(library: Library) -> None:
    with pytest.raises(EngineError, match=r"takes \[\(-1, 128, 64, 3\)\], the profile is for"):
        build_plan(graph(*PERMUTE, width=64), library=library, profile=STATIC, name="x")


def test_a_graph_that_cannot_be_built_is_an_error_with_the_reason(library: Library) -> None:
    """An INT8 constant that nothing dequantises: the parser takes it, the builder does not."""
    constant = helper.make_node(
        "Constant", [], ["integer"], value=helper.make_tensor("v", TensorProto.INT8, [1, 3, 1, 1], [1, 2, 3])
    )
    shifted = [
        PERMUTE[0],
        PERMUTE[1],
        constant,
        helper.make_node("Cast", ["integer"], ["shift"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["moved", "shift"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["scores"], to=TensorProto.UINT8),
    ]
    with pytest.raises(EngineError, match=r"cannot build the engine: .*[Cc]onstant"):
        build_plan(graph(*shifted), library=library, profile=STATIC, name="x")


def test_the_library_prints_nothing(capfd: pytest.CaptureFixture[str], library: Library) -> None:
    build_plan(graph(*PERMUTE), library=library, profile=STATIC, name="x")
    with pytest.raises(EngineError):
        build_plan(b"no graph", library=library, profile=STATIC, name="x")
    assert capfd.readouterr() == ("", "")


# Targets


def test_the_default_is_every_target_from_ampere_on(library: Library) -> None:
    targets, compatibility = choose_targets(library, None)
    assert compatibility == "none"
    assert set(targets) == set(library.targets) - {"sm75"}
    assert {"sm80", "sm86", "sm89", "sm120"} <= set(targets)
    assert list(targets) == sorted(targets, key=lambda name: int(name[2:]))


def test_targets_are_ordered_and_each_is_kept_once(library: Library) -> None:
    assert choose_targets(library, ["sm120", "sm86", "sm86"])[0] == ("sm86", "sm120")


def test_turing_beside_others_is_warned_of(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    """Not asserted: that such a plan is the one for Turing alone, give or take the list itself
    (10,100,204 and 10,100,180 bytes for the shipped model, 10,080,604 for sm86; 1.7.1).
    """
    assert choose_targets(library, ["sm75"]) == (("sm75",), "none")
    assert not caplog.records
    assert choose_targets(library, ["sm86", "sm75"]) == (("sm75", "sm86"), "none")
    assert "build it alone" in caplog.text


@pytest.mark.parametrize("wrong", ["sm90", "sm100", "SM86", "", "current", "sm²"])
def test_a_target_that_the_library_does_not_have_is_refused_before_any_work(
    tiny_bundle: Path, library: Library, tmp_path: Path, no_build: None, wrong: str
) -> None:
    with pytest.raises(EngineError, match=r"it has sm75, sm80.* Hopper .*\[tensorrt\]"):
        build_engine(
            tiny_bundle,
            read_card(tiny_bundle),
            "fp32",
            library=library,
            targets=["sm86", wrong],
            out=tmp_path / "new" / "engine",
        )
    assert not (tmp_path / "new").exists()


def test_no_target_at_all_is_refused(library: Library) -> None:
    with pytest.raises(EngineError, match="at least one"):
        choose_targets(library, ())


# Does it fit?


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"card": "ab" * 32}, r"built for card abababab\.\.\., this bundle's is "),
        ({"precision": "fp16"}, "built in fp16, fp32 is requested"),
        ({"onnx_sha256": "cd" * 32}, r"built from model\.onnx cdcdcdcd\.\.\., this bundle's model\.onnx is "),
        ({"library_version": "1.6"}, r"built by tensorrt-rtx 1\.6, this is tensorrt-rtx 1\.7"),
        ({"library": "tensorrt"}, r"built by tensorrt 1\.7.*, this is tensorrt-rtx 1\.7"),
        ({"targets": ("sm80",)}, "built for sm80, this GPU is sm86"),
        ({"profile": Profile(1, 2, 16, 64, 128, 3)}, "built for tiles of 64 x 128 x 3, 128 x 128 x 3 are requested"),
    ],
)
def test_a_mismatch_names_both_sides(
    built: tuple[Path, EngineHeader],
    tiny_bundle: Path,
    library: Library,
    changes: dict[str, Any],
    message: str,
) -> None:
    card = read_card(tiny_bundle)
    wanted: dict[str, Any] = {"library": library, "device_sm": "sm86"}
    assert check_engine(built[1], card, "fp32", **wanted) == []
    (problem,) = check_engine(replace(built[1], **changes), card, "fp32", **wanted)
    assert re.match(message, problem), problem


def test_every_mismatch_is_named(built: tuple[Path, EngineHeader], tiny_bundle: Path, library: Library) -> None:
    header = replace(built[1], card="ab" * 32, library_version="1.6", targets=("sm75",))
    card = read_card(tiny_bundle)
    assert len(check_engine(header, card, "fp32", library=library, device_sm="sm90")) == 3


@pytest.mark.parametrize(("device_sm", "fits"), [("sm75", 0), ("sm86", 1), ("sm90", 1)])
def test_an_ampere_plus_engine_fits_from_ampere_on(
    built: tuple[Path, EngineHeader],
    tiny_bundle: Path,
    library: Library,
    device_sm: str,
    fits: bool,
) -> None:
    header = replace(built[1], targets=("sm80", "sm89"), compatibility="ampere_plus")
    card = read_card(tiny_bundle)
    problems = check_engine(header, card, "fp32", library=library, device_sm=device_sm)
    assert (problems == []) is bool(fits)


# Find one that fits, or build it


def test_the_first_engine_of_a_bundle_is_built_into_it(
    bundle: Path, library: Library, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(bundle)
    path = fitting_engine(bundle, "fp32", library=library)
    assert path == bundle / "engines" / "model.fp32.rtx.engine"
    assert check_engine(read_header(path), read_card(bundle), "fp32", library=library) == []
    after = contents(bundle)
    del after["engines/model.fp32.rtx.engine"]
    assert after == before
    assert not cache.exists()
    assert not caplog.records


def put_engine(bundle: Path, built: Path, library: Library, **changes: Any) -> Path:
    header, plan = read_engine(built)
    path = bundle / "engines" / engine_name("fp32", library)
    path.parent.mkdir(exist_ok=True)
    write_engine(path, replace(header, **changes), plan)
    return path


def test_an_engine_that_fits_is_returned(
    bundle: Path, built: tuple[Path, EngineHeader], library: Library, no_build: None
) -> None:
    path = put_engine(bundle, built[0], library)
    assert fitting_engine(bundle, "fp32", library=library) == path
    assert fitting_engine(bundle, "fp32", library=library, device_sm="sm89") == path


def test_an_engine_that_does_not_fit_is_replaced(
    bundle: Path,
    built: tuple[Path, EngineHeader],
    library: Library,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = put_engine(bundle, built[0], library, library_version="1.6.0", card="ab" * 32)
    (path.parent / "model.fp16.trt.engine").write_bytes(b"another")
    before = contents(bundle)
    assert fitting_engine(bundle, "fp32", library=library) == path
    assert read_header(path).library_version == library.version
    changed = {name for name, content in contents(bundle).items() if before.get(name) != content}
    assert changed == {"engines/model.fp32.rtx.engine"}
    assert contents(bundle).keys() == before.keys()
    first, second = (record.getMessage() for record in caplog.records)
    assert "built for card abababab..., this bundle's is " in first
    assert f"built by tensorrt-rtx 1.6.0, this is {library}: building it again" in second


def test_a_damaged_engine_is_replaced(
    bundle: Path,
    built: tuple[Path, EngineHeader],
    library: Library,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = put_engine(bundle, built[0], library)
    path.write_bytes(path.read_bytes()[:-100])
    assert fitting_engine(bundle, "fp32", library=library) == path
    read_engine(path)
    assert "truncated" in caplog.text


def test_a_changed_card_has_the_engine_built_again(bundle: Path, library: Library) -> None:
    path = fitting_engine(bundle, "fp32", library=library)
    write_card(replace(read_card(bundle), note="changed"), bundle)
    assert fitting_engine(bundle, "fp32", library=library) == path
    assert read_header(path).card == read_card(bundle).digest()


def test_a_gpu_outside_the_default_gets_its_own_engine(bundle: Path, library: Library) -> None:
    path = fitting_engine(bundle, "fp32", library=library, device_sm="sm75")
    assert read_header(path).targets == ("sm75",)


def test_a_gpu_that_the_library_has_not_is_an_error_not_a_build(bundle: Path, library: Library, no_build: None) -> None:
    with pytest.raises(EngineError, match="cannot build for sm90"):
        fitting_engine(bundle, "fp32", library=library, device_sm="sm90")


def test_a_bundle_that_cannot_be_written_has_its_engine_in_the_cache(
    bundle: Path, library: Library, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the folder should be: the tests may run as root, whom no permission stops."""
    (bundle / "engines").write_text("in the way")
    before = contents(bundle)
    path = fitting_engine(bundle, "fp32", library=library)
    card = read_card(bundle)
    assert path == cache / "engines" / card.digest()[:16] / "model.fp32.rtx.engine"
    assert contents(bundle) == before
    monkeypatch.setattr(tensorrt, "build_plan", None)
    assert fitting_engine(bundle, "fp32", library=library) == path


def test_two_models_have_two_places_in_the_cache(tiny_bundle: Path, library: Library) -> None:
    card = read_card(tiny_bundle)
    other = replace(card, note="another")
    places = {engine_paths(tiny_bundle, c, "fp32", library)[1] for c in (card, other)}
    assert len(places) == 2


def test_nowhere_to_write_is_an_output_error(bundle: Path, library: Library, cache: Path, no_build: None) -> None:
    (bundle / "engines").write_text("in the way")
    cache.parent.mkdir()
    cache.write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        fitting_engine(bundle, "fp32", library=library)


# Several processes

BUILD = """
import logging, sys
from pathlib import Path
from histostream.runtime.engines.tensorrt import build as tensorrt
from histostream.runtime.engines.tensorrt.library import find_library
build, builds = tensorrt.build_plan, []
tensorrt.build_plan = lambda *args, **options: builds.append(1) or build(*args, **options)
path = tensorrt.fitting_engine(Path(sys.argv[1]), "fp32", library=find_library("rtx"))
print(len(builds), path)
"""


def test_two_processes_that_build_at_once_end_with_one_engine(bundle: Path, library: Library) -> None:
    command = [sys.executable, "-c", BUILD, str(bundle)]
    path = bundle / "engines" / "model.fp32.rtx.engine"
    path.parent.mkdir()
    with locked(path):  # so that both have begun before either can build
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        time.sleep(2)
        assert not path.exists()
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(builds for builds, _ in outputs) == ["0", "1"]
    assert {where for _, where in outputs} == {str(path)}
    header, _ = read_engine(path)
    assert check_engine(header, read_card(bundle), "fp32", library=library) == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_who_waits_says_so(
    bundle: Path, built: tuple[Path, EngineHeader], library: Library, caplog: pytest.LogCaptureFixture, no_build: None
) -> None:
    caplog.set_level(logging.INFO)
    out = bundle / "engines" / "model.fp32.rtx.engine"
    card = read_card(bundle)
    done: list[EngineHeader] = []

    def build() -> None:
        done.append(build_engine(bundle, card, "fp32", library=library, out=out))

    thread = threading.Thread(target=build)
    out.parent.mkdir()
    with locked(out):
        thread.start()
        end = time.monotonic() + 20
        while "waiting for another process" not in caplog.text and time.monotonic() < end:
            time.sleep(0.01)
        shutil.copy(built[0], out)  # what the holder built
    thread.join(20)
    assert done == [built[1]]
    assert f"{out}: waiting for another process" in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from histostream.runtime.engines.tensorrt import build as tensorrt
from histostream.runtime.engines.tensorrt.library import find_library
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
tensorrt.fitting_engine(Path(sys.argv[1]), "fp32", library=find_library("rtx"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_a_builder_that_is_killed_leaves_nothing_that_looks_whole(bundle: Path, library: Library) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(bundle)], check=False)
    assert done.returncode == -signal.SIGKILL
    path = bundle / "engines" / "model.fp32.rtx.engine"
    left = {p.name for p in path.parent.iterdir()}
    assert path.name not in left
    assert any(name.endswith(".part") for name in left)
    assert fitting_engine(bundle, "fp32", library=library) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    read_engine(path)


# The library


def test_a_library_is_found_by_name() -> None:
    library = find_library("rtx")
    assert str(library) == f"tensorrt-rtx {trt.__version__}"
    with pytest.raises(EngineError, match="'trt': use auto, tensorrt, rtx"):
        find_library("trt")


def test_auto_without_a_gpu_is_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "gpu_sm", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10"))
    assert find_library().name == "tensorrt-rtx"


def test_auto_with_a_gpu_is_tensorrt_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "gpu_sm", lambda: "sm86")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10"))
    assert find_library().name == "tensorrt"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert find_library().name == "tensorrt-rtx"


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"pip install .*\[tensorrt\]'"):
        find_library("tensorrt")
    with pytest.raises(EngineError, match=r"\[rtx\]' .*\[tensorrt\]'"):
        find_library()


# TensorRT 10 and 11, as far as they can be had here


class Flags10(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class Flags11(enum.IntEnum):
    EXPLICIT_BATCH = 0


class NativeStandIn:
    """TensorRT 10 or 11, played by TensorRT-RTX.

    The native library cannot be installed where these tests run: its wheels are not on PyPI, and
    it builds nothing without a GPU. This wraps the real TensorRT-RTX module, so network, parser,
    profile and plan are real, and plays what differs: the flag that makes TensorRT 10 strongly
    typed and that 11 has not, the timing cache, the hardware compatibility level, and that there
    is no list of compute capabilities. It shows that the calls are made; not that they work.
    """

    __name__ = "tensorrt"

    def __init__(self, major: int) -> None:
        self.__version__ = f"{major}.1.0"
        self.major = major
        self.configs: list[Any] = []
        self.meanwhile: Any = None  # called while a plan is built
        self.NetworkDefinitionCreationFlag: Any = Flags10 if major == 10 else Flags11

    def __getattr__(self, name: str) -> Any:
        if name == "ComputeCapability":
            raise AttributeError(name)
        return getattr(trt, name)

    def Builder(self, logger: Any) -> Any:
        return StandInBuilder(self, trt.Builder(logger))


class StandInBuilder:
    def __init__(self, module: NativeStandIn, real: Any) -> None:
        self.module, self.real = module, real

    def create_network(self, flags: int) -> Any:
        assert flags == (2 if self.module.major == 10 else 0), "not strongly typed"
        return self.real.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def create_optimization_profile(self) -> Any:
        return self.real.create_optimization_profile()

    def create_builder_config(self) -> Any:
        config = StandInConfig(self.real.create_builder_config())
        self.module.configs.append(config)
        return config

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        assert not config.real.get_flag(trt.BuilderFlag.TF32)
        config.real.num_compute_capabilities = 1
        config.real.set_compute_capability(trt.ComputeCapability.SM86, 0)
        config.cache.content.add(b"conv")
        if self.module.meanwhile:
            self.module.meanwhile()
        return self.real.build_serialized_network(network, config.real)


class StandInConfig:
    def __init__(self, real: Any) -> None:
        self.real = real
        self.cache = StandInTimings(b"")
        self.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE

    def clear_flag(self, flag: Any) -> None:
        self.real.clear_flag(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        index: int = self.real.add_optimization_profile(profile)
        return index

    def create_timing_cache(self, content: bytes) -> Any:
        return StandInTimings(content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if b"damaged" in cache.content:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


class StandInTimings:
    def __init__(self, content: bytes) -> None:
        self.content = set(content.split())

    def combine(self, other: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.content |= other.content
        return True

    def serialize(self) -> Any:
        return memoryview(b" ".join(sorted(self.content)))


@pytest.fixture(params=[10, 11], ids=["tensorrt 10", "tensorrt 11"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setattr(driver, "gpu_sm", lambda: "sm86")
    monkeypatch.setitem(sys.modules, "tensorrt", NativeStandIn(request.param))
    return find_library()


def test_tensorrt_builds_for_the_gpu_at_hand(bundle: Path, native: Library) -> None:
    """With `NativeStandIn`: the native library cannot be installed here."""
    path = fitting_engine(bundle, "fp32", library=native)
    assert path.name == "model.fp32.trt.engine"
    header, _ = read_engine(path)
    assert (header.targets, header.compatibility) == (("sm86",), "none")
    assert str(native) == f"{header.library} {header.library_version}"
    assert fitting_engine(bundle, "fp32", library=native, device_sm="sm86") == path
    (problem,) = check_engine(header, read_card(bundle), "fp32", library=native, device_sm="sm89")
    assert problem == "built for sm86, this GPU is sm89"


def test_tensorrt_keeps_its_timings(
    tiny_bundle: Path, native: Library, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With `NativeStandIn`: the native library cannot be installed here."""
    content = graph(*PERMUTE)
    path = cache / f"timing-{native.version}-sm86.cache"
    build_plan(content, library=native, profile=STATIC, name="x")
    assert path.read_bytes() == b"conv"
    path.write_bytes(b"conv earlier")
    native.module.meanwhile = lambda: path.write_bytes(b"conv other")  # another process's build
    build_plan(content, library=native, profile=STATIC, name="x")
    assert path.read_bytes() == b"conv earlier other"
    native.module.meanwhile = None
    assert not caplog.records
    path.write_bytes(b"damaged")
    build_plan(content, library=native, profile=STATIC, name="x")
    assert "cannot be used here, measuring again" in caplog.text
    assert {p.name for p in cache.iterdir()} == {path.name}


def test_timings_that_cannot_be_kept_cost_no_engine(
    native: Library, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With `NativeStandIn`: the native library cannot be installed here."""
    cache.parent.mkdir()
    cache.write_text("in the way")
    assert build_plan(graph(*PERMUTE), library=native, profile=STATIC, name="x")
    assert "are not stored" in caplog.text


def test_tensorrt_makes_one_engine_for_several_from_ampere_on(
    tiny_bundle: Path, native: Library, tmp_path: Path
) -> None:
    """With `NativeStandIn`: the native library cannot be installed here."""
    header = build_engine(
        tiny_bundle,
        read_card(tiny_bundle),
        "fp32",
        library=native,
        targets=["sm90", "sm86"],
        out=tmp_path / "engine",
    )
    assert (header.targets, header.compatibility) == (("sm86", "sm90"), "ampere_plus")
    level = native.module.configs[0].hardware_compatibility_level
    assert level == trt.HardwareCompatibilityLevel.AMPERE_PLUS


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["sm90"], "builds for the GPU of this machine, which is sm86, not for sm90"),
        (["sm75", "sm86"], "only for GPUs from Ampere"),
        ([], "at least one"),
    ],
)
def test_tensorrt_refuses_other_gpus(native: Library, targets: list[str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        choose_targets(native, targets)


def test_tensorrt_without_a_gpu_is_an_error_before_any_work(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "gpu_sm", lambda: None)
    with pytest.raises(EngineError, match=r"none is usable here.*\[rtx\]"):
        choose_targets(native, None)
