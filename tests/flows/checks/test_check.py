"""`draftsmith check` finds what a run would stop at, and one failure hides no other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.flows.cli.main import main
from tests.flows.processes import ROOT
from tests.stages.data.logs.logs_run import as_ids
from tests.stages.data.row_files import write
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.refresh import small_refresh

QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False, "use_sliding_window": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "eos_token_id": 1,
}  # fmt: skip
QWEN3_4B_DRAFTER = {
    **QWEN3_4B, "architectures": ["DFlashDraftModel"], "num_hidden_layers": 5, "num_target_layers": 36,
    "block_size": 16, "tie_word_embeddings": False,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
}  # fmt: skip
WIDER = {"hidden_size": 4096, "intermediate_size": 12288}  # of Qwen3-8B and its drafter
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def config(tiny_target: Path, tiny_prompts: Path) -> dict[str, Any]:
    """A refresh of the tiny target."""
    return small_refresh("tiny", tiny_target, tiny_prompts, 32, prompts={"max_prompt_tokens": 64})


Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:  # noqa: ARG001
    """A function that checks a config or its file, and returns the exit code and what is printed, errors last."""

    def checked(config: dict[str, Any] | str, *changes: str) -> tuple[int, str]:
        path = config if isinstance(config, str) else str(tmp_path / "run.yaml")
        if not isinstance(config, str):
            Path(path).write_text(yaml.safe_dump(config))
        code = main(["check", path, *(word for change in changes for word in ("--set", change))])
        return code, "".join(capsys.readouterr())

    return checked


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def levels(out: str) -> dict[str, list[str]]:
    """Return the levels of the printed lines by check."""
    levels_by_check: dict[str, list[str]] = {}
    for line in out.splitlines():
        if shown := re.match(r"(ok|warning|not checked|error) +(\S.*?)  ", line):
            levels_by_check.setdefault(shown[2], []).append(shown[1])
    return levels_by_check


def test_a_good_config_passes_and_nothing_is_left(home: Path, check: Check, config: dict[str, Any]) -> None:
    code, out = check(config)
    assert code == 0 and {level for each in levels(out).values() for level in each} == {"ok"}
    assert out.splitlines()[-1] == "0 errors, 0 warnings, 0 not checked"
    assert "DFlash, 1 layer on target layers" in out
    for name in ("home", "graph", "prompts.sources.0", "target", "sft: drafter", "sft: needs", "disk", "time"):
        assert name in levels(out)
    assert not home.exists()


def test_logs_are_checked_beside_prompts_of_a_limited_length(
    check: Check, tmp_path: Path, tiny_prompts: Path, config: dict[str, Any]
) -> None:
    """Their sampling has no limit of new tokens."""
    answers = [row | {"completion": "once upon a time ."} for row in read_rows(tiny_prompts)]
    del config["rollout"], config["assisted"]
    config["logs"] = {"paths": [str(write(tmp_path / "answers.jsonl", answers))], "temperature": 0, "scored": 0}
    code, out = check(config)
    assert code == 0 and "logs" in levels(out)


def test_logs_of_another_model_are_an_error_before_anything_runs(
    check: Check, tmp_path: Path, tiny_drafter: DrafterArtifacts, config: dict[str, Any]
) -> None:
    stored = read_table(tiny_drafter.rollout / "trajectories.parquet", TRAJECTORIES).to_pylist()
    own = [as_ids(row) for row in stored[:40]]
    others = [row | {"completion_token_ids": own[i - 1]["completion_token_ids"]} for i, row in enumerate(own)]
    del config["rollout"], config["assisted"]
    path = tmp_path / "answers.jsonl"
    config["logs"] = {"paths": [str(path)], "temperature": 0}
    write(path, own)
    code, out = check(config)
    assert code == 0 and re.search(r"ok +logs +\d+ answers that were tested are this target's", out)
    write(path, others)
    code, out = check(config)
    assert code == 2 and "over logs.max_foreign_share 0.05. They look like" in out


def test_one_run_reports_the_failures_of_all_checks(check: Check, tmp_path: Path, config: dict[str, Any]) -> None:
    config["prompts"]["sources"][0]["path"] = str(tmp_path / "gone.jsonl")
    config["sft"]["drafter"] |= {"target_layer_ids": [0, 99]}
    config["assisted"]["skip"] = 100
    config["rollout"]["engine"] = {"kind": "sglang", "python": str(tmp_path / "no-python"), "launch": {}}
    config["heldout"]["sampling"] = {"max_new_tokens": 10**6}
    config["stages"]["min_free_gb"] = 1e9
    code, out = check(config)
    for text in (
        "stages.min_free_gb is 1e+09",
        "gone.jsonl is not an existing file",
        "target_layer_ids [0, 99] do not fit layers 0 … 3 of the target. Name layers of it, or choose a drafter",
        "16 prompts, 100 are skipped",
        "no-python does not exist",
        "sampling.max_new_tokens: 1000000 does not fit into the target's",
    ):
        assert text in out, out
    assert code == 2 and levels(out)["target"] == ["ok"]
    assert out.count("gone.jsonl") == 1, "an error that several checks meet is reported once"
    assert re.search(r"^\d+ errors, .*\n.*checks failed.*$", out, re.MULTILINE), "one line of standard error"


def test_layers_that_sglang_cannot_return_are_an_error_only_where_it_drafts(
    check: Check, tmp_path: Path, config: dict[str, Any], tiny_drafter: DrafterArtifacts
) -> None:
    config["sft"]["drafter"]["target_layer_ids"] = [0, 3]
    code, out = check(config)
    assert code == 0 and "works in the embedded engine only" in out
    drafts = "SGLang drafts with it in assisted."
    config["assisted"]["engine"] = {"kind": "sglang", "urls": ["http://127.0.0.1:9"]}
    code, out = check(config)
    assert code == 2 and f"{drafts} Change sft.drafter.target_layer_ids" in out
    start = Path(shutil.copytree(tiny_drafter.drafter / "drafter", tmp_path / "start"))
    shape = json.loads((start / "config.json").read_text())
    shape["dflash_config"]["target_layer_ids"] = [0, 1, 3]
    (start / "config.json").write_text(json.dumps(shape))
    code, out = check(config | {"sft": {"init_from": str(start)}})
    assert code == 2 and f"{drafts} Use another drafter" in out


def test_an_unsupported_target_is_one_error_and_the_other_checks_go_on(
    check: Check, tmp_path: Path, tiny_target: Path, config: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tiny_target, tmp_path / "neox"))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 900})
    )
    config["target"]["source"] = str(folder)
    code, out = check(config)
    assert code == 2 and "gpt_neox has no config field num_key_value_heads" in out
    assert levels(out)["graph"] == ["ok"]


def test_a_system_prompt_that_the_template_rejects_is_reported_as_such(
    check: Check, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Gemma's template rejects one: the config is at fault, and no row."""
    model = shutil.copytree(config["target"]["source"], tmp_path / "strict")
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    (model / "chat_template.jinja").write_text(refusing)
    config["target"]["source"] = str(model)
    config["prompts"]["system"] = "Be brief."
    code, out = check(config)
    assert code == 2 and "(no system). Remove prompts.system." in " ".join(out.split())


