"""A small Kubeflow Pipelines API (v2beta1) on loopback that keeps state: what the real `kfp.Client` talks to in tests.

    with KfpApi(tmp_path) as api:
        api.fail(503, method="POST", path="/runs")    # the next matching request is answered with 503
        api.execute = True                            # submitted runs really run, each step a process (`kfp_engine`)

Every uploaded package is parsed strictly: unknown fields of the pipeline spec or of the Kubernetes platform spec are
refused, as are references that lead nowhere.
"""

from __future__ import annotations

import email
import json
import re
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.fakes.kfp_engine import Execution, Json, Pod
from tests.fakes.kubernetes_api import Fault, KubernetesApi

_PREFIX = "/apis/v2beta1"
_OVER = ("SUCCEEDED", "FAILED", "CANCELED")
_PAGE = 3  # entries of a page at most, so that every list of a test has several


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class KfpApi:
    """The server; use it as a context manager.

    Attributes:
        requests: (method, path with query) of everything asked.
        token: bearer token it wants; None lets everybody in. cookie: the same for a cookie.
        multi_user: whether it knows namespaces, and then wants one.
        execute: run what is submitted; otherwise runs stay as `set_task` and `end` say.
        history: whether runs tell the states they had.
        images_without: packages that the images of steps lack.
        secrets: Kubernetes secrets of the namespace.
        kubernetes: where the pods of runs show up.
    """

    def __init__(self, folder: Path, *, kubernetes: KubernetesApi | None = None, multi_user: bool = True) -> None:
        self.folder, self.kubernetes, self.multi_user = folder, kubernetes, multi_user
        self.token: str | None = None
        self.cookie: str | None = None
        self.execute = False
        self.history = True
        self.images_without: tuple[str, ...] = ()
        self.secrets: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.pipelines: dict[str, Json] = {}
        self.versions: dict[str, Json] = {}
        self.packages: dict[str, Json] = {}
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.recurring: dict[str, Json] = {}
        self.executions: dict[str, Execution] = {}
        self.namespace = "modelmill"
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._created = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> KfpApi:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for execution in self.executions.values():
            execution.stop()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, action: int | str, *, method: str | None = None, path: str = "", times: int = 1) -> None:
        """Script a fault, see `Fault`: a status, `drop`, or `lost` (done, but never answered)."""
        self._faults.append(Fault(action, method, path, times, 0, 0.0))

    def heal(self) -> None:
        """Forget all scripted faults."""
        self._faults.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        return next((fault for fault in self._faults if fault.fits(method, path)), None)

    def set_task(self, run_id: str, name: str, state: str, **fields: Any) -> None:
        """What the API says of a task from now on; tasks of a loop have one name and a `task_id` each."""
        with self._lock:
            details, task_id = (
                self.runs[run_id]["run_details"]["task_details"],
                fields.get("task_id", f"{run_id}-{name}"),
            )
            known = next((each for each in details if each["task_id"] == task_id), None)
            if known is None:
                known = {"display_name": name, "run_id": run_id, "task_id": task_id, "start_time": _now()}
                details.append(known)
            known |= {"state": state, **fields}
            if state not in ("PENDING", "RUNNING"):
                known.setdefault("end_time", _now())

    def end(self, run_id: str, state: str) -> None:
        """End a run."""
        _turn(self.runs[run_id], state)

    def answer(self, method: str, path: str, query: Mapping[str, str], headers: Any, body: bytes) -> Json:
        """Answer one request; raises `Refused`."""
        self._admit(headers)
        path = unquote(path.removeprefix(_PREFIX))
        with self._lock:
            for verb, pattern, action in _ROUTES:
                found = re.fullmatch(pattern, path)
                if verb == method and found:
                    content = body if "upload" in path else (json.loads(body) if body else {})
                    return getattr(self, f"_{action}")(query, content, headers, *found.groups())
        raise Refused(404, f"no such path {path}")

    def _admit(self, headers: Any) -> None:
        if self.token is not None and headers.get("Authorization") != f"Bearer {self.token}":
            raise Refused(401, "Unauthenticated: the token is not known")
        if self.cookie is not None and headers.get("Cookie") != self.cookie:
            raise Refused(401, "Unauthenticated: log in")

    def _place(self, namespace: str | None) -> None:
        if not self.multi_user and namespace:
            raise Refused(400, "in single-user mode, a namespace is not allowed")
        if self.multi_user and namespace != self.namespace:
            raise Refused(403, f"User is not authorized with namespace {namespace!r}")

    def _healthz(self, *_: Any) -> Json:
        return {"multi_user": self.multi_user}

    def _create_pipeline(self, query: Any, body: Json, headers: Any) -> Json:
        self._place(body.get("namespace"))
        if any(each["name"] == body["name"] for each in self.pipelines.values()):
            raise Refused(409, f"pipeline {body['name']} already exists")
        return self._add(self.pipelines, "pipeline_id", body)

    def _pipeline_by_name(self, query: Mapping[str, str], body: Any, headers: Any, name: str) -> Json:
        self._place(query.get("namespace"))
        return next((each for each in self.pipelines.values() if each["name"] == name), None) or _missing(name)

    def _upload_version(self, query: Mapping[str, str], body: bytes, headers: Any) -> Json:
        if query["pipelineid"] not in self.pipelines:
            _missing(query["pipelineid"])
        siblings = [each for each in self.versions.values() if each["pipeline_id"] == query["pipelineid"]]
        if any(each["name"] == query["name"] for each in siblings):
            raise Refused(409, f"version {query['name']} already exists")
        package = read_package(_uploaded(headers["Content-Type"], body))
        record = {"pipeline_id": query["pipelineid"], "name": query["name"], "display_name": query["name"]}
        made = self._add(self.versions, "pipeline_version_id", record)
        self.packages[made["pipeline_version_id"]] = package
        return made

    def _list_versions(self, query: Mapping[str, str], body: Any, headers: Any, pipeline: str) -> Json:
        found = [each for each in self.versions.values() if each["pipeline_id"] == pipeline]
        return _page("pipeline_versions", found, query)

    def _get_version(self, query: Any, body: Any, headers: Any, pipeline: str, version: str) -> Json:
        found = self.versions.get(version) or _missing(version)
        package = self.packages[version]
        platform = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": package["platform"]}}}}
        return {**found, "pipeline_spec": {"pipeline_spec": package["pipeline"], "platform_spec": platform}}

    def _create_experiment(self, query: Any, body: Json, headers: Any) -> Json:
        self._place(body.get("namespace"))
        return self._add(self.experiments, "experiment_id", body)

    def _list_experiments(self, query: Mapping[str, str], body: Any, headers: Any) -> Json:
        self._place(query.get("namespace"))
        return _page("experiments", list(self.experiments.values()), query)

    def _create_run(self, query: Any, body: Json, headers: Any) -> Json:
        version = body["pipeline_version_reference"]["pipeline_version_id"]
        package = self.packages.get(version) or _missing(version)
        if body["experiment_id"] not in self.experiments:
            _missing(body["experiment_id"])
        parameters = body.get("runtime_config", {}).get("parameters", {})
        known = package["pipeline"]["root"].get("inputDefinitions", {}).get("parameters", {})
        if unknown := parameters.keys() - known.keys():
            raise Refused(400, f"the pipeline has no parameter {', '.join(sorted(unknown))}")
        made = self._add(self.runs, "run_id", {**body, "state": "PENDING", "run_details": {"task_details": []}})
        _turn(made, "RUNNING")
        if self.execute:
            self.executions[made["run_id"]] = execution = Execution(
                made["run_id"],
                package,
                parameters,
                self.folder,
                self.secrets,
                self._pod_started,
                self._pod_ended,
                self.images_without,
            )
            execution.begin()
        return made

    def _get_run(self, query: Any, body: Any, headers: Any, run_id: str) -> Json:
        run = self.runs.get(run_id) or _missing(run_id)
        if execution := self.executions.get(run_id):
            run["run_details"]["task_details"] = list(execution.tasks.values())
            if execution.state != run["state"]:
                _turn(run, execution.state)
        return run if self.history else {**run, "state_history": []}

    def _list_runs(self, query: Mapping[str, str], body: Any, headers: Any) -> Json:
        found = list(self.runs.values())
        if experiment := query.get("experiment_id"):
            found = [each for each in found if each["experiment_id"] == experiment]
        else:
            self._place(query.get("namespace"))
        if query.get("sort_by") == "created_at desc":
            found.reverse()
        return _page("runs", found, query)

    def _terminate(self, query: Any, body: Any, headers: Any, run_id: str) -> Json:
        run = self.runs.get(run_id) or _missing(run_id)
        if run["state"] in (*_OVER, "CANCELING"):
            raise Refused(400, f"Failed to terminate a run {run_id}. Row not found")
        _turn(run, "CANCELING")
        if run_id in self.executions:
            self.executions[run_id].stop()
        else:
            self.end(run_id, "FAILED")
        return {}

    def _create_recurring(self, query: Any, body: Json, headers: Any) -> Json:
        reference = body.get("pipeline_version_reference", {})
        if reference.get("pipeline_version_id") not in self.versions:
            raise Refused(400, "a recurring run needs a pipeline version")
        trigger = body["trigger"]
        if cron := trigger.get("cron_schedule"):
            if len(cron["cron"].split()) != 6:
                raise Refused(400, "cron needs six fields")
        elif int(trigger["periodic_schedule"]["interval_second"]) < 1:
            raise Refused(400, "interval must be positive")
        if not 1 <= int(body["max_concurrency"]) <= 10:
            raise Refused(400, "max concurrency must be in 1..10")
        status = "ENABLED" if body["mode"] == "ENABLE" else "DISABLED"
        return self._add(self.recurring, "recurring_run_id", {**body, "status": status})

    def _list_recurring(self, query: Mapping[str, str], body: Any, headers: Any) -> Json:
        self._place(query.get("namespace"))
        return _page("recurringRuns", list(self.recurring.values()), query)

    def _delete_recurring(self, query: Any, body: Any, headers: Any, name: str) -> Json:
        self.recurring.pop(name, None) or _missing(name)
        return {}

    def _switch_recurring(self, query: Any, body: Any, headers: Any, name: str, word: str) -> Json:
        found = self.recurring.get(name) or _missing(name)
        found |= {"mode": word.upper(), "status": f"{word.upper()}D"}
        return {}

    def _add(self, table: dict[str, Json], key: str, record: Json) -> Json:
        self._created += 1
        moment = datetime.now(UTC) + timedelta(microseconds=self._created)
        made = {**record, key: str(uuid.uuid4()), "created_at": moment.isoformat().replace("+00:00", "Z")}
        table[made[key]] = made
        return made

    def _pod_started(self, pod: Pod) -> None:
        if self.kubernetes is not None:
            container = {"name": "main", "image": pod.image}
            metadata = {"name": pod.name, "namespace": self.namespace, "labels": pod.labels}
            record = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}
            self.kubernetes.store.create(record)
            self.kubernetes.store.set_status("pods", pod.name, {"phase": "Running"}, self.namespace)

    def _pod_ended(self, pod: Pod) -> None:
        if self.kubernetes is not None:
            self.kubernetes.log(pod.name, *pod.log.read_text(errors="replace").splitlines())
            phase = "Failed" if pod.exit_code else "Succeeded"
            self.kubernetes.store.set_status("pods", pod.name, {"phase": phase}, self.namespace)


