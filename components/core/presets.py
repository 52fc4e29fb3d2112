"""Presets: YAML files found by name, extended, overridden and checked. Recipes and profiles are read this way."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from modelmill.components.core.errors import UserError

ModelType = TypeVar("ModelType", bound=BaseModel)


def suggest(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` for a word close to a known one, else the known ones."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(sorted(known))}"


@dataclass(frozen=True)
class Presets:
    """Files of one kind.

    Attributes:
        noun: what a file is called in errors.
        folders: where they lie; the first folder that has a name wins.
        option: the command's option for overrides.
        example: an override, for errors.
        listing: the command that shows the names.
    """

    noun: str
    folders: tuple[Path, ...]
    option: str
    example: str
    listing: str

    def names(self) -> list[str]:
        """Names of all files, such as `laptop/llama-demo`."""
        found = {
            path.relative_to(folder).with_suffix("").as_posix()
            for folder in self.folders
            for path in folder.rglob("*.yaml")
        }
        return sorted(found)

    def find(self, reference: str) -> Path:
        """Path of a preset named by file or by its name.

        Raises:
            UserError: there is none; similar names are suggested.
        """
        path = Path(reference)
        if path.suffix in (".yaml", ".yml"):
            if path.is_file():
                return path
            raise UserError(
                f"{self.noun}: {reference} does not exist; give a file, or a name that `{self.listing}` shows"
            )
        for folder in self.folders:
            shipped = folder / f"{reference}.yaml"
            if shipped.is_file() and shipped.resolve().is_relative_to(folder.resolve()):
                return shipped
        raise UserError(f"{self.noun}: no {self.noun} is called {reference!r}; {suggest(reference, self.names())}")

    def read(self, reference: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Values of a preset with what it extends, then the overrides (`dotted.key=value`, the value read as YAML).

        Raises:
            UserError: one line naming the file or the override and the fix.
        """
        values = self._read(self.find(reference), seen=())
        for override in overrides:
            self._apply(values, override)
        return values

    def _read(self, path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
        if path.resolve() in seen:
            raise UserError(f"extends: {path} extends itself; remove one of the two `extends:` lines")
        values = self._parse(path)
        base = values.pop("extends", None)
        if base is None:
            return values
        sibling = path.parent / str(base)
        parent = sibling if sibling.is_file() else self.find(str(base))
        return merge(self._read(parent, (*seen, path.resolve())), values)

    def _parse(self, path: Path) -> dict[str, Any]:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" line {mark.line + 1}" if mark else ""
            raise UserError(f"{self.noun}: {path}{where} is not YAML ({getattr(error, 'problem', error)})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.noun}: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"{self.noun}: {path} cannot be read ({error.strerror}); check its permissions") from None
        if not isinstance(values, dict):
            raise UserError(
                f"{self.noun}: {path} holds no mapping; start from `{self.listing}` and a shipped {self.noun}"
            )
        return values

    def _apply(self, values: dict[str, Any], override: str) -> None:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{self.option}: {override!r} is not key=value; write for example {self.option} {self.example}"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{self.option}: the value {text!r} of {key} is not YAML; quote it") from None
        *parents, last = key.split(".")
        for parent in parents:
            child = values.get(parent)
            if child is None:  # absent, or a section left empty in the file
                child = values[parent] = {}
            if not isinstance(child, dict):
                raise UserError(f"{self.option}: {key} goes through {parent}, which is a value, not a section")
            values = child
        values[last] = value


def check(model: type[ModelType], values: Mapping[str, Any], noun: str) -> ModelType:
    """Check values against a model, turning pydantic's report into one line a field.

    Raises:
        UserError: every wrong field with its value and what is expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_sentence(detail, model, noun) for detail in error.errors())) from None


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping; anything else is replaced as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _sentence(detail: Any, model: type[BaseModel], noun: str) -> str:
    place = ".".join(str(part) for part in detail["loc"]) or noun
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{place}: no such parameter; {suggest(str(detail['loc'][-1]), _fields(model, detail['loc'][:-1]))}"
    if kind == "missing":
        return f"{place}: is missing; add it to the {noun}"
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:  # sections that do not fit together: the message names both
        return message
    shown = "" if isinstance(value, (dict, BaseModel)) or repr(value) in message else f"{value!r}: "
    return f"{place}: {shown}{message}"


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Field names of the section at a path, through optional sections, lists and alternatives told apart by a tag."""
    sections = [model]
    for part in path:
        if isinstance(part, int):
            continue  # an item has the fields of its list's annotation
        tagged = [s for s in sections if part in _tags(s)]
        inner = [_sections(s.model_fields[part].annotation) for s in sections if part in s.model_fields]
        sections = tagged or [nested for found in inner for nested in found]
    return sorted({name for section in sections for name in section.model_fields})


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Models named anywhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [nested for option in getattr(annotation, "__args__", ()) for nested in _sections(option)]


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    """Values of a section's `type` field, which pydantic puts into the place of an error."""
    kind = section.model_fields.get("type")
    return getattr(kind.annotation, "__args__", ()) if kind else ()
