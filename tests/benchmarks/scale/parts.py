"""What is measured, each part in a process of its own: `python -m tests.benchmarks.scale.parts PART FOLDER N TOKENS`.

Prints one line of JSON: seconds, of them with a core, and the process's peak resident memory. Stages run as they are;
where a stage would generate or replay, what that gives is taken from the recorded answers.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from draftsmith.stages.process import keep_freed_memory
from tests.benchmarks.scale.recorded import Recorded
from tests.testbed.context import RecordingContext


def run_stage(name: str, folder: Path, config: dict[str, Any], inputs: dict[str, str], part: str = "") -> None:
    """The stage's body, its artifact in `folder/PART` (left out: its name), its shards in `folder/PART.work`."""
    stage = import_module(f"draftsmith.stages.{name}").STAGE
    out, given = folder / (part or name), {each: folder / path for each, path in inputs.items()}
    stage.run(RecordingContext(out, out.with_name(f"{out.name}.work"), given), stage.config.model_validate(config))


TRAINING = {
    "steps": 4,
    "learning_rate": 1e-4,
    "compute_dtype": "float32",
    "sequences_per_step": 8,
    "feature_memory_mb": 64,  # does not hold the features of all, as with real models
}


def logs(folder: Path, _: Recorded) -> None:
    config = {"paths": [str(folder / "answers.jsonl")], "temperature": 0.0, "scored": 0}
    run_stage("logs", folder, config, {"target": "target"})


def rollout(folder: Path, recorded: Recorded) -> None:
    """Puts the shards of a finished rollout together."""
    config = {"sampling": {"max_new_tokens": recorded.tokens}}
    inputs = {"target": "target", "prompts": "prompts", "drafter": "drafter"}
    run_stage("rollout", folder, config, inputs, "shards")


def mined(folder: Path, recorded: Recorded) -> None:
    """Writes the shards of mining, group by group."""
    from draftsmith.stages.replay.replayer import Mined
    from draftsmith.stages.replay.shards import MinedShards

    with MinedShards(folder / "mining.work") as shards:
        for start in range(0, recorded.answers, 2):  # answers of 4,000 tokens in groups of 8,192
            indices = range(start, min(start + 2, recorded.answers))
            traces = [recorded.trace(index) for index in indices]
            scores = [recorded.scores(index) for index in indices]
            shards.add(Mined([recorded.trajectory(index) for index in indices], traces, scores))


def mining(folder: Path, _: Recorded) -> None:
    """Puts them together, with the figures and the parity gate."""
    inputs = {"target": "target", "drafter": "drafter", "trajectories": "rollout"}
    run_stage("mining", folder, {}, inputs)


def sft(folder: Path, _: Recorded) -> None:
    inputs = {"target": "target", "drafter": "drafter", "trajectories": "rollout"}
    run_stage("sft", folder, TRAINING, inputs)


def opd(folder: Path, _: Recorded) -> None:
    inputs = {"target": "target", "drafter": "drafter", "trajectories": "rollout", "mined": "mining"}
    run_stage("opd", folder, TRAINING | {"anchors": "successors"}, inputs)


def opd_visited(folder: Path, _: Recorded) -> None:
    """Anchors and scores off the mined table."""
    inputs = {"target": "target", "drafter": "drafter", "trajectories": "rollout", "mined": "mining"}
    config = TRAINING | {"anchors": "visited", "remine_every": 0, "loss": "paper"}
    run_stage("opd", folder, config, inputs, "opd_visited")


def evaluation(folder: Path, recorded: Recorded) -> None:
    """The acceptance tables of two drafters on all answers; the traces are made, not replayed."""
    from draftsmith.stages.measure.acceptance import acceptance_table, has_loop, tau_by_set, tau_differences
    from draftsmith.stages.replay.tally import Tally
    from draftsmith.stages.stored import load_trajectories

    stored = load_trajectories(folder / "rollout", ["train"])
    looping = [has_loop(each.tokens[each.prompt_length :]) for each in stored.trajectories]
    tallies = {"sft": Tally(recorded.answers), "opd": Tally(recorded.answers)}
    for index in range(recorded.answers):
        trace = recorded.trace(index)
        for tally in tallies.values():
            tally.add([index], [trace])
    prompts = stored.prompts
    acceptance_table(tallies, prompts, looping)
    tau_by_set(tallies, prompts, ["made"] * len(prompts))
    tau_differences(tallies, prompts)


PARTS: dict[str, Callable[[Path, Recorded], None]] = {
    each.__name__: each for each in (logs, rollout, mined, mining, sft, opd, opd_visited, evaluation)
}


def prepare(part: str, folder: Path, recorded: Recorded) -> None:
    """Make what a part reads and no part before it has made."""
    if part == "logs":
        recorded.write_logs(folder / "answers.jsonl")
    if part == "rollout":
        recorded.write_prompts(folder / "prompts")
        recorded.write_shards(folder / "shards.work")
    if part not in ("logs", "rollout") and not (folder / "rollout" / "trace.json").exists():
        recorded.write_rollout(folder / "rollout", folder / "drafter" / "drafter")


def clean(part: str, folder: Path) -> None:
    """Remove what no part behind it reads."""
    if part == "rollout":  # what the others read
        (folder / "shards").rename(folder / "rollout")
    for name in {
        "logs": ("answers.jsonl", "logs", "logs.work"),
        "rollout": ("shards.work", "prompts"),
        "mining": ("mining.work",),
    }.get(part, ()):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def peak_bytes() -> int:
    """Of this process's resident memory (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    import torch

    import_module("draftsmith.stages.estimates")  # what any stage imports
    torch.set_num_threads(1)
    keep_freed_memory()
    part, folder, recorded = sys.argv[1], Path(sys.argv[2]), Recorded(int(sys.argv[3]), int(sys.argv[4]))
    started, used = time.perf_counter(), time.process_time()
    PARTS[part](folder, recorded)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    print(json.dumps(seconds | {"peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
