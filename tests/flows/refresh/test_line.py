"""What the next refresh reads from the champion's tags, with the real registry and the real stage `logs`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.mirror import STORE_VARIABLE, open_store
from draftsmith.artifacts.tracking.registry import Version
from draftsmith.flows.checks.check import check_before
from draftsmith.flows.planning.plan import Build, Status
from draftsmith.flows.refresh.champion import resolve
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import REFRESH, refresh_nodes
from draftsmith.flows.refresh.promotion import log_tags, prompt_tags
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.data.logs.earlier import STAGE, TABLE, EarlierConfig, is_available
from draftsmith.stages.data.logs.stage import STAGE as LOGS
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.targets.info import read_target_info
from tests.stages.data.logs.logs_run import as_ids, counts, run, table, write
from tests.testbed.artifacts import committed, fake_artifact
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

LINE = "tiny"


def config_of(log: Path, *, line: str | None = LINE, **logs: Any) -> RefreshConfig:
    return RefreshConfig.model_validate(
        {
            "name": "weekly",
            "registry": None if line is None else {"name": line},
            "target": {"source": "nowhere"},
            "logs": {"paths": [str(log)], "temperature": 0, "since": "last", **logs},
        }
    )


@dataclass(frozen=True)
class Promoted:
    """A line whose champion was trained on 20 logged answers, and a log with 6 later ones."""

    target: Path
    log: Path
    read: RecordingContext  # of stage `logs`
    version: Version

    def next(self, **logs: Any) -> RefreshConfig:
        return resolve(config_of(self.log, **logs))

    def run(self, config: RefreshConfig, folder: Path) -> tuple[RecordingContext, RecordingContext | None]:
        """Run stage `logs` of a refresh, and stage `earlier` if the graph has it."""
        nodes = {node.name: node for node in refresh_nodes(config)}
        inputs, taken = {"target": self.target}, None
        if "earlier" in nodes:
            assert nodes["logs"].inputs["earlier"] == "earlier"
            taken = RecordingContext.under(folder / "earlier", {})
            STAGE.run(taken, nodes["earlier"].config)
            inputs["earlier"] = taken.out
        again = RecordingContext.under(folder / "logs", inputs)
        assert config.logs is not None
        LOGS.run(again, LogsConfig.model_validate(config.logs.model_dump()))
        return again, taken


@pytest.fixture
def promoted(tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch) -> Promoted:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    rows = [json.loads(line) for line in _answers(tmp_path, tiny_drafter).read_text().splitlines()]
    log = write(tmp_path / "log.jsonl", rows[:20])
    first = resolve(config_of(log, replay_share=0.25))
    assert first.logs is not None and first.logs.after is None
    assert "earlier" not in {node.name for node in refresh_nodes(first)}
    read = run(tmp_path / "first", tiny_drafter.target, log, since="last")
    assert counts(read)["used"] == 20
    line = registry()
    drafter = tmp_path / "opd"
    (drafter / "drafter").mkdir(parents=True)
    version = line.register(LINE, fake_artifact("opd", "1" * 64, "2" * 64, drafter), log_tags(read.out))
    line.promote(version, expected=None, why="the first one")
    write(log, rows[:26])
    return Promoted(tiny_drafter.target, log, read, version)


def test_the_next_refresh_reads_new_rows_and_replays_the_champions_answers(
    promoted: Promoted, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    second = promoted.next(replay_share=0.25)
    assert second.logs is not None and second.logs.after == counts(promoted.read)["window"]["newest"]
    again, taken = promoted.run(second, tmp_path / "second")
    summary = counts(again)
    assert (summary["used"], summary["replayed"], summary["outside_window"]) == (6, 2, 19)
    assert summary["set_aside"] == {"used by the champion's refresh": 1}, "the newest one that was read"
    old = {tuple(row["response_ids"]) for row in table(promoted.read)}
    assert {tuple(row["response_ids"]) for row in table(again)[6:]} <= old

    assert second.registry is not None
    earlier, info = second.registry.answers, read_target_info(tiny_drafter.target)
    assert taken is not None and earlier is not None
    assert (earlier.target_digest, earlier.tokenizer_digest) == (info.digest, info.tokenizer_digest)

    answers = promoted.read.out / "trajectories.parquet"
    answers.write_bytes(b"other")
    for replayed in (True, False):
        with pytest.raises(DraftsmithError, match=r"has changed since the champion was trained on it.*replay_share"):
            STAGE.run(replace(taken, out=tmp_path), earlier.model_copy(update={"replayed": replayed}))
    answers.unlink()
    with pytest.raises(DraftsmithError, match="does not exist"):
        STAGE.run(replace(taken, out=tmp_path), earlier)


def test_answers_that_are_not_replayed_are_stored_as_digests(promoted: Promoted, tmp_path: Path) -> None:
    again, taken = promoted.run(promoted.next(), tmp_path / "second")
    assert taken is not None and {path.name for path in taken.out.iterdir()} == {"contents.npy", "earlier.json"}
    assert counts(again)["set_aside"] == {"used by the champion's refresh": 1} and counts(again)["used"] == 6
    _, nothing = promoted.run(promoted.next(lateness_hours=0), tmp_path / "exact")
    assert nothing is None


def test_a_machine_without_the_champions_answers_reads_new_rows_only(promoted: Promoted, tmp_path: Path) -> None:
    shutil.move(promoted.read.out, tmp_path / "elsewhere")
    again, taken = promoted.run(promoted.next(), tmp_path / "second")
    assert taken is None
    assert (counts(again)["used"], counts(again)["outside_window"]) == (6, 20)
    assert any("logs.lateness_hours is ignored" in line for line in again.logs)
    with pytest.raises(DraftsmithError, match=r"^earlier: .*are missing. Restore them, or set logs.replay_share to 0"):
        planned_checks(promoted.next(replay_share=0.25))


def test_the_champions_answers_are_found_in_a_bucket_and_in_a_moved_home(
    promoted: Promoted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    answers = EarlierConfig.model_validate_json(promoted.version.tags["answers"])

    def stored() -> EarlierConfig:
        ref = committed(open_store(home()), "logs", lambda out: shutil.copy(promoted.read.out / TABLE, out))
        return answers.model_copy(update={"folder": f"/gone/{ref.stage}/{ref.path.name}"})

    moved = stored()
    assert is_available(moved)
    STAGE.run(RecordingContext.under(tmp_path / "moved", {}), moved)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "another"))
    assert not is_available(moved)
    monkeypatch.setenv(STORE_VARIABLE, f"file://{tmp_path / 'bucket'}")
    assert not is_available(moved)
    in_bucket = stored()
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "a-third"))
    assert is_available(in_bucket) and not list((tmp_path / "a-third").rglob(TABLE))
    STAGE.run(RecordingContext.under(tmp_path / "fetched", {}), in_bucket)


def planned_checks(config: RefreshConfig) -> list[str]:
    """Return the warnings of the checks before a run's first stage."""
    nodes = refresh_nodes(config)
    return check_before([Build(REFRESH, config, node, status=Status.RUN) for node in nodes])


