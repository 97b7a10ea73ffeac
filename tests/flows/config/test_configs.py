"""Every config file of the repository loads, its graph is ordered, and the recipes have the paper's settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.planning.graph import topological_order
from draftsmith.flows.refresh.config import RefreshConfig, control_config
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.evaluation.looks import MOST_LOOKS
from draftsmith.stages.evaluation.verdicts import FEWEST_RUNS
from draftsmith.stages.training.config import SftConfig
from tests.testbed.refresh import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("scale/*.yaml")])
RECIPES = ["qwen3-4b-dflash", "qwen3-4b-dflash-thinking", "qwen3-8b-dflash", "qwen3-8b-dflash-thinking"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_loads_with_its_graph_in_order_and_compares_speeds_often_enough(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    nodes = [node.name for node in topological_order(refresh_nodes(config))]
    assert nodes[0] == "target" and nodes[-1] == "report"
    # what a stage process is sent is what it reads
    assert RefreshConfig.model_validate(config.model_dump(mode="json")) == config
    if path.stem == "native-head":  # it trains nothing
        assert config.opd is None and config.sft.steps == 0
    else:
        assert config.opd is not None
        control = control_config(config, config.opd)
        assert SftConfig.model_validate(control.model_dump(mode="json")) == control
    evaluation = config.evaluation
    repetitions = evaluation.speed_prompts if evaluation.by_prompt else evaluation.rounds
    assert repetitions >= FEWEST_RUNS
    assert evaluation.by_prompt or evaluation.rounds >= 2, "one round does not show the machine's noise"


_YAML = re.compile(r"^```yaml\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("name", "text"), _YAML.findall((CONFIGS.parent / "README.md").read_text("utf-8")))
def test_the_readmes_configs_load_and_start_from_the_serving_drafter(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    config = load_config(tmp_path / name)
    nodes = {node.name: node for node in refresh_nodes(config)}
    assert config.opd is not None
    assert (config.name, config.sft.steps, config.opd.learning_rate) == (Path(name).stem, 0, 3e-4)
    assert ("logs" in nodes) == (name == "my-logs.yaml") and config.prompts.too_long == "skip"
    if config.assisted is not None:
        assert config.assisted.prompts == config.prompts.train == config.opd.steps * config.opd.sequences_per_step


def test_the_weekly_refresh_starts_from_a_public_drafter_or_a_new_one(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "weekly.yaml")
    assert (config.sft.init_from, config.sft.steps) == ("z-lab/Qwen3-4B-DFlash-b16", 0)
    assert config.sft.drafter == SftConfig().drafter, "the checkpoint decides"
    text = (CONFIGS / "weekly.yaml").read_text("utf-8")
    path = tmp_path / "weekly.yaml"
    begins, instead = [line for line in text.splitlines(keepends=True) if re.match(r"(# )?sft:", line)]
    path.write_text(text.replace(begins + instead, instead.removeprefix("# ")))
    new = load_config(path)
    assert new.sft.init_from is None and new.sft.steps > 0
    assert new.sft.drafter == SftConfig().drafter


def test_the_quickstart_decodes_for_minutes_and_has_prompts_for_three_looks() -> None:
    """Tokens of all arms, without a drafter and with three, at 26 to 86 a second on one core."""
    config = load_config(CONFIGS / "quickstart.yaml")
    evaluation = config.evaluation
    assert 4 * evaluation.rounds * evaluation.speed_prompts * evaluation.sampling.max_new_tokens <= 3500
    assert evaluation.sampling.max_new_tokens >= 48, "a prompt's prefill is a small part"
    assert config.prompts.prompt_count("heldout") >= MOST_LOOKS * evaluation.speed_prompts


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_has_the_papers_settings(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    size = "8B" if "8b" in name else "4B"
    assert (config.target.source, config.sft.init_from) == (f"Qwen/Qwen3-{size}", f"z-lab/Qwen3-{size}-DFlash-b16")
    assert config.rollout is not None and config.assisted is not None and config.opd is not None
    assert config.prompts.chat_template_kwargs == {"enable_thinking": "thinking" in name}
    counts = {source.label: source.counts.train for source in config.prompts.sources if source.counts}  # type: ignore[union-attr]
    trained_on = {label: count for label, count in counts.items() if count}
    assert trained_on == {"olympiad": 4000, "code": 5000, "math": 5000, "gsm8k": 2000}
    assert config.prompts.prompt_count("train") == config.assisted.prompts == 16_000
    assert (config.prompts.max_prompt_tokens, config.assisted.sampling.max_new_tokens) == (512, 4096)
    assert config.assisted.sampling.temperature == 0
    assert config.assisted.drafting.block_size == 8
    opd = config.opd
    assert (opd.learning_rate, opd.warmup_fraction, opd.sequences_per_step, opd.anchors) == (3e-4, 0.05, 208, "visited")
    assert (opd.steps, opd.remine_every, opd.loss.pooled) == (8 * 16_000 // 208, 1, True)
    assert (opd.loss.response.loss, opd.loss.rejected.loss) == ("bernoulli_kl", "k3")
    assert (opd.loss.response.weight, opd.loss.rejected.weight) == (1, 1)
    assert (opd.loss.rejected.positions.kind, opd.loss.rejected.positions.delta) == ("power", 0.8)
    for engine in (config.rollout.engine, config.assisted.engine, config.heldout.engine, config.evaluation.engine):
        assert isinstance(engine, SGLangEngineConfig) and engine.launch is not None
        assert (engine.launch.servers, engine.launch.tensor_parallel) == (8, 1)
    assert config.opd.parallel.world == config.sft.parallel.world == 8
    assert config.stages.shards == 8
    assert opd.sequences_per_step % 8 == config.sft.sequences_per_step % 8 == 0, "an idle GPU"
    assert config.evaluation.concurrency == (1, 4, 16)
    assert config.evaluation.temperatures == (0, 1)


def test_the_recipe_fits_one_gpu_with_its_four_overrides() -> None:
    sections = ("rollout", "assisted", "heldout", "evaluation")
    config = load_config(
        CONFIGS / "qwen3-4b-dflash.yaml", [f"{section}.engine.launch.servers=1" for section in sections]
    )
    full = load_config(CONFIGS / "qwen3-4b-dflash.yaml")
    for section in sections:
        assert getattr(config, section).engine.launch.servers == 1
        same = getattr(config, section).key_material() == getattr(full, section).key_material()
        assert same is (section != "evaluation")  # other servers give the same answers, but another speed


_INSTEAD = re.findall(
    r"(?:^#   (?!draftsmith).+\n)+", (CONFIGS / "qwen3-8b-line.yaml").read_text("utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("lines", _INSTEAD, ids=["prompts", "logs", "servers"])
def test_the_line_of_a_node_takes_other_prompts_logs_and_servers(lines: str, tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text("extends: configs/qwen3-8b-line.yaml\n" + lines.replace("#   ", ""))
    line, config = load_config(CONFIGS / "qwen3-8b-line.yaml"), load_config(path)
    assert (
        line.registry is not None
        and line.opd is not None
        and line.opd.steps == 16_000 // line.opd.sequences_per_step + 1
    )
    assert topological_order(refresh_nodes(config))
    assert (config.logs is not None) == ("logs:" in lines)
    assert (config.prompts == line.prompts) == ("prompts:" not in lines)
    launched = [engine.launch for engine in (config.heldout.engine,) if isinstance(engine, SGLangEngineConfig)]
    assert (launched == [None]) == ("urls:" in lines)


@pytest.mark.parametrize(
    ("field", "told"),
    [("since: soon", "logs.since: 'soon'"), ("temperature: hot", "logs.temperature: expected a number")],
)
def test_an_error_names_the_field_that_was_written(field: str, told: str, tmp_path: Path) -> None:
    """Other sections take the settings of section logs."""
    path = tmp_path / "logs.yaml"
    path.write_text("name: a\ntarget: {source: b}\nlogs: {temperature: 0, paths: c.jsonl}\n")
    name, _, value = field.partition(": ")
    with pytest.raises(DraftsmithError) as caught:
        load_config(path, [f"logs.{name}={value}"])
    assert told in str(caught.value) and len(re.findall(r"[\w.]+: (?:expected|')", str(caught.value))) == 1


def test_the_section_heldout_has_its_splits_by_default() -> None:
    config = load_config(CONFIGS / "model.yaml", ["heldout={sampling: {max_new_tokens: 8}}"])
    assert config.heldout.splits == RefreshConfig.model_fields["heldout"].default.splits
