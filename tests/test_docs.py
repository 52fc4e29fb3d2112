"""What the documentation says must be true: commands exist, links lead somewhere, recipes and targets are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from modelmill.pipelines import catalog
from modelmill.pipelines.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    commands = re.findall(r"^\s*modelmill ([a-z].*)$", text, flags=re.MULTILINE)
    commands += re.findall(r"`modelmill ([a-z][^`]*)`", text)
    assert isinstance(cli, click.Group)
    context = click.Context(cli)
    for command in commands:
        words = shlex.split(command, comments=True)
        found = cli.get_command(context, words[0])
        assert found is not None, f"{ids(page)}: modelmill {command}"
        options = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in words[1:] if word.startswith("-") and word != "-->"}
        assert used <= options | {"--help"}, f"{ids(page)}: modelmill {command}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_recipes_and_files_named_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"\b(?:laptop|gpu|trainium)/[a-z0-9-]+\b", text))
    assert named <= set(catalog.SHIPPED.recipe_names())
    files = set(re.findall(r"`((?:components|pipelines|tests|notebooks|docs)/[\w./-]+)`", text))
    assert not [name for name in files if "<" not in name and not (ROOT / name).exists()]


def test_make_targets_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"\bmake ([a-z-]+)\b(?=`|\s+#)", page.read_text()))
        assert named <= targets, ids(page)
