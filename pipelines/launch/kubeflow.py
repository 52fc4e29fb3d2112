"""The Kubeflow Pipelines API as runs need it: log in, upload once, submit once, look, cancel.

Requests go through the generated client of the SDK. Its own convenience functions print to the terminal, sleep through
an outage, and leave out what a schedule needs (see `scheduling`). A busy server is asked again; what may have happened
although no answer came is looked up before it is repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.pipelines.platform import KfpConfig, Profile

ENDPOINT_VARIABLE = "KF_PIPELINES_ENDPOINT"
TOKEN_VARIABLE, COOKIES_VARIABLE = "KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIES"
_IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
_BUSY = (408, 429, 500, 502, 503, 504)
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts
_TIMEOUT = (5, 60)  # seconds to connect, to answer
ENDED = {"SUCCEEDED": "succeeded", "SKIPPED": "succeeded", "FAILED": "failed", "CANCELED": "cancelled"}


def ended_as(run: Any) -> str | None:
    """How a run ended, as the API describes it: `succeeded`, `failed` or `cancelled`; None while it goes on.

    One that was terminated ends as FAILED, the state of its workflow; only its history says that it was CANCELING.
    """
    state = ENDED.get(str(run.state))
    earlier = (str(each.state) for each in reversed(run.state_history or []) if str(each.state) != "FAILED")
    return "cancelled" if state == "failed" and next(earlier, "") == "CANCELING" else state


class NotThere(UserError):
    """What was asked for does not exist at the endpoint."""


class NoAnswer(UserError):
    """The endpoint gave no answer, or none worth having: what was asked may have happened."""


@dataclass(frozen=True)
class Version:
    """A pipeline version at the endpoint.

    Attributes:
        name: made of its content, so equal content is one version.
        uploaded: whether it was not there before.
    """

    pipeline_id: str
    version_id: str
    name: str
    uploaded: bool = False


def content_name(package: Path, recipe: str) -> str:
    """Name of a pipeline version: the recipe's, and a digest of the compiled file."""
    return f"{recipe}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"


def endpoint_of(config: KfpConfig) -> str:
    """Address of the API.

    Raises:
        UserError: neither the profile nor the environment names one.
    """
    address = config.endpoint or os.environ.get(ENDPOINT_VARIABLE, "")
    if not address and os.environ.get("KUBERNETES_SERVICE_HOST"):
        address = _IN_CLUSTER
    if not address:
        raise UserError(
            f"kfp.endpoint: empty; set it in the profile, or {ENDPOINT_VARIABLE} to the address of the API"
        )
    return (address if "://" in address else f"https://{address}").rstrip("/")


