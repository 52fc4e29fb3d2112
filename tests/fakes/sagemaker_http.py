"""The small SageMaker behind a socket: the JSON 1.1 protocol and the runtime's invocations, for real clients.

They are led here by `AWS_ENDPOINT_URL_SAGEMAKER` and `AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME`.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.fakes.sagemaker_api import SageMakerService
from tests.fakes.sagemaker_tagged import ServiceError


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: SageMakerService

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if self.path.startswith("/endpoints/"):
                status, kind, answer = self.service.invoked(self.path.split("/")[2], body, self.headers)
                if status >= 400:
                    raise ServiceError("ModelError", answer.decode(), 424)
                self._send(status, kind, answer)
            else:
                operation = self.headers["X-Amz-Target"].partition(".")[2]
                found = self.service.handle(operation, json.loads(body or b"{}"))
                self._send(200, "application/x-amz-json-1.1", json.dumps(found).encode())
        except ServiceError as error:
            told = json.dumps({"__type": error.code, "message": error.message, "Message": error.message}).encode()
            self._send(error.status, "application/x-amz-json-1.1", told, error.code)

    def _send(self, status: int, kind: str, body: bytes, code: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("x-amzn-ErrorType", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the console."""


class SageMakerServer:
    """The service behind a socket, as a context."""

    def __init__(self, service: SageMakerService | None = None) -> None:
        self.service = service or SageMakerService()
        handler = type("Handler", (_Handler,), {"service": self.service})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> SageMakerServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Variables that lead real clients here."""
        return {"AWS_ENDPOINT_URL_SAGEMAKER": self.url, "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": self.url}
