"""Other formats than ONNX, all of them made from it: OpenVINO, TensorRT, and int8 calibrated on unlabelled pictures."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfssd.errors import DfssdError
from dfssd.line.detector import quiet_openvino
from dfssd.line.tensorrt_engine import INPUT, packed

CALIBRATION_BATCH = 8
ENGINE_BATCH = 8  # pictures at most that a TensorRT engine takes at a time; it is tuned for one
NEEDS = {  # modules that a format needs beside ONNX, and what to install for them
    "openvino": (("openvino",), "pip install 'dfssd[openvino]'"),
    "tensorrt": (
        ("tensorrt", "cuda"),
        "pip install tensorrt cuda-python, on the machine at the line or one with its GPU",
    ),
}


def check_formats(formats: Sequence[str], there: Sequence[str] = ()) -> None:
    """Refuse what is not installed before anything runs.

    Args:
        there: those that nobody asks for: the export has them, and they are made again with what is asked for.

    Raises:
        DfssdError: a format's library is missing.
    """
    for name in formats:
        modules, install = NEEDS.get(name, ((), ""))
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if not missing:
            continue
        lacks = f"{' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        if name in there:
            raise DfssdError(
                f"this export has {name} already, and all of its files are made together: that needs {lacks} here",
                todo=f"type this command where {name} is installed ({install}); or add --overwrite and --formats without "
                f"{name}, which removes it",
            )
        raise DfssdError(
            f"--formats {name} needs {lacks}",
            todo=f"{install}; or leave {name} out: dfssd export makes it from the finished run later",
        )


def openvino_files(onnx: bytes, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of an OpenVINO model in fp32, by name; the metadata lies under "dfssd" in its runtime information."""
    openvino = quiet_openvino()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        source.write_bytes(onnx)
        model = openvino.convert_model(source)
        model.set_rt_info(json.dumps(metadata), ["dfssd"])
        openvino.save_model(model, str(Path(folder) / "model.xml"), compress_to_fp16=False)
        return {name: (Path(folder) / name).read_bytes() for name in ("model.xml", "model.bin")}


def engine_bytes(onnx: bytes, imgsz: int, known: Mapping[str, str]) -> bytes:
    """Content of a TensorRT `.engine` file in fp32 (without TF32), for the GPU of this machine and this version of TensorRT.

    Args:
        onnx: without NMS inside. known: its metadata, which goes in front of the plan.

    Raises:
        DfssdError: TensorRT refuses the model.
    """
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    # TensorRT below 10 must be told so; from 10 on every network is of an explicit batch, and the flag means nothing.
    explicit = getattr(tensorrt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        said = "; ".join(str(parser.get_error(k)) for k in range(parser.num_errors))
        raise DfssdError(f"TensorRT {tensorrt.__version__} cannot read the model: {said}", todo="update TensorRT")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # on by default; ten bits of mantissa are not parity
    profile = builder.create_optimization_profile()
    one = (1, 3, imgsz, imgsz)
    profile.set_shape(INPUT, one, one, (ENGINE_BATCH, *one[1:]))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DfssdError("TensorRT built no engine", todo="its log above says why; leave tensorrt out of --formats")
    return packed(bytes(plan), known)


def metadata_of(onnx: bytes) -> dict[str, str]:
    """Metadata of an ONNX file, by key."""
    import onnx as library

    return {entry.key: entry.value for entry in library.load_from_string(onnx).metadata_props}


def with_metadata(onnx: bytes, known: Mapping[str, str]) -> bytes:
    """The same model with these entries in its metadata, in place of those of the same key."""
    import onnx as library

    model = library.load_from_string(onnx)
    library.helper.set_model_props(model, {**metadata_of(onnx), **known})
    return bytes(model.SerializeToString())


def int8_bytes(
    onnx: bytes, images_bchw: np.ndarray, kept_float: Callable[[Sequence[str]], list[str]] = lambda names: []
) -> bytes:
    """The ONNX model with int8 weights and activations.

    Args:
        images_bchw: (n,3,S,S) float32 unlabelled pictures that set the ranges of activations.
        kept_float: of its convolutions' names those that stay as they are (`Family.kept_float`).
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
        convolutions = [n.name for n in library.load(ready).graph.node if n.op_type == "Conv"]
        quantize_static(
            ready,
            small,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=kept_float(convolutions),
        )
        return with_metadata(Path(small).read_bytes(), metadata_of(onnx))
