"""Where finished outputs of steps are kept: a folder of the home, or a prefix in S3 when `MODELMILL_STORE` names one.

A home holds `<step>/<key>/` with `data/`, `manifest.json` and `tracking.jsonl`, published by one rename. S3 knows no
rename, so there the manifest is the commit:

<step>/<key>/<digest>/data/...        the files, below the digest of the manifest's content
<step>/<key>/<digest>/tracking.jsonl  the step's tracking points
<step>/<key>/manifest.json            written last, and only if there is none

Two writers of one key can differ in their bytes (training on other processors does); below its digest neither touches
what the other wrote, and S3 lets one manifest through. Unfinished folders, with checkpoints, stay in the home.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from modelmill.components.core import events, s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.store_cache import ENDPOINT_VARIABLE, Cache
from modelmill.components.core.uri import is_remote, split_s3

STORE_VARIABLE = "MODELMILL_STORE"  # s3://bucket/prefix for finished outputs; unset: the home keeps them
_MANIFEST, _POINTS = "manifest.json", "tracking.jsonl"
_BUSY = "ConditionalRequestConflict"  # another conditional write of the same object is under way
logger = logging.getLogger("modelmill")


class Store(Protocol):
    """Finished outputs by step and key; every one also has a folder in the home, `<home>/store/<step>/<key>`."""

    def find(self, step: str, key: str) -> Manifest | None:
        """Manifest of a finished output whose files are still there, or None; writes nothing."""

    def check(self, step: str) -> None:
        """Refuse before a step computes for hours what could not be kept.

        Raises:
            UserError: the store cannot be written.
        """

    def publish(self, partial: Path, manifest: Manifest, *, replace: bool) -> Manifest:
        """Make an output finished, in one moment.

        Args:
            partial: folder with `data/` and, if the step has points, `tracking.jsonl`; gone afterwards.
            manifest: of the data, with step and key.
            replace: take the place of an output that is there; otherwise the first of two equals stays.

        Returns:
            The manifest of the key's output, with its URI: another's, where another was first.
        """

    def points(self, manifest: Manifest) -> Path:
        """Tracking points of a finished output on this machine (a file that may be absent)."""


def open_store(folder: Path, uri: str | None = None) -> Store:
    """A store: the prefix in S3 that `uri` or `MODELMILL_STORE` names, else `folder`.

    Raises:
        UserError: it names no S3 prefix.
    """
    uri = uri or os.environ.get(STORE_VARIABLE)
    return S3Store(uri, folder, os.environ.get(ENDPOINT_VARIABLE) or None) if uri else LocalStore(folder)


class LocalStore:
    """Outputs in a folder of the home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, step: str, key: str) -> Manifest | None:
        path = self.folder / step / key / _MANIFEST
        if not path.exists():
            return None
        try:
            manifest = Manifest.read(path)
        except UserError:
            return None  # a damaged manifest is made again, like a damaged file
        root = Path(manifest.uri)  # what an S3 store left here counts as absent
        whole = all((root / e.path).is_file() and (root / e.path).stat().st_size == e.bytes for e in manifest.files)
        return manifest if whole and not is_remote(manifest.uri) else None

    def check(self, step: str) -> None:
        pass  # the step writes to the same disk, and finds out at once

    def publish(self, partial: Path, manifest: Manifest, *, replace: bool) -> Manifest:
        final = partial.with_name(manifest.key)
        manifest.uri = str(final / "data")
        manifest.write(partial / _MANIFEST)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        # Only now: killed before this line, a resumed step still finds its checkpoints.
        for path in final.iterdir():
            if path.name not in ("data", _MANIFEST, _POINTS):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return manifest

    def points(self, manifest: Manifest) -> Path:
        return Path(manifest.uri).parent / _POINTS


