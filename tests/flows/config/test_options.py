"""A config field exists only if a YAML of the repository sets it or a README names it."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.stages.runtime.stage import Config
from draftsmith.stages.training.config import OpdConfig, SftConfig
from tests.config_reference import models_in
from tests.lab.experiment import LabConfig
from tests.season.season import FULL, config_of

ROOT = Path(__file__).parents[3]
MOST = 220
UNNAMED: set[str] = set()  # by class and name
_YAML = [file for pattern in ("configs/*.yaml", "configs/scale/*.yaml") for file in ROOT.glob(pattern)]
_LAB = list(ROOT.glob("tests/lab/experiments/*.yaml"))
_PAGES = [
    *(ROOT / name for name in ("README.md", "flows/README.md", "stages/README.md", "artifacts/README.md")),
    *(ROOT / "stages" / name for name in ("formats.md", "targets.md", "training.md", "verify-steps.md")),
    *(ROOT / "configs" / name for name in ("README.md", "own-logs.md", "scale/README.md", "team/README.md")),
    *(ROOT / "flows" / name for name in ("failed-night.md", "promote-by-hand.md", "refresh/README.md")),
    ROOT / "stages" / "engines" / "sglang" / "README.md",
]
_CODE = re.compile(r"^ *```.*?^ *```$|`[^`]+`", re.MULTILINE | re.DOTALL)

Field = tuple[type[BaseModel], str]  # of the class that declares it first


def field_of(model: type[BaseModel], name: str) -> Field:
    return next(each for each in reversed(model.__mro__) if name in inspect.get_annotations(each)), name


def options(model: type[BaseModel], section: str = "") -> dict[Field, set[str]]:
    """Return the fields that a file may set, in this section and those inside it, with the names of their sections."""
    found: dict[Field, set[str]] = {}
    for name, info in model.model_fields.items():
        if issubclass(model, Config) and name in model.filled_in():
            continue
        found.setdefault(field_of(model, name), set()).add(section)
        for inner in models_in(info.annotation):
            for field, sections in options(inner, name).items():
                found.setdefault(field, set()).update(sections)
    return found


def set_in(data: Any, models: list[type[BaseModel]]) -> set[Field]:
    """Return the fields that some data sets. models: its possible types."""
    found: set[Field] = set()
    for each in data if isinstance(data, list) else [data]:
        fields = each.items() if isinstance(each, dict) else []
        for model in models:
            kinds = get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
            if kinds and isinstance(each, dict) and each.get("kind", kinds[0]) not in kinds:
                continue
            for name, value in fields:
                if name in model.model_fields:
                    inner = list(models_in(model.model_fields[name].annotation))
                    found |= {field_of(model, name)} | set_in(value, inner)
    return found


def test_every_field_is_set_by_a_yaml_or_named_by_a_page() -> None:
    known = options(RefreshConfig)
    used = set_in(config_of(FULL), [RefreshConfig])
    for path in _YAML:
        used |= set_in(yaml.safe_load(path.read_text("utf-8").replace("$", "_")), [RefreshConfig])
    for path in _LAB:
        experiment = yaml.safe_load(path.read_text("utf-8"))
        used |= set_in(experiment, [LabConfig])
        for arm in experiment.get("arms", {}).values():
            used |= set_in(arm.get("change"), [SftConfig if arm["stage"] == "sft" else OpdConfig])
    used |= named_by_pages(known)
    assert len(known) <= MOST
    assert {f"{owner.__name__}.{name}" for owner, name in known.keys() - used} == UNNAMED


def named_by_pages(known: dict[Field, set[str]]) -> set[Field]:
    """Return the fields that the code of a page sets (YAML) or names: with their section, or alone if unambiguous."""
    found: set[Field] = set()
    owners = Counter(name for _, name in known)
    for page in _PAGES:
        for code in _CODE.findall(page.read_text("utf-8")):
            text = re.sub(r"^ *```.*$", "", code, flags=re.MULTILINE).strip("`")
            for each in re.split(r"\n(?=\S)", text):
                with suppress(yaml.YAMLError):
                    found |= set_in(yaml.safe_load(each.replace("…", "x")), [RefreshConfig])
            for owner, name in known:
                alone = rf"(?<![\w.-]){name}(?![\w-])" if owners[name] == 1 else r"(?!)"
                dotted = "|".join(rf"{section}\.{name}\b" for section in known[owner, name])
                if re.search(rf"{dotted}|{alone}", text):
                    found.add((owner, name))
    return found
