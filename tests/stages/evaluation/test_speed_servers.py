"""Timed runs of servers, with the embedded engine in the place of each server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, StageInterrupted
from draftsmith.artifacts.results.evaluation import Acceptance, EvaluationResult, Machine, TargetDifference
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines import embedded
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.config import SGLangEngineConfig, SGLangLaunchConfig
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.evaluation import speed_servers as served_module
from draftsmith.stages.evaluation.config import EvaluationConfig, prompts_to_decode
from draftsmith.stages.evaluation.gate import GateConfig, decide
from draftsmith.stages.evaluation.looks import open_look
from draftsmith.stages.evaluation.speed_servers import ServerSpeedTest, measure_servers, shares_of
from draftsmith.stages.evaluation.speed_table import speed_tables
from draftsmith.stages.evaluation.timed_runs import SpeedMeasurement, requests_for
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts

CONFIG = EvaluationConfig.model_validate(
    {
        "engine": {"kind": "sglang", "python": "python", "launch": {}}, "sampling": {"max_new_tokens": 24}, "rounds": 2,
        "concurrency": [1, 2], "speed_prompts": 2, "validation_prompts": 1, "parity_prompts": 6, "block_sizes": [3, 8],
    }
)  # fmt: skip


LOST_S = 0.2  # before a request that was lost is repeated


@dataclass
class Server:
    """What an evaluation asks of a server. `wasteful`: it counts more verify steps than it needs, and records none;
    `retracts`: of the first answer alone, which it read again; `loses`: a request, in each of so many generations."""

    engine: EmbeddedEngine
    wasteful: bool = False
    retracts: bool = False
    was_full: bool = False
    loses: int = 0
    retries: int = 0
    name: str = "stand-in 1.0"
    records_trace: bool = True

    def flush_cache(self) -> None: ...

    def set_concurrency(self, requests: int) -> None:
        self.engine.slots = requests

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        if self.retries < self.loses:
            self.retries += 1
            time.sleep(LOST_S)
        for place, answer in enumerate(self.engine.generate(requests)):
            if retracted := self.retracts and answer.verify_steps > 0 and place == 0:
                answer.retractions = 1
            if self.wasteful or retracted or not self.records_trace:
                answer.steps = None
            if self.wasteful or retracted:
                answer.verify_steps = round(1.25 * answer.verify_steps)
            yield answer


# Two loads at once in one process leave transformers without tied weights for its remaining life (`no_tie_weights`
# replaces a method of the class). Real servers are processes.
LOADING = threading.Lock()


@dataclass(frozen=True)
class StandIn(ServerSpeedTest):
    """Serves in this process; remembers which servers were started."""

    started: list[tuple[str, int]] = field(default_factory=list)
    wasteful: bool = False
    retracts: bool = False
    full: bool = False
    loses: int = 0
    quantised: TargetDifference | None = None  # then the target's weights are rounded to fp8
    on_shares: list[tuple[str, str, str | None]] = field(default_factory=list)  # round, arm, share of each server
    both: threading.Barrier | None = None  # where the first server of each share waits for the others

    @contextmanager
    def server(self, drafter: Path | None, block_size: int, work: Path, share: str | None = None) -> Iterator[Any]:
        self.started.append((work.name if drafter else "plain", block_size))
        self.on_shares.append((work.parent.name, work.name, share))
        if self.both is not None and not any(seen == share for *_, seen in self.on_shares[:-1]):
            self.both.wait(60)
        with LOADING:
            target = Target.load(self.ctx.inputs["target"])
        if self.quantised is not None:
            self.quantised.write(self.ctx.work)
            for parameter in target.model.parameters():
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
        loaded = load_drafter(drafter, target) if drafter else None
        drafting = DraftingConfig(block_size=block_size) if drafter else None
        engine = EmbeddedEngine(target, loaded, capacity=400, drafting=drafting)
        yield Server(engine, self.wasteful, self.retracts, self.full, self.loses)


@pytest.fixture
def ctx(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> RecordingContext:
    return RecordingContext.under(tmp_path, {"target": tiny_drafter.target})


def served(ctx: RecordingContext, made: DrafterArtifacts, config: Any = None, **changes: Any) -> StandIn:
    """Return the servers of a measurement. config: changed fields; None: several concurrencies and block sizes."""
    fields = {"block_sizes": None, "concurrency": (1,), **config} if config is not None else {}
    asked, drafter = CONFIG.model_copy(update=fields), made.drafter / DRAFTER_FOLDER
    assert isinstance(asked.engine, SGLangEngineConfig)
    arms, sizes = {"wide": drafter, "narrow": drafter}, {"wide": 8, "narrow": 5}
    return replace(StandIn(ctx, asked, asked.engine, arms, sizes, 400, "float32"), **changes)


def measure(stand_in: StandIn, made: DrafterArtifacts) -> SpeedMeasurement:
    heldout, validation = prompts_to_decode(stand_in.config, made.prompts)
    return measure_servers(stand_in, heldout, validation, open_look(stand_in.config, heldout, None))


def test_every_arm_has_its_block_size_and_no_timed_run_is_repeated(
    ctx: RecordingContext, tiny_drafter: DrafterArtifacts
) -> None:
    first = StoppingContext(ctx.out, ctx.work, ctx.inputs, stop_after=4, unit="timed runs")
    before = served(first, tiny_drafter)
    with pytest.raises(StageInterrupted):
        measure(before, tiny_drafter)
    # the candidates of each arm, none larger than it was trained on; then three turns and one of the next round
    assert [size for _, size in before.started[:4]] == [3, 8, 3, 5]
    assert [arm for arm, _ in before.started[4:]] == ["plain", "wide", "narrow", "wide"]

    after = served(ctx, tiny_drafter)
    found = measure(after, tiny_drafter)
    assert [arm for arm, _ in after.started] == ["narrow", "plain"]
    assert {arm: list(speeds) for arm, speeds in found.candidates.items()} == {"wide": ["3", "8"], "narrow": ["3", "5"]}
    sizes = {arm: int(max(speeds, key=speeds.__getitem__)) for arm, speeds in found.candidates.items()} | {"plain": 1}
    assert {(turn["arm"], turn["block_size"]) for turn in found.runs} == set(sizes.items())
    assert {(row["arm"], row["block_size"]) for row in found.requests} == set(sizes.items())
    assert ctx.logs[0] == f"decoding with blocks of {sizes['wide']} (wide), {sizes['narrow']} (narrow)"

    order = [(turn["round"], turn["order"], turn["arm"]) for turn in found.runs if turn["concurrency"] == 2]
    assert order == [
        (0, 0, "plain"), (0, 1, "wide"), (0, 2, "narrow"), (1, 0, "wide"), (1, 1, "narrow"), (1, 2, "plain"),
    ]  # fmt: skip
    for turn in found.runs:
        own = [
            row for row in found.requests
            if all(row[name] == turn[name] for name in ("round", "arm", "concurrency"))
        ]  # fmt: skip
        assert (len(own), turn["prompts"]) == (2, 2)
        assert turn["tokens"] == sum(row["tokens"] for row in own) and turn["wall_seconds"] > 0
    assert found.exactness.identical_share == 1
    assert found.parity is not None
    for parity in found.parity.values():
        assert (parity.answers, parity.different_steps, parity.tau_difference) == (6, 0, 0)
    one, two = speed_tables(found.runs, found.requests, after.settings, {})
    assert one.arms["wide"].turns == two.arms["narrow"].turns == 2


def test_rounds_run_side_by_side_and_each_keeps_its_gpu(
    ctx: RecordingContext, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds on two shares: the arms of a round are compared with each other, on one device."""
    monkeypatch.setattr(served_module, "steady", lambda *_: True)  # else a busy machine repeats all rounds
    stand_in = served(ctx, tiny_drafter, {"rounds": 3}, shares=("0,1", "2,3"), both=threading.Barrier(2))
    found = measure(stand_in, tiny_drafter)
    rounds: dict[str, list[tuple[str, str | None]]] = {}
    for round, arm, share in stand_in.on_shares:
        rounds.setdefault(round, []).append((arm, share))
    assert {name: {share for _, share in of_round} for name, of_round in rounds.items()} == {
        "round-0": {"0,1"}, "round-1": {"2,3"}, "round-2": {"0,1"},
    }  # fmt: skip
    assert [[arm for arm, _ in rounds[f"round-{n}"]] for n in range(3)] == [
        ["plain", "wide", "narrow"], ["wide", "narrow", "plain"], ["narrow", "plain", "wide"],
    ]  # fmt: skip
    assert [(turn["round"], turn["order"]) for turn in found.runs] == [(n, k) for n in range(3) for k in range(3)]
    assert found.parity is not None and found.parity["wide"].different_steps == 0
    (table,) = speed_tables(found.runs, found.requests, stand_in.settings, {})
    assert table.arms["wide"].turns == 3


