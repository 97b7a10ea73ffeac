"""Stored artifacts as the numerical rooms take them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.parquet import read_table
from draftsmith.artifacts.schemas import PROMPTS, TRAJECTORIES
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.targets.info import read_target_info

DRAFTER_FOLDER = "drafter"  # inside the artifact of a training stage


@dataclass(frozen=True)
class StoredTrajectories:
    """The usable trajectories of an artifact, in its order."""

    trajectories: list[Trajectory]
    prompts: list[str]  # the prompt of each: answers to the same one are no independent observations
    temperature: float  # 0 = greedy
    too_short: int  # answers of one token: nothing is drafted there


def load_trajectories(folder: Path, splits: Collection[str] | None = None) -> StoredTrajectories:
    """trajectories.parquet of an artifact, restricted to some splits.

    Raises DraftsmithError if nothing of these splits, nothing usable, or a mix of temperatures is there.
    """
    path = folder / "trajectories.parquet"
    rows = read_table(path, TRAJECTORIES).to_pylist()
    if splits is not None:
        there = sorted({row["split"] for row in rows})
        rows = [row for row in rows if row["split"] in splits]
        if not rows:
            raise DraftsmithError(
                f"{path}: no answer of split {' or '.join(splits)}, only of {', '.join(there)}; change fields "
                "splits and prompts of the section that made it"
            )
    usable = [row for row in rows if len(row["response_ids"]) >= 2]
    if not usable:
        raise DraftsmithError(f"{path}: no answer of two or more tokens; check the prompts and max_new_tokens")
    temperatures = {row["temperature"] for row in usable}
    if len(temperatures) > 1:
        raise DraftsmithError(f"{path}: temperatures {sorted(temperatures)} are mixed; roll out with one of them")
    trajectories = [
        Trajectory(row["trajectory_id"], row["prompt_ids"] + row["response_ids"], len(row["prompt_ids"]))
        for row in usable
    ]
    prompts = [row["prompt_id"] for row in usable]
    return StoredTrajectories(trajectories, prompts, float(temperatures.pop()), len(rows) - len(usable))


def splits_of(folder: Path) -> set[str]:
    """The splits that the trajectories of an artifact are of."""
    table = read_table(folder / "trajectories.parquet", TRAJECTORIES, ["split"])
    return set(table["split"].unique().to_pylist())


def sets_of(folder: Path, prompt_ids: Sequence[str]) -> list[str]:
    """The prompt set (its source) of each prompt, from an artifact of stage `prompts`; "logs" for others."""
    table = read_table(folder / "prompts.parquet", PROMPTS, ["prompt_id", "source"])
    known = dict(zip(table["prompt_id"].to_pylist(), table["source"].to_pylist(), strict=True))
    return [known.get(prompt_id, "logs") for prompt_id in prompt_ids]


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt."""

    prompt_id: str
    split: str
    token_ids: list[int]


def load_prompts(folder: Path, splits: Collection[str]) -> list[Prompt]:
    """prompts.parquet of an artifact, in its order."""
    table = read_table(folder / "prompts.parquet", PROMPTS, columns=["prompt_id", "split", "token_ids"])
    return [Prompt(**row) for row in table.to_pylist() if row["split"] in splits]


def positions_needed(prompts: Sequence[Prompt], max_new_tokens: int, max_positions: int) -> int:
    """Positions of the longest prompt with its answer. Raises DraftsmithError if the target's context is shorter."""
    needed = max(len(prompt.token_ids) for prompt in prompts) + max_new_tokens
    if needed > max_positions:
        raise DraftsmithError(
            f"the longest prompt and {max_new_tokens} new tokens need {needed} positions, the target has "
            f"{max_positions}; lower sampling.max_new_tokens or prompts.max_prompt_tokens"
        )
    return needed


def check_answer_fits(max_new_tokens: int, target: Path) -> None:
    """An answer alone must fit into the context. target: its artifact. Raises DraftsmithError."""
    limit = read_target_info(target).max_positions
    if max_new_tokens >= limit:
        raise DraftsmithError(
            f"sampling.max_new_tokens: {max_new_tokens} does not fit into the target's {limit} positions; lower it"
        )


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """A request's own seed (63 bits): independent of which other prompts are in the run."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
