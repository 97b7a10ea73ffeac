"""Secrets are detected and masked; control characters are escaped; text from others is cut and read in linear time."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.artifacts.redaction import (
    MAX_SHOWN,
    describe_secret,
    find_secrets,
    is_secret_name,
    printable,
    redact_logs,
    redacted,
    shown,
)
from draftsmith.stages.data.row_files import read_rows
from draftsmith.stages.data.row_formats import row_messages
from draftsmith.stages.data.time_window import parse_time
from draftsmith.stages.report.page import _visible_spaces

SECRET = "Zk9-marker.7Qx"
HOLDING = [
    f"http://anna:{SECRET}@host:80/x",
    f"https://{SECRET}@host/x",
    f"postgresql+psycopg://anna:a/b{SECRET}@host/mlflow",
    f"s3://{SECRET}:{SECRET}@bucket/answers.jsonl",
    f"https://host/x?token={SECRET}",
    f"https://host/x?a=1&api_key={SECRET}&b=2",
    f"https://host/x?X-Amz-Signature={SECRET}",
    f"https://host/x?sv=2&sig={SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"Authorization: Bearer {SECRET}1234",
    f"password={SECRET}",
    f'{{"api_key": "{SECRET}"}}',
    f"--api-key={SECRET}",
]
KNOWN = [
    "hf_" + "a1B2" * 8,
    "sk-proj-" + "a1B2" * 8,
    "ghp_" + "a1B2" * 9,
    "AKIA" + "A1B2" * 4,
    "https://hooks.slack.com/services/T0/B0/abc",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def",
]
PLAIN = [
    "Qwen/Qwen3-4B",
    "https://host:8080/models@v1/x",
    "https://host/x?page=2&sort=key",
    "smollm2@champion",
    "file:///data/a@b/rows.jsonl",
    "s3://bucket/answers/*.jsonl.zst",
    "a token is a word, a key opens doors, the bearer of bad news",
    "mask_token: <mask>",
    "tokens/s 24.5, accepted=3",
    "sft.steps=200",
    "key 3f9a1c, content 77ab",
]


@pytest.mark.parametrize(("text", "secret"), [*((text, SECRET) for text in HOLDING), *((text, text) for text in KNOWN)])
def test_a_secret_is_detected_and_masked(text: str, secret: str) -> None:
    masked = redacted(f"GET {text} failed")
    assert describe_secret(text) and secret not in masked and "GET " in masked and " failed" in masked


@pytest.mark.parametrize("text", PLAIN)
def test_text_without_a_secret_is_unchanged(text: str) -> None:
    assert describe_secret(text) is None
    assert redacted(text) == text


def test_names_of_secrets_are_recognized() -> None:
    secret = [
        "HF_TOKEN",
        "PREFECT_API_AUTH_STRING",
        "api-key",
        "apiKey",
        "ssl-keyfile-password",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
    ]
    secret += ["dbPassword", "client_secret", "credentials", "token", "GITHUB_TOKEN_2", "SSH_KEY"]
    plain = ["mask_token", "max_prompt_tokens", "kv-cache-dtype", "TOKENIZERS_PARALLELISM", "key", "api_key_env"]
    plain += ["speculative-token-map", "bucket-time-to-first-token", "keyword", "head_tokens", "monkey"]
    assert [name for name in secret if not is_secret_name(name)] == []
    assert [name for name in plain if is_secret_name(name)] == []


def test_secrets_in_a_config_are_reported_by_field_without_their_value() -> None:
    config = {
        "engine": {"urls": ["http://ok:1", f"http://u:{SECRET}@host"], "launch": {"environment": {"MY_TOKEN": SECRET}}},
        "hook": {"command": ["notify", f"--password={SECRET}"]},
        "pin": {"password": 1234, "mask_token": "<mask>", "retries": 3},
    }
    found = dict(find_secrets(config))
    assert set(found) == {"engine.urls.1", "engine.launch.environment.MY_TOKEN", "hook.command.1", "pin.password"}
    assert SECRET not in str(found)


def test_log_records_and_their_tracebacks_are_redacted() -> None:
    factory = logging.getLogRecordFactory()
    stream = io.StringIO()
    logger = logging.Logger("library")
    logger.addHandler(logging.StreamHandler(stream))
    try:
        redact_logs()
        try:
            raise ValueError(f"http://u:{SECRET}@host is away")
        except ValueError:
            logger.exception("asked\x1b[2J %s", f"http://host?token={SECRET}")
        logger.warning("%d", "does not fit")  # only the handler reports this
    finally:
        logging.setLogRecordFactory(factory)
    assert "asked\\x1b[2J http://host?token=***" in stream.getvalue() and "http://***@host is away" in stream.getvalue()
    assert SECRET not in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\n\twith lines", "plain text\n\twith lines"),
        ("naïve café 你好 🙂", "naïve café 你好 🙂"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\b", "over\\x0dwritten\\x08"),
        ("\u202eevil", "\\u202eevil"),
        ("\x9b1m", "\\x9b1m"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode("utf-8")


def test_a_long_text_keeps_its_beginning_and_its_end_without_half_a_secret() -> None:
    secret = KNOWN[0]
    text = f"a.jsonl, row 7: {'x' * 970} {secret} {'y' * 5000} {secret} {'z' * 970}: remove it"
    for part in (secret[:9], secret[-9:]):
        assert part in text[: MAX_SHOWN // 2] + text[-MAX_SHOWN // 2 :], "a cut goes through it"
        assert part not in shown(text)
    assert shown(text).startswith("a.jsonl, row 7: xxx") and shown(text).endswith("zzz: remove it")


@pytest.mark.parametrize("character", ["a", "\x1b", "\ud83d", "\U000e0001", "\n", "🙂"])
@pytest.mark.parametrize("length", [MAX_SHOWN - 1, MAX_SHOWN, MAX_SHOWN + 1, 10**6])
def test_nothing_shown_is_longer_than_the_limit(character: str, length: int) -> None:
    assert len(shown(character * length)) <= MAX_SHOWN


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    error = DraftsmithError("row 3: \ud83d \x1b[31mred\r over\u202e \r\n  \n remove it\n")
    assert str(error) == "row 3: \\ud83d \\x1b[31mred\\x0d over\\u202e remove it"
    assert one_line(ValueError("a\x1b\nb")) == "a\\x1b b"


def read_row(text: str, folder: Path) -> None:
    (folder / "a.jsonl").write_text(text, "utf-8")
    list(read_rows([str(folder / "a.jsonl")]))


def read_role(text: str, _folder: Path) -> None:
    with pytest.raises(DraftsmithError):
        row_messages({"messages": [{"role": text, "content": ""}]}, None, "row 1")


READERS: dict[str, Callable[[str, Path], object]] = {
    "redacted": lambda text, _: redacted(text),
    "describe_secret": lambda text, _: describe_secret(text),
    "is_secret_name": lambda text, _: is_secret_name(text),
    "printable": lambda text, _: printable(text),
    "shown": lambda text, _: shown(text),
    "DraftsmithError": lambda text, _: DraftsmithError(text),
    "one_line": lambda text, _: one_line(ValueError(text)),
    "parse_time": lambda text, _: parse_time(text),
    "visible_spaces": lambda text, _: _visible_spaces(text),
    "row": read_row,
    "role": read_role,
}
# Each repeats what one of the patterns may begin with, or go through before it fails.
UNITS = [
    "a.",
    "a-",
    "a",
    "Aa",
    "1",
    " ",
    "\n",
    "\t",
    " \r",
    "\x1b",
    "é",
    "://",
    "a://",
    "mysql",
    "mysql://-",
    "+mysql+",
]
UNITS += [
    "?a",
    "?a=",
    "secret",
    "secret=",
    "secret ",
    "-token",
    "api_key:",
    "basic ",
    "bearer-",
    "eyJ-",
    "eyJaaaaaaaaaa.",
]
UNITS += ["-----BEGIN ", "PRIVATE KEY", "hf_", "sk-", "xoxb-", "a,", ",", "[", "\\", "'", "2026-"]


@pytest.mark.parametrize("reader", READERS)
def test_four_times_the_text_takes_at_most_six_times_as_long(reader: str, tmp_path: Path) -> None:
    """A quadratic pattern takes sixteen times as long."""

    def seconds(text: str) -> float:
        began = time.process_time()
        READERS[reader](text, tmp_path)
        return time.process_time() - began

    for unit in UNITS:
        for begin, end in (("", ""), ("x", "x"), ("secret", "x")):
            short, long = (begin + unit * (length // len(unit)) + end for length in (4_000, 16_000))
            once = four = float("inf")
            for _ in range(5):
                once, four = min(once, seconds(short)), min(four, seconds(long))
                if four <= 6 * once + 1e-3:  # what is constant for short texts
                    break
            else:
                pytest.fail(f"{unit!r}: {once:.6f} s, and {four:.6f} s for four times the length")
