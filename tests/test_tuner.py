"""The contract on the five architectures: BERT, Llama (grouped-query attention), GPT-2 (Conv1D), T5, ViT."""

from __future__ import annotations

from tuner_contract import TunerContract


class TestTuner(TunerContract):
    pass
