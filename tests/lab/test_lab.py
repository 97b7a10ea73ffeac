"""The lab: its files are valid, a named loss is in the key, and a small experiment runs end to end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.flows.config.load import read_config
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display
from draftsmith.flows.planning.graph import Node, Selection
from draftsmith.flows.planning.plan import Build
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.replay.steps import AcceptanceStats
from draftsmith.stages.training import losses
from draftsmith.stages.training.config import OpdConfig, SftConfig
from tests.lab.experiment import LabConfig, lab_nodes
from tests.lab.results import rows, show_results
from tests.testbed.artifacts import committed
from tests.testbed.context import RecordingContext

FILES = sorted(Path(__file__).parent.glob("experiments/*.yaml"))
TAUGHT = {"documents": 300, "rows_per_step": 4, "learning_rate": 8.0e-3}
SAMPLING = {"max_new_tokens": 48, "temperature": 1.0}
TRAINING = {"sequences_per_step": 4, "anchors_per_sequence": 6, "compute_dtype": "float32"}
LK = {"loss": {"response": {"loss": "tests.lab.losses:lk"}}}
SMALL: dict[str, Any] = {
    "name": "small",
    "stages": {"threads": 1, "min_free_gb": 0.01},
    "target": {"steps": 60, **TAUGHT},
    "shape": {"hidden_size": 64, "layers": 4, "heads": 2, "kv_heads": 1, "intermediate_size": 128},
    "prompts": {"families": ["record", "story"], "train": 40, "validation": 4, "heldout": 8},
    "rollout": {"prompts": 20, "sampling": SAMPLING},
    "sft": {
        **TRAINING, "steps": 30, "learning_rate": 3e-3,
        "drafter": {"num_layers": 1, "block_size": 4, "target_layer_ids": [0, 1, 2]},
    },
    "fresh": {"skip": 20, "prompts": 20, "sampling": SAMPLING},
    "opd": {**TRAINING, "learning_rate": 1e-3},
    "heldout": {"splits": ["validation", "heldout"], "sampling": SAMPLING},
    "arms": {"sft": {"stage": "sft"}, "lk": {"stage": "opd", "change": LK}},
    "budgets": [6],
    "seeds": [1],
}  # fmt: skip


def test_there_are_at_most_ten_experiments() -> None:
    assert 1 < len(FILES) <= 10


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "base"], ids=lambda path: path.stem)
def test_every_experiment_is_valid(path: Path) -> None:
    config = read_config(path, [], LabConfig)
    assert config.name == path.stem and len(config.seeds) >= 3
    assert {arm.stage for arm in config.arms.values()} == {"sft", "opd"}


@pytest.mark.parametrize(
    "change", ["arms.opd.change={learning_rat: 1}", "arms.opd.init=random", "seeds=[0, 0]", "arms={}"]
)
def test_a_bad_experiment_is_refused_by_field(change: str) -> None:
    with pytest.raises(DraftsmithError, match=change.partition("=")[0].partition(".")[0]):
        read_config(FILES[0].with_name("plateau.yaml"), [change], LabConfig)


@pytest.mark.parametrize("stage", ["sft", "opd"])
def test_the_key_holds_the_source_of_a_named_loss(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "losses_of_mine.py"
    source.write_text("def mine(logits, log_p): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    name = "losses_of_mine:mine"
    config = (
        SftConfig(loss=name) if stage == "sft" else OpdConfig.model_validate({"loss": {"response": {"loss": name}}})
    )
    node = Node("it", STAGES[stage], config)
    run = RunOptions(name="t")
    before = Build.of(REFRESH, run, node, {}).key
    assert Build.of(REFRESH, run, node, {}).key == before
    source.write_text("def mine(logits, log_p): return log_p.sum(-1)\n")
    assert Build.of(REFRESH, run, node, {}).key != before


@pytest.mark.parametrize("name", ["tv", "lk", "cross-entropy", "nowhere.at_all:mine", "tests.lab.losses:"])
def test_an_unknown_loss_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        SftConfig(loss=name)
    with pytest.raises(ValidationError):
        OpdConfig.model_validate({"loss": {"response": {"loss": name}}})


def test_a_module_without_the_named_function_is_refused() -> None:
    with pytest.raises(DraftsmithError):
        losses.imported("tests.lab.losses:absent")


def test_the_interval_is_of_the_mean_over_seeds() -> None:
    def tally(committed: list[float]) -> AcceptanceStats:
        made = AcceptanceStats(len(committed))
        made.committed, made.steps = np.array(committed), np.ones(len(committed))
        return made

    arms = {"before": [[1.0, 1, 1]], "sft": [[2.0, 3, 4], [2.0, 3, 4]], "opd": [[3.0, 4, 5], [3.0, 4, 6]]}
    tallies = {(arm, 5 * (arm != "before")): list(map(tally, seeds)) for arm, seeds in arms.items()}
    costs = {group: [[10.0, 2.0]] * len(seeds) for group, seeds in tallies.items()}
    before, sft, opd = rows(tallies, costs, ["a", "b", "c"])
    assert before[4] == "1.000" and sft[-3:] == ["", "", ""]
    assert opd[:7] == ["opd", "5", "10", "2", "4.167", "4.000 4.333", "+1.167"]
    low, high = map(float, opd[7].strip("[]").split(","))
    assert low < 7 / 6 < high and low + high == pytest.approx(7 / 3, abs=2e-3)


def test_a_small_experiment_has_a_table_for_each_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its stages run in this process; those of a refresh show what the command adds."""
    store, seen = Store(tmp_path / "store"), dict[str, Path]()
    for number, node in enumerate(Selection().nodes(lab_nodes(LabConfig.model_validate(SMALL)))):
        inputs = {name: seen[source] for name, source in node.inputs.items()}
        run = partial(run_stage, node, tmp_path / node.name, inputs)
        seen[node.name] = committed(store, node.stage.name, run, f"{number:02}").path
    show_results(Display(), seen)
    tables = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["lk", "6"]]
    assert len(tables) == 2  # validation and held out
    assert all(float(table[4]) >= 1 for table in tables)


def run_stage(node: Node, work: Path, inputs: dict[str, Path], out: Path) -> None:
    node.stage.run(RecordingContext(out, work, inputs, node.seed or 0), node.config)
