"""`stages/adding.md`: what each section adds, made from the page in a copy of the packages, and run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.testbed.drafter import DrafterArtifacts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "stages" / "adding.md"
_BLOCK = re.compile(r"^(?:`|\*\*)([\w./]+)(?:`|\*\*, new):\n\n```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Run = Callable[..., None]


def apply(text: str, diff: str) -> str:
    """Return the text with a diff of one place, which its context must name uniquely."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    assert text.count(before) == 1 and before, diff
    return text.replace(before, after)


@pytest.fixture
def add(tmp_path: Path) -> Callable[[str], Run]:
    """Return a function that makes a section's addition, and returns one that runs Python where it is there."""
    scratch = tmp_path / "scratch"

    def make(section: str) -> Run:
        package = scratch / "draftsmith"
        for folder in ("artifacts", "flows", "stages"):  # with their compiled files
            shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("package", "*.md"))
        shutil.copy(ROOT / "flows" / "package" / "__init__.py", package)
        shutil.copy(ROOT / "pyproject.toml", package)
        (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        blocks = _BLOCK.findall(text)
        assert len(blocks) == text.count("\n```\n")  # each has its file
        for name, kind, block in blocks:
            path = (package if (ROOT / name.partition("/")[0]).exists() else scratch) / name
            assert path.exists() == (kind == "diff"), name
            path.parent.mkdir(exist_ok=True)
            path.write_text(apply(path.read_text("utf-8"), block) if kind == "diff" else block, "utf-8")
        for directory in {path.parent for path in package.rglob("*.py")}:  # setuptools installs what is listed
            listed = f'"{".".join(directory.relative_to(scratch).parts)}"'
            assert listed in (package / "pyproject.toml").read_text("utf-8"), listed
        return run

    def run(script: str, *arguments: object) -> None:
        check = f"import draftsmith, sys; assert draftsmith.__file__.startswith({str(scratch)!r})\n"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(scratch), str(ROOT)])}
        command = [sys.executable, "-c", check + script, *map(str, arguments)]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    return make


_LOSS = """
from pathlib import Path
import torch
from draftsmith.stages.training import losses
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.trainer import TrainingData
from tests.testbed.random_target import random_drafter, random_target, trajectories

logits_q, logits_p = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(losses.reverse_kl(logits_q, logits_p), losses.forward_kl(logits_p, logits_q))
target, data = random_target(Path(sys.argv[1])), TrainingData(trajectories=trajectories(4))
found = []
for name in ("my_losses:reverse_kl", "reverse_kl"):
    config = SftConfig(loss=name, sequences_per_step=4, compute_dtype="float32")
    (report,) = SftTraining(random_drafter(target), target, data, config).micro_batches(0, None)
    report.loss.backward()
    found.append(report.loss.detach())
torch.testing.assert_close(*found)
"""


def test_a_loss(add: Callable[[str], Run], tmp_path: Path) -> None:
    add("A loss")(_LOSS, tmp_path / "target")


_DRAFTER = """
from pathlib import Path
import torch
from draftsmith.stages.drafters.checkpoint import check_complete, create_drafter, load_drafter, save_drafter
from draftsmith.stages.drafters.registry import KINDS
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.trainer import TrainingData
from tests.testbed.random_target import MASK, random_target, trajectories

folder = Path(sys.argv[1])
target = random_target(folder)
sizes = {"num_layers": 2, "block_size": 5, "target_layer_ids": (0, 2), "mask_token": MASK}
config = SftConfig(drafter={"kind": "offsets", **sizes}, sequences_per_step=4, compute_dtype="float32")
assert type(config.drafter) is KINDS["offsets"].shape
drafter = create_drafter(config.drafter, target, 0)
(report,) = SftTraining(drafter, target, TrainingData(trajectories=trajectories(4)), config).micro_batches(0, None)
report.loss.backward()
assert bool(drafter.offsets.grad.any())
(folder / "drafter").mkdir()
save_drafter(drafter, folder / "drafter", torch.float32)
check_complete(folder / "drafter")
loaded = load_drafter(folder / "drafter", target)
assert loaded.kind == "offsets" and torch.equal(loaded.offsets, drafter.offsets)
requests = [Request(str(i), [i + 1, 7, 3], 12) for i in range(4)]
engines = [EmbeddedEngine(target, each, capacity=64) for each in (None, loaded)]
plain, drafted = ({done.request.request_id: done.response_ids for done in e.generate(requests)} for e in engines)
assert plain == drafted and len(plain) == 4
"""


