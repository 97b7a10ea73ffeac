"""The graph and the config of a refresh."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.planning.external_files import external_digests
from draftsmith.flows.planning.graph import topological_order
from draftsmith.flows.refresh.champion import restarted
from draftsmith.flows.refresh.config import RefreshConfig, control_config, prompts_since
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.stages.drafters.champion import ChampionConfig
from draftsmith.stages.report.stage import ReportConfig
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.config import OpdConfig
from tests.flows.processes import ROOT
from tests.testbed.refresh import load_config

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture
def config() -> RefreshConfig:
    """A refresh without a line."""
    return load_config(QUICKSTART, ["registry=null"])


def of_line(*overrides: str, champion: bool) -> RefreshConfig:
    """Return the resolved config of a refresh of a line."""
    config = load_config(QUICKSTART, overrides)
    assert config.registry is not None
    serves = ChampionConfig(
        line=config.registry.name, version=3, folder="/store/opd", content_id="c" * 64, drafter_digest="d" * 64
    )
    registry = config.registry.model_copy(update={"champion": serves if champion else None})
    return config.model_copy(update={"registry": registry})


def test_a_refresh_of_a_line_starts_from_its_champion_and_has_a_gate() -> None:
    nodes = {node.name: node for node in topological_order(refresh_nodes(of_line(champion=True)))}
    assert list(nodes) == [
        *("target", "prompts", "heldout", "champion", "drift", "rollout", "sft", "assisted", "mining", "opd"),
        *("control", "evaluation", "gate", "report"),
    ]
    assert nodes["sft"].inputs["drafter"] == "champion"
    assert nodes["evaluation"].inputs["champion"] == "champion"
    assert nodes["drift"].config.model_dump()["drafting"]["head_tokens"] == 4096, "it drafts as in an evaluation"
    first = {node.name: node for node in refresh_nodes(of_line(champion=False))}
    assert not {"champion", "drift"} & first.keys() and "drafter" not in first["sft"].inputs
    assert set(first["gate"].inputs) == {"evaluation", "sft", "opd", "control"}
    assert nodes["report"].inputs["drift"] == "drift" and "drift" not in first["report"].inputs


@pytest.mark.parametrize("champion", [False, True])
def test_a_refresh_may_have_a_report_without_texts(champion: bool) -> None:
    (report,) = (
        node for node in refresh_nodes(of_line("report.contexts=false", champion=champion)) if node.name == "report"
    )
    assert isinstance(report.config, ReportConfig)
    assert (report.config.contexts, report.config.line) == (False, "quickstart")


def test_the_champions_cache_key_depends_on_its_content_alone() -> None:
    here, there = (
        of_line(champion=True).champion,
        of_line(champion=True).champion.model_copy(  # type: ignore[union-attr]
            update={"folder": "/elsewhere", "version": 9, "line": "other", "promoted_at": "2026-01-01T00:00:00+00:00"}
        ),
    )
    assert here is not None and here.key_material() == there.key_material()
    assert here.model_copy(update={"content_id": "e" * 64}).key_material() != here.key_material()


def test_a_line_starts_from_a_checkpoint_and_continues_its_champion(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    start = f"sft.init_from={tmp_path / 'mine'}"
    for champion in (False, True):
        config = of_line(start, champion=champion)
        nodes = {node.name: node for node in refresh_nodes(restarted(config) if champion else config)}
        assert "drafter" not in nodes["sft"].inputs
        assert nodes["sft"].config.model_dump()["init_from"] == str(tmp_path / "mine")
        assert nodes["evaluation"].inputs.get("champion") == ("champion" if champion else None), (
            "it must still be beaten"
        )
    (sft,) = [node for node in refresh_nodes(of_line(start, champion=True)) if node.name == "sft"]
    assert sft.inputs["drafter"] == "champion" and sft.config.model_dump()["init_from"] is None
    with pytest.raises(DraftsmithError, match=r"registry\.restart: applies to one command\. .* option --restart"):
        of_line("registry.restart=true", champion=True)


def test_init_from_champion_starts_from_the_champion_if_there_is_one() -> None:
    for champion, start in ((True, {"drafter"}), (False, set())):
        config = of_line("sft.init_from=champion", champion=champion)
        (sft,) = [node for node in refresh_nodes(config) if node.name == "sft"]
        assert set(sft.inputs) - {"target", "trajectories"} == start
        assert sft.config.model_dump()["init_from"] is None
    untrained = of_line("sft.init_from=champion", "sft.steps=0", champion=True)
    (sft,) = [node for node in refresh_nodes(untrained) if node.name == "sft"]
    assert type(sft.config).model_validate(sft.config.model_dump()) == sft.config


def test_a_native_head_continues_only_a_native_head() -> None:
    """A champion that is a head leaves SFT of another kind to its own start. With no steps the target's own is read."""
    trained, head = of_line(champion=True), of_line("sft.drafter={kind: mtp}", "sft.steps=0", "opd=null", champion=True)
    serves = trained.champion
    assert trained.registry is not None and serves is not None
    native = serves.model_copy(update={"kind": "mtp"})
    registry = trained.registry.model_copy(update={"champion": native})
    for config in (trained.model_copy(update={"registry": registry}), head):
        nodes = {node.name: node for node in refresh_nodes(config)}
        assert "drafter" not in nodes["sft"].inputs and nodes["sft"].config == config.sft
        assert all(nodes[name].inputs["champion"] == "champion" for name in ("drift", "evaluation", "gate"))
    assert native.key_material() == serves.key_material()
    trained_head = of_line("sft.drafter={kind: mtp}", champion=True).model_copy(update={"registry": registry})
    (sft,) = [node for node in refresh_nodes(trained_head) if node.name == "sft"]
    assert sft.inputs["drafter"] == "champion"


