"""A TensorRT engine at the line: numpy in, numpy out, without torch. Device memory comes from NVIDIA's cuda-python.

The file is laid out as Ultralytics lays it out, so that `yolo predict` reads it too: four bytes with the length of the
metadata (little-endian), metadata (JSON), plan. The calls are those that NVIDIA documents for TensorRT 8.5 to 11.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

INPUT, OUTPUT = "images", "output0"


class Engine:
    """An engine on the first GPU that this process sees.

    Args:
        file: `.engine`, written by `dfssd export --formats tensorrt`.

    Attributes:
        metadata: strings by key, as in an ONNX file. most: pictures in a batch at most.

    Raises:
        ImportError: tensorrt or cuda-python is not installed.
        ValueError: not such a file, or an engine for another GPU or another version of TensorRT.
    """

    def __init__(self, file: Path) -> None:
        import tensorrt

        self.metadata, plan = unpacked(file.read_bytes(), str(file))
        self._cuda = _cuda_runtime()
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ValueError(
                f"{file} cannot be loaded: it was built for another GPU or by another TensorRT than {tensorrt.__version__}"
            )
        self._context = self._engine.create_execution_context()
        self._stream = self._call(self._cuda.cudaStreamCreate())
        self._memory: dict[str, tuple[int, int]] = {}  # by tensor: address on the device, bytes
        self.most = int(self._engine.get_tensor_profile_shape(INPUT, 0)[2][0])

    def __call__(self, images_bchw: np.ndarray) -> np.ndarray:
        """(B,4+C,A) raw output of (B,3,S,S) float32 pictures; B at most `most`."""
        images = np.ascontiguousarray(images_bchw, np.float32)
        self._context.set_input_shape(INPUT, images.shape)
        output = np.empty(tuple(self._context.get_tensor_shape(OUTPUT)), np.float32)
        kinds = self._cuda.cudaMemcpyKind
        places = {name: self._room(name, array.nbytes) for name, array in ((INPUT, images), (OUTPUT, output))}
        for name, place in places.items():
            self._context.set_tensor_address(name, place)
        copy = (places[INPUT], images.ctypes.data, images.nbytes, kinds.cudaMemcpyHostToDevice, self._stream)
        self._call(self._cuda.cudaMemcpyAsync(*copy))
        if not self._context.execute_async_v3(int(self._stream)):
            raise RuntimeError("TensorRT did not run the engine; its log says why")
        copy = (output.ctypes.data, places[OUTPUT], output.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream)
        self._call(self._cuda.cudaMemcpyAsync(*copy))
        self._call(self._cuda.cudaStreamSynchronize(self._stream))
        return output

    def _room(self, name: str, size: int) -> int:
        """Address of at least `size` bytes on the device, kept for the next call."""
        place, there = self._memory.get(name, (0, 0))
        if there < size:
            if place:
                self._call(self._cuda.cudaFree(place))
            place = int(self._call(self._cuda.cudaMalloc(size)))
            self._memory[name] = place, size
        return place

    def _call(self, answer: tuple[Any, ...]) -> Any:
        """The result of a CUDA call, whose first part is an error code."""
        if answer[0] != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA: {answer[0]}")
        return answer[1] if len(answer) > 1 else None


def packed(plan: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Content of an `.engine` file."""
    head = json.dumps(metadata).encode()
    return len(head).to_bytes(4, "little", signed=True) + head + plan


def unpacked(data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    """Metadata and plan of an `.engine` file.

    Raises:
        ValueError: there is no metadata in front (as in a file that trtexec has written).
    """
    size = int.from_bytes(data[:4], "little", signed=True)
    try:
        if not 0 < size <= len(data) - 4:
            raise ValueError("no length")
        head = json.loads(data[4 : 4 + size])
    except ValueError as error:
        raise ValueError(f"{name} holds no operating point: write it with dfssd export --formats tensorrt") from error
    return head, data[4 + size :]


def _cuda_runtime() -> Any:
    """cuda-python's runtime, under the name it has had since 12.6 or the one before."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        from cuda import cudart as runtime
    return runtime
