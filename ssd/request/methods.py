"""Names of the decoding methods."""

from __future__ import annotations

from typing import Literal

METHODS = ("none", "none_fast", "sd", "self", "ssd")
Method = Literal["none", "none_fast", "sd", "self", "ssd"]
