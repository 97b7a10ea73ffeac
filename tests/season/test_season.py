"""A season of a drafter line by the real command: every week comes out as it should, and the line can be changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftsmith.stages.drafters.digest import drafter_digest
from tests.season.season import LINE, SHORT, Week, draftsmith, play

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("season")


@pytest.fixture(scope="module")
def weeks(folder: Path) -> list[Week]:
    return list(play(folder, SHORT))


def test_every_week_comes_out_as_it_should(weeks: list[Week]) -> None:
    told = "\n\n".join(f"{week}\n{week.output}" for week in weeks)
    assert [week.happened for week in weeks] == [week.expected for week in weeks], told
    first, unchanged, traffic, broken, revised = weeks
    assert "plain decoding" in first.said
    assert not any(line.startswith(("sft: started", "opd: started")) for line in unchanged.output.splitlines())
    assert "beats version 1" in traffic.said
    assert "refused by the gate" in broken.said and "tau: " in broken.said
    assert "the target has changed since version 2 was promoted" in revised.output


def test_the_line_tells_its_history_and_rolls_back(weeks: list[Week], folder: Path) -> None:
    assert len(weeks) == 5
    home = folder / "home"
    told = draftsmith(home, "champions", LINE).stdout
    events = [line for line in told.splitlines() if " promoted (before: " in line]
    assert [event.split()[1:3] for event in events] == [["version", "1"], ["version", "2"], ["version", "4"]]
    checked = [line.split()[2] for line in told.splitlines() if " checked: tau " in line]
    assert checked == ["1", "1", "2", "2"], "weeks 2 to 5"
    dry = draftsmith(home, "rollback", LINE, "--dry-run")
    assert "version 2 would become the champion in place of version 4 (nothing was changed)" in dry.stdout
    assert "version 2 is the champion now" in draftsmith(home, "rollback", LINE, "--why", "latency").stdout
    assert "rolled back to (before: version 4)" in draftsmith(home, "champions", LINE).stdout
    assert "is the champion already" in draftsmith(home, "promote", f"{LINE}@2").stdout

    out = folder / "exported"
    exported = draftsmith(home, "export", f"{LINE}@champion", out)
    assert exported.returncode == 0, exported.stderr
    assert (out / "config.json").is_file() and (out / "model.safetensors").is_file()
    digest = json.loads((out / "drafter.json").read_text())["digest"]
    assert digest == drafter_digest(out)
    again = draftsmith(home, "export", LINE, out)
    assert (again.returncode, "is not empty" in again.stderr) == (2, True)
    unknown = draftsmith(home, "promote", f"{LINE}@9")
    assert (unknown.returncode, "has no version 9" in unknown.stderr) == (2, True)
