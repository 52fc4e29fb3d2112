"""Selectors and patches of the fake Kubernetes API."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.fakes.kubernetes_objects import ApiError, Change, Json, ResourceType


def seen(change: Change, kind: ResourceType, namespace: str, query: dict[str, str]) -> Json | None:
    """How a watch sees a change: objects enter and leave its selection."""
    if change.key[:2] != (kind.group, kind.plural) or namespace not in ("", change.key[2]):
        return None
    now = selected(change.item, query)
    before = change.before is not None and selected(change.before, query)
    if not now and not before:
        return None
    what = change.type
    if what == "MODIFIED" and now != before:
        what = "ADDED" if now else "DELETED"
    return {"type": what, "object": {**change.item, "apiVersion": kind.api_version}}


def selected(item: Json, query: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels", {})
    terms = re.split(r",(?![^(]*\))", query.get("labelSelector") or "")
    fields = [term for term in (query.get("fieldSelector") or "").split(",") if term]
    return all(_label_fits(labels, term.strip()) for term in terms if term) and all(
        _field_fits(item, term) for term in fields
    )


def _label_fits(labels: dict[str, str], term: str) -> bool:
    if found := re.match(r"^(\S+)\s+(in|notin)\s+\((.*)\)$", term):
        values = [value.strip() for value in found[3].split(",")]
        return (labels.get(found[1]) in values) == (found[2] == "in")
    if "!=" in term:
        name, value = term.split("!=")
        return labels.get(name.strip()) != value.strip()
    if "=" in term:
        name, value = re.split("==?", term)
        return labels.get(name.strip()) == value.strip()
    return term[1:] not in labels if term.startswith("!") else term in labels


def _field_fits(item: Json, term: str) -> bool:
    unequal = "!=" in term
    path, value = re.split("!=|==?", term)
    found: Any = item
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return (str(found or "") == value) != unequal


def patched(item: Json, patch: Any, content_type: str) -> Json:
    """The object after a patch; a strategic one is taken as a merge patch, lists replaced."""
    if "json-patch" not in content_type:
        return _merged(item, patch)
    made = json.loads(json.dumps(item))
    for step in patch:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].strip("/").split("/")]
        target = made
        for name in parents:
            target = target[int(name)] if isinstance(target, list) else target[name]
        if step["op"] == "test":
            if target.get(last) != step["value"]:
                raise ApiError(422, "Invalid", f"test of {step['path']} failed")
        elif step["op"] == "remove":
            if last not in target:
                raise ApiError(422, "Invalid", f"there is nothing at {step['path']}")
            del target[last]
        elif isinstance(target, list):
            target.insert(len(target) if last == "-" else int(last), step["value"])
        else:
            target[last] = step["value"]
    return made


def _merged(item: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    made = dict(item) if isinstance(item, dict) else {}
    for name, value in patch.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = _merged(made.get(name), value)
    return made
