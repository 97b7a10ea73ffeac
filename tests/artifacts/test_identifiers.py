"""Identifiers from elsewhere pass, or are one error that is safe to show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.identifiers import (
    Digest,
    IdentifierError,
    iso_time,
    line_name,
    plain_name,
    relative_path,
    run_id,
    server_url,
    sha256_digest,
    upload_address,
    version_number,
    without_credentials,
)

SECRET = "Zk9-marker.7Qx"
DIGEST = "0123456789abcdef" * 4
HOME = Path("/home/store")
Parser = Callable[..., object]
PARSERS: dict[Parser, tuple[list[object], list[object]]] = {
    sha256_digest: (
        [DIGEST],
        ["", "../..", DIGEST[:16], DIGEST.upper(), f"{DIGEST}\n", f" {DIGEST}", "/" * 64, "٣" * 64, None, 7, [DIGEST]],
    ),
    line_name: (
        ["a", "my-line", "_x.1", "größe", "a..b"],
        ["", ".", "..", ".hidden", "-x", "a/b", "a b", "a'b", "a@b", "a\n", "a\0", "a" * 201, "ß" * 101, None],
    ),
    plain_name: (["sft", "opd.shard", "a@1+x"], ["", "..", "../x", "a/b", "a\\b", "a\x1b[31m", "\u202ea", 3]),
    relative_path: (["a/b.json", "a..b"], ["", "/etc/passwd", "..", "a/../../b", "a\0b", None, 1]),
    version_number: (["1", 1, "12"], ["0", 0, "-1", "+1", "1.0", "٣", "1_0", " 1", "9" * 5000, True, 1.0, None]),
    iso_time: (
        ["2026-01-01T00:00:00+00:00", "2026-01-01T00:00:00Z"],
        [
            "",
            "yesterday",
            "2026-01-01",
            "2026-01-01T00:00:00",
            "2026-13-01T00:00:00Z",
            "2026-01-01T00:00:00Z'",
            None,
            1,
        ],
    ),
    run_id: (["f" * 32, "a-b_c"], ["", "..", "../x", "a/b", "a'", "a b", "x" * 300, None]),
    upload_address: (
        ["runs:/0a1b/drafter", "models:/m-12ab", "models:/a-line/3", "runs:/a/b/c.d"],
        [
            *("", "runs:/", "runs:/a", "runs:/a/..", "runs:/a/../b", "runs:/../b", "models:/..", "runs:/a//b"),
            *("s3://bucket/x", "file:///etc", "http://host/x", "runs://host/a/b", "runs:/a/b c", "runs:/a/b\n", None),
        ],
    ),
    server_url: (
        ["http://gpu1", "https://gpu1:443/sglang/", "http://[::1]:30000", "http://10.0.0.1:8000/a-b/v1"],
        [
            *("", "gpu1:30000", "file:///etc/passwd", "ftp://host", "http://", "http:///x", "//host", "http://ho st"),
            *(
                "http://host:0",
                "http://host:65536",
                "http://host:3o",
                "http://host:1\r\nHost: evil",
                "http://host\\evil",
            ),
            *("http://host?x=1", "http://host#x", "http://host/\x1b[31m", "http://hóst", "javascript://alert(1)", None),
        ],
    ),
}
IDS = [parser.__name__ for parser in PARSERS]


@pytest.mark.parametrize("parser", PARSERS, ids=IDS)
def test_only_its_own_kind_passes(parser: Parser) -> None:
    good, bad = PARSERS[parser]
    for value in good:
        assert str(parser(value)) == str(value)
    for value in bad:
        with pytest.raises(DraftsmithError, match=r"^a tag: .* is n[^.]*\. \w"):
            parser(value, where="a tag")


def is_safe(parser: Parser, text: str) -> bool:
    """Return whether a text that has passed cannot leave its folder, its query, its request or its line."""
    if parser is relative_path:
        return (HOME / text).resolve().is_relative_to(HOME)
    plain = text.isprintable() and not set("'\"`<>|\\ ") & set(text)
    if parser is server_url:
        ours, theirs = urlsplit(text), httpx.URL(text)
        return plain and ours.hostname == theirs.host and not theirs.userinfo and not ours.query
    if parser is upload_address:
        return plain and not {"", ".", ".."} & set(text.partition(":/")[2].split("/"))
    return plain and (HOME / text).resolve().parent == HOME


PIECES = st.sampled_from(
    ["..", "/", "\\", "\0", "\n", "'", '"', "@", ":", "?", "#", "%2e", "\x1b[2J", "\u202e", "\ud800", "http://", "a"]
)
HOSTILE = st.one_of(st.text(), st.lists(PIECES, max_size=8).map("".join), st.none(), st.integers(), st.lists(st.text()))


@pytest.mark.parametrize("parser", PARSERS, ids=IDS)
@given(data=st.data())
def test_no_value_gets_further(parser: Parser, data: st.DataObject) -> None:
    good = st.sampled_from([each for each in PARSERS[parser][0] if isinstance(each, str)])
    near = st.builds(lambda text, at, piece: text[:at] + piece + text[at:], good, st.integers(0, 80), PIECES)
    value = data.draw(st.one_of(HOSTILE, near))
    try:
        found = parser(value, where="here")
    except IdentifierError as error:
        assert str(error).isprintable() and len(str(error)) < 300
    else:
        assert str(found) == str(value) and is_safe(parser, str(found))


def test_an_error_shows_foreign_text_escaped_and_cut() -> None:
    with pytest.raises(IdentifierError) as caught:
        sha256_digest(f"\x1b]0;title\x07\u202e{'x' * 100_000}", where="a-line version 3: tag drafter_digest")
    said = str(caught.value)
    assert said.startswith("a-line version 3: tag drafter_digest: '\\x1b]0;title\\x07\\u202exxx") and len(said) < 200
    with pytest.raises(IdentifierError) as caught:
        line_name(f"password={SECRET}")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", ["http://u:{}@host:1", "http://{}@host", "http://host:1?token={}", "x://u:/{}@host"])
def test_a_secret_in_a_url_is_not_shown(url: str) -> None:
    for text in (url.format(SECRET), url.format(SECRET * 300)):
        with pytest.raises(IdentifierError, match="contains a user, a password or a key") as caught:
            server_url(text)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        (f"http://anna:{SECRET}@host:5000/mlflow", "http://host:5000/mlflow"),
        (f"HTTPS://{SECRET}@host", "HTTPS://host"),
        (f"postgresql+psycopg://anna:a/b@{SECRET}@host/mlflow", "postgresql+psycopg://host/mlflow"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_a_uri_loses_its_credentials_only(uri: str, public: str) -> None:
    assert without_credentials(uri) == public


@given(st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]), st.text("ab0:!$&*+=.~-@", max_size=9))
def test_no_password_survives(scheme: str, password: str) -> None:
    uri = f"{scheme}://anna:{password}{SECRET}@host:5000/x"
    assert without_credentials(uri) == f"{scheme}://host:5000/x"


def test_a_field_of_a_config_is_named_as_validation_names_it() -> None:
    with pytest.raises(ValidationError, match="is not a sha256 digest") as caught:
        TypeAdapter(dict[str, Digest]).validate_python({"drafter": "../.."})
    assert caught.value.errors()[0]["loc"] == ("drafter",)
