"""What a run uses besides Kubernetes: registry, bucket, MLflow, Kubeflow Pipelines; and the look from inside."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands.serving import doctor_command
from modelmill.pipelines.doctor import inside, registry, services
from modelmill.pipelines.doctor.kube import Kube
from modelmill.pipelines.doctor.registry import Reference
from tests import schemas
from tests.fakes.kubernetes_api import KubernetesApi
from tests.pipelines.a_cluster import furnish, profile, the

Answer = tuple[int, dict[str, str], bytes]
DIGEST = "sha256:" + "b" * 64


class Server:
    """Answers by (method, path) on loopback and remembers what was asked."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Callable[[Any], Answer] | Answer] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _serve(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                outer.requests.append((self.command, self.path, dict(self.headers)))
                found = outer.answers.get((self.command, path), (404, {}, b"{}"))
                status, headers, body = found(self.headers) if callable(found) else found
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_POST = do_HEAD = _serve

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as made:
        yield made


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("python:3.11", ("docker.io", "library/python", "3.11")),
        ("team/image", ("docker.io", "team/image", "latest")),
        (f"registry.example.com/a/b:1@{DIGEST}", ("registry.example.com", "a/b", DIGEST)),
        ("localhost:5000/a:1", ("localhost:5000", "a", "1")),
        ("localhost/a:1", ("localhost", "a", "1")),
    ],
)
def test_references_are_read_as_engines_read_them(text: str, parsed: tuple[str, str, str]) -> None:
    assert Reference.parse(text) == Reference(*parsed)


def images(server: Server, version: str) -> Any:
    (found,) = services.images(profile("eks-cpu", f"images.cpu={server.host}/modelmill-cpu{version}"))
    return found


def test_image_by_digest_in_its_registry(server: Server) -> None:
    server.answers["HEAD", f"/v2/modelmill-cpu/manifests/{DIGEST}"] = (200, {}, b"")
    assert images(server, f"@{DIGEST}").level == "ok"
    assert [method for method, *_ in server.requests] == ["HEAD"], "nothing is pulled"


def test_tag_is_a_warning_and_absence_a_failure(server: Server) -> None:
    server.answers["HEAD", "/v2/modelmill-cpu/manifests/1"] = (200, {}, b"")
    assert "a tag can move" in images(server, ":1").text
    found = images(server, ":2")
    assert (found.level, found.fix) == ("fail", "python -m images.build cpu, then push it")


def test_registry_that_wants_a_token_gets_an_anonymous_one(server: Server) -> None:
    challenge = f'Bearer realm="http://{server.host}/token",service="registry",scope="repository:modelmill-cpu:pull"'
    path = f"/v2/modelmill-cpu/manifests/{DIGEST}"
    server.answers["GET", "/token"] = (200, {}, b'{"token": "t"}')
    server.answers["HEAD", path] = lambda headers: (
        (200, {}, b"") if headers.get("Authorization") == "Bearer t" else (401, {"WWW-Authenticate": challenge}, b"")
    )
    assert images(server, f"@{DIGEST}").level == "ok"
    assert "scope=repository%3Amodelmill-cpu%3Apull" in server.requests[1][1]


def test_private_or_silent_registry_is_no_verdict(server: Server) -> None:
    server.answers["HEAD", f"/v2/modelmill-cpu/manifests/{DIGEST}"] = (401, {"WWW-Authenticate": "Basic"}, b"")
    found = images(server, f"@{DIGEST}")
    assert found.level == "warn"
    assert "nodes pull it with their own role" in found.text
    server.close()
    assert "does not answer" in images(server, f"@{DIGEST}").text
    server.__init__()  # type: ignore[misc]


def test_labels_come_from_the_image_for_amd64(server: Server) -> None:
    index = {"manifests": [{"digest": DIGEST, "platform": {"architecture": "amd64"}}]}
    base = "/v2/modelmill-cpu"
    server.answers["GET", f"{base}/manifests/1"] = (200, {}, json.dumps(index).encode())
    server.answers["GET", f"{base}/manifests/{DIGEST}"] = (200, {}, b'{"config": {"digest": "sha256:c"}}')
    elsewhere = {"Location": f"http://{server.host}/signed"}
    server.answers["GET", f"{base}/blobs/sha256:c"] = (307, elsewhere, b"")
    server.answers["GET", "/signed"] = (200, {}, b'{"config": {"Labels": {"a": "b"}}}')
    assert registry.labels(f"{server.host}/modelmill-cpu:1") == {"a": "b"}
    assert registry.labels(f"{server.host}/other:1") == {}


def tracking(server: Server, **named: Any) -> Any:
    (found,) = services.tracking(profile("eks-cpu", f"tracking.ui=http://{server.host}"), **named)
    return found


