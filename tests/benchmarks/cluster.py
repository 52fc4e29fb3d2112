"""What the way to a cluster costs: compiling every pipeline, requests until a run is followed, size of the images.

python -m tests.benchmarks.cluster [--rounds 5]

compile_all_s               wall seconds of `modelmill compile --all`, from the shell to the shell: every recipe that
                            ships, each a file. Median of the rounds, after one for the caches.
submit_to_follow_requests   HTTP requests of `modelmill run RECIPE --on kfp` to the API of Kubeflow Pipelines, from
                            the first to the first look at the run's state, on a server that has never seen the
                            pipeline. The server is the fake of the tests; the client is kfp's own.
image_mb                    MB of all layers, uncompressed, of the images that `python -m images.build` left in the
                            local store; null for what was not built here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from images.build import BUILT
from images.tag import FAMILIES
from tests.benchmarks.orchestration import repeated, show, timed
from tests.fakes.kfp_api import KfpApi

ROOT = Path(__file__).resolve().parents[2]
_COMMAND = [sys.executable, "-m", "modelmill.pipelines.cli"]
_RECIPE = "laptop/llama-demo"
_PATIENCE = 120.0  # seconds for one submission
_LOOK = re.compile(r"^/apis/v2beta1/runs/[^/:?]+$")


def compile_all(folder: Path, environment: dict[str, str], rounds: int) -> tuple[list[float], list[float]]:
    """Wall seconds of each round, and seconds of the processor, which other programs disturb less."""
    processor: list[float] = []

    def once() -> float:
        before = os.times()
        seconds = timed([*_COMMAND, "compile", "--all", "-o", str(folder / "built")], environment)
        after = os.times()
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return seconds

    return repeated(once, rounds), processor[1:]


def requests_until_followed(api: KfpApi, folder: Path, environment: dict[str, str]) -> list[tuple[str, str]]:
    """What the command asks of the server until it has seen its run for the first time, in order."""
    already = len(api.requests)
    settings = {"kfp.endpoint": api.url, "kfp.auth": "none", "images.registry": "registry.example.com/team"}
    options = [word for name, value in settings.items() for word in ("--profile-set", f"{name}={value}")]
    command = [*_COMMAND, "run", _RECIPE, "--on", "kfp", "--profile", "eks-cpu", *options]
    with (folder / "run.log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline and process.poll() is None:
                asked = api.requests[already:]
                looks = [i for i, (method, path) in enumerate(asked) if method == "GET" and _LOOK.match(path)]
                if looks:
                    return asked[: looks[0] + 1]
                time.sleep(0.02)
            log.seek(0)
            raise SystemExit(f"the run was not followed:\n{log.read()}")
        finally:
            process.send_signal(signal.SIGINT)  # the run stays on the server, the command ends
            process.wait(30)


def image_sizes() -> dict[str, float | None]:
    """MB of each family, with a line on every one."""
    sizes: dict[str, float | None] = {}
    for family in FAMILIES:
        record = BUILT / f"{family}.json"
        if record.is_file():
            built = json.loads(record.read_text())
            sizes[family] = built["megabytes"]
            print(f"image {family}: {built['megabytes']} MB, {built['reference']} on {built['base']}")
        else:
            sizes[family] = None
            print(f"image {family}: none built here; `python -m images.build {family}` needs an engine and its base")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one for the caches")
    rounds = parser.parse_args().rounds
    names = ("kfp", "kfp-kubernetes", "pydantic", "click")
    print(
        f"python {platform.python_version()}, {os.cpu_count()} cores, " + ", ".join(f"{n} {version(n)}" for n in names)
    )
    with tempfile.TemporaryDirectory(prefix="cluster-") as scratch:
        folder = Path(scratch)
        environment = {**os.environ, "MODELMILL_HOME": str(folder / "home")}
        for variable in ("MODELMILL_CATALOG", "MODELMILL_PROFILES", "MLFLOW_TRACKING_URI"):
            environment.pop(variable, None)
        seconds, processor = compile_all(folder, environment, rounds)
        files = len(list((folder / "built").rglob("*.yaml")))
        with KfpApi(folder / "kfp") as api:
            first = requests_until_followed(api, folder, environment)
            again = requests_until_followed(api, folder, environment)
    show(f"compile --all ({files} files)", seconds)
    show("the same, of the processor", processor)
    for title, asked in (("first submission", first), ("of the same content again", again)):
        print(f"{title}: {len(asked)} requests")
        for method, path in asked:
            print(f"  {method:6s} {path.partition('?')[0]}")
    figures = {
        "compile_all_s": round(statistics.median(seconds), 3),
        "submit_to_follow_requests": len(first),
        "image_mb": image_sizes(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
