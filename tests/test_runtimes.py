"""Runtimes at the line: nothing is sent to their makers; TensorRT's path on a stand-in for its documented calls (order,
shapes, sizes, addresses), since TensorRT itself is not here."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dfssd.errors import DfssdError
from dfssd.export.formats import check_formats, engine_bytes
from dfssd.line.detector import LineDetector
from dfssd.line.tensorrt_engine import packed

SIDE = 32
META = {"names": ["a", "b"], "imgsz": SIDE, "nms_inside": False, "operating_point": {"score": 0.3, "thresholds": {}}}


class Context:
    """An execution context: ONNX Runtime on what lies at the addresses."""

    def __init__(self, session):
        self.session, self.shape, self.places = session, None, {}

    def set_input_shape(self, name, shape):
        assert name == "images" and shape[0] <= 8 and shape[1:] == (3, SIDE, SIDE)
        self.shape = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        return self.shape if name == "images" else (self.shape[0], 6, 5)

    def set_tensor_address(self, name, place):
        assert place
        self.places[name] = place
        return True

    def execute_async_v3(self, stream):
        assert isinstance(stream, int)
        size = int(np.prod(self.shape))
        images = np.ctypeslib.as_array((ctypes.c_float * size).from_address(self.places["images"])).reshape(self.shape)
        out = np.ascontiguousarray(self.session.run(None, {"images": images})[0])
        ctypes.memmove(self.places["output0"], out.ctypes.data, out.nbytes)
        return True


def _cuda(memory):
    """`cuda.bindings.runtime` on the host's memory, which `memory` keeps."""

    def malloc(size):
        memory.append(ctypes.create_string_buffer(size))
        return 0, ctypes.addressof(memory[-1])

    def copy(to, source, size, kind, stream):
        ctypes.memmove(to, source, size)
        return (0,)

    runtime = ModuleType("cuda.bindings.runtime")
    runtime.cudaError_t = SimpleNamespace(cudaSuccess=0)
    runtime.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    runtime.cudaMalloc, runtime.cudaMemcpyAsync, runtime.cudaFree = malloc, copy, lambda place: (0,)
    runtime.cudaStreamCreate, runtime.cudaStreamSynchronize = lambda: (0, 7), lambda stream: (0,)
    return runtime


@pytest.fixture
def stand_in(monkeypatch):
    """`tensorrt` and `cuda.bindings.runtime` with the calls that this project makes, and no others."""
    import onnxruntime

    built = SimpleNamespace(flags=None, profile=None, cleared=[], memory=[])

    class Parser:
        num_errors = 1

        def __init__(self, network, logger):
            self.network = network

        def parse(self, data):
            self.network.data = data
            return b"images" in data

        def get_error(self, k):
            return "no such operator"

    class Builder:
        def __init__(self, logger):
            pass

        def create_network(self, flags):
            built.flags = flags
            return SimpleNamespace(data=b"")

        def create_builder_config(self):
            return SimpleNamespace(clear_flag=built.cleared.append, add_optimization_profile=lambda p: 0)

        def create_optimization_profile(self):
            return SimpleNamespace(set_shape=lambda *shapes: setattr(built, "profile", shapes))

        def build_serialized_network(self, network, config):
            return network.data

    def engine(plan):
        if not plan.endswith(b"\x00") and b"images" not in plan:
            return None
        session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
        return SimpleNamespace(
            create_execution_context=lambda: Context(session),
            get_tensor_profile_shape=lambda name, k: built.profile[1:],
        )

    trt = ModuleType("tensorrt")
    trt.__version__, trt.OnnxParser, trt.Builder = "10.0", Parser, Builder
    trt.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    trt.BuilderFlag = SimpleNamespace(TF32="TF32")
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
    trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=engine)

    runtime = _cuda(built.memory)
    bindings, cuda = ModuleType("cuda.bindings"), ModuleType("cuda")
    bindings.runtime, cuda.bindings = runtime, bindings
    for module in (trt, runtime, bindings, cuda):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return built


