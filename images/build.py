"""Build the images of this checkout with docker, podman or buildah.

    python -m images.build cpu
    python -m images.build gpu --base NAME@sha256:... --registry 123456789012.dkr.ecr.eu-west-1.amazonaws.com/modelmill
    python -m images.build cpu -- --secret id=pip,src=pip.conf

What follows `--` goes to the engine. `build/images/<family>.json` says what was built (digest, MB, base), and
`build/images/<family>.cdx.json` is its bill of materials.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from images.tag import FAMILIES, ROOT, content_tag, inputs, sources, version
from modelmill.components.core.errors import UserError
from modelmill.components.core.images import FAMILIES as STEP_IMAGES

BUILT = ROOT / "build" / "images"
ENGINES = ("docker", "podman", "buildah")
NAMES = {**STEP_IMAGES, "mlflow": "modelmill-mlflow"}
_BILL = "/opt/modelmill/sbom.cdx.json"


@dataclass(frozen=True)
class Built:
    """One image as it lies in the engine's store."""

    family: str
    reference: str
    digest: str  # of the local image; a registry answers a push with the one to write into a profile
    base: str
    megabytes: float  # of all layers, uncompressed


def _run(command: Sequence[str], **options: object) -> str:
    """Standard output of a command that must succeed; its errors go to the terminal."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise UserError(f"images: `{' '.join(command[:3])} ...` ended with {done.returncode}; its output says why")
    return done.stdout


def engine_of(wanted: str | None) -> str:
    """The wanted engine, or the first that is installed and works.

    Raises:
        UserError: none is.
    """
    for name in [wanted] if wanted else ENGINES:
        if shutil.which(name) and (wanted or _works(name)):
            return name
    raise UserError(f"--engine: {wanted or ', '.join(ENGINES)} not found; install one of {', '.join(ENGINES)}")


def _works(engine: str) -> bool:
    """Whether an engine can build: docker's command is often there without its daemon."""
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([engine, "info"], capture_output=True, timeout=20).returncode == 0
    return False


def default_base(family: str) -> str:
    """The base the Dockerfile names."""
    match = re.search(r"^ARG BASE=(\S+)$", (ROOT / "images" / family / "Dockerfile").read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1)


def pinned(engine: str, base: str) -> str:
    """A base by digest: as given, else as the engine's store holds it (`pull` first).

    Raises:
        UserError: the store does not hold it.
    """
    if "@sha256:" in base:
        return base
    store = "podman" if engine == "buildah" and shutil.which("podman") else engine
    if store == "buildah":
        command = ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageDigest}}", base]
    else:
        command = [store, "image", "inspect", "--format", "{{index .RepoDigests 0}}", base]
    done = subprocess.run(command, capture_output=True, text=True)
    digest = re.search(r"sha256:[0-9a-f]{64}", done.stdout)
    if done.returncode or digest is None:
        raise UserError(f"--base: {base} is not here; `{engine} pull {base}`, or name it as NAME@sha256:...")
    name = re.sub(r":[^:/]+$", "", base)
    return f"{name}@{digest.group()}"


def epoch() -> str:
    """`SOURCE_DATE_EPOCH`, else the time of the commit."""
    return os.environ.get("SOURCE_DATE_EPOCH") or _run(["git", "log", "-1", "--format=%ct"], cwd=ROOT).strip()


def build_wheel() -> Path:
    """Build the wheel into `build/wheel` from a copy of the sources, so that no stale build folder leaks into it."""
    target = ROOT / "build" / "wheel"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        copied = [*sources(), *(Path(name) for name in ("README.md", "LICENSE"))]
        for path in copied:
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, Path(folder) / path)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch()}
        _run([*command, "-w", str(target), folder], env=environment)
    return next(target.glob("modelmill-*.whl"))


def labels(family: str, base: str, tag: str, source: str) -> dict[str, str]:
    """The standard annotations of an image (OCI image specification, annotations.md)."""
    revision = _run(["git", "rev-parse", "HEAD"], cwd=ROOT).strip()
    command = ["git", "status", "--porcelain", "--", *map(str, inputs(family))]
    dirty = "-dirty" if _run(command, cwd=ROOT).strip() else ""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(epoch())))
    name, _, digest = base.partition("@")
    found = {"title": NAMES[family], "version": tag, "revision": revision + dirty, "created": created}
    found |= {"base.name": name, "base.digest": digest} | ({"source": source} if source else {})
    return {f"org.opencontainers.image.{key}": value for key, value in found.items()}