class S3Store:
    """Outputs below a prefix in S3; in the home a folder with the manifest stands for each that was used there."""

    def __init__(self, uri: str, folder: Path, endpoint_url: str | None = None) -> None:
        self.bucket, prefix = split_s3(uri.rstrip("/"), parameter=STORE_VARIABLE)
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri, self.folder, self.endpoint_url = f"s3://{self.bucket}/{prefix}".rstrip("/"), folder, endpoint_url

    def find(self, step: str, key: str) -> Manifest | None:
        # Listed before it is read: a role that may list only some prefixes is told "denied" of what is absent.
        place = f"{self.uri}/{step}/{key}"
        found = s3.list_objects(place, self.endpoint_url, STORE_VARIABLE)
        sizes = {f"s3://{self.bucket}/{entry.key}": entry.size for entry in found}
        if f"{place}/{_MANIFEST}" not in sizes:
            return None
        text = self.read(f"{step}/{key}/{_MANIFEST}")
        try:
            manifest = Manifest.parse(text, f"{place}/{_MANIFEST}")
        except UserError:
            return None
        manifest = self._placed(manifest, step, key)
        whole = all(sizes.get(f"{manifest.uri}/{entry.path}") == entry.bytes for entry in manifest.files)
        return manifest if whole else None

    def check(self, step: str) -> None:
        self._put(f"{step}/.writable", b"")

    def publish(self, partial: Path, manifest: Manifest, *, replace: bool) -> Manifest:
        """See `Store`; a failed upload leaves `partial` with its manifest, so that a retry need not compute again."""
        step, key = manifest.step, manifest.key
        manifest.uri = str(partial / "data")
        manifest.write(partial / _MANIFEST)
        mine = self._placed(manifest.model_copy(), step, key)
        self._upload(partial, mine)
        kept = self._commit(mine, replace)
        if kept.uri == mine.uri:
            Cache.current().adopt(mine.uri, partial / "data", [entry.remote() for entry in mine.files])
        else:
            logger.warning("%s was finished by another run meanwhile, with other bytes; taking that one", kept.uri)
            self._forget(mine)
        self._note(kept, partial / _POINTS if kept.uri == mine.uri else None)
        shutil.rmtree(partial)
        return kept

    def points(self, manifest: Manifest) -> Path:
        place = self.folder / manifest.step / manifest.key
        if not self._noted(manifest):
            self._note(manifest, None)
        shutil.rmtree(place.with_name(f"{manifest.key}.partial"), ignore_errors=True)  # killed after its commit
        return place / _POINTS

    def read(self, name: str) -> bytes:
        """Content of an object below the prefix.

        Raises:
            UserError: it is absent or cannot be read.
        """
        client = self._client()
        with s3.explained(f"{self.uri}/{name}", self.endpoint_url, STORE_VARIABLE):
            return client.get_object(Bucket=self.bucket, Key=f"{self.prefix}{name}")["Body"].read()

    def _placed(self, manifest: Manifest, step: str, key: str) -> Manifest:
        """The manifest with the URI its content has here: a bucket may have been copied from elsewhere."""
        manifest.uri = f"{self.uri}/{step}/{key}/{manifest.digest[:16]}/data"
        return manifest

    def _upload(self, partial: Path, manifest: Manifest) -> None:
        client, base = self._client(), manifest.uri.removesuffix("/data").removeprefix(f"s3://{self.bucket}/")
        paths = [(partial / "data" / entry.path, f"data/{entry.path}") for entry in manifest.files]
        if (points := partial / _POINTS).exists():
            paths.append((points, _POINTS))
        if manifest.total_bytes > 100_000_000:
            events.progress(f"uploading {manifest.total_bytes / 1e9:.1f} GB")
        for path, name in paths:
            with s3.explained(f"s3://{self.bucket}/{base}/{name}", self.endpoint_url, STORE_VARIABLE):
                s3.upload(client, path, self.bucket, f"{base}/{name}")

    def _commit(self, manifest: Manifest, replace: bool) -> Manifest:
        """Write the manifest, or yield to the one that is there and whole."""
        name = f"{manifest.step}/{manifest.key}/{_MANIFEST}"
        text = f"{manifest.model_dump_json(indent=1)}\n".encode()
        if not replace and not self._put(name, text, IfNoneMatch="*"):
            other = self.find(manifest.step, manifest.key)
            if other is not None:
                return other
            replace = True  # what is there is damaged
        if replace:
            self._put(name, text)
        return manifest

    def _note(self, manifest: Manifest, points: Path | None) -> None:
        """Let the home know an output: its manifest and points, in place of an earlier one's."""
        folder = self.folder / manifest.step / manifest.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if points is None:
            base = manifest.uri.removesuffix("/data").removeprefix(f"{self.uri}/")
            if s3.list_objects(f"{self.uri}/{base}/{_POINTS}", self.endpoint_url, STORE_VARIABLE):
                (folder / _POINTS).write_bytes(self.read(f"{base}/{_POINTS}"))
        elif points.exists():
            os.replace(points, folder / _POINTS)
        manifest.write(folder / _MANIFEST)

    def _noted(self, manifest: Manifest) -> bool:
        with suppress(UserError):
            return Manifest.read(self.folder / manifest.step / manifest.key / _MANIFEST).uri == manifest.uri
        return False

    def _forget(self, manifest: Manifest) -> None:
        """Remove the files of an output that no manifest names."""
        base = manifest.uri.removesuffix("/data")
        with suppress(UserError), s3.explained(base, self.endpoint_url, STORE_VARIABLE):
            for entry in s3.list_objects(base, self.endpoint_url, STORE_VARIABLE):
                self._client().delete_object(Bucket=self.bucket, Key=entry.key)

    def _client(self) -> Any:
        return s3.s3_client(self.endpoint_url, STORE_VARIABLE)

    def _put(self, name: str, text: bytes, **condition: str) -> bool:
        """Write a small object; False when a condition refuses it."""
        client = self._client()
        with s3.explained(f"{self.uri}/{name}", self.endpoint_url, STORE_VARIABLE):
            for pause in (0.2, 1.0, 3.0, None):
                try:
                    key = f"{self.prefix}{name}"
                    client.put_object(Bucket=self.bucket, Key=key, Body=text, ChecksumAlgorithm="SHA256", **condition)
                    return True
                except client.exceptions.ClientError as error:
                    if condition and s3.error_code(error) == "PreconditionFailed":
                        return False
                    if pause is None or s3.error_code(error) != _BUSY:
                        raise
                    time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def noted_folder(uri: str) -> Path:
    """Folder in the home of a finished output: its manifest and points, and its data unless they lie in S3."""
    if not is_remote(uri):
        return Path(uri).parent
    step, key = uri.split("/")[-4:-2]
    return Home.current().store / step / key


def local_copy(path: Path) -> Path:
    """A file or folder of a finished output, by the path it has below `data/` in the home, fetched if it is in S3.

    Raises:
        UserError: it cannot be fetched.
    """
    for folder in path.parents:
        manifest_path = folder.parent / _MANIFEST
        if folder.name == "data" and not path.exists() and manifest_path.is_file():
            manifest, inside = Manifest.read(manifest_path), path.relative_to(folder).as_posix()
            if not is_remote(manifest.uri):
                return path
            held = {entry.path for entry in manifest.files}
            return manifest.path(inside) if inside in held else manifest.folder(inside)
    return path
