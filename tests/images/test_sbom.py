"""The bill of materials against CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/): the parts that we write."""

from __future__ import annotations

import importlib.metadata
import json
import re
from email.message import Message
from typing import Any

import jsonschema
import pytest

from images.sbom import bill

PURL = r"^pkg:pypi/[a-z0-9-]+@[A-Za-z0-9.%_!-]+$"
LICENSE = {
    "oneOf": [
        {"required": ["expression"], "properties": {"expression": {"type": "string"}}, "additionalProperties": False},
        {
            "required": ["license"],
            "properties": {"license": {"required": ["name"], "properties": {"name": {"minLength": 1}}}},
            "additionalProperties": False,
        },
    ]
}
COMPONENT = {
    "type": "object",
    "required": ["type", "name", "version", "bom-ref", "purl"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "library"},
        "name": {"type": "string", "minLength": 1},
        "version": {"type": "string", "minLength": 1},
        "bom-ref": {"type": "string", "minLength": 1},
        "purl": {"type": "string", "pattern": PURL},
        "licenses": {"type": "array", "items": LICENSE, "minItems": 1},
    },
}
SCHEMA = {
    "type": "object",
    "required": ["bomFormat", "specVersion", "components", "dependencies"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"const": "http://cyclonedx.org/schema/bom-1.6.schema.json"},
        "bomFormat": {"const": "CycloneDX"},
        "specVersion": {"const": "1.6"},
        "version": {"type": "integer", "minimum": 1},
        "metadata": {"type": "object"},
        "components": {"type": "array", "uniqueItems": True, "items": COMPONENT},
        "dependencies": {
            "type": "array",
            "uniqueItems": True,
            "items": {"required": ["ref"], "properties": {"dependsOn": {"type": "array", "uniqueItems": True}}},
        },
    },
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return bill(list(importlib.metadata.distributions()))


def test_document_follows_the_format(document: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(json.dumps(document)), SCHEMA)


def test_document_names_every_distribution_once(document: dict[str, Any]) -> None:
    names = [re.sub(r"[-_.]+", "-", each["name"]).lower() for each in document["components"]]
    assert len(names) == len(set(names))
    by_name = dict(zip(names, document["components"], strict=True))
    assert by_name["pydantic-core"]["version"] == importlib.metadata.version("pydantic_core")
    assert by_name["modelmill"]["licenses"] == [{"license": {"name": "Apache-2.0"}}]


def test_references_are_whole(document: dict[str, Any]) -> None:
    known = {each["bom-ref"] for each in document["components"]}
    assert {each["ref"] for each in document["dependencies"]} == known
    assert all(set(each["dependsOn"]) <= known for each in document["dependencies"])
    needs = {each["ref"].partition("@")[0]: each["dependsOn"] for each in document["dependencies"]}
    assert any(each.startswith("pkg:pypi/pydantic-core@") for each in needs["pkg:pypi/pydantic"])


class Plain(importlib.metadata.Distribution):
    """A distribution of three lines of metadata."""

    def __init__(self, lines: dict[str, list[str]]) -> None:
        self.lines = lines

    @property
    def metadata(self) -> Any:
        message = Message()
        for name, values in {"Name": ["Odd_Name"], "Version": ["1.0+cpu"], **self.lines}.items():
            for value in values:
                message[name] = value
        return message

    def read_text(self, filename: str) -> None:
        return None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("lines", "licenses"),
    [
        ({"License-Expression": ["MIT OR Apache-2.0"], "License": ["other"]}, [{"expression": "MIT OR Apache-2.0"}]),
        (
            {"Classifier": ["License :: OSI Approved :: MIT License", "Topic :: X"]},
            [{"license": {"name": "MIT License"}}],
        ),
        ({"License": ["BSD\nlong text follows"]}, [{"license": {"name": "BSD"}}]),
        ({}, None),
    ],
    ids=["expression", "classifier", "text", "none"],
)
def test_licenses_are_what_the_metadata_says(lines: dict[str, list[str]], licenses: Any) -> None:
    (component,) = bill([Plain(lines)])["components"]
    assert component.get("licenses") == licenses
    assert component["purl"] == "pkg:pypi/odd-name@1.0%2Bcpu"
