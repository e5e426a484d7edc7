"""The version, for everything in the package."""

__version__ = "0.2.0"
