"""Going back to the champion before this one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from modelmill.components.core.errors import UserError
from modelmill.components.core.mlflow_store import one_line
from modelmill.components.registry.moves import CHAMPION, PREVIOUS, Move, carry_out, read_aliases, settle
from modelmill.components.registry.store import (
    WEIGHTS_TAG,
    exclusive,
    find_version,
    is_absent,
    open_registry,
    whoever,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class Rollback:
    """What a rollback did.

    Attributes:
        name: the registered model.
        champion: version that is the champion again.
        weights_digest: of its weights.
        rolled_back: version that was the champion.
        previous: version a further rollback would go to, empty where there is none.
        reason: why.
        warnings: what is left to do by hand.
    """

    name: str
    champion: str
    weights_digest: str
    rolled_back: str
    previous: str
    reason: str
    warnings: tuple[str, ...] = ()


def rollback(name: str, reason: str = "") -> Rollback:
    """Make the previous champion the champion again.

    The version that was the champion gets the tag `rolled_back` with the reason, and no promotion takes it again while
    it has that tag. A rollback that was cut off is finished, not repeated. Where the version has a package in the
    SageMaker Model Registry, that is rejected.

    Raises:
        UserError: there is no such model, no champion or no previous version, or the registry cannot be used.
    """
    reason = " ".join(reason.split()) or "no reason given"
    with open_registry("the command again") as client, exclusive():
        _check_model(client, name)
        move = settle(client, name)
        if move is None or move.action != "rollback":
            move = _plan(client, name, reason)
            carry_out(client, name, move)
        bad = find_version(client, name, move.tagged)
        good = find_version(client, name, move.champion)
    package = bad.tags.get("sagemaker_package") if bad is not None else None
    return Rollback(
        name=name,
        champion=move.champion,
        weights_digest=str(good.tags.get(WEIGHTS_TAG, "")) if good is not None else "",
        rolled_back=move.tagged,
        previous=move.previous or "",
        reason=move.tags["rolled_back"],
        warnings=_rejected(package, move.tags["rolled_back"]) if package else (),
    )


def _check_model(client: MlflowClient, name: str) -> None:
    try:
        client.get_registered_model(name)
    except Exception as error:
        if not is_absent(error):
            raise
        raise UserError(f"name: no model is registered as {name!r}; `modelmill models` lists them") from None


def _plan(client: MlflowClient, name: str, reason: str) -> Move:
    aliases = read_aliases(client, name)
    champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if champion is None:
        raise UserError(f"rollback: {name} has no champion; promote a version first")
    if previous is None or previous == champion:
        raise UserError(
            f"rollback: {name} has no version before its champion {champion}; set the alias {CHAMPION} to another in "
            "MLflow, or promote one"
        )
    target = find_version(client, name, previous)
    if target is None:
        raise UserError(f"rollback: {name} version {previous} is not in the registry any more; promote another one")
    before = target.tags.get("promotion_replaced") or None
    if before is not None and (before == champion or find_version(client, name, before) is None):
        before = None
    tags = {
        "rolled_back": reason,
        "rolled_back_by": whoever(),
        "rolled_back_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rolled_back_to": previous,
    }
    return Move("rollback", previous, champion, before, previous, champion, tags)


def _rejected(package: str, reason: str) -> tuple[str, ...]:
    """Reject a package of SageMaker; the champion has moved already, so trouble there is a warning."""
    from modelmill.components.registry.sagemaker_mirror import reject_package

    try:
        reject_package(package, f"rolled back: {reason}")
    except Exception as error:  # whatever AWS, its SDK or the network says
        return (
            f"SageMaker does not know of it yet ({one_line(error)}); run: aws sagemaker update-model-package"
            f" --model-approval-status Rejected --model-package-arn {package}",
        )
    return ()
