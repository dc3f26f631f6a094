"""Exceptions users see.

::

    SSDError
    ├── UsageError (also ValueError)      the caller's input is wrong; the message says what to do
    │   ├── ConfigError                   a configuration file or ``--set`` override
    │   ├── ModelError                    a model that cannot be loaded or paired
    │   └── RequestError                  a prompt or its sampling parameters
    ├── OverloadedError                   too much is in flight; the same request may work later
    └── PipelineError (also RuntimeError) a worker or a connection failed
        ├── LinkError                     the exchange between draft and verifier broke
        └── WorkerError                   a worker process died or did not start
"""

from __future__ import annotations


class SSDError(Exception):
    """Base of every error that this package raises deliberately."""


class UsageError(SSDError, ValueError):
    """The caller's input is wrong. The message says what to do."""


class ConfigError(UsageError):
    """A configuration key or value is wrong."""


class ModelError(UsageError):
    """A model cannot be loaded, is not supported, or does not fit its partner."""


class RequestError(UsageError):
    """A prompt or its sampling parameters are wrong."""


class OverloadedError(SSDError):
    """A limit on what is in flight is reached (HTTP 429). The same request may work later."""


class PipelineError(SSDError, RuntimeError):
    """The draft, the verifier or the connection between them failed."""


class LinkError(PipelineError):
    """The draft–verifier link broke or missed its deadline."""


class WorkerError(PipelineError):
    """A worker died, or did not come up in time."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the error's type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
