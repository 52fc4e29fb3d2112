"""A step's image holds kfp without its dependencies: what KFP starts in a pod must not import anything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kfp

from modelmill.components.evaluation.component import evaluate_heldout

_ECHO = """
def hello(text: str, manifest: dsl.Output[dsl.Artifact], metrics: dsl.Output[dsl.Metrics]):
    open(manifest.path, "w").write(text)
    metrics.log_metric("length", len(text))
"""


def test_executor_runs_a_component_with_kfp_alone(tmp_path: Path) -> None:
    """The command that KFP compiles into a task, in an interpreter that finds kfp and the standard library only."""
    alone = tmp_path / "site"
    alone.mkdir()
    (alone / "kfp").symlink_to(Path(kfp.__file__).parent)
    shell, option, script, source = evaluate_heldout.component_spec.implementation.container.command[:4]
    program = source[: source.index("def evaluate_heldout")] + _ECHO
    wrapper = tmp_path / "bin" / "python3"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    wrapper.chmod(0o755)
    artifact = '{{"artifacts": [{{"name": "{0}", "uri": "{1}", "type": {{"schemaTitle": "system.{2}"}}}}]}}'
    outputs = {
        "manifest": artifact.format("manifest", tmp_path / "manifest", "Artifact"),
        "metrics": artifact.format("metrics", tmp_path / "metrics", "Metrics"),
    }
    request = (
        '{"inputs": {"parameterValues": {"text": "hi"}}, "outputs": {"artifacts": {'
        + ", ".join(f'"{name}": {value}' for name, value in outputs.items())
        + f'}}, "outputFile": "{tmp_path / "executor.json"}"}}}}'
    )
    environment = {"PATH": f"{wrapper.parent}:/usr/bin:/bin", "PYTHONPATH": str(alone)}
    arguments = ["--executor_input", request, "--function_to_execute", "hello"]
    done = subprocess.run(
        [shell, option, script, program, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "manifest").read_text() == "hi"
    assert '"length": 2' in (tmp_path / "executor.json").read_text()