def _model():
    """(B,6,5) made of the pictures' means: a network with the right shapes, without the seconds of a real one."""
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=1),
        helper.make_node("Reshape", ["mean", "flat"], ["one"]),
        helper.make_node("Mul", ["one", "table"], ["output0"]),
    ]
    table = np.random.default_rng(0).uniform(4, 28, (1, 6, 5)).astype(np.float32)
    table[:, 4:] = np.random.default_rng(1).uniform(0, 1, (1, 2, 5))
    given = [
        helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
        helper.make_tensor("flat", TensorProto.INT64, [3], [-1, 1, 1]),
        helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.ravel()),
    ]
    places = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["batch", 3, SIDE, SIDE]), ("output0", ["batch", 6, 5]))
    ]
    graph = helper.make_graph(nodes, "g", places[:1], places[1:], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"dfssd": json.dumps(META)})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_an_engine_finds_what_its_onnx_file_finds(stand_in, tmp_path):
    data, known = _model(), {"dfssd": json.dumps(META)}
    (tmp_path / "m.onnx").write_bytes(data)
    (tmp_path / "m.engine").write_bytes(engine_bytes(data, SIDE, known))
    assert stand_in.cleared == ["TF32"] and stand_in.flags == 1
    assert stand_in.profile == ("images", (1, 3, SIDE, SIDE), (1, 3, SIDE, SIDE), (8, 3, SIDE, SIDE))
    one, two = LineDetector(tmp_path / "m.engine"), LineDetector(tmp_path / "m.onnx", 1)
    pictures = [np.full((SIDE, SIDE, 3), 20 * k, np.uint8) for k in range(1, 12)]  # more than a batch of eight
    found, wanted = one(pictures), two(pictures)
    assert sum(map(len, wanted)) > 10 and one.names == ["a", "b"] and one.precision == "fp32"
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(stand_in.memory) == 2  # kept: a call asks for no memory


def test_what_is_no_engine_of_ours_is_said(stand_in, tmp_path):
    (tmp_path / "trtexec.engine").write_bytes(b"ftrt" + b"\x00" * 40)
    (tmp_path / "other_gpu.engine").write_bytes(packed(b"plan of another GPU", {"dfssd": "{}"}))
    for name, said in (("trtexec", "holds no operating point"), ("other_gpu", "another GPU or by another TensorRT")):
        with pytest.raises(ValueError, match=said):
            LineDetector(tmp_path / f"{name}.engine")
    with pytest.raises(DfssdError, match="cannot read the model: no such operator"):
        engine_bytes(b"nonsense", SIDE, {})


SILENT = """
import multiprocessing, sys
from pathlib import Path
from dfssd.export.formats import openvino_files
from dfssd.line.detector import LineDetector
place = Path(sys.argv[1])
(place / "ov").mkdir()
for name, data in openvino_files((place / "m.onnx").read_bytes(), {"names": ["a", "b"], "imgsz": 32, "nms_inside": False,
                                 "operating_point": {"score": 0.3, "thresholds": {}}}).items():
    (place / "ov" / name).write_bytes(data)
for file in (place / "m.onnx", place / "ov"):
    LineDetector(file, 1)
import mlflow.telemetry.utils as own
assert own.MLFLOW_DISABLE_TELEMETRY.get()
assert sys.modules["openvino_telemetry"] is None and not multiprocessing.active_children()
"""


def test_runtimes_tell_their_makers_nothing(tmp_path):
    """Neither a telemetry store (ONNX Runtime) nor a process that sends (OpenVINO; forked beside threads it hung)."""
    pytest.importorskip("openvino")
    (tmp_path / "m.onnx").write_bytes(_model())
    env = {
        k: v for k, v in os.environ.items() if not k.endswith("DISABLE_TELEMETRY") and k not in ("CI", "XDG_CACHE_HOME")
    }
    env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(tmp_path)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert not [p for p in (tmp_path / "home").rglob("*") if "onnxruntime" in p.name or "intel" in p.name.lower()]


def test_where_it_is_not_installed_the_export_says_so_at_once():
    with pytest.raises(DfssdError, match="--formats tensorrt needs tensorrt") as error:
        check_formats(("onnx", "tensorrt"))
    assert "pip install tensorrt" in str(error.value)
    check_formats(("onnx",))
