"""The pretraining step as a process of its own, as the pipeline runs it: `step_process FOLDER SECTION_JSON`."""

from __future__ import annotations

import sys
from pathlib import Path

from modelmill.components.core.step import run_step
from modelmill.components.llama.pretrain import pretrain


def main(folder: Path, section: str) -> None:
    inputs = {name: str(folder / f"{name}.json") for name in ("tokenizer", "tokens")}
    run_step(pretrain, section, inputs, {"manifest": str(folder / "model.json")})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