def _answers(folder: Path, made: DrafterArtifacts) -> Path:
    """Write a log of different answers, an hour apart."""
    from draftsmith.artifacts.tables.parquet import read_table
    from draftsmith.artifacts.tables.schemas import TRAJECTORIES

    rows = read_table(made.rollout / "trajectories.parquet", TRAJECTORIES).to_pylist()
    different = list({tuple(row["prompt_ids"] + row["response_ids"]): row for row in rows}.values())
    long = [row for row in different if len(row["response_ids"]) > 5][:60]
    kept = run(folder / "usable", made.target, write(folder / "all.jsonl", [as_ids(row) for row in long]))
    usable = [as_ids(row) for row in table(kept)]
    return write(folder / "timed.jsonl", [r | {"timestamp": 1_790_000_000 + 3600 * n} for n, r in enumerate(usable)])


@pytest.mark.parametrize("field", ["since", "replay_share"])
def test_since_last_and_replay_share_need_a_line(tmp_path: Path, field: str) -> None:
    given = config_of(tmp_path / "log.jsonl").model_dump(mode="json", exclude={"registry", "prompts"})
    given["logs"] |= {"since": None, "replay_share": 0.0} | ({"since": "last"} if field == "since" else {field: 0.5})
    with pytest.raises(ValueError, match=rf"logs\.{field}: .*needs section registry"):
        RefreshConfig.model_validate(given)


def test_held_out_shares_and_suffixes_of_a_line_must_not_shrink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    log = tmp_path / "log.jsonl"

    def asking(share: float, of_source: float | None, suffix: str = " Think.") -> RefreshConfig:
        given = config_of(log).model_dump(mode="json")
        given["prompts"]["heldout_share"] = share
        given["prompts"]["sources"][0] |= {"heldout_share": of_source, "suffix": suffix}
        return RefreshConfig.model_validate(given)

    measured = asking(0.2, 0.4)
    tags = prompt_tags(measured.prompts)
    registry().register(LINE, fake_artifact("opd", "1" * 64, "2" * 64, tmp_path), tags)
    assert resolve(measured).registry is not None
    assert resolve(asking(0.3, 0.4)).registry is not None
    with pytest.raises(DraftsmithError, match=r"heldout_share is 0\.1, and tiny version 1 was measured with 0\.2"):
        resolve(asking(0.1, 0.4))
    with pytest.raises(DraftsmithError, match=rf"source {log}: heldout_share is 0\.2, and tiny .* with 0\.4:"):
        resolve(asking(0.2, None))
    with pytest.raises(DraftsmithError, match=rf"source {log}: it has a suffix that tiny version 1 was not"):
        resolve(asking(0.2, 0.4, suffix=" Think twice."))
    assert resolve(asking(0.2, 0.4, suffix="\nThink.\n")).registry is not None, "white space does not count"
    by_conversation = measured.prompts.model_copy(update={"heldout_by": "conversation"})
    with pytest.raises(DraftsmithError, match="heldout_by is conversation, and tiny version 1 was measured with p"):
        resolve(measured.model_copy(update={"prompts": by_conversation}))
    with pytest.raises(ValueError, match=rf"sources\.0\.heldout_share: 1 holds out every row of {log}, which"):
        asking(0.2, 1.0)
