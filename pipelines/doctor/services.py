"""What a run on a cluster uses besides Kubernetes, seen from here with the user's own credentials.

The pods of a run have other credentials and another network; `--in-cluster` looks with theirs.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Callable, Iterator
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from modelmill.components.core.errors import UserError
from modelmill.pipelines.doctor.finding import Finding, Level, collect
from modelmill.pipelines.doctor.registry import Reference, Registry, RegistryError
from modelmill.pipelines.platform import Profile

_TIMEOUT = 10  # seconds
_OLDEST_MLFLOW = (3, 10)  # as the track extra asks


def examine(profile: Profile) -> list[Finding]:
    """Look at images, bucket, MLflow and Kubeflow Pipelines."""
    checks: tuple[Callable[[Profile], Iterator[Finding]], ...] = (images, bucket, tracking, pipelines)
    return collect(checks, profile)


def images(profile: Profile) -> Iterator[Finding]:
    """Every image the profile uses, by digest, in its registry."""
    families = {profile.step.image, *([profile.device_step.image] if profile.device_step else [])}
    wanted: dict[str, str] = {profile.images.reference(family): family for family in sorted(families)}
    if profile.launcher == "trainjob" and profile.trainjob:
        wanted.setdefault(profile.trainjob.image, "training")
    if profile.launcher == "sagemaker" and profile.sagemaker:
        wanted.setdefault(profile.sagemaker.image, "training")
    for text, purpose in wanted.items():
        if not text:
            continue  # the profile's own finding
        reference = Reference.parse(text)
        if reference.host == "localhost":
            fix = f"kind load docker-image {text}"
            yield Finding("warn", "image", f"{text} is of this machine; no node can pull it", fix)
            continue
        try:
            Registry(reference.host).manifest(reference, content=False)
        except RegistryError as error:
            yield _not_seen(text, reference, purpose, error)
            continue
        if reference.by_digest:
            yield Finding("ok", "image", f"{purpose}: {text} is in its registry; nodes pull it with their own role")
        else:
            text = f"{purpose}: {text} is there, but a tag can move and outputs are kept by the image's name"
            yield Finding("warn", "image", text, "write it as NAME@sha256:..., which `docker push` prints")


def _not_seen(text: str, reference: Reference, purpose: str, error: RegistryError) -> Finding:
    pull = f"kubectl run look --rm -it --restart=Never --image={text} -- true"
    if error.status == 404:
        fix = f"python -m images.build {purpose}, then push it" if purpose != "training" else "build and push it"
        return Finding("fail", "image", f"{purpose}: {text} is not in its registry", fix)
    if error.status in (401, 403):
        seen = f"{reference.host} does not show {text} to you ({error.status}); nodes pull it with their own role"
    else:
        seen = f"{reference.host} {error}, so nothing is known of {text}"
    return Finding("warn", "image", f"{purpose}: {seen}", f"modelmill doctor --in-cluster, or {pull}")


def bucket(profile: Profile, who: str = "") -> Iterator[Finding]:
    """Write and delete one small object where outputs go.

    Args:
        profile: of the run.
        who: whose credentials these are; empty asks AWS for the user's.
    """
    places = [profile.store] if profile.store else []
    places += [profile.sagemaker.output] if profile.launcher == "sagemaker" and profile.sagemaker else []
    for uri in places:
        yield _written(uri, who or f"you ({_identity()})", own=not who)


def _written(uri: str, who: str, *, own: bool) -> Finding:
    from modelmill.components.core import s3
    from modelmill.components.core.uri import split_s3

    name, prefix = split_s3(uri)
    key = "/".join(filter(None, [prefix.strip("/"), f".modelmill-doctor-{secrets.token_hex(6)}"]))
    try:
        client = s3.s3_client(None, "store")
        with s3.explained(uri, None, "store"):
            client.put_object(Bucket=name, Key=key, Body=b"")
            client.get_object(Bucket=name, Key=key)
            client.delete_object(Bucket=name, Key=key)
    except UserError as error:
        level: Level = "warn" if own else "fail"
        fix = "modelmill doctor --in-cluster looks with the service account of the run" if own else ""
        return Finding(level, "bucket", f"{who} cannot write to {uri}: {error}", fix)
    note = "; the service account was not tried (--in-cluster does)" if own else ""
    return Finding("ok", "bucket", f"{who} can write to, read and delete in {uri}{note}")


def _identity() -> str:
    """Who AWS takes the user for."""
    try:
        import boto3
        from botocore.config import Config

        config = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 1})
        return str(boto3.session.Session().client("sts", config=config).get_caller_identity()["Arn"])
    except Exception as error:  # whatever is missing, the write itself says it
        return f"unknown to AWS, {type(error).__name__}"


def tracking(profile: Profile, *, inside: bool = False) -> Iterator[Finding]:
    """MLflow: its version, and whether the credentials of the environment may look at experiments."""
    address = (profile.tracking.uri if inside else profile.tracking.ui or profile.tracking.uri).rstrip("/")
    if not address:
        text = "tracking.uri is empty: points stay with the outputs and reach no server"
        yield Finding("warn", "mlflow", text, "set tracking.uri in the profile")
        return
    host = urlsplit(address).hostname or ""
    if not inside and (host.endswith((".svc", ".cluster.local")) or ("." not in host and host != "localhost")):
        text = f"{address} is an address inside the cluster, which cannot be asked from here"
        yield Finding("warn", "mlflow", text, "set tracking.ui to its address for people, or add --in-cluster")
        return
    status, text = _fetch(f"{address}/version")
    if status == 403:
        fix = f"add {urlsplit(address).netloc} to the server's --allowed-hosts"
        yield Finding("fail", "mlflow", f"{address} refuses this host name (403): {text[:120]}", fix)
        return
    if status == 401:
        yield _refused_login(address)
        return
    if status != 200:
        fix = f"curl {address}/health"
        yield Finding("fail", "mlflow", f"{address} {text if status == 0 else f'answers {status}'}", fix)
        return
    version = text.strip()
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _OLDEST_MLFLOW:
        yield Finding("warn", "mlflow", f"server {version} is older than 3.10", "update the mlflow image")
    body = json.dumps({"max_results": 1}).encode()
    status, text = _fetch(f"{address}/api/2.0/mlflow/experiments/search", body)
    if status in (401, 403):
        yield _refused_login(address)
    elif status != 200:
        yield Finding("fail", "mlflow", f"{address} answers {status} to a search: {text[:120]}")
    else:
        yield Finding("ok", "mlflow", f"{version} at {address}, experiments can be read")


def _refused_login(address: str) -> Finding:
    fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (in pods: tracking.secret)"
    return Finding("fail", "mlflow", f"{address} refuses the login", fix)


def _fetch(url: str, body: bytes | None = None) -> tuple[int, str]:
    """Status and text of an answer; (0, why) when there is none."""
    headers = {"Content-Type": "application/json"} if body else {}
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    try:
        with urlopen(Request(url, data=body, headers=headers), timeout=_TIMEOUT) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except (URLError, OSError, ValueError) as error:
        return 0, f"does not answer: {getattr(error, 'reason', error)}"


def pipelines(profile: Profile) -> Iterator[Finding]:
    """Kubeflow Pipelines: address, login, and whether runs of the namespace can be listed."""
    from modelmill.pipelines.launch.kubeflow import Endpoint

    try:
        endpoint = Endpoint(profile)
        endpoint.runs(1)
    except UserError as error:
        yield Finding("fail", "kfp", str(error))
        return
    space = f"runs of {endpoint.namespace}" if endpoint.namespace else "runs (one namespace)"
    yield Finding("ok", "kfp", f"{endpoint.address} is healthy, {space} can be listed")
