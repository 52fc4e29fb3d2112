"""The reaper in SageMaker: off unless the component is switched on, and no right to end what is not its platform's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from manifests import render
from modelmill.components.core import sagemaker
from modelmill.components.launchers import reaper, reaper_sagemaker
from tests import schemas
from tests.manifests.conftest import VALUES, Objects, kustomize, named, pods
from tests.manifests.restricted import violations

OWNER = f"{VALUES['cluster']}/modelmill"
ENDS = {"StopTrainingJob", "DeleteEndpoint", "DeleteEndpointConfig", "DeleteModel"}


@pytest.fixture(scope="module")
def switched_on(filled: Path) -> Objects:
    overlay = filled / "overlays/sagemaker"
    overlay.mkdir(exist_ok=True)
    (overlay / "kustomization.yaml").write_text("resources: [../eks]\ncomponents: [../../components/sagemaker]\n")
    return kustomize(overlay)


def arguments(objects: Objects) -> list[str]:
    (container,) = pods(objects)["CronJob modelmill-reaper"]["spec"]["containers"]
    variables = {each["name"]: each.get("value", "modelmill") for each in container["env"]}
    return [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], each) for each in container["args"]]


def test_the_component_names_the_owner_and_reaches_credentials(
    switched_on: Objects, overlays: dict[str, Objects], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    for look in ("_look_at_cluster", "_look_at_sagemaker"):
        monkeypatch.setattr(reaper, look, lambda options, _state_of: seen.append(options))
    monkeypatch.setenv(reaper.ENDPOINT_VARIABLE, "http://kfp")
    assert reaper.main(arguments(overlays["eks"])) == 0
    assert len(seen) == 1, "off"
    assert reaper.main(arguments(switched_on)) == 0
    assert (seen[-1].sagemaker_owner, seen[-1].sagemaker_region) == (OWNER, VALUES["region"])
    assert seen[-1].grace_minutes == seen[0].grace_minutes
    assert sagemaker.checked_owner(OWNER, "owner") == OWNER
    rules = named(switched_on, "NetworkPolicy")["reaper"]["spec"]["egress"]
    assert len(rules) == len(named(overlays["eks"], "NetworkPolicy")["reaper"]["spec"]["egress"]) + 1
    assert rules[-1]["to"] == [{"ipBlock": {"cidr": "169.254.170.23/32"}}]


def test_the_component_changes_nothing_else(switched_on: Objects, overlays: dict[str, Objects]) -> None:
    changed = [made["metadata"]["name"] for made in switched_on if made not in overlays["eks"]]
    assert sorted(changed) == ["modelmill-reaper", "reaper"]
    assert violations(pods(switched_on)["CronJob modelmill-reaper"]["spec"]) == []
    for each in switched_on:
        if each["metadata"]["name"] in changed:
            schemas.assert_valid(each)


def statements(filled: Path) -> list[dict[str, Any]]:
    return json.loads((filled / "cluster/iam/sagemaker-reaper.json").read_text())["Statement"]


def test_rights_are_the_calls_it_makes(filled: Path) -> None:
    root = Path(render.__file__).parents[1]
    files = ("components/launchers/reaper_sagemaker.py", "components/core/sagemaker.py")
    code = "".join((root / name).read_text() for name in files)
    calls = set(re.findall(r"\b((?:list|stop|delete|describe|add)_[a-z_]+)\b", code))
    called = {"sagemaker:" + "".join(map(str.capitalize, call.split("_"))) for call in calls}
    granted = {action for each in statements(filled) for action in each["Action"]}
    assert called == granted
    assert {f"sagemaker:{action}" for action in ENDS} < granted


def test_it_may_end_only_what_carries_its_owners_tag(filled: Path) -> None:
    own = {f"aws:ResourceTag/{sagemaker.OWNER_TAG}": OWNER}
    ending = [each for each in statements(filled) if {f"sagemaker:{action}" for action in ENDS} & set(each["Action"])]
    assert ending
    for each in ending:
        assert each["Condition"] == {"StringEquals": own}
        assert all(
            re.search(rf":(training-job|model|endpoint|endpoint-config)/{reaper_sagemaker.PREFIX}\*$", resource)
            for resource in each["Resource"]
        )
