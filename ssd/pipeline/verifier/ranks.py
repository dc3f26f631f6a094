"""The verifier over several ranks: the first one leads, the others run every forward with it.

Only the first rank decides and talks to the front and the draft. Before a forward it sends the others
one small message that says what to run. Idle ranks wait for messages, never in a collective. The
exchange with the draft lies outside of forwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import PipelineError, WorkerError, first_line
from ...models.parallel.tensor_group import lost
from ...models.rows import RowPlan
from ...models.runner import ForwardRunner
from ..transport.lanes import ControlLane
from ..transport.messages import Copy, Decode, Keep, Message, Prefill, Shutdown

IDLE_POLL_S = 0.5


class LeadingRunner(ForwardRunner):
    """The first rank's runner. It announces every forward and every change of the cache to the other ranks.

    Args:
        lanes: to the other ranks. All further arguments as for ``ForwardRunner``.

    Raises (all methods):
        PipelineError: another rank is gone.
    """

    def __init__(self, *arguments: Any, lanes: Sequence[ControlLane], **options: Any):
        super().__init__(*arguments, **options)
        self._lanes = lanes

    def announce(self, plan: RowPlan, tokens: Tensor, lengths: Tensor, context: int) -> None:
        self._tell(Decode(plan=plan.name, context=context, tokens=tokens.tolist(), lengths=lengths.tolist()))

    def prefill(self, slot: int, tokens: Sequence[int], start: int = 0) -> None:
        self._tell(Prefill(slot=slot, tokens=list(tokens), start=start, logits=False))
        super().prefill(slot, tokens, start)

    def prefill_logits(self, slot: int, tokens: Sequence[int], start: int = 0) -> Tensor:
        self._tell(Prefill(slot=slot, tokens=list(tokens), start=start, logits=True))
        return super().prefill_logits(slot, tokens, start)

    def copy(self, source: int, slot: int, length: int) -> None:
        self._tell(Copy(source=source, slot=slot, length=length))
        super().copy(source, slot, length)

    def keep(self, slots: Tensor, scratch: Tensor, positions: Tensor) -> None:
        self._tell(Keep(slots=slots.tolist(), scratch=scratch.tolist(), positions=positions.tolist()))
        super().keep(slots, scratch, positions)

    def _tell(self, message: Message) -> None:
        for lane in self._lanes:
            lane.send(message)


def follow(
    runner: ForwardRunner, lane: ControlLane, plans: Sequence[RowPlan], *, alive: Callable[[], bool] = lambda: True
) -> None:
    """Runs what the first rank announces until it says stop, or nobody is alive to serve.

    Args:
        lane: from the first rank.
        plans: the row plans that it may name.

    Raises:
        PipelineError: a message came that no rank is sent.
        WorkerError: another rank is gone or late.
    """
    named = {plan.name: plan for plan in plans}
    with naming_the_lost():
        while True:
            message = lane.receive(IDLE_POLL_S)
            if isinstance(message, Decode):
                plan = named[message.plan]
                # ABSENT is fed as some token; the first rank never accepts it.
                tokens = torch.tensor(message.tokens, device=runner.device).clamp(0, runner.vocabulary - 1)
                lengths = torch.tensor(message.lengths, device=runner.device)
                runner.forward(plan, tokens, lengths, longest=message.context - max(plan.limits) - 1)
            elif isinstance(message, Prefill):
                prefill = runner.prefill_logits if message.logits else runner.prefill
                prefill(message.slot, message.tokens, message.start)
            elif isinstance(message, Copy):
                runner.copy(message.source, message.slot, message.length)
            elif isinstance(message, Keep):
                runner.keep(*(torch.tensor(which) for which in (message.slots, message.scratch, message.positions)))
            elif isinstance(message, Shutdown):
                return
            elif message is not None:
                raise PipelineError(f"a rank of the verifier was sent {type(message).__name__}")
            elif not alive():
                return


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Raises ``WorkerError`` in place of a collective's error when another rank is gone or late."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PipelineError) or not lost(error):
            raise
        raise WorkerError(f"another rank of the verifier is gone or silent ({first_line(error)})") from error
