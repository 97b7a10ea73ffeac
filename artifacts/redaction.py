"""Detection and masking of secrets, and escaping of control characters.

A config is written to manifests, MLflow, Prefect's database and the report, so one that holds anything like a secret is
refused (`find_secrets`). Secrets belong in the environment, which stage processes and servers inherit.

Messages of errors and logs quote text from others, such as a row of a log. They pass through `shown`, which cuts them,
masks secrets (`redacted`) and escapes control characters (`printable`). Every pattern takes time linear in the length
of the text: the stretch that it scans has a limited length, or only one place where a match can begin.
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
MAX_SHOWN = 2000  # characters of a message
_MIN_SECRET_CHARS = 8  # shorter values of environment variables are not masked: they occur in ordinary text

_SECRET_WORDS = {
    *("PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "SECRETS"),
    *("CREDENTIAL", "CREDENTIALS", "APIKEY", "BEARER"),
}
# Words before TOKEN that name a token of a text, such as eos_token.
_TOKENS_OF_TEXT = {
    *("MASK", "EOS", "BOS", "PAD", "UNK", "SEP", "CLS"),
    *("STOP", "START", "END", "SPECIAL", "IMAGE", "FIRST", "PER"),
}
_SIGNATURES = {"SIG", "SIGNATURE", "AUTH", "KEY", "AUTHORIZATION"}  # URL parameters

_AUTHORITY = re.compile(r"://[^/?#\s'\"<>]+@")
_DATABASE = re.compile(r"(\b(?:postgres|mysql|mariadb|mssql|oracle)[a-z0-9+]{0,20}://)[^\s'\"]{1,300}@", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&#;])([\w.~%-]+)=([^&#;\s'\"<>]+)")
_ASSIGNED = re.compile(
    r"(?i)((?:api[_-]?key|password|passwd|passphrase|secret|access[_-]?key|(?:auth|access|bearer|hf)[_-]?token)"
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
    "JSON web tokens": re.compile(r"(?<![\w-])(?>[\w-]*?eyJ)[\w-]{10,}\.[\w-]{10,}\.[\w-]*"),
    "private keys": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"),
}

_PRINTABLE_ASCII = re.compile(r"[\t\n\x20-\x7e]*")
# Unicode categories: control characters, direction marks, lone surrogates.
_ESCAPED_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def is_secret_name(name: str) -> bool:
    """Return whether a field, option or variable is named like a secret: `HF_TOKEN`, `api-key`, `dbPassword`."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).upper()
    words = [word for digits in re.split(r"[^A-Z0-9]+", spaced) if (word := digits.rstrip("0123456789"))]
    if not words or words == ["KEY"] or words[-1] == "ENV":  # *_ENV fields hold the name of an environment variable
        return False
    if _SECRET_WORDS & set(words) or re.search(r"(API|ACCESS|SECRET|PRIVATE)_?KEY|AUTH_STRING", "_".join(words)):
        return True
    if words[-1] == "TOKEN":
        return len(words) == 1 or words[-2] not in _TOKENS_OF_TEXT
    return words[-1] == "KEY"


def describe_secret(text: str) -> str | None:
    """Return a description of the first thing in a text that looks like a secret; None if there is none."""
    if _AUTHORITY.search(text) or _DATABASE.search(text):
        return "an address with a user or password in it"
    for _, name, _ in _PARAMETER.findall(text):
        if _is_secret_parameter(name):
            return f"an address with the parameter {name}"
    for kind, pattern in _KNOWN.items():
        if pattern.search(text):
            return f"a text that looks like a secret ({kind})"
    return "a credential" if _ASSIGNED.search(text) or _HEADER.search(text) else None


def find_secrets(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, reason) of everything in a nested config that looks like a secret, without the values."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            field = f"{path}.{name}" if path else str(name)
            if is_secret_name(str(name)) and value and isinstance(value, str | int) and not isinstance(value, bool):
                yield redacted(field), "its name looks like that of a secret"
            elif (why := describe_secret(str(name))) is not None:
                yield redacted(field), f"its name holds {why}"
            else:
                yield from find_secrets(value, field)
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            yield from find_secrets(value, f"{path}.{index}")
    elif isinstance(config, str) and (why := describe_secret(config)) is not None:
        yield path, f"it holds {why}"


def redacted(text: str) -> str:
    """Return the text with `***` for every secret: in URLs, headers, known formats, and values from the environment."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    for pattern in _KNOWN.values():
        text = pattern.sub(MASK, text)
    text = _DATABASE.sub(rf"\1{MASK}@", _AUTHORITY.sub(f"://{MASK}@", text))
    text = _PARAMETER.sub(_mask_parameter, text)
    return _HEADER.sub(rf"\1 {MASK}", _ASSIGNED.sub(rf"\1{MASK}", text))


def shown(text: str) -> str:
    """Return a text as errors, logs and screens show it: redacted, printable and at most `MAX_SHOWN` characters long.

    A longer text loses its middle: a message begins with the place and ends with the remedy. Line breaks stay.
    """
    text = text.replace("\r\n", "\n")
    begin = printable(redacted(text[:MAX_SHOWN]))
    if len(text) <= MAX_SHOWN and len(begin) <= MAX_SHOWN:
        return begin
    end, half = (
        printable(redacted(text[-MAX_SHOWN:])),
        MAX_SHOWN // 2 - 2,
    )  # the halves are cut after secrets are masked
    return f"{begin[:half]} … {end[-half:]}"


def shown_traceback(error: BaseException) -> str:
    """Return the traceback of an error, with every entry `shown`."""
    return "".join(map(shown, traceback.format_exception(error)))


def redact_logs() -> None:
    """Pass every log record of this process, including those of libraries, and its traceback through `shown`."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def redacting_factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            record.msg, record.args = shown(record.getMessage()), None
        except Exception:  # its arguments do not fit its format: the handler reports that
            return record
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = shown_traceback(record.exc_info[1]).rstrip()
        return record

    redacting_factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacting_factory)


def _is_secret_parameter(name: str) -> bool:
    words = name.upper().replace("-", "_").split("_")
    return is_secret_name(name) or words[-1] in _SIGNATURES


def _mask_parameter(match: re.Match[str]) -> str:
    before, name, _ = match.groups()
    return f"{before}{name}={MASK}" if _is_secret_parameter(name) else match.group()


def _environment_secrets() -> list[str]:
    """Return the values of environment variables named like secrets, longest first: one may contain another."""
    values = {v for k, v in os.environ.items() if len(v) >= _MIN_SECRET_CHARS and is_secret_name(k)}
    return sorted(values, key=len, reverse=True)


def printable(text: str) -> str:
    """Return the text with control and invisible characters escaped (`\\x1b`, `\\u202e`), except tab and newline.

    A terminal acts on control characters (colours, title, clipboard), and direction marks reorder the text.
    """
    if _PRINTABLE_ASCII.fullmatch(text):
        return text
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character in "\t\n" or unicodedata.category(character) not in _ESCAPED_CATEGORIES:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
