"""The page of SGLang on a GPU: its commands, what they evaluate, and the table of evaluations in a store."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.flows.cli.main import parser
from draftsmith.flows.config.load import read_config
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.measurements import evaluate_config
from draftsmith.stages.evaluation.config import EvaluationConfig
from tests.gpu import served
from tests.testbed.artifacts import committed

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def commands() -> list[list[str]]:
    (block,) = re.findall(r"```\n(.*?)```", (HERE / "sglang.md").read_text("utf-8"), re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def evaluations() -> list[EvaluationConfig]:
    """Return what the page's commands evaluate, in their order."""
    of_page = [parser().parse_args(words[1:]) for words in commands() if words[0] == "draftsmith"]
    refreshes = [read_config(ROOT / each.config, each.overrides, RefreshConfig) for each in of_page]
    compared = [each.command == "evaluate" for each in of_page]
    return [
        evaluate_config(refresh, options.drafters).evaluation
        for refresh, options, chosen in zip(refreshes, of_page, compared, strict=True)
        if chosen
    ]


def test_the_page_has_ten_commands_that_are_there() -> None:
    found = commands()
    assert len(found) == 10 and {words[0] for words in found} == {"make", "source", "hf", "draftsmith", "python"}
    assert found[-1] == ["python", "-m", served.__name__]
    assert re.search(rf"^{found[0][1]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_the_table_has_every_block_load_and_record_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path))
    with pytest.raises(DraftsmithError, match="no evaluation on SGLang"):
        served.main()
    store = Store(tmp_path / "store")
    for key, config in enumerate(evaluations()):
        (block,) = config.block_sizes or ()
        drafted = {"tokens_per_s": 300.0, "speedup": 3.0, "tau_served": 5.0, "block_size": block}
        tables = [
            {"temperature": 0.0, "concurrency": count, "arms": {"plain": {"tokens_per_s": 100.0}, "mine": drafted}}
            for count in config.concurrency
        ]
        files = {"evaluation.json": json.dumps({"speed_by_setting": tables})}
        committed(store, "evaluation", files, str(key), config=config.model_dump(mode="json"))
    embedded = {"evaluation.json": json.dumps({"speed_by_setting": tables})}
    committed(store, "evaluation", embedded, "f", config=EvaluationConfig().model_dump(mode="json"))
    rows = [(row["in flight"], row["block"], row["traced"], row["tokens/s"]) for row in served.rows(store)]
    wanted = [
        (count, *arm)
        for traced in ("no", "yes")
        for block in (16, 8)
        for count in (1, 8, 32)
        for arm in (("-", traced, 100), (block, traced, 300))
    ]
    assert rows == wanted
    served.main()
    assert capsys.readouterr().out.count("mine") == len(wanted) / 2
