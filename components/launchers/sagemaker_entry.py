"""What runs in the container of a SageMaker training job: the ranks of the job, by the launcher of one machine.

    python -m modelmill.components.launchers.sagemaker_entry

SageMaker gives the container folders: what the job reads (`input/data/<channel>`), checkpoints that it copies to S3
while they are written and brings back when the job starts again, what the job leaves (`model`), and a file for the
reason of a failure. SIGTERM comes when the job is stopped or its spare capacity is taken away, SIGKILL two minutes
later; the ranks then keep a checkpoint and leave.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import HOME_VARIABLE
from modelmill.components.core.step import USER_ERROR_EXIT
from modelmill.components.launchers.sagemaker_job import JOB_CHANNEL, localized
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import STOPPED_EXIT, LocalLauncher, TrainingJob, TrainingStoppedError

ROOT_VARIABLE = "MODELMILL_SAGEMAKER_ROOT"  # where SageMaker's folders are; /opt/ml in its containers
JOB_FILE, RESULT_FILE = "job.json", "result.json"
REPORT = "report"  # below the checkpoints: what the ranks track, for the step that waits
_REASON = 1000  # characters of a failure that SageMaker hands on


def main() -> int:
    """Run the job; the exit code says how it ended, and `output/failure` why."""
    signal.signal(signal.SIGTERM, _stop_early)
    root = Path(os.environ.get(ROOT_VARIABLE, "/opt/ml"))
    try:
        job = _job(root)
        result = LocalLauncher().launch(job)
        (root / "model" / RESULT_FILE).write_text(result.model_dump_json())
        return 0
    except UserError as error:
        return _failed(root, str(error), USER_ERROR_EXIT)
    except TrainingStoppedError as error:
        return _failed(root, str(error), STOPPED_EXIT)
    except Exception as error:
        traceback.print_exc()
        return _failed(root, str(error) or type(error).__name__, 1)


def _stop_early(_number: int, _frame: object) -> None:
    """Leave, as there is nothing to keep before the ranks are started; the kernel would ignore the signal for us."""
    os._exit(STOPPED_EXIT)


def _job(root: Path) -> TrainingJob:
    """The job as it is for this machine."""
    inputs, model, scratch = root / "input" / "data", root / "model", root / "checkpoints"
    for folder in (model, scratch, root / "output"):
        folder.mkdir(parents=True, exist_ok=True)
    record = json.loads((inputs / JOB_CHANNEL / JOB_FILE).read_bytes())
    for path in record["folders"]:
        (model / path).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(HOME_VARIABLE, "/tmp/modelmill")
    os.environ[events.RUN_VARIABLE] = str(scratch / REPORT)
    os.environ[events.STEP_VARIABLE] = record["step"]
    (scratch / REPORT).mkdir(exist_ok=True)
    return TrainingJob(
        module=record["module"],
        spec=localized(record["spec"], inputs, model),
        training=TrainingConfig.model_validate(record["training"]),
        scratch=scratch,
    )


def _failed(root: Path, message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    # The end of a rank's log says most; the beginning says which rank.
    short = message if len(message) <= _REASON else f"{message[: _REASON // 2]} ... {message[-_REASON // 2 :]}"
    (root / "output").mkdir(parents=True, exist_ok=True)
    (root / "output" / "failure").write_text(short, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
