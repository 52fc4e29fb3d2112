"""The way to a Kubernetes API server, the same for launchers, the command and the doctor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from modelmill.components.core.errors import UserError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient


class NoClusterError(UserError):
    """There is neither a pod's service account nor a kubeconfig that can be used."""


def api_client() -> ApiClient:
    """A client with the pod's own account, else by `KUBECONFIG` or `~/.kube/config`; it repeats no request by itself.

    Raises:
        NoClusterError: there is none of them.
        UserError: the client's package is missing.
    """
    try:
        from kubernetes import client, config
    except ModuleNotFoundError:
        raise UserError("kubernetes: its Python client is missing; pip install 'modelmill[kfp]'") from None
    configuration = client.Configuration()
    try:
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            # Given here, because the client reads the variable once, when it is imported.
            file = os.environ.get("KUBECONFIG") or None
            config.load_kube_config(file, client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        raise NoClusterError(
            f"KUBECONFIG: no access to Kubernetes ({' '.join(str(error).split())}); run in a pod, or set it to a file"
            " for the cluster"
        ) from None
    configuration.retries = False  # each caller knows what may be repeated
    return client.ApiClient(configuration)