SEARCH = ("POST", "/api/2.0/mlflow/experiments/search")


@pytest.mark.parametrize(
    ("version", "search", "level", "text"),
    [
        ((200, {}, b"3.17.2"), (200, {}, b"{}"), "ok", "3.17.2 at http://"),
        ((403, {}, b"Invalid Host header"), (200, {}, b"{}"), "fail", "refuses this host name"),
        ((401, {}, b""), (401, {}, b""), "fail", "refuses the login"),
        ((200, {}, b"3.17.2"), (403, {}, b""), "fail", "refuses the login"),
        ((502, {}, b""), (200, {}, b"{}"), "fail", "answers 502"),
        ((200, {}, b"3.17.2"), (500, {}, b"no database"), "fail", "answers 500 to a search: no database"),
    ],
    ids=["good", "host", "login", "login-of-search", "gateway", "database"],
)
def test_mlflow_answers(server: Server, version: Answer, search: Answer, level: str, text: str) -> None:
    server.answers |= {("GET", "/version"): version, SEARCH: search}
    found = tracking(server)
    assert found.level == level
    assert text in found.text


def test_mlflow_gets_the_login_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "u")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    server.answers |= {("GET", "/version"): (200, {}, b"3.17.2"), SEARCH: (200, {}, b"{}")}
    found = tracking(server)
    assert server.requests[-1][2]["Authorization"].startswith("Basic ")
    assert "secret" not in str(found)


def test_mlflow_inside_the_cluster_is_not_asked_from_here(server: Server) -> None:
    (found,) = services.tracking(profile("eks-cpu"))
    assert found.level == "warn"
    assert "--in-cluster" in found.fix
    server.close()
    assert "does not answer" in tracking(server).text
    server.__init__()  # type: ignore[misc]


def test_bucket_is_tried_with_a_named_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    boto3 = pytest.importorskip("boto3")
    from moto import mock_aws

    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with mock_aws():
        place = profile("eks-cpu", "store=s3://outputs/prefix")
        (found,) = services.bucket(place)
        assert found.level == "warn"
        assert "there is no such bucket" in found.text
        client = boto3.client("s3")
        client.create_bucket(Bucket="outputs", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        (found,) = services.bucket(place)
        assert found.level == "ok"
        assert "you (arn:aws:sts::123456789012:" in found.text
        assert "the service account was not tried" in found.text
        (found,) = services.bucket(place, who="service account modelmill-runner")
        assert found.text == "service account modelmill-runner can write to, read and delete in s3://outputs/prefix"
        assert client.list_objects_v2(Bucket="outputs")["KeyCount"] == 0, "nothing is left behind"
    assert list(services.bucket(profile("eks-cpu"))) == []


class Kfp:
    """An endpoint that answers, or says why not."""

    error = ""

    def __init__(self, place: Any) -> None:
        if self.error:
            raise UserError(self.error)
        self.address, self.namespace = "https://kfp.example.com", place.namespace

    def runs(self, limit: int) -> list[Any]:
        return []


def test_pipelines_are_asked_through_their_client(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelmill.pipelines.launch import kubeflow

    monkeypatch.setattr(kubeflow, "Endpoint", Kfp)
    (found,) = services.pipelines(profile())
    assert (found.level, found.text) == ("ok", "https://kfp.example.com is healthy, runs of modelmill can be listed")
    monkeypatch.setattr(Kfp, "error", "kfp.auth: token needs $KF_PIPELINES_TOKEN, which is not set")
    (found,) = services.pipelines(profile())
    assert (found.level, found.text) == ("fail", Kfp.error)


# The look from inside.


def pods_of(api: KubernetesApi, status: dict[str, Any], log: str = "") -> None:
    """Give every Job a pod of this status, as the cluster's own controller would."""

    def react(change: Any) -> None:
        if change.type != "ADDED" or change.item["kind"] != "Job":
            return
        name = change.item["metadata"]["name"]
        template = change.item["spec"]["template"]
        labels = {**template["metadata"]["labels"], "job-name": name}
        metadata = {"name": f"{name}-x", "namespace": change.item["metadata"]["namespace"], "labels": labels}
        threading.Thread(target=make, args=({"metadata": metadata, "spec": template["spec"]},)).start()

    def make(pod: dict[str, Any]) -> None:
        api.store.create({"apiVersion": "v1", "kind": "Pod", **pod})
        if log:
            api.log(pod["metadata"]["name"], "starting", log)
        api.store.set_status("pods", pod["metadata"]["name"], status)

    api.store.on_change.append(react)


def look(api: KubernetesApi, timeout: float = 20.0, place: Any = None) -> list[Any]:
    return inside.examine(place or profile(), Kube(api.client()), timeout, pause=0.05)


def test_job_reports_what_its_pod_found_and_is_deleted(api: KubernetesApi) -> None:
    line = [{"level": "fail", "subject": "volume", "text": "cannot be written", "fix": "chmod"}]
    pods_of(api, {"phase": "Succeeded"}, inside._MARK + json.dumps(line))
    assert [vars(each) for each in look(api)] == line
    assert api.store.all("jobs") == []
    assert api.store.rejected == []


@pytest.mark.parametrize(
    ("status", "log", "text"),
    [
        (
            {
                "phase": "Pending",
                "containerStatuses": [
                    {
                        "name": "doctor",
                        "ready": False,
                        "restartCount": 0,
                        "image": "x",
                        "imageID": "",
                        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}},
                    }
                ],
            },
            "",
            "the pod does not start: ImagePullBackOff: not found",
        ),
        (
            {
                "phase": "Pending",
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
                ],
            },
            "",
            "did not end in time: Unschedulable: 0/3 nodes",
        ),
        ({"phase": "Failed"}, "No module named modelmill", "exit code ?: No module named modelmill"),
    ],
    ids=["image", "unschedulable", "broken-image"],
)
def test_pod_that_does_not_look_is_explained(api: KubernetesApi, status: dict[str, Any], log: str, text: str) -> None:
    pods_of(api, status, log)
    found = the(look(api, 1.0), "in-cluster")
    assert found.level == "fail"
    assert text in found.text
    assert api.store.all("jobs") == []


