"""Fixtures of AWS on the loopback: moto's server for S3, the SageMaker of these tests, useless credentials."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import boto3
import botocore.loaders
import botocore.session
import pytest
from moto.server import ThreadedMotoServer

from tests.fakes.sagemaker_api import SageMakerService
from tests.fakes.sagemaker_http import SageMakerServer
from tests.fakes.sagemaker_tagged import REGION

BUCKET = "modelmill-tests"
_LOADER = botocore.loaders.create_loader()  # a session of its own would read the service models each time


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """Address of an S3 with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    made = boto3.session.Session(region_name=REGION, **keys).client("s3", endpoint_url=url)
    with suppress(made.exceptions.BucketAlreadyOwnedByYou):  # all of moto's servers in a process are one AWS
        made.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    yield url
    server.stop()


@pytest.fixture
def aws(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SageMakerService]:
    """A SageMaker without anything in it; real clients of this process and its children find it and S3."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(botocore.session, "create_loader", lambda *_: _LOADER)
    with SageMakerServer() as server:
        variables = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_ENDPOINT_URL_S3": s3_url,
            **server.environment(),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield server.service
        assert server.service.violations == []


@cache
def s3() -> Any:
    """A client of the S3 here."""
    return boto3.session.Session().client("s3")


def objects(prefix: str = "") -> dict[str, bytes]:
    """Keys below a prefix of the bucket, with their content."""
    client = s3()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
