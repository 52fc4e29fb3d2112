"""Step `delete_endpoint`, the exit handler of deployments, and the clean-up after runs that had no time for one.

    python -m modelmill.components.registry.sagemaker_deletion --region eu-west-1     (by a schedule)

Only what carries the run's tag is deleted, or for the clean-up what is past its expiry. An endpoint that is still
being created cannot be deleted and is waited for.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modelmill.components.core import events, tracking
from modelmill.components.core.aws import aws_trouble, client, error_code, is_missing, open_session
from modelmill.components.core.errors import UserError
from modelmill.components.core.sagemaker import EXPIRES_TAG, RUN_TAG, delete, listed, tags_of
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.registry.sagemaker_endpoint_config import EndpointConfig
from modelmill.components.registry.sagemaker_names import current_run

_PARAMETER = "endpoint"
_POLL_SECONDS = 5.0
_SECONDS = 1800.0  # for AWS to let go of what is left; one that is being created must have ended that first
_KINDS = ("Endpoint", "EndpointConfig", "Model")  # the endpoint first: it costs, the others do not
_PASSING = ("ThrottlingException", "Throttling", "ServiceUnavailable", "InternalFailure", "RequestLimitExceeded")
logger = logging.getLogger("modelmill")


@step_options(reuse=False)
def delete_endpoint(config: EndpointConfig, output: Path, *, status: dict[str, str]) -> StepResult:
    """Delete everything this run has deployed, however the run ended; a run that succeeded may keep it.

    Args:
        config: of the endpoint.
        output: an empty folder.
        status: `state` of the run, as `SUCCEEDED`.

    Returns:
        kind `deletion`; counts `deleted`, `kept`.

    Raises:
        UserError: something is left that AWS does not let go; the message names it.
    """
    run = current_run()
    kept = config.keep and status["state"] == "SUCCEEDED"
    with aws_trouble(_PARAMETER):
        sagemaker = client(open_session(config.region, _PARAMETER), "sagemaker")
        if kept:
            found = [name for _, name, _ in _of_run(sagemaker, config.name, run)]
            logger.warning("%s is kept and costs money until it is deleted", ", ".join(found) or "nothing")
        else:
            found = delete_of_run(sagemaker, config.name, run)
    tracking.set_tags({"modelmill.sagemaker_endpoint_kept": str(kept).lower()})
    counts = {"deleted": 0 if kept else len(found), "kept": len(found) if kept else 0}
    (output / "deletion.json").write_text(json.dumps(counts) + "\n")
    return StepResult("deletion", counts)


def delete_of_run(sagemaker: Any, name: str, run: str) -> list[str]:
    """Delete what carries a run's tag, until nothing of it is found.

    Args:
        sagemaker: client.
        name: beginning of the names to look at.
        run: the tag's value.

    Returns:
        Names of what was deleted, a name once for each kind.

    Raises:
        UserError: something is left; the message names it.
    """
    return _delete(sagemaker, lambda: list(_of_run(sagemaker, name, run)))


def delete_expired(sagemaker: Any, now: float) -> list[str]:
    """Delete what is past the expiry in its tag, of any run.

    Args:
        sagemaker: client.
        now: seconds since the epoch.
    """

    def expired() -> list[tuple[str, str, str]]:
        return [
            (kind, name, arn)
            for kind, name, arn, tags in _tagged(sagemaker, "")
            if (until := tags.get(EXPIRES_TAG, "")).isdigit() and int(until) < now
        ]

    return _delete(sagemaker, expired)


def _delete(sagemaker: Any, look: Callable[[], list[tuple[str, str, str]]]) -> list[str]:
    deadline, deleted, asked = time.monotonic() + _SECONDS, list[str](), set[str]()
    while left := _patiently(look, deadline):
        for kind, name, arn in left:
            if arn not in asked and _delete_one(sagemaker, kind, name):
                asked.add(arn)
                deleted.append(name)
                events.progress(f"deleting {kind} {name}")
        if time.monotonic() >= deadline:
            held = [each for each in left if each[2] not in asked] or left
            names = ", ".join(f"{kind} {name}" for kind, name, _ in held)
            raise UserError(
                f"endpoint: {names} cannot be deleted within {_SECONDS:.0f} seconds and may cost money; delete it"
                " in the console of SageMaker"
            )
        time.sleep(_POLL_SECONDS)
    return deleted


def _patiently(look: Callable[[], list[tuple[str, str, str]]], deadline: float) -> list[tuple[str, str, str]]:
    """What is left; a look that AWS throttles is taken again, as giving up would leave an endpoint behind."""
    while True:
        try:
            return look()
        except Exception as error:
            if error_code(error) not in _PASSING or time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _delete_one(sagemaker: Any, kind: str, name: str) -> bool:
    """Ask for a deletion; False where it must be asked for again."""
    try:
        delete(sagemaker, kind, name)
    except Exception as error:
        if is_missing(error):
            return True
        if "in-progress" in str(error) or error_code(error) in _PASSING:
            return False
        raise
    return True


def _of_run(sagemaker: Any, name: str, run: str) -> Iterator[tuple[str, str, str]]:
    for kind, found, arn, tags in _tagged(sagemaker, name):
        if tags.get(RUN_TAG) == run[:256]:
            yield kind, found, arn


def _tagged(sagemaker: Any, name: str) -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """Kind, name, ARN and tags of endpoints, configurations and models; what is gone meanwhile is left out."""
    for kind in _KINDS:
        for found in listed(sagemaker, kind, **({"NameContains": name} if name else {})):
            if (tags := tags_of(sagemaker, found.arn)) is not None:
                yield kind, found.name, found.arn, tags


def main(arguments: list[str]) -> int:
    """Delete what is past its expiry, and print its names."""
    parser = argparse.ArgumentParser(description="Delete SageMaker endpoints that their runs have left behind.")
    parser.add_argument("--region", help="AWS region; default that of the environment")
    region = parser.parse_args(arguments).region
    try:
        with aws_trouble(_PARAMETER):
            deleted = delete_expired(client(open_session(region, _PARAMETER), "sagemaker"), time.time())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"deleted {name}" for name in deleted) or "nothing to delete")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
