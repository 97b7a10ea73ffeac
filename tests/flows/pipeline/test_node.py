"""Making one node's artifact, where others work on the same store: runs of one home, and of two with a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.manifest import MANIFEST
from draftsmith.artifacts.open_store import STORE
from draftsmith.artifacts.store import Claim, Store
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.cli import main
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import key_of
from draftsmith.flows.pipeline.node import Workshop, make
from draftsmith.flows.pipeline.process import StageOutcome, run_stage
from tests.flows.pipeline.toy import TOY, ToyConfig, toy_nodes, write_config
from tests.testbed.s3 import SECRET, bucket


@pytest.mark.parametrize("when", ["before", "while the stage runs"])
def test_an_input_that_another_run_makes_again_is_not_filed_under_the_old_key(
    when: str, tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToyConfig(name="t")
    nodes = {node.name: node for node in toy_nodes(config)}
    workshop = Workshop(tmp_path, config, TOY, Display(), tracking)
    target = make(workshop, nodes["target"], {}).ref

    def make_it_again() -> None:
        with Store(tmp_path / "store").claim(target.stage, target.key, force=True) as claim:
            assert isinstance(claim, Claim)
            (claim.out / "numbers.json").write_text(json.dumps([1000]))
            workshop.store.commit(claim, config={}, inputs={}, code_digest="c", seed=0)

    def run_and_be_overtaken(*arguments: Any, **keywords: Any) -> StageOutcome:
        outcome = run_stage(*arguments, **keywords)
        make_it_again()
        return outcome

    if when == "before":
        make_it_again()
    else:
        monkeypatch.setattr("draftsmith.flows.pipeline.node.run_stage", run_and_be_overtaken)
    with pytest.raises(DraftsmithError, match=r"left: its input first .* was made again by another run"):
        make(workshop, nodes["left"], {"first": target})
    assert workshop.store.find("combine", key_of(nodes["left"], {"first": target}, config.seed, TOY)) is None


@pytest.fixture
def homes(tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Two, with a store in a bucket between them: stages of one run on different hosts."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    monkeypatch.setenv(STORE, "s3://teams/line")
    with bucket("teams"):
        yield tmp_path / "a", tmp_path / "b"


def test_what_one_host_has_made_another_goes_on_from(
    homes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path / "toy.yaml", target={"note_start": str(tmp_path / "started")}))

    def at(home: Path, *command: str) -> str:
        monkeypatch.setenv("DRAFTSMITH_HOME", str(home))
        assert main(list(command), TOY) == 0
        return capsys.readouterr().out

    a, b = homes
    for node in ("target", "left"):
        at(a, "stage", node, config)
    assert at(b, "status", config).count(" done") == 2 and at(b, "status").count(" done") == 2
    assert "target: not new: collect/" in at(b, "why", config, "target")
    plan = at(b, "run", config, "--plan")
    assert plan.count("reused") >= 2
    here = {path.parent.parent.name: sorted(p.name for p in path.parent.iterdir()) for path in b.rglob(MANIFEST)}
    assert here == {"collect": [MANIFEST], "combine": [MANIFEST]}

    at(b, "stage", "right", config)  # reads the target alone
    here = {path.parent.parent.name: sorted(p.name for p in path.parent.iterdir()) for path in b.rglob(MANIFEST)}
    assert here["collect"] == [MANIFEST, "metrics.jsonl", "numbers.json"]
    assert (tmp_path / "started").read_text() == "started\n"
    at(a, "stage", "total", config)  # what B has made
    shown = at(b, "show", "collect", "--verify")
    assert "every checksum is right" in shown and "store:      s3://teams/line" in shown and "numbers.json" in shown
    total = next(line.split()[1] for line in at(b, "status", config).splitlines() if line.startswith("total"))
    assert total == "combine"

    # what is lost in the bucket is made again there, whatever lies in a home
    for each in boto3.client("s3").list_objects_v2(Bucket="teams", Prefix="line/collect/")["Contents"]:
        boto3.client("s3").delete_object(Bucket="teams", Key=each["Key"])
    assert "to do" in at(tmp_path / "c", "status", config)
    assert "nothing in" in at(b, "prune")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_a_flipped_bit_stops_the_stage_that_would_read_it(
    homes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path / "toy.yaml"))
    monkeypatch.setenv("DRAFTSMITH_HOME", str(homes[0]))
    assert main(["stage", "target", config], TOY) == 0
    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket="teams", Prefix="line/collect/")["Contents"]
    (key,) = [each["Key"] for each in listed if each["Key"].endswith("numbers.json")]
    client.put_object(Bucket="teams", Key=key, Body=b"[0, 1, 2, 3, 5]")
    monkeypatch.setenv("DRAFTSMITH_HOME", str(homes[1]))
    capsys.readouterr()
    assert main(["stage", "left", config], TOY) == 2
    said = capsys.readouterr().err
    assert f"left: its input first: s3://teams/{key}: has changed since it was uploaded" in said
    assert "--force" in said
