"""Sweeps: many runs of the `distill` stage with Ray Tune, and the table that comes of them."""

from dfssd.runtime.environment import set_driver_environment

set_driver_environment()  # before Ray is imported, by us or by the file of a space
