"""From a finished detector to a file for the machine at the line: ONNX, OpenVINO, int8, with proof of parity."""
