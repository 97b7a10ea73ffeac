"""The shipped files are those that their checksums name, small, and belong together."""

from __future__ import annotations

from draftsmith.stages.data.stored_prompts import load_prompts
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import target
from tests.testbed.drafter import drafter_artifacts
from tests.testbed.eagle3 import trained_eagle3
from tests.testbed.make import HELDOUT, checksums

LARGEST = 8e6  # bytes in all


def test_the_files_are_those_of_their_checksums_and_small() -> None:
    folder = target.shipped()
    assert checksums(folder) == target.sums()
    assert sum(path.stat().st_size for path in folder.rglob("*")) < LARGEST


def test_target_prompts_answers_and_drafters_belong_together() -> None:
    """A checkpoint is refused for a target that it was not trained for."""
    made = drafter_artifacts()
    model = Target.load(made.target, device="cpu")
    assert (model.info.dtype, model.info.vocab_size) == ("float32", 900)
    for artifact in (made.drafter, trained_eagle3()):
        drafter = load_drafter(artifact / DRAFTER_FOLDER, model)
        assert drafter.frequent_tokens is not None
        assert drafter.info.target_source == target.NAME, "no folder of the machine that made it"
    for split, wanted in HELDOUT.items():
        prompts = {prompt.prompt_id: prompt.token_ids for prompt in load_prompts(made.prompts, [split])}
        answers = load_trajectories(made.heldout, [split]).trajectories
        assert len(prompts) == len(answers) == wanted
        for answer in answers:
            assert answer.tokens[: answer.prompt_length] == prompts[answer.trajectory_id.partition("/")[0]]
