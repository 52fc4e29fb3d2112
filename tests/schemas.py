"""Whether Kubernetes would take an object: strict schemas of the built-in kinds, schema and rules of the custom ones.

Built-in kinds are checked against the three newest versions that kubernetes-validate holds. Custom resources are
checked against the CRDs in the folder `MODELMILL_CRDS` (default `../shared/crds` beside the checkout): the structural
schema with unknown fields refused (an API server would drop them silently), keys of list maps, and the CEL rules.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import pytest
import yaml
from kubernetes_validate import utils as builtin
from referencing import Registry, Resource

CRDS_VARIABLE = "MODELMILL_CRDS"
VERSIONS: tuple[str, ...] = tuple(dict.fromkeys(builtin.all_versions()))[-3:]  # the newest three
_METADATA = {
    "name", "generateName", "namespace", "labels", "annotations", "uid", "resourceVersion", "generation",
    "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "finalizers", "ownerReferences",
    "managedFields", "selfLink",
}  # fmt: skip
_Json = dict[str, Any]
logging.getLogger("celpy").setLevel(logging.WARNING)  # it describes every evaluation in pages


def crd_folder() -> Path | None:
    """Folder with the CRDs, or None where there is none."""
    folder = Path(os.environ.get(CRDS_VARIABLE) or Path(__file__).parents[2] / "shared/crds")
    return folder if any(folder.glob("*.yaml")) else None


def require_crds() -> Path:
    """The same, for tests that cannot do without: they are skipped where there is none."""
    folder = crd_folder()
    if folder is None:
        pytest.skip(f"no CRDs: {CRDS_VARIABLE} names no folder with them, and ../shared/crds does not exist")
    return folder


def is_custom(item: Mapping[str, Any]) -> bool:
    """Whether a kind belongs to a CRD: built-in groups have no dot, or end in k8s.io without a project before it."""
    group = item["apiVersion"].rpartition("/")[0]
    return "." in group and not re.fullmatch(r"[a-z]+(\.authorization|\.apiserver)?\.k8s\.io", group)


def problems(item: _Json, old: _Json | None = None) -> list[str]:
    """Why an API server would not take an object, one line each; empty when it would.

    Args:
        item: the object, as written or sent.
        old: what it replaces: rules about changes hold only then.
    """
    return custom_problems(item, old) if is_custom(item) else builtin_problems(item)


def assert_valid(item: _Json) -> None:
    """Fail with every problem of an object; skipped where its CRD cannot be had."""
    if is_custom(item):
        require_crds()
    found = problems(item)
    name = item.get("metadata", {}).get("name", "")
    assert not found, f"{item['kind']} {name}: " + "; ".join(found)


def builtin_problems(item: _Json, versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """Problems of a built-in kind: unknown fields, wrong types, missing fields, in any of the versions."""
    found = []
    for version in versions:
        validator = _builtin(item["apiVersion"], item["kind"], version)
        if validator is None:
            found.append(f"Kubernetes {version} has no kind {item['kind']} in {item['apiVersion']}")
        else:
            found += [f"{version}: {_described(error)}" for error in validator.iter_errors(item)]
    return found


def custom_problems(item: _Json, old: _Json | None = None, *, rules: bool = True) -> list[str]:
    """Problems of a custom resource by its CRD; `old` as for `problems`, `rules`: whether CEL rules are evaluated."""
    schema = crd_schema(item["apiVersion"], item["kind"])
    if schema is None:
        return [f"no CRD for {item['kind']} in {item['apiVersion']}"]
    whole = with_defaults(item)
    errors = _validator(item["apiVersion"], item["kind"]).iter_errors(whole)
    found = [_described(error) for error in errors]
    return found or (list(_rules(schema, whole, old, "$")) if rules else [])


def with_defaults(item: _Json) -> _Json:
    """A copy of a custom resource with the defaults that an API server fills in."""
    schema = crd_schema(item["apiVersion"], item["kind"])
    whole = copy.deepcopy(item)
    if schema is not None:
        _fill(schema, whole)
    return whole


def crd_schema(api_version: str, kind: str) -> _Json | None:
    """openAPIV3Schema of a custom kind, closed against unknown fields; None without its CRD."""
    folder = crd_folder()
    return None if folder is None else _crds(folder).get((api_version, kind))


@cache
def _builtin(api_version: str, kind: str, version: str) -> Any:
    folder = f"kubernetes-json-schema/v{version}-local-strict"
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    try:
        schema = builtin.schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    except FileNotFoundError:
        return None
    registry = Resource.from_contents(schema) @ (_definitions(folder, version) @ Registry())  # type: ignore[var-annotated]
    return jsonschema.Draft202012Validator(schema, registry=registry)


@cache
def _definitions(folder: str, version: str) -> Any:
    return Resource.from_contents(builtin.schema_contents(f"{folder}/_definitions.json", version))


@cache
def _crds(folder: Path) -> dict[tuple[str, str], _Json]:
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.load_all(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if not document or document.get("kind") != "CustomResourceDefinition":
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                schema = _closed(version["schema"]["openAPIV3Schema"])
                metadata = schema["properties"].setdefault("metadata", {})
                schema["properties"]["metadata"] = {
                    "type": "object",
                    "properties": {name: metadata.get("properties", {}).get(name, {}) for name in sorted(_METADATA)},
                    "additionalProperties": False,
                }
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def _closed(schema: Any) -> Any:
    """A structural schema as JSON schema: unknown fields refused, `nullable` and int-or-string as their types."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _closed(part) for name, part in value.items()} if key == "properties" else _closed(value)
        for key, value in schema.items()
    }
    kind = closed.get("type")
    open_ended = closed.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in closed
    if kind == "object" and not open_ended:
        closed["additionalProperties"] = False
        if closed.get("x-kubernetes-embedded-resource"):
            closed["properties"] = {"apiVersion": {}, "kind": {}, "metadata": {}, **closed.get("properties", {})}
    if closed.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    elif kind and closed.get("nullable"):
        closed["type"] = [kind, "null"]
    return closed


