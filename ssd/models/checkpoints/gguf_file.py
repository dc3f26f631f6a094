"""Reads the header of a GGUF file: metadata, and where its tensors are. Weights are not read, only mapped.

The ``gguf`` package reads the same, but takes tens of seconds for a large vocabulary, and does not say what is wrong
with a damaged file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST = 1 << 20
"""Arrays with more numbers than this, and all arrays of strings, are left out of the metadata."""
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor of a file.

    Attributes:
        name: in the file's own naming.
        shape: as torch has it, slowest dimension first.
        type: its number in the file format.
        offset: of its first byte in the file.
        nbytes: its size in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: of the file.
        metadata: keys and values; of arrays of strings, the number of strings.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def architecture(self) -> str:
        """The file's name of the model type."""
        return self.metadata["general.architecture"]

    def types(self) -> list[str]:
        """Returns the names of the quantisation types of the file's weights, by decreasing size."""
        from gguf import GGMLQuantizationType

        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                name = GGMLQuantizationType(tensor.type).name
                sizes[name] = sizes.get(name, 0) + tensor.nbytes
        return sorted(sizes, key=lambda name: -sizes[name])

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Reads and checks a header.

        Raises:
            ModelError: it is not a GGUF file, it is cut off, or it has a quantisation type that cannot be read.
        """
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size < 24:
                    raise ModelError(f"{path} is not a GGUF file: it has {size} bytes")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return _Reader(path, data).file()
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error

    def data(self, tensor: Stored) -> np.ndarray:
        """Returns a tensor's bytes as in the file: a uint8 map of ``nbytes``. Pages are read when they are used."""
        return np.memmap(self.path, mode="r", dtype=np.uint8, offset=tensor.offset, shape=(tensor.nbytes,))


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._at = path, data, 0

    def file(self) -> GgufFile:
        if self._data[:4] != MAGIC:
            raise ModelError(f"{self._path} is not a GGUF file: it begins with {self._data[:4]!r}, not {MAGIC!r}")
        try:
            return self._file()
        except (struct.error, UnicodeDecodeError, MemoryError, OverflowError):
            raise ModelError(f"{self._path}: the GGUF header is cut off or damaged") from None

    def _file(self) -> GgufFile:
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            raise ModelError(f"{self._path}: GGUF version {version} is not supported; versions 2 and 3 are")
        tensors, keys = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(keys):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        if not isinstance(metadata.get("general.architecture"), str):
            raise ModelError(f"{self._path}: the GGUF header has no general.architecture")
        if (parts := metadata.get("split.count", 1)) > 1:
            raise ModelError(f"{self._path} is one of {parts} GGUF files; merge them with llama-gguf-split --merge")
        table = [self._entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ModelError(f"{self._path}: general.alignment must be a positive integer, not {alignment!r}")
        start = -(-self._at // alignment) * alignment
        stored = {}
        for name, shape, kind, offset in table:
            tensor = Stored(
                name=name, shape=shape, type=kind, offset=start + offset, nbytes=self._bytes(name, shape, kind)
            )
            stored[name] = tensor
        needed, size = max((one.offset + one.nbytes for one in stored.values()), default=0), len(self._data)
        if needed > size:
            raise ModelError(f"{self._path} is cut off: it has {size} bytes, its tensors need {needed}")
        return GgufFile(path=self._path, metadata=metadata, tensors=stored)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._number("I")
        if dimensions > 8:
            raise ModelError(f"{self._path}: the GGUF header is cut off or damaged")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in {known.value for known in GGMLQuantizationType}:
            raise ModelError(f"{self._path}: {name} has quantisation type {kind}, which is not known")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape and shape[-1] % block:
            raise ModelError(f"{self._path}: rows of {name} are not whole blocks of {block}")
        return prod(shape) // block * size

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self._data, self._at)
        self._at += struct.calcsize("<" + kind)
        return value

    def _string(self) -> str:
        length = self._number("Q")
        if length > len(self._data) - self._at:
            raise ModelError(f"{self._path}: the GGUF header is cut off or damaged")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ModelError(f"{self._path}: the GGUF header is cut off or damaged")
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            for _ in range(count):
                self._at += 8 + struct.unpack_from("<Q", self._data, self._at)[0]
            return count
        if kind not in _NUMBERS or count > len(self._data):
            raise ModelError(f"{self._path}: the GGUF header is cut off or damaged")
        layout = f"<{count}{_NUMBERS[kind]}"
        values = struct.unpack_from(layout, self._data, self._at) if count <= LARGEST else count
        self._at += struct.calcsize(layout)
        return list(values) if isinstance(values, tuple) else values