@pytest.mark.parametrize(
    ("opd", "table"),
    [
        ({"anchors": "visited"}, "full"),
        ({"anchors": "errors", "loss": "paper"}, "scored"),
        ({"loss": "paper"}, "sample"),  # scored on the blocks that a step drafts
        ({}, "sample"),
    ],
)
def test_mining_writes_the_table_that_opd_reads(opd: dict[str, str], table: str, config: RefreshConfig) -> None:
    changed = config.model_copy(update={"opd": OpdConfig.model_validate(opd)})
    (mining,) = [node for node in refresh_nodes(changed) if node.name == "mining"]
    assert mining.config.table == table  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("anchors", "overrides", "waits"),
    [
        ("errors", [], True),
        ("visited", [], True),
        ("successors", [], False),
        ("random", [], False),
        ("successors", ["mining.drafting.block_size=4"], True),
    ],
)
def test_opd_waits_for_mining_only_where_it_reads_the_table(anchors: str, overrides: list[str], waits: bool) -> None:
    config = load_config(QUICKSTART, ["opd.remine_every=0", f"opd.anchors={anchors}", *overrides])
    nodes = {node.name: node for node in topological_order(refresh_nodes(config))}
    assert ("mined" in nodes["opd"].inputs) == waits
    assert (list(nodes).index("mining") < list(nodes).index("opd")) == waits
    assert "mining" in nodes["report"].inputs, "it is made all the same, and its parity gate ends the run"


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        ([], ["assisted", "control", "mining", "opd"]),
        (["assisted=null"], ["assisted", "control", "mining", "opd"]),
        (["refresh.control=false"], ["assisted", "mining", "opd"]),
        (["logs={paths: [a.jsonl], temperature: 0}"], ["control", "mining", "opd"]),
    ],
    ids=["with all sections", "without assisted", "without a control", "from logs"],
)
def test_without_opd_a_refresh_is_sft_alone(overrides: list[str], left_out: list[str]) -> None:
    config = load_config(QUICKSTART, [*overrides, "opd=null"])
    nodes = {node.name: node for node in topological_order(refresh_nodes(config))}
    with_opd = load_config(QUICKSTART, [each for each in overrides if each != "assisted=null"])
    whole = {node.name: node for node in refresh_nodes(with_opd)}
    assert sorted(whole.keys() - nodes.keys()) == sorted(config.skipped) == left_out and not with_opd.skipped
    assert nodes["sft"] == whole["sft"], "under the same key"
    for name in ("evaluation", "gate", "report"):
        assert nodes[name].inputs == {n: source for n, source in whole[name].inputs.items() if source not in left_out}


