"""Whatever ends a worker's life, its front learns of it."""

from __future__ import annotations

import pytest

from ssd.errors import ConfigError, LinkError, PipelineError, RequestError, WorkerError
from ssd.pipeline.runtime.worker_main import LastWords
from ssd.pipeline.transport.lanes import InprocLane
from ssd.pipeline.transport.messages import Failed


def reported(error: BaseException) -> Failed | None:
    front, ours = InprocLane.pair()
    with LastWords("draft", ours):
        raise error
    message = front.receive(0)  # type: ignore[unreachable]
    assert message is None or isinstance(message, Failed)
    return message


@pytest.mark.parametrize("error", [ConfigError("no such key"), RequestError("too long")], ids=repr)
def test_mistakes_of_the_user_are_marked(error: Exception) -> None:
    assert reported(error) == Failed(role="draft", message=str(error), usage=True)


def test_the_failure_of_another_worker_needs_no_traceback() -> None:
    assert reported(WorkerError("it is gone")) == Failed(role="draft", message="it is gone")


@pytest.mark.parametrize(
    "error",
    [LinkError("cut"), PipelineError("x"), RuntimeError(), MemoryError("full"), KeyError("k"), OSError(28, "disk")],
    ids=repr,
)
def test_every_crash_comes_with_its_traceback(error: Exception) -> None:
    message = reported(error)
    assert message is not None and message.message.startswith(f"{type(error).__name__}: {error}")
    assert "raise error" in message.message and not message.usage


def test_an_interrupt_ends_in_silence() -> None:
    assert reported(KeyboardInterrupt()) is None


def test_an_exit_is_not_held_up() -> None:
    with pytest.raises(SystemExit):
        reported(SystemExit(3))
