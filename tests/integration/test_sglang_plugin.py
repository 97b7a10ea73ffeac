"""The plug-in in a real server: every verify step of every request that asked, checked against transformers.

The check takes nothing from the server but tokens: the target's float32 logits behind the prompt, the answer so far and
the proposed block say which proposals a greedy verification keeps, which token follows, and each proposal's log-prob.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.sglang.protocol import KEY, SUPPORTED
from tests.sglang_cpu.eagle import write_eagle3
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.options import CPU_ENVIRONMENT
from tests.sglang_cpu.server import generate, running_server
from tests.testbed import target
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

TOLERANCE = 1e-4  # nats, float32
ASK = {KEY: True}
Answer = dict[str, Any]


class Reference:
    """The target in transformers, float32."""

    def __init__(self, model: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompts: list[list[int]] = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": example.prompt}], add_generation_prompt=True, return_dict=False
            )
            for example in target.fresh_prompts(24)
        ]

    @torch.no_grad()
    def _logits(self, tokens: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([tokens])).logits[0].float()
        return logits

    def check(self, prompt: list[int], answer: Answer, drafter: str) -> Counter[int]:
        """Assert all that a trace promises; the accepted lengths of its steps are returned."""
        output, meta = answer["output_ids"], answer["meta_info"]
        elements = meta[KEY]
        assert len(elements) == len(output)
        assert elements[0] == {"v": "1", "drafter": drafter}
        accepted: Counter[int] = Counter()
        at, prefills = 1, 0
        while at < len(output):
            step = elements[at]
            if step is None:  # a prefill made this token
                assert output[at] == self._logits(prompt + output[:at])[-1].argmax().item()
                at, prefills = at + 1, prefills + 1
                continue
            committed = self._check_step(prompt, output, at, step, drafter)
            assert elements[at + 1 : at + committed] == [None] * (min(at + committed, len(output)) - at - 1)
            accepted[step["accepted"]] += 1
            at += committed
        # A request that is retracted again before it ran has one prefill for both.
        assert prefills <= meta["num_retractions"]
        assert accepted.total() == meta.get("spec_verify_ct", 0)  # SGLang's own count; none for one token
        return accepted

    def _check_step(self, prompt: list[int], output: list[int], at: int, step: Answer, drafter: str) -> int:
        """One record; how many tokens it committed."""
        assert (step["v"], step["drafter"]) == ("1", drafter)
        assert step["anchor"] == len(prompt) + at - 1
        block, kept = step["block"], step["accepted"]
        logits = self._logits(prompt + output[:at] + block)[step["anchor"] :]
        best = logits.argmax(-1).tolist()
        agreeing = next((j for j, token in enumerate(block) if token != best[j]), len(block))
        assert (kept, step["bonus"]) == (agreeing, best[agreeing])
        committed = [*block[:kept], step["bonus"]]
        assert output[at : at + len(committed)] == committed[: len(output) - at]  # the end of an answer cuts it
        exact = logits[:-1].log_softmax(-1).gather(1, torch.tensor(block)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(step["logprobs"]), exact, rtol=0, atol=TOLERANCE)
        return len(committed)


@pytest.fixture(scope="module")
def reference(serving_target: ServingTarget) -> Reference:
    return Reference(serving_target.model)


def body(prompt: list[int], *, trace: bool = True, **sampling: object) -> Answer:
    custom = {"custom_params": ASK} if trace else {}
    return {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 48, "ignore_eos": True, **custom, **sampling},
    }


def last_chunk(url: str, request: Answer) -> Answer:
    """The last piece of a streamed answer: SGLang repeats in it all that came before."""
    pieces: list[Answer] = []
    with httpx.stream("POST", f"{url}/generate", json={**request, "stream": True}, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith("data:") and "[DONE]" not in line:
                pieces.append(json.loads(line[5:]))
    assert len(pieces) > 1  # it was streamed
    return pieces[-1]


def asked_for_nothing(answer: Answer) -> bool:
    """SGLang fills up with None where another request of the batch brings a list."""
    return not any(answer["meta_info"].get(KEY) or [])


@pytest.fixture(scope="module")
def digest(serving_target: ServingTarget) -> str:
    return drafter_digest(serving_target.drafter)


def test_every_step_of_dflash_arrives_and_is_right(dflash_url: str, reference: Reference, digest: str) -> None:
    prompts = reference.prompts[:12]
    answers = generate(dflash_url, [body(prompt) for prompt in prompts], concurrency=6)
    accepted: Counter[int] = Counter()
    for prompt, answer in zip(prompts, answers, strict=True):
        accepted += reference.check(prompt, answer, digest)
    assert len(accepted) == 8  # blocks of eight: none to all of the seven proposals


def test_requests_of_one_batch_ask_each_for_itself(dflash_url: str, reference: Reference, digest: str) -> None:
    """Streamed and not, of different lengths, so that batches shrink while they run."""
    prompts = reference.prompts

    def ask(number: int) -> Answer:
        request = body(prompts[number], trace=number % 3 != 0, max_new_tokens=7 + 2 * number)
        if number % 2:
            return last_chunk(dflash_url, request)
        return generate(dflash_url, [request])[0]

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if number % 3 == 0:
            assert asked_for_nothing(answer)
        else:
            reference.check(prompt, answer, digest)


def test_a_block_is_cut_wherever_the_answer_ends(dflash_url: str, reference: Reference, digest: str) -> None:
    prompt = reference.prompts[0]
    whole = generate(dflash_url, [body(prompt)])[0]
    first = whole["meta_info"][KEY][1]
    assert first["accepted"] >= 3  # what follows ends inside its block
    for tokens in range(1, 5):
        answer = generate(dflash_url, [body(prompt, max_new_tokens=tokens)])[0]
        assert answer["output_ids"] == whole["output_ids"][:tokens]
        reference.check(prompt, answer, digest)
    stop = whole["output_ids"][3]
    assert stop not in whole["output_ids"][:3]
    answer = generate(dflash_url, [body(prompt, ignore_eos=False, stop_token_ids=[stop])])[0]
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert answer["output_ids"] == whole["output_ids"][:4]
    reference.check(prompt, answer, digest)
    assert answer["meta_info"][KEY][1] == first


def test_tracing_changes_no_answer(dflash_url: str, reference: Reference) -> None:
    prompts = reference.prompts[:8]
    plain = generate(dflash_url, [body(prompt, trace=False) for prompt in prompts])
    traced = generate(dflash_url, [body(prompt) for prompt in prompts])
    assert [answer["output_ids"] for answer in plain] == [answer["output_ids"] for answer in traced]
    assert all(asked_for_nothing(answer) for answer in plain)


def test_a_server_without_a_drafter_answers_as_ever(plain_url: str, reference: Reference) -> None:
    answer = generate(plain_url, [body(reference.prompts[0])])[0]
    assert len(answer["output_ids"]) == 48 and KEY not in answer["meta_info"]


@pytest.fixture(scope="module")
def busy_url(sglang_env: Path, serving_target: ServingTarget, sglang_logs: Path) -> Iterator[str]:
    """Scheduling overlapped (the default on a GPU), prompts in chunks, requests thrown out, all asked for."""
    options = {"disable-overlap-schedule": False, "chunked-prefill-size": 16}
    environment = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7", "DRAFTSMITH_TRACE": "1"}
    served, log = serving_target, sglang_logs / "busy.log"
    with running_server(
        sglang_env, served.model, served.drafter, options=options, log=log, environment=environment
    ) as url:
        yield url


def test_overlap_chunks_and_retractions_lose_nothing(busy_url: str, reference: Reference, digest: str) -> None:
    prompts = reference.prompts
    assert max(len(prompt) for prompt in prompts) > 16  # prefilled in chunks
    requests = [body(prompt, trace=False, max_new_tokens=30 + 2 * i) for i, prompt in enumerate(prompts)]
    answers = generate(busy_url, requests, concurrency=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        reference.check(prompt, answer, digest)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0


@pytest.fixture(scope="module")
def eagle_folder(
    serving_target: ServingTarget, tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random EAGLE-3 drafter that can propose the sixteen most frequent tokens of the target's answers."""
    import pyarrow.parquet as pq

    answers = pq.read_table(tiny_drafter.rollout / "trajectories.parquet", columns=["response_ids"])
    count = Counter(token for answer in answers["response_ids"].to_pylist() for token in answer)
    folder = tmp_path_factory.mktemp("eagle3")
    write_eagle3(folder, serving_target.model, [token for token, _ in count.most_common(16)])
    return folder


