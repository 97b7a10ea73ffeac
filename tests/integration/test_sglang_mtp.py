"""A stock SGLang server that drafts with a target's native head (NEXTN), float32.

The weights are random where nothing else is said, so few proposals are accepted: what is compared is every proposed
block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch

from draftsmith.artifacts.results.evaluation import DiagnosisResult
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact, read_manifest
from draftsmith.flows.cli.main import main
from draftsmith.flows.refresh.swap import served_by
from draftsmith.flows.refresh.versions import artifact_folder, registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.stitched import export_stitched
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.config import OptionValue
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.engines.server_state import ask_servers
from draftsmith.stages.engines.servers.requirements import speculative_algorithm
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.sglang.protocol import KEY
from draftsmith.stages.evaluation.diagnosis.stage import STAGE as DIAGNOSIS
from draftsmith.stages.replay.chains import replay_sequentially
from draftsmith.stages.targets.causal_lm import Target
from tests.flows.refresh.line_runs import config_of, finished, gated
from tests.integration.recorded import assert_same_steps, body, trace_of
from tests.integration.swapping import PROMISED, assert_drafts_with, line_of_two, write_other_weights
from tests.sglang_cpu.server import generate, running_server
from tests.stages.bench import Bench
from tests.stages.engines.swaps import swapped
from tests.testbed import native, random_target
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.mtp import native_head, target_with_head

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

BLOCK, ANSWER = 4, 24
OPTIONS: dict[str, OptionValue] = {
    "speculative-num-steps": BLOCK - 1,
    "speculative-eagle-topk": 1,
    "speculative-num-draft-tokens": BLOCK,
}


@dataclass(frozen=True)
class Served:
    """A server of a target, and what it must answer."""

    url: str
    target: Target
    prompts: list[list[int]]
    expected: list[list[int]]  # the target's answers

    @classmethod
    def of(cls, url: str, target: Target) -> Served:
        prompts = [t.tokens[: 4 + i] for i, t in enumerate(random_target.trajectories(12, seed=9))]
        requests = [Request(str(i), prompt, ANSWER) for i, prompt in enumerate(prompts)]
        done = EmbeddedEngine(target, slots=4, capacity=64).generate(requests)
        plain = {c.request.request_id: c.response_ids for c in done}
        return cls(url, target, prompts, [plain[str(index)] for index in range(len(prompts))])

    def assert_drafts_with(self, head: Path, digest: str | None = None) -> int:
        """Compare answers, and every proposed block with replay's. Returns how many there were.

        digest: in the server's records; by default the head's.
        """
        drafter = load_drafter(head, self.target)
        bodies = [body(prompt, max_new_tokens=ANSWER, ignore_eos=False) for prompt in self.prompts]
        answers, steps = generate(self.url, bodies, concurrency=4), 0
        for prompt, answer, expected in zip(self.prompts, answers, self.expected, strict=True):
            assert answer["output_ids"] == expected
            trajectory = Trajectory("", [*prompt, *answer["output_ids"]], len(prompt))
            elements = answer["meta_info"][KEY]
            assert elements[0]["drafter"] == (drafter_digest(head) if digest is None else digest)
            tokens = torch.tensor([trajectory.tokens])
            features = self.target.read(tokens, drafter.target_layer_ids).features
            assert features is not None
            with torch.no_grad():
                context = drafter.encode(features, tokens, torch.arange(tokens.shape[1])[None])
            over = drafter.head_over(self.target.head_weight, None)
            replayed = replay_sequentially(drafter, context, trajectory, BLOCK, over)
            assert_same_steps(trace_of(trajectory, elements), replayed)
            steps += len(replayed.anchors)
        return steps


@pytest.mark.parametrize("family", ["mimo", "glm4_moe"])
def test_every_block_is_that_of_replay_also_after_swaps(
    family: str, sglang_env: Path, sglang_logs: Path, tmp_path: Path
) -> None:
    target = target_with_head(tmp_path, family)
    assert target.folder is not None
    head, algorithm = tmp_path / "head", "NEXTN"
    save_drafter(native_head(target, BLOCK), head, torch.float32)
    assert speculative_algorithm(head) == algorithm
    other = write_other_weights(native_head(target, BLOCK), tmp_path / "other", noise=1.0)
    with running_server(sglang_env, target.folder, head, algorithm, OPTIONS, log=sglang_logs / f"{family}.log") as url:
        assert httpx.get(f"{url}/server_info", timeout=30).json()["speculative_algorithm"] == "EAGLE"
        served = Served.of(url, target)
        assert served.assert_drafts_with(head) > 100
        for folder in (other, head):
            (swap,) = swapped([url], NewDrafter(drafter_digest(folder), folder, algorithm, BLOCK))
            assert swap.drafter == drafter_digest(folder)
            assert served.assert_drafts_with(folder) > 100


def test_a_stitched_checkpoint_drafts_without_a_draft_path(sglang_env: Path, sglang_logs: Path, tmp_path: Path) -> None:
    target, stitched = target_with_head(tmp_path, "mimo"), tmp_path / "stitched"
    other = write_other_weights(native_head(target, BLOCK), tmp_path / "other", noise=1.0)
    export_stitched(other, tmp_path / "model", stitched)
    options = OPTIONS | {"speculative-algorithm": "NEXTN"}
    with running_server(sglang_env, stitched, options=options, log=sglang_logs / "stitched.log") as url:
        assert Served.of(url, target).assert_drafts_with(other, digest="") > 100


def test_a_server_of_the_targets_own_head_is_known_and_diagnosed(
    sglang_env: Path, sglang_logs: Path, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """As native heads are usually served, without a drafter's folder; the trained head of the test bed."""
    artifact = native.target_with_head(tmp_path)
    head = native.taken_head(tiny_drafter, artifact, tmp_path / "head") / DRAFTER_FOLDER
    options: dict[str, OptionValue] = {"speculative-algorithm": "NEXTN", **OPTIONS}
    with running_server(sglang_env, tmp_path / "model", options=options, log=sglang_logs / "own-head.log") as url:
        (state,) = ask_servers([url]).values()
        assert isinstance(state, ServerState)
        assert (state.algorithm, state.own_head, state.digest, state.block_size) == ("NEXTN", True, "", BLOCK)
        asked = RecordingContext.under(tmp_path / "diagnosis", {"target": artifact, "prompts": tiny_drafter.prompts})
        sampling = {"max_new_tokens": ANSWER, "temperature": 0.0}
        asked.run(DIAGNOSIS, url=url, drafter=str(head), prompts=4, sampling=sampling)
    found = DiagnosisResult.read(asked.out)
    assert found.agrees and found.as_it_is is not None and found.as_it_is.mismatch == 0, found.sentence


