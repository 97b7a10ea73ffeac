"""The comparison of architectures: its graph, what is equal between its branches, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.experiments.architectures import ARCHITECTURES, ArchitecturesConfig, architectures_nodes
from draftsmith.flows.experiments.architectures_results import operations, show_results, table
from draftsmith.flows.pipeline.config_file import read_config
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import in_order
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.on_policy.config import OpdConfig

CONFIG = Path(__file__).parents[3] / "configs" / "experiments" / "architectures.yaml"


@pytest.mark.parametrize(
    ("name", "drafters"),
    [
        ("hybrid-target", ["dflash"]),
        ("worked-architectures", ["dflash", "dflash2", "dspark"]),
        ("architectures-sampled", ["dflash", "dflash2", "dspark"]),
    ],
)
def test_the_other_files_are_compared_in_the_same_graph(name: str, drafters: list[str]) -> None:
    other = read_config(CONFIG.with_name(f"{name}.yaml"), [], ARCHITECTURES.config)
    assert isinstance(other, ArchitecturesConfig) and list(other.drafters) == drafters
    trained = {drafter: read().drafters["dflash"] for drafter in drafters}
    same = architectures_nodes(read().model_copy(update={"drafters": trained}))
    assert [node.name for node in in_order(architectures_nodes(other))] == [node.name for node in in_order(same)]


def read(*overrides: str) -> ArchitecturesConfig:
    return read_config(CONFIG, overrides, ARCHITECTURES.config)  # type: ignore[return-value]


def test_every_drafter_has_its_branch_and_one_evaluation_measures_all() -> None:
    nodes = {node.name: node for node in in_order(architectures_nodes(read()))}
    for name in ("dflash", "eagle3"):
        assert nodes[f"opd-{name}"].inputs == {
            "target": "target",
            "trajectories": "fresh",
            "drafter": f"sft-{name}",
            "mined": f"mining-{name}",
        }
    drafters = {key: source for key, source in nodes["evaluation"].inputs.items() if key.startswith("drafter:")}
    assert drafters == {
        f"drafter:{name} {training}": f"{training}-{name}"
        for name in ("dflash", "eagle3")
        for training in ("sft", "control", "opd")
    }
    assert list(nodes)[-1] == "evaluation"


def test_the_control_continues_its_own_sft_for_as_long_as_opd() -> None:
    nodes = {node.name: node for node in architectures_nodes(read("drafters.eagle3.opd.steps=7"))}
    control, opd, sft = (nodes[f"{kind}-eagle3"].config for kind in ("control", "opd", "sft"))
    assert isinstance(control, SftConfig) and isinstance(opd, OpdConfig) and isinstance(sft, SftConfig)
    assert control.steps == opd.steps == 7
    assert control.learning_rate == opd.learning_rate
    assert control.drafter == sft.drafter
    assert nodes["control-eagle3"].inputs["drafter"] == "sft-eagle3"


def test_a_name_that_the_table_could_not_show_is_refused() -> None:
    with pytest.raises(DraftsmithError, match="without colons and dashes"):
        read("drafters={a-b: {sft: {}, opd: {}}}")


def test_the_table_has_a_row_an_arm() -> None:
    figures: dict[str, Any] = {"tau": 2.0, "tau_low": 1.9, "tau_high": 2.1}
    speed: dict[str, Any] = {"tokens_per_s": 50.0, "speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6}
    evaluation = {
        "drafters": {"dflash sft": figures},
        "speed": {
            "plain": {"tokens_per_s": 33.3},
            "dflash sft": speed | {"draft_ms_per_step": 2.25, "verify_ms_per_step": 10.0},
        },
    }
    plain, drafted = table(evaluation, {"dflash sft": 12.34}).rows
    assert plain == ["no drafter", "—", "—", "—", "—", "33.3", "—"]
    assert drafted == [
        "dflash sft", "12.3", "2.000\n[1.900, 2.100]", "2.2", "10.0", "50.0", "1.500\n[1.400, 1.600]",
    ]  # fmt: skip


def test_what_a_training_took_includes_the_sft_that_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter that was taken as it is has no training of its own."""
    took = {"sft-a": {"tflop": 5.0}, "control-a": {"tflop": 2.0}, "opd-a": {"tflop": 3.0}, "sft-b": {}}
    monkeypatch.setattr(
        "draftsmith.flows.experiments.architectures_results.read_manifest",
        lambda folder: SimpleNamespace(metrics=took[folder.name]),
    )
    made = {name: tmp_path / name for name in (*took, "target", "mining-a", "evaluation")}
    assert operations(made) == {"a sft": 5.0, "a control": 7.0, "a opd": 8.0, "b sft": 0.0}


@pytest.mark.parametrize("exactness", [{"fp32_prompts": 8, "fp32_identical": 7}, {"fp32_prompts": 0}, {}])
def test_answers_are_compared_in_float32_where_the_engine_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exactness: dict[str, int]
) -> None:
    """Servers say nothing of it."""
    speed = {"plain": {"tokens_per_s": 33.3}}
    evaluation = {"drafters": {}, "speed": speed, "exactness": exactness}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    show_results(Display(), {"evaluation": tmp_path})
    shown = capsys.readouterr().out
    assert "33.3" in shown
    assert ("7 of 8 outputs equal" in " ".join(shown.split())) == bool(exactness.get("fp32_prompts"))
