"""Removes training jobs that no live run owns: `python -m modelmill.components.launchers.reaper`, as a CronJob.

A TrainJob outlives its launcher, so that an evicted or retried one finds it again. When nobody comes back (the run was
cancelled in the user interface, failed for good, or was deleted), it would hold its nodes for ever. The reaper asks
Kubeflow Pipelines about the run in the label `modelmill.dev/run` of each of our jobs and deletes those whose run has
been over for longer than a grace period. Whatever it cannot find out for certain, it leaves alone. With
`--sagemaker-owner` it does the same for training jobs and endpoints in SageMaker (`reaper_sagemaker.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from modelmill.components.core.aws import aws_trouble, client, open_session
from modelmill.components.core.errors import UserError
from modelmill.components.core.sagemaker import checked_owner
from modelmill.components.launchers import reaper_sagemaker
from modelmill.components.launchers.kubernetes_client import Cluster, ConflictError
from modelmill.components.launchers.reaper_verdict import GONE, StateOf, verdict
from modelmill.components.launchers.trainjob_render import (
    ADOPTED_ANNOTATION,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    RUN_LABEL,
)

ENDPOINT_VARIABLE = "KF_PIPELINES_ENDPOINT"
TOKEN_PATH_VARIABLE = "KF_PIPELINES_SA_TOKEN_PATH"
_TIMEOUT = 30  # seconds
Json = dict[str, Any]


def delete_jobs_of(cluster: Cluster, run_id: str) -> list[str]:
    """Delete the training jobs of a run: what cancelling it means on the cluster.

    End the run itself first, or a launcher that lives on may be retried and make its job anew.

    Args:
        cluster: namespace of the run.
        run_id: KFP's id of the run.

    Returns:
        Names of the deleted jobs.
    """
    deleted = []
    for job in cluster.jobs(f"{MANAGED_BY_LABEL}={MANAGED_BY},{RUN_LABEL}={run_id}"):
        try:
            cluster.delete_job(job)
        except ConflictError:  # it was replaced in this moment; the new one is in the next listing, or the reaper's
            continue
        deleted.append(job["metadata"]["name"])
    return deleted


def reap(
    cluster: Cluster,
    state_of: StateOf,
    *,
    grace: timedelta,
    dry_run: bool,
    now: datetime,
    say: Callable[[str], Any] = print,
) -> list[str]:
    """Look at every training job of ours once.

    Args:
        cluster: the namespace.
        state_of: (state, end) of a run by its id, see `reaper_verdict.verdict`.
        grace: how long a run must have been over, and a job have had its owner, before the job is deleted.
        dry_run: only say what would be done.
        now: the time, with its zone.
        say: gets one line a job.

    Returns:
        Names of the jobs deleted, or that would be.
    """
    removed = []
    for job in cluster.jobs(f"{MANAGED_BY_LABEL}={MANAGED_BY}"):
        meta = job["metadata"]
        name = meta["name"]
        reason, orphan = _verdict(meta, state_of, grace, now)
        if orphan and not dry_run:
            try:
                # Unchanged since it was read: a resumed run may have taken it over in this moment.
                cluster.delete_job(job, unchanged=True)
            except ConflictError:
                reason, orphan = "changed while it was looked at", False
        removed += [name] if orphan else []
        say(f"{name}: {('would delete' if dry_run else 'deleted') if orphan else 'kept'}: {reason}")
    return removed


def _verdict(meta: Json, state_of: StateOf, grace: timedelta, now: datetime) -> tuple[str, bool]:
    """Why a job stays or goes, and whether it goes."""
    if meta.get("deletionTimestamp"):
        return "is being deleted", False
    owned = datetime.fromisoformat(meta.get("annotations", {}).get(ADOPTED_ANNOTATION) or meta["creationTimestamp"])
    return verdict(meta.get("labels", {}).get(RUN_LABEL, ""), owned, state_of, grace=grace, now=now)


class PipelinesApi:
    """The little of Kubeflow Pipelines that the reaper asks for: `GET /apis/v2beta1/runs/<id>`."""

    def __init__(self, endpoint: str, token_path: Path | None) -> None:
        """
        Args:
            endpoint: address of the API server, such as http://ml-pipeline.kubeflow:8888.
            token_path: file with a token, read anew for every request because Kubernetes rotates it.
        """
        self._endpoint, self._token_path = endpoint.rstrip("/"), token_path

    def state_of(self, run_id: str) -> tuple[str, datetime | None]:
        """(state, end) of a run; `GONE` when Kubeflow Pipelines says that it has none of this id.

        Raises:
            OSError: it does not answer.
            ValueError: it answers something else.
        """
        address = f"{self._endpoint}/apis/v2beta1/runs/{urllib.parse.quote(run_id, safe='')}"
        request = urllib.request.Request(address)
        if self._token_path is not None:
            request.add_header("Authorization", f"Bearer {self._token_path.read_text().strip()}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                run = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 404 and _speaks_pipelines(error):
                return GONE, None
            raise
        if run.get("run_id") != run_id or not run.get("state"):
            raise ValueError("the answer is not that run")
        ended = run.get("finished_at")
        time = datetime.fromisoformat(ended) if ended else None
        # An unfinished run has the zero time of its language there.
        return run["state"], time if time is not None and time.year > 1970 else None


def _speaks_pipelines(error: urllib.error.HTTPError) -> bool:
    """Whether a 404 is the API's own (gRPC code 5 in JSON), and not that of a proxy or a wrong address."""
    try:
        body = json.loads(error.read())
        return isinstance(body, dict) and (body.get("code") == 5 or "ResourceNotFound" in str(body))
    except ValueError:
        return False