@cache
def _validator(api_version: str, kind: str) -> Any:
    return jsonschema.Draft4Validator(crd_schema(api_version, kind))  # OpenAPI 3.0 speaks draft 4


def _described(error: jsonschema.ValidationError) -> str:
    return f"{error.json_path}: {error.message[:300]}"


def _fill(schema: _Json, value: Any) -> None:
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and isinstance(part, dict) and "default" in part:
                value[name] = copy.deepcopy(part["default"])
    for part, child, _ in _children(schema, value, "$"):
        _fill(part, child)


def _children(schema: _Json, value: Any, path: str) -> Iterator[tuple[_Json, Any, str]]:
    if isinstance(value, dict):
        others = schema.get("additionalProperties")
        for name, child in value.items():
            part = schema.get("properties", {}).get(name) or others
            if isinstance(part, dict):
                yield part, child, f"{path}.{name}"
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, child in enumerate(value):
            yield schema["items"], child, f"{path}[{number}]"


def _rules(schema: _Json, value: Any, old: Any, path: str) -> Iterator[str]:
    """CEL rules and list-map keys that do not hold, at a value and below it."""
    if keys := schema.get("x-kubernetes-list-map-keys"):
        names = [tuple(entry.get(key) for key in keys) for entry in value]
        yield from (f"{path}: {name} stands there twice" for name in sorted({n for n in names if names.count(n) > 1}))
    for rule in schema.get("x-kubernetes-validations", []):
        changes = re.search(r"\boldSelf\b", rule["rule"]) is not None
        if changes and old is None:
            continue
        variables = {"self": celpy.json_to_cel(value)} | ({"oldSelf": celpy.json_to_cel(old)} if changes else {})
        if not _program(rule["rule"]).evaluate(variables):
            yield f"{path}: {rule.get('message') or rule['rule']}"
    for part, child, name in _children(schema, value, path):
        yield from _rules(part, child, _counterpart(schema, value, old, child, name), name)


def _counterpart(schema: _Json, value: Any, old: Any, child: Any, path: str) -> Any:
    """What stood in a child's place before: by name in objects, by key in list maps, else nothing."""
    if isinstance(value, dict):
        return old.get(path.rpartition(".")[2]) if isinstance(old, dict) else None
    keys = schema.get("x-kubernetes-list-map-keys")
    if not keys or not isinstance(old, list):
        return None
    same = (entry for entry in old if all(entry.get(key) == child.get(key) for key in keys))
    return next(same, None)


@cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule), functions=_KUBERNETES_FUNCTIONS)


def _find(text: Any, pattern: Any) -> Any:
    found = re.search(str(pattern), str(text))
    return celpy.celtypes.StringType(found[0] if found else "")


def _split(text: Any, separator: Any) -> Any:
    return celpy.celtypes.ListType([celpy.celtypes.StringType(part) for part in str(text).split(str(separator))])


_KUBERNETES_FUNCTIONS = {"find": _find, "split": _split}  # what API servers add to CEL and these rules use
