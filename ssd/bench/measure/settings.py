"""Settings that a bench measures besides the configuration's own: values of a key, and alternatives."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Values of one configuration key. A pipeline is started for each."""

    key: str
    values: tuple[str, ...]


def parse_sweep(given: str) -> Sweep:
    """Parses ``KEY=1..6`` (integers, both ends included) or ``KEY=a,b,c``.

    Raises:
        RequestError: the text is neither.
    """
    key, _, text = given.partition("=")
    low, dots, high = text.partition("..")
    if dots and low.isdigit() and high.isdigit() and int(low) <= int(high):
        values = tuple(str(value) for value in range(int(low), int(high) + 1))
    else:
        values = tuple(part.strip() for part in text.split(",")) if not dots else ()
    if not key.strip() or not values or not all(values):
        raise RequestError(f"--sweep {given!r} must look like KEY=1..6 or KEY=4,8,16")
    return Sweep(key=key.strip(), values=values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """Overrides of a second pipeline, which takes turns with the configuration's own."""

    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The overrides without their sections, as a name in reports."""
        return ", ".join(setting.rpartition(".")[2] for setting in self.settings)


def parse_beside(given: str) -> Beside:
    """Parses ``"KEY=VALUE KEY=VALUE ..."``.

    Raises:
        RequestError: a part of the text has no ``=``, or there is none.
    """
    settings = tuple(given.split())
    if not settings or not all("=" in setting for setting in settings):
        raise RequestError(f'--beside {given!r} must look like KEY=VALUE or "KEY=VALUE KEY=VALUE"')
    return Beside(settings=settings)
