"""Images in their registry, asked by its protocol (OCI distribution specification 1.1); nothing is pulled."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import HTTPRedirectHandler, Request, build_opener

_TIMEOUT = 10  # seconds
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
_ECR = re.compile(r"^(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(\.cn)?$")


@dataclass(frozen=True)
class Reference:
    """`host/name:tag@digest`, taken apart as container engines do."""

    host: str
    name: str
    version: str  # digest, else tag

    @property
    def by_digest(self) -> bool:
        return self.version.startswith("sha256:")

    @classmethod
    def parse(cls, text: str) -> Reference:
        rest, _, digest = text.partition("@")
        first, slash, remainder = rest.partition("/")
        named = bool(slash) and ("." in first or ":" in first or first == "localhost")
        host, path = (first, remainder) if named else ("docker.io", rest if slash else f"library/{rest}")
        path, _, tag = path.partition(":")
        return cls(host, path, digest or tag or "latest")


class RegistryError(Exception):
    """The registry answers with an error (`status`), or not at all (0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Registry:
    """One registry, with the user's own credentials for ECR and none for others."""

    def __init__(self, host: str) -> None:
        local = host.partition(":")[0] in ("localhost", "127.0.0.1")  # as container engines take them
        name = "registry-1.docker.io" if host == "docker.io" else host
        self.address = f"{'http' if local else 'https'}://{name}/v2"
        self.authorization = _ecr_login(host)

    def manifest(self, reference: Reference, *, content: bool = True) -> dict[str, Any]:
        """The manifest of an image, empty when only its presence is asked for.

        Raises:
            RegistryError: it is not there, not shown, or the registry is silent.
        """
        path = f"/{reference.name}/manifests/{reference.version}"
        text = self._ask(path, "GET" if content else "HEAD", accept=_MANIFESTS)
        return json.loads(text) if content else {}

    def labels(self, reference: Reference) -> dict[str, str]:
        """Labels of an image; of one for several machines, those of the first for amd64."""
        found = self.manifest(reference)
        for each in found.get("manifests", []):
            if each.get("platform", {}).get("architecture") == "amd64":
                found = self.manifest(Reference(reference.host, reference.name, each["digest"]))
                break
        config = json.loads(self._ask(f"/{reference.name}/blobs/{found['config']['digest']}"))
        return config.get("config", {}).get("Labels") or {}

    def _ask(self, path: str, method: str = "GET", accept: str = "*/*") -> str:
        try:
            return self._send(path, method, accept)
        except HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate", "")
            if error.code != 401 or self.authorization or not challenge.startswith("Bearer "):
                raise RegistryError(error.code, f"answers {error.code} {error.reason}") from None
        except (URLError, OSError) as error:
            raise RegistryError(0, f"does not answer: {getattr(error, 'reason', error)}") from None
        try:
            self.authorization = _token(challenge)
            return self._send(path, method, accept)
        except HTTPError as error:
            raise RegistryError(error.code, f"answers {error.code} {error.reason}") from None
        except (URLError, OSError, ValueError, KeyError) as error:
            raise RegistryError(0, f"gives no token: {error}") from None

    def _send(self, path: str, method: str, accept: str) -> str:
        headers = {"Accept": accept} | ({"Authorization": self.authorization} if self.authorization else {})
        request = Request(f"{self.address}{path}", method=method, headers=headers)
        with build_opener(_KeepsSecrets).open(request, timeout=_TIMEOUT) as answer:
            return answer.read().decode()


class _KeepsSecrets(HTTPRedirectHandler):
    """Registries redirect blobs to a store with signed addresses, which must not see the registry's credentials."""

    def redirect_request(self, *arguments: Any) -> Request | None:
        request = super().redirect_request(*arguments)
        if request is not None:
            request.headers.pop("Authorization", None)
        return request


def _token(challenge: str) -> str:
    """An anonymous token, as the registry's challenge says where to get one."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    query = urlencode({key: fields[key] for key in ("service", "scope") if key in fields})
    with build_opener().open(f"{fields['realm']}?{query}", timeout=_TIMEOUT) as answer:
        found = json.loads(answer.read())
    return f"Bearer {found.get('token') or found['access_token']}"


def _ecr_login(host: str) -> str:
    """Basic authentication for ECR from the user's AWS credentials, or nothing."""
    match = _ECR.match(host)
    if match is None:
        return ""
    try:
        import boto3

        client = boto3.session.Session().client("ecr", region_name=match.group(2))
        data = client.get_authorization_token(registryIds=[match.group(1)])["authorizationData"]
        base64.b64decode(data[0]["authorizationToken"], validate=True)
        return f"Basic {data[0]['authorizationToken']}"
    except Exception:  # without boto3, credentials or network: the registry itself says what is missing
        return ""


def labels(reference: str) -> dict[str, str]:
    """Labels of an image, empty where the registry does not show them."""
    parsed = Reference.parse(reference)
    try:
        return Registry(parsed.host).labels(parsed)
    except (RegistryError, KeyError, ValueError):
        return {}
