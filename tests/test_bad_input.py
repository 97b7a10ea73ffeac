"""Bad input of every kind, in one table: one clear line, exit code 2, before long work, and nothing is lost.

Every case is a refresh's config with a change, files next to it, or a damaged home; the command runs
in this process.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import MANIFEST
from draftsmith.flows.cli.main import main
from tests.testbed.artifacts import committed
from tests.testbed.refresh import small_refresh

SECRET = "Zk9-marker-7Qx"
PLAN = ("run", "{config}", "--plan")
SHOW = ("show", "sft", "--verify")
RUN = ("run", "{config}")
CHECK = ("check", "{config}")
SGLANG = {"kind": "sglang", "urls": ["http://127.0.0.1:9"]}


@dataclass(frozen=True)
class Bad:
    """A kind of bad input. In texts, {here} is the folder of the test."""

    said: str
    change: Mapping[str, Any] = field(default_factory=dict)  # dotted field -> value; None: removed
    text: str | bytes | None = None  # of the config file, in place of the changed one
    arguments: tuple[str, ...] = PLAN
    prepare: Callable[[Path], object] = lambda _here: None
    environment: Mapping[str, str] = field(default_factory=dict)


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    def prepare(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def source(path: str) -> dict[str, Any]:
    return {"prompts.sources": [{"kind": "jsonl", "path": path}]}


def logs(**fields: Any) -> dict[str, Any]:
    return {"logs": {"temperature": 0, "paths": ["{here}/rows.jsonl"], **fields}}


def model(config: Any = None, **files: str | bytes) -> Callable[[Path], object]:
    """The folder `broken` with a model's config.json and other files."""

    def prepare(here: Path) -> None:
        (here / "broken").mkdir()
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (here / "broken" / "config.json").write_text(text)
        for name, content in files.items():
            write(f"broken/{name.replace('__', '.')}", content)(here)

    return prepare


def damaged(how: Callable[[Path], object]) -> Callable[[Path], object]:
    """An artifact of the stage `sft` in the store, then damaged."""

    def prepare(here: Path) -> None:
        how(committed(Store(here / "home" / "store"), "sft", {"data.txt": "answer"}).path)

    return prepare


def of_artifact(said: str, how: Callable[[Path], object]) -> Bad:
    return Bad(said, arguments=SHOW, prepare=damaged(how))


BROKEN = {"target.source": "{here}/broken"}
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}).encode()


CUT = struct.pack("<Q", len(HEADER)) + HEADER + b"\0" * 100