def test_a_round_that_fails_ends_those_beside_it(ctx: RecordingContext, tiny_drafter: DrafterArtifacts) -> None:
    full = served(ctx, tiny_drafter, {"rounds": 2}, shares=("0", "1"), both=threading.Barrier(2), full=True)
    with pytest.raises(DraftsmithError, match=r"evaluation\.concurrency"):
        measure(full, tiny_drafter)
    assert len(full.started) == 2


def test_as_many_rounds_run_side_by_side_as_the_config_has_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "usable_gpus", lambda: ["0", "1", "2", "3", "4"])
    for launch, shares in (
        ({"servers": 2}, ["0", "1"]),
        ({"servers": 8, "tensor_parallel": 2}, ["0,1", "2,3"]),
        ({"servers": 8, "options": {"device": "cpu"}}, [None]),
    ):
        assert shares_of(SGLangLaunchConfig.model_validate(launch)) == shares
    monkeypatch.setattr(served_module, "usable_gpus", list)
    assert shares_of(SGLangLaunchConfig.model_validate({"servers": 8})) == [None]


def test_a_round_that_another_machine_started_is_measured_anew(
    ctx: RecordingContext, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store on a shared disk, and a run that goes on elsewhere: its arms would be compared across machines."""
    first = StoppingContext(ctx.out, ctx.work, ctx.inputs, stop_after=4, unit="timed runs")
    with pytest.raises(StageInterrupted):
        measure(served(first, tiny_drafter, {}), tiny_drafter)
    monkeypatch.setattr(served_module, "machine", lambda: Machine(cpu="another"))
    after = served(ctx, tiny_drafter, {})
    found = measure(after, tiny_drafter)
    assert [arm for arm, _ in after.started] == ["wide", "narrow", "plain"]
    assert [turn["round"] for turn in found.runs] == [0, 0, 0, 1, 1, 1]


def test_an_engine_that_needs_more_steps_than_replay_is_an_error_without_a_trace(
    ctx: RecordingContext, tiny_drafter: DrafterArtifacts
) -> None:
    """A fifth below: less than the share of steps that may differ. After one round, not after all of them."""
    bfloat16: dict[str, Any] = {"config": {"parity_prompts": 20}, "target_dtype": "bfloat16"}
    wasteful = served(ctx, tiny_drafter, **bfloat16, wasteful=True)
    with pytest.raises(DraftsmithError, match="evaluation: drafter wide: tau"):
        measure(wasteful, tiny_drafter)
    assert [arm for arm, _ in wasteful.started] == ["plain", "wide", "narrow"]
    repaired = served(ctx, tiny_drafter, **bfloat16)
    found = measure(repaired, tiny_drafter)
    assert [arm for arm, _ in repaired.started][:3] == ["plain", "wide", "narrow"], "what was refused is not kept"
    assert found.parity is not None
    difference = found.parity["wide"].tau_difference
    assert difference is not None and difference < 0.05, "near-ties of bfloat16; a fifth is ten times as much"


def test_a_quantised_target_is_judged_by_its_own_steps(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They differ from replay's. All held-out prompts are decoded once, in blocks as trained."""
    inputs = {"target": tiny_drafter.target}
    config = {"block_sizes": (7,), "concurrency": (1, 4), "rounds": 1, "parity_prompts": 40}
    difference = TargetDifference(settings=["quantization fp8"], tokens=9, mean=0.1, largest=0.7)
    quantised = served(RecordingContext.under(tmp_path / "it", inputs), tiny_drafter, config, quantised=difference)
    found = measure(quantised, tiny_drafter)
    assert found.target_difference == difference and found.parity is not None
    assert 0 < (found.parity["wide"].mismatch_share or 0.0) < 0.35
    assert quantised.started[-2:] == [("wide", 8), ("narrow", 5)]
    prompts = [prompt.prompt_id for prompt in prompts_to_decode(quantised.config, tiny_drafter.prompts)[0]]
    assert [(row["arm"], row["prompt_id"]) for row in found.heldout] == [
        (arm, prompt) for arm in ("wide", "narrow") for prompt in prompts
    ]
    assert {row["concurrency"] for row in found.heldout} == {4}
    again = replace(quantised, started=[])
    counts = [[row["verify_steps"] for row in each] for each in (measure(again, tiny_drafter).heldout, found.heldout)]
    assert counts[0] == counts[1] and not again.started

    monkeypatch.setattr(TargetDifference, "write", lambda *_: None)
    ctx = RecordingContext.under(tmp_path / "unknown", inputs)
    with pytest.raises(DraftsmithError, match="verify steps served by the engine differ from replay"):
        measure(served(ctx, tiny_drafter, config, quantised=difference), tiny_drafter)


def test_a_server_that_refuses_concurrent_requests_is_an_error(
    ctx: RecordingContext, tiny_drafter: DrafterArtifacts
) -> None:
    full = served(ctx, tiny_drafter, {"concurrency": (2,)}, full=True)
    with pytest.raises(DraftsmithError, match=r"evaluation\.concurrency"):
        measure(full, tiny_drafter)
    assert [arm for arm, _ in full.started] == ["plain"], "while it warms up"


@pytest.mark.parametrize("loses", [2, 3])
def test_a_run_in_which_a_request_was_lost_is_measured_again(
    loses: int, tmp_path: Path, ctx: RecordingContext, tiny_drafter: DrafterArtifacts
) -> None:
    """The pause before it is repeated would be taken for slow decoding."""
    stand_in = served(ctx, tiny_drafter, {"rounds": 1}, loses=loses)
    setting, config = stand_in.settings[0], stand_in.config
    prompts = prompts_to_decode(config, tiny_drafter.prompts)[0][:2]
    began = time.perf_counter()
    with stand_in.server(None, 1, tmp_path) as server:
        if loses == 3:
            with pytest.raises(RetryableError, match="3 attempts"):
                stand_in.decode(server, requests_for(prompts, config, setting, 0), setting)
        else:
            answers, wall, _ = stand_in.decode(server, requests_for(prompts, config, setting, 0), setting)
            assert len(answers) == len(prompts)
            assert time.perf_counter() - began - wall >= loses * LOST_S, "of the last attempt only"
    assert sum(line.startswith("requests were lost (1), which took time") for line in ctx.logs) == loses


def test_a_retracted_answer_is_not_compared_with_replay(ctx: RecordingContext, tiny_drafter: DrafterArtifacts) -> None:
    """Steps after a token that no step committed differ from replay's, even in float32."""
    found = measure(served(ctx, tiny_drafter, {"rounds": 1}, retracts=True), tiny_drafter)
    assert found.parity is not None
    assert {(each.answers, each.tau_difference) for each in found.parity.values()} == {(5, 0.0)}
    assert sum("1 of 6 answers were retracted" in line for line in ctx.logs) == len(found.parity)


def test_a_server_that_accepts_wrong_proposals_fails_by_the_targets_margin(
    ctx: RecordingContext, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps are replay's, which rebuilds them from the answers that it gave."""
    right = embedded.verify

    def keep_all(drafted: Any, logits: torch.Tensor, *settings: Any) -> Any:
        found = right(drafted, logits, *settings)
        if K := drafted.tokens.shape[1]:
            tokens = torch.cat([drafted.tokens, logits[:, K:].argmax(-1)], 1)
            found = replace(found, accepted=[K] * len(found.accepted), tokens=tokens)
        return found

    monkeypatch.setattr(embedded, "verify", keep_all)
    found = measure(served(ctx, tiny_drafter, {"rounds": 1, "speed_prompts": 8}), tiny_drafter)
    assert found.parity is not None and found.parity["wide"].different_steps == 0
    exactness = found.exactness
    assert exactness.identical_share is not None and exactness.median_margin is not None
    assert exactness.identical_share < 1 and exactness.median_margin > 0.01, "near-ties of float32 are smaller"
    drafters = {"wide": Acceptance(tau=3.0, tau_low=2.9)}
    evaluation = EvaluationResult(drafters=drafters, exactness=found.exactness)
    decision = decide(evaluation, GateConfig(judge_speed=False))
    assert not decision.promote and [rule.name for rule in decision.rules if not rule.passed] == ["near-ties"]
