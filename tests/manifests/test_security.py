"""No secrets, no names of somebody's account, the least rights, pods that pass `restricted`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from manifests import render
from modelmill.components.launchers import trainjob_render
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import TrainingJob
from modelmill.components.training.layout import ParallelConfig
from modelmill.pipelines import catalog
from modelmill.pipelines.doctor import cluster, inside
from modelmill.pipelines.platform import load_profile, profile_names
from tests.fakes.kubernetes_trainer import pod_template
from tests.manifests.conftest import VALUES, Objects, named, pods
from tests.manifests.restricted import containers, violations

CLUSTER_PROFILES = [name for name in profile_names() if load_profile(name).where == "cluster"]
# Actions for which AWS knows no resource (Service Authorization Reference).
WITHOUT_RESOURCE = {"ecr:GetAuthorizationToken"} | {
    f"sagemaker:List{kind}" for kind in ("Endpoints", "EndpointConfigs", "Models", "ModelPackages", "TrainingJobs")
}
MACHINES = re.compile(
    r"\b\d{12}\b|\.dkr\.ecr\.|(AKIA|ASIA)[0-9A-Z]{16}|-----BEGIN|\b(vpc|subnet|sg|fs|cr|i|ami)-[0-9a-f]{8,}\b"
)


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from texts(key)
            yield from texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from texts(child)
    elif isinstance(value, str):
        yield value


def test_sources_name_no_account_registry_or_key() -> None:
    files = [path for part in render.PARTS for path in (render.SOURCE / part).rglob("*") if path.is_file()]
    files.append(render.SOURCE / "values.yaml")
    files += (Path(render.__file__).parents[1] / "pipelines/profiles").glob("*.yaml")
    assert len(files) > 40
    for path in files:
        assert not MACHINES.search(path.read_text()), path


@pytest.mark.parametrize("text", ["123456789012", "1.dkr.ecr.eu", "AKIAIOSFODNN7EXAMPLE", "subnet-0123456789abcdef0"])
def test_the_search_for_names_finds_them(text: str) -> None:
    assert MACHINES.search(f"id: {text}")


def test_rendered_objects_hold_the_teams_values_only_where_told(objects: Objects) -> None:
    for each in objects:
        for text in texts(each):
            account = re.findall(r"\b\d{12}\b", text)
            assert set(account) <= {VALUES["account"]}, text


def test_no_secret_is_shipped_and_none_is_in_plain_text(objects: Objects) -> None:
    assert not named(objects, "Secret")
    secret = re.compile(r"(PASSWORD|TOKEN|SECRET|CREDENTIAL|STORE_URI)(?!.*_PATH$)")
    seen = 0
    for owner, template in pods(objects).items():
        for container in containers(template["spec"]):
            for variable in container.get("env", []):
                if secret.search(variable["name"]):
                    seen += 1
                    assert "secretKeyRef" in variable.get("valueFrom", {}), (owner, variable)
    assert seen >= 3


def test_pods_pass_restricted_and_more(objects: Objects) -> None:
    found = pods(objects)
    assert len(found) >= 6
    for owner, template in found.items():
        pod = template["spec"]
        assert violations(pod) == [], owner
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, owner
            limits = container["resources"]["limits"]
            assert {"cpu", "memory"} <= limits.keys(), owner
            assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"]), owner
        for volume in pod["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"].get("sizeLimit"), (owner, volume)


def training_job(profile: str) -> dict[str, Any]:
    """The TrainJob of two nodes that a profile makes."""
    config = load_profile(profile, ["images.registry=registry.example.com/modelmill"]).trainjob
    assert config is not None
    processes = max(1, config.devices_per_node * config.processes_per_device)
    training = TrainingConfig(
        steps=1,
        global_batch_size=2 * processes,
        micro_batch_size=1,
        parallel=ParallelConfig(nodes=2, processes_per_node=processes),
    )
    job = TrainingJob(
        "package.module", {}, training, Path(config.mount) / "store/pretrain/0123456789ab.partial/scratch"
    )
    return trainjob_render.render(job, config, attempt="1", launched=time.time(), environment={})


@pytest.mark.parametrize("profile", CLUSTER_PROFILES)
def test_training_pods_pass_restricted(profile: str, overlays: dict[str, Objects]) -> None:
    job = training_job(profile)
    runtime = named(overlays["eks"], "ClusterTrainingRuntime")[job["spec"]["runtimeRef"]["name"]]
    pod = pod_template(job, runtime)["spec"]
    assert violations(pod) == []
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert paths == {"/tmp", "/dev/shm", "/mnt/modelmill"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] == load_profile(profile).trainjob.grace_seconds  # type: ignore[union-attr]
    assert pod["restartPolicy"] == "Never"


def test_restricted_finds_what_it_should(overlays: dict[str, Objects]) -> None:
    runtime = named(overlays["eks"], "ClusterTrainingRuntime")["torch-gpu"]
    job = training_job("eks-p5")
    patch = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = patch["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}, "privileged": True}
    pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    pod["hostIPC"] = True
    found = violations(pod_template(job, runtime)["spec"])
    assert found == [
        "hostIPC is set",
        "volume host is a hostPath",
        "node: privileged",
        "node: capabilities ['IPC_LOCK'] are added",
    ]


def test_images_are_pinned(objects: Objects) -> None:
    for owner, template in pods(objects).items():
        if owner.startswith("ClusterTrainingRuntime"):
            continue  # the job brings it
        for container in containers(template["spec"]):
            assert re.search(r"@sha256:[0-9a-f]{64}$|:\d+(\.\d+)+([-.][a-z0-9]+)?$", container["image"]), owner


def test_images_of_eks_are_pinned_by_digest(overlays: dict[str, Objects]) -> None:
    images = [c["image"] for t in pods(overlays["eks"]).values() for c in t["spec"]["containers"] if "image" in c]
    assert len(images) == 3
    assert all(re.search(r"^registry\.example\.com/modelmill/modelmill-.*@sha256:", image) for image in images)


def test_roles_grant_the_least(objects: Objects) -> None:
    roles = named(objects, "Role")
    assert not named(objects, "ClusterRole")
    assert not named(objects, "ClusterRoleBinding")
    for name, role in roles.items():
        for rule in role["rules"]:
            granted = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in granted, name
            if "secrets" in rule["resources"]:
                assert rule["verbs"] == ["get"], name
                assert rule["resourceNames"], name
    writes = {"create", "update", "patch", "delete", "deletecollection"}
    launcher = [rule for rule in roles["trainjob-launcher"]["rules"] if writes & set(rule["verbs"])]
    assert [rule["resources"] for rule in launcher] == [["trainjobs"]]
    bound = {
        subject["name"]: each["roleRef"]["name"]
        for each in named(objects, "RoleBinding").values()
        for subject in each["subjects"]
    }
    assert "modelmill-trainer" not in bound, "training pods have no business with the API"


def test_the_launchers_role_is_what_doctor_asks_about(objects: Objects) -> None:
    granted = {
        (verb, resource)
        for role in ("trainjob-launcher", "pipeline-steps")
        for rule in named(objects, "Role")[role]["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert set(cluster._OF_LAUNCHER) <= granted


def test_doctors_job_passes_restricted() -> None:
    assert violations(inside.job(load_profile("kind"), "doctor")["spec"]["template"]["spec"]) == []


def policies(filled: Path) -> list[Path]:
    return sorted([*(filled / "cluster/iam").glob("*.json"), *(filled / "cluster/s3").glob("*policy.json")])


def test_iam_documents_name_actions_and_resources(filled: Path) -> None:
    found = policies(filled)
    assert len(found) >= 9
    for path in found:
        document = json.loads(path.read_text())
        assert document["Version"] == "2012-10-17"
        for statement in document["Statement"]:
            assert "NotAction" not in statement, path.name
            assert "NotResource" not in statement, path.name
            if statement["Effect"] == "Deny":
                continue
            actions, resources = statement["Action"], statement.get("Resource", [])
            assert not any("*" in action for action in actions), path.name
            assert all(re.fullmatch(r"[a-z0-9]+:[A-Z][A-Za-z]+", action) for action in actions), path.name
            if "Principal" in statement:
                assert statement["Condition"], path.name
            elif resources == ["*"]:
                assert set(actions) <= WITHOUT_RESOURCE, path.name
                assert statement["Condition"], path.name
            else:
                assert resources, path.name
                assert all(re.match(r"arn:aws:[a-z0-9]+:[a-z0-9-]*:\d*:[^*]{3,}", each) for each in resources), (
                    path.name
                )


def test_each_role_reaches_its_own_prefixes(filled: Path) -> None:
    def prefixes(name: str) -> set[str]:
        statements = json.loads((filled / f"cluster/iam/{name}.json").read_text())["Statement"]
        found = [each for s in statements for each in s["Resource"] if each.startswith("arn:aws:s3:::team-models/")]
        return {each.removeprefix("arn:aws:s3:::team-models/").partition("/")[0] for each in found}

    assert prefixes("mlflow") == {"mlflow"}
    assert prefixes("runner") == {"data", "models", "store", "kfp"}
    assert prefixes("trainer") == {"data", "models", "store"}
    for name in ("execution", "launcher", "serving"):
        assert prefixes(f"sagemaker-{name}") == {"sagemaker"}
    trainer = json.loads((filled / "cluster/iam/trainer.json").read_text())["Statement"]
    assert {action for each in trainer for action in each["Action"]} == {"s3:GetObject", "s3:ListBucket"}


def test_rights_cover_the_calls_that_training_jobs_make(filled: Path) -> None:
    code = (Path(render.__file__).parents[1] / "components/launchers/sagemaker.py").read_text()
    calls = set(re.findall(r"sagemaker\.([a-z]+(?:_[a-z]+)+)\(", code))
    assert calls >= {"create_training_job", "describe_training_job", "stop_training_job"}
    statements = json.loads((filled / "cluster/iam/sagemaker-launcher.json").read_text())["Statement"]
    granted = {action for each in statements for action in each["Action"]}
    assert {"sagemaker:" + "".join(map(str.capitalize, call.split("_"))) for call in calls} <= granted
    jobs = next(each["Resource"] for each in statements if "sagemaker:CreateTrainingJob" in each["Action"])
    assert jobs == ["arn:aws:sagemaker:eu-west-1:111122223333:training-job/modelmill-*"]


def test_rights_cover_what_the_shipped_recipe_serves(filled: Path) -> None:
    endpoint = catalog.load("sagemaker/forecaster-endpoint").model_dump()["endpoint"]
    statements = json.loads((filled / "cluster/iam/sagemaker-serving.json").read_text())["Statement"]
    granted = [resource for each in statements for resource in each["Resource"]]
    wanted = {"endpoint": endpoint["name"], "model-package-group": endpoint["group"]}
    for kind, name in wanted.items():
        arn = f"arn:aws:sagemaker:eu-west-1:111122223333:{kind}/{name}"
        assert any(fnmatchcase(arn, resource) for resource in granted), arn


def test_nodes_keep_their_credentials_and_encrypt_their_disks(overlays: dict[str, Objects]) -> None:
    for name, each in named(overlays["eks"], "EC2NodeClass").items():
        options = each["spec"]["metadataOptions"]
        assert (options["httpTokens"], options["httpPutResponseHopLimit"]) == ("required", 1), name
        assert all(disk["ebs"]["encrypted"] for disk in each["spec"]["blockDeviceMappings"]), name
        assert not each["spec"]["amiSelectorTerms"][0]["alias"].endswith("latest"), name
    assert named(overlays["eks"], "StorageClass")["gp3"]["parameters"]["encrypted"] == "true"


def test_pods_cannot_reach_the_nodes_metadata(objects: Objects) -> None:
    for each in objects:
        if each["kind"] != "NetworkPolicy":
            continue
        for rule in each["spec"].get("egress", []):
            for peer in rule.get("to", []):
                block = peer.get("ipBlock", {})
                if block.get("cidr") == "0.0.0.0/0":
                    assert "169.254.169.254/32" in block["except"], each["metadata"]["name"]
                    assert rule["ports"], "the whole world, on every port"
