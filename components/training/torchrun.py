"""torchrun with two additions: it ends when the step that started it ends, and it records which rank failed how.

    python -m modelmill.components.training.torchrun FAILURES.json GRACE_SECONDS <torchrun arguments>

torch's own command prints failures as a table for people; the launcher needs them as data.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from modelmill.components.training.processes import PARENT_VARIABLE, die_with_parent, leave_now


def main(arguments: list[str]) -> int:
    """Run torchrun; returns 0, 1 after a failed rank, or 128 + the signal that stopped it."""
    die_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # what the ranks compare with
    record, grace, *rest = arguments

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(rest)
    if hasattr(options, "shutdown_timeout"):  # torch 2.12 and later; before that it is 30 seconds
        options.shutdown_timeout = int(grace)
    try:
        run.run(options)
    except ChildFailedError as error:
        failures = [{"rank": rank, "exit_code": failure.exitcode} for rank, failure in error.failures.items()]
        Path(record).write_text(json.dumps(failures))
        return 1
    except SignalException as stop:
        return 128 + stop.sigval.value
    return 0


if __name__ == "__main__":
    leave_now(main(sys.argv[1:]))
