"""What tests of several rooms need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Every machine sees the same examples, however slow it is; a fixture is made once for all of them.
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=SLOW)
settings.load_profile("steady")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """Makes a model of random weights, with so many layers and a chat template, and one token a byte."""

    def make(layers: int, template: str) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make
