"""Opening devices, compiling and keeping kernels, and the engines that run on device memory.

There is no GPU here. ``cuda/cuda_python.py`` itself runs, in a process of its own, on a driver
whose GPU is host memory (`host_device.fake_driver`); what only a GPU can show is marked ``gpu``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from histostream.runtime.bundle.card import Scores, read_card
from histostream.runtime.cuda import kernels
from histostream.runtime.cuda.base import BINDINGS, DeviceError, DeviceMemoryError, open_device
from histostream.runtime.cuda.driver import gpu_count
from histostream.runtime.engines.cuda import OnnxRuntimeDeviceEngine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.engines.tensorrt.file import EngineHeader, Profile
from histostream.runtime.engines.tensorrt.library import Library, messages
from histostream.runtime.engines.tensorrt.run import TensorRtEngine, deserialise
from histostream.runtime.errors import EngineError
from histostream.runtime.options import Options
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.records import to_json
from tests.runtime.conftest import as_scores, as_shares, random_pixels, write_slide
from tests.runtime.host_device import HostDevice, HostStreamQueue, array_at, fake_driver
from tests.runtime.stream.test_device import assert_same, results

NO_GPU = pytest.mark.skipif(gpu_count() > 0, reason="a GPU is here")
needs_cuda_python = pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-python is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def on_fake_driver(code: str, **environment: str) -> str:
    """Run code in a process that finds the stand-in for a driver; returns what it prints."""
    found = {**os.environ, **environment, "LD_LIBRARY_PATH": str(fake_driver())}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=found,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_devices_and_backends_loads_nothing_of_cuda() -> None:
    code = """
        import sys
        import histostream.runtime.cuda.cuda_python, histostream.runtime.cuda.pycuda
        import histostream.runtime.engines.tensorrt.run, histostream.runtime.engines.cuda
        import histostream.runtime.cli
        roots = {name.split(".")[0] for name in sys.modules}
        print(sorted(roots & {"cuda", "pycuda", "tensorrt", "tensorrt_rtx", "onnxruntime"}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@NO_GPU
@needs_cuda_python
def test_a_machine_without_a_driver_is_an_error_in_one_line() -> None:
    with pytest.raises(DeviceError, match=r"no NVIDIA driver.*--backend cpu") as caught:
        open_device()
    assert "\n" not in str(caught.value)


def test_a_binding_that_is_not_installed_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(DeviceError, match=r"cuda-python: .*pycuda: .*\[cuda\]"):
        open_device()
    with pytest.raises(DeviceError, match="no binding is called 'opencl'"):
        open_device(binding="opencl")


@needs_cuda_python
def test_cuda_python_moves_bytes_and_captures_graphs() -> None:
    printed = on_fake_driver("""
        import ctypes
        import numpy as np
        from histostream.runtime.cuda.base import DeviceError, DeviceMemoryError, open_device
        device = open_device()
        print(device.name, device.sm, device.total_bytes, device.multiprocessors, device.graphs)
        stream, start, end = device.stream(), device.event(), device.event()
        up, down = device.pinned(100), device.pinned(100)
        up[:] = np.arange(100)
        one, two = device.alloc(100), device.alloc(100)
        start.record(stream)
        device.upload(one, up, stream)
        device.zero(one + 10, 5, stream)
        device.copy(two, one, 100, stream)
        device.download(down, two, stream)
        end.record(stream)
        stream.wait(end)
        stream.synchronize()
        wanted = np.arange(100)
        wanted[10:15] = 0
        assert (down == wanted).all()
        assert end.elapsed_ms(start) == 1.5
        assert device.free_bytes() == device.total_bytes - 200
        graph = device.capture(stream, lambda: device.zero(one, 100, stream))
        device.download(down, one, stream)
        assert down[20] == 20
        graph.launch(stream)
        device.download(down, one, stream)
        assert not down.any()
        graph.close()
        graph.close()
        device.free(two)
        device.unpin(up)
        for wrong, kind in ((lambda: device.alloc(1 << 40), DeviceMemoryError),
                            (lambda: device.call("cuMemFree", 5), DeviceError)):
            try:
                wrong()
            except kind as error:
                print(error)
        try:
            open_device(3)
        except DeviceError as error:
            print(error)
        device.close()
        device.close()
        print(ctypes.CDLL("libcuda.so.1").fake_taken())
    """)
    lines = printed.splitlines()
    assert lines[0] == f"fake GPU sm90 {1 << 30} 7 True"
    assert lines[1].startswith(f"GPU 0 (fake GPU): no {1 << 40} bytes of device memory left; ")
    assert lines[2].startswith("GPU 0: cuMemFree failed (CUDA_ERROR_INVALID_VALUE: in words); ")
    assert lines[3] == "there is no GPU 3: the driver sees 1; --device counts from 0"
    assert lines[4] == "0"  # everything was given back


@needs_cuda_python
def test_a_slide_streams_through_cuda_python(tmp_path: Path) -> None:
    """The whole way with the real binding and the real kernels, but for the GPU."""
    path = write_slide(tmp_path / "slide.tif", random_pixels(301, 217))
    out = str(tmp_path)
    code = f"""
        import ctypes, logging
        from pathlib import Path
        from histostream.runtime.cuda.base import open_device
        from histostream.runtime.slide_run import segment_slide
        from histostream.runtime.options import Options
        from histostream.wsi.records import to_json
        from tests.runtime.conftest import PlaceDependentEngine
        from tests.runtime.host_device import HostDeviceEngine, HostStreamQueue

        class Engine(HostDeviceEngine):
            def infer_device(self, tiles, scores, n, stream):
                stream.synchronize()
                queue = HostStreamQueue(self, 0)
                self.capturing = None
                super().infer_device(tiles, scores, n, queue)
                queue.step()

        logging.basicConfig(level=logging.INFO)
        options = Options(tissue=False, overlap_px=16, probabilities=True)
        engine = Engine(PlaceDependentEngine(), open_device())
        path, out = Path({str(path)!r}), Path({out!r})
        run = segment_slide(path, engine, out / "device", options)
        segment_slide(path, PlaceDependentEngine(), out / "host", options)
        engine.close()
        print(to_json(run.run)["device"]["name"], ctypes.CDLL("libcuda.so.1").fake_taken())
    """
    # NVRTC crashes beside this driver, which is not all of one: it finds the kernels compiled.
    version = kernels.compiler_version()
    kernels.load_kernels("sm90", version, lambda text: kernels.compile_cubin(text, "sm90"), bytes)
    assert on_fake_driver(code) == "fake GPU 0\n"
    assert_same(results(tmp_path / "device" / "slide"), results(tmp_path / "host" / "slide"))


@needs_cuda_python
def test_a_driver_without_a_gpu_is_an_error() -> None:
    printed = on_fake_driver(
        """
        from histostream.runtime.cuda.base import DeviceError, open_device
        try:
            open_device()
        except DeviceError as error:
            print(error)
        """,
        FAKE_NO_DEVICE="1",
    )
    assert printed.startswith("the NVIDIA driver does not start (CUDA_ERROR_NO_DEVICE)")


def test_kernels_are_compiled_once(cache: Path) -> None:
    compiled: list[str] = []

    def compile_source(source: str) -> bytes:
        compiled.append(source)
        return b"code"

    for _ in range(2):
        assert kernels.load_kernels("sm90", "nvrtc 1", compile_source, bytes) == b"code"
    assert len(compiled) == 1
    kernels.load_kernels("sm80", "nvrtc 1", compile_source, bytes)
    kernels.load_kernels("sm90", "nvrtc 2", compile_source, bytes)
    assert len(compiled) == 3
    assert len(list((cache / "histostream" / "kernels").iterdir())) == 3


def test_kept_kernels_that_do_not_load_are_compiled_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load(image: bytes) -> bytes:
        if image != b"code":
            raise DeviceError("invalid image")
        return image

    path = kernels.kernels_path("sm90", "nvrtc 1")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    assert path.is_relative_to(cache)
    assert kernels.load_kernels("sm90", "nvrtc 1", lambda _: b"code", load) == b"code"
    assert path.read_bytes() == b"code"
    assert "compiling again" in caplog.text
    path.unlink()
    with pytest.raises(DeviceError, match="invalid image"):  # it is not the file's fault
        kernels.load_kernels("sm90", "nvrtc 1", lambda _: b"worse", load)


def test_kernels_are_compiled_where_they_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernels.load_kernels("sm90", "nvrtc 1", lambda _: b"code", bytes) == b"code"


@NO_GPU
@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_a_gpu_that_is_demanded_is_not_replaced(tiny_bundle: Path, backend: str) -> None:
    with pytest.raises(EngineError, match=f"backend '{backend}': ") as caught:
        open_engine(tiny_bundle, backend=backend)
    assert "\n" not in str(caught.value)


@needs_cuda_python
def test_auto_says_why_a_gpu_is_not_used(tiny_bundle: Path) -> None:
    printed = on_fake_driver(f"""
        import logging
        from pathlib import Path
        from histostream.runtime.engines.opener import open_engine
        records = []
        class Keep(logging.Handler):
            def emit(self, record):
                records.append(record.getMessage())
        logging.getLogger("histostream").addHandler(Keep())
        print(open_engine(Path({str(tiny_bundle)!r})).name)
        print("\\n".join(records))
    """)
    name, *why = printed.splitlines()
    assert name.split()[0] == "onnxruntime"
    assert name.split()[2:] == ["cpu", "fp32"]
    assert "tensorrt: " in why[0]
    assert "cuda: " in why[0]


class AtOnce(HostStreamQueue):
    """A stream whose work is done when it is queued."""

    def queue(self, work: Callable[[], None]) -> None:
        work()


def test_onnxruntime_runs_on_addresses(tiny_bundle: Path) -> None:
    """IO binding, on the CPU's memory: the addresses and shapes are those of a GPU."""
    import onnxruntime

    engine = open_engine(tiny_bundle, backend="cpu")
    tiles = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)
    wanted = engine.infer(tiles)
    session = onnxruntime.InferenceSession(tiny_bundle / "model.onnx", providers=["CPUExecutionProvider"])
    device = HostDevice()
    bound = OnnxRuntimeDeviceEngine(
        session, engine.card, "bound", device=device, stream=AtOnce(device, 1), graphs=True, memory_kind="cpu"
    )
    at, scores_at = bound.buffers(5)
    array_at(at, tiles.shape)[...] = tiles
    bound.infer_device(at, scores_at, 5, bound.stream)
    np.testing.assert_array_equal(array_at(scores_at, wanted.shape, np.float16), wanted)
    array_at(at, tiles.shape)[:2] = tiles[3:]
    bound.infer_device(at, scores_at, 2, bound.stream)
    np.testing.assert_array_equal(array_at(scores_at, (2, 3, 128, 128), np.float16), wanted[3:])
    bound.close()


def test_a_plan_that_does_not_load_is_an_error_with_the_librarys_reason(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    library = Library("tensorrt-rtx", trt.__version__, trt)
    logger = messages(trt)
    with pytest.raises(EngineError, match=r"a\.engine: tensorrt-rtx .* cannot load it") as caught:
        deserialise(library, b"not a plan" * 20, tmp_path / "a.engine", logger)
    assert "no reason given" not in str(caught.value)


class FakeContext:
    """An execution context that computes on host memory, as strict as NVIDIA's guide asks."""

    def __init__(self, engine: FakeTensorRt) -> None:
        self.engine, self.captured = engine, False
        self.shape: tuple[int, ...] = ()
        self.at: dict[str, int] = {}
        self.flushed: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.captured, "a context that a graph was captured from was changed"
        self.shape = shape
        return name == "tiles" and shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.captured
        self.at[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        device = self.engine.device
        if device.capturing is not None:
            assert self.flushed == self.shape, "captured before the new shape was run once"
            self.captured = True
        self.flushed = self.shape
        shape = self.shape
        n, side = shape[:2]
        tiles, scores = self.at["tiles"], self.at["scores"]

        def work() -> None:
            given = array_at(tiles, shape)
            array_at(scores, (n, 3, side, side), np.float16)[...] = as_scores(np.moveaxis(given, -1, 1)[:, :3])

        stream = next(s for s in device._streams if s.handle == handle)
        stream.queue(work)
        self.engine.runs += 1
        return self.engine.works


class FakeTensorRt:
    """An engine of the native library, on a device that is host memory."""

    device_memory_size_v2 = 1000

    def __init__(self, device: HostDevice) -> None:
        self.device, self.works, self.runs = device, True, 0
        self.contexts = 0

    def create_execution_context(self) -> FakeContext:
        self.contexts += 1
        return FakeContext(self)


def opened(library: Library, fake: FakeTensorRt, device: HostDevice, bundle: Path) -> TensorRtEngine:
    card = read_card(bundle)
    header = EngineHeader(
        card=card.digest(),
        onnx="model.onnx",
        onnx_sha256="0" * 64,
        precision="fp32",
        library=library.name,
        library_version=library.version,
        targets=("sm90",),
        compatibility="none",
        profile=Profile(1, 2, 4, 128, 128, 3),
        plan_sha256="1" * 64,
    )
    logger = SimpleNamespace(errors=["it says why"])
    return TensorRtEngine(library, None, fake, header, card, device, logger)


def native(device: HostDevice, bundle: Path) -> tuple[TensorRtEngine, FakeTensorRt]:
    fake = FakeTensorRt(device)
    return opened(Library("tensorrt", "10.9", SimpleNamespace()), fake, device, bundle), fake


def test_full_batches_of_tensorrt_are_one_graph_and_parts_are_not(tmp_path: Path, tiny_bundle: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", random_pixels(520, 300))
    device = HostDevice()
    engine, fake = native(device, tiny_bundle)
    options = Options(tissue=False, overlap_px=32, probabilities=True, batch=4)
    for _ in range(2):
        run = to_json(segment_slide(path, engine, tmp_path, options).run)
        np.testing.assert_array_equal(results(tmp_path / "slide")[1], as_shares(random_pixels(520, 300)))
    assert run["grid"]["tiles"] == 18  # three rows of 6: a full batch and a part
    # Once to set up and once to capture; then only the parts, one in each of two times three rows.
    assert fake.runs == 2 + 2 * 3
    assert fake.contexts == 2
    tiles = np.random.default_rng(0).integers(0, 256, (7, 128, 128, 3), dtype=np.uint8)
    np.testing.assert_array_equal(engine.infer(tiles), as_scores(np.moveaxis(tiles, -1, 1)))
    engine.close()
    engine.close()


def test_tensorrt_without_graphs_or_without_room_for_one_runs_too(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise DeviceError("no graphs")

    path = write_slide(tmp_path / "slide.tif", random_pixels(520, 300))
    options = Options(tissue=False, overlap_px=32, probabilities=True, batch=4)
    for missing in ("capture", "room", "graphs"):
        device = HostDevice()
        if missing == "graphs":
            monkeypatch.setattr(HostDevice, "graphs", False)
        engine, fake = native(device, tiny_bundle)
        if missing == "capture":
            monkeypatch.setattr(device, "capture", refuse)
        elif missing == "room":
            fake.device_memory_size_v2 = device.total_bytes
        segment_slide(path, engine, tmp_path, options)
        np.testing.assert_array_equal(results(tmp_path / "slide")[1], as_shares(random_pixels(520, 300)))
        engine.close()


def test_tensorrt_rtx_has_what_is_called() -> None:
    """Its runtime needs a GPU; that the names exist does not."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert trt.DataType.UINT8
    assert trt.TensorIOMode.INPUT
    for owner, names in {
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: (
            "create_runtime_config",
            "create_execution_context",
            "device_memory_size_v2",
            "num_io_tensors",
            "get_tensor_name",
            "get_tensor_mode",
            "get_tensor_dtype",
            "get_tensor_shape",
        ),
        trt.IRuntimeConfig: ("create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy"),
        trt.IRuntimeCache: ("deserialize", "serialize"),
        trt.IExecutionContext: ("set_input_shape", "set_tensor_address", "execute_async_v3"),
    }.items():
        assert not [name for name in names if not hasattr(owner, name)]


def test_the_kernels_that_tensorrt_rtx_compiles_are_kept(tiny_bundle: Path, cache: Path) -> None:
    loaded: list[bytes] = []

    def load(content: bytes) -> bool:
        loaded.append(content)
        return True

    config = SimpleNamespace(
        create_runtime_cache=lambda: SimpleNamespace(
            deserialize=load,
            serialize=lambda: b"compiled",
        ),
        set_runtime_cache=lambda cache: None,
    )
    rtx = Library("tensorrt-rtx", "1.7", SimpleNamespace())
    for _ in range(2):
        device = HostDevice()
        fake: Any = FakeTensorRt(device)
        fake.create_runtime_config = lambda: config
        fake.create_execution_context = lambda config, fake=fake: FakeContext(fake)
        engine = opened(rtx, fake, device, tiny_bundle)
        tiles = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
        np.testing.assert_array_equal(engine.infer(tiles), as_scores(np.moveaxis(tiles, -1, 1)))
        engine.close()
    assert loaded == [b"compiled"]
    assert len(list((cache / "histostream" / "rtx-kernels").iterdir())) == 1


def test_what_tensorrt_refuses_is_an_error_with_its_words(tiny_bundle: Path) -> None:
    engine, fake = native(HostDevice(), tiny_bundle)
    tiles, scores = engine.buffers(8)
    with pytest.raises(EngineError, match="does not take 6 tiles"):
        engine.infer_device(tiles, scores, 6, engine.stream)
    fake.works = False
    engine._logger.errors.append("Error Code 1: OutOfMemory")
    with pytest.raises(DeviceMemoryError, match="OutOfMemory"):
        engine.infer_device(tiles, scores, 2, engine.stream)
    with pytest.raises(EngineError, match="inference failed on 1 tiles"):
        engine.infer_device(tiles, scores, 1, engine.stream)
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(gpu_count() == 0, reason="no GPU is here")
@pytest.mark.parametrize("binding", BINDINGS)
def test_a_gpu_computes_what_the_host_computes(binding: str, tmp_path: Path) -> None:
    """The real driver: copies, events and kernels, on random scores, against the Blender."""
    try:
        device = open_device(binding=binding)
    except DeviceError as error:
        pytest.skip(str(error))
    from histostream.runtime.engines.device_engine import BatchBuffers, infer_arrays
    from tests.runtime.conftest import CARD, IdentityEngine

    class Identity:
        """Scores are the pixels: the tiles are turned by the host between two copies."""

        card, name, batch, max_batch = CARD, "identity", 4, 64

        def __init__(self) -> None:
            self.device, self.stream = device, device.stream()
            self._buffers = BatchBuffers(device, CARD)
            self._pinned, self._scores = device.pinned(64 * 64 * 64 * 3), device.pinned(2 * 64 * 64 * 64 * 3)

        def buffers(self, batch: int) -> tuple[int, int]:
            return self._buffers.get(batch)

        def infer_device(self, tiles: int, scores: int, n: int, stream: Any) -> None:
            pixels = self._pinned[: n * 64 * 64 * 3]
            device.download(pixels, tiles, stream)
            stream.synchronize()
            turned = as_scores(np.moveaxis(pixels.reshape(n, 64, 64, 3), -1, 1))
            staged = self._scores[: 2 * pixels.size]
            staged[...] = np.ascontiguousarray(turned).reshape(-1).view(np.uint8)
            device.upload(scores, staged, stream)
            stream.synchronize()

        def infer(self, tiles: NDArray[np.uint8]) -> Scores:
            return infer_arrays(self, tiles)

        def close(self) -> None:
            self._buffers.close()
            device.close()

    path = write_slide(tmp_path / "slide.tif", random_pixels(1301, 917))
    engine = Identity()
    for batch in (1, 3, 16):
        options = Options(tissue=False, overlap_px=16, probabilities=True, batch=batch)
        run = segment_slide(path, engine, tmp_path / "device", options)
        host = segment_slide(path, IdentityEngine(), tmp_path / "host", options)
        assert_same(results(run.folder), results(host.folder))
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(gpu_count() == 0, reason="no GPU is here")
@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_engines_of_a_gpu_agree_with_the_cpu(backend: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """1/255 at most, and more than float16 rounds on few pixels: sums of products are rounded in other orders.

    And the device's stream gives exactly what the host's does with the same engine.
    """
    try:
        engine = open_engine(tiny_bundle, backend=backend)
    except EngineError as error:
        pytest.skip(str(error))
    tiles = np.random.default_rng(0).integers(0, 256, (11, 128, 128, 3), dtype=np.uint8)
    wanted = open_engine(tiny_bundle, backend="cpu").infer(tiles).astype(np.float32)
    for _ in range(3):  # set up, captured, replayed
        difference = np.abs(engine.infer(tiles) - wanted)
        assert difference.max() <= 1 / 255
        assert (difference > 2**-10).mean() < 1e-2

    class OnHost:
        card, name, batch = engine.card, engine.name, engine.batch

        def infer(self, tiles: NDArray[np.uint8]) -> Scores:
            return engine.infer(tiles)

        def close(self) -> None:
            pass

    path = write_slide(tmp_path / "slide.tif", random_pixels(1301, 917))
    options = Options(tissue=False, overlap_px=32, probabilities=True)
    run = segment_slide(path, engine, tmp_path / "device", options)
    host = segment_slide(path, OnHost(), tmp_path / "host", options)
    assert_same(results(run.folder), results(host.folder))
    engine.close()
