"""torchrun with three additions: it ends when the step that started it ends, it passes SIGTERM on as often as it comes
and waits, and it records which rank failed how.

    python -m modelmill.components.training.torchrun FAILURES.json GRACE_SECONDS <torchrun arguments>

torch's own command prints failures as a table for people; the launcher needs them as data. And a second SIGTERM ends
it at once, the ranks with it, in the middle of a checkpoint: whoever stops a run signals every process, some twice.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from modelmill.components.training.processes import PARENT_VARIABLE, die_with_parent, leave_now


def _tell_ranks(_number: int, _frame: object) -> None:
    """Pass SIGTERM on; the ranks save and leave, and torchrun ends because they did."""
    ranks = psutil.Process().children()
    if not ranks:
        os._exit(128 + signal.SIGTERM)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.terminate()


def main(arguments: list[str]) -> int:
    """Run torchrun; returns 0, or 1 after a failed or stopped rank."""
    die_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # what the ranks compare with
    signal.signal(signal.SIGTERM, _tell_ranks)
    record, grace, *rest = arguments

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(rest)
    if hasattr(options, "shutdown_timeout"):  # an older torch waits 30 seconds
        options.shutdown_timeout = int(grace)
    if hasattr(options, "signals_to_handle"):
        options.signals_to_handle = "SIGHUP"  # ours is the handler of SIGTERM
    try:
        run.run(options)
    except ChildFailedError as error:
        failures = [{"rank": rank, "exit_code": failure.exitcode} for rank, failure in error.failures.items()]
        Path(record).write_text(json.dumps(failures))
        return 1
    return 0


if __name__ == "__main__":
    leave_now(main(sys.argv[1:]))
