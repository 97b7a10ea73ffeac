"""The held-out class of prompts, decided by a hash of the prompt, so that no refresh trains on another's test prompts.

The hash places a prompt in [0, 1) by its text only (`heldout_by: conversation`: by the user's first message, without a
source's `suffix`). Below `heldout_share` it may be a held-out or validation prompt and is never trained on; above, it
is the other way round. A larger share contains a smaller one. Raising it takes prompts out of training. Lowering it
would train on prompts that may have served as test prompts, so a model line refuses that (`flows/refresh/champion.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow.compute as pc

from draftsmith.artifacts.results.data import PromptsSummary
from draftsmith.artifacts.tables.readers import RowReader
from draftsmith.artifacts.tables.schemas import LOGS_SET, PROMPTS
from draftsmith.stages.data.row_formats import Message
from draftsmith.stages.runtime.statistics import Unit

HELDOUT_SHARE = 0.1  # default share of all prompts
HeldOutBy: TypeAlias = Literal["prompt", "conversation"]


def prompt_identity(messages: Sequence[Message], by: HeldOutBy = "prompt") -> bytes:
    """Return 16 bytes that equal prompts share, ignoring system prompt and white space but not case.

    by: with `conversation`, all prompts that begin with the same user message share them.
    """
    texts = [(turn["role"], " ".join(turn["content"].split())) for turn in messages if turn["role"] != "system"]
    if by == "conversation":
        texts = [text for text in texts if text[0] == "user"][:1]
    text = json.dumps(texts, ensure_ascii=True)  # escapes a lone surrogate, which UTF-8 cannot encode
    return hashlib.sha256(f"prompt {text}".encode()).digest()[:16]


def hash_fraction(identity: bytes) -> float:
    """Return the place in [0, 1) of a prompt with this identity."""
    return int.from_bytes(identity[:8], "big") / 2**64


def token_digest(ids: Sequence[int] | np.ndarray) -> bytes:
    """Return 16 bytes of sha256 over token ids."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int32).tobytes()).digest()[:16]


@dataclass(frozen=True)
class HeldOut:
    """The held-out class, and the prompts of one refresh that are held out although they are not in it."""

    share: float = HELDOUT_SHARE
    identities: frozenset[bytes] = field(default=frozenset())
    token_digests: frozenset[bytes] = field(default=frozenset())
    by: HeldOutBy = "prompt"

    def is_held_out(self, messages: Sequence[Message], ids: Sequence[int] | np.ndarray) -> bool:
        """Return whether the prompt must not be trained on. messages: as far as they are known. ids: its tokens."""
        identity = prompt_identity(messages, self.by)
        if hash_fraction(identity) < self.share:
            return True
        return identity in self.identities or token_digest(ids) in self.token_digests


def read_held_out(prompts: Path | None) -> HeldOut:
    """Read what an artifact of stage `prompts` holds out; without one, return the class with its default share."""
    if prompts is None:
        return HeldOut()
    share, by = _class(prompts)
    identities, digests = set(), set()
    for batch in RowReader(prompts / "prompts.parquet", PROMPTS).row_groups(["split", "messages", "token_ids"]):
        for row in batch.filter(pc.not_equal(batch["split"], "train")).to_pylist():
            identities.add(prompt_identity(row["messages"], by))
            digests.add(token_digest(row["token_ids"]))
    return HeldOut(share, frozenset(identities), frozenset(digests), by)


def independent_units(prompts: Path, prompt_ids: Sequence[str]) -> list[Unit]:
    """Return the independent unit that each prompt's answers belong to, for statistics; its prompt set is the stratum.

    The unit is the prompt itself, or its conversation if the artifact of stage `prompts` holds out whole conversations:
    then its set is that of the conversation's first prompt.
    """
    whole, columns = _class(prompts)[1] == "conversation", ["prompt_id", "split", "source"]
    sets: dict[str, str] = {}
    names: dict[str, str] = {}
    for batch in RowReader(prompts / "prompts.parquet", PROMPTS).row_groups(columns + ["messages"] * whole):
        for row in batch.filter(pc.not_equal(batch["split"], "train")).to_pylist():
            name = row["prompt_id"]
            if whole and any(message["role"] == "user" for message in row["messages"]):  # else it is unknown
                name = prompt_identity(row["messages"], "conversation").hex()
            names[row["prompt_id"]] = name
            sets.setdefault(name, row["source"])
    units = [names.get(prompt_id, prompt_id) for prompt_id in prompt_ids]
    return [Unit(sets.get(name, LOGS_SET), name) for name in units]


def _class(prompts: Path) -> tuple[float, HeldOutBy]:
    """Return the share of prompts that are held out, and the field that decides which."""
    summary = PromptsSummary.read_if_there(prompts) or PromptsSummary()
    share = HELDOUT_SHARE if summary.heldout_share is None else summary.heldout_share
    return share, summary.heldout_by or "prompt"
