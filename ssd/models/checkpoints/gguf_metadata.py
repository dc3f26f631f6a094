"""Configuration and tokenizer of a GGUF file, as transformers reads them, kept in the user's cache.

transformers rebuilds a tokenizer from the file's vocabulary, which takes up to a minute. The result is stored as a
folder with ``config.json`` and the tokenizer's files, for as long as the file and the packages do not change. Weights
are not read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from ...errors import ModelError
from .gguf_file import GgufFile
from .naming import Naming

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
NEEDED = ("gguf", "accelerate")
"""Packages that transformers needs to read such a file."""
_VERSION = 1
"""Of what the cached folders hold."""
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TOKENIZER = "tokenizer.ggml."


def is_gguf(path: Path) -> bool:
    """Returns whether a model's path is that of a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def metadata_folder(path: Path) -> Path:
    """Returns the folder with the configuration and tokenizer of a GGUF file; made at first use.

    Raises:
        ModelError: the file is damaged, a package is missing, or transformers does not know the architecture or the
            tokenizer.
    """
    check_packages(path)
    stat = path.stat()
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "gguf")]
    key = repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns, versions, _VERSION))
    cache = cache_folder()
    folder = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        header = GgufFile.read(path)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            made = Path(temporary) / "model"
            made.mkdir()
            _convert(header, made)
            try:
                made.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


def cache_folder() -> Path:
    """Returns where the folders are kept; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd" / "gguf"


def check_packages(path: Path) -> None:
    """Raises ModelError where a package that GGUF files need is not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ModelError(f"{path} is a GGUF file, which needs a package: pip install {' '.join(missing)}")


def read_config(path: Path) -> PretrainedConfig:
    """Returns the configuration of a GGUF file. Raises: ModelError, as ``metadata_folder``."""
    return AutoConfig.from_pretrained(metadata_folder(path), local_files_only=True, trust_remote_code=False)


def load_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a GGUF file. Raises: ModelError, as ``metadata_folder``."""
    # The tokenizer's own class would build the vocabulary and the merges a second time.
    return PreTrainedTokenizerFast.from_pretrained(metadata_folder(path), local_files_only=True)


def _convert(header: GgufFile, folder: Path) -> None:
    """Writes configuration and tokenizer. Raises: ModelError."""
    path, place = header.path, {"gguf_file": header.path.name, "local_files_only": True}
    log.info("%s: reading configuration and tokenizer; kept for the next start", path)
    with Naming(path, f"architecture {header.architecture!r} is not supported by transformers"):
        config = AutoConfig.from_pretrained(path.parent, **place)
    ends = [header.metadata.get(_TOKENIZER + name) for name in _ENDS]
    if known := list(dict.fromkeys(one for one in ends if type(one) is int)):
        config.eos_token_id = known if len(known) > 1 else known[0]
    config._name_or_path = ""  # the file's title, which transformers would take for a place
    with Naming(path, "no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _finish_tokenizer(folder, size=config.get_text_config().vocab_size)


def _finish_tokenizer(folder: Path, *, size: int) -> None:
    """Takes away tokens that the file does not have, and names a class that reads ``tokenizer.json`` as it is.

    transformers' tokenizer classes add a special token that their own models have. Its id is beyond the embedding.
    """
    whole, told = folder / "tokenizer.json", folder / "tokenizer_config.json"
    stored = json.loads(whole.read_text(encoding="utf-8"))
    beyond = {one["content"] for one in stored["added_tokens"] if one["id"] >= size}
    if beyond:
        stored["added_tokens"] = [one for one in stored["added_tokens"] if one["id"] < size]
        whole.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
    keys = json.loads(told.read_text(encoding="utf-8"))
    keys.pop("added_tokens_decoder", None)
    kept = {key: value for key, value in keys.items() if not isinstance(value, str) or value not in beyond}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    told.write_text(json.dumps(kept, indent=2), encoding="utf-8")
