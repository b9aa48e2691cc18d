"""The status of a slide in a cohort, and the result behind it."""

from __future__ import annotations

from dataclasses import dataclass

from histostream.runtime.record import RunRecord
from histostream.wsi.outputs.sinks.summary import SummaryRecord

DONE = "done"
NO_TISSUE = "no tissue"  # done, and nothing was analysed
DAMAGED = "damaged"  # done, with damaged blocks left as background
UNCHANGED = "unchanged"  # done before, and slide, model and options are the same
LOCKED = "elsewhere"  # another process is running it
FAILED = "failed"
STOPPED = "stopped"
NOT_BEGUN = "not begun"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The status of a slide in a cohort.

    Attributes
    ----------
    status
        `DONE`, `DAMAGED`, `NO_TISSUE`, `UNCHANGED`, `LOCKED`, `FAILED`, `STOPPED` or `NOT_BEGUN`.
    reason
        Explanation of the status; empty for `DONE`.
    run, summary
        The records of the result; None where there is none.
    seconds
        Duration, staging and waiting included.
    """

    status: str
    reason: str = ""
    run: RunRecord | None = None
    summary: SummaryRecord | None = None
    seconds: float = 0.0

    @property
    def damaged_blocks(self) -> int:
        """Number of blocks of the slide that could not be decoded."""
        return 0 if self.run is None else len(self.run.damaged or ())