def test_a_promoted_head_is_swapped_in_and_a_rollback_swaps_it_out(
    sglang_env: Path, sglang_logs: Path, tiny_drafter: DrafterArtifacts, bench: Bench, tmp_path: Path
) -> None:
    """A line of two heads, the target's own and one with other weights; each block is compared with replay."""
    artifact = native.target_with_head(tmp_path)
    made = DrafterArtifacts(tmp_path / "made")
    made.root.mkdir()
    made.target.symlink_to(artifact)
    made.rollout.symlink_to(tiny_drafter.rollout)
    made.drafter.symlink_to(native.taken_head(tiny_drafter, artifact, tmp_path / "head"))
    target = Target.load(artifact, device="cpu")
    own = {"trained": load_drafter(made.drafter / DRAFTER_FOLDER, target)}
    with_head = replace(bench, target=target).with_drafters(own)
    with line_of_two("heads", tmp_path / "home", made, with_head) as folders:
        with_head = with_head.with_drafters({name: load_drafter(folders[name], target) for name in folders})
        challenger = artifact_folder(registry().version("heads", 2))
        gate = gated(
            Store(tmp_path / "home" / "store"),
            Artifact(challenger, read_manifest(challenger)),
            tau=PROMISED["tau"],
            block_size=BLOCK,
        )
        log = sglang_logs / "swapped-head.log"
        with running_server(sglang_env, tmp_path / "model", folders["1"], "NEXTN", OPTIONS, log=log) as url:
            assert_drafts_with(url, with_head, "1")
            promoted = finished(config_of("heads", registry={"name": "heads", "servers": [url]}), gate)
            assert (promoted.name, promoted.error) == ("Promoted", None)
            assert_drafts_with(url, with_head, "2")
            assert main(["rollback", "heads"]) == 0
            assert_drafts_with(url, with_head, "1")
            (served,) = served_by(registry().version("heads", 1))
            assert (served.url, served.drafter) == (url, drafter_digest(folders["1"]))
