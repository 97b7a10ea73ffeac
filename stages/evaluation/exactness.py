"""Exactness: outputs with a drafter against those without one, and how sure the target was where they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from draftsmith.artifacts.results.evaluation import PLAIN, Exactness
from draftsmith.stages.data.trajectories import Prompt
from draftsmith.stages.evaluation.timed_runs import Row
from draftsmith.stages.target.causal_lm import Target


def compare_with_plain(requests: Sequence[Row], sampled: bool) -> None:
    """Fill `identical` and `first_difference` of requests with a drafter.

    sampled: compare sampled answers too. All engines sample them from the same distribution, but only the embedded one
    uses the same random numbers with and without a drafter.
    """
    plain = {pair_key(row): row for row in requests if row["arm"] == PLAIN}
    for row in requests:
        if row["arm"] != PLAIN and (sampled or row["temperature"] == 0):
            difference = first_difference(row["response_ids"], plain[pair_key(row)]["response_ids"])
            row["identical"], row["first_difference"] = difference < 0, difference


def pair_key(row: Row) -> tuple[int, float, int, str]:
    """Return what an answer has in common with the one without a drafter that it is compared with."""
    return row["round"], row["temperature"], row["concurrency"], row["prompt_id"]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the index of the first differing token, -1 if equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return -1 if len(a) == len(b) else min(len(a), len(b))


def add_margins(
    target: Target, requests: Sequence[Row], prompts: Sequence[Prompt], check: Callable[[], None] | None = None
) -> None:
    """Fill `margin` of greedy answers that differ from those without a drafter.

    The margin is the number of logits by which the worse of the two tokens lies below the target's best; a small one
    is a near-tie of the dtype. requests: with and without a drafter. check: called between forwards.
    """
    prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in prompts}
    plain = {pair_key(row): row for row in requests if row["arm"] == PLAIN}
    known: dict[tuple[tuple[int, ...], frozenset[int]], float] = {}  # rounds differ at the same positions
    for row in requests:
        difference = row["first_difference"]
        if row["temperature"] == 0 and difference >= 0:
            tokens = (*prompt_ids[row["prompt_id"]], *row["response_ids"][:difference])
            other = plain[pair_key(row)]["response_ids"][difference : difference + 1]  # empty if it ends here
            chosen = frozenset([*row["response_ids"][difference : difference + 1], *other])
            if (tokens, chosen) not in known:
                out = target.read(torch.tensor([tokens], device=target.device))
                logits = target.logits(out.hidden[0, -1]).float()
                known[tokens, chosen] = float(logits.max() - logits[list(chosen)].min())
                if check is not None:
                    check()
            row["margin"] = known[tokens, chosen]


def exactness(requests: Sequence[Row], serving_dtype: str) -> Exactness:
    """Return the share of compared outputs that are identical in the serving dtype, and the known margins."""
    compared = [row for row in requests if row["identical"] is not None]
    margins = [row["margin"] for row in compared if row["first_difference"] >= 0 and not np.isnan(row["margin"])]
    return Exactness(
        serving_dtype=serving_dtype,
        identical_share=sum(row["identical"] for row in compared) / len(compared) if compared else None,
        compared_outputs=len(compared),
        median_margin=float(np.median(margins)) if margins else None,
        largest_margin=max(margins) if margins else None,
    )
