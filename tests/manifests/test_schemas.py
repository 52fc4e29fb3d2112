"""An API server of the three newest versions would take every rendered object."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest

from tests import schemas
from tests.manifests.conftest import Objects, named

UNCHECKED: set[str] = set()  # kinds whose CRD is not at hand; none today


def test_built_in_kinds_pass_the_strict_schemas(objects: Objects) -> None:
    checked = [each for each in objects if not schemas.is_custom(each)]
    assert len(checked) > 20
    for each in checked:
        schemas.assert_valid(each)


def test_custom_resources_pass_schema_and_rules(objects: Objects) -> None:
    schemas.require_crds()
    checked = [each for each in objects if schemas.is_custom(each)]
    assert {each["kind"] for each in checked} >= {
        "ClusterTrainingRuntime",
        "ClusterQueue",
        "LocalQueue",
        "ResourceFlavor",
    }
    for each in checked:
        if each["kind"] not in UNCHECKED:
            schemas.assert_valid(each)


def test_all_kinds_of_nodes_are_rendered_for_eks(overlays: dict[str, Objects]) -> None:
    pools = named(overlays["eks"], "NodePool")
    assert pools.keys() == {f"modelmill-{name}" for name in ("cpu", "gpu-step", "g6", "p4d", "p5", "trn1", "trn2")}
    assert pools.keys() == named(overlays["eks"], "EC2NodeClass").keys()


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "replica"), 2),
        ("ClusterQueue", ("spec", "preemption", "withinClusterQueue"), "Sometimes"),
        ("EC2NodeClass", ("spec", "subnetSelectorTerms"), []),
        ("NodePool", ("spec", "template", "spec", "nodeClassRef", "group"), ""),
        ("ClusterTrainingRuntime", ("spec", "template", "spec", "failurePolicy", "maxRestart"), 3),
    ],
)
def test_a_mistake_would_be_found(kind: str, path: tuple[str, ...], value: Any, overlays: dict[str, Objects]) -> None:
    schemas.require_crds()
    broken = copy.deepcopy(next(iter(named(overlays["eks"], kind).values())))
    place = broken
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert schemas.problems(broken)


def test_cluster_config_says_what_eksctl_needs(filled: Any) -> None:
    """eksctl's own schema is not at hand: this checks the parts that others refer to."""
    import yaml

    config = yaml.safe_load((filled / "cluster/cluster.yaml").read_text())
    jsonschema.validate(config["metadata"], {"required": ["name", "region", "version"]})
    accounts = {(each["namespace"], each["serviceAccountName"]) for each in config["iam"]["podIdentityAssociations"]}
    assert accounts >= {("modelmill", "modelmill-runner"), ("modelmill", "modelmill-trainer"), ("mlflow", "mlflow")}
