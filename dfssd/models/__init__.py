"""Detectors: what is asked of a model family, which one a network is of, and what holds for all of them."""
