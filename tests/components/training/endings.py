"""Ranks that end in a given way, without torch: what the launcher makes of an exit must not depend on it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from modelmill.components.training.launch import RankFiles, TrainingResult
from modelmill.components.training.processes import die_with_parent

MODULE = "tests.components.training.endings"


def main() -> int:
    die_with_parent()
    files = RankFiles(Path(sys.argv[1]).parent)
    rank, spec = int(os.environ["RANK"]), json.loads(files.job.read_text())
    (files.scratch / f"pid-{rank}").write_text(str(os.getpid()))
    print(f"hello from {rank}", flush=True)
    ending = spec["ending"] if rank == spec.get("rank", 1) else spec.get("others", "wait")
    if ending == "exit":
        print("something went wrong here", file=sys.stderr)
        return 3
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "environment":
        names = ("OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
        result = TrainingResult(metadata={name: os.environ[name] for name in names})
        files.result.write_text(result.model_dump_json())
        return 0
    if ending == "finish":
        return 0
    time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
