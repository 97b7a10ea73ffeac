"""Parsers of identifiers that come from elsewhere: a registry, a tag, a server, the content of a file, a command line;
and file names made from names.

Such a value passes its parser where it enters, before it becomes part of a path, a request, a query or a page. A parser
returns the value unchanged, or raises `IdentifierError`. Fields of configs and manifests use the annotated types.
Plug-ins in servers use them too, so this module needs no package that servers lack.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeAlias
from urllib.parse import quote, unquote

from pydantic import AfterValidator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.redaction import MAX_SHOWN, describe_secret, redacted

_LINE_BYTES = 200  # a line's name is part of a file's name
_FILE_BYTES = 200  # file systems allow 255, and an extension and a temporary prefix are added
_SHOWN_CHARS = 60  # characters of a foreign text in an error
_HEX = re.compile(r"[0-9a-f]{64}")
_LINE = re.compile(r"\w[\w.-]*")
_NAME = re.compile(r"\w[\w@.+-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,255}")
_SERVER = re.compile(
    r"https?://([A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
    r"(/[A-Za-z0-9_.~%+=,-]*)*"
)
_UPLOAD_PART = r"/[A-Za-z0-9_][A-Za-z0-9_.@-]*"  # begins with no dot, so it is neither `.` nor `..`
_UPLOAD = re.compile(rf"(runs:{_UPLOAD_PART}|models:)({_UPLOAD_PART})+")


class IdentifierError(DraftsmithError, ValueError):
    """A value that is not a valid identifier. A ValueError too, so that validation of a config names the field."""


def sha256_digest(value: object, *, where: str = "") -> str:
    """Return a sha256 digest: a drafter's, a file's, a content id or a cache key.

    where: the place of the value, for errors, such as `my-line version 3: tag drafter_digest`; so in all parsers.
    """
    return _matching(_HEX, value, where, "not a sha256 digest (64 of 0-9 and a-f)", "Correct it, or remove it")


def line_name(value: object, *, where: str = "") -> str:
    """Return the name of a model line, which is also a registered model in MLflow and part of a file's name."""
    remedy = f"Use only letters, digits and _ . -, at most {_LINE_BYTES} bytes"
    name = _matching(_LINE, value, where, "not a name for a model line", remedy)
    if len(name.encode()) > _LINE_BYTES:
        raise _error(name, where, "not a name for a model line", remedy)
    return name


def plain_name(value: object, *, where: str = "") -> str:
    """Return the name of a drafter, a node or a stage, which is also a file's name."""
    return _matching(
        _NAME, value, where, "not a name that can become a file name", "Use only letters, digits and _ @ . + -"
    )


def relative_path(value: object, *, where: str = "") -> str:
    """Return a path that stays in its folder: not absolute, and without `..` or control characters."""
    if isinstance(value, str) and value and value.isprintable() and value[0] != "/" and ".." not in value.split("/"):
        return value
    raise _error(value, where, "not a path inside its folder", "Correct it, or remove it")


def absolute_path(value: object, *, where: str = "") -> Path:
    """Return an absolute path without `..` or control characters."""
    if isinstance(value, str) and value.startswith("/") and value.isprintable() and ".." not in value.split("/"):
        return Path(value)
    raise _error(value, where, "not an absolute path without `..`", "Correct it, or remove it")


def file_path(value: object, *, where: str = "") -> Path:
    """Return the absolute path of a `file:///…` URI."""
    is_uri = isinstance(value, str) and value.startswith("file:///")
    return absolute_path(unquote(str(value).removeprefix("file://")) if is_uri else value, where=where)


def version_number(value: object, *, where: str = "") -> int:
    """Return the number of a line's version, 1 or more, from a text or a number."""
    text = str(value) if type(value) is int and 0 < value < 10**9 else value
    return int(_matching(_VERSION, text, where, "not a version number", "Use an integer of at least 1"))


def iso_time(value: object, *, where: str = "") -> str:
    """Return a time in ISO 8601 with its time zone."""
    with suppress(ValueError):
        if isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None:
            return value
    raise _error(value, where, "not an ISO 8601 time with a time zone", "Correct it, or remove it")


def run_id(value: object, *, where: str = "") -> str:
    """Return the id of a run in MLflow."""
    return _matching(_RUN, value, where, "not an MLflow run id", "Correct it, or remove it")


def upload_address(value: object, *, where: str = "") -> str:
    """Return the address of an upload in MLflow: `runs:/ID/PATH` or `models:/NAME/VERSION`."""
    remedy = "Correct it, or remove it"
    return _matching(_UPLOAD, value, where, "not an upload address such as runs:/ID/drafter", remedy)


def server_url(value: object, *, where: str = "") -> str:
    """Return the URL of a server: http or https, host, port and path, without credentials and parameters."""
    if isinstance(value, str) and ("@" in value or describe_secret(value[:MAX_SHOWN]) is not None):
        # not shown: the end of the secret is unknown
        raise IdentifierError(
            f"{_at(where)}contains a user, a password or a key. Remove it: the key belongs in an environment variable "
            "(SGLANG_API_KEY or VLLM_API_KEY, or the one that api_key_env or --api-key-env names)."
        )
    if isinstance(value, str) and not value.startswith(("http://", "https://")):
        raise _error(value, where, "not a server address", "Write its scheme too: http://host:30000")
    url = _matching(_SERVER, value, where, "not a server address", "Write one such as http://host:30000")
    match = _SERVER.fullmatch(url)
    if match is not None and (port := match["port"]) and not 0 < int(port) < 1 << 16:
        raise _error(url, where, "not a server address", "Use a port between 1 and 65535")
    return url


def without_credentials(uri: str) -> str:
    """Return the URI of MLflow's or Prefect's server, or of a database, without user, password or other secrets.

    Everything that is shown, stored or sent uses this. Only a connection uses the URI itself.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return redacted(uri)
    if scheme in ("http", "https"):
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        rest = authority.rpartition("@")[2] + rest[len(authority) :]
    elif not rest.startswith("/"):  # a database server: its password may hold a slash; a file's path may hold an @
        rest = rest.rpartition("@")[2]
    return redacted(f"{scheme}://{rest}")


def run_file_name(name: str) -> str:
    """Return a valid file name, without extension, that is unique to the run of this name."""
    quoted = quote(name, safe="")
    if len(quoted) <= _FILE_BYTES:
        return quoted
    return f"{quoted[: _FILE_BYTES - 33]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


Digest: TypeAlias = Annotated[str, AfterValidator(sha256_digest)]
LineName: TypeAlias = Annotated[str, AfterValidator(line_name)]
PlainName: TypeAlias = Annotated[str, AfterValidator(plain_name)]
RelativePath: TypeAlias = Annotated[str, AfterValidator(relative_path)]
RunId: TypeAlias = Annotated[str, AfterValidator(run_id)]
ServerUrl: TypeAlias = Annotated[str, AfterValidator(server_url)]


def _matching(pattern: re.Pattern[str], value: object, where: str, problem: str, remedy: str) -> str:
    if isinstance(value, str) and pattern.fullmatch(value):
        return value
    raise _error(value, where, problem, remedy)


def _error(value: object, where: str, problem: str, remedy: str) -> IdentifierError:
    """Return an error that shows a foreign value escaped, redacted and cut."""
    if isinstance(value, str):
        text = repr(redacted(value[:MAX_SHOWN]))
        shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
    else:
        shown = "nothing" if value is None else f"a value of type {type(value).__name__}"
    return IdentifierError(f"{_at(where)}{shown} is {problem}. {remedy}.")


def _at(where: str) -> str:
    return f"{where}: " if where else ""
