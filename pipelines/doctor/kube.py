"""Questions to the Kubernetes API, each answered or explained."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from modelmill.components.launchers.kubernetes_access import NoClusterError, api_client

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

Json = dict[str, Any]
_TIMEOUT = (5, 15)  # seconds to connect and to answer
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class Refused(Exception):
    """The API server answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(Exception):
    """There is no API server to ask."""


class Kube:
    """One cluster, through the kubeconfig of the user or the service account of the pod."""

    def __init__(self, client: ApiClient) -> None:
        self.client = client
        self._groups: dict[str, list[str]] | None = None

    @classmethod
    def connect(cls) -> Kube:
        """With the pod's own account, else by `KUBECONFIG` or `~/.kube/config`.

        Raises:
            UserError: the client is not installed.
            Unreachable: there is none of them.
        """
        try:
            return cls(api_client())
        except NoClusterError as error:
            raise Unreachable(str(error)) from None

    def get(self, path: str, **query: str) -> Json:
        """The object or list at a path such as `/api/v1/nodes`.

        Raises:
            Refused: the API server answers with an error, such as 403 or 404.
            Unreachable: it does not answer.
        """
        return self._call("GET", path, query=query)

    def find(self, path: str) -> Json | None:
        """The object at a path, or None where there is none."""
        try:
            return self.get(path)
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def text(self, path: str) -> str:
        """What a path answers in plain text, such as a pod's log."""
        return self._call("GET", path, accept="*/*", kind="str")

    def create(self, path: str, body: Json) -> Json:
        return self._call("POST", path, body=body)

    def delete(self, path: str) -> None:
        """Delete an object and, in the background, what it owns."""
        self._call("DELETE", path, body={"propagationPolicy": "Background"})

    def names_it(self, path: str) -> bool:
        """Whether an object exists; its content, such as a secret's, is not asked for."""
        try:
            self._call("GET", path, accept=_METADATA_ONLY)
        except Refused as error:
            if error.status == 404:
                return False
            raise
        return True

    def served(self, group: str) -> list[str]:
        """Versions of an API group that the server serves; empty when it is not installed. Everybody may ask."""
        if self._groups is None:
            groups = self.get("/apis")["groups"]
            self._groups = {each["name"]: [version["version"] for version in each["versions"]] for each in groups}
        return self._groups.get(group, [])

    def may(self, verb: str, resource: str, namespace: str, account: str | None = None) -> bool:
        """Whether the user, or a service account of the namespace, may do something.

        Args:
            verb: such as `create`.
            resource: `plural[.group][/subresource]`, such as `pods/log` or `trainjobs.trainer.kubeflow.org`.
            namespace: of the resource.
            account: name of a service account; None asks for the user.
        """
        name, _, subresource = resource.partition("/")
        plural, _, group = name.partition(".")
        asked = {"verb": verb, "resource": plural, "group": group, "subresource": subresource, "namespace": namespace}
        spec: Json = {"resourceAttributes": {key: value for key, value in asked.items() if value}}
        kind = "SelfSubjectAccessReview"
        if account is not None:
            kind, groups = "SubjectAccessReview", ["system:serviceaccounts", f"system:serviceaccounts:{namespace}"]
            user = f"system:serviceaccount:{namespace}:{account}"
            spec |= {"user": user, "groups": [*groups, "system:authenticated"]}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
        answer = self._call("POST", f"/apis/authorization.k8s.io/v1/{kind.lower()}s", body=body)
        return bool(answer["status"].get("allowed"))

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        accept: str = "application/json",
        kind: str = "object",
    ) -> Any:
        import urllib3
        from kubernetes.client import ApiException

        try:
            data, *_ = self.client.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": accept, "Content-Type": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
                response_type=kind,
                _request_timeout=_TIMEOUT,
            )
        except ApiException as error:
            raise Refused(error.status or 0, _message(error)) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(f"{self.client.configuration.host} does not answer: {_short(reason)}") from None
        return data


def _message(error: Any) -> str:
    import json

    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason or f"status {error.status}")


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text.rpartition(": ")[2] or text


def quantity(text: str | int | float) -> Decimal:
    """A Kubernetes quantity as a number: `184` CPUs, `500m`, `1800Gi` bytes.

    Raises:
        ValueError: it is none.
    """
    from kubernetes.utils import parse_quantity

    return parse_quantity(text)
