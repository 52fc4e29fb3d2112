"""The manifests as a team would apply them: filled with values that belong to nobody, rendered once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from manifests import render

OVERLAYS = ("eks", "kind")
VALUES = {
    "account": "111122223333",  # AWS's documentation uses it
    "region": "eu-west-1",
    "cluster": "team",
    "kubernetes_version": "1.34",
    "bucket": "team-models",
    "registry": "registry.example.com/modelmill",
    "cpu_digest": "sha256:" + "1" * 64,
    "mlflow_digest": "sha256:" + "2" * 64,
    "mlflow_host": "mlflow.example.com",
    "vpc": "vpc-0a",
    "subnet_a": "subnet-0a",
    "subnet_b": "subnet-0b",
    "accelerator_subnet": "subnet-0b",
    "node_security_group": "sg-0a",
    "node_ami": "al2023@v20261105",
    "fsx_id": "fs-0a",
    "fsx_mount_name": "abcdefgh",
    "fsx_security_group": "sg-0b",
    "oidc_provider": "oidc.eks.eu-west-1.amazonaws.com/id/0A".lower(),
    "nodes_g6": 1,
    "nodes_p4d": 1,
    "nodes_p5": 2,
    "nodes_p5_reserved": 1,
    "nodes_trn1": 3,
    "nodes_trn2": 1,
}
KUBECTL = Path(sys.executable).with_name("kubectl")
Objects = list[dict[str, Any]]


def kustomize(folder: Path) -> Objects:
    """What `kubectl kustomize` makes of a folder."""
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [each for each in yaml.load_all(done.stdout, Loader=loader) if each]


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests with a team's values."""
    folder = tmp_path_factory.mktemp("manifests")
    assert render.render(render.Values.model_validate(VALUES), folder) == []
    return folder


@pytest.fixture(scope="session")
def overlays(filled: Path) -> dict[str, Objects]:
    """Objects of every overlay."""
    return {name: kustomize(filled / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, overlays: dict[str, Objects]) -> Objects:
    """Objects of one overlay."""
    return overlays[request.param]


def pods(objects: Objects) -> dict[str, dict[str, Any]]:
    """Pod templates by what makes them: `Deployment mlflow`."""
    found = {}
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        elif each["kind"] == "ClusterTrainingRuntime":
            spec = spec["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
        if isinstance(spec.get("template"), dict) and "containers" in spec["template"].get("spec", {}):
            found[f"{each['kind']} {each['metadata']['name']}"] = {**spec["template"], "owner": each}
    return found


def named(objects: Objects, kind: str) -> dict[str, dict[str, Any]]:
    """Objects of a kind by name."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}
