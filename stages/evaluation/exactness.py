"""How sure the target was where an answer parts from that of plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from draftsmith.stages.data.load import Prompt
from draftsmith.stages.evaluation.timed_runs import PLAIN, Row, place_of
from draftsmith.stages.target.causal_lm import Target


def add_margins(
    target: Target, rows: Sequence[Row], prompts: Sequence[Prompt], check: Callable[[], None] | None = None
) -> None:
    """Fill `margin` of greedy answers that part from plain decoding's: by how many logits the worse of the two tokens
    lies below the target's best. Small = a near-tie of the dtype.

    rows: plain decoding's among them. check: called between forwards.
    """
    prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in prompts}
    plain = {place_of(row): row for row in rows if row["arm"] == PLAIN}
    known: dict[tuple[tuple[int, ...], frozenset[int]], float] = {}  # every round parts at the same places
    for row in rows:
        difference = row["first_difference"]
        if row["temperature"] == 0 and difference >= 0:  # up to there the answer is the one of plain decoding
            tokens = (*prompt_ids[row["prompt_id"]], *row["response_ids"][:difference])
            beside = plain[place_of(row)]["response_ids"][difference : difference + 1]  # none where it has ended
            said = frozenset([*row["response_ids"][difference : difference + 1], *beside])
            if (tokens, said) not in known:
                out = target.read(torch.tensor([tokens], device=target.device))
                logits = target.logits(out.hidden[0, -1]).float()
                known[tokens, said] = float(logits.max() - logits[list(said)].min())
                if check is not None:
                    check()
            row["margin"] = known[tokens, said]
