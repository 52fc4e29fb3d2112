"""AWS on the loopback."""

from __future__ import annotations

from tests.fakes.aws import aws, s3_url  # noqa: F401  (fixtures)
