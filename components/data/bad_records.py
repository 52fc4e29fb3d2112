"""Records that cannot be learnt from: told of one by one, counted by reason, and refused when they are too many."""

from __future__ import annotations

import logging
from collections import Counter

from modelmill.components.core.errors import UserError
from modelmill.components.data.conversations import BadRecord

logger = logging.getLogger("modelmill")
_NAMED = 20  # that are told of one by one; the counts tell of all


class BadRecords:
    """What a step has met so far.

    Attributes:
        counts: by reason.
    """

    def __init__(self, section: str, allowed: int) -> None:
        """
        Args:
            section: of the recipe, which has `source` and `max_bad_records`.
            allowed: its `max_bad_records`.
        """
        self._section, self._allowed = section, allowed
        self.counts: Counter[str] = Counter()

    def refuse(self, place: str, problem: BadRecord) -> None:
        """Count a bad record.

        Raises:
            UserError: it is one too many.
        """
        self.counts[problem.reason] += 1
        total = self.counts.total()
        if total > self._allowed:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.counts.items()))
            before = f" ({total} bad records: {reasons})" if self._allowed else ""
            remedy = f"mend or remove the record, or raise {self._section}.max_bad_records (it is {self._allowed})"
            raise UserError(f"{self._section}.source: {place} {problem}{before}; {remedy}")
        if total <= _NAMED:
            logger.warning("dropped %s %s", place, problem)
