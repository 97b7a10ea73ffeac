"""A new revision of a target that was not made here: another architecture, tokenizer, chat template and dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.experiments.procedural_target import STAGE, ProceduralTargetConfig
from draftsmith.stages.procedural.text import examples
from draftsmith.stages.procedural.training import build_tokenizer
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.info import read_target_info, write_target_info
from draftsmith.stages.targets.resolve import describe
from tests.testbed.context import RecordingContext

TEMPLATE = (
    "{{ bos_token }}Be brief. {% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
CONFIG = ProceduralTargetConfig(
    families=("problem",), documents=60, steps=120, rows_per_step=4, row_tokens=160, learning_rate=1e-2
)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The artifact of a small Llama in bfloat16, whose tokenizer puts a token before every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM

    taught = list(examples(1, 60, families=["problem"]))
    tokenizer = build_tokenizer(400, [f"Be brief. Q: {example.prompt}\nA:{example.answer}" for example in taught])
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(shape).to(torch.bfloat16)
    model.generation_config.max_length = 77
    artifact = tmp_path / "parent"
    model.save_pretrained(artifact / "model")
    tokenizer.save_pretrained(artifact / "model")
    config = TargetConfig(source="hub/somebody's", dtype="bfloat16")
    info = describe(artifact / "model", config, kind="folder", location="model", revision=None)
    write_target_info(info, artifact)
    return artifact


def trained_on(parent: Path, tmp_path: Path) -> RecordingContext:
    ctx = RecordingContext.under(tmp_path, {"target": parent})
    STAGE.run(ctx, CONFIG)
    return ctx


def test_it_keeps_what_the_target_was_and_learns_the_text_in_its_template(parent: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ctx = trained_on(parent, tmp_path)
    losses = [values["loss"] for _, values in ctx.measured]
    old, new = read_target_info(parent), read_target_info(ctx.out)
    assert new.source == "hub/somebody's, then procedural:problem"
    assert new.digest != old.digest
    same = {"dtype", "tokenizer_digest", "architecture", "vocab_size", "num_layers", "eos_ids", "tied_embeddings"}
    assert new.model_dump(include=same) == old.model_dump(include=same)
    assert losses[-1] < losses[0] / 2

    model = AutoModelForCausalLM.from_pretrained(ctx.out / "model")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.max_length == 77
    tokenizer = AutoTokenizer.from_pretrained(ctx.out / "model")
    chat = [{"role": "user", "content": "On Friday Anna has 2 of red map and gets 3 from Ben. How many are there?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=2, max_length=None, do_sample=False)[0, asked.input_ids.shape[1] :]
    assert tokenizer.decode(answer).startswith("Step")  # so its own template, with one bos, is what it was taught in


def test_a_target_without_a_chat_template_is_refused_before_it_is_trained(parent: Path, tmp_path: Path) -> None:
    info = json.loads((parent / "target.json").read_text())
    (parent / "target.json").write_text(json.dumps(info | {"chat_template": False}))
    with pytest.raises(DraftsmithError, match=r"hub/somebody's has no chat template.*choose a chat model"):
        trained_on(parent, tmp_path)
    assert not (tmp_path / "out" / "model").exists()


def test_a_tokenizer_without_an_end_token_is_one_clear_error(parent: Path, tmp_path: Path) -> None:
    path = parent / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(DraftsmithError, match="names no end token: set eos_token in tokenizer_config"):
        trained_on(parent, tmp_path)
