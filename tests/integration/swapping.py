"""Drafters to serve and to swap to, and which one a server's verify steps are of."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter, upgrade_drafter
from draftsmith.stages.drafters.dflash2.checkpoint import NEW_SIZES
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.engines import swap
from draftsmith.stages.engines.servers.http import Json
from draftsmith.stages.engines.servers.state import NewDrafter
from draftsmith.stages.engines.sglang.protocol import KEY
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.info import read_target_info
from tests.integration.recorded import Answer, assert_same_steps, trace_of
from tests.sglang_cpu.server import generate
from tests.stages.bench import GREEDY_TOKENS, Bench
from tests.stages.engines.swaps import swapped
from tests.testbed.artifacts import committed
from tests.testbed.drafter import DrafterArtifacts

PROMPTS = 8
PROMISED = {"tau": 20.0, "low": 19.0, "high": 21.0, "prompts": 100}  # more than a block


def write_other_weights(drafter: Drafter, folder: Path, seed: int = 0, noise: float = 0.05) -> Path:
    """Write a checkpoint of the same drafter with noise on every weight, in units of its mean magnitude."""
    other, draw = copy.deepcopy(drafter), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * parameter.abs().mean() * torch.randn(parameter.shape, generator=draw))
    save_drafter(other, folder, torch.float32)
    return folder


@contextmanager
def line_of_two(
    line: str, home: Path, made: DrafterArtifacts, bench: Bench, mlflow: str | None = None, seed: int = 0
) -> Iterator[dict[str, Path]]:
    """Make a home with a line of two versions that differ in their weights, the first the champion.

    mlflow: address of a tracking server, to which they are uploaded. Yields the checkpoints, by the number of their
    version.
    """
    store, other = Store(home / "store"), home / "other"
    shutil.copytree(made.drafter, other)
    write_other_weights(bench.drafters["trained"], other / DRAFTER_FOLDER, seed)

    def artifact(stage: str, folder: Path, key: str = "a", **fields: Any) -> Any:
        return committed(store, stage, partial(shutil.copytree, folder, dirs_exist_ok=True), key, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRAFTSMITH_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if mlflow is not None:
            patch.setenv("MLFLOW_TRACKING_URI", mlflow)
        inputs = {"target": artifact("target", made.target), "trajectories": artifact("rollout", made.rollout)}
        lines = registry()
        for key, folder in (("a", made.drafter), ("b", other)):
            ref = artifact("sft", folder, key, inputs=inputs)
            digest = drafter_digest(folder / DRAFTER_FOLDER)
            tags = {"drafter_digest": digest, "target_digest": read_target_info(made.target).digest}
            tags["figures"] = json.dumps({"all": PROMISED})
            tracking = Tracking(home)
            refresh = RefreshRun(tracking, line, {})
            run_id = None if mlflow is None else refresh.open()
            version = lines.register(line, ref, tags)
            if run_id is not None:
                lines.upload(version, ref.path / DRAFTER_FOLDER, run_id)
            refresh.close("FINISHED")
        assert [bool(each.uploaded) for each in lines.versions(line)] == [mlflow is not None] * 2
        lines.promote(lines.version(line, 1), expected=None, why="first")
        yield {"1": made.drafter / DRAFTER_FOLDER, "2": other / DRAFTER_FOLDER}


def keep_from_servers(engine: str, patch: pytest.MonkeyPatch) -> None:
    """Name a folder that does not exist to servers of an engine, as if their hosts had only uploads."""
    write = getattr(swap, f"write_{engine}")

    async def write_upload(client: httpx.AsyncClient, url: str, new: NewDrafter, *rest: Any) -> Json:
        elsewhere = replace(new, folder=Path("/nonexistent")) if new.upload else new
        return dict(await write(client, url, elsewhere, *rest))

    patch.setattr(swap, f"write_{engine}", write_upload)


def with_noise(drafter: Drafter, scales: dict[str, float]) -> Drafter:
    """Add noise by a part of a parameter's name, so that every part changes proposals and many are still kept."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            for part, scale in scales.items():
                if part in name:
                    parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return drafter


def dflash2(bench: Bench) -> Drafter:
    """Return the trained DFlash drafter with what it lacks at random. The selector is small: it makes no near-ties."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NEW_SIZES, "selector_rank", 16)
        patch.setitem(NEW_SIZES, "selector_top_k", 8)
        upgraded = upgrade_drafter(bench.drafters["trained"], DFlash2Config(kind="dflash2"), bench.target, seed=0)
    return with_noise(upgraded, {"_conv.": 0.03, "codebook": 0.5})


def dspark(bench: Bench) -> Drafter:
    """Return the trained DFlash drafter, upgraded, with a bias that changes its proposals and leaves it good."""
    upgraded = upgrade_drafter(bench.drafters["trained"], DSparkConfig(kind="dspark"), bench.target, seed=0)
    return with_noise(upgraded, {"markov_w2": 0.12})


def requests(bench: Bench, start: int = 0, count: int = PROMPTS) -> list[dict[str, Any]]:
    """Return greedy requests with a trace for some of the bench's prompts."""
    sampling = {"temperature": 0.0, "max_new_tokens": GREEDY_TOKENS, "custom_params": {KEY: True}}
    return [{"input_ids": p.token_ids, "sampling_params": sampling} for p in bench.prompts[start : start + count]]


def assert_drafts_with(url: str, bench: Bench, name: str, count: int = PROMPTS) -> tuple[list[Answer], list[Steps]]:
    """Compare a server's steps with replay of a drafter of the bench, and its answers with decoding without one.

    The prompts are always the same: the prefix cache may have their keys and values of an earlier drafter. Several
    requests are in flight, so that the batches of the server change from step to step. Returns answers and steps.
    """
    answers = generate(url, requests(bench, count=count), concurrency=4)
    trajectories = bench.answered(count)
    assert [answer["output_ids"] for answer in answers] == [t.tokens[t.prompt_length :] for t in trajectories]
    replayed = bench.replay(trajectories, name, None)
    for trajectory, answer, trace in zip(trajectories, answers, replayed, strict=True):
        assert_same_steps(trace_of(trajectory, answer["meta_info"][KEY]), trace)
    return answers, replayed


def assert_swaps(url: str, bench: Bench, checkpoint: Path, algorithm: str, folder: Path) -> None:
    """Swap a server that drafts with a checkpoint to other weights and back, and compare its steps each time.

    folder: gets the other checkpoint.
    """
    first = load_drafter(checkpoint, bench.target)
    other = write_other_weights(first, folder)
    bench = bench.with_drafters({"first": first, "other": load_drafter(other, bench.target)})
    steps = [
        [trace.accepted.tolist() for trace in bench.replay(bench.answered(PROMPTS), n, None)] for n in bench.drafters
    ]
    assert steps[0] != steps[1], "the drafters can be told apart"
    assert_drafts_with(url, bench, "first")
    for name, to in (("other", other), ("first", checkpoint)):
        (served,) = swapped([url], NewDrafter(drafter_digest(to), to, algorithm, first.block_size))
        assert_drafts_with(url, bench, name)
        print(f"{algorithm}: a pause of {served.pause_s:.3f} s")
