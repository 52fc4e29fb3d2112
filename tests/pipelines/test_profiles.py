"""Profiles: those that ship, a team's own, what is refused, and how a plan shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from modelmill.components.core.errors import UserError
from modelmill.components.launchers.trainjob_render import cores
from modelmill.components.training import estimate
from modelmill.pipelines import catalog, placement
from modelmill.pipelines.cli import cli
from modelmill.pipelines.platform import PROFILES_VARIABLE, load_profile, profile_names

SHIPPED = ["eks-cpu", "eks-g6", "eks-gpu", "eks-p4d", "eks-p5", "eks-trn1", "eks-trn2", "kind", "laptop"]
EKS = [name for name in SHIPPED if name.startswith("eks-")]
# Instance -> (devices, EFA interfaces, CPUs, MiB of memory left for pods), from Karpenter's instance type reference.
INSTANCES = {
    "m7i.8xlarge": (0, 0, 31.85, 118312),
    "g6.48xlarge": (8, 1, 191.45, 718987),
    "p4d.24xlarge": (8, 4, 95.69, 1082712),
    "p5.48xlarge": (8, 32, 191.45, 1938410),
    "trn1.32xlarge": (16, 8, 127.61, 481894),
    "trn2.48xlarge": (16, 16, 191.45, 1938410),
    "g6.4xlarge": (1, 0, 15.89, 57691),
    "g6e.4xlarge": (1, 0, 15.89, 118312),
}
REGISTRY = "images.registry=registry.example.com/modelmill"


def gib(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


def test_the_profiles_of_the_issue_ship() -> None:
    assert profile_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_carries_its_name_and_nothing_of_a_team(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    assert not profile.price_per_hour
    assert profile.images.registry in ("", "localhost")
    assert profile.store is None
    assert profile.device is None or profile.device in estimate.known_devices()


@pytest.mark.parametrize("name", EKS)
def test_a_job_asks_for_a_whole_node_that_exists(name: str) -> None:
    job = load_profile(name).trainjob
    assert job is not None
    devices, efa, cpus, memory = INSTANCES[job.node_selector["node.kubernetes.io/instance-type"]]
    assert (job.devices_per_node, job.efa_per_node) == (devices, efa)
    assert 0.85 * cpus <= cores(job.cpu) < cpus, "a node's own pods need some"
    assert 0.85 * memory <= gib(job.memory) * 1024 < memory
    assert gib(job.shared_memory) < gib(job.memory), "shared memory counts against the pod's"
    assert job.environment["GLOO_SOCKET_IFNAME"] == "eth0"
    assert ("FI_PROVIDER" in job.environment) == bool(efa)
    taint = {"nvidia.com/gpu", "aws.amazon.com/neuron"} & {each.key for each in job.tolerations}
    assert taint == ({job.accelerator} if job.accelerator else set())


@pytest.mark.parametrize(("name", "processes"), [("eks-p5", 8), ("eks-trn1", 32), ("eks-trn2", 64)])
def test_processes_of_a_node(name: str, processes: int) -> None:
    job = load_profile(name).trainjob
    assert job is not None
    assert job.devices_per_node * job.processes_per_device == processes


@pytest.mark.parametrize("name", [name for name in EKS if "trn" not in name])
def test_device_steps_fit_their_node(name: str) -> None:
    place = load_profile(name).device_step
    assert place is not None
    instance = place.node_selector.get("node.kubernetes.io/instance-type", "m7i.8xlarge")
    devices, _, cpus, memory = INSTANCES[instance]
    assert place.accelerator_count == devices
    assert cores(place.cpu) < cpus
    assert gib(place.memory) * 1024 < memory


@pytest.mark.parametrize("name", EKS)
def test_a_run_without_a_registry_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"images\.registry: empty; set it in a profile .* extends {name}"):
        load_profile(name).check_submittable()
    load_profile(name, [REGISTRY]).check_submittable()


def test_laptop_profile_is_not_for_a_cluster() -> None:
    with pytest.raises(UserError, match="laptop is for this machine"):
        load_profile("laptop").check_submittable()


def test_what_a_job_shares_with_its_run_is_said_once() -> None:
    profile = load_profile("eks-trn1", [REGISTRY, "namespace=team-a", "home.claim=lustre", "home.mount=/fsx"])
    job = profile.trainjob
    assert job is not None
    assert (job.namespace, job.claim, job.mount) == ("team-a", "lustre", "/fsx")
    assert job.image == profile.image("neuron")
    own = load_profile("eks-trn1", [REGISTRY, "trainjob.image=other@sha256:1", "trainjob.namespace=jobs"]).trainjob
    assert own is not None
    assert (own.image, own.namespace) == ("other@sha256:1", "jobs")


def test_a_teams_folder_extends_and_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "team.yaml").write_text(
        "extends: eks-p5\nname: team\nimages: {registry: registry.example.com/team}\nprice_per_hour: 50\n"
    )
    (tmp_path / "kind.yaml").write_text("name: kind\ndescription: Ours.\nwhere: laptop\n")
    monkeypatch.setenv(PROFILES_VARIABLE, str(tmp_path))
    assert profile_names() == sorted([*SHIPPED, "team"])
    team = load_profile("team")
    assert team.image("gpu").startswith("registry.example.com/team/modelmill-gpu")
    assert team.trainjob == load_profile("eks-p5", ["images.registry=registry.example.com/team"]).trainjob
    assert load_profile("kind").description == "Ours."
    team.check_submittable()


def test_the_example_of_the_documentation_is_a_profile(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/profiles.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "team-p5.yaml").write_text(example)
    profile = load_profile(str(tmp_path / "team-p5.yaml"))
    profile.check_submittable()
    assert profile.secrets == {"HF_TOKEN": "modelmill-hub/HF_TOKEN"}


def test_a_profile_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: eks-cpu\nname: mine\nstep: {cpu: '8'}\n")
    profile = load_profile(str(file))
    assert (profile.step.cpu, profile.step.memory) == ("8", "16Gi")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("images.registy=x", ["images.registy", "did you mean registry?"]),
        ("trainjob.efa=2", ["trainjob.efa", "efa_per_node"]),
        ("device_step.tolerations=[{kei: x}]", ["tolerations.0.kei", "key"]),
        ("launcher=slurm", ["launcher", "'slurm'", "trainjob"]),
        ("launcher=sagemaker", ["sagemaker: missing"]),
        ("home=null", ["home: missing", "share one volume"]),
        ("step_timeout_seconds=60", ["step_timeout_seconds: 60", "deadline_seconds 1209600", "raise it"]),
        ("trainjob.deadline_seconds=null", ["step_timeout_seconds: 1213200", "None"]),
        ("retries=-1", ["retries", "-1"]),
        ("name", ["--profile-set", "key=value", "images.registry"]),
    ],
)
def test_wrong_override_names_parameter_value_and_fix(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_profile("eks-p5", [override])
    for word in words:
        assert word in str(refused.value)


def test_unknown_profiles_are_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="profile: no profile is called 'eks-p55'; did you mean eks-p5"):
        load_profile("eks-p55")
    with pytest.raises(UserError, match=r"profile: team\.yaml does not exist"):
        load_profile("team.yaml")
    monkeypatch.setenv(PROFILES_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UserError, match=f"{PROFILES_VARIABLE}: .*gone is not a folder"):
        profile_names()


def test_profiles_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_profile(str(tmp_path / "a.yaml"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(PROFILES_VARIABLE, raising=False)
    return tmp_path / "home"


def plan(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["plan", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_plan_shows_where_each_step_runs(home: Path) -> None:
    found = plan("gpu/llama3-8b", "--profile", "eks-p5", "--profile-set", REGISTRY)
    places = {(each["step"], each["kind"]): each for each in found["steps"]}
    assert [each["step"] for each in found["steps"] if each["kind"] == "pod"] == [
        step.name for step in catalog.load("gpu/llama3-8b").steps()
    ]
    job = places["pretrain", "trainjob"]
    assert (job["count"], job["asks"]["nvidia.com/gpu"], job["queue"]) == (8, "8", "training")
    assert job["image"].startswith("registry.example.com/modelmill/modelmill-gpu")
    assert job["nodes"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
    assert places["ingest_corpus", "pod"]["asks"] == {"cpu": "4", "memory": "16Gi"}
    assert places["evaluate_heldout", "pod"]["asks"]["nvidia.com/gpu"] == "1"
    training = found["training"]
    assert (training["device"], training["device_bytes"]) == ("h100", 80 * 2**30)
    assert training["cost"] is None
    assert not home.exists(), "a plan touches nothing"


def test_plan_says_what_is_inadmissible(home: Path) -> None:
    found = plan("trainium/llama2-7b", "--profile", "eks-trn2")
    assert len(found["problems"]) == 2
    assert found["problems"][0].startswith("images.registry: empty")
    assert "processes_per_node: 32" in found["problems"][1]
    assert plan("trainium/llama2-7b", "--profile", "eks-trn1", "--profile-set", REGISTRY)["problems"] == []


def test_the_layout_of_a_searchs_trials_is_checked_too(home: Path) -> None:
    wanted = ("gpu/chronos-t5-small", "--profile", "eks-p5", "--profile-set", REGISTRY)
    (problem,) = plan(*wanted)["problems"]
    assert "processes_per_node: 1" in problem
    assert "step tune" in problem
    assert plan(*wanted, "--profile-set", "trainjob.devices_per_node=1")["problems"] == []


@pytest.mark.parametrize("recipe", ["gpu/chronos-t5-small", "gpu/chronos2-lora", "gpu/embedding-modernbert"])
def test_recipes_of_one_process_run_on_one_gpu(recipe: str, home: Path) -> None:
    found = plan(recipe, "--profile", "eks-gpu", "--profile-set", REGISTRY)
    assert found["problems"] == []
    assert {each["kind"] for each in found["steps"]} == {"pod"}
    assert {each["asks"].get("nvidia.com/gpu") for each in found["steps"]} == {None, "1"}
    refused = plan("gpu/llama3-8b-lora", "--profile", "eks-gpu", "--profile-set", REGISTRY)["problems"]
    assert "more than the 1 devices" in refused[0]


def test_plan_says_when_the_deadline_comes_first(home: Path) -> None:
    found = plan("gpu/llama3-8b", "--profile", "eks-p5", "--profile-set", REGISTRY)
    assert found["problems"][0].startswith("trainjob.deadline_seconds: 14.0 days")
    longer = ["--profile-set", "trainjob.deadline_seconds=9000000", "--profile-set", "step_timeout_seconds=9000001"]
    assert plan("gpu/llama3-8b", "--profile", "eks-p5", "--profile-set", REGISTRY, *longer)["problems"] == []


def test_plan_costs_what_the_profile_says_a_node_costs(home: Path) -> None:
    found = plan("gpu/llama3-8b", "--profile", "eks-p5", "--profile-set", "price_per_hour=10")["training"]
    assert found["cost"] == pytest.approx(10 * 8 * found["seconds"] / 3600)
    told = plan("gpu/llama3-8b", "--profile", "eks-p5", "--profile-set", "price_per_hour=10", "--price-per-hour", "5")
    assert told["training"]["cost"] == pytest.approx(found["cost"] / 2)


def test_plan_promises_nothing_about_cpus_elsewhere(home: Path) -> None:
    assert plan("laptop/llama-demo", "--profile", "eks-cpu")["training"]["seconds"] is None


def test_plan_for_people(home: Path) -> None:
    done = CliRunner().invoke(cli, ["plan", "gpu/llama3-8b-lora", "--profile", "eks-p4d"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "On eks-p4d: Nodes of 8 A100" in done.output
    assert "trainjob, 1 nodes" in done.output
    assert "p4d.24xlarge, queue training" in done.output
    assert "Not admissible as it is\n  images.registry: empty" in done.output


def test_plan_with_the_laptops_profile_is_the_plan(home: Path) -> None:
    assert plan("laptop/llama-demo", "--profile", "laptop")["steps"] == plan("laptop/llama-demo")["steps"]


def test_managed_jobs_have_their_own_place(home: Path) -> None:
    image = "111122223333.dkr.ecr.eu-west-1.amazonaws.com/modelmill@sha256:" + "1" * 64
    role = "arn:aws:iam::111122223333:role/jobs"
    sagemaker = f"{{role: '{role}', image: '{image}', instance_type: ml.p5.48xlarge, output: 's3://team/jobs'}}"
    overrides = [REGISTRY, "launcher=sagemaker", f"sagemaker={sagemaker}"]
    found = placement.places(catalog.load("gpu/llama3-8b"), load_profile("eks-p5", overrides))
    job = next(each for each in found if each.kind == "sagemaker")
    assert (job.count, job.asks, job.image) == (8, {"ml.p5.48xlarge": "1"}, image)


def test_list_shows_the_profiles(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.yaml").write_text("extends: eks-p5\nwher: there\n")
    monkeypatch.setenv(PROFILES_VARIABLE, str(tmp_path))
    listed = json.loads(CliRunner().invoke(cli, ["list", "--json"], catch_exceptions=False).stdout)["profiles"]
    found = {each["name"]: each for each in listed}
    assert found.keys() == {*SHIPPED, "broken"}
    assert found["broken"]["problem"].startswith("broken: wher: no such parameter")
    assert found["eks-p5"]["description"]
