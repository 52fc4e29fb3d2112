"""What the launcher costs: seconds a step, `modelmill --help`, `import modelmill.components.core`.

    python -m tests.benchmarks.orchestration [--rounds 5]

A chain of N steps that do next to nothing (one file, 20 tracking points) runs through `modelmill run --fresh`, MLflow
included, for a small and a large N. Counted is the wall time of the whole command, from the shell to the shell, minus
the seconds the step functions themselves report. Two figures come out of each round:

    marginal    (cost(large) - cost(small)) / (large - small): what one more step costs. This is `per_step_overhead_s`.
    total / N   cost(large) / large: the same with everything a run costs once (start of the command, kfp and
                MLflow, the last delivery) laid on the steps.

The tracking store exists before the first round; a first run on a machine spends seconds making it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

SMALL, LARGE = 20, 40  # both long enough that MLflow is up before the last step
ROOT = Path(__file__).resolve().parents[2]

_MODULE = '''"""A chain of trivial steps, written by tests.benchmarks.orchestration."""
import time
from pathlib import Path
from typing import Literal
from kfp import dsl
from modelmill.components.core.recipe import PlannedStep, Recipe, Section
from modelmill.pipelines.catalog import Catalog, Pipeline


class Nothing(Section):
    """No parameters."""


class Chain(Recipe):
    """A chain of trivial steps."""

    pipeline: Literal["small", "large"]

    def steps(self) -> list[PlannedStep]:
        count = {{"small": {small}, "large": {large}}}[self.pipeline]
        needs = lambda i: {{"before": f"step_{{i - 1}}"}} if i else {{}}
        return [PlannedStep(f"step_{{i}}", Nothing(), "chain_steps:trivial", needs(i)) for i in range(count)]


{components}

@dsl.pipeline(name="small")
def small({small_parameters}):
{small_body}

@dsl.pipeline(name="large")
def large({large_parameters}):
{large_body}

CATALOG = Catalog(
    pipelines={{name: Pipeline(recipe="chain:Chain", dag=f"chain:{{name}}") for name in ("small", "large")}},
    recipes=Path(__file__).parent / "recipes",
)
'''

_STEPS = '''"""The trivial step; it imports no more than a step needs."""
import time
from pathlib import Path
from modelmill.components.core import tracking
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import Section
from modelmill.components.core.step import StepResult


class Nothing(Section):
    """No parameters."""


def trivial(config: Nothing, output: Path, *, before: Manifest | None = None) -> StepResult:
    """Write one file and twenty points."""
    began = time.perf_counter()
    (output / "file").write_text("x")
    for step in range(20):
        tracking.log_metrics({"loss": 1.0 / (step + 1)}, step=step)
    return StepResult("nothing", metrics={"own_seconds": time.perf_counter() - began})
'''

_COMPONENT = """
@dsl.component(base_image="python:3.11", install_kfp_package=False)
def step_{i}(section: str, {before}manifest: dsl.Output[dsl.Artifact]):
    from modelmill.components.core.step import run_step
    from chain_steps import trivial as step

    run_step(step, section, {inputs}, {{"manifest": manifest.path}})
"""


def write_chain(folder: Path) -> None:
    """Write the chain's module, its steps and its two recipes."""

    def body(count: int) -> str:
        lines = ["    m0 = globals()['step_0'](section=step_0).outputs['manifest']"]
        for i in range(1, count):
            call = f"globals()['step_{i}'](section=step_{i}, before=m{i - 1})"
            lines.append(f"    m{i} = {call}.outputs['manifest']")
        return "\n".join(lines)

    def component(i: int) -> str:
        before, inputs = ("before: dsl.Input[dsl.Artifact], ", '{"before": before.path}') if i else ("", "{}")
        return _COMPONENT.format(i=i, before=before, inputs=inputs)

    text = _MODULE.format(
        small=SMALL,
        large=LARGE,
        components="\n".join(component(i) for i in range(LARGE)),
        small_parameters=", ".join(f"step_{i}: str" for i in range(SMALL)),
        large_parameters=", ".join(f"step_{i}: str" for i in range(LARGE)),
        small_body=body(SMALL),
        large_body=body(LARGE),
    )
    (folder / "chain.py").write_text(text)
    (folder / "chain_steps.py").write_text(_STEPS)
    (folder / "recipes").mkdir()
    for name in ("small", "large"):
        (folder / "recipes" / f"{name}.yaml").write_text(f"pipeline: {name}\nname: {name}\n")


def timed(command: list[str], environment: dict[str, str]) -> float:
    """Wall seconds of a command that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds


def cost(name: str, home: Path, environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds `modelmill run` takes beyond the steps' own work; from one step's start to the next; after the last."""
    command = [sys.executable, "-m", "modelmill.pipelines.cli", "run", name, "--fresh"]
    wall = timed(command, environment)
    folder = max((home / "runs").iterdir())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    own = sum(event["metrics"]["own_seconds"] for event in events if event["event"] == "finished")
    starts = [event["time"] for event in events if event["event"] == "started"]
    ended = time.time() - max(event["time"] for event in events)
    return wall - own, (starts[-1] - starts[0]) / (len(starts) - 1), ended


def repeated(measure: Callable[[], float], rounds: int) -> list[float]:
    measure()  # once for the caches
    return [measure() for _ in range(rounds)]


def show(name: str, values: list[float]) -> None:
    middle = statistics.median(values)
    print(f"{name:36s} {middle:8.3f} s   from {min(values):.3f} to {max(values):.3f} ({len(values)} rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one for the caches")
    rounds = parser.parse_args().rounds
    names = ("kfp", "mlflow", "pydantic", "click")
    print(
        f"python {platform.python_version()}, {os.cpu_count()} cores, " + ", ".join(f"{n} {version(n)}" for n in names)
    )
    with tempfile.TemporaryDirectory(prefix="orchestration-") as scratch:
        folder = Path(scratch)
        write_chain(folder)
        home = folder / "home"
        own = {"MODELMILL_HOME": str(home), "MODELMILL_CATALOG": "chain:CATALOG", "PYTHONPATH": scratch}
        environment = {**os.environ, **own}
        environment.pop("MLFLOW_TRACKING_URI", None)
        marginal, total, pace, tail = [], [], [], []
        for number in range(rounds + 1):
            small = cost("small", home, environment)[0]
            large, between, after = cost("large", home, environment)
            if number:  # the first round makes the store and fills the caches
                marginal.append((large - small) / (LARGE - SMALL))
                total.append(large / LARGE)
                pace.append(between)
                tail.append(after)
        help_command = [sys.executable, "-m", "modelmill.pipelines.cli", "--help"]
        helps = repeated(lambda: timed(help_command, environment), rounds)
        modules = sorted(path.stem for path in (ROOT / "components" / "core").glob("*.py") if path.stem != "__init__")
        light = [f"modelmill.components.core.{name}" for name in modules if name not in ("delivery", "mlflow_writer")]
        bare = repeated(lambda: timed([sys.executable, "-c", "import modelmill.components.core"], environment), rounds)
        whole = repeated(lambda: timed([sys.executable, "-c", f"import {', '.join(light)}"], environment), rounds)
    show("one more step", marginal)
    show(f"a step of a run of {LARGE}, all in", total)
    show("from one step's start to the next", pace)
    show("after the last step (delivery)", tail)
    show("modelmill --help", helps)
    show("import modelmill.components.core", bare)
    show("the same with all its modules", whole)
    figures = {
        "per_step_overhead_s": round(statistics.median(marginal), 4),
        "help_s": round(statistics.median(helps), 4),
        "core_import_s": round(statistics.median(bare), 4),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
