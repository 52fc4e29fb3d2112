"""Steps that take no time of their own, and the ways a step can go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import PlannedStep, Recipe, Section
from modelmill.components.core.step import StepResult, step_options

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class WordsConfig(Section):
    """Text to write."""

    text: str = Field("the quick brown fox", description="Words, separated by spaces.")


class CountConfig(Section):
    """What the second step does."""

    behaviour: Literal["count", "mistake", "crash", "killed", "sleep", "family", "leave", "fill", "graceful"] = "count"
    fail_while: str = Field("", description="Fail as long as this file exists.")
    scratch: str = Field("", description="Where the step notes the processes it started.")


class AnnounceConfig(Section):
    """Where the side effect shows."""

    ledger: str = Field("", description="File that gets a line every time the step runs.")


class ArchiveConfig(Section):
    """The last step, after the side effect."""

    fail_while: str = Field("", description="Fail as long as this file exists.")


class SampleRecipe(Recipe):
    """Write words, count them, announce the count, archive the announcement."""

    pipeline: Literal["sample", "unimportable"]
    words: WordsConfig = WordsConfig()
    count: CountConfig = CountConfig()
    announce: AnnounceConfig = AnnounceConfig()
    archive: ArchiveConfig = ArchiveConfig()

    def steps(self) -> list[PlannedStep]:
        return [
            PlannedStep("write_words", self.words, f"{__name__}:write_words"),
            PlannedStep("count_words", self.count, f"{__name__}:count_words", {"words": "write_words"}),
            PlannedStep("announce", self.announce, f"{__name__}:announce", {"count": "count_words"}),
            PlannedStep("archive", self.archive, f"{__name__}:archive", {"announcement": "announce"}),
        ]


def write_words(config: WordsConfig, output: Path) -> StepResult:
    """Write the words to a file."""
    (output / "words.txt").write_text(config.text)
    return StepResult("words", counts={"words": len(config.text.split())})


def count_words(config: CountConfig, output: Path, *, words: Manifest) -> StepResult:
    """Count letters, or do what a test wants to see."""
    print("counting on standard output", flush=True)
    if config.fail_while and Path(config.fail_while).exists():
        raise RuntimeError(f"{config.fail_while} exists")
    _behave(config)
    if config.behaviour == "fill":
        (output / "count.txt").write_bytes(bytes(2**24))
    text = words.path("words.txt").read_text()
    (output / "count.txt").write_text(str(len(text)))
    loss = len(text) / len(text.split())
    tracking.log_metrics({"loss": loss}, step=1)
    return StepResult("count", counts={"letters": len(text)}, metrics={"loss": loss, "bigram_loss": loss + 1})


def _behave(config: CountConfig) -> None:
    if config.behaviour == "mistake":
        raise UserError("count.text: 'x' has no letters; give some")
    if config.behaviour == "crash":
        raise RuntimeError("something broke")
    if config.behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.behaviour == "sleep":
        _note(config, os.getpid())
        for done in range(600):
            if (Path(config.scratch) / "wake").exists():
                break
            events.progress("sleeping", done, 600)
            time.sleep(0.1)
    if config.behaviour == "graceful":
        _save_when_told(config)
    if config.behaviour in ("family", "leave"):
        _start_family(config)
    if config.behaviour == "family":
        time.sleep(600)


def _save_when_told(config: CountConfig) -> None:
    """Go on for a moment after SIGTERM, as saving does, and say how often it came."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    _note(config, os.getpid())
    while not told:
        time.sleep(0.05)
    time.sleep(0.5)
    raise RuntimeError(f"stopped after saving, told {len(told)} times")


def _start_family(config: CountConfig) -> None:
    """A plain child, one that ignores SIGTERM, one in its own session, and an orphan in its own session."""
    plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    stubborn = subprocess.Popen([sys.executable, "-c", STUBBORN])
    session = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)
    _note(config, os.getpid(), plain.pid, stubborn.pid, session.pid, _start_orphan())


def _start_orphan() -> int:
    """Process id of a stubborn grandchild whose parent has gone, in a session and an environment of its own."""
    code = f"""
import subprocess, sys
orphan = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.DEVNULL)
print(orphan.pid)
"""
    environment = {"PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True, check=True
    )
    return int(done.stdout)


def _note(config: CountConfig, *pids: int) -> None:
    target = Path(config.scratch) / "pids"
    temporary = target.with_name("pids.part")
    temporary.write_text(" ".join(str(pid) for pid in pids))
    temporary.rename(target)


@step_options(reuse=False)
def announce(config: AnnounceConfig, output: Path, *, count: Manifest) -> StepResult:
    """Leave a line in the ledger: a side effect that must not happen twice."""
    if config.ledger:
        with Path(config.ledger).open("a") as ledger:
            ledger.write(f"{count.counts['letters']}\n")
    (output / "done.txt").write_text("done")
    return StepResult("announcement", metadata={"letters": count.counts["letters"]})


def archive(config: ArchiveConfig, output: Path, *, announcement: Manifest) -> StepResult:
    """Keep what was announced."""
    if config.fail_while and Path(config.fail_while).exists():
        raise RuntimeError(f"{config.fail_while} exists")
    (output / "archive.txt").write_text(announcement.digest)
    return StepResult("archive")
