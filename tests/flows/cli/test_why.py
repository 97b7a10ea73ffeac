"""`draftsmith why` explains what changed a key since the last run."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.store.manifest import manifest_text, read_manifest
from draftsmith.flows.cli.main import main
from tests.flows.toy import TOY, EditedToy, write_config


def test_fields_seeds_inputs_files_code_and_versions_are_compared(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = tmp_path / "added.txt"
    added.write_text("1")
    config = str(write_config(tmp_path / "toy.yaml", target={"count": 3}, left={"addend": str(added)}))
    for node in ("target", "left"):
        assert main(["stage", node, config], TOY) == 0
    capsys.readouterr()

    def why(node: str, *options: str, pipeline: object = TOY) -> str:
        assert main(["why", config, node, *options], pipeline) == 0  # type: ignore[arg-type]
        return capsys.readouterr().out

    assert why("target").startswith("target: not new: collect/")
    assert "there is no earlier artifact of it to compare with" in why("target")

    new = why("target", "--set", "target.count=4", "--set", "seed=2")
    assert new.startswith("target: new: no artifact has the key ")
    assert "this node in the last run of toy" in new
    assert "config   count: 3 -> 4\n" in new and "seed     0 -> 2\n" in new
    assert "code" not in new and "file" not in new

    dependent = why("left", "--set", "target.count=4", "--set", "left.factor=7")
    assert dependent.startswith("left: its key is known after target\n")
    assert "config   factor: 1 -> 7\n" in dependent and "input    first: node target is not made yet" in dependent
    assert "\ntarget: new: " in dependent and "config   count: 3 -> 4\n" in dependent

    added.write_text("2")
    assert f"file     {added}: 6b86b273ff34fce1 -> d4735e3a265e16ee\n" in why("left")  # sha256 of 1 and of 2
    added.write_text("1")

    assert "code     tests.flows.toy_stages.combine: changed\n" in why("left", pipeline=EditedToy())

    (manifest,) = home.glob("store/collect/*/manifest.json")
    made = read_manifest(manifest.parent)
    versions = {**made.versions, "numpy": "1.0", "sglang": "0.5.20"}
    manifest.write_text(manifest_text(made.model_copy(update={"versions": versions})))
    older = why("target", "--set", "target.count=4")
    assert "version  numpy: 1.0 -> " in older
    assert "version  sglang: 0.5.20 -> not known before the stage runs (not part of the key)\n" in older

    # another run has built the input: its changed files are listed
    assert main(["stage", "target", config, "--set", "target.count=4"], TOY) == 0
    capsys.readouterr()
    rebuilt = why("left", "--set", "target.count=4")
    assert rebuilt.startswith("left: new: ") and ": numbers.json; `draftsmith why CONFIG target` says why\n" in rebuilt

    # a run of another name is compared with the nearest artifact
    other = why("target", "--set", "name=other", "--set", "target.count=9")
    assert "the last artifact of its stage (no run of this name has made the node)" in other
    assert "config   count: 4 -> 9\n" in other
    assert main(["why", config, "lfet"], TOY) == 2
