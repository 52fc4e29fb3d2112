"""A SageMaker training container on this machine: its folders, its entry point as a process, S3 before and after.

Checkpoints are brought from S3 before the start and copied there whenever the job is described, as SageMaker does
while the container runs; what the container leaves in `model` is uploaded once it has ended well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelmill.components.launchers.sagemaker_entry import ROOT_VARIABLE


class TrainingContainer:
    """One start of a job's container."""

    def __init__(self, request: dict[str, Any], root: Path, s3: Any) -> None:
        """
        Args:
            request: `CreateTrainingJob`.
            root: takes the place of /opt/ml.
            s3: client.
        """
        self.request, self.root, self._s3, self._sent = request, root, s3, dict[str, tuple[int, int]]()
        for channel in request["InputDataConfig"]:
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
            self._download(uri, root / "input" / "data" / channel["ChannelName"])
        self._download(request["CheckpointConfig"]["S3Uri"], root / "checkpoints")
        command = request["AlgorithmSpecification"]["ContainerEntrypoint"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MODELMILL_")}
        environment |= {**request.get("Environment", {}), ROOT_VARIABLE: str(root), "OMP_NUM_THREADS": "1"}
        environment["MODELMILL_HOME"] = str(root / "home")
        self.process = subprocess.Popen([sys.executable, *command[1:]], env=environment)

    def poll(self) -> tuple[int, str] | None:
        code = self.process.poll()
        self._upload(self.root / "checkpoints", self.request["CheckpointConfig"]["S3Uri"])
        if code is None:
            return None
        output = self.request["OutputDataConfig"]["S3OutputPath"]
        self._upload(self.root / "model", f"{output}/{self.request['TrainingJobName']}/output/model")
        failure = self.root / "output" / "failure"
        # A process that a signal ended is told by 128 and its number.
        return (128 - code if code < 0 else code), failure.read_text() if failure.exists() else ""

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def _download(self, uri: str, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        place = urlsplit(uri)
        prefix = place.path.strip("/") + "/"
        for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=place.netloc, Prefix=prefix):
            for entry in page.get("Contents", []):
                path = target / entry["Key"].removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._s3.download_file(place.netloc, entry["Key"], str(path))

    def _upload(self, source: Path, uri: str) -> None:
        place = urlsplit(uri)
        for path in sorted(source.rglob("*")):
            try:
                state = path.stat()
                if not path.is_file() or self._sent.get(str(path)) == (state.st_mtime_ns, state.st_size):
                    continue
                key = f"{place.path.strip('/')}/{path.relative_to(source).as_posix()}"
                self._s3.put_object(Bucket=place.netloc, Key=key, Body=path.read_bytes())
            except FileNotFoundError:  # a partial checkpoint that has got its name since
                continue
            self._sent[str(path)] = (state.st_mtime_ns, state.st_size)
