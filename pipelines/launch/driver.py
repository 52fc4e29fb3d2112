"""The process that lets kfp run a pipeline here, with everything kfp touches inside the run folder.

Started by `launch.local`, never by hand: `python -m modelmill.pipelines.launch.driver RUN_FOLDER LIFELINE GRACE`. kfp
runs each step as `sh -ec '... python3 -m kfp.dsl.executor_main ...'`. Four of its habits are met here:

* It replaces the text `python3` by the interpreter's path in every argument, also inside a step's section (a corpus
  in `/usr/lib/python3` would become another path). Here its own name for the interpreter is `python3`, and a
  `python3` of ours is first in PATH.
* It hides how a step ended. Our `python3` notes the exit status, so SIGKILL and a missing module can be told apart.
* It reads a step's output through a pipe until every descendant has closed it. Our `python3` sends it to
  `driver.log`, so a forgotten background process cannot stall the pipeline.
* It deletes `workspace_root` with everything in it after any pipeline run. It gets an empty folder of its own.
"""

from __future__ import annotations

import importlib
import os
import re
import select
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.pipelines.launch import forkserver
from modelmill.pipelines.launch.processes import keep_tree_together, reap_orphans, stop_run
from modelmill.pipelines.launch.runs import Run

FAILED, REFUSED = 1, 2
_INTERPRETER = """#!/bin/sh
# The `python3` of this run's steps: see modelmill.pipelines.launch.driver.
case "$2" in
kfp.dsl.executor_main) ;;
*) exec {python} "$@" ;;
esac
exec >>{log} 2>&1
{start}
"""
# Through the fork server, or without one: run it and note how it ended.
_THROUGH_SERVER = 'exec {python} -I -S {client} {address} {python} "$@"'
_BY_ITSELF = """for word in "$@"; do
    if [ "$previous" = --function_to_execute ]; then name=$word; fi
    previous=$word
done
{python} "$@"
code=$?
echo "$code $name" >>{exits}
exit $code"""


def main() -> None:
    """Run the pipeline of a run folder; exit with 0, 1 (a step failed) or 2 (the pipeline was refused)."""
    run, lifeline, grace = Run.open(Path(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
    keep_tree_together()
    signal.signal(signal.SIGTERM, _leave)
    watcher = threading.Thread(target=_watch_parent, args=(run, lifeline, grace), daemon=True)
    watcher.start()
    try:
        code = _guarded(run)
    finally:
        if select.select([lifeline], [], [], 0)[0]:  # closed: the command is gone
            watcher.join()  # it ends this process when it is done
        reap_orphans()
    sys.exit(code)


def _guarded(run: Run) -> int:
    """Exit code of the pipeline; a failure that is no step's own is left in the events."""
    try:
        return _drive(run)
    except UserError as error:
        events.emit("failed", step="", kind="user", message=str(error))
        return REFUSED
    except Exception as error:
        traceback.print_exc()
        events.emit("failed", step="", kind="crash", message=f"{type(error).__name__}: {error}")
        return FAILED


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _drive(run: Run) -> int:
    server = forkserver.start(_address(), run.folder / "driver.log", run.folder / "exits")
    try:
        return _run_pipeline(run, server is not None)
    finally:
        if server is not None:
            server.kill()  # it holds nothing; its steps have ended or are ended by whoever stops the run
            server.wait()


def _run_pipeline(run: Run, server: bool) -> int:
    kfp_local = import_kfp_local()
    from modelmill.pipelines import catalog
    from modelmill.pipelines.launch.lint import check

    sections = run.sections()
    pipeline = catalog.resolve(run.record.dag)
    check(pipeline.pipeline_spec, sections)
    _enter_interpreter(run.folder, server)
    workspace = run.folder / "kfp-workspace"
    workspace.mkdir()
    if any(workspace.iterdir()) or workspace.is_symlink():
        raise RuntimeError(f"{workspace} is not empty, and kfp would delete it")
    kfp_local.init(
        kfp_local.SubprocessRunner(use_venv=False),
        pipeline_root=str(run.folder / "workspace"),
        workspace_root=str(workspace),
        raise_on_error=True,
        enable_caching=False,
    )
    try:
        pipeline(**sections)
    except RuntimeError as error:
        task = failed_task(str(error))
        if task is None:
            raise
        events.emit("failed", step="", kind="step", message=task)
        return FAILED
    return 0


def import_kfp_local() -> Any:
    """Import `kfp.local` without the API client, which would cost 0.25 s and is not used here.

    The switch is the one kfp sets in its own containers; it is undone before `kfp.dsl` is read, which needs the
    authoring half.

    Raises:
        UserError: kfp is not installed.
    """
    if "kfp" not in sys.modules:
        os.environ["_KFP_RUNTIME"] = "true"
        try:
            importlib.import_module("kfp")
        except ModuleNotFoundError:
            raise UserError("kfp is not installed; pip install 'modelmill[kfp]'") from None
        finally:
            del os.environ["_KFP_RUNTIME"]
    return importlib.import_module("kfp.local")


def failed_task(message: str) -> str | None:
    """KFP task named innermost in a local pipeline's failure, or None when the message is about something else."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message)
    found = re.search(r"Inner task failed: '([^']+)'", plain)
    return found.group(1) if found else None


def _enter_interpreter(folder: Path, server: bool) -> None:
    """Put our `python3` first in PATH and make kfp call it by that name."""
    binaries = folder / "bin"
    binaries.mkdir()
    script = binaries / "python3"
    words = {
        "python": sys.executable,
        "log": str(folder / "driver.log"),
        "exits": str(folder / "exits"),
        "client": forkclient_path(),
        "address": str(_address()),
    }
    quoted = {name: shlex.quote(word) for name, word in words.items()}
    start = (_THROUGH_SERVER if server else _BY_ITSELF).format(**quoted)
    script.write_text(_INTERPRETER.format(**quoted, start=start))
    script.chmod(0o755)
    if not os.access(script, os.X_OK):
        raise UserError(f"MODELMILL_HOME: {folder} is on a file system that forbids execution; choose another folder")
    os.environ["PATH"] = f"{binaries}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    sys.executable = "python3"


def _address() -> Path:
    """Socket of the fork server, in the run's private temporary folder."""
    return Path(os.environ["TMPDIR"]) / "fork"


def forkclient_path() -> str:
    return str(Path(__file__).with_name("forkclient.py"))


def _watch_parent(run: Run, lifeline: int, grace: float) -> None:
    """End the run when the command is gone without a word (SIGKILL): its end of the pipe then closes."""
    while os.read(lifeline, 1):
        pass
    since = time.time()
    from modelmill.pipelines.launch.local import abandon

    try:
        stop_run(run.folder, os.getpid(), grace=grace)
        abandon(run, since)
    finally:
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
        os._exit(FAILED)


if __name__ == "__main__":
    main()
