"""The wire codec of both lanes, the control lane (``messages``) and the client lane (``serving.lane.wire``).

Messages are dataclasses, encoded as msgpack maps with a ``type`` key. What arrives is checked against the annotations
of the message's fields before the message is made. Sizes are bounded and nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import msgspec

from ...errors import PipelineError, RequestError

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(dict[str, Any])


class Codec:
    """Encodes and decodes the messages of one lane.

    Args:
        messages: the dataclasses that may cross the lane.
        max_bytes: the largest message accepted.
        lane: its name, for error messages.
    """

    def __init__(self, *messages: type, max_bytes: int, lane: str):
        self.types = {cls.__name__: cls for cls in messages}
        self.max_bytes, self._lane = max_bytes, lane

    def encode(self, message: Any) -> bytes:
        """Returns the message as bytes.

        Raises:
            RequestError: a value is out of the wire's range, such as an integer of more than 64 bits or a text that
                is not UTF-8.
        """
        cls = type(message)
        body: dict[str, Any] = {"type": cls.__name__}
        for name in _fields(cls):
            body[name] = getattr(message, name)
        try:
            return _ENCODER.encode(body)
        except (ValueError, OverflowError, TypeError) as error:
            raise RequestError(f"{cls.__name__} cannot be sent: {error}") from error

    def decode(self, raw: bytes) -> Any:
        """Returns the message that the bytes hold.

        Raises:
            PipelineError: these are not the bytes of a message of this lane.
            RequestError: sampling parameters are out of range.
        """
        if len(raw) > self.max_bytes:
            raise PipelineError(f"a message of {len(raw)} bytes on the {self._lane}; at most {self.max_bytes} fit")
        try:
            body = _DECODER.decode(raw)
            cls = self.types.get(kind := body.pop("type", None))
            if cls is None:
                raise TypeError(f"there is no type {kind!r}")
            if unknown := body.keys() - _fields(cls):
                raise TypeError(f"{cls.__name__} has no field {min(unknown)}")
            return msgspec.convert(body, cls)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, RequestError):
                raise error.__cause__ from None
            raise PipelineError(f"not a message of the {self._lane}: {error}") from error
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
            raise PipelineError(f"not a message of the {self._lane}: {error}") from error


@functools.cache
def _fields(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))
