"""A prompt's messages as the target's token ids."""

from __future__ import annotations

from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.prompting.sources import Candidate


def rendered(tokenizer: Any, candidate: Candidate, template_kwargs: dict[str, Any]) -> str:
    """The chat template with its generation prompt. Raises DraftsmithError if it refuses the messages."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            candidate.messages, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DraftsmithError(
            f"{candidate.where}: the target's chat template refuses it ({error}): change the row"
        ) from error
    return text


def token_ids(tokenizer: Any, candidate: Candidate, template_kwargs: dict[str, Any]) -> list[int]:
    """Ids up to where the answer begins: the chat template with its generation prompt, or plain text without one."""
    if not tokenizer.chat_template:
        text = "\n\n".join(message["content"] for message in candidate.messages)
        return list(tokenizer(text)["input_ids"])
    text = rendered(tokenizer, candidate, template_kwargs)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