def test_logged_answers_replace_both_rollouts(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    text = (ROOT / "configs" / "quickstart.yaml").read_text()
    path = tmp_path / "logs.yaml"
    logs = f"logs: {{paths: {log}, temperature: 0}}\n"
    without = {key: value for key, value in yaml.safe_load(text).items() if key not in ("rollout", "assisted")}
    for config_text in (text + logs, yaml.safe_dump(without) + logs):
        path.write_text(config_text)
        nodes = {node.name: node for node in topological_order(refresh_nodes(load_config(path)))}
        assert not {"rollout", "assisted"} & set(nodes)
        assert {name for name, node in nodes.items() if "logs" in node.inputs.values()} == {
            *("sft", "mining", "opd", "control"),
        }
        assert nodes["evaluation"].inputs["trajectories"] == "heldout"
    path.write_text(text + logs)
    more = {n.name: n for n in refresh_nodes(load_config(path, ["seed=5"]))}
    seeds = [more[name].seed for name in ("sft", "opd", "control")]
    assert seeds == [None, 1005, 1005], "a later training on the same answers has other batches"
    key = external_digests(nodes["logs"].config)
    log.write_text("{}\n{}\n")
    assert external_digests(nodes["logs"].config) != key
    path.write_text(yaml.safe_dump(without))
    with pytest.raises(DraftsmithError, match="rollout is required"):
        load_config(path)


BOTH = "heldout.splits=[validation, heldout]"
SERVERS = ["evaluation.engine={kind: sglang, python: python, launch: {}}", "evaluation.head_tokens=null"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["heldout.splits=[heldout]"], r"heldout\.splits: lacks validation"),
        ([BOTH, "heldout.skip=54"], "heldout: skip and prompts leave out all of split heldout"),
        (["assisted.answers=a.jsonl"], r"assisted\.answers"),  # they have no verify steps to mine
        (["assisted=null"], r"assisted is required\. Add this section"),
        (["opd=null", "sft.steps=0", "sft.init_from=champion"], r"opd: without it, sft\.steps: 0 trains nothing\. Set"),
        (
            ["gate.loads={1: 1, 4: 1, 64: 1}", "evaluation.concurrency=[16, 2]", *SERVERS],
            r"gate\.loads: servers are timed with \[2, 16\] .*, and \[1, 64\] is out of range\. Add it to eval",
        ),
        (
            ["stages.time_limits.stf=5"],
            r"stages\.time_limits\.stf: no such node. Use one of: assisted, champion",
        ),
        (["registry.champion=null"], r"quickstart\.yaml: registry.champion is filled in by the run"),
        (["report.line=mine"], r"quickstart\.yaml: report.line is filled in by the run"),
        (["prompts.of_logs=true"], r"quickstart\.yaml: prompts.of_logs is filled in by the run"),
        (
            ["logs={paths: [a.jsonl], temperature: 0, since: last, after: 2026-03-01}"],
            r"quickstart\.yaml: logs.after is filled in by the run",
        ),
    ],
)
def test_what_could_only_fail_after_hours_is_refused_at_once(overrides: list[str], message: str) -> None:
    with pytest.raises(DraftsmithError, match=message):
        load_config(QUICKSTART, overrides)


@pytest.mark.parametrize(
    ("overrides", "seed"),
    [
        ([], None),
        (["assisted.skip=0"], 1005),
        (["assisted.skip=0", "sft.steps=0", "sft.init_from=x"], None),
    ],
    ids=["other prompts", "the prompts of SFT", "the prompts of an SFT without steps"],
)
def test_trainings_on_the_prompts_of_sft_have_their_own_seed(overrides: list[str], seed: int | None) -> None:
    """With SFT's seed the control would repeat the steps of SFT, block by block."""
    nodes = {node.name: node for node in refresh_nodes(load_config(QUICKSTART, ["seed=5", *overrides]))}
    assert [nodes[name].seed for name in ("sft", "opd", "control")] == [None, seed, seed]


def test_the_control_is_sft_for_the_steps_of_opd(config: RefreshConfig) -> None:
    assert config.opd is not None
    control = control_config(config, config.opd)
    assert control.steps == config.opd.steps != config.sft.steps
    assert control.sequences_per_step == config.opd.sequences_per_step
    assert control.anchors_per_sequence == config.opd.anchors_per_sequence
    assert control.learning_rate == config.opd.learning_rate != config.sft.learning_rate
    assert control.warmup_fraction == config.opd.warmup_fraction
    assert (control.gamma, control.drafter) == (config.sft.gamma, config.sft.drafter)


