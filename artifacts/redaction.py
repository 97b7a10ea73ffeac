"""Secrets: what looks like one, and texts without them.

A config is written to manifests, to MLflow, to Prefect's database and to the report, so a secret in it is refused by
what its name or its value looks like; and whatever is shown, logged or kept as text passes through `redacted`. Both
stand here alone. Secrets come from the environment, which stage processes and servers inherit. What others wrote, such
as a model, is shown by `printable`.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
_SHORTEST_VALUE = 8  # of a variable of the environment that is masked wherever it turns up

_SECRET_WORDS = {
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "SECRET",
    "SECRETS",
    "CREDENTIAL",
    "CREDENTIALS",
    "APIKEY",
    "BEARER",
}
_TOKENS_OF_TEXT = {  # … token: one of a text
    "MASK",
    "EOS",
    "BOS",
    "PAD",
    "UNK",
    "SEP",
    "CLS",
    "STOP",
    "START",
    "END",
    "SPECIAL",
    "IMAGE",
    "FIRST",
    "PER",
}
_SIGNATURES = {"SIG", "SIGNATURE", "AUTH", "KEY", "AUTHORIZATION"}  # parameters of an address

_AUTHORITY = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/?#\s'\"<>]+@", re.IGNORECASE)
_DATABASE = re.compile(r"(\b(?:postgres|mysql|mariadb|mssql|oracle)[a-z0-9+]*://)[^\s'\"]+@", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&#;])([\w.~%-]+)=([^&#;\s'\"<>]+)")
_ASSIGNED = re.compile(
    r"(?i)\b([\w-]*(?:api[_-]?key|password|passwd|passphrase|secret|access[_-]?key|(?:auth|access|bearer|hf)[_-]?token)"
    r"['\"]?\s*[=:]\s*['\"]?)(?!\*\*\*|None\b|null\b|true\b|false\b)([^\s'\",;&}\])]{4,})"
)
_HEADER = re.compile(r"(?i)\b(bearer|basic)\s+(?=[\w~+/.-]*[\d+/=_-])[\w~+/.=-]{12,}")
_KNOWN = {
    "Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "OpenAI": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "GitLab": re.compile(r"\bglpat-[\w-]{20,}"),
    "AWS": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "Google": re.compile(r"\bAIza[\w-]{35}"),
    "Slack": re.compile(r"\bxox[abprs]-[\w-]{10,}|hooks\.slack\.com/services/\S+"),
    "JSON web tokens": re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"),
    "private keys": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"),
}

_PRINTABLE_ASCII = re.compile(r"[\t\n\x20-\x7e]*")
_ESCAPED_CATEGORIES = {
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
}  # control, direction and joining marks, halves of surrogate pairs


def is_secret_name(name: str) -> bool:
    """Whether a field, option or variable is called as secrets are: `HF_TOKEN`, `api-key`, `dbPassword`."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).upper()
    parts = [part for word in re.split(r"[^A-Z0-9]+", words) if (part := word.rstrip("0123456789"))]
    if not parts or parts == ["KEY"] or parts[-1] == "ENV":  # a field that names a variable of the environment
        return False
    if _SECRET_WORDS & set(parts) or re.search(r"(API|ACCESS|SECRET|PRIVATE)_?KEY", "_".join(parts)):
        return True
    if parts[-1] == "TOKEN":
        return len(parts) == 1 or parts[-2] not in _TOKENS_OF_TEXT
    return parts[-1] == "KEY"


def describe_secret(text: str) -> str | None:
    """What in a text is a secret by its looks, in words; None if nothing is."""
    if _AUTHORITY.search(text) or _DATABASE.search(text):
        return "an address with a user or password in it"
    for _, name, _ in _PARAMETER.findall(text):
        if _is_secret_parameter(name):
            return f"an address with the parameter {name}"
    for whose, pattern in _KNOWN.items():
        if pattern.search(text):
            return f"a text that looks like a secret of the kind {whose}"
    return "a credential" if _ASSIGNED.search(text) or _HEADER.search(text) else None


def find_secrets(config: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(field, why) of everything in a nested config that looks like a secret. Values are not told."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            field = f"{place}.{name}" if place else str(name)
            if is_secret_name(str(name)) and value and isinstance(value, str | int) and not isinstance(value, bool):
                yield redacted(field), "its name looks like that of a secret"
            elif (why := describe_secret(str(name))) is not None:
                yield redacted(field), f"its name holds {why}"
            else:
                yield from find_secrets(value, field)
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            yield from find_secrets(value, f"{place}.{index}")
    elif isinstance(config, str) and (why := describe_secret(config)) is not None:
        yield place, f"it holds {why}"


def redacted(text: str) -> str:
    """The text with `***` for every secret: of addresses, headers, known kinds, and of the environment by name."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    for pattern in _KNOWN.values():
        text = pattern.sub(MASK, text)
    text = _DATABASE.sub(rf"\1{MASK}@", _AUTHORITY.sub(rf"\1{MASK}@", text))
    text = _PARAMETER.sub(_mask_parameter, text)
    return _HEADER.sub(rf"\1 {MASK}", _ASSIGNED.sub(rf"\1{MASK}", text))


def redact_logs() -> None:
    """Let every log record of this process be made without secrets, tracebacks and those of libraries included."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def made(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        try:
            record.msg, record.args = redacted(record.getMessage()), None
        except Exception:  # a record that its own arguments do not fit: its handler says so
            return record
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = redacted("".join(traceback.format_exception(record.exc_info[1]))).rstrip()
        return record

    made.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)


def _is_secret_parameter(name: str) -> bool:
    words = name.upper().replace("-", "_").split("_")
    return is_secret_name(name) or words[-1] in _SIGNATURES


def _mask_parameter(found: re.Match[str]) -> str:
    before, name, _ = found.groups()
    return f"{before}{name}={MASK}" if _is_secret_parameter(name) else found.group()


def _environment_secrets() -> list[str]:
    """Values of variables that are called as secrets are, longest first: one may hold another."""
    found = {v for k, v in os.environ.items() if len(v) >= _SHORTEST_VALUE and is_secret_name(k)}
    return sorted(found, key=len, reverse=True)


def printable(text: str) -> str:
    """The text with control characters and invisible marks written out (`\\x1b`, `\\u202e`); tab and newline stay.

    A terminal acts on control characters (colours, its title, the clipboard); marks of direction reorder what is read.
    """
    if _PRINTABLE_ASCII.fullmatch(text):
        return text
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character in "\t\n" or unicodedata.category(character) not in _ESCAPED_CATEGORIES:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
