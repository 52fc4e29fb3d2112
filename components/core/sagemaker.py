"""What runs leave in SageMaker and whose it is: tags, and listings with them.

Ids of runs mean something to one Kubeflow Pipelines only, and an account may serve several of them. So whatever is to
be ended by somebody else than its own step also says which platform its run belongs to: the variable
`MODELMILL_OWNER` in the pods of the run, the same text that the reaper there is started with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from modelmill.components.core import events
from modelmill.components.core.aws import is_missing
from modelmill.components.core.errors import UserError

RUN_TAG = "modelmill:run"
OWNER_TAG = "modelmill:owner"
ADOPTED_TAG = "modelmill:adopted"  # when the run in RUN_TAG took over what another had made; ISO 8601
EXPIRES_TAG = "modelmill:expires"  # seconds since the epoch, or `never` for what the recipe keeps
OWNER_VARIABLE = "MODELMILL_OWNER"
_OWNER = re.compile(r"[A-Za-z0-9_.:/=+@-]{1,256}")  # what a tag's value may hold, without spaces
_LISTINGS = {
    "TrainingJob": ("list_training_jobs", "TrainingJobSummaries"),
    "Endpoint": ("list_endpoints", "Endpoints"),
    "EndpointConfig": ("list_endpoint_configs", "EndpointConfigs"),
    "Model": ("list_models", "Models"),
}


@dataclass(frozen=True)
class Resource:
    """A job, an endpoint, an endpoint configuration or a model.

    Attributes:
        kind: as in the names of the API's fields, such as `EndpointConfig`.
        status: empty for kinds that have none.
    """

    kind: str
    name: str
    arn: str
    created: datetime
    status: str


def owner_tags() -> dict[str, str]:
    """The tag with the platform of this step's run; none outside of Kubeflow Pipelines, as nobody could ask about it.

    Raises:
        UserError: `MODELMILL_OWNER` cannot be the value of a tag.
    """
    owner = os.environ.get(OWNER_VARIABLE, "")
    if not owner or not os.environ.get(events.RUN_ID_VARIABLE):
        return {}
    return {OWNER_TAG: checked_owner(owner, OWNER_VARIABLE)}


def checked_owner(owner: str, parameter: str) -> str:
    """The name of a platform as given.

    Raises:
        UserError: it cannot be the value of a tag.
    """
    if not _OWNER.fullmatch(owner):
        raise UserError(f"{parameter}: {owner!r} cannot be a tag; use up to 256 of letters, digits and _.:/=+-@")
    return owner


def listed(sagemaker: Any, kind: str, **asked: Any) -> Iterator[Resource]:
    """Everything of a kind, page after page.

    Args:
        sagemaker: client.
        kind: see `Resource`.
        asked: filters of the listing, such as `NameContains`.
    """
    operation, field = _LISTINGS[kind]
    for page in sagemaker.get_paginator(operation).paginate(**asked):
        for entry in page[field]:
            status = str(entry.get(f"{kind}Status", ""))
            yield Resource(kind, entry[f"{kind}Name"], entry[f"{kind}Arn"], entry["CreationTime"], status)


def tags_of(sagemaker: Any, arn: str) -> dict[str, str] | None:
    """Tags of a resource, or None when it is gone."""
    try:
        pages = sagemaker.get_paginator("list_tags").paginate(ResourceArn=arn)
        return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}
    except Exception as error:
        if is_missing(error):
            return None
        raise


def delete(sagemaker: Any, kind: str, name: str) -> None:
    """Ask for the deletion of an endpoint, an endpoint configuration or a model."""
    operation = {"Endpoint": "delete_endpoint", "EndpointConfig": "delete_endpoint_config", "Model": "delete_model"}
    getattr(sagemaker, operation[kind])(**{f"{kind}Name": name})
