"""The messages of the client lane: they survive the wire, and nothing else is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd import SamplingParams
from ssd.errors import PipelineError
from ssd.request.output import RequestOutput, SpeculationRecord, StreamEvent
from ssd.serving.lane import wire
from tests.contract.test_client_lane import PARAMS

OUTPUT = RequestOutput(
    prompt="p",
    prompt_token_ids=(1,),
    text="ab",
    token_ids=(2, 3),
    finish_reason="stop",
    speculation=SpeculationRecord(rounds=2, accepted_histogram=[1, 1]),
    decode_s=0.5,
)
MESSAGES = [
    wire.Hello(),
    wire.Ask(number=3, prompt=[1, 2], params=PARAMS, credit=4),
    wire.Ask(number=3, prompt="text", params=SamplingParams(stop=("a",)), credit=4),
    wire.Ask(number=3, prompt=[1], params=PARAMS, credit=4, priority=-2),
    wire.AskStats(number=4),
    wire.Drop(number=3),
    wire.Credit(number=3, events=2),
    wire.Ping(),
    wire.Hi(session="s", model="m", max_model_len=9),
    wire.Pong(session="s"),
    wire.Tokens(
        number=1, event=StreamEvent(text="a", token_ids=(4,), accepted=1, pieces=("a",), provenance=("hit",), drafted=2)
    ),
    wire.Done(number=1, event=StreamEvent(text="", token_ids=(), accepted=0, output=OUTPUT)),
    wire.Stats(number=4, values={'ssd:generation_tokens_total{provenance="hit"}': 3.0}),
    wire.Refused(number=1, kind="RequestError", message="no"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_survive_the_wire(message: object) -> None:
    expected = wire.FromClient if isinstance(message, wire.FromClient) else wire.FromServer
    other = wire.FromServer if expected is wire.FromClient else wire.FromClient
    raw = wire.encode(message)  # type: ignore[arg-type]
    assert wire.decode(raw, expected) == message
    with pytest.raises(PipelineError):
        wire.decode(raw, other)


@given(st.binary(max_size=200))
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(PipelineError):
        wire.decode(raw, wire.FromClient)
