"""The spaces that come with dfssd lie beside the package in a checkout, and inside it where it is installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dfssd*"]), "dfssd.tune_spaces"],
    package_dir={"dfssd.tune_spaces": "tune_spaces"},
)
