"""Tags by content: what goes into an image decides its tag, so equal inputs get equal tags and a tag never moves.

python -m images.tag cpu --base docker.io/library/python@sha256:...
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from modelmill.components.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("cpu", "gpu", "neuron", "mlflow")
_SHARED = ("constraints.txt", "images/install.sh", "images/sbom.py")
_WHEEL = ("components", "pipelines", "setup.cfg", "pyproject.toml")
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


def version() -> str:
    """Version of the package, as `setup.cfg` of this checkout says."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config["metadata"]["version"]


def sources() -> list[Path]:
    """Files of the wheel that git knows or would add, relative to the checkout."""
    command = ["git", "ls-files", "-zco", "--exclude-standard", "--", *_WHEEL]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return sorted(Path(name) for name in listed if name and (ROOT / name).is_file())


def inputs(family: str) -> Iterator[Path]:
    """Every file of the checkout that decides an image, relative to it."""
    own = (ROOT / "images" / family).iterdir()
    yield from sorted(path.relative_to(ROOT) for path in own if path.is_file())
    yield from map(Path, _SHARED)
    if family != "mlflow":  # the server holds no code of ours
        yield from sources()


def content_tag(family: str, base: str) -> str:
    """`<version>-<12 hex digits>` from the files of the checkout and the base image.

    Args:
        family: a folder of `images/`.
        base: reference of the base image, ending in its digest.

    Raises:
        UserError: the base has no digest.
    """
    match = _DIGEST.search(base)
    if match is None:
        raise UserError(f"--base: {base!r} names no digest; write it as NAME@sha256:..., or pull it first")
    digest = hashlib.sha256(match.group().encode())
    for path in inputs(family):
        content = hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
        digest.update(f"\n{path.as_posix()} {content}".encode())
    return f"{version()}-{digest.hexdigest()[:12]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--base", required=True, help="reference of the base image with its digest")
    arguments = parser.parse_args()
    try:
        print(content_tag(arguments.family, arguments.base))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
