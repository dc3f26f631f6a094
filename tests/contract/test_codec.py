"""The codec of both lanes: fields have the types they are declared with, and nothing else is made or sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest

from ssd.errors import PipelineError, RequestError
from ssd.pipeline.transport import messages
from ssd.pipeline.transport.messages import Admit, Cancel, Failed, Submit
from ssd.request.sampling_params import SamplingParams
from ssd.serving.lane import wire
from tests.contract.test_client_wire import MESSAGES
from tests.contract.test_control import EVERY

Decode = Callable[[bytes], Any]


def crossing() -> Iterator[tuple[Any, Callable[[Any], bytes], Decode]]:
    for message in EVERY:
        yield message, messages.encode, messages.decode
    for asked in MESSAGES:
        expected = wire.FromClient if isinstance(asked, wire.FromClient) else wire.FromServer
        yield asked, wire.encode, lambda raw, expected=expected: wire.decode(raw, expected)


def wrong(value: Any) -> list[Any]:
    """Values of types that this one's field does not have."""
    if isinstance(value, bool):
        return [1, "x", [True]]
    if isinstance(value, int):
        return [True, "1", [1], {"a": 1}, 1.5]
    if isinstance(value, str):
        return [True, {"a": 1}, 1.5]
    if isinstance(value, list | tuple):
        return [1, {"a": 1}]
    return [[1], True]


@pytest.mark.parametrize(("message", "encode", "decode"), list(crossing()), ids=lambda value: type(value).__name__)
def test_a_field_of_another_type_is_refused(message: Any, encode: Callable[[Any], bytes], decode: Decode) -> None:
    assert decode(encode(message)) == message
    body = msgpack.unpackb(encode(message))
    for field in fields(message):
        if (value := getattr(message, field.name)) is None:
            continue
        for other in wrong(value):
            raw = msgpack.packb({**body, field.name: other})
            with pytest.raises(PipelineError):
                decode(raw)
        with pytest.raises(PipelineError):
            decode(msgpack.packb({**body, f"{field.name}_": 1}))


@pytest.mark.parametrize(
    "message",
    [
        Submit(request=1, prompt=[2**64], params=SamplingParams()),
        Cancel(request=-(2**64)),
        Failed(role="draft", message="\ud800"),
        Cancel(request=1j),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_what_the_wire_cannot_carry_is_an_error_of_its_request(message: Any) -> None:
    """And leaves nothing behind that the next message would be sent with."""
    with pytest.raises(RequestError, match="cannot be sent"):
        messages.encode(message)
    assert messages.decode(messages.encode(Cancel(request=1))) == Cancel(request=1)


def test_parameters_are_checked_where_they_arrive() -> None:
    good = wire.Ask(number=1, prompt="x", params=SamplingParams(), credit=1)
    body = msgpack.unpackb(wire.encode(good))
    body["params"]["top_p"] = 7.0
    with pytest.raises(RequestError, match="top_p"):
        wire.decode(msgpack.packb(body), wire.FromClient)
    admit = Admit(slot=0, tokens=[1], params=SamplingParams(), forecasts=True)
    body = msgpack.unpackb(messages.encode(admit))
    body["params"]["top_p"] = 7.0
    with pytest.raises(PipelineError, match="top_p"):
        messages.decode(msgpack.packb(body))
    assert messages.decode(messages.encode(replace(admit, slot=3))).slot == 3


@pytest.mark.parametrize("events", [-1, -(2**40)])
def test_credit_is_a_count(events: int) -> None:
    with pytest.raises(PipelineError, match="count"):
        wire.decode(msgpack.packb({"type": "Credit", "number": 1, "events": events}), wire.FromClient)


def test_outputs_inside_outputs_end() -> None:
    """Nested dataclasses are read by recursion; a message of endless depth is refused, not followed."""
    event: dict[str, Any] = {"text": "", "token_ids": [], "accepted": 0}
    output: dict[str, Any] = {"others": []}
    for _ in range(400):
        output = {"others": [output]}
    with pytest.raises(PipelineError):
        wire.decode(msgpack.packb({"type": "Done", "number": 1, "event": event | {"output": output}}), wire.FromServer)