def test_every_step_of_an_eagle3_chain_arrives_and_is_right(
    sglang_env: Path, serving_target: ServingTarget, eagle_folder: Path, reference: Reference, sglang_logs: Path
) -> None:
    options = {"speculative-num-steps": 3, "speculative-eagle-topk": 1, "speculative-num-draft-tokens": 4}
    log = sglang_logs / "eagle3.log"
    with running_server(sglang_env, serving_target.model, eagle_folder, "EAGLE3", options, log=log) as url:
        prompts = reference.prompts
        requests = [body(prompt, trace=i % 4 != 0) for i, prompt in enumerate(prompts)]
        answers = generate(url, requests, concurrency=8)
    digest = drafter_digest(eagle_folder)
    accepted: Counter[int] = Counter()
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if number % 4 == 0:
            assert asked_for_nothing(answer)
        else:
            accepted += reference.check(prompt, answer, digest)
    assert accepted[0] and accepted[1]  # both outcomes were seen


def test_sglang_ends_where_a_hook_is_missing(sglang_env: Path) -> None:
    """SGLang's own loader would log an error of a plug-in and go on without it."""
    program = (
        "from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2\n"
        "del DFlashWorkerV2._accept_block\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [str(sglang_env), "-c", program],
        env={**inherited, **CPU_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1
    assert "DFlashWorkerV2._accept_block is missing" in ended.stderr
    assert f"It supports {SUPPORTED}" in ended.stderr