CONFIG = {
    "no file": Bad("no such config file", arguments=("run", "{here}/absent.yaml", "--plan")),
    "a folder": Bad("cannot read the config", arguments=("run", "{here}", "--plan")),
    "not UTF-8": Bad("it is not UTF-8 text", text=b"name: \xff\xfe"),
    "binary": Bad("not valid YAML", text=b"name: \x00\x01"),
    "broken YAML": Bad("line 1, column", text="name: [a, b"),
    "a tag that makes objects": Bad("not valid YAML", text="name: !!python/object/apply:os.system [ls]"),
    "a field whose name YAML reads as true": Bad(
        "line 2, column 10: not valid YAML: a field's name", text="name: a\nstages: {on: 3}"
    ),
    "not a finite number": Bad("sft.learning_rate", {"sft.learning_rate": float("nan")}),
    "a prompt set that is called as all are": Bad(
        "sources.0.label: `all` means the prompts of all",
        {"prompts.sources": [{"kind": "jsonl", "path": "{here}/all"}]},
    ),
    "a slice that is measured anyway": Bad("slices: `depth` is measured", {"prompts.slices": ["depth"]}),
    "a home that is no address": Bad("Set DRAFTSMITH_HOME", environment={"DRAFTSMITH_HOME": "a?b"}),
    "a home of nobody": Bad("DRAFTSMITH_HOME", environment={"DRAFTSMITH_HOME": "~nobody-at-all/home"}),
    "name of the line": Bad("'../../etc' is not a name for a model line", {"registry": {"name": "../../etc"}}),
    "a restart in the file": Bad(
        "registry.restart: applies to one command", {"registry": {"name": "a-line", "restart": True}}
    ),
    "a restart by --set": Bad("registry.restart: applies to", arguments=(*PLAN, "--set", "registry.restart=true")),
    "a restart of no line": Bad("names no model line", arguments=(*PLAN, "--restart")),
    "a line with servers and without a champion": Bad(
        "has no champion in sqlite:", {"registry": {"name": "a-line", "servers": ["http://gpu1:30000"]}}
    ),
    "a pattern without quotes": Bad("Put a string that begins with * in quotes", text="logs: {paths: [*.jsonl]}"),
    "--set of broken YAML": Bad("not valid YAML", arguments=(*PLAN, "--set", "sft={")),
    "--force of no node": Bad("--force oops: no such node", arguments=(*PLAN, "--force", "oops")),
}
SECRETS = {
    "a password in an address": Bad("sft.init_from: it holds", {"sft.init_from": f"http://u:{SECRET}@h"}),
    "a variable called as secrets are": Bad(
        "MY_PASSWORD", {"rollout.engine": {"launch": {"environment": {"MY_PASSWORD": SECRET}}}}
    ),
    "a number as a password": Bad("password", {"rollout.engine": {"launch": {"options": {"x-password": 12345678}}}}),
    "a secret by --set": Bad("target.source", arguments=(*PLAN, "--set", f"target.source=http://u:{SECRET}@h")),
    "a secret in an unknown field": Bad("api_key", {"api_key": SECRET}),
    "an address of diagnose": Bad(
        "--api-key-env",
        arguments=("diagnose", "{config}", "--url", f"http://u:{SECRET}@h:1", "--drafter", "{here}"),
    ),
}
SERVER = {
    "an address of diagnose without its scheme": Bad(
        "--url: 'gpu1'", arguments=("diagnose", "{config}", "--drafter", "{here}", "--url", "gpu1")
    ),
    "neither urls nor launch": Bad("rollout.engine: ", {"rollout.engine": {"kind": "sglang"}}),
    "no SGLang here": Bad(
        "has no sglang installed", {"rollout.engine": {"kind": "sglang", "launch": {}}}, arguments=CHECK
    ),
    "a key that is not set": Bad(
        "the variable MY_ABSENT_KEY is not set",
        {"rollout.engine": {**SGLANG, "api_key_env": "MY_ABSENT_KEY"}},
        arguments=CHECK,
    ),
    "no interpreter": Bad(
        "absent/python does not exist",
        {"rollout.engine": {"kind": "sglang", "python": "{here}/absent/python", "launch": {}}},
        arguments=CHECK,
    ),
    "an interpreter that is no program": Bad(
        "rows.jsonl cannot be executed",
        {"rollout.engine": {"kind": "sglang", "python": "{here}/rows.jsonl", "launch": {}}},
        arguments=CHECK,
    ),
    "an interpreter without SGLang": Bad(
        "is not a working Python",
        {"rollout.engine": {"kind": "sglang", "python": "/bin/false", "launch": {}}},
        arguments=CHECK,
    ),
}
CHECKPOINT = {
    "no model": Bad("does not exist", {"target.source": "./absent"}),
    "a revision of a file": Bad("revision is for", {"target": {"source": "a.gguf", "revision": "main"}}),
    "no such package": Bad("is not installed", {"target.source": "package:absent_model"}),
    "weights that are cut off": Bad(
        "truncated or damaged", BROKEN, arguments=CHECK,
        prepare=model({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, model__safetensors=CUT),
    ),
}  # fmt: skip
DATA = {
    "no prompts": Bad("is not an existing file", source("{here}/absent.jsonl")),
    "a folder without rows": Bad(
        "has no file of rows",
        source("{here}/none"),
        prepare=write("none/readme.txt", "x"),
    ),
    "no such protocol": Bad("nope://b/x", source("nope://b/x.jsonl"), arguments=CHECK),
    "an unknown kind of source": Bad("kind is 'csv'. Use one of", {"prompts.sources": [{"kind": "csv", "path": "a"}]}),
}
DISK = {
    "the home is a file": Bad("preparing", arguments=RUN, prepare=write("home", "x")),
    "the disk is full": Bad("min_free_gb", {"stages": {"min_free_gb": 1e9}}, arguments=RUN),
    "the home is on a network": Bad("file system (nfs4", arguments=RUN, prepare=write("nfs", "")),
    "no database": Bad(
        "MLFLOW_TRACKING_URI", arguments=("stage", "target", "{config}"), environment={"MLFLOW_TRACKING_URI": "nope://x"}
    ),
    "no such artifact": Bad("no artifact matches", arguments=("show", "absent")),
    "a damaged manifest": of_artifact("no artifact matches", lambda folder: (folder / MANIFEST).write_text("{")),
    "a bit flipped": of_artifact("has changed", lambda folder: (folder / "data.txt").write_text("answeR")),
    "no such line": Bad("mlflow.db has no line yet", arguments=("champions", "absent")),
    "no such version": Bad("has no version 3", arguments=("promote", "absent@3")),
}  # fmt: skip
TABLES = {"config": CONFIG, "secret": SECRETS, "server": SERVER, "checkpoint": CHECKPOINT, "data": DATA, "disk": DISK}
CASES = {f"{table}: {name}": bad for table, cases in TABLES.items() for name, bad in cases.items()}


def base() -> dict[str, Any]:
    """A refresh that would run."""
    return small_refresh("bad", "{here}/model", "{here}/rows.jsonl", 8, prompts={"max_prompt_tokens": 64})


def changed(config: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in change.items():
        *sections, last = name.split(".")
        section = config
        for each in sections:
            section = section[each]
        if value is None:
            del section[last]
        elif isinstance(value, dict) and isinstance(section.get(last), dict):
            section[last] |= value
        else:
            section[last] = value
    return config


def filled(value: Any, here: Path) -> Any:
    """With the folder in place of {here}."""
    if isinstance(value, str):
        return value.replace("{here}", str(here))
    if isinstance(value, list | tuple):
        return [filled(each, here) for each in value]
    return {name: filled(each, here) for name, each in value.items()} if isinstance(value, dict) else value


def tree(home: Path) -> dict[str, int]:
    """What artifacts the home holds; its databases and locks aside."""
    return {str(path): path.stat().st_mtime_ns for path in home.rglob("store/**/*") if ".lock-" not in path.name}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in bad.environment.items():
        monkeypatch.setenv(variable, value)
    write("rows.jsonl", '{"prompt": "How much is 7 times 8?"}\n')(tmp_path)
    write("model/config.json", "{}")(tmp_path)
    write("model/model.safetensors", "x")(tmp_path)
    bad.prepare(tmp_path)
    if (tmp_path / "nfs").exists():
        mount = SimpleNamespace(mountpoint=f"{tmp_path}/home", fstype="nfs4")
        monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [mount])
    config = tmp_path / "run.yaml"
    text = yaml.safe_dump(filled(changed(base(), bad.change), tmp_path)) if bad.text is None else bad.text
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree(tmp_path / "home")
    before_variables = dict(os.environ)

    code = main([filled(each, tmp_path).replace("{config}", str(config)) for each in bad.arguments])

    out, err = capsys.readouterr()
    for variable in set(os.environ) - set(before_variables):  # what Prefect is told about its home
        del os.environ[variable]
    last = err.splitlines()[-1]
    assert code == 2, (out, err)
    assert last.startswith("draftsmith: error: ") and "Traceback" not in out + err and "unexpected" not in last
    assert filled(bad.said, tmp_path) in " ".join((out + err).split()), (out, err)
    assert SECRET not in out + err
    assert len([line for line in err.splitlines() if "error" in line]) == 1
    assert tree(tmp_path / "home") == before
