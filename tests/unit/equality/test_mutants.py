"""The suite catches known bugs: each is seeded, and tests of the suite are run on the mutated code.

By default a mutant's quickest killer runs; ``-m slow`` runs the others, and all of them without any
mutant (the default suite does that anyway, each in its place).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ssd.testing.mutants.pipeline import MUTANTS
from ssd.testing.mutants.seeding import Mutant, seeded

HERE = Path(__file__).parents[1]


class Watch:
    """A pytest plugin: tests run with a mutant seeded, and how each ended."""

    def __init__(self, mutant: Mutant | None):
        self.mutant, self.ended = mutant, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.ended[item.nodeid] = None
        # Not before the test's module is imported: it must not keep the mutant's functions.
        with nullcontext() if self.mutant is None else seeded(self.mutant):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[Any]:
        if call.excinfo is not None:
            self.ended[item.nodeid] = call.excinfo.type
        return (yield)


def outcomes(nodes: tuple[str, ...], mutant: Mutant | None) -> dict[str, type[BaseException] | None]:
    """Of tests of the suite, run inside this one: what each raised."""
    watch = Watch(mutant)
    ids = [f"{HERE / node}" for node in nodes]
    quiet = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-m", ""]
    code = pytest.main([*quiet, *ids], plugins=[watch])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), f"could not run {nodes}: {code!r}"
    assert len(watch.ended) == len(nodes), f"{nodes} are not all tests of the suite"
    return watch.ended


def check_killed(mutant: Mutant, killers: tuple[str, ...]) -> None:
    """Each killer fails, and by what it asserts: a mutant that breaks down would prove nothing."""
    for node, raised in outcomes(killers, mutant).items():
        assert raised is not None, f"the mutant {mutant.name!r} ({mutant.bug}) survives {node}"
        assert issubclass(raised, AssertionError), f"{node} broke down with {raised.__name__}"


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=lambda mutant: mutant.name)
def test_killed(mutant: Mutant) -> None:
    check_killed(mutant, mutant.killers[:1])


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in MUTANTS.values() if m.killers[1:]], ids=lambda mutant: mutant.name)
def test_killed_by_others_too(mutant: Mutant) -> None:
    check_killed(mutant, mutant.killers[1:])


@pytest.mark.slow
@pytest.mark.timeout(3600)  # all killers, one after the other
def test_killers_pass_without_a_mutant() -> None:
    killers = tuple(dict.fromkeys(node for mutant in MUTANTS.values() for node in mutant.killers))
    assert set(outcomes(killers, None).values()) == {None}