def test_settings_that_work_less_well_are_warnings(check: Check, config: dict[str, Any]) -> None:
    config["prompts"]["chat_template_kwargs"] = {"enable_thinking": False}
    config["evaluation"]["block_sizes"] = [4, 12]
    config["rollout"]["prompts"], config["assisted"]["prompts"] = 4, 2
    config["assisted"]["skip"] = 3
    config["heldout"]["sampling"] = {"max_new_tokens": 32, "temperature": 0.7}
    code, out = check(config)
    assert code == 0 and "it does not read enable_thinking" in out
    assert "answers that are sampled at 0.7" in out
    assert "[12] are larger than the trained 6" in out
    assert "5 of 16 prompts are answered" in out


def test_too_few_held_out_rows_are_an_error(check: Check, tmp_path: Path, config: dict[str, Any]) -> None:
    path = str(write(tmp_path / "rows.jsonl", [{"prompt": f"Question {i}?"} for i in range(40)]))
    config["prompts"]["sources"] = [{"kind": "jsonl", "path": path}]
    config["prompts"] |= {"heldout": 20, "train": 16}
    code, out = check(config)
    assert code == 2 and "of 40 rows are held out (heldout_share 0.1), and 22 " in out


README = (ROOT / "README.md").read_text("utf-8")
OWN_MODEL = README.partition("# my-model.yaml\n")[2].partition("```")[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (OWN_MODEL, r"prompts\.jsonl}.*# ([\d,]+) rows"),
        ("extends: configs/model.yaml\nname: own\n", r"path: prompts\.jsonl}].*# ([\d,]+) different prompts"),
    ],
)
def test_the_number_of_rows_in_a_configs_comment_is_enough(
    text: str,
    size: str,
    check: Check,
    tmp_path: Path,
    tiny_target: Path,
    tiny_drafter: DrafterArtifacts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comment = re.search(size, text + (ROOT / "configs" / "model.yaml").read_text("utf-8"))
    assert comment is not None
    rows = int(comment[1].replace(",", ""))
    monkeypatch.chdir(tmp_path)
    write(Path("prompts.jsonl"), [{"prompt": f"Question {i}?"} for i in range(rows)])
    Path("own.yaml").write_text(text)
    changes = [f"target={{source: {tiny_target}, dtype: float32}}", "prompts.max_prompt_tokens=64"]
    changes += [f"sft.init_from={tiny_drafter.drafter / 'drafter'}"]
    changes += [f"{each}.sampling.max_new_tokens=32" for each in ("rollout", "assisted", "heldout", "evaluation")]
    code, out = check("own.yaml", *changes)
    assert code == 0 and f"{rows} rows for 8576 prompts" in out


def hub_cache(folder: Path, tokenizer: Path) -> Path:
    """Make a hub cache with the small files of Qwen3-4B (its real sizes, another tokenizer) and of its drafter."""

    def snapshot(repository: str, config: dict[str, Any]) -> Path:
        root = folder / f"models--{repository.replace('/', '--')}"
        files = root / "snapshots" / REVISION
        files.mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(REVISION)
        (files / "config.json").write_text(json.dumps(config))
        return files

    for size, changes in ("4B", {}), ("8B", {**WIDER, "tie_word_embeddings": False}):
        target = snapshot(f"Qwen/Qwen3-{size}", QWEN3_4B | changes)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, target / name)
        snapshot(f"z-lab/Qwen3-{size}-DFlash-b16", QWEN3_4B_DRAFTER | changes)
    return folder