class Endpoint:
    """A Kubeflow Pipelines API that this process is logged in to."""

    def __init__(self, profile: Profile) -> None:
        """
        Raises:
            UserError: no address, no credentials, nothing answers, or it refuses the login.
        """
        self.config, self.address = profile.kfp, endpoint_of(profile.kfp)
        self.requests = 0
        self._client = self._connect(profile)
        health = self.call(self._client.healthzs.healthz_service_get_healthz)
        # A server for one team refuses to hear of namespaces.
        self.namespace = profile.namespace if health.multi_user else None

    def _connect(self, profile: Profile) -> Any:
        try:
            from kfp.client import Client
            from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials
        except ModuleNotFoundError:
            raise UserError("kfp is not installed; pip install 'modelmill[kfp]'") from None
        options: dict[str, Any] = {}
        if self.config.auth == "token":
            options["existing_token"] = _secret(TOKEN_VARIABLE, "token")
        elif self.config.auth == "cookies":
            options["cookies"] = _secret(COOKIES_VARIABLE, "cookies")
        elif self.config.auth == "service-account":
            if not Path(self.config.token_path).is_file():
                raise UserError(
                    f"kfp.token_path: {self.config.token_path} is no file; run in a pod with a projected token, or"
                    " choose another kfp.auth"
                )
            options["credentials"] = ServiceAccountTokenVolumeCredentials(self.config.token_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Client(
                host=self.address,
                # Any other value makes the client ask the server, and wait half a minute for one that is gone.
                namespace=profile.namespace if profile.namespace != "kubeflow" else "kubeflow ",
                ssl_ca_cert=self.config.ca_certificate,
                **options,
            )

    @property
    def where(self) -> dict[str, Any]:
        """The namespace as an argument, for servers that have several."""
        return {"namespace": self.namespace} if self.namespace else {}

    @property
    def ui(self) -> str:
        return (self.config.ui or self.address).rstrip("/")

    def run_url(self, run_id: str) -> str:
        """Page of a run for people."""
        return f"{self.ui}/#/runs/details/{run_id}"

    @property
    def api(self) -> Any:
        """The generated services, such as `api.runs.run_service_get_run`; call them through `call`."""
        return self._client

    def call(self, action: Callable[..., Any], *arguments: Any, repeat: bool = True, **named: Any) -> Any:
        """One request, repeated while the server is busy.

        Args:
            action: a method of the generated client.
            repeat: False for what must not happen twice: the caller looks whether it happened.

        Raises:
            NotThere: the server knows no such thing.
            UserError: it cannot be reached, refuses, or stays busy.
        """
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        for pause in (*(_PAUSES if repeat else ()), None):
            self.requests += 1
            try:
                return action(*arguments, _request_timeout=_TIMEOUT, **named)
            except ApiException as error:
                if error.status not in _BUSY or pause is None:
                    raise self._explained(error) from None
            except HTTPError as error:
                if pause is None or "NewConnectionError" in repr(error):
                    raise NoAnswer(f"kfp.endpoint: {self.address} does not answer ({_reason(error)})") from None
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _explained(self, error: Any) -> UserError:
        text = _message(error)
        if error.status == 404:
            return NotThere(f"kfp.endpoint: {self.address}: {text or 'not found'}")
        if error.status in (401, 403):
            mend = {
                "none": "set kfp.auth in the profile",
                "token": f"renew ${TOKEN_VARIABLE}",
                "cookies": f"log in again and renew ${COOKIES_VARIABLE}",
                "service-account": "ask for the rights of the service account",
            }[self.config.auth]
            refused = "does not know you" if error.status == 401 else "forbids it"
            return UserError(f"kfp.auth: {self.address} {refused} ({error.status} {text}); {mend}")
        if error.status in _BUSY:
            return NoAnswer(f"kfp.endpoint: {self.address} answered {error.status} ({text}); try again later")
        return UserError(f"kfp.endpoint: {self.address} refuses ({error.status} {text})")

    def upload(self, package: Path, pipeline: str, recipe: str, description: str = "") -> Version:
        """The version of a compiled pipeline, uploaded unless its content is there.

        Args:
            package: the compiled file.
            pipeline: name of the pipeline.
            recipe: name of the recipe, for the version's name.
        """
        pipeline_id, name = self._pipeline(pipeline), content_name(package, recipe)
        for _ in range(len(_PAUSES)):
            found = self.find_version(pipeline_id, name)
            if found is not None:
                return found
            try:
                made = self.call(
                    self.api.pipeline_uploads.upload_pipeline_version,
                    str(package),
                    repeat=False,
                    name=name,
                    pipelineid=pipeline_id,
                    description=description,
                )
                return Version(pipeline_id, made.pipeline_version_id, name, uploaded=True)
            except UserError as error:  # it may be there all the same, or come from someone else at this moment
                problem = error
                if found := self.find_version(pipeline_id, name):
                    return found
            time.sleep(_PAUSES[0])
        raise problem

    def find_version(self, pipeline_id: str, name: str) -> Version | None:
        """A version of a pipeline by its name."""
        listed = self.listed(
            self.api.pipelines.pipeline_service_list_pipeline_versions,
            "pipeline_versions",
            pipeline_id,
            filter=equals("display_name", name),
        )
        found = next((each for each in listed if name in (each.display_name, each.name)), None)
        return None if found is None else Version(pipeline_id, found.pipeline_version_id, name)

    def _pipeline(self, name: str) -> str:
        """Id of a pipeline, made when there is none."""
        import kfp_server_api as models

        where = self.where
        services = self.api.pipelines
        for attempt in (1, 2):
            with suppress(NotThere):
                return str(self.call(services.pipeline_service_get_pipeline_by_name, name, **where).pipeline_id)
            body = models.V2beta1Pipeline(name=name, display_name=name, **where)
            try:
                return str(self.call(services.pipeline_service_create_pipeline, body, repeat=False).pipeline_id)
            except UserError:
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def experiment(self, name: str) -> str:
        """Id of an experiment of KFP, made when there is none."""
        import kfp_server_api as models

        where = self.where
        services = self.api.experiments
        for attempt in (1, 2):
            found = self.listed(
                services.experiment_service_list_experiments,
                "experiments",
                filter=equals("display_name", name),
                **where,
            )
            if found:
                return str(found[0].experiment_id)
            body = models.V2beta1Experiment(display_name=name, **where)
            try:
                return str(self.call(services.experiment_service_create_experiment, body, repeat=False).experiment_id)
            except UserError:
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def submit(
        self, version: Version, *, name: str, experiment: str, account: str, sections: Mapping[str, str]
    ) -> str:
        """Start a run of a version.

        Args:
            name: the run's name, which no other run has: it tells whether an unanswered request arrived.
            experiment: id of the experiment.
            account: service account of the pods.
            sections: parameters of the pipeline.

        Returns:
            KFP's id of the run.
        """
        import kfp_server_api as models

        body = models.V2beta1Run(
            display_name=name,
            experiment_id=experiment,
            pipeline_version_reference=models.V2beta1PipelineVersionReference(
                pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id
            ),
            runtime_config=models.V2beta1RuntimeConfig(parameters=dict(sections)),
            service_account=account,
        )
        for _ in range(len(_PAUSES)):
            try:
                made = self.call(self.api.runs.run_service_create_run, body, repeat=False)
                return str(made.run_id)
            except NoAnswer as error:
                problem = error
                time.sleep(_PAUSES[0])
                if found := self._run_named(experiment, name):
                    return found
        raise problem

    def _run_named(self, experiment: str, name: str) -> str | None:
        listed = self.listed(
            self.api.runs.run_service_list_runs, "runs", experiment_id=experiment, filter=equals("display_name", name)
        )
        return str(listed[0].run_id) if listed else None

    def run(self, run_id: str) -> Any:
        """A run with its tasks, as the API describes it."""
        return self.call(self.api.runs.run_service_get_run, run_id)

    def compiled(self, run: Any) -> tuple[dict[str, Any], str]:
        """What a run's pipeline was compiled to (`pipeline_spec` and `platform_spec`), and the name of its version."""
        reference = run.pipeline_version_reference
        if reference is None:
            return run.pipeline_spec or {}, ""
        version = self.call(
            self.api.pipelines.pipeline_service_get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
        return version.pipeline_spec or {}, str(version.display_name or version.name)

    def runs(self, limit: int) -> list[Any]:
        """Runs of the namespace, newest first."""
        where = self.where
        return self.listed(
            self.api.runs.run_service_list_runs, "runs", limit=limit, sort_by="created_at desc", **where
        )

    def terminate(self, run_id: str) -> None:
        """Tell a run to end.

        Raises:
            UserError: also when it has ended, or was told before.
        """
        self.call(self.api.runs.run_service_terminate_run, run_id)

    def listed(
        self, action: Callable[..., Any], items: str, *arguments: Any, limit: int | None = None, **named: Any
    ) -> list[Any]:
        """All pages of a list, or as much as `limit` asks for."""
        found: list[Any] = []
        token = ""
        while True:
            page = self.call(action, *arguments, page_token=token, page_size=min(limit or 100, 100), **named)
            found += getattr(page, items) or []
            token = page.next_page_token or ""
            if not token or (limit is not None and len(found) >= limit):
                return found[:limit]


def equals(key: str, value: str) -> str:
    """A filter of the API."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": value}]})


def _secret(variable: str, kind: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UserError(f"kfp.auth: {kind} needs ${variable}, which is not set")
    return value


def _message(error: Any) -> str:
    """What the server said, on one line."""
    with suppress(ValueError, TypeError, AttributeError):
        body = json.loads(error.body)
        text = str(body.get("message") or body.get("error") or "")
        return text if len(text) <= 300 else f"{text[:299]}…"
    return str(error.reason or "")


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return str(cause).rpartition(": ")[2] or type(cause).__name__
