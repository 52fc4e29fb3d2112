"""AWS on the loopback, and a Kubeflow Pipelines that answers as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.fakes.aws import aws, s3_url  # noqa: F401  (fixtures)


@pytest.fixture
def pipelines() -> Iterator[tuple[str, dict[str, tuple[int, Any]], list[str | None]]]:
    """An address that answers as told by run id, and the tokens it was shown."""
    answers: dict[str, tuple[int, Any]] = {}
    tokens: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers.get("Authorization"))
            code, body = answers[self.path.rpartition("/")[2]]
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", answers, tokens
    server.shutdown()
    server.server_close()
