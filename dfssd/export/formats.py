"""Other formats than ONNX, all of them made from it: OpenVINO, and int8 calibrated on unlabelled pictures."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dfssd.errors import DfssdError

CALIBRATION_BATCH = 8


def check_formats(formats: tuple[str, ...]) -> None:
    """Refuse what is not installed before anything runs.

    Raises:
        DfssdError: a format's library is missing.
    """
    needs = {"openvino": "openvino", "tensorrt": "tensorrt"}
    for name in formats:
        module = needs.get(name)
        if module and importlib.util.find_spec(module) is None:
            raise DfssdError(
                f"--formats {name} needs the package {module}, which is not installed",
                todo=f"pip install {module}, or leave {name} out (the .onnx file can be converted later)",
            )


def openvino_files(onnx: bytes, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of an OpenVINO model in fp32, by name; the metadata lies under "dfssd" in its runtime information."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        source.write_bytes(onnx)
        model = openvino.convert_model(source)
        model.set_rt_info(json.dumps(metadata), ["dfssd"])
        openvino.save_model(model, str(Path(folder) / "model.xml"), compress_to_fp16=False)
        return {name: (Path(folder) / name).read_bytes() for name in ("model.xml", "model.bin")}


def int8_bytes(onnx: bytes, images_bchw: np.ndarray) -> bytes:
    """The ONNX model with int8 weights and activations, except for its head's decoding, where int8 costs whole pixels.

    Args:
        images_bchw: (n,3,S,S) float32 unlabelled pictures that set the ranges of activations.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(
                [images_bchw[k : k + CALIBRATION_BATCH] for k in range(0, len(images_bchw), CALIBRATION_BATCH)]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    import onnx as library

    with tempfile.TemporaryDirectory() as folder:
        source, ready, small = (str(Path(folder) / f"{name}.onnx") for name in ("source", "ready", "small"))
        Path(source).write_bytes(onnx)
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        graph = library.load(ready).graph
        convolutions = [n.name for n in graph.node if n.op_type == "Conv"]
        head = max((int(n.split("/model.")[-1].split("/")[0]) for n in convolutions if "/model." in n), default=-1)
        own = [n for n in convolutions if f"/model.{head}/" in n]
        final = [n for n in own if "dfl" in n or n.endswith(".2/Conv")]
        quantize_static(
            ready,
            small,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=final,
        )
        model = library.load(small)
        known = {entry.key for entry in model.metadata_props}
        for entry in library.load_from_string(onnx).metadata_props:
            if entry.key not in known:
                copy = model.metadata_props.add()
                copy.key, copy.value = entry.key, entry.value
        return bytes(model.SerializeToString())