def test_a_part_of_the_held_out_split_is_enough() -> None:
    """The splits are, in this order, 54 held-out, 12 validation and 144 training prompts."""
    for override in ("heldout.prompts=1", "heldout.skip=53"):
        load_config(QUICKSTART, [BOTH, override])


def test_loads_between_the_numbers_that_servers_are_timed_at_are_judged() -> None:
    config = load_config(QUICKSTART, ["gate.loads={2: 1, 4: 1}", "evaluation.concurrency=[16, 2]", *SERVERS])
    assert config.gate.loads == {2: 1, 4: 1}


def test_a_time_limit_is_one_of_its_node() -> None:
    limits = load_config(QUICKSTART, ["stages.time_limits.control=5"]).stages
    assert limits.time_limit_s("control") == 300
    assert limits.time_limit_s("sft") == 24 * 3600


def test_held_out_prompts_come_from_the_logs_by_default(tmp_path: Path) -> None:
    """They are sampled as the logged answers, and no rollouts are needed."""
    log = tmp_path / "answers.jsonl"
    log.write_text("{}\n")
    path = tmp_path / "weekly.yaml"
    path.write_text(
        f"name: weekly\nregistry: {{name: my-line}}\ntarget: {{source: {tmp_path}}}\n"
        f"logs: {{paths: {log}, temperature: 0.7}}\n"
    )
    config = load_config(path)
    (source,) = config.prompts.sources
    assert source.model_dump()["path"] == str(log)
    assert config.prompts.prompt_count("train") == 0 and config.prompts.prompt_count("heldout") > 0
    assert config.heldout.sampling.temperature == config.evaluation.sampling.temperature == 0.7
    assert [node.name for node in topological_order(refresh_nodes(config))] == [
        *("target", "prompts", "heldout", "logs", "sft", "opd", "mining", "control", "evaluation", "gate", "report"),
    ]
    text = path.read_text()
    more = "since: 2026-03-01, max_bad_share: 0.2, filter: {model: ours}, fields: {messages: question}"
    path.write_text(text.replace("temperature: 0.7", f"temperature: 0.7, {more}"))
    prompts = load_config(path).prompts
    (source,) = prompts.sources
    fields = source.model_dump()
    assert (fields["since"], fields["filter"]) == ("2026-03-01T00:00:00Z", {"model": "ours"})
    assert (fields["fields"], prompts.max_bad_share) == ({"messages": "question"}, 0.2)
    path.write_text(text.replace("temperature: 0.7", "temperature: 0.7, since: last"))
    (source,) = prompts_since(load_config(path).prompts, "2026-03-05T00:00:00Z").sources
    assert source.model_dump()["since"] == "2026-03-05T00:00:00Z"
    path.write_text(text + "prompts: {heldout_by: conversation, heldout: 300}\n")
    some = load_config(path).prompts
    assert (some.heldout_by, some.prompt_count("heldout"), some.prompt_count("validation"), some.of_logs) == (
        *("conversation", 300, prompts.prompt_count("validation"), True),
    )
    path.write_text(text.replace("temperature: 0.7", "temperature: 0.7, top_p: 0.9, top_k: 20"))
    longer = load_config(path, [f"{section}.sampling.max_new_tokens=4096" for section in ("heldout", "evaluation")])
    for sampling in (longer.heldout.sampling, longer.evaluation.sampling):
        assert (sampling.max_new_tokens, sampling.params()) == (4096, SamplingParams(0.7, 0.9, 20))
    greedy = load_config(path, ["evaluation.sampling.temperature=0"]).evaluation.sampling
    assert (greedy.temperature, greedy.top_p, greedy.params()) == (0, 0.9, GREEDY)
    with pytest.raises(DraftsmithError, match=r"logs\.top_k: .*is greedy decoding"):
        load_config(path, ["logs.top_k=1"])


def test_what_a_run_fills_in_is_sent_to_a_stage_or_a_worker() -> None:
    sent = of_line(champion=True)
    assert RefreshConfig.model_validate(sent.model_dump(mode="json")) == sent
