"""What several test files need: a tiny random base in the released layout."""

import dataclasses
import json
import os
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import Config, QwenVL, VisionConfig
from plumbing.tokenizer import Tokenizer
from toy_world import world

# for torchvision, which processors of transformers import: here, and in commands that tests run
MEND = Path(__file__).parent / "mend"
runpy.run_path(str(MEND / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(MEND), os.environ.get("PYTHONPATH")]))
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings


def write_tiny_base(folder, seed=0, **changes):
    """A random base of a few ten thousand parameters: config.json, model.safetensors, qwen.tiktoken."""
    folder.mkdir(parents=True, exist_ok=True)
    world.write_vocabulary(folder / "qwen.tiktoken")
    tokenizer = Tokenizer(folder)
    vision = VisionConfig(
        image_size=28,
        patch_size=14,
        width=32,
        layers=1,
        heads=2,
        mlp_ratio=2.0,
        output_dim=128,
        image_start_id=tokenizer.image_start_id,
        n_queries=4,
    )
    config = Config(
        **{
            "vocab_size": tokenizer.n_vocab + 3,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "kv_channels": 32,
            "intermediate_size": 128,
            "seq_length": 128,
            "visual": vision,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = QwenVL(config)
    for weight in (model.transformer.wte.weight, model.lm_head.weight):
        torch.nn.init.normal_(
            weight, std=0.3
        )  # logits far enough apart that rounding moves no argmax
    raw = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", **dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tiny_model(tiny_base):
    return QwenVL.from_pretrained(tiny_base)
