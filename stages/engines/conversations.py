"""Conversations of a rollout: questions that each follow the target's answer to the one before."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import PROMPTS, QUESTIONS
from draftsmith.stages.data.chat_template import token_ids
from draftsmith.stages.data.row_formats import Message, TemplateKwargs
from draftsmith.stages.data.trajectories import Prompt
from draftsmith.stages.engines.base import Completion
from draftsmith.stages.engines.partial_answers import PartialAnswers
from draftsmith.stages.target.info import load_tokenizer, model_path

_SEAM = 16  # tokens by which an answer may become longer when its text is tokenised again


@dataclass
class Conversations:
    """The prompts of a rollout that have further questions, and the answers so far."""

    questions: Mapping[str, Sequence[str]] = field(default_factory=dict)  # prompt -> after the first
    messages: Mapping[str, list[Message]] = field(default_factory=dict)  # prompt -> up to the first
    tokenizer: Any = None
    template_kwargs: TemplateKwargs = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)  # request -> tokens

    @classmethod
    def read(cls, prompts: Path, prompt_ids: Sequence[str], target: Path) -> Conversations:
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
        """Take an answer, if it is one of a conversation."""
        name = completion.request.request_id
        if name.rpartition("/")[0] in self.questions:
            self.answers[name] = completion.response_ids

    def prompt(self, prompt_id: str, turn: int) -> list[int]:
        """Return the tokens of a question with everything before it, rendered as a chat server does. turn: from 1."""
        texts = [
            self.tokenizer.decode(self.answers[f"{prompt_id}/{earlier}"], skip_special_tokens=True)
            for earlier in range(turn)
        ]
        return self._render(prompt_id, texts)

    def whole(self, max_new_tokens: int) -> list[Prompt]:
        """Return the longest possible last prompt of each conversation; its tokens are placeholders."""
        found = []
        for prompt_id, questions in self.questions.items():
            tokens = len(self._render(prompt_id, [""] * len(questions))) + len(questions) * (max_new_tokens + _SEAM)
            found.append(Prompt(prompt_id, [0] * tokens))
        return found

    def _render(self, prompt_id: str, answers: Sequence[str]) -> list[int]:
        messages = list(self.messages[prompt_id])
        for answer, question in zip(answers, self.questions[prompt_id], strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return token_ids(self.tokenizer, messages, f"prompt {prompt_id}", self.template_kwargs)
