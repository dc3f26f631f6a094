"""How another draft takes the place of one that was lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from ...errors import LinkError, PipelineError
from ..round.frames import Frames
from ..transport.links.base import Link
from ..transport.rendezvous import Rendezvous, VerifierSide
from .draft_side import DraftSide


class Rejoin:
    """Lets another draft in while rounds go on. Nothing here waits.

    Args:
        side: the verifier's meeting place.
        frames: makes the frames of an epoch.
        bell: as for ``DraftSide``.
    """

    def __init__(self, side: VerifierSide, frames: Callable[[int], Frames], *, bell: bool = False):
        self._side, self._frames, self._bell = side, frames, bell
        self._awaited = False
        self._linking: Future[Link] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the draft that is linked or awaited."""
        return self._side.rendezvous.epoch

    def reopen(self, epoch: int) -> Rendezvous:
        """Await the draft of this epoch. A draft of an earlier epoch is not let in any more.

        Returns:
            where the draft meets the verifier.

        Raises:
            LinkError: the lane could not be opened.
        """
        self.close()
        self._side.reopen(epoch)
        self._awaited = True
        return self._side.rendezvous

    def arrived(self) -> DraftSide | None:
        """The awaited draft, once it is linked; None before.

        Raises:
            LinkError: it came and could not be linked. It is not awaited any more.
        """
        if not self._awaited:
            return None
        if self._linking is None:
            if self._side.came(0):
                self._linking = _in_background(self._side.connect)
            return None
        if not self._linking.done():
            return None
        linking, self._linking, self._awaited = self._linking, None, False
        return DraftSide(linking.result(), self._side.lane, self._frames(self.epoch), bell=self._bell)

    def close(self) -> None:
        """Stop waiting. A link that is still being made is closed once it is there."""
        linking, self._linking, self._awaited = self._linking, None, False
        if linking is not None:
            linking.add_done_callback(lambda done: None if done.exception() else done.result().close())


def _in_background(connect: Callable[[], Link]) -> Future[Link]:
    """Connect in a daemon thread, so that a peer that does not come holds up nothing, not even the process's end."""
    linking: Future[Link] = Future()

    def work() -> None:
        try:
            linking.set_result(connect())
        except (PipelineError, OSError, RuntimeError) as error:
            linking.set_exception(LinkError(f"the draft came and could not be linked: {error}"))

    threading.Thread(target=work, name="ssd-rejoin", daemon=True).start()
    return linking
