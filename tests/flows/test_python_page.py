"""The code blocks of `flows/python.md`, run unchanged on the tiny target."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.tracking.registry import Registry
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from tests.flows.processes import ROOT, run_python
from tests.stages.data.row_files import write
from tests.testbed.artifacts import committed
from tests.testbed.databases import give_databases
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.refresh import small_refresh

PAGE = ROOT / "flows" / "python.md"
_ASK = """
import json, pathlib
result = {
    "tau": comparison.to_pandas()["tau"].to_dict(),
    "difference": [difference.value, difference.interval()],
    "rejected": dict(answers.rejected),
    "artifacts": {name: str(folder) for name, folder in run.artifacts.items()},
    "outcome": run.outcome,
    "rollout": len(rollout),
    "config": quickstart.is_file(),
    "mined": mined.num_rows,
    "same": [draftsmith.load_drafter(f"models:/my-line{which}", target).block_size for which in ("@champion", "/1")],
    "block_size": drafter.block_size,
}
pathlib.Path("result.json").write_text(json.dumps(result))
"""


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, tiny_target: Path, tiny_prompts: Path, tiny_drafter: DrafterArtifacts) -> Path:
    """Return a folder in which the page's names are paths to the test bed, which take precedence over hub ids."""
    for name, source in {
        "Qwen/Qwen3-4B": tiny_target,
        "z-lab/Qwen3-4B-DFlash-b16": tiny_drafter.drafter / DRAFTER_FOLDER,
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(source)
    rows: list[dict[str, object]] = [
        {"prompt_token_ids": t.tokens[: t.prompt_length], "completion_token_ids": t.tokens[t.prompt_length :]}
        for t in load_trajectories(tiny_drafter.heldout).trajectories[:6]
    ]
    rows.append({**rows[0], "temperature": 0.7})
    write(tmp_path / "answers.jsonl", rows)
    config = small_refresh("my-model", "Qwen/Qwen3-4B", tiny_prompts, 24)
    (tmp_path / "my-model.yaml").write_text(yaml.safe_dump(config))
    home = tmp_path / "home"
    give_databases(home)
    checkpoint = tiny_drafter.drafter / DRAFTER_FOLDER
    ref = committed(Store(home / "store"), "opd", lambda out: shutil.copytree(checkpoint, out / DRAFTER_FOLDER))
    lines = Registry(Tracking(home))
    lines.promote(lines.register("my-line", ref, {}), expected=None, why="the only one")
    return tmp_path


def test_the_code_of_the_page_runs(folder: Path) -> None:
    run_python(folder / "home", "\n".join([*blocks(), _ASK]), cwd=folder)
    result = json.loads((folder / "result.json").read_text("utf-8"))
    assert result["tau"]["public"] == result["tau"]["ours"] > 2  # a trained drafter
    assert result["difference"] == [0.0, [0.0, 0.0]]  # the same drafter
    assert list(result["rejected"].values()) == [1]
    assert {"target", "prompts", "rollout"} == set(result["artifacts"])
    assert result["outcome"] is None and result["rollout"] == 8
    assert all((Path(artifact) / "manifest.json").is_file() for artifact in result["artifacts"].values())
    assert result["same"] == [result["block_size"]] * 2
    assert result["config"] and result["mined"] > 0
    assert (folder / "acceptance.png").stat().st_size > 0
