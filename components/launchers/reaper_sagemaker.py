"""The reaper's look at SageMaker: training jobs are stopped and endpoints deleted that no live run owns.

The tags say whose a thing is (`components/core/sagemaker.py`). Touched is only what our names begin with, what has the
owner's tag of the platform that asks, and whose run is over by the rule of `reaper_verdict`; an endpoint that its
recipe keeps goes only when its run has not succeeded. Unlike the API of Kubernetes, SageMaker cannot be asked to act
on what has not changed since: the tags are read once more just before, and a resumed run that takes a job over within
that moment finds it stopped, with its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from modelmill.components.core.aws import error_code, is_missing
from modelmill.components.core.errors import UserError
from modelmill.components.core.mlflow_store import one_line
from modelmill.components.core.sagemaker import (
    ADOPTED_TAG,
    EXPIRES_TAG,
    OWNER_TAG,
    RUN_TAG,
    Resource,
    delete,
    listed,
    tags_of,
)
from modelmill.components.launchers.reaper_verdict import GONE, OVER, StateOf, verdict

PREFIX = "modelmill-"  # of all names that the policies of the manifests let us touch


class _Kept(Exception):
    """Why something stays."""


@dataclass
class _Look:
    """One look at everything; see `reap`."""

    sagemaker: Any
    owner: str
    state_of: StateOf
    grace: timedelta
    dry_run: bool
    now: datetime
    say: Callable[[str], Any]
    removed: list[str] = field(default_factory=list)
    troubles: int = 0
    endpoints: set[str] = field(default_factory=set)  # names of those that stay

    def at(self, kind: str) -> bool:
        """Look at everything of a kind; False where it cannot be listed."""
        asked = {"NameContains": PREFIX} | ({"StatusEquals": "InProgress"} if kind == "TrainingJob" else {})
        try:
            found = list(listed(self.sagemaker, kind, **asked))
        except Exception as error:
            self._trouble(kind, error)
            return False
        for resource in found:
            gone = resource.name.startswith(PREFIX) and self._gone(resource)
            if kind == "Endpoint" and not gone and resource.status != "Deleting":
                self.endpoints.add(resource.name)
        return True

    def _gone(self, resource: Resource) -> bool:
        """End a thing if nobody needs it; False where it stays."""
        shown = f"{resource.kind} {resource.name}"
        try:
            tags = tags_of(self.sagemaker, resource.arn)
            if tags is None or tags.get(OWNER_TAG) != self.owner:
                return False  # gone by itself, or somebody else's
            reason = self._reason_to_go(resource, tags)
            if not self.dry_run:
                self._end(resource, tags)
        except _Kept as kept:
            self.say(f"{shown}: kept: {kept}")
            return False
        except Exception as error:
            self._trouble(shown, error)
            return False
        self.removed.append(resource.name)
        done, would = ("stopped", "would stop") if resource.kind == "TrainingJob" else ("deleted", "would delete")
        self.say(f"{shown}: {would if self.dry_run else done}: {reason}")
        return True

    def _reason_to_go(self, resource: Resource, tags: dict[str, str]) -> str:
        run_id = tags.get(RUN_TAG, "")
        if resource.status == "Deleting":
            raise _Kept("is being deleted")
        try:
            owned = max(resource.created, datetime.fromisoformat(tags.get(ADOPTED_TAG, resource.created.isoformat())))
        except (TypeError, ValueError):  # no date, or one without a zone
            raise _Kept(f"its tag {ADOPTED_TAG} is {tags[ADOPTED_TAG]!r}, no time with a zone") from None
        over = OVER - {"SUCCEEDED", GONE} if tags.get(EXPIRES_TAG) == "never" else OVER
        reason, orphan = verdict(run_id, owned, self.state_of, grace=self.grace, now=self.now, over=over)
        if not orphan:
            raise _Kept(reason)
        if resource.kind in ("EndpointConfig", "Model") and resource.name in self.endpoints:
            raise _Kept("its endpoint is still there")
        return reason

    def _end(self, resource: Resource, tags: dict[str, str]) -> None:
        """Stop or delete it, if its tags still are what was judged."""
        if tags_of(self.sagemaker, resource.arn) != tags:
            raise _Kept("changed while it was looked at")
        try:
            if resource.kind == "TrainingJob":
                self.sagemaker.stop_training_job(TrainingJobName=resource.name)
            else:
                delete(self.sagemaker, resource.kind, resource.name)
        except Exception as error:
            if is_missing(error) or (resource.kind == "TrainingJob" and error_code(error) == "ValidationException"):
                raise _Kept("has ended by itself") from None
            if error_code(error) == "ValidationException" and "in-progress" in str(error):
                raise _Kept("is being made or changed, and cannot be deleted before that has ended") from None
            raise

    def _trouble(self, shown: str, error: Exception) -> None:
        if type(error).__module__.partition(".")[0] not in ("botocore", "boto3"):
            raise error
        self.troubles += 1
        self.say(f"{shown}: kept: {one_line(error)}")


def reap(
    sagemaker: Any,
    owner: str,
    state_of: StateOf,
    *,
    grace: timedelta,
    dry_run: bool,
    now: datetime,
    say: Callable[[str], Any] = print,
) -> list[str]:
    """Look at every training job and endpoint of a platform's runs once.

    Args:
        sagemaker: client.
        owner: `MODELMILL_OWNER` of the platform whose Kubeflow Pipelines `state_of` asks.
        state_of: see `reaper_verdict.verdict`, and for `grace` and `now` too.
        grace: before anything is ended.
        dry_run: only say what would be done.
        now: the time, with its zone.
        say: gets one line a thing.

    Returns:
        Names of what was stopped or deleted, or would be.

    Raises:
        UserError: AWS refused or failed for some of it, which `say` was told; the rest was looked at.
    """
    look = _Look(sagemaker, owner, state_of, grace, dry_run, now, say)
    look.at("TrainingJob")
    if look.at("Endpoint"):  # without a list of them nobody knows which configurations they use
        look.at("EndpointConfig")
        look.at("Model")
    if look.troubles:
        raise UserError(
            f"sagemaker: AWS refused or failed {look.troubles} times (see above), so that something may go on and"
            " cost; check the reaper's role and region, the next look tries again"
        )
    return look.removed
