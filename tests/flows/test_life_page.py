"""The page of the life of a refresh: its rows have stored names, and its nodes are a refresh's."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import fields

from draftsmith.artifacts.results.evaluation import Acceptance
from draftsmith.artifacts.results.gate import GateVerdict
from draftsmith.artifacts.tables import schemas
from draftsmith.artifacts.tracking.registry import PROMOTION_TAGS
from draftsmith.flows.planning.graph import topological_order
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.drafted_blocks import DraftedBlocks
from draftsmith.stages.training.loss_report import LossReport
from tests.flows.processes import ROOT
from tests.testbed.refresh import small_refresh

PAGE = (ROOT / "flows" / "life-of-a-refresh.md").read_text("utf-8")
STEPS = re.split(r"^\d+\. ", PAGE, flags=re.MULTILINE)[1:]
NAMES: dict[str, Collection[str]] = {
    **{table.name: table.columns.names for table in vars(schemas).values() if isinstance(table, schemas.TableSchema)},
    **{each.__name__: [field.name for field in fields(each)] for each in (Batch, DraftedBlocks, LossReport)},
    "acceptance.json": list(Acceptance.model_fields),
    "verdict.json": list(GateVerdict.model_fields),
    "version": [f"draftsmith.{name}" for name in (*PROMOTION_TAGS, "promoted_at")],
}


def rows(step: str) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of a step's block: the table, and name -> value. Two spaces divide them."""
    (block,) = re.findall(r"```\n(.*?)```", step, flags=re.DOTALL)
    found = []
    for line in block.strip().splitlines():
        table, *cells = line.strip().split("  ")
        found.append((table, dict(cell.partition(" ")[::2] for cell in cells)))
    return found


def test_eight_steps_name_a_file_each() -> None:
    assert len(STEPS) == 8
    assert all(re.search(r"\]\([\w./-]+\.py\)", step) for step in STEPS)


def test_every_row_has_stored_names() -> None:
    for step in STEPS[1:]:
        for table, values in rows(step):
            assert values and not set(values) - set(NAMES[table]), table


def test_the_rows_are_of_one_prompt() -> None:
    found = [(table, values) for step in STEPS[1:5] for table, values in rows(step)]
    (prompt,) = [values["prompt_id"] for _, values in found if "prompt_id" in values]
    assert {values["trajectory_id"] for _, values in found if "trajectory_id" in values} == {f"{prompt}/0"}
    blocks = {values["proposed_ids"] for _, values in found if "proposed_ids" in values}
    assert len(blocks) == 1  # replay rebuilds what the engine recorded


def test_the_nodes_are_those_of_a_refresh() -> None:
    opd = {"anchors": "visited"}  # reads the mined table
    config = small_refresh("my-model", "target", "prompts.jsonl", 8, registry={"name": "my-model"}, opd=opd)
    (nodes,) = [values for table, values in rows(STEPS[0]) if table == "nodes"]
    assert list(nodes) == [node.name for node in topological_order(refresh_nodes(RefreshConfig.model_validate(config)))]
