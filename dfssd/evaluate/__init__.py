"""Measuring finished detectors: metrics, the gate. Returns numbers, draws nothing."""
