"""How many processes train one drafter together."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import Config

RENDEZVOUS = "DRAFTSMITH_RENDEZVOUS"  # of the environment: HOST:PORT of the node that runs the flow


class ParallelConfig(Config):
    """Processes that share the answers of every step; each has one device, the target and the drafter."""

    processes: Annotated[int, Field(ge=1, description="on each node; with GPUs one each")] = 1
    nodes: Annotated[int, Field(ge=1, description="the others run `torchrun`, see configs/scale/README.md")] = 1
    target_parallel: Annotated[
        int,
        Field(
            ge=1,
            description="processes of a node that share one copy of the target, each with a part of every layer; for a "
            "target that leaves a GPU too little room beside it",
        ),
    ] = 1
    shard_optimiser: Annotated[
        bool, Field(description="AdamW's two moments, 8 bytes a parameter, are split over the processes")
    ] = False

    @model_validator(mode="after")
    def _copies_of_the_target_are_whole(self) -> ParallelConfig:
        if self.processes % self.target_parallel:
            raise ValueError(
                f"target_parallel: {self.processes} processes are no whole number of groups of {self.target_parallel}: "
                "give a number that divides processes"
            )
        return self

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.processes * self.nodes

    def endpoint(self) -> tuple[str, int]:
        """Return host and port where nodes meet. Raises DraftsmithError if nobody names them."""
        address = os.environ.get(RENDEZVOUS) or ""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            problem = f"is {address!r}" if address else "is not given"
            raise DraftsmithError(
                f"parallel.nodes: {RENDEZVOUS} {problem}. Name HOST:PORT of the node that runs the flow in it."
            )
        return host, int(port)
