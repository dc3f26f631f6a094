"""Where a model is: a shipped name, a local folder, a GGUF file, or a file inside an installed Python package."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelError

MODEL_FOLDER = Path(__file__).resolve().parents[1] / "data"
SHIPPED_MODELS = ("embedded/target", "embedded/draft")
PACKAGE_PREFIX = "package:"
_PART = re.compile(r"^(?P<stem>.*\.gguf\.part)(?P<number>\d+)$")


def resolve_model_path(name: str) -> Path:
    """Returns the folder or the GGUF file of a model.

    Args:
        name: a shipped name, a path, or ``package:NAME/FILE``. NAME is the import name or the distribution name of an
            installed package. FILE ends in ``.gguf``, or in ``.gguf.part00`` for a file that comes in parts: the
            parts after it are taken from the same folder, or from packages whose names count up with the parts, and
            joined in the user's cache.

    Raises:
        ModelError: there is no model at that place, or a package is not installed.
    """
    if name.startswith(PACKAGE_PREFIX):
        return _in_package(name)
    shipped = name in SHIPPED_MODELS
    place = MODEL_FOLDER / name if shipped else Path(name).expanduser()
    if place.is_file():
        if place.suffix != ".gguf":
            raise ModelError(f"model {name!r} is a file; give a folder, or a file whose name ends in .gguf")
        return place
    files = sorted(place.glob("*.gguf")) if place.is_dir() and not any(place.glob("*.safetensors")) else []
    if len(files) == 1:
        return files[0]
    if (place / "config.json").is_file():
        return place
    if shipped:
        raise ModelError(
            f"model {name!r}: its weights are missing from this installation ({place}); "
            "reinstall the package, or train them with scripts/train_pair.py"
        )
    if files:
        raise ModelError(
            f"model {name!r}: the folder has {len(files)} GGUF files; name one of them: "
            + ", ".join(file.name for file in files)
        )
    if place.is_dir():
        raise ModelError(
            f"model {name!r}: the folder has no config.json and no GGUF file; give the folder of a transformers model"
        )
    raise ModelError(
        f"model {name!r} is not a folder on this machine (hub ids are not downloaded); "
        f"give a local folder with config.json and *.safetensors, a GGUF file, or one of {', '.join(SHIPPED_MODELS)}"
    )


def _in_package(name: str) -> Path:
    """Returns the file that ``package:NAME/FILE`` names, joined if it comes in parts. Raises: ModelError."""
    package, slash, file = name.removeprefix(PACKAGE_PREFIX).partition("/")
    part = _PART.match(file)
    if not (package and slash) or ".." in Path(file).parts or not (file.endswith(".gguf") or part):
        raise ModelError(f"model {name!r} must look like package:NAME/FILE.gguf (or FILE.gguf.part00)")
    found = _file(package, file)
    if found is None:
        what = f"the package has no file {file}" if _folders(package) else "the package is not installed"
        hint = "" if _folders(package) else f"; pip install {package.replace('_', '-')}"
        raise ModelError(f"model {name!r}: {what}{hint}")
    if part is None:
        return found
    parts = [found]
    while (following := _part_after(package, part, len(parts))) is not None:
        parts.append(following)
    return _joined(part["stem"].rpartition("/")[2].removesuffix(".part"), parts)


def _part_after(package: str, first: re.Match[str], ahead: int) -> Path | None:
    """Returns the part ``ahead`` parts after the first, of the same package or of one that counts up; None at the
    end."""
    number = f"{int(first['number']) + ahead:0{len(first['number'])}}"
    sibling, stem = package, first["stem"]
    if counted := re.search(r"\d+$", package):
        sibling = package[: counted.start()] + f"{int(counted[0]) + ahead:0{len(counted[0])}}"
    return (_file(sibling, stem.replace(package, sibling) + number) if sibling != package else None) or _file(
        package, stem + number
    )


def _file(package: str, file: str) -> Path | None:
    """Returns a file of an installed package, given its path in the package or in its distribution."""
    for folder in _folders(package):
        if (folder / file).is_file():
            return folder / file
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [one for one in listed if str(one) == file] or [one for one in listed if str(one).endswith(f"/{file}")]
    path = Path(str(found[0].locate())) if len(found) == 1 else None
    return path if path is not None and path.is_file() else None


def _folders(package: str) -> list[Path]:
    """Returns the folders of an installed package, without importing it."""
    names = [package] if package.isidentifier() else []
    try:
        listed = importlib.metadata.files(package) or []
        names += sorted({one.parts[0] for one in listed if len(one.parts) > 1 and one.parts[0].isidentifier()})
    except importlib.metadata.PackageNotFoundError:
        pass
    specs = [importlib.util.find_spec(name) for name in dict.fromkeys(names)]
    return [Path(place) for spec in specs if spec is not None for place in spec.submodule_search_locations or ()]


def _joined(name: str, parts: Sequence[Path]) -> Path:
    """Returns the parts as one file in the user's cache, joined at first use.

    Raises:
        ModelError: a part is not what its package's record says, or the cache cannot be written.
    """
    told = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd" / "gguf"
    path = folder / f"{name.removesuffix('.gguf')}-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.gguf"
    if path.is_file() and path.stat().st_size == sum(size for _, size, _ in told):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as whole:
            try:
                for part in parts:
                    _append(part, whole)
                whole.flush()
                os.replace(whole.name, path)
            finally:
                Path(whole.name).unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(f"the parts of {name} cannot be joined in {folder}: {error}") from error
    return path


def _append(part: Path, whole: tempfile._TemporaryFileWrapper[bytes]) -> None:
    """Appends a part and compares its checksum with the one in its package's record. Raises: ModelError, OSError."""
    digest = hashlib.sha256()
    with part.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            whole.write(chunk)
    expected = _recorded(part)
    if expected is not None and expected != base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode():
        raise ModelError(f"{part} is damaged: its checksum is not the one of its package; reinstall that package")


def _recorded(part: Path) -> str | None:
    """Returns the sha256 that an installed package's record has for a file, or None."""
    for root in part.parents:
        for record in root.glob("*.dist-info"):
            found = importlib.metadata.Distribution.at(record)
            for file in found.files or ():
                if file.hash is not None and file.hash.mode == "sha256" and root / file == part:
                    return file.hash.value
        if root.name in ("site-packages", "dist-packages"):
            break
    return None
