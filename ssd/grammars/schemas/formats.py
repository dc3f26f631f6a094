"""Formats of strings, as regular expressions.

JSON Schema makes formats annotations. Those below are enforced, so that the programs that read the output accept it: a
date exists in the calendar, a UUID has its version. They may be narrower than their standard, never wider. Every other
format is an annotation, but for those in ``LIBRARY``, which the grammar library enforces.
"""

from __future__ import annotations

LIBRARY = frozenset({"hostname", "uri"})

_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # Gregorian, without year 0
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"

_SECONDS, _MINUTES, _HOURS = "[0-9]{1,6}S", "[0-9]{1,6}M(?:[0-9]{1,6}S)?", "[0-9]{1,6}H"
_OF_DAY = f"T(?:{_HOURS}(?:{_MINUTES})?|{_MINUTES}|{_SECONDS})"
_DAYS, _MONTHS = "[0-9]{1,6}D", "[0-9]{1,4}M(?:[0-9]{1,6}D)?"
_DURATION = f"P(?:(?:[0-9]{{1,4}}Y(?:{_MONTHS})?|{_MONTHS}|{_DAYS})(?:{_OF_DAY})?|{_OF_DAY}|[0-9]{{1,4}}W)"

_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_GROUP = "[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [
        f"(?:{_GROUP}:){{7}}{_GROUP}",
        f"(?:{_GROUP}:){{1,7}}:",
        *(f"(?:{_GROUP}:){{1,{7 - after}}}(?::{_GROUP}){{1,{after}}}" for after in range(1, 7)),
        f":(?::{_GROUP}){{1,7}}",
        "::",
    ]
)
# Without host bits: whole bytes are the network's, the others are 0.
_IPV4_NETWORK = "|".join(
    [
        rf"{_BYTE}(?:\.0){{3}}/8",
        rf"{_BYTE}\.{_BYTE}(?:\.0){{2}}/16",
        rf"{_BYTE}(?:\.{_BYTE}){{2}}\.0/24",
        f"{_IPV4}(?:/32)?",
    ]
)
_IPV6_NETWORK = f"(?:{_IPV6})(?:/128)?"

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,31}"
_LABEL = "[A-Za-z0-9]{1,30}(?:-[A-Za-z0-9]{1,30})?"
_HEX = "[0-9a-fA-F]"


def _uuid(version: str = _HEX) -> str:
    variant = _HEX if version == _HEX else "[89abAB]"
    return f"{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-{variant}{_HEX}{{3}}-{_HEX}{{12}}"


PATTERNS: dict[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "email": rf"{_ATOM}(?:\.{_ATOM})?@(?:{_LABEL}\.){{1,4}}[A-Za-z]{{2,20}}",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": f"{_IPV4}|{_IPV6}",
    "ipv4network": _IPV4_NETWORK,
    "ipv6network": _IPV6_NETWORK,
    "ipvanynetwork": f"{_IPV4_NETWORK}|{_IPV6_NETWORK}",
    "ipv4interface": f"{_IPV4}(?:/(?:3[0-2]|[12]?[0-9]))?",
    "ipv6interface": f"(?:{_IPV6})(?:/(?:12[0-8]|1[01][0-9]|[1-9]?[0-9]))?",
    "ipvanyinterface": f"{_IPV4}(?:/(?:3[0-2]|[12]?[0-9]))?|(?:{_IPV6})(?:/(?:12[0-8]|1[01][0-9]|[1-9]?[0-9]))?",
    "uuid": _uuid(),
    **{f"uuid{version}": _uuid(str(version)) for version in range(1, 9)},
    "base64": "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "base64url": "(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?",
    "json-pointer": "(?:/(?:[^/~]|~[01])*)*",
}
"""Format and what the whole string matches."""


def pattern(name: str) -> str | None:
    """Returns a JSON Schema pattern for a format, or None if it is not enforced here."""
    found = PATTERNS.get(name)
    return None if found is None else f"^(?:{found})$"