def main(arguments: list[str]) -> int:
    """Look once; returns 0, or 2 after one line on what is missing or went wrong."""
    parser = argparse.ArgumentParser(prog="reaper", description="Delete training jobs that no live run owns.")
    parser.add_argument("--namespace", required=True, help="namespace of the training jobs")
    parser.add_argument("--grace-minutes", type=float, default=60.0, help="how long a run must have been over")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.add_argument(
        "--sagemaker-owner",
        metavar="OWNER",
        help="look at SageMaker too: stop the training jobs and delete the endpoints that carry this MODELMILL_OWNER",
    )
    parser.add_argument("--sagemaker-region", metavar="REGION", help="AWS region; default that of the environment")
    options = parser.parse_args(arguments)
    try:
        state_of = _pipelines().state_of
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    looks = [_look_at_cluster] + ([_look_at_sagemaker] if options.sagemaker_owner is not None else [])
    code = 0
    for look in looks:
        try:
            look(options, state_of)
        except UserError as error:  # what is wrong with one place does not spare the other
            print(error, file=sys.stderr)
            code = 2
    return code


def _look_at_cluster(options: argparse.Namespace, state_of: StateOf) -> None:
    cluster, grace = Cluster.connect(options.namespace), timedelta(minutes=options.grace_minutes)
    reap(cluster, state_of, grace=grace, dry_run=options.dry_run, now=datetime.now(UTC))


def _look_at_sagemaker(options: argparse.Namespace, state_of: StateOf) -> None:
    owner, grace = (
        checked_owner(options.sagemaker_owner, "--sagemaker-owner"),
        timedelta(minutes=options.grace_minutes),
    )
    with aws_trouble("sagemaker"):
        sagemaker = client(open_session(options.sagemaker_region, "sagemaker"), "sagemaker")
        now = datetime.now(UTC)
        reaper_sagemaker.reap(sagemaker, owner, state_of, grace=grace, dry_run=options.dry_run, now=now)


def _pipelines() -> PipelinesApi:
    endpoint = os.environ.get(ENDPOINT_VARIABLE)
    if not endpoint:
        raise UserError(f"{ENDPOINT_VARIABLE}: not set; name the API of Kubeflow Pipelines")
    token = os.environ.get(TOKEN_PATH_VARIABLE)
    return PipelinesApi(endpoint, Path(token) if token else None)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
