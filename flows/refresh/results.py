"""What a refresh found, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from draftsmith.flows.pipeline.display import Display


def show_results(display: Display, made: Mapping[str, Path], mlflow: str) -> None:
    """made: node -> folder; mlflow: the command that shows the runs, or a server's URL."""
    display.results(made, mlflow)
