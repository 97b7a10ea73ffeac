"""Answers of an earlier refresh, mixed in so that a drafter does not forget what it was good at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.atomic import atomic_path
from draftsmith.artifacts.tables.parquet import has_current_version, read_table, table_errors
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.logs.answer_table import chosen_rows, parts
from draftsmith.stages.data.logs.filter import Intake, content, prompt_id
from draftsmith.stages.target.info import TargetInfo
from draftsmith.stages.target.sampling import SamplingParams

ORIGIN, CONTENTS = "earlier.json", "contents.npy"  # whose answers they are, and their digests
_DIGEST_BYTES = 16
_COLUMNS = ["split", "temperature", "top_p", "top_k", "prompt_ids", "response_ids"]


def lot(seed: int, content: bytes) -> int:
    """Return 63 bits that rank an answer among others, by seed and content alone. Smaller ones are drawn first."""
    return int.from_bytes(hashlib.sha256(f"lot {seed} ".encode() + content).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Earlier:
    """What of an earlier artifact may be trained on: answers with the same sampling that fit the intake's limits."""

    path: Path
    contents: list[bytes | None]  # of every row; None: not to be used
    of_other_sampling: int = 0  # rows that are not used because they were drawn otherwise

    def choose(self, count: int, seed: int, but: set[bytes]) -> np.ndarray:
        """[rows] bool: `count` of them drawn by seed, or as many as there are, none whose content is in `but`."""
        ranked = sorted((lot(seed, each), row) for row, each in enumerate(self.contents) if each and each not in but)
        mask = np.zeros(len(self.contents), dtype=bool)
        mask[[row for _, row in ranked[:count]]] = True
        return mask

    @property
    def usable(self) -> int:
        return sum(each is not None for each in self.contents)

    def rows(self, mask: np.ndarray) -> Iterator[pa.Table]:
        """The rows of the mask, part by part, with the prompt's identity that the stage `logs` gives."""
        for part in chosen_rows(self.path, mask):
            ids = [prompt_id(row.values.to_numpy()) for row in part["prompt_ids"]]
            place = part.column_names.index("prompt_id")
            yield part.set_column(place, "prompt_id", pa.array(ids, pa.string()))


def made_otherwise(folder: Path, info: TargetInfo) -> str | None:
    """What has changed since the answers of an earlier artifact were given; None: nothing has.

    Of another target they are answers that this one would not give, of another tokenizer their ids mean other text, and
    tables of another version do not name the sampling of their answers as it is named now.
    """
    known = json.loads((folder / ORIGIN).read_text("utf-8"))
    now = {"tokenizer": info.tokenizer_digest, "target": info.digest}
    changed = [f"the {what}" for what, digest in now.items() if known[f"{what}_digest"] != digest]
    if not has_current_version(folder / "trajectories.parquet", TRAJECTORIES):
        changed.append("what is stored of answers")
    return " and ".join(changed) or None


def read_earlier(
    folder: Path, intake: Intake, sampling: SamplingParams, read: Callable[[int], None] = lambda _answers: None
) -> Earlier:
    """Of an artifact with `trajectories.parquet`. sampling: that of the new answers. read: called with how many
    answers were read, now and then.

    Raises DraftsmithError if it is damaged or of another version.
    """
    path = folder / "trajectories.parquet"
    read_table(path, TRAJECTORIES, columns=["sample"])  # whole, and of this version
    contents: list[bytes | None] = []
    seen: set[bytes] = set()
    stated = SamplingParams(
        float(np.float32(sampling.temperature)), float(np.float32(sampling.top_p)), sampling.top_k
    )  # as it is stored
    of_other_sampling = 0
    for part in parts(path, _COLUMNS):
        for split, *drawn, prompt, response in zip(*(part[name] for name in _COLUMNS), strict=True):
            both, train = None, split.as_py() == "train"
            if train and SamplingParams(*(each.as_py() for each in drawn)) == stated:
                both = _content(prompt.values.to_numpy(), response.values.to_numpy(), intake)
            elif train:
                of_other_sampling += 1
            contents.append(None if both in seen else both)
            if both is not None:
                seen.add(both)
        read(len(contents))
    return Earlier(path, contents, of_other_sampling)


def write_contents(folder: Path, table: Path) -> None:
    """`CONTENTS` of a table of answers: [different answers, 16] uint8, `Taken.content` of each. Raises DraftsmithError
    for a table that is damaged; what is read has been in it from the first version on."""
    with table_errors(table, TRAJECTORIES.name):
        different = {
            content(prompt.values.to_numpy(), response.values.to_numpy())
            for part in parts(table, ["prompt_ids", "response_ids"])
            for prompt, response in zip(part["prompt_ids"], part["response_ids"], strict=True)
        }
    with atomic_path(folder / CONTENTS) as path, path.open("wb") as file:
        np.save(file, np.frombuffer(b"".join(sorted(different)), np.uint8).reshape(-1, _DIGEST_BYTES))


def read_contents(folder: Path) -> frozenset[bytes]:
    """`Taken.content` of all answers of an earlier artifact."""
    return frozenset(each.tobytes() for each in np.load(folder / CONTENTS))


def _content(prompt: np.ndarray, response: np.ndarray, intake: Intake) -> bytes | None:
    """None for an answer that the intake would not take."""
    limits = intake.reader
    if len(response) < 2 or len(prompt) + len(response) > limits.max_tokens:
        return None
    if max(prompt.max(initial=0), response.max(initial=0)) >= limits.vocab_size:
        return None
    if intake.held_out.holds(intake.unrendered.messages(prompt), prompt):
        return None
    return content(prompt, response)
