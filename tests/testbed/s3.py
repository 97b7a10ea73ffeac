"""A bucket on a server with the S3 protocol, which the environment names while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import boto3
from moto.server import ThreadedMotoServer

SECRET = "a-key-that-is-not-for-the-eye"


@contextmanager
def bucket(name: str) -> Iterator[None]:
    """Run the server with one empty bucket, for s3fs and boto3 of this process and its children."""
    import s3fs

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    with patch.dict(os.environ, environment):
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket=name)
        try:
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
