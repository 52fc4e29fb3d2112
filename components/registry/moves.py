"""Moving the champion from one version to another, so that a crash at any point leaves nothing half done.

Several aliases change and MLflow changes one at a time. So the whole move is first written to the registered model, as
one tag. Whoever comes next finishes it if the champion has moved already, and takes it back if not.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from modelmill.components.core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE, CHALLENGER, CHAMPION, PREVIOUS = "candidate", "challenger", "champion", "previous"
PENDING_TAG = "modelmill.pending_move"
logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class Move:
    """One change of the champion.

    Attributes:
        action: what asks for it.
        champion: version that becomes the champion.
        replaced: the champion until now, None for the first one.
        previous: version that `previous` points to afterwards, None for no such alias.
        previous_before: what it points to until now.
        tagged: version that says why.
        tags: what it says.
    """

    action: Literal["promote", "rollback"]
    champion: str
    replaced: str | None
    previous: str | None
    previous_before: str | None
    tagged: str
    tags: dict[str, str] = field(default_factory=dict)


def read_aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Alias to version of a registered model, as it is now."""
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def carry_out(client: MlflowClient, name: str, move: Move) -> None:
    """Move the champion.

    Raises:
        UserError: somebody else moved it at the same time.
    """
    client.set_registered_model_tag(name, PENDING_TAG, json.dumps(asdict(move), sort_keys=True))
    _finish(client, name, move)


def settle(client: MlflowClient, name: str) -> Move | None:
    """Bring a move that was cut off to an end.

    Returns:
        The move, if its champion had moved already and it is finished now; None where nothing was left or it was
        taken back.

    Raises:
        UserError: what was written about it cannot be read.
    """
    model = client.get_registered_model(name)
    text = model.tags.get(PENDING_TAG)
    if text is None:
        return None
    try:
        move = Move(**json.loads(text))
    except (ValueError, TypeError):
        raise UserError(
            f"registry: the tag {PENDING_TAG} of {name} cannot be read; check its aliases and delete the tag in MLflow"
        ) from None
    now = {alias: str(version) for alias, version in model.aliases.items()}
    champion = now.get(CHAMPION)
    if champion == move.champion:
        logger.warning("finishing a %s of %s to version %s that was cut off", move.action, name, move.champion)
        _finish(client, name, move)
        return move
    if champion == move.replaced:
        logger.warning("taking back a %s of %s to version %s that was cut off", move.action, name, move.champion)
        _point(client, name, now, PREVIOUS, move.previous_before)
    client.delete_registered_model_tag(name, PENDING_TAG)
    return None


def _finish(client: MlflowClient, name: str, move: Move) -> None:
    now = read_aliases(client, name)
    # The champion, which people load, is moved when all that it takes to go back is in place.
    _point(client, name, now, PREVIOUS, move.previous)
    _point(client, name, now, CHAMPION, move.champion)
    if now.get(CHALLENGER) == move.champion:
        _point(client, name, now, CHALLENGER, None)
    for tag, value in move.tags.items():
        client.set_model_version_tag(name, move.tagged, tag, value)
    client.delete_registered_model_tag(name, PENDING_TAG)
    found = read_aliases(client, name)
    if (found.get(CHAMPION), found.get(PREVIOUS)) != (move.champion, move.previous):
        raise UserError(
            f"registry: another process moved the champion of {name} at the same time (it is version "
            f"{found.get(CHAMPION)} now); look at `modelmill models {name}` and run one of them again"
        )


def _point(client: MlflowClient, name: str, now: dict[str, str], alias: str, version: str | None) -> None:
    if version is not None and now.get(alias) != version:
        client.set_registered_model_alias(name, alias, version)
    elif version is None and alias in now:
        client.delete_registered_model_alias(name, alias)
