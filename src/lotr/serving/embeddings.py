"""Vectors in the form of OpenAI's API, of bases that were trained to give some."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from .bodies import Embed
from .problems import Problem

_POOLING = "1_Pooling/config.json"  # where sentence-transformers keeps how tokens become one vector


def check_pooling(base: nn.Module) -> None:
    """Raise a problem unless the base model was trained to embed by the mean of its tokens."""
    config: Any = base.config
    if type(base.base_model).__name__ not in (config.architectures or ()):
        trained_as = ", ".join(config.architectures or ("something else",))
        raise Problem(404, f"This bank's base model is no embedding model, but {trained_as}.")
    pooling = _pooling(config._name_or_path)
    if pooling != ["mean"]:
        raise Problem(
            404, f"This bank's base model pools by {' and '.join(pooling)}; only the mean is served."
        )


@lru_cache
def _pooling(source: str) -> list[str]:
    """Return how a model pools, in the older or the newer form of its file; the mean where it does not tell."""
    local = Path(source) / _POOLING if Path(source).is_dir() else try_to_load_from_cache(source, _POOLING)
    if not isinstance(local, str | Path) or not Path(local).is_file():
        return ["mean"]
    content = json.loads(Path(local).read_text(encoding="utf-8"))
    modes = content.get("pooling_mode") or [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, used in content.items()
        if name.startswith("pooling_mode_") and used
    ]
    return [modes] if isinstance(modes, str) else list(modes)


def in_openai_form(asked: Embed, vectors: Sequence[Tensor], tokens: int) -> dict[str, Any]:
    """Return the answer; base64 is of little-endian float32."""

    def encoded(vector: Tensor) -> str | list[float]:
        if asked.encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()

    data = [{"object": "embedding", "index": n, "embedding": encoded(v)} for n, v in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}
