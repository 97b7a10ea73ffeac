"""The public Python API: imports, inputs and results."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import draftsmith
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tables.parquet import write_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.flows.config.load import config_from_fields
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.evaluation.acceptance import acceptance_table
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY
from tests.flows.processes import ROOT, run_python
from tests.stages.data.row_files import write
from tests.testbed import random_target
from tests.testbed.artifacts import committed
from tests.testbed.drafter import DrafterArtifacts


def test_every_public_name_exists() -> None:
    assert draftsmith.__version__ == importlib.metadata.version("draftsmith")
    assert set(draftsmith.__all__) <= set(dir(draftsmith))
    assert all(getattr(draftsmith, name) is not None for name in draftsmith.__all__)
    with pytest.raises(AttributeError):
        draftsmith.nothing  # noqa: B018


def test_an_artifact_of_the_target_is_loaded_in_its_own_dtype_by_default(plain_artifact: Path) -> None:
    assert draftsmith.load_target(plain_artifact).info.dtype == "float32"
    assert str(draftsmith.load_target(plain_artifact, dtype="bfloat16").dtype) == "torch.bfloat16"


def test_answers_of_an_artifact_have_prompts_and_sampling(tiny_drafter: DrafterArtifacts) -> None:
    answers = draftsmith.read_answers(tiny_drafter.heldout, splits=["heldout"])
    assert answers.sampling == GREEDY and len(answers) == len(answers.prompts) > 2
    assert isinstance(answers[0], Trajectory) and answers[0].tokens == answers[:1][0].tokens
    assert len(answers[1:3]) == 2 and answers[1:3].prompts == answers.prompts[1:3]


IDS: dict[str, Any] = {"prompt_token_ids": [1, 2, 3], "completion_token_ids": [4, 5, 6]}


def test_rows_of_a_file_become_answers_or_are_counted_as_rejected(plain_target: Target, tmp_path: Path) -> None:
    short = {**IDS, "completion_token_ids": [4]}
    rows = [IDS, {**IDS, "completion_token_ids": [7, 8]}, short, {**IDS, "temperature": 0.5}]
    path = write(tmp_path / "answers.jsonl", rows)
    answers = draftsmith.read_answers(path, plain_target)
    assert [each.tokens for each in answers] == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8]]
    assert len(set(answers.prompts)) == 1 and sum(answers.rejected.values()) == 2
    sampled = draftsmith.read_answers(path, plain_target, temperature=0.5)
    assert sampled.sampling.temperature == 0.5 and len(sampled) == 3
    renamed = write(tmp_path / "renamed.jsonl", [{"asked": [1, 2, 3], "given": [4, 5, 6]}])
    names = {"prompt_token_ids": "asked", "completion_token_ids": "given"}
    assert draftsmith.read_answers(renamed, plain_target, fields=names)[0].tokens == [1, 2, 3, 4, 5, 6]


def test_a_file_without_a_target_or_a_usable_row_is_an_error(plain_target: Target, tmp_path: Path) -> None:
    good, sampled = write(tmp_path / "a.jsonl", [IDS]), write(tmp_path / "b.jsonl", [{**IDS, "temperature": 0.5}])
    for path, target in ((good, None), (sampled, plain_target), (tmp_path / "none.jsonl", plain_target)):
        with pytest.raises(draftsmith.DraftsmithError):
            draftsmith.read_answers(path, target)


def answers_of(lengths: list[int], prompts: list[str]) -> draftsmith.Answers:
    rng = np.random.default_rng(0)
    texts = [Trajectory(str(i), rng.integers(5, 60, 4 + n).tolist(), 4) for i, n in enumerate(lengths)]
    return draftsmith.Answers(texts, prompts, GREEDY)


def test_a_comparison_has_the_statistics_of_an_evaluation(plain_target: Target, plain_drafter: DFlashDrafter) -> None:
    drafters = {"one": plain_drafter, "two": random_target.random_drafter(plain_target, 1)}
    answers = answers_of([20, 9, 14, 30], ["a", "b", "b", "c"])
    comparison = draftsmith.compare(plain_target, drafters, answers)
    tallies = Replayer(plain_target).acceptance(drafters, answers.trajectories)
    expected = acceptance_table(tallies, answers.prompts, [False] * 4)
    table = comparison.to_pandas()
    assert list(table.index) == ["one", "two"] and (table["prompts"] == 3).all()
    assert table["tau"].to_dict() == {name: metrics.tau for name, metrics in expected.items()}
    difference, paired = comparison.difference("two", "one"), expected["two"].differences["one"]
    assert (difference.value, difference.interval()) == (paired.value, (paired.low, paired.high))
    assert [np.size(line.get_xdata()) for line in comparison.plot().lines] == [plain_drafter.block_size - 1] * 2
    with pytest.raises(draftsmith.DraftsmithError):
        comparison.difference("three", "one")


def test_a_single_prompt_has_no_interval(plain_target: Target, plain_drafter: DFlashDrafter) -> None:
    comparison = draftsmith.compare(plain_target, {"one": plain_drafter}, answers_of([20, 9], ["a", "a"]))
    assert comparison.to_pandas()["tau_low"].isna().all()
    assert comparison.difference("one", "one").interval() is None


def test_objects_show_their_facts_and_no_tokens(
    plain_target: Target, plain_drafter: DFlashDrafter, tmp_path: Path
) -> None:
    answers = answers_of([20, 9, 14], ["a", "b", "b"])
    result = draftsmith.RefreshResult({"sft": tmp_path}, "refused", "tau: <1 %")
    shown: list[tuple[Any, str]] = [
        (plain_target, f"Target: source {plain_target.info.source}, architecture {plain_target.info.architecture}"),
        (plain_drafter, f"DFlashDrafter: kind dflash, layers {plain_drafter.config.num_hidden_layers}, block size"),
        (answers, "Answers: answers 3, prompts 2, sampling greedy, mean length 18 tokens with the prompt"),
        (result, "RefreshResult: outcome refused, because tau: <1 %, artifacts sft"),
    ]
    for each, line in shown:
        assert repr(each).startswith(line) and "\n" not in repr(each) and len(repr(each)) < 400
        assert each._repr_html_().startswith("<table><tr><th>") and each._repr_html_().count("<tr>") > 2
    assert "tau: &lt;1 %" in result._repr_html_() and "tokens=" not in repr(answers[0])
    comparison = draftsmith.compare(plain_target, {"one": plain_drafter}, answers)
    head, row = repr(comparison).splitlines()
    assert head.split() == list(comparison.to_pandas().columns) and row.split()[0] == "one"
    assert "<table" in comparison._repr_html_()


def test_compare_warns_of_answers_whose_prompts_a_drafter_was_trained_on(
    plain_target: Target, plain_drafter: DFlashDrafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter after a drafter: SFT on some prompts, a champion copied from it, OPD on others, a drafter adopted."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path))
    store, answers = Store(tmp_path / "store"), answers_of([20, 9, 14, 30], ["a", "b", "c", "d"])

    def trained(stage: str, key: str, on: int, config: dict[str, object], **inputs: Artifact) -> Artifact:
        names: dict[str, object] = {"trajectory_id": "p/0", "prompt_id": "p", "split": "train", "sample": 0, "seed": 0}
        sampling = {"finish_reason": "stop", "temperature": 0, "top_p": 1, "top_k": 0, "engine": "logs"}
        ids = {"prompt_ids": answers[on].tokens[:4], "response_ids": answers[on].tokens[4:]}
        given = committed(
            store,
            "rollout",
            lambda out: write_table(out / "trajectories.parquet", TRAJECTORIES, [names | sampling | ids]),
            key,
        )
        return committed(
            store,
            stage,
            lambda out: save_drafter(plain_drafter, out / DRAFTER_FOLDER, torch.float32),
            key,
            config=config,
            inputs={**inputs, "trajectories": given},
        )

    sft = trained("sft", "a", 0, {"steps": 5})
    champion = committed(store, "champion", {"drafter/x": ""}, "b", config={"folder": str(sft.path / DRAFTER_FOLDER)})
    opd = trained("opd", "c", 1, {"steps": 5}, drafter=champion)
    adopted = trained("sft", "d", 2, {"steps": 0, "init_from": str(opd.path / DRAFTER_FOLDER)})
    drafter = draftsmith.load_drafter(adopted.path, plain_target)
    with pytest.warns(UserWarning, match="ours was trained on the prompts of 2 of 4 answers"):
        draftsmith.compare(plain_target, {"ours": drafter}, answers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draftsmith.compare(plain_target, {"ours": drafter, "elsewhere": plain_drafter}, answers[2:])


def test_a_comparison_without_drafters_or_answers_is_an_error(
    plain_target: Target, plain_drafter: DFlashDrafter
) -> None:
    some: Any = answers_of([20], ["a"])
    given: Any
    for given in ([], answers_of([], [])):
        with pytest.raises(draftsmith.DraftsmithError, match="read_answers"):
            draftsmith.compare(plain_target, {"one": plain_drafter}, given)
    for given in ({}, [plain_drafter]):
        with pytest.raises(draftsmith.DraftsmithError, match="by name"):
            draftsmith.compare(plain_target, given, some)


def test_fields_of_a_config_may_extend_a_file(tmp_path: Path) -> None:
    extended = config_from_fields(
        {"extends": str(ROOT / "configs" / "quickstart.yaml"), "opd": {"steps": 7}}, RefreshConfig
    )
    assert extended.opd is not None and extended.opd.steps == 7 and extended.name == "quickstart"
    with pytest.raises(draftsmith.DraftsmithError):
        draftsmith.refresh({"extends": str(ROOT / "configs" / "quickstart.yaml"), "opd": {"setps": 7}})
    with pytest.raises(draftsmith.DraftsmithError):
        draftsmith.refresh(tmp_path / "none.yaml")


_TWO_REFRESHES = """
import asyncio, json
from draftsmith.flows import api
from tests.flows.toy import TOY

api.REFRESH = TOY

async def notebook():
    results = []
    for verdict, force in (("promoted", None), ("refused", "left")):
        result = api.refresh({"name": "toy", "verdict": verdict}, force=force)
        made = json.loads((result.artifacts["left"] / "manifest.json").read_text())["created_at"]
        results.append([result.outcome, result.message, sorted(result.artifacts), made])
    return results

print(json.dumps(asyncio.run(notebook())))
"""


@pytest.mark.integration
def test_the_outcome_of_a_refresh_is_its_result(tmp_path: Path) -> None:
    """Two refreshes in one process with a running event loop, as in a notebook."""
    promoted, refused = json.loads(run_python(tmp_path / "home", _TWO_REFRESHES).splitlines()[-1])
    assert (promoted[0], refused[0]) == ("promoted", "refused")
    assert "promoted" in promoted[1] and "refused" in refused[1]
    assert promoted[2] == refused[2] == ["left", "right", "target", "total"]
    assert promoted[3] < refused[3]  # made again, as it was forced
