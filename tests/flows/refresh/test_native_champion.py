"""A line's champion that is the target's own head: after a fine-tune it is stale, and a trained one takes its place.

The target is the shipped one with its head (`tests/testbed/native.py`), and the fine-tune its shipped revision.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.drafting import AdoptedChampion
from draftsmith.artifacts.results.evaluation import ALL, DriftResult, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.champion import resolve
from draftsmith.flows.refresh.config import starts_from_champion
from draftsmith.flows.refresh.drift import degraded_sets
from draftsmith.flows.refresh.promotion import promotion_metrics
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.champion import STAGE as CHAMPION
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.evaluation.drift import STAGE as DRIFT
from draftsmith.stages.evaluation.drift import DriftConfig
from draftsmith.stages.evaluation.gate import STAGE as GATE
from draftsmith.stages.evaluation.stage import STAGE as EVALUATION
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.flows.refresh.line_runs import config_of, finished, serving
from tests.testbed import native, target
from tests.testbed.artifacts import committed
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.make import ANSWER_TOKENS

THRESHOLD = DriftConfig().threshold


@pytest.fixture(scope="module")
def promised(
    target_with_head: Path, taken_head: Path, tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SetMetrics]:
    """Return the head's metrics at its promotion, by slice, after an evaluation on its own target."""
    made = tiny_drafter
    inputs = {"target": target_with_head, "prompts": made.prompts, "trajectories": made.heldout, "sft": taken_head}
    ctx = RecordingContext.under(tmp_path_factory.mktemp("evaluation"), inputs)
    ctx.run(EVALUATION, sampling={"max_new_tokens": 16}, rounds=1, speed_prompts=2, exactness_prompts=0)
    metrics = promotion_metrics(EvaluationResult.read(ctx.out), "sft")
    return {name: SetMetrics.model_validate(each) for name, each in metrics.items()}


@pytest.fixture(scope="module")
def tuned(tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the fine-tune, which has no head, as transformers saves one, and its answers by split."""
    folder = tmp_path_factory.mktemp("tuned")
    made = {
        "target": native.artifact_of(native.write_glm(target.revision_folder(), folder / "model"), folder / "target")
    }
    for split in ("train", "heldout"):
        ctx = RecordingContext.under(folder / split, {"target": made["target"], "prompts": tiny_drafter.prompts})
        sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0.0}
        made[split] = ctx.run(ROLLOUT, splits=[split], sampling=sampling, engine={"slots": 32}).out
    return made


def adopted(champion: Path, of: Path, folder: Path) -> Path:
    """Return the artifact of a champion that is measured on a target."""
    fields = {"line": "native", "version": 1, "content_id": "c" * 64, "kind": "mtp"}
    source = champion / DRAFTER_FOLDER
    serves = RecordingContext.under(folder / "champion", {"target": of})
    return serves.run(CHAMPION, **fields, folder=str(source), drafter_digest=drafter_digest(source)).out


def checked(champion: Path, of: Path, prompts: Path, answers: Path, folder: Path) -> tuple[DriftResult, bool]:
    """Return the drift check of a champion on a target's answers, and whether it was adopted for another target."""
    serves = adopted(champion, of, folder)
    inputs = {"target": of, "champion": serves, "prompts": prompts, "trajectories": answers}
    drift = RecordingContext.under(folder / "drift", inputs).run(DRIFT)
    return DriftResult.read(drift.out), AdoptedChampion.read(serves).target_changed


def test_on_its_own_target_nothing_is_found(
    target_with_head: Path,
    taken_head: Path,
    promised: dict[str, SetMetrics],
    tiny_drafter: DrafterArtifacts,
    tmp_path: Path,
) -> None:
    now, changed = checked(taken_head, target_with_head, tiny_drafter.prompts, tiny_drafter.heldout, tmp_path)
    assert not changed and not degraded_sets(now.root, promised, THRESHOLD)
    assert now.overall.tau == pytest.approx(promised[ALL].tau, abs=1e-3)


def test_after_a_fine_tune_the_whole_interval_lies_below(
    taken_head: Path,
    promised: dict[str, SetMetrics],
    tuned: dict[str, Path],
    tiny_drafter: DrafterArtifacts,
    tmp_path: Path,
) -> None:
    now, changed = checked(taken_head, tuned["target"], tiny_drafter.prompts, tuned["heldout"], tmp_path)
    fallen = degraded_sets(now.root, promised, THRESHOLD)
    assert changed and any(place.startswith(f"{ALL}: tau ") and " (at most " in place for place in fallen)
    high, low = now.overall.high, promised[ALL].low
    assert high is not None and low is not None and high < (1 - THRESHOLD) * low


def test_a_trained_head_takes_the_stale_ones_place_until_a_rollback(
    taken_head: Path, tuned: dict[str, Path], tiny_drafter: DrafterArtifacts, line: str, home: Path, tmp_path: Path
) -> None:
    """The gate asks for any measurable gain; 60 steps gave 49 % over a head that had lost half of its tau."""
    store = Store(home / "store")

    def stored(stage: str, folder: Path, key: str) -> Artifact:
        return committed(store, stage, partial(shutil.copytree, folder, dirs_exist_ok=True), key)

    first = registry().register(line, stored("sft", taken_head, "a"), {"kind": "mtp"})
    registry().promote(first, expected=None, why="what serves today")
    serves = adopted(taken_head, tuned["target"], tmp_path)
    inputs = {"target": tuned["target"], "trajectories": tuned["train"], "drafter": serves}
    training = {"sequences_per_step": 8, "anchors_per_sequence": 16, "learning_rate": 1e-3, "compute_dtype": "float32"}
    trained = RecordingContext.under(tmp_path / "sft", inputs).run(SFT, steps=60, drafter={"kind": "mtp"}, **training)
    arms = {"champion": serves, "sft": trained.out}
    measured = {"target": tuned["target"], "prompts": tiny_drafter.prompts, "trajectories": tuned["heldout"], **arms}
    evaluation = RecordingContext.under(tmp_path / "evaluation", measured)
    evaluation.run(EVALUATION, sampling={"max_new_tokens": 16}, rounds=1, speed_prompts=2, exactness_prompts=2)
    gate = RecordingContext.under(tmp_path / "gate", {"evaluation": evaluation.out})
    gate.run(GATE, judge_speed=False)
    decision = GateDecision.read(gate.out)
    assert (decision.outcome, decision.challenger, decision.champion) == ("promoted", "sft", "champion"), (
        decision.sentence
    )
    made = {
        "sft": stored("sft", trained.out, "b"),
        "evaluation": stored("evaluation", evaluation.out, "b"),
        "gate": stored("gate", gate.out, "b"),
    }
    config = config_of(line, sft={"steps": 60, "drafter": {"kind": "mtp"}}, opd=None)
    assert finished(config, made).name == "Promoted"
    champion = registry().champion(line)
    assert champion is not None and (champion.number, champion.tags["kind"]) == (2, "mtp")
    assert starts_from_champion(resolve(config)), "the next refresh continues it"
    registry_commands.rollback(Display(), line, "", dry_run=False)
    assert serving(line) == 1
