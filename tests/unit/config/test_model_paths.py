"""Names of models: folders, GGUF files, files inside installed packages, whole or in parts."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from ssd.config.model_paths import resolve_model_path
from ssd.errors import ModelError

WHOLE = bytes(range(256)) * 40


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages; the user's cache is empty."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def install(site: Path, name: str, files: dict[str, bytes]) -> None:
    """Installs a package whose distribution is called as pip would call it, with its record."""
    records = []
    for file, data in {"__init__.py": b"raise RuntimeError('imported')", **files}.items():
        path = site / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        records.append(f"{name}/{file},sha256={digest},{len(data)}")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "RECORD").write_text("\n".join(records))


def install_parts(site: Path, count: int = 3) -> None:
    size = len(WHOLE) // count
    for index in range(count):
        part = WHOLE[index * size :] if index == count - 1 else WHOLE[index * size : (index + 1) * size]
        install(site, f"big_part{index + 1}", {f"data/big.gguf.part{index:02}": part})


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model_path(str(file)) == file


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model_path(str(tmp_path)) == file
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_path(str(tmp_path)) == file
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model_path(str(tmp_path)) == tmp_path


def test_a_folder_with_several_files_names_them(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"has 2 GGUF files; name one of them: a\.gguf, b\.gguf"):
        resolve_model_path(str(tmp_path))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"name ends in \.gguf"):
        resolve_model_path(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "name",
    ["some_model/data/m.gguf", "some-model/data/m.gguf", "some-model/some_model/data/m.gguf", "some-model/m.gguf"],
)
def test_a_file_in_a_package(site: Path, name: str) -> None:
    """By import name and by distribution name; the package itself is not imported."""
    install(site, "some_model", {"data/m.gguf": b"GGUF"})
    assert resolve_model_path(f"package:{name}") == site / "some_model/data/m.gguf"


@pytest.mark.parametrize("name", ["some_model", "some-model", "a.b"])
def test_a_package_that_is_not_installed(site: Path, name: str) -> None:
    with pytest.raises(ModelError, match=rf"not installed; pip install {name.replace('_', '-')}$"):
        resolve_model_path(f"package:{name}/m.gguf")


def test_a_package_without_the_file(site: Path) -> None:
    install(site, "some_model", {"data/m.gguf": b"GGUF"})
    with pytest.raises(ModelError, match=r"the package has no file other\.gguf$"):
        resolve_model_path("package:some_model/other.gguf")


@pytest.mark.parametrize(
    "name", ["", "some_model", "some_model/", "/m.gguf", "some_model/m.bin", "some_model/../m.gguf"]
)
def test_names_that_are_not_of_a_file(site: Path, name: str) -> None:
    with pytest.raises(ModelError, match="must look like package:NAME/FILE"):
        resolve_model_path(f"package:{name}")


@pytest.mark.parametrize("package", ["big_part1", "big-part1"])
def test_parts_in_packages_that_count_up(site: Path, package: str) -> None:
    install_parts(site)
    path = resolve_model_path(f"package:{package}/data/big.gguf.part00")
    assert path.read_bytes() == WHOLE and path.suffix == ".gguf"
    before = path.stat().st_mtime_ns
    assert resolve_model_path(f"package:{package}/data/big.gguf.part00").stat().st_mtime_ns == before


def test_parts_in_one_package(site: Path) -> None:
    install(site, "some_model", {"m.gguf.part0": WHOLE[:100], "m.gguf.part1": WHOLE[100:]})
    assert resolve_model_path("package:some_model/m.gguf.part0").read_bytes() == WHOLE


def test_parts_that_change_are_joined_again(site: Path) -> None:
    install_parts(site)
    first = resolve_model_path("package:big_part1/data/big.gguf.part00")
    install(site, "big_part3", {"data/big.gguf.part02": b"other"})
    assert resolve_model_path("package:big_part1/data/big.gguf.part00") != first


def test_a_damaged_part_is_named(site: Path) -> None:
    install_parts(site)
    part = site / "big_part2/data/big.gguf.part01"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=rf"{part} is damaged"):
        resolve_model_path("package:big_part1/data/big.gguf.part00")
    assert not list(site.parent.glob("cache/ssd/gguf/*"))