def read_file(engine: str, image: str, path: str) -> bytes:
    """One file of an image."""
    if engine == "buildah":
        container = _run(["buildah", "from", "--pull-never", image]).strip()
        try:
            return (Path(_run(["buildah", "mount", container]).strip()) / path.lstrip("/")).read_bytes()
        finally:
            _run(["buildah", "rm", container])
    container = _run([engine, "create", image]).strip()
    try:
        archive = subprocess.run([engine, "cp", f"{container}:{path}", "-"], capture_output=True, check=True).stdout
    finally:
        _run([engine, "rm", container])
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        member = files.extractfile(files.next())  # type: ignore[arg-type]
        assert member is not None
        return member.read()


def _described(engine: str, image: str) -> tuple[str, float]:
    """Digest and MB of an image in the engine's store."""
    if engine == "buildah":
        shown = json.loads(_run(["buildah", "images", "--json", image]))[0]
        digest = _run(["buildah", "inspect", "--type", "image", "--format", "{{.FromImageDigest}}", image]).strip()
        number, unit = shown["size"].split()
        return digest, round(float(number) * {"KB": 1e-3, "MB": 1.0, "GB": 1e3}[unit], 1)
    shown = json.loads(_run([engine, "image", "inspect", image]))[0]
    digest = next((each.partition("@")[2] for each in shown.get("RepoDigests", [])), shown["Id"])
    return digest, round(shown["Size"] / 1e6, 1)


def build(family: str, *, engine: str, base: str, registry: str, source: str, options: Sequence[str] = ()) -> Built:
    """Build one image and write its record and its bill of materials.

    Args:
        family: a folder of `images/`.
        engine: docker, podman or buildah.
        base: reference of the base image by digest.
        registry: put before the image's name; empty for a local image.
        source: address of the sources for the label; empty leaves it out.
        options: more options for the engine, such as `--secret`.
    """
    tag = content_tag(family, base)
    reference = "/".join(filter(None, [registry.rstrip("/"), f"{NAMES[family]}:{tag}"]))
    command = [engine, "build", "-f", f"images/{family}/Dockerfile", "-t", reference, "--build-arg", f"BASE={base}"]
    if engine == "docker":
        command += ["--build-arg", f"SOURCE_DATE_EPOCH={epoch()}"]
    else:  # the OCI format has no health check
        command += ["--format", "docker", "--timestamp", epoch()]
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        command += ["--build-arg", name] if name in os.environ else []
    for name, value in labels(family, base, tag, source).items():
        command += ["--label", f"{name}={value}"]
    _run([*command, *options, "."], cwd=ROOT)
    digest, megabytes = _described(engine, reference)
    built = Built(family, reference, digest, base, megabytes)
    BUILT.mkdir(parents=True, exist_ok=True)
    (BUILT / f"{family}.cdx.json").write_bytes(read_file(engine, reference, _BILL))
    (BUILT / f"{family}.json").write_text(json.dumps(asdict(built), indent=1) + "\n")
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--base", help="base image; with one family only")
    parser.add_argument("--engine", choices=ENGINES, help="default: the first that is installed")
    parser.add_argument("--registry", default="", help="registry and path before the image's name")
    parser.add_argument("--source", default="", help="address of the sources, for the image's label")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:cut])
    if arguments.base and len(arguments.families) > 1:
        parser.error("--base: every family has a base of its own; build them one by one")
    try:
        engine = engine_of(arguments.engine)
        if set(arguments.families) != {"mlflow"}:
            build_wheel()
        for family in arguments.families:
            base = pinned(engine, arguments.base or default_base(family))
            place = {"engine": engine, "registry": arguments.registry, "source": arguments.source}
            built = build(family, base=base, options=given[cut + 1 :], **place)
            print(f"{built.reference}  {built.megabytes} MB  {built.digest}")
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(f"modelmill {version()}: push them, then write NAME@DIGEST into the profile's `images`")


if __name__ == "__main__":
    main()
