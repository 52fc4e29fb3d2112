"""What the registry holds: models, their versions, and what was decided about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.mlflow_store import sqlite_path
from modelmill.components.registry.store import FILES_TAG, WEIGHTS_TAG, all_versions, open_registry

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TAGS = (
    WEIGHTS_TAG,
    FILES_TAG,
    *("dataset_digest", "base_digest", "method", "flavor", "recipe"),
    *("gate", "gate_metric", "gate_gain"),
    *("promotion", "promotion_reason", "promotion_by", "promotion_at", "rolled_back"),
    "sagemaker_package",
)


def list_models(name: str | None = None) -> list[dict[str, Any]]:
    """Registered models with their versions, the newest version first.

    Returns:
        One dict a model: `name`, `description`, `aliases` (alias to version) and `versions`, each with `version`,
        `aliases`, `created` (milliseconds) and its tags, where it has them.

    Raises:
        UserError: there is no model of that name, or the registry cannot be used.
    """
    database = sqlite_path(Home.current().tracking_uri)
    models: list[Any] = []
    if database is None or database.is_file():  # a look at an empty folder makes no store there
        with open_registry("the command again") as client:
            models = [_describe(client, model) for model in _registered(client) if name in (None, model.name)]
    if name is not None and not models:
        raise UserError(f"name: no model is registered as {name!r}; `modelmill models` lists them")
    return models


def _registered(client: MlflowClient) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_registered_models(max_results=200, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda model: str(model.name))


def _describe(client: MlflowClient, model: Any) -> dict[str, Any]:
    aliases = {alias: str(version) for alias, version in sorted(model.aliases.items())}
    versions = [
        {
            "version": str(version.version),
            "aliases": [alias for alias, number in aliases.items() if number == str(version.version)],
            "created": version.creation_timestamp,
            **{tag: version.tags[tag] for tag in _TAGS if tag in version.tags},
        }
        for version in reversed(all_versions(client, f"name = '{model.name}'"))
    ]
    return {"name": model.name, "description": model.description or "", "aliases": aliases, "versions": versions}
