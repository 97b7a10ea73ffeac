"""The packages: every folder of code, under our own name. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("artifacts", "flows", "stages")
setup(packages=[f"draftsmith.{name}" for room in ROOMS for name in find_packages(include=[room, f"{room}.*"])])
