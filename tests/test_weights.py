"""Reading checkpoints: every layout, every tensor accounted for, and each kind of damage one clear
line."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import QwenVL
from plumbing import weights
from plumbing.errors import InputError

NAME = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def change_weights(base, change):
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors")


def split_into_shards(base, kind):
    """Replace model.safetensors by three shards with an index."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        stem = "model" if kind == "safetensors" else "pytorch_model"
        name = f"{stem}-0000{number + 1}-of-00003.{kind}"
        part = {k: weights[k] for k in sorted(weights)[number::3]}
        if kind == "safetensors":
            save_file(part, base / name)
        else:
            torch.save(part, base / name)
        weight_map |= dict.fromkeys(part, name)
    (base / f"{stem}.{kind}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return base


def refused(base, match, **arguments):
    with pytest.raises(InputError, match=match) as caught:
        QwenVL.from_pretrained(base, **arguments)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- layouts
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_give_the_same_model_as_one_file(tiny_model, base, kind):
    model = QwenVL.from_pretrained(split_into_shards(base, kind))
    expected = tiny_model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.fingerprint == tiny_model.fingerprint


def test_the_fingerprint_tells_bases_apart_and_not_dtypes(tiny_model, base):
    assert QwenVL.from_pretrained(base, torch.bfloat16).fingerprint == tiny_model.fingerprint
    change_weights(base, lambda w: w[NAME][0, 0].add_(1))
    assert QwenVL.from_pretrained(base).fingerprint != tiny_model.fingerprint


def test_dtype_mode_and_trainability(base):
    model = QwenVL.from_pretrained(base, torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert QwenVL.from_pretrained(base).lm_head.weight.dtype == torch.float32


def test_known_buffers_of_other_revisions_may_be_left_over(base):
    def add(weights):
        weights["transformer.h.0.attn.masked_bias"] = torch.zeros(1)
        weights["transformer.rotary_emb.inv_freq"] = torch.zeros(4)

    change_weights(base, add)
    assert QwenVL.from_pretrained(base).tokenizer.eos_id > 0


def test_the_model_does_not_live_in_the_file(base):
    """Weights overwritten on disk while a model runs must not change it (nor kill it with a bus
    error)."""
    model = QwenVL.from_pretrained(base)
    before = model.lm_head.weight.clone()
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(64)
    assert torch.equal(model.lm_head.weight, before)


# ---------------------------------------------------------------- tensors
def test_a_missing_tensor_is_named(base):
    change_weights(base, lambda w: w.pop(NAME))
    refused(base, f"lack {NAME}; fetch")


def test_a_left_over_tensor_is_named(base):
    change_weights(base, lambda w: w.update({"transformer.h.9.extra.weight": torch.zeros(2)}))
    refused(
        base,
        r"transformer\.h\.9\.extra\.weight, which the model described by config.json does not have",
    )


def test_a_misshaped_tensor_is_named(base):
    change_weights(base, lambda w: w.update({NAME: w[NAME][:-1].contiguous()}))
    refused(base, rf"{NAME} has shape \(383, 128\), config.json asks for \(384, 128\)")


def test_a_quantised_tensor_is_refused_by_name(base):
    change_weights(
        base,
        lambda w: w.update({"transformer.h.0.mlp.w1.qweight": torch.zeros(2, dtype=torch.int32)}),
    )
    refused(base, "Int4/GPTQ tensor")


def test_a_tensor_in_two_shards_is_refused(base):
    split_into_shards(base, "safetensors")
    first = load_file(base / "model-00001-of-00003.safetensors")
    second = load_file(base / "model-00002-of-00003.safetensors")
    save_file(
        {**second, sorted(first)[0]: first[sorted(first)[0]]},
        base / "model-00002-of-00003.safetensors",
    )
    refused(base, "holds too")


# ---------------------------------------------------------------- files
def test_a_missing_shard_is_named(base):
    split_into_shards(base, "bin")
    (base / "pytorch_model-00002-of-00003.bin").unlink()
    refused(base, r"pytorch_model-00002-of-00003\.bin is missing")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "not json",
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../../etc/passwd"}}',
    ],
)
def test_a_damaged_index_is_one_clear_error(base, content):
    split_into_shards(base, "safetensors")
    (base / "model.safetensors.index.json").write_text(content)
    refused(base, r"index\.json")


@pytest.mark.parametrize("keep", [0, 4, 100, 20000])
def test_a_cut_off_safetensors_file_is_one_clear_error(base, keep):
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:keep])
    refused(base, "not a whole safetensors file")


@pytest.mark.parametrize("keep", [0, 4, 100, 20000])
def test_a_cut_off_bin_file_is_one_clear_error(base, keep):
    split_into_shards(base, "bin")
    shard = base / "pytorch_model-00001-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(base, "refused, not a plain file of tensors")


def test_a_folder_without_weights_or_config(base, tmp_path):
    (base / "model.safetensors").unlink()
    refused(base, "holds no weights")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"config\.json: cannot be read")


