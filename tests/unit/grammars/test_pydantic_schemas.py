"""Pydantic's schemas: each is accepted, and an output that follows it is valid for the type it was made from."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import jsonschema
import pydantic
import pytest
from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, StringConstraints, Tag, TypeAdapter
from typing_extensions import TypedDict

import ssd
from ssd.models.checkpoints.loading import load_tokenizer
from ssd.request.structured import StructuredOutputsParams
from ssd.testing.walks import Walker

SEEDS = range(8)
VOCABULARY = 4096


class Colour(Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


class Size(IntEnum):
    SMALL = 1
    LARGE = 2


class Point(NamedTuple):
    x: int
    y: float = 0.0


class Options(TypedDict, total=False):
    verbose: bool
    level: int


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = Field(default=9, ge=0, le=9)


class Dog(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["dog"]
    good: bool = True


class Puppy(BaseModel):
    kind: Literal["puppy", "whelp"]
    age_days: Annotated[int, Field(gt=0, lt=100)]


Pet = Annotated[Cat | Dog | Puppy, Field(discriminator="kind")]


class Node(BaseModel):
    value: int
    children: list[Node] = Field(default_factory=list, max_length=2)


class Add(BaseModel):
    op: Literal["add"] = "add"
    left: Expression
    right: Expression


class Number(BaseModel):
    op: Literal["number"] = "number"
    value: int


Expression = Annotated[Add | Number, Field(discriminator="op")]
Add.model_rebuild()
T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]
    total: int = Field(ge=0, description="how many there are")


class Address(BaseModel):
    model_config = ConfigDict(extra="forbid")
    street: str = Field(max_length=20, examples=["Elm St"])
    zip: Annotated[str, StringConstraints(pattern=r"^\d{5}(-\d{4})?$")]


class Person(BaseModel):
    """Someone."""

    model_config = ConfigDict(extra="forbid", title="A person", json_schema_extra={"readOnly": True, "x-note": 1})
    name: str = Field(min_length=1, max_length=12)
    age: Annotated[int, Field(ge=0, le=130)]
    nickname: str | None = None
    address: Address
    former: list[Address] = []
    born: dt.date = Field(deprecated=True)


class Extra(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    a: int


class Tagged(BaseModel):
    pet: Annotated[
        Annotated[Cat, Tag("cat")] | Annotated[Dog, Tag("dog")], Discriminator(lambda value: value.get("kind", "cat"))
    ]


KINDS: dict[str, Any] = {
    "any": Any,
    "none": None,
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "bytes": bytes,
    "int bounds": Annotated[int, Field(ge=-(2**31), le=2**31 - 1)],
    "int exclusive": Annotated[int, Field(gt=2, lt=40)],
    "int multiple": Annotated[int, Field(multiple_of=5, ge=-20, le=40)],
    "PositiveInt": pydantic.PositiveInt,
    "NonNegativeFloat": pydantic.NonNegativeFloat,
    "conint": pydantic.conint(gt=1, le=7),
    "confloat": pydantic.confloat(ge=0.5, le=1.5),
    "constr": pydantic.constr(min_length=2, max_length=4),
    "constr pattern": pydantic.constr(pattern=r"^[a-z]{2,4}\d$"),
    "constr upper": pydantic.constr(to_upper=True, max_length=5),
    "conlist": pydantic.conlist(int, min_length=1, max_length=3),
    "list": list[int],
    "tuple": tuple[int, str, bool],
    "tuple any": tuple[int, ...],
    "NamedTuple": Point,
    "sequence": Sequence[str],
    "iterable": Iterable[int],
    "dict": dict[str, int],
    "dict int keys": dict[Literal["1", "2"], str],
    "dict min": Annotated[dict[str, int], Field(min_length=2, max_length=4)],
    "dict pattern": dict[Annotated[str, StringConstraints(pattern=r"^x-[a-z]+$")], bool],
    "dict pattern min": Annotated[
        dict[Annotated[str, StringConstraints(pattern=r"^k\d+$")], bool], Field(min_length=3, max_length=5)
    ],
    "dict lengths": dict[Annotated[str, StringConstraints(min_length=1, max_length=3)], int],
    "dict enum": dict[Colour, int],
    "mapping": Mapping[str, list[bool]],
    "set": set[int],
    "frozenset": frozenset[str],
    "set of literals": set[Literal["a", "b", "c"]],
    "set of enum": Annotated[set[Colour], Field(min_length=2)],
    "set of bool": frozenset[bool],
    "set of seven": set[Literal[1, 2, 3, 4, 5, 6, 7]],
    "literal": Literal["a", 1, True, None],
    "Enum": Colour,
    "IntEnum": Size,
    "Optional": int | None,
    "union": int | str | list[bool],
    "TypedDict": Options,
    "date": dt.date,
    "time": dt.time,
    "datetime": dt.datetime,
    "timedelta": dt.timedelta,
    "AwareDatetime": pydantic.AwareDatetime,
    "UUID": uuid.UUID,
    "UUID1": pydantic.UUID1,
    "UUID3": pydantic.UUID3,
    "UUID4": pydantic.UUID4,
    "UUID5": pydantic.UUID5,
    "UUID7": pydantic.UUID7,
    "IPv4Address": ipaddress.IPv4Address,
    "IPv6Address": ipaddress.IPv6Address,
    "IPv4Network": ipaddress.IPv4Network,
    "IPv6Network": ipaddress.IPv6Network,
    "IPv4Interface": ipaddress.IPv4Interface,
    "IPv6Interface": ipaddress.IPv6Interface,
    "IPvAnyAddress": pydantic.IPvAnyAddress,
    "IPvAnyNetwork": pydantic.IPvAnyNetwork,
    "IPvAnyInterface": pydantic.IPvAnyInterface,
    "Path": Path,
    "SecretStr": pydantic.SecretStr,
    "SecretBytes": pydantic.SecretBytes,
    "Secret": pydantic.Secret[int],
    "Base64Bytes": pydantic.Base64Bytes,
    "Base64UrlBytes": pydantic.Base64UrlBytes,
    "root model": RootModel[list[int]],
    "nested": Person,
    "generic": Page[Address],
    "discriminated": Pet,
    "discriminated list": list[Pet],
    "discriminated recursive": Add,
    "callable discriminator": Tagged,
    "recursive": Node,
    "extra allow": Extra,
    "annotated union": Annotated[
        Annotated[int, Field(ge=0, le=9)] | Annotated[str, StringConstraints(max_length=3)], Field(description="either")
    ],
}
UNPARSED: dict[str, Any] = {
    "Decimal": Decimal,
    "Decimal digits": Annotated[Decimal, Field(max_digits=5, decimal_places=2)],
    "Decimal positive": Annotated[Decimal, Field(gt=0)],
    "FiniteFloat": pydantic.FiniteFloat,
    "AnyUrl": pydantic.AnyUrl,
    "HttpUrl": pydantic.HttpUrl,
    "PostgresDsn": pydantic.PostgresDsn,
    "Json": pydantic.Json[int],
    "ByteSize": pydantic.ByteSize,
    "FilePath": pydantic.FilePath,
    "Pattern": "re.Pattern",
    "complex": complex,
    "PastDate": pydantic.PastDate,
    "dict int": dict[int, str],
    "ImportString": pydantic.ImportString,
}
"""Types that check more than their JSON schema says."""
LOOSE = {"set", "frozenset"}
"""Types whose ``uniqueItems`` is not held: their items cannot be listed."""


@pytest.fixture(scope="module")
def walker() -> Walker:
    tokenizer = load_tokenizer(Path(ssd.__file__).parent / "data/embedded/target")
    return Walker(tokenizer, vocabulary=VOCABULARY, ends=[tokenizer.eos_token_id])


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_valid(kind: str, walker: Walker) -> None:
    adapter = TypeAdapter(KINDS[kind])
    schema = adapter.json_schema()
    wanted = StructuredOutputsParams(json=schema)
    validator = jsonschema.Draft202012Validator(schema)
    finished = 0
    for seed in SEEDS:
        text, complete = walker.walk(wanted, seed)
        if complete:
            finished += 1
            value = json.loads(text)
            if kind not in LOOSE:
                validator.validate(value)
            adapter.validate_json(text)
    assert finished >= 2


DECIMALS = {  # as pydantic 2.12 writes them
    "any": (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", 99, 40),
    "both": (r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*$)", 5, 2),
    "digits": (r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,4}|(?=[\d.]{1,5}0*$)\d*\.\d*0*$)", 4, None),
    "places": (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d{0,2}0*$", 99, 2),
}
"""Name to a pattern, the most digits and the most places."""


@pytest.mark.parametrize("kind", DECIMALS)
def test_decimals_with_look_ahead(kind: str, walker: Walker) -> None:
    pattern, digits, places = DECIMALS[kind]
    adapter = TypeAdapter(Annotated[Decimal, Field(max_digits=digits, decimal_places=places)])
    schema = {"anyOf": [{"type": "integer", "maximum": -1, "minimum": -9}, {"type": "string", "pattern": pattern}]}
    texts = set()
    for seed in range(30):
        text, complete = walker.walk(StructuredOutputsParams(json=schema), seed, limit=60)
        if complete:
            texts.add(text)
            adapter.validate_json(text)
    assert any(text.startswith('"') for text in texts) and len(texts) > 3


@pytest.mark.parametrize("kind", UNPARSED)
def test_outputs_follow_the_schema(kind: str, walker: Walker) -> None:
    given = UNPARSED[kind]
    schema = {"type": "string", "format": "regex"} if isinstance(given, str) else TypeAdapter(given).json_schema()
    finished = 0
    for seed in SEEDS:
        text, complete = walker.walk(StructuredOutputsParams(json=schema), seed)
        if complete:
            finished += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert finished
