"""A team's values become manifests, and what is missing or wrong is named before anything is applied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from manifests import render
from modelmill.components.core.errors import UserError
from modelmill.pipelines.platform import load_profile
from tests.manifests.conftest import VALUES, kustomize, named


def test_shipped_values_name_nothing_and_are_refused_by_name(tmp_path: Path) -> None:
    values = render.load_values(render.SOURCE / "values.yaml")
    assert not any(value for value in values.model_dump().values() if isinstance(value, str))
    with pytest.raises(UserError, match=r"account, .*bucket, .* not set"):
        render.render(values, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_template_lists_every_value_a_team_must_set() -> None:
    listed = set(yaml.safe_load((render.SOURCE / "values.yaml").read_text()))
    assert listed == set(render.Values.model_fields) - {"oidc_provider"}


def test_every_placeholder_is_filled(filled: Path) -> None:
    for path in filter(Path.is_file, filled.rglob("*")):
        assert not render._PLACEHOLDER.search(path.read_text()), path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("account", "1111"),
        ("bucket", "s3://team-models"),
        ("node_ami", "al2023@latest"),
        ("cpu_digest", "0.1.0"),
        ("fsx_id", "home"),
    ],
)
def test_a_value_of_the_wrong_form_is_named(name: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "team.yaml"
    file.write_text(yaml.safe_dump({**VALUES, name: value}))
    with pytest.raises(UserError, match=f"^{name}: .*{value}"):
        render.load_values(file)


def test_a_misspelt_value_is_suggested(tmp_path: Path) -> None:
    file = tmp_path / "team.yaml"
    file.write_text(yaml.safe_dump({"node_p5": 2}))
    with pytest.raises(UserError, match="node_p5: no such parameter; did you mean nodes_p5"):
        render.load_values(file)


def test_a_part_needs_its_own_values_only(tmp_path: Path) -> None:
    """The cluster comes before its file system: nothing of FSx or the images is known yet."""
    later = {"fsx_id", "fsx_mount_name", "fsx_security_group", "cpu_digest", "mlflow_digest", "registry", "node_ami"}
    values = render.Values.model_validate({name: value for name, value in VALUES.items() if name not in later})
    render.render(values, tmp_path, only="cluster")
    assert (tmp_path / "cluster/cluster.yaml").is_file()
    assert not (tmp_path / "base").exists()
    with pytest.raises(UserError, match="fsx_id"):
        render.render(values, tmp_path)


def test_roles_without_pod_identity_are_left_out_by_name(tmp_path: Path) -> None:
    values = render.Values.model_validate({**VALUES, "oidc_provider": ""})
    assert [str(path) for path in render.render(values, tmp_path)] == ["cluster/iam/trust-irsa.json"]
    assert not (tmp_path / "cluster/iam/trust-irsa.json").exists()


def test_rendering_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    values = render.Values.model_validate(VALUES)
    render.render(values, tmp_path)
    (tmp_path / "base/stale.yaml").touch()
    render.render(values, tmp_path)
    assert not (tmp_path / "base/stale.yaml").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/mine.txt").touch()
    with pytest.raises(UserError, match="not manifests of ours"):
        render.render(render.Values.model_validate(VALUES), tmp_path)
    assert (tmp_path / "base/mine.txt").exists()


def test_quota_is_the_jobs_of_that_many_nodes(overlays: dict[str, list[dict]]) -> None:
    queue = named(overlays["eks"], "ClusterQueue")["modelmill"]
    flavors = {each["name"]: each["resources"] for each in queue["spec"]["resourceGroups"][0]["flavors"]}
    for name, nodes in (("p5", 2), ("trn1", 3), ("cpu", 4)):
        job = load_profile(f"eks-{name}").trainjob
        assert job is not None
        quota = {entry["name"]: entry["nominalQuota"] for entry in flavors[name]}
        assert quota["cpu"] == str(nodes * int(job.cpu))
        assert quota["memory"] == f"{nodes * int(job.memory.removesuffix('Gi'))}Gi"
        assert quota["vpc.amazonaws.com/efa"] == str(nodes * job.efa_per_node)
        for resource in ("nvidia.com/gpu", "aws.amazon.com/neuron"):
            asked = job.devices_per_node if job.accelerator == resource else 0
            assert quota[resource] == str(nodes * asked)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "team.yaml"
    file.write_text(yaml.safe_dump({**VALUES, "oidc_provider": ""}))
    assert render.main(["--values", str(file), "-o", str(tmp_path / "out")]) == 0
    assert "left out cluster/iam/trust-irsa.json" in capsys.readouterr().out
    file.write_text("account: 5\n")
    assert render.main(["--values", str(file), "-o", str(tmp_path / "out")]) == 2
    assert "account" in capsys.readouterr().err
    assert render.main(["--describe"]) == 0
    assert "fsx_mount_name" in capsys.readouterr().out


def test_a_second_team_is_the_same_folder_under_another_name(filled: Path, tmp_path: Path) -> None:
    """As docs/operations.md tells it: every object moves, and so do the subjects of the role bindings."""
    team = filled / "overlays/team-b"
    team.mkdir(exist_ok=True)
    (team / "kustomization.yaml").write_text("namespace: team-b\nresources: [../../base/team]\n")
    made = kustomize(team)
    assert named(made, "Namespace").keys() == {"team-b"}
    assert {each["metadata"].get("namespace", "team-b") for each in made} == {"team-b"}
    bindings = named(made, "RoleBinding").values()
    assert {subject["namespace"] for each in bindings for subject in each["subjects"]} == {"team-b"}


def test_roles_by_annotation_for_clusters_without_pod_identity(filled: Path) -> None:
    overlay = filled / "overlays/irsa"
    overlay.mkdir(exist_ok=True)
    (overlay / "kustomization.yaml").write_text("resources: [../eks]\ncomponents: [../../components/irsa]\n")
    accounts = named(kustomize(overlay), "ServiceAccount")
    trust = json.loads((filled / "cluster/iam/trust-irsa.json").read_text())["Statement"][0]
    subjects = next(v for k, v in trust["Condition"]["StringEquals"].items() if k.endswith(":sub"))
    for subject in subjects:
        namespace, name = subject.split(":")[2:]
        role = accounts[name]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        assert accounts[name]["metadata"]["namespace"] == namespace
        assert role.startswith(f"arn:aws:iam::{VALUES['account']}:role/modelmill-")
    assert "annotations" not in accounts["modelmill-reaper"]["metadata"]


def test_kfp_component_configures_an_installation_of_kfp(filled: Path, tmp_path: Path) -> None:
    """The parts of KFP that the component changes, under KFP's own names."""
    install = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "pipeline-install-config"},
        "data": {"a": "b"},
    }
    container = {"name": "ml-pipeline-api-server", "image": "server", "env": [{"name": "A", "value": "b"}]}
    server = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "ml-pipeline"},
        "spec": {
            "selector": {"matchLabels": {"app": "ml-pipeline"}},
            "template": {"metadata": {"labels": {"app": "ml-pipeline"}}, "spec": {"containers": [container]}},
        },
    }
    platform = filled / "platform"
    platform.mkdir(exist_ok=True)
    (platform / "kfp.yaml").write_text(yaml.safe_dump_all([install, server]))
    (platform / "kustomization.yaml").write_text(
        "namespace: kubeflow\nresources: [kfp.yaml]\ncomponents: [../cluster/kfp]\n"
    )
    made = kustomize(platform)
    assert named(made, "ConfigMap")["pipeline-install-config"]["data"]["defaultSecurityContextRunAsNonRoot"] == "true"
    plugin = json.loads(named(made, "ConfigMap")["kfp-mlflow-config"]["data"]["config.json"])["plugins"]["mlflow"]
    tracking = load_profile("eks-cpu").tracking
    assert plugin["endpoint"] == tracking.uri
    pod = named(made, "Deployment")["ml-pipeline"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/config/config.json"
    assert pod["containers"][0]["env"] == container["env"], "merged, not replaced"
