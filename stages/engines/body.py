"""Body of stage `rollout`: generates the answers that are missing, then writes all of them in prompt order."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.results.drafting import TraceSource
from draftsmith.artifacts.results.evaluation import TargetDifference
from draftsmith.artifacts.store.manifest import write_versions
from draftsmith.artifacts.tables.parquet import TableWriter, read_table
from draftsmith.artifacts.tables.readers import BATCH_ROWS
from draftsmith.artifacts.tables.schemas import PROMPTS, QUESTIONS
from draftsmith.stages.data.chat_template import token_ids
from draftsmith.stages.data.row_formats import Message, TemplateKwargs
from draftsmith.stages.data.stored_prompts import Prompt, PromptRows, positions_needed
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, request_seed
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.spec import NO_FREQUENT_TOKENS
from draftsmith.stages.engines.base import Completion, Engine, Request
from draftsmith.stages.engines.config import SamplingConfig, ServerEngineConfig
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.engines.partial_answers import SCHEMAS, PartialAnswers, store_logged_answers
from draftsmith.stages.engines.registry import open_servers
from draftsmith.stages.engines.servers.requirements import server_requirements
from draftsmith.stages.engines.stage import RolloutConfig, prompts_to_answer
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import load_tokenizer, model_path, read_target_info

_SEAM = 16  # tokens by which an answer may become longer when its text is tokenised again
_WRITTEN_ROWS = 64  # rows written to the final tables at once; traces have many short rows and use BATCH_ROWS


def run(ctx: StageContext, config: RolloutConfig) -> None:
    """Answer the prompts that have no answer yet; write the tables and, with a drafter, the source of its trace."""
    prompts = prompts_to_answer(config, ctx.inputs["prompts"])
    conversations = _Conversations.read(ctx.inputs["prompts"], prompts.ids, ctx.inputs["target"])
    requests = _RequestList(prompts, conversations, config.sampling, ctx.seed)
    drafter = ctx.inputs["drafter"] / DRAFTER_FOLDER if "drafter" in ctx.inputs else None
    answers = PartialAnswers(ctx.work)
    if config.answers is not None:
        if len(requests.rounds()) > 1:
            raise DraftsmithError("answers: prompts with further questions need a rollout. Remove the field.")
        splits = dict(zip(prompts.ids, prompts.splits, strict=True))
        vocab_size = read_target_info(ctx.inputs["target"]).vocab_size
        asked = requests.at(range(len(requests)))
        store_logged_answers(config.external_files(), asked, splits, vocab_size, answers)
    while True:
        _generate_missing(ctx, config, requests, drafter, answers)
        try:
            _write_tables(ctx, requests, answers, with_trace=drafter is not None)
            break
        except StageInterrupted:
            raise
        except DraftsmithError:  # first read of the tokens and steps of an earlier attempt
            if not answers.drop_damaged():
                raise
    if drafter is not None:
        difference, engine = TargetDifference.read_if_there(ctx.work), config.engine
        running = isinstance(engine, ServerEngineConfig) and engine.launch is None  # they choose their dtypes
        served = {
            "drafter_digest": drafter_digest(drafter),
            **config.drafting.key_material(),
            "engine": engine.kind,
            "dtype": None if running else read_target_info(ctx.inputs["target"]).dtype,
            "temperature": config.sampling.temperature,
            **({"differs": difference.settings} if difference else {}),
        }
        TraceSource.model_validate(served).write(ctx.out)


@dataclass
class _Conversations:
    """The prompts of a rollout that have further questions, and the answers so far."""

    questions: Mapping[str, Sequence[str]] = field(default_factory=dict)  # prompt -> questions after the first
    messages: Mapping[str, list[Message]] = field(default_factory=dict)  # prompt -> messages up to the first question
    tokenizer: Any = None
    template_kwargs: TemplateKwargs = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)  # request -> tokens

    @classmethod
    def read(cls, prompts: Path, prompt_ids: Sequence[str], target: Path) -> _Conversations:
        """Read the conversations that these prompts begin. prompts, target: folders of artifacts."""
        if not (path := prompts / "questions.parquet").is_file():
            return cls()
        asked, rows = set(prompt_ids), read_table(path, QUESTIONS).to_pylist()
        questions = {row["prompt_id"]: row["questions"] for row in rows if row["prompt_id"] in asked}
        table = read_table(prompts / "prompts.parquet", PROMPTS, ["prompt_id", "messages"]).to_pylist()
        messages = {row["prompt_id"]: row["messages"] for row in table if row["prompt_id"] in questions}
        template_kwargs = json.loads(rows[0]["chat_template_kwargs"])
        return cls(questions, messages, load_tokenizer(model_path(target)), template_kwargs)

    def turns(self, prompt_id: str) -> int:
        """Return the number of questions of a prompt: 1 unless it begins a conversation."""
        return 1 + len(self.questions.get(prompt_id, ()))

    def load(self, answers: PartialAnswers, finished: Collection[str]) -> None:
        """Load the answers of an earlier attempt."""
        ids = [f"{prompt}/{turn}" for prompt in self.questions for turn in range(self.turns(prompt))]
        if stored := [name for name in ids if name in finished]:
            for table in answers.rows(stored)["trajectories"].batches(["trajectory_id", "response_ids"]):
                self.answers |= dict(
                    zip(table["trajectory_id"].to_pylist(), table["response_ids"].to_pylist(), strict=True)
                )

    def add(self, completion: Completion) -> None:
        """Store an answer if it belongs to a conversation."""
        name = completion.request.request_id
        if name.rpartition("/")[0] in self.questions:
            self.answers[name] = completion.response_ids

    def prompt(self, prompt_id: str, turn: int) -> list[int]:
        """Return the tokens of a question with everything before it, rendered as a chat server does.

        turn: its number, from 1.
        """
        texts = [
            self.tokenizer.decode(self.answers[f"{prompt_id}/{earlier}"], skip_special_tokens=True)
            for earlier in range(turn)
        ]
        return self._render(prompt_id, texts)

    def whole(self, max_new_tokens: int) -> list[Prompt]:
        """Return the longest possible last prompt of each conversation; its tokens are placeholders."""
        prompts = []
        for prompt_id, questions in self.questions.items():
            tokens = len(self._render(prompt_id, [""] * len(questions))) + len(questions) * (max_new_tokens + _SEAM)
            prompts.append(Prompt(prompt_id, [0] * tokens))
        return prompts

    def _render(self, prompt_id: str, answers: Sequence[str]) -> list[int]:
        messages = list(self.messages[prompt_id])
        for answer, question in zip(answers, self.questions[prompt_id], strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return token_ids(self.tokenizer, messages, f"prompt {prompt_id}", self.template_kwargs)


class _RequestList:
    """The requests of a rollout by index. Each is made when it is sent, so that only the ids stay in memory.

    The questions of a conversation follow each other: a round of requests has one of each.
    """

    def __init__(self, prompts: PromptRows, conversations: _Conversations, sampling: SamplingConfig, seed: int):
        self.prompts, self.conversations, self._seed = prompts, conversations, seed
        self._max_new_tokens, self._sampling = sampling.max_new_tokens, sampling.params()
        self._rows = [
            (row, turn) for row, prompt in enumerate(prompts.ids) for turn in range(conversations.turns(prompt))
        ]
        self.ids = [f"{prompts.ids[row]}/{turn}" for row, turn in self._rows]

    def rounds(self) -> list[list[int]]:
        """Return the indices of the first questions, of the second ones, and so on."""
        by_turn: dict[int, list[int]] = defaultdict(list)
        for index, (_, turn) in enumerate(self._rows):
            by_turn[turn].append(index)
        return list(by_turn.values())

    def longest(self, max_positions: int) -> int:
        """Return the positions that the longest request needs, with its answer. Raises like `positions_needed`."""
        longest = positions_needed(self.prompts, self._max_new_tokens, max_positions)
        if whole := self.conversations.whole(self._max_new_tokens):
            longest = max(longest, positions_needed(whole, self._max_new_tokens, max_positions))
        return longest

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, indices: Iterable[int]) -> Iterator[Request]:
        for index in indices:
            row, turn = self._rows[index]
            prompt = self.prompts[row]
            ids = self.conversations.prompt(prompt.prompt_id, turn) if turn else prompt.token_ids
            seed = request_seed(self._seed, prompt.prompt_id, turn)
            yield Request(self.ids[index], ids, self._max_new_tokens, self._sampling, seed)


def _generate_missing(
    ctx: StageContext, config: RolloutConfig, requests: _RequestList, drafter: Path | None, answers: PartialAnswers
) -> None:
    """Generate the answers that an earlier attempt has not stored. drafter: the folder of its checkpoint."""
    if answers.finished(with_trace=drafter is not None).issuperset(requests.ids):
        return
    limit = read_target_info(ctx.inputs["target"]).max_positions
    longest = requests.longest(limit)
    splits = dict(zip(requests.prompts.ids, requests.prompts.splits, strict=True))
    with _open_engine(ctx, config, drafter, longest) as engine:
        # at its end slots are idle, so a larger batch is faster; a kill loses more
        batch_size = config.rows_per_shard or (16 * engine.slots if isinstance(engine, EmbeddedEngine) else 32)
        kind, _, version = engine.name.partition(" ")
        if version:
            write_versions(ctx.out, **{kind: version})
        finished = answers.finished(with_trace=engine.records_trace)  # answers suffice if no steps are recorded
        requests.conversations.load(answers, finished)
        batches = [
            [indices[place] for place in batch]
            for indices in requests.rounds()
            for batch in _pending_batches(
                [requests.ids[index] for index in indices], finished, batch_size, engine.batch_decides
            )
        ]
        done = len(requests) - sum(map(len, batches))
        if finished:
            ctx.log(f"{done} answers of an earlier attempt kept, {len(requests) - done} still missing")
        tokens, started = 0, time.perf_counter()
        for batch in batches:
            unsaved: list[Completion] = []
            try:
                for completion in engine.generate(requests.at(batch)):
                    unsaved.append(completion)
                    requests.conversations.add(completion)
                    tokens, done = tokens + len(completion.response_ids), done + 1
                    ctx.progress(done, len(requests), "answers", tokens_per_s=tokens / (time.perf_counter() - started))
                    if not engine.batch_decides and (len(unsaved) >= batch_size or ctx.interrupted):
                        answers.append(unsaved, splits, engine.name)
                        unsaved = []
                    ctx.check_interrupted()
            finally:  # answers are saved even if the engine is lost
                if not engine.batch_decides or len(unsaved) == len(batch):
                    answers.append(unsaved, splits, engine.name)
        ctx.summary(tokens_per_s=tokens / (time.perf_counter() - started))


def _write_tables(ctx: StageContext, requests: _RequestList, answers: PartialAnswers, *, with_trace: bool) -> None:
    rows = answers.rows(requests.ids)
    tables = {name: schema for name, schema in SCHEMAS.items() if name != "trace" or with_trace}
    done, total = 0, sum(int(rows[name].counts.sum()) for name in tables)
    tokens = stopped = steps = 0
    for name, schema in tables.items():
        with TableWriter(ctx.out / f"{name}.parquet", schema) as table:
            for chunk in rows[name].batches(schema.columns.names, BATCH_ROWS if name == "trace" else _WRITTEN_ROWS):
                table.append(chunk)
                done += chunk.num_rows
                ctx.progress(done, total, "rows written")  # takes minutes for many long answers
                ctx.check_interrupted()
                if name == "trajectories":
                    tokens += pc.sum(pc.list_value_length(chunk["response_ids"])).as_py()
                    stopped += pc.sum(pc.equal(chunk["finish_reason"], "stop")).as_py()
                if name == "timings":
                    steps += pc.sum(chunk["verify_steps"]).as_py()
    ctx.summary(
        answers=len(requests),
        response_tokens=tokens,
        stopped_share=stopped / len(requests),
        **({"tau": (tokens - len(requests)) / steps} if steps else {}),
    )


@contextmanager
def _open_engine(ctx: StageContext, config: RolloutConfig, drafter: Path | None, longest: int) -> Iterator[Engine]:
    """Load an engine into this process, or connect to servers, which are stopped on exit if they were started here.

    drafter: the folder of its checkpoint. longest: positions of the longest request, prompt and answer.
    """
    drafting = config.drafting
    if isinstance(config.engine, ServerEngineConfig):
        required = server_requirements(config.engine, ctx.inputs["target"], drafter, drafting, longest)
        with open_servers(config.engine, required, ctx.work, ctx.log, ctx.check_interrupted) as engine:
            if engine.target_difference is not None:
                engine.target_difference.write(ctx.work)
            yield engine
        return
    target = Target.load(ctx.inputs["target"])
    loaded = load_drafter(drafter, target) if drafter else None
    if loaded and drafting.head_tokens and loaded.frequent_tokens is None:
        ctx.log(f"drafter: {NO_FREQUENT_TOKENS}")
    block = (drafting.block_size or loaded.block_size) if loaded else 1
    slots = config.engine.slots_on(gpu=target.device.type == "cuda")
    yield EmbeddedEngine(target, loaded, slots=slots, capacity=longest + block, drafting=drafting)


def _pending_batches(
    request_ids: Sequence[str], finished: set[str], size: int, batch_decides: bool
) -> list[Sequence[int]]:
    """Return the indices of the requests to send, batch by batch.

    Where the batch decides near-ties, batches do not depend on what is finished: a batch that misses an answer is
    generated again as a whole.
    """
    if not batch_decides:
        return [[index for index, name in enumerate(request_ids) if name not in finished]]
    batches = [range(start, min(start + size, len(request_ids))) for start in range(0, len(request_ids), size)]
    return [batch for batch in batches if not finished.issuperset(request_ids[index] for index in batch)]
