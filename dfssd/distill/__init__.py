"""Divergences, prediction losses, and how they are summed."""
