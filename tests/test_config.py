"""config.json: every number checked, so that a damaged file is one line and not a traceback."""

import json

import pytest

from model import Config
from plumbing.errors import InputError

VISUAL = {
    "image_size": 448,
    "patch_size": 14,
    "width": 1664,
    "layers": 48,
    "heads": 16,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "image_start_id": 151857,
}


def read(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    return Config.from_json(tmp_path / "config.json")


def test_what_the_file_leaves_out_is_qwen_vls_own(tmp_path):
    assert read(tmp_path, json.dumps({"visual": VISUAL, "something_else": 3})) == Config()


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 0},
        {"patch_size": 0},
        {"n_queries": -4},
        {"n_queries": "256"},
        {"n_queries": 2.25},
        {"n_queries": 255},
        {"width": "x"},
        {"width": True},
        {"layers": None},
        {"mlp_ratio": None},
        {"mlp_ratio": -1.0},
        {"layers": 0},
    ],
)
def test_a_senseless_number_of_the_vision_tower_is_named(tmp_path, change):
    with pytest.raises(InputError, match=rf"config\.json: visual\.{next(iter(change))}"):
        read(tmp_path, json.dumps({"visual": {**VISUAL, **change}}))


@pytest.mark.parametrize(
    "change",
    [
        {"seq_length": 0},
        {"seq_length": "2048"},
        {"rotary_emb_base": None},
        {"layer_norm_epsilon": float("nan")},
        {"num_hidden_layers": -1},
        {"kv_channels": 2},
        {"kv_channels": 127},
        {"no_bias": 1},
        {"vocab_size": 1e9},
        {"rotary_emb_base": float("inf")},
    ],
)
def test_a_senseless_number_of_the_language_model_is_named(tmp_path, change):
    with pytest.raises(InputError, match=rf"config\.json: {next(iter(change))}"):
        read(tmp_path, json.dumps({"visual": VISUAL, **change}))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[" * 100_000, "cannot be read"),
        ('{"model_type": "a\\nb"}', "is a a b model"),
        ('{"architectures": "Llama", "model_type": "llama"}', "is a llama model"),
        ('{"architectures": {"a": 1}, "model_type": "llama"}', "is a llama model"),
        ('{"model_type": "qwen"}', "without a vision tower"),
        ('{"visual": []}', "without a vision tower"),
    ],
)
def test_odd_files_are_one_line(tmp_path, text, expected):
    with pytest.raises(InputError, match=expected) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
