"""When a loss has levelled off."""

from __future__ import annotations

from ..curves import Recorder
from .objective import Objective
from .settings import Settings

WINDOW = 6  # points, of the sixty or so that a curve has


class Plateau:
    """Tells by the recorded points of the loss terms whether more steps are worth it.

    It reads nothing that is not read already, and a resumed computation decides as the whole one.
    """

    def __init__(self, recorder: Recorder, objective: Objective, settings: Settings) -> None:
        self._recorder, self._objective, self._settings = recorder, objective, settings
        self._seen, self._reached = 0, False

    def reached(self) -> bool:
        """Whether the mean loss of the newest ``WINDOW`` points is less than a share below that of as many before.

        The share is ``settings.plateau``; 0 says never.
        """
        if self._settings.plateau and len(self._recorder) != self._seen:
            self._seen, self._reached = len(self._recorder), self._levelled_off()
        return self._reached

    def _levelled_off(self) -> bool:
        totals = self._recorder.totals(self._objective.total, self._settings.coarse_steps)
        if len(totals) < 2 * WINDOW:
            return False
        before, now = (sum(part) / WINDOW for part in (totals[-2 * WINDOW : -WINDOW], totals[-WINDOW:]))
        return before - now < self._settings.plateau * before