def test_a_drafter(add: Callable[[str], Run], tmp_path: Path) -> None:
    add("A drafter")(_DRAFTER, tmp_path / "target")


_ENGINE = """
from pathlib import Path
from pydantic import TypeAdapter
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.config import EngineConfig
from draftsmith.stages.engines.registry import open_servers
from draftsmith.stages.engines.servers.requirements import server_requirements
from tests.stages.engines.http_server import serving

target, work = map(Path, sys.argv[1:])
work.mkdir()

def generate(payload):
    tokens = [payload["prompt"][-1] + 1] * payload["max_new_tokens"]
    known = {"prompt_tokens": len(payload["prompt"]), "finish_reason": "length", "verify_steps": 3}
    return {"tokens": tokens, **known}

def answers(vocabulary):
    with serving(generate, info=lambda _: {"version": "1.0", "vocab_size": vocabulary}) as server:
        config = TypeAdapter(EngineConfig).validate_python({"kind": "plain", "urls": [server.url]})
        required = server_requirements(config, target, None, DraftingConfig(), longest=64)
        with open_servers(config, required, work, print) as engine:
            assert engine.name == "plain 1.0" and not engine.records_trace
            return list(engine.generate([Request(f"r{i}", [i + 10], 4) for i in range(3)]))

from draftsmith.stages.targets.info import read_target_info
vocabulary = read_target_info(target).vocab_size
done = {each.request.request_id: each for each in answers(vocabulary)}
assert {name: each.response_ids for name, each in done.items()} == {f"r{i}": [i + 11] * 4 for i in range(3)}
assert {each.verify_steps for each in done.values()} == {3}
try:
    answers(vocabulary + 1)
except DraftsmithError as error:
    assert "serves another target" in str(error)
else:
    raise AssertionError("another target was accepted")
"""


def test_an_engine(add: Callable[[str], Run], tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    add("An engine")(_ENGINE, tiny_drafter.target, tmp_path / "work")


_STAGE = """
from importlib import import_module
from pathlib import Path
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.stages.catalog import STAGES
from tests.testbed.context import RecordingContext
from tests.testbed.refresh import small_refresh

assert "loops" in STAGES
fields = small_refresh("r", "target", "prompts.jsonl", 8, loops={"splits": ["validation"]})
config = RefreshConfig.model_validate(fields)
(node,) = [each for each in refresh_nodes(config) if each.name == "loops"]
assert node.inputs == {"trajectories": "heldout"} and "torch" not in sys.modules
context = RecordingContext.under(Path(sys.argv[2]), {"trajectories": Path(sys.argv[1])})
node.stage.run(context, node.config)
made = context.json("loops.json")
assert made["answers"] > made["looping"] >= 0 and context.summaries == {"loop_share": made["looping"] / made["answers"]}
"""


def test_a_stage(add: Callable[[str], Run], tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    add("A stage")(_STAGE, tiny_drafter.heldout, tmp_path / "loops")


_RULE = """
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.stages.evaluation.gate import GateConfig, decide

drafters = {"opd": {"tau": 3.0, "tau_low": 2.8, "tau_high": 3.2, "prompts": 20}}
exact = {"fp32_prompts": 4, "fp32_identical": 4}
evaluation = EvaluationResult.model_validate({"drafters": drafters, "exactness": exact})
for wanted, outcome in ((20, "promoted"), (21, "inconclusive")):
    decision = decide(evaluation, GateConfig(min_prompts=wanted, judge_speed=False))
    assert decision.outcome == outcome, decision
    assert [rule.name for rule in decision.failed] == ["prompts"] * (outcome != "promoted"), decision
"""


def test_a_gate_rule(add: Callable[[str], Run]) -> None:
    add("A gate rule")(_RULE)
