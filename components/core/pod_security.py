"""What Pod Security's level `restricted` asks of a pod's spec, as every pod that we describe ourselves has it.

https://kubernetes.io/docs/concepts/security/pod-security-standards
"""

from __future__ import annotations

from typing import Any

USER = 1000  # of the images; its group has the same number


def pod_context() -> dict[str, Any]:
    """`securityContext` of a pod."""
    seccomp = {"type": "RuntimeDefault"}
    return {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "seccompProfile": seccomp}


def container_context() -> dict[str, Any]:
    """`securityContext` of each of its containers."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
