"""Config files and overrides are read, and every error is one line with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.config.load import merge_configs, read_config
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.stages.runtime.stage import Config


class Sampled(Config):
    kind: Literal["sampled"] = "sampled"
    temperature: float = 1.0


class Greedy(Config):
    kind: Literal["greedy"] = "greedy"
    ties: int = 0


class Source(Config):
    count: int = Field(default=1, ge=1)
    splits: tuple[str, ...] = Field(default=("train",), min_length=1)
    label: str = Field(default="own", min_length=1)
    path: Path | None = None


class Section(Config):
    steps: int = 10
    rate: float = 0.1
    loss: Literal["auto"] | Literal["paper", "matched"] = "matched"
    sources: list[Source] = Field(default_factory=list)
    decoding: Annotated[Sampled | Greedy, Field(discriminator="kind")] = Greedy()
    weights: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _even(self) -> Section:
        if self.steps % 2:
            raise ValueError("steps must be even: add one")
        return self


class Example(Config):
    name: str
    sft: Section = Section()
    opd: Section | None = Section()
    control: Section = Section()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: run\nsft:\n  steps: 20\n  sources:\n    - count: 3\n    - path: data.jsonl\n")
    return path


@pytest.mark.parametrize("name", ["configs/model.yaml", "model.yaml"])
def test_a_file_beside_the_config_is_extended_rather_than_a_shipped_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {name}\nname: own\n")
    config = read_config(path, [], RefreshConfig)
    assert config.name == "own" and config.registry is not None and config.registry.name == "model"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("sft: {steps: 2}\n")
    assert read_config(path, [], Example).sft.steps == 2


def test_overrides_are_yaml_and_reach_into_lists_and_new_sections(file: Path) -> None:
    overrides = ["sft.sources.0.count=9", "opd.rate=1e-3", "opd.decoding={kind: sampled, temperature: 0.5}", "name='7'"]
    config = read_config(file, [*overrides, "sft.weights.rare=2"], Example)
    assert config.sft.sources == [Source(count=9), Source(path=Path("data.jsonl"))]
    assert config.opd is not None and config.opd.rate == 0.001
    assert config.opd.decoding == Sampled(temperature=0.5)
    assert (config.name, config.sft.steps, config.sft.weights) == ("7", 20, {"rare": 2.0})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.stpes=2", "--set sft.stpes: unknown field. Did you mean sft.steps?"),
        ("temperature=2", "unknown field here. Did you mean sft.decoding.temperature or opd.decoding.temperature or"),
        ("sft.decoding={kind: sampled, ties: 1}", "--set sft.decoding.ties: this field belongs to another kind"),
        ("sft.zzz=2", "unknown field. Remove it, or use one of: decoding, loss, rate, sources, steps, weights"),
        ("sft.steps=many", "--set sft.steps: expected an integer, got 'many'"),
        ("sft.loss=peper", "--set sft.loss: expected one of 'auto', 'paper', 'matched', got 'peper'"),
        ("sft.sources.0.count=0", "--set sft.sources.0.count: expected greater than or equal to 1, got 0"),
        ("sft.steps=3", "--set sft: steps must be even: add one"),
        ("sft.steps=no", "--set sft.steps: expected a number, got true or false"),
        ("sft.sources.7.count=2", "sft.sources is a list of 2 in the file. Use an index from 0 to 1"),
    ],
)
def test_the_error_of_a_bad_override_names_it_with_a_remedy(file: Path, override: str, expected: str) -> None:
    with pytest.raises(DraftsmithError) as caught:
        read_config(file, [override], Example)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# Each level has nine aliases of the one before.
REPEATED = "a0: &a0 x\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(6))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(6))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nme: a\n", "nme: unknown field. Did you mean name? name: this field is required"),
        ("sft: {}\n", "name: this field is required. Add it to the file, or pass --set name=VALUE."),
        ("name: a\nsft: {rate: yes}\n", "sft.rate: expected a number, got true or false"),
        ("name: [a]\n", "name: expected a string (put it in quotes), got ['a']"),
        ("name: a\nname: b\n", "line 2, column 1: not valid YAML: field 'name' appears twice"),
        ("name: 2026-13-45\n", "not valid YAML: month must be in 1..12"),
        (
            REPEATED,
            "line 1, column 1: not valid YAML: with its aliases expanded it has over 100,000 values. Use fewer",
        ),
        (
            MERGED,
            "line 1, column 1: not valid YAML: with its aliases expanded it has over 100,000 values. Use fewer",
        ),
        ("name: &own [*own]\n", "bad.yaml: an alias contains itself, or is nested too deep. Expand it."),
        ("- name\n", "expected a mapping of fields, got ['name']. Write fields such as 'name: my-run'."),
    ],
)
def test_the_error_of_a_bad_file_names_the_field_with_a_remedy(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(DraftsmithError) as caught:
        read_config(path, [], Example)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_of_another_kind_is_replaced() -> None:
    base: dict[str, Any] = {"drafter": {"num_layers": 2, "block_size": 6}, "weights": {"kind": "power", "delta": 0.8}}
    assert merge_configs(base, {"drafter": {"block_size": 4}})["drafter"] == {"num_layers": 2, "block_size": 4}
    same = merge_configs(base, {"drafter": {"kind": "dflash", "block_size": 4}})  # the base leaves the default kind out
    assert same["drafter"] == {"kind": "dflash", "num_layers": 2, "block_size": 4}
    for weights in ({"kind": "uniform"}, {"preset": "paper"}):
        assert merge_configs(base, {"weights": weights})["weights"] == weights
    assert merge_configs(base, {"weights": {"kind": "power", "gamma": 2}})["weights"] == base["weights"] | {"gamma": 2}


def test_a_file_extends_another_field_by_field(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\nsft: {steps: 4, rate: 0.5, sources: [{count: 2}, {count: 3}]}\n")
    (tmp_path / "other").mkdir()
    middle = tmp_path / "other" / "middle.yaml"
    middle.write_text("extends: ../base.yaml\nsft: {rate: 0.25}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: other/middle.yaml\nname: top\nsft: {sources: [{count: 5}]}\n")
    config = read_config(top, ["sft.steps=6"], Example)
    assert (config.name, config.sft.steps, config.sft.rate) == ("top", 6, 0.25)
    assert [source.count for source in config.sft.sources] == [5]


def test_null_removes_a_section_of_the_file_or_of_the_extended_one(tmp_path: Path) -> None:
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("name: base\nsft: {steps: 4, decoding: {kind: sampled}, weights: {a: 1.0}}\ncontrol: {steps: 4}\n")
    top.write_text("extends: base.yaml\nsft: {decoding: null}\ncontrol: null\n")
    config = read_config(top, ["sft.weights=null"], Example)
    assert (config.sft.decoding, config.sft.weights, config.sft.steps) == (Greedy(), {}, 4)
    assert config.control == Section()
    with pytest.raises(DraftsmithError, match=r"--set control: expected a mapping of fields, got nothing"):
        read_config(top, ["control=null"], Example)


def test_null_leaves_opd_out_whatever_the_file_beneath_has(tmp_path: Path) -> None:
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("name: base\nopd: {steps: 4}\n")
    top.write_text("extends: base.yaml\nopd: null\n")
    assert read_config(top, [], Example).opd is None
    assert read_config(base, ["opd=null"], Example).opd is None
    again = read_config(top, ["opd.steps=6"], Example).opd
    assert again is not None and again.steps == 6


def test_files_that_extend_each_other_or_a_missing_file_are_reported(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("extends: second.yaml\n")
    second.write_text("extends: first.yaml\n")
    for other, said in (
        (f"../{tmp_path.name}/first.yaml", "the files extend each other"),
        ("third.yaml", "does not exist"),
        ("[1]", r"expected a file name, got \[1\]\. Name a YAML file"),
    ):
        second.write_text(f"extends: {other}\n")
        with pytest.raises(DraftsmithError, match=rf"\.yaml: extends: .*{said}"):
            read_config(first, [], Example)
