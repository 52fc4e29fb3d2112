"""Which container image a component runs in on a cluster; the laptop runs the same code in its own interpreter.

The tag is the package version, so a pipeline and the image it names always carry the same code. A registry is
put in front with `MODELMILL_IMAGE_REGISTRY` when a pipeline is compiled.
"""

from __future__ import annotations

import os

from modelmill.components.core.code import package_version

# The KFP local runner warns on every step unless the name says that the image holds Python.
FAMILIES = {"cpu": "modelmill-cpu-python", "gpu": "modelmill-gpu-python", "neuron": "modelmill-neuron-python"}


def image(family: str, registry: str | None = None) -> str:
    """Image reference of a family: `cpu`, `gpu` or `neuron`; without a registry, that of the environment."""
    registry = (os.environ.get("MODELMILL_IMAGE_REGISTRY", "") if registry is None else registry).rstrip("/")
    name = f"{FAMILIES[family]}:{package_version().replace('+', '-')}"
    return f"{registry}/{name}" if registry else name