class Malicious:
    """Unpickled without care, it leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(base, tmp_path, zipped):
    trace = tmp_path / "trace"
    (base / "model.safetensors").unlink()
    if zipped:
        torch.save({NAME: Malicious(trace)}, base / "pytorch_model.bin")
    else:
        (base / "pytorch_model.bin").write_bytes(pickle.dumps({NAME: Malicious(trace)}))
    refused(base, "refused, not a plain file of tensors")
    assert not trace.exists()


def test_a_bin_of_something_else_is_refused(base):
    (base / "model.safetensors").unlink()
    torch.save([torch.zeros(2)], base / "pytorch_model.bin")
    refused(base, "not a dictionary of tensors")


@pytest.mark.parametrize(
    "content",
    [
        {3: torch.zeros(2)},
        {NAME: torch.zeros(2, 2).to_sparse()},
        {NAME: torch.zeros(2, device="meta")},
    ],
)
def test_a_bin_of_odd_tensors_is_refused(base, content):
    (base / "model.safetensors").unlink()
    torch.save(content, base / "pytorch_model.bin")
    refused(base, "not a dictionary of tensors|not a plain file of tensors")


def test_numbers_that_are_no_floats_are_refused(base):
    change_weights(base, lambda w: w.update({NAME: w[NAME].to(torch.int8)}))
    refused(base, f"{NAME} holds torch.int8")


def test_vocabulary_and_config_of_different_models(base):
    config = json.loads((base / "config.json").read_text())
    config["visual"]["image_start_id"] -= 1
    (base / "config.json").write_text(json.dumps(config))
    refused(base, "belong to different models")


# ---------------------------------------------------------------- names and devices
def test_what_is_neither_folder_nor_hub_name(tmp_path):
    for name in (
        "x" * 300,
        "~no-such-user/x",
        "no-such-thing",
        "a/b/c",
        "../x",
        str(tmp_path / "nothing"),
        "",
    ):
        with pytest.raises(InputError, match=r"not a folder, and not a Hub name|config\.json"):
            QwenVL.from_pretrained(name)


def test_the_hub_is_asked_for_weights_config_and_vocabulary_only(
    tiny_base, tiny_model, monkeypatch
):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tiny_base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = QwenVL.from_pretrained("Qwen/Qwen-VL")
    assert model.fingerprint == tiny_model.fingerprint and model.base == "Qwen/Qwen-VL"
    assert {name for name, _ in asked} == {"Qwen/Qwen-VL"}
    expected = [["config.json", "qwen.tiktoken", "*.index.json"], ["model*.safetensors"]]
    assert [patterns for _, patterns in asked] == expected


def test_bin_shards_are_fetched_where_there_is_no_safetensors(base, monkeypatch):
    split_into_shards(base, "bin")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append(allow_patterns) or str(base),
    )
    assert QwenVL.from_pretrained("Qwen/Qwen-VL").fingerprint
    assert asked[1:] == [["model*.safetensors"], ["pytorch_model*.bin"]]


def test_no_network_is_one_line_that_says_what_to_do(monkeypatch):
    def offline(name, allow_patterns):
        raise OSError("could not connect\nlong story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"hf download Qwen/Qwen-VL.*--base assets/toy") as caught:
        QwenVL.from_pretrained("Qwen/Qwen-VL")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "mps", ""])
def test_a_device_that_is_not_there(tiny_base, device):
    refused(tiny_base, "--device", device=device)


def test_a_model_that_does_not_fit_says_both_numbers_and_the_way_out(tiny_base, monkeypatch):
    monkeypatch.setattr(weights, "free_bytes", lambda device: 10**6)
    refused(tiny_base, r"needs 0\.0 GB as float32 on cpu, 0\.0 GB are free; try --dtype bfloat16")
    monkeypatch.setattr(weights, "free_bytes", lambda device: None)
    assert QwenVL.from_pretrained(tiny_base).fingerprint


def test_a_model_that_does_not_fit_is_not_fetched(tiny_base, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append(allow_patterns) or str(tiny_base),
    )
    monkeypatch.setattr(weights, "free_bytes", lambda device: 10**6)
    refused("Qwen/Qwen-VL", "needs 0.0 GB")
    assert asked == [["config.json", "qwen.tiktoken", "*.index.json"]]


def test_free_memory_is_read_from_the_system():
    free = weights.free_bytes(torch.device("cpu"))
    assert free is None or 10**7 < free < 10**14


MEASURE = """
import resource, sys, torch
sys.path.insert(0, {project!r})
from plumbing import weights
import model
reads = []
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = model.QwenVL.from_pretrained({base!r}, {dtype})
size = sum(t.numel() * t.element_size() for t in made.state_dict().values())
print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory_is_at_most_the_model_and_one_shard(tmp_path, kind):
    from conftest import write_tiny_base

    base = split_into_shards(write_tiny_base(tmp_path / "base", vocab_size=160_000), kind)
    shard = max(path.stat().st_size for path in base.glob(f"*.{kind}"))
    for dtype in ("torch.float32", "torch.bfloat16"):
        code = MEASURE.format(
            project=str(Path(weights.__file__).parent.parent), base=str(base), dtype=dtype
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        size, grown = map(int, done.stdout.split())
        assert grown < size + shard + 30e6, (kind, dtype, size, shard, grown)
