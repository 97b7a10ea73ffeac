"""Experiments: their graph, the equal conditions of their arms, and config errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.checks.comparisons import check_budgets
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.experiments.arms import EXPERIMENT, ExperimentConfig, experiment_nodes
from draftsmith.flows.pipeline.config_file import read_config
from draftsmith.flows.pipeline.graph import in_order, key_of, seed_of
from draftsmith.stages.training.config import SftConfig, TrainingConfig
from draftsmith.stages.training.on_policy.config import OpdConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "experiments"
SHARED = ("base", "sampled", "worked")  # what others extend
ARCHITECTURES = ("architectures", "architectures-sampled", "hybrid-target", "worked-architectures")
RUNNABLE = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem not in SHARED + ARCHITECTURES)


def load(name: str, *overrides: str) -> ExperimentConfig:
    return read_config(CONFIGS / f"{name}.yaml", overrides, ExperimentConfig)


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_every_experiment_of_the_repository_is_a_valid_graph(path: Path) -> None:
    config = read_config(path, [], ExperimentConfig)
    assert config.name == path.stem
    names = [node.name for node in in_order(experiment_nodes(config))]
    assert names[0] == "target"
    assert {"mining", "comparison"} <= set(names)
    assert len(config.seeds) >= 3


def test_every_arm_is_trained_for_every_budget_and_seed() -> None:
    config = load("plateau-greedy", "budgets=[10, 20]", "seeds=[5, 6]")
    nodes = {node.name: node for node in experiment_nodes(config)}
    arms = [f"{arm}-{steps}-s{seed}" for arm in config.arms for steps in (10, 20) for seed in (5, 6)]
    assert set(arms) <= nodes.keys()
    for name in arms:
        steps = nodes[name].config.model_dump()["steps"]
        assert name.split("-")[-2:] == [str(steps), f"s{nodes[name].seed}"]
    drafters = [source for name, source in nodes["comparison"].inputs.items() if name.startswith("drafter:")]
    assert sorted(drafters) == sorted([*arms, "sft"])


def test_arms_train_equal_positions_with_equal_learning_rates() -> None:
    changed = ["opd.learning_rate=7e-4", "opd.anchors_per_sequence=5", "opd.clip_norm=0.5"]
    config = load("plateau-greedy", *changed)
    made = [config.arm_config(arm, 30) for arm in config.arms.values()]
    assert {type(each) for each in made} == {SftConfig, OpdConfig}
    for name in TrainingConfig.model_fields:
        assert len({getattr(each, name) for each in made}) == 1, name


def test_an_arm_from_scratch_starts_from_no_checkpoint_and_may_have_another_shape() -> None:
    scratch = "arms.scratch={stage: sft, init: random, change: {drafter: {num_layers: 2}}}"
    config = load("plateau-greedy", "sft.init_from=some/drafter", scratch)
    nodes = {node.name: node for node in experiment_nodes(config)}
    made = nodes["scratch-400-s0"].config
    assert isinstance(made, SftConfig) and made.init_from is None
    assert made.drafter.model_dump() == config.sft.drafter.model_dump() | {"num_layers": 2}
    assert "drafter" not in nodes["scratch-400-s0"].inputs


def test_a_preset_takes_the_place_of_the_loss_that_all_arms_share() -> None:
    as_text, in_parts = (
        load("plateau-greedy", f"arms.opd.change={{loss: {loss}}}") for loss in ("paper", "{preset: paper}")
    )
    made = [config.arm_config(config.arms["opd"], 30) for config in (as_text, in_parts)]
    assert made[0] == made[1]
    assert isinstance(made[0], OpdConfig) and made[0].loss.rejected.loss == "k3"


def test_an_arm_changes_nested_fields_only_where_it_says_so() -> None:
    config = load("plateau-greedy", "arms.opd.change={learning_rate: 5e-5}", "opd.weight_decay=0.125")
    made = config.arm_config(config.arms["opd"], 30)
    assert (made.learning_rate, made.weight_decay, made.steps) == (5e-5, 0.125, 30)


def test_after_a_change_of_the_target_the_old_drafter_is_taken_over() -> None:
    nodes = {node.name: node for node in experiment_nodes(load("target-changed-greedy"))}
    assert nodes["adoption"].inputs == {"target": "revision", "drafter": "sft", "trajectories": "fresh"}
    assert nodes["opd-200-s0"].inputs["drafter"] == "adoption"
    assert nodes["opd-200-s0"].inputs["target"] == "revision"
    assert "drafter" not in nodes["scratch-200-s0"].inputs
    assert nodes["rollout"].inputs["target"] == "target"
    assert nodes["before"].inputs["target"] == "target"


def test_an_arm_in_iterations_mines_anew_with_the_drafter_of_the_one_before() -> None:
    iterated = "arms.opd={stage: opd, iterations: 3, change: {remine_every: 0}}"
    nodes = {
        node.name: node for node in experiment_nodes(load("plateau-greedy", "budgets=[20]", "seeds=[4]", iterated))
    }
    parts = ["opd-20-s4-1", "opd-20-s4-2", "opd-20-s4"]
    assert [nodes[name].config.model_dump()["steps"] for name in parts] == [6, 7, 7]
    assert [nodes[name].inputs["drafter"] for name in parts] == ["sft", "opd-20-s4-1", "opd-20-s4-2"]
    assert [nodes[name].inputs["mined"] for name in parts] == ["mining", "mining-opd-20-s4-1", "mining-opd-20-s4-2"]
    assert [nodes[nodes[name].inputs["mined"]].inputs["drafter"] for name in parts] == ["sft", *parts[:2]]
    assert len({nodes[name].seed for name in parts}) == 3
    compared = nodes["comparison"].inputs
    assert compared["drafter:opd:20:4"] == "opd-20-s4"
    assert [compared[f"earlier:opd:20:4:{i}"] for i in (1, 2)] == parts[:2]
    assert not any(name.startswith("earlier:sft") for name in compared)


def test_a_seed_of_a_node_is_part_of_its_key() -> None:
    config = load("plateau-greedy")
    nodes = {node.name: node for node in experiment_nodes(config)}
    keys = {
        key_of(nodes[name], {}, seed_of(nodes[name], config), EXPERIMENT)
        for name in ("opd-400-s0", "opd-400-s1", "opd-400-s2")
    }
    assert len(keys) == 3
    assert seed_of(nodes["mining"], config) == config.seed


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("comparison.control=nobody", "comparison.control: no arm 'nobody'"),
        ("arms.base={stage: sft}", "choose another name than 'base'"),
        ("arms.opd.change={learning_rat: 1}", "arms.opd.change"),
        ("target.families=[poem]", "no family poem"),
        ("arms.opd.init=random", "init: random is for stage sft"),
        ("arms.sft.iterations=2", "iterations are of stage opd"),
        ("arms.sft.change={steps: 7}", "change.steps: say it in the arm's budgets"),
        ("arms.sft.change={drafter: {num_layers: 3}}", "the arm starts from the starting drafter"),
        ("arms.sft.change={init_from: some/drafter}", "the arm starts from the starting drafter"),
        ("heldout.splits=[heldout]", "heldout.splits: ['heldout'] lacks validation"),
        ("prompts.validation=0", "prompts.validation: heldout.splits needs prompts of this split"),
        ("heldout.prompts=200", "heldout: skip and prompts leave out all of split validation"),
        ("seeds=[-1]", "seeds.0: expected greater than or equal to 0"),
        ("seeds=[]", "seeds:"),
        ("seeds=[0, 1, 0]", "seeds: 0 stands twice"),
        ("arms.opd.budgets=[200, 200]", "arms.opd.budgets: 200 stands twice"),
        ("arms.opd.iterations=1000", "steps cannot be trained in 1000 iterations"),
        ("comparison.splits=[]", "comparison.splits:"),
        ("arms.sft.budgets=[600]", "arms.sft.budgets: no other arm is trained for the 600 steps of the control sft"),
        (
            "stages.time_limits={comparision: 5}",
            "stages.time_limits.comparision: no such node, use one of: ",
        ),
    ],
)
def test_a_bad_experiment_is_one_clear_error(override: str, expected: str) -> None:
    with pytest.raises(DraftsmithError) as error:
        load("plateau-greedy", override)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_limit_of_time_is_of_a_training_or_of_all_of_an_arm() -> None:
    stages = load("plateau-greedy", "stages.time_limits={opd: 5, opd-400-s1: 7}").stages
    assert [stages.time_limit(f"opd-400-s{seed}").seconds for seed in (0, 1)] == [300, 420]


def test_steps_that_the_control_is_not_trained_for_are_a_warning() -> None:
    def warnings(*overrides: str) -> list[str]:
        found = Findings()
        check_budgets(found, experiment_nodes(load("plateau-greedy", *overrides)))
        return found.remarks

    assert warnings() == warnings("arms.sft.budgets=[400, 800]") == []
    (warning,) = warnings("arms.opd.budgets=[200, 400]")
    assert warning.startswith("warning: comparison: opd with 200 steps: nothing to compare with")
