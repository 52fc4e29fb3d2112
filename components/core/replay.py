"""A step's tracking points, kept beside its output so that a run which reuses the output shows them too."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

from modelmill.components.core import events, tracking
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest

POINTS = "tracking.jsonl"
_REPLAYED = ("params", "metrics", "tags", "artifact", "dataset")


def keep(partial: Path) -> None:
    """Copy this process's points, and those of the step's parts, into an unfinished output.

    Lines of a part (`tracking.child`) say so with `part`.
    """
    spool = tracking.spool_path()
    if spool is None or not spool.exists():
        return
    shutil.copyfile(spool, partial / POINTS)
    mark = f"{spool.stem}{tracking.CHILD_MARK}"
    with (partial / POINTS).open("a") as kept:
        for path in sorted(spool.parent.glob("*.jsonl")):
            if path.stem.startswith(mark):
                for _, line in events.read_lines(path):
                    kept.write(json.dumps({**line, "part": path.stem.removeprefix(mark)}) + "\n")


def replay(manifest: Manifest, kept: Path) -> None:
    """Report a reused step's points as they were, at the times they were made, and name the run that made them.

    Args:
        manifest: of the step's output.
        kept: file with the points.
    """
    data, made_in = Home.current().store / manifest.step / manifest.key / "data", f"{manifest.key}.partial/data/"
    held = {entry.path for entry in manifest.files}
    step, source = os.environ.get(events.STEP_VARIABLE, ""), ""
    # Of the step and each part: points so far, and those of attempts before the one that is read.
    seen, repeated = defaultdict[str, set[tracking.Point]](set), defaultdict[str, set[tracking.Point]](set)
    spools: dict[str, str | None] = {"": None}
    for _, line in events.read_lines(kept):
        kind, part = line.pop("type", ""), line.pop("part", "")
        spool = spools.setdefault(part, f"{step}{tracking.CHILD_MARK}{part}")
        if kind == "start":
            source = line.get("run", source)
            repeated[part] = set(seen[part])
        elif kind == "metrics":
            points = {name: (name, line["step"], value) for name, value in line["values"].items()}
            line["values"] = {name: point[2] for name, point in points.items() if point not in repeated[part]}
            seen[part].update(points.values())
        elif kind == "artifact":
            _, mark, inside = line["path"].partition(made_in)
            line["path"] = str(data / inside) if mark else line["path"]
            if part and not (mark and inside in held):  # a part may clear its folder when it is done
                continue
        if kind in _REPLAYED or (part and kind in ("start", "end")):
            tracking.record(kind, spool=spool, **line)
    tags = {"modelmill.reused": "true", "modelmill.reused_from": source, "modelmill.key": manifest.key}
    for spool in spools.values():
        tracking.record("tags", spool=spool, values=tags)