def test_job_that_may_not_be_made_is_explained(api: KubernetesApi) -> None:
    api.allowed = lambda verb, resource, space: verb != "create"
    found = the(look(api), "in-cluster")
    assert "jobs.batch is forbidden" in found.text
    assert found.fix == "kubectl auth can-i create jobs -n modelmill"


def test_job_keeps_to_pod_security_and_carries_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hidden")
    made = inside.job(profile(), "modelmill-doctor-1")
    assert not schemas.problems(made)
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert pod["serviceAccountName"] == "modelmill-runner"
    assert "hidden" not in json.dumps(made)


def test_pod_looks_at_volume_and_services(tmp_path: Path) -> None:
    """The command of the Job, run here as the pod would run it."""
    place = profile("eks-cpu", "tracking.uri=http://127.0.0.1:9")
    (container,) = inside.job(place, "x")["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    environment = {**given, "MODELMILL_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    import sys

    done = subprocess.run([sys.executable, *container["command"][1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition(inside._MARK)[2])
    assert [(each["level"], each["subject"]) for each in found] == [("ok", "volume"), ("fail", "mlflow")]
    assert found[0]["text"].startswith(f"in the cluster: {tmp_path} can be written and locked")
    assert list(tmp_path.iterdir()) == []


# The command.


@pytest.fixture
def command(api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.delenv("MODELMILL_CATALOG", raising=False)
    monkeypatch.setattr(services, "examine", lambda place: [])
    furnish(api, profile())
    arguments = ["--profile", "eks-p5", "--profile-set", "images.registry=registry.example.com/modelmill"]
    return lambda *more: CliRunner().invoke(doctor_command, [*arguments, *more])


def test_command_prints_findings_and_their_fixes(command: Callable[..., Any], api: KubernetesApi) -> None:
    done = command()
    assert done.exit_code == 0, done.output
    assert "ok  queue" not in done.output
    assert "ok  quota" in done.output
    api.store.remove(next(key for key in api.store.objects if key[3] == "modelmill-home"))
    done = command()
    assert done.exit_code == 1
    assert "claim modelmill-home does not exist; kubectl apply" in done.output


def test_command_prints_json_and_takes_nodes_from_the_recipe(command: Callable[..., Any]) -> None:
    found = json.loads(command("--json").stdout)
    assert {each["subject"] for each in found} >= {"profile", "kubernetes", "quota", "nodes"}
    assert {tuple(each) for each in found} == {("level", "subject", "text", "fix")}
    done = command("gpu/llama3-8b", "--json")
    (quota,) = [each for each in json.loads(done.stdout) if each["subject"] == "quota"]
    assert "never holds cpu 1472, memory 14400 GiB, nvidia.com/gpu 64" in quota["text"], "8 nodes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in-cluster"], "need --profile NAME"),
        (["gpu/llama3-8b"], "need --profile NAME"),
        (["--profile", "laptop"], "laptop is this machine"),
        (["--profile", "eks-p6"], "eks-p6"),
    ],
)
def test_command_refuses_what_makes_no_sense(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(doctor_command, arguments)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
