"""Names of the decoding methods. Every other module takes them from here."""

from __future__ import annotations

from typing import Literal

Method = Literal["none", "none_fast", "sd", "self", "ssd"]
"""``none`` is plain decoding, ``none_fast`` plain decoding without padded rows (a baseline for measurements, not
bit-equal to the rest), ``sd`` standard speculative decoding, ``self`` a draft that is the target with layers
skipped, ``ssd`` speculative speculative decoding."""
METHODS: tuple[Method, ...] = ("none", "none_fast", "sd", "self", "ssd")

ServedMethod = Literal["none", "sd", "self", "ssd"]
"""Methods that a configuration or an HTTP request may name."""

DRAFTING: tuple[Method, ...] = ("self", "sd", "ssd")
"""Methods that verify draft tokens."""

WITH_DRAFT: tuple[Literal["sd", "ssd"], ...] = ("sd", "ssd")
"""Methods that need a draft worker."""

Modelled = Literal["none", "none_fast", "sd", "ssd"]
MODELLED: tuple[Modelled, ...] = ("none_fast", "none", *WITH_DRAFT)
"""Methods that ``ssd plan`` simulates: plain decoding, and those with a draft worker."""
