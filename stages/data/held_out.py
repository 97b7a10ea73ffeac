"""Which prompts are only ever measured on: decided by a hash of the prompt, so that no refresh can train on another's.

A prompt's place is a number in [0, 1) that depends on its text alone (`heldout_by: conversation`: on that of the user's
first message, without a source's `suffix`). Below `heldout_share` it may be held-out or validation material and is
never trained on; above, the other way round. A larger share contains the smaller one: raising it takes prompts out of
training; lowering it would give prompts to training that may have measured before, so a line of drafters refuses that
(`flows/refresh/line.py`).
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

from draftsmith.artifacts.tables.readers import RowReader
from draftsmith.artifacts.tables.schemas import PROMPTS
from draftsmith.stages.data.row_formats import Message

HELDOUT_SHARE = 0.1  # of all prompts, where a config does not say
HeldOutBy: TypeAlias = Literal["prompt", "conversation"]


def identity(messages: Sequence[Message], by: HeldOutBy = "prompt") -> bytes:
    """16 bytes that equal prompts share, whatever their system prompt and blank space; upper case counts. By
    conversation: that all share which begin with the same message of the user."""
    said = [(each["role"], " ".join(each["content"].split())) for each in messages if each["role"] != "system"]
    if by == "conversation":
        said = [each for each in said if each[0] == "user"][:1]
    text = json.dumps(said, ensure_ascii=True)  # half a surrogate pair is no UTF-8, but has an escape
    return hashlib.sha256(f"prompt {text}".encode()).digest()[:16]


def place(prompt: bytes) -> float:
    """Where a prompt of this identity stands in [0, 1)."""
    return int.from_bytes(prompt[:8], "big") / 2**64


def digest(ids: Sequence[int] | np.ndarray) -> bytes:
    """16 bytes of sha256 over token ids."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int32).tobytes()).digest()[:16]


@dataclass(frozen=True)
class HeldOut:
    """The held-out class, and the prompts of one refresh that are measured on although they are outside of it."""

    share: float = HELDOUT_SHARE
    identities: frozenset[bytes] = field(default=frozenset())
    token_digests: frozenset[bytes] = field(default=frozenset())
    by: HeldOutBy = "prompt"

    def holds(self, messages: Sequence[Message], ids: Sequence[int] | np.ndarray) -> bool:
        """May this prompt not be trained on? messages: as far as they are known, ids: its tokens."""
        prompt = identity(messages, self.by)
        return place(prompt) < self.share or prompt in self.identities or digest(ids) in self.token_digests


def read_held_out(prompts: Path | None) -> HeldOut:
    """Of an artifact of `prompts`; without one, the class alone with its usual share."""
    if prompts is None:
        return HeldOut()
    share, by = _class(prompts / "prompts.json")
    identities, digests = set(), set()
    for part in RowReader(prompts / "prompts.parquet", PROMPTS).row_groups(["split", "messages", "token_ids"]):
        for row in part.filter(pc.not_equal(part["split"], "train")).to_pylist():
            identities.add(identity(row["messages"], by))
            digests.add(digest(row["token_ids"]))
    return HeldOut(share, frozenset(identities), frozenset(digests), by)


def units_of(prompts: Path, prompt_ids: Sequence[str]) -> list[str]:
    """What each prompt's answers are observations of: the prompt, or the conversation that it is a turn of, where an
    artifact of `prompts` holds conversations out as a whole."""
    if _class(prompts / "prompts.json")[1] == "prompt":
        return list(prompt_ids)
    known = {}
    for part in RowReader(prompts / "prompts.parquet", PROMPTS).row_groups(["prompt_id", "split", "messages"]):
        for row in part.filter(pc.not_equal(part["split"], "train")).to_pylist():
            if any(message["role"] == "user" for message in row["messages"]):  # else nothing is known of its beginning
                known[row["prompt_id"]] = identity(row["messages"], "conversation").hex()
    return [known.get(prompt_id, prompt_id) for prompt_id in prompt_ids]


def _class(summary: Path) -> tuple[float, HeldOutBy]:
    """Return the share of the held-out class, and what decides it."""
    stated = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    return float(stated.get("heldout_share", HELDOUT_SHARE)), stated.get("heldout_by", "prompt")
