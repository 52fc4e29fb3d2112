"""Write the software bill of materials of an environment: CycloneDX 1.6 JSON, from the installed distributions alone.

    python images/sbom.py OUTPUT

Runs with nothing but the standard library inside the builder stage. Equal environments give equal bytes: there is no
time and no random serial number.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

_SPDX = re.compile(r"[A-Za-z0-9.+-]+")


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{_name(name)}@{version.replace('+', '%2B')}"


def _licenses(metadata: Any) -> list[dict[str, Any]]:
    """The distribution's SPDX expression, else the names its metadata gives."""
    if expression := metadata.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    names = sorted({line.rpartition(" :: ")[2] for line in classifiers} - {"OSI Approved"})
    if not names and (text := (metadata.get("License") or "").strip()):
        names = [text.splitlines()[0][:80]]
    return [{"license": {"name": name}} for name in names]


def bill(distributions: list[importlib.metadata.Distribution]) -> dict[str, Any]:
    """The CycloneDX document of these distributions: components with package URLs, and which one needs which."""
    found = {_name(each.metadata["Name"]): each for each in distributions}
    references = {name: _purl(name, each.version) for name, each in found.items()}
    components, dependencies = [], []
    for name, each in sorted(found.items()):
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": references[name],
            "name": each.metadata["Name"],
            "version": each.version,
            "purl": references[name],
        }
        if licenses := _licenses(each.metadata):
            component["licenses"] = licenses
        components.append(component)
        wanted = {_name(match.group()) for line in each.requires or [] if (match := _SPDX.match(line))}
        needed = sorted(references[other] for other in wanted if other in references and other != name)
        dependencies.append({"ref": references[name], "dependsOn": needed})
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": "image", "name": "modelmill"}},
        "components": components,
        "dependencies": dependencies,
    }


def main() -> None:
    document = bill(list(importlib.metadata.distributions()))
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
