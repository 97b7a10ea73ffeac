"""How sure the target was where an answer parts from that of plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from draftsmith.stages.measure.requests import PLAIN, Row, place_of
from draftsmith.stages.stored import Prompt
from draftsmith.stages.targets.causal_lm import Target


def add_margins(
    target: Target, rows: Sequence[Row], prompts: Sequence[Prompt], check: Callable[[], None] | None = None
) -> None:
    """Fill `margin` of greedy answers that part from plain decoding's: by how many logits the worse of the two tokens
    lies below the target's best. Small = a near-tie of the dtype.

    rows: plain decoding's among them. check: called between forwards.
    """
    prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in prompts}
    plain = {place_of(row): row for row in rows if row["arm"] == PLAIN}
    known: dict[tuple[int, ...], torch.Tensor] = {}  # every round parts at the same places
    for row in rows:
        difference = row["first_difference"]
        if row["temperature"] == 0 and difference >= 0:  # up to there the answer is the one of plain decoding
            tokens = (*prompt_ids[row["prompt_id"]], *row["response_ids"][:difference])
            if tokens not in known:
                out = target.read(torch.tensor([tokens], device=target.device))
                known[tokens] = target.logits(out.hidden[0, -1]).float().cpu()
                if check is not None:
                    check()
            said = [each["response_ids"][difference : difference + 1] for each in (row, plain[place_of(row)])]
            logits = known[tokens]
            row["margin"] = max(float(logits.max() - logits[token]) for one in said for token in one)
