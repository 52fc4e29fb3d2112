"""Points of earlier runs that MLflow does not hold: a server was down, or the machine lost power.

`python -m modelmill.pipelines.launch.backlog` delivers them; a run starts it beside its own delivery.
"""

from __future__ import annotations

import json
import os

from modelmill.components.core.home import Home


def waiting(home: Home) -> list[str]:
    """Ids of the runs whose spool is not delivered completely."""
    found = []
    for spool in sorted(home.runs.glob("*/spool")):
        try:
            complete = bool(json.loads((spool / ".delivery.json").read_text())["complete"])
        except (OSError, ValueError, KeyError, TypeError):
            complete = False
        if not complete and any(spool.glob("*.jsonl")):
            found.append(spool.parent.name)
    return found


def main() -> None:
    """Deliver what can be delivered; what cannot stays where it is, for the next time."""
    from modelmill.components.core.delivery import deliver_pending

    os.nice(10)
    deliver_pending(Home.current())


if __name__ == "__main__":
    main()