@pytest.mark.parametrize("recipe", ["qwen3-4b-dflash", "qwen3-8b-line"])
def test_a_recipe_is_checked_from_the_hubs_small_files(
    recipe: str, check: Check, tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache(tmp_path / "hub", tiny_target)))
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi: the same on every machine
    monkeypatch.chdir(ROOT)
    code, out = check(f"configs/{recipe}.yaml", "stages.min_free_gb=0.01")
    assert code == 2  # the only errors: no SGLang here, and perhaps a small disk
    errors = [line for line in out.splitlines() if line.startswith("error") and "Free some space" not in line]
    assert errors == [line for line in out.splitlines() if "has no sglang installed" in line] != []
    found = levels(out)
    assert {found[f"{node}: needs"][0] for node in ("assisted", "mining", "opd", "evaluation")} == {"ok"}
    assert found["target.revision"] == ["warning"] and REVISION in out
    assert found["prompts.sources.0"] == ["not checked"]
    if recipe == "qwen3-4b-dflash":
        assert "4,022M parameters, 36 layers, hidden 2560, vocabulary 151936, 40960 positions, bfloat16" in out
        assert "5 layers on target layers [1, 9, 17, 25, 33], blocks of 16, mask token 151669 (beyond" in out
        assert "each of 8 servers' GPUs" in out and "none is visible here" in out


def test_an_unreachable_hub_exits_with_the_code_for_a_retry(
    check: Check, tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config["sft"] = {"init_from": "someone/drafter"}
    code, out = check(config)
    assert code == 75 and levels(out)["sft: drafter"] == ["not checked"] and "sft: drafter" in out.splitlines()[-1]
    config["assisted"]["skip"] = 100
    assert check(config)[0] == 2, "a retry does not help an error"


def test_servers_that_do_not_answer_are_not_checked(
    check: Check, tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["assisted"]["engine"] = {"kind": "sglang", "urls": ["http://127.0.0.1:9"]}
    code, out = check(config)
    assert code == 0 and levels(out)["sglang (assisted)"] == ["not checked"]
    assert main(["run", str(tmp_path / "run.yaml"), "--plan"]) == 0
    assert "not checked: sglang (assisted): http://127.0.0.1:9" in capsys.readouterr().out
