"""Rows at `s3://…`, read from a server with the S3 protocol."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import match_files, read_rows, remote_versions
from tests.stages.data.test_files import ROWS, SUFFIXES, content, fields
from tests.testbed.s3 import bucket


@pytest.fixture
def put() -> Iterator[None]:
    """Create a bucket `answers` with rows in every format."""
    with bucket("answers"):
        for suffix in SUFFIXES:
            boto3.client("s3").put_object(Bucket="answers", Key=f"week/rows{suffix}", Body=content(ROWS[:9], suffix))
        yield


@pytest.mark.usefixtures("put")
def test_rows_of_an_s3_bucket_equal_those_on_disk() -> None:
    for suffix in SUFFIXES:
        files = match_files([f"s3://answers/week/rows{suffix}"], "logs.paths")
        assert fields(files) == ROWS[:9]
    assert len(fields(match_files(["s3://answers/week"], "logs.paths"))) == 9 * len(SUFFIXES)
    assert len(match_files(["s3://answers/*/rows*.gz"], "logs.paths")) == sum("gz" in suffix for suffix in SUFFIXES)
    with pytest.raises(DraftsmithError, match=r"^logs\.paths: .*s3://answers/none\.jsonl"):
        match_files(["s3://answers/none.jsonl"], "logs.paths")


@pytest.mark.usefixtures("put")
def test_a_changed_object_has_another_version() -> None:
    address = "s3://answers/week/rows.jsonl"
    before = remote_versions([address], "logs.paths")
    assert len(before) == 1 and remote_versions([address], "logs.paths") == before
    boto3.client("s3").put_object(Bucket="answers", Key="week/rows.jsonl", Body=content(ROWS[1:10], ".jsonl"))
    assert remote_versions([address], "logs.paths") != before
    assert fields([address]) == ROWS[1:10] and len(list(read_rows([address]))) == 9
