"""Does a server that drafts draw sampled answers as the target does, or verify greedily whatever the temperature?

SGLang takes the argmax where it has no kernel that samples: on a CPU, and by algorithm and release on AMD, Intel and
Ascend devices, which it may call `cuda` all the same. So a server is asked at a temperature that makes all tokens
of the vocabulary about as likely. The first token is drawn from the prompt without a verify step; where those behind
it are greedy decoding's, they were not drawn: by chance `_EQUAL` tokens are that once in (vocabulary)^`_EQUAL`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.sglang.asking import generate
from draftsmith.stages.engines.sglang.records import completion_of

if TYPE_CHECKING:
    import httpx

    from draftsmith.stages.targets.info import TargetInfo

_TEMPERATURE = 1e3
_EQUAL = 3
_ROUNDS = 3  # a near-tie of half precision may hide it from one


async def verifies_greedily(client: httpx.AsyncClient, url: str, target: TargetInfo, prompt_ids: list[int]) -> bool:
    """prompt_ids: what is continued. Raises DraftsmithError if the server does not answer as it should."""
    for seed in range(_ROUNDS):
        sampled = await _tokens(client, url, target, prompt_ids, SamplingParams(1 + _EQUAL, _TEMPERATURE), seed)
        greedy = await _tokens(client, url, target, [*prompt_ids, sampled[0]], SamplingParams(_EQUAL))
        if sampled[1:] == greedy:
            return True
    return False


async def _tokens(
    client: httpx.AsyncClient,
    url: str,
    target: TargetInfo,
    prompt_ids: list[int],
    sampling: SamplingParams,
    seed: int = 0,
) -> list[int]:
    request = Request("of the handshake", prompt_ids, sampling, seed)
    body = await generate(client, url, request)
    done = completion_of(request, body, eos_ids=target.eos_ids, vocab_size=target.vocab_size)
    return done.response_ids