def read_package(text: str) -> Json:
    """A compiled pipeline, parsed strictly: the spec as a dict, and the Kubernetes part by executor.

    Raises:
        Refused: unknown fields, or references that lead nowhere.
    """
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes
    from kfp.pipeline_spec import pipeline_spec_pb2

    from modelmill.pipelines.launch.references import dangling

    documents = list(yaml.safe_load_all(text))
    try:
        spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        executors = {}
        for document in documents[1:]:
            json_format.ParseDict(document, pipeline_spec_pb2.PlatformSpec())
            executors |= document["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for config in executors.values():
            json_format.ParseDict(config, kubernetes.KubernetesExecutorConfig())
    except json_format.ParseError as error:
        raise Refused(400, f"the package is no pipeline: {error}") from None
    found = json_format.MessageToDict(spec)
    if problems := list(dangling(found)):
        raise Refused(400, "; ".join(problems))
    return {"pipeline": found, "platform": executors}


def _uploaded(kind: str, body: bytes) -> str:
    message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    part = message.get_payload()[0]
    return part.get_payload(decode=True).decode()  # type: ignore[union-attr]


def _page(items: str, found: list[Json], query: Mapping[str, str]) -> Json:
    """One page of a list, filtered as the API filters."""
    for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
        assert predicate["operation"] in ("EQUALS", 1), predicate
        value = predicate.get("string_value") or predicate.get("stringValue")
        found = [each for each in found if each.get(predicate["key"]) == value]
    begin = int(query.get("page_token") or 0)
    size = min(int(query.get("page_size") or 10), _PAGE)
    rest = {"next_page_token": str(begin + size)} if begin + size < len(found) else {}
    return {items: found[begin : begin + size], "total_size": len(found), **rest}


def _missing(name: str) -> Any:
    raise Refused(404, f"{name} not found")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _turn(run: Json, state: str) -> None:
    run["state"] = state
    run.setdefault("state_history", []).append({"state": state, "update_time": _now()})
    if state in _OVER:
        run["finished_at"] = _now()


_ROUTES = [
    ("GET", "/healthz", "healthz"),
    ("POST", "/pipelines", "create_pipeline"),
    ("GET", "/pipelines/names/([^/]+)", "pipeline_by_name"),
    ("POST", "/pipelines/upload_version", "upload_version"),
    ("GET", "/pipelines/([^/]+)/versions", "list_versions"),
    ("GET", "/pipelines/([^/]+)/versions/([^/]+)", "get_version"),
    ("POST", "/experiments", "create_experiment"),
    ("GET", "/experiments", "list_experiments"),
    ("POST", "/runs", "create_run"),
    ("GET", "/runs", "list_runs"),
    ("GET", "/runs/([^/:]+)", "get_run"),
    ("POST", "/runs/([^/:]+):terminate", "terminate"),
    ("POST", "/recurringruns", "create_recurring"),
    ("GET", "/recurringruns", "list_recurring"),
    ("DELETE", "/recurringruns/([^/:]+)", "delete_recurring"),
    ("POST", "/recurringruns/([^/:]+):(enable|disable)", "switch_recurring"),
]


def _handler(api: KfpApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            return

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlsplit(self.path)
            api.requests.append((self.command, self.path))
            fault = api.fault(self.command, self.path)
            action = fault.action if fault else None
            if action == "slow" and fault:
                time.sleep(fault.seconds)
            if action == "drop":
                self.close_connection = True
                return
            if isinstance(action, int):
                return self._send(action, {"message": f"scripted {action}"})
            query = {name: values[-1] for name, values in parse_qs(address.query).items()}
            try:
                answer = api.answer(self.command, address.path, query, self.headers, body)
            except Refused as error:
                return self._send(error.code, {"message": error.message})
            if action == "lost":
                self.close_connection = True
                return
            self._send(200, answer)

        def _send(self, code: int, record: Json) -> None:
            data = json.dumps(record).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _serve

    return Handler
