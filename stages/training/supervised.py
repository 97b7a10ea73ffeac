"""SFT's loss: all offsets of blocks behind anchors anywhere, in the form that the architecture's authors use.

DFlash (arXiv 2602.06036): cross-entropy on the committed token, weight exp(-(k-1)/γ) at offset k. EAGLE-3
(arXiv 2503.01840): the training-time test on the target's distribution over the draft vocabulary, 0.8 a step.
"""

from __future__ import annotations

import time

import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.blocks import Anchors, LossReport, block_hidden, context_of, operations_of
from draftsmith.stages.training.loss_config import ResponseStream
from draftsmith.stages.training.response import response_stream
from draftsmith.stages.training.vocabulary import Heads


def sft_loss(
    drafter: Drafter,
    batch: Batch,
    anchors: Anchors,
    heads: Heads,
    target_head: torch.Tensor,
    stream: ResponseStream,
    *,
    temperature: float,
    positions_per_chunk: int,
) -> LossReport:
    """Weighted mean over all offsets inside the trajectory. stream: resolved, of scope `block`; target_head: [V, H]."""
    started = time.perf_counter()
    hidden = block_hidden(drafter, context_of(drafter, batch), batch, anchors)
    drafted = time.perf_counter()
    response = response_stream(
        hidden,
        batch,
        anchors,
        heads,
        target_head,
        stream,
        temperature=temperature,
        positions_per_chunk=positions_per_chunk,
    )
    positions = int(response.positions.sum())
    return LossReport(
        response.mean,
        anchors.blocks,
        positions,
        {"accuracy": response.accuracy},
        {"drafter": drafted - started, "head_and_loss": time.perf_counter() - drafted},
        operations_of(drafter, batch, anchors, positions, heads.drafter),
    )
