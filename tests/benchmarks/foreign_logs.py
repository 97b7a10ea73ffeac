"""How many answers stage `logs` finds foreign, of another temperature, template or model, and of rounded weights.

The prompts are answered by the target itself and by others, and tested as rows of text are: after the target's own
chat template. Of the test bed's target, and with `--target smollm2` of SmolLM2-135M, whose weights are rounded too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from reasoning_gym.factory import create_dataset
from safetensors.torch import load_file

from draftsmith.stages.data.chat_template import token_ids
from draftsmith.stages.data.logs.likelihood import ReadAnswer, describe_foreign, foreign_error, read_answer
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.row_formats import Message
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.body import resolve_target
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.sampling import SamplingParams
from tests.benchmarks.harness import SMOLLM2
from tests.lab.seasons import copy_target, rounded
from tests.testbed.target import prompts_file, revision_folder, target_folder

SYSTEM: Message = {"role": "system", "content": "Answer in the usual form."}
BITS = {"weights in int8": (8, None), "weights in 4 bits, a scale for 32": (4, 32), "weights in 3 bits": (3, 32)}
TASKS = ("gsm_symbolic", "gcd", "lcm")  # the quickstart's
Prompts = Sequence[list[int]]
Arm = tuple[str, Target, Prompts, float, float]  # name, who answers what at which temperature, and the configured one


def questions(smollm2: bool, count: int) -> list[list[Message]]:
    """Return prompts that the target was not trained on."""
    if not smollm2:
        return [json.loads(line)["messages"] for line in prompts_file().read_text().splitlines()[:count]]
    tasks = [create_dataset(task, seed=0, size=count) for task in TASKS]
    texts = [f"{tasks[i % len(tasks)][i]['question']} Solve it in three short numbered steps." for i in range(count)]
    return [[{"role": "user", "content": text}] for text in texts]


def without_layers(folder: Path, out: Path, layers: Sequence[int]) -> Path:
    """Write a model whose layers add nothing: another model of the same vocabulary."""
    weights = load_file(folder / "model.safetensors")
    for layer in layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"].zero_()
    copy_target(folder, out, weights)
    return out


def arms(smollm2: bool, count: int, folder: Path) -> Iterator[Arm]:
    """Yield who answers, and at which temperature; the first one is the target itself."""
    source = SMOLLM2 if smollm2 else str(target_folder())
    resolve_target(TargetConfig(source=source, dtype="bfloat16" if smollm2 else "float32"), folder, lambda _line: None)
    ours, model = Target.load(folder), folder / "model" if smollm2 else target_folder()
    asked = questions(smollm2, count)
    prompts = [token_ids(ours.tokenizer, each, "", {}) for each in asked]
    sampled = 0.7 if smollm2 else 1.0
    for given in (0.0, sampled, 1.3):
        for configured in (0.0, sampled):
            yield f"its own, at temperature {given:g}", ours, prompts, given, configured
    plain = [list(ours.tokenizer(each[0]["content"])["input_ids"]) for each in asked]
    other = [token_ids(ours.tokenizer, [SYSTEM, *each], "", {}) for each in asked]
    for temperature in (0.0, sampled):
        yield "without the chat template", ours, plain, temperature, temperature
        yield "another system prompt", ours, other, temperature, temperature
    made = {name: folder / f"bits-{bits}" for name, (bits, _) in BITS.items()}
    for name, (bits, group) in BITS.items():
        copy_target(model, made[name], rounded(load_file(model / "model.safetensors"), bits, group))
    if smollm2:
        made["without two of its 30 layers"] = without_layers(model, folder / "cut", (14, 15))
    else:
        made["another revision"] = revision_folder()
    for name, copy in made.items():
        theirs = Target.from_source(copy, dtype="bfloat16" if smollm2 else "float32")
        for temperature in (0.0, sampled):
            yield name, theirs, prompts, temperature, temperature


def answers(target: Target, prompts: Prompts, temperature: float, tokens: int) -> list[list[int]]:
    requests = [Request(str(i), p, tokens, SamplingParams(temperature), i) for i, p in enumerate(prompts)]
    found = EmbeddedEngine(target, slots=32, capacity=max(map(len, prompts)) + tokens).generate(requests)
    return [each.response_ids for each in sorted(found, key=lambda each: int(each.request.request_id))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=80, help="of an answer, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        own: tuple[Target, Prompts] | None = None
        for name, theirs, asked, given, configured in arms(options.target == "smollm2", options.rows, Path(folder)):
            own = own or (theirs, asked)
            config, read = LogsConfig(paths=["a"], temperature=configured), list[ReadAnswer]()
            for prompt, answer in zip(own[1], answers(theirs, asked, given, options.tokens), strict=True):
                if len(answer) > 1:
                    read.append(read_answer(own[0], prompt, answer, config.sampling))
            found = describe_foreign(config, read) or f"0 of {len(read)}"
            print(f"{name}, read at {configured:g}: {found}\n    {foreign_error(own[0], config, read)}", flush=True)


if __name__ == "__main__":
    main()
