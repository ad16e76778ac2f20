"""The interface of a base, and what is refused as one, in one line."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from typing import get_type_hints
from unittest import mock

import families
import pytest
import torch
from stages import CODE, write_data
from transformers import BertConfig, GPT2Config

import adapters
import caption
import dpo
import golden
import sft
from base import Base, open_base
from hf_model import HFModel
from model import QwenVL
from plumbing.errors import InputError


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return families.make("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


# ---------------------------------------------------------------- the interface
METHODS = [
    name for name, value in vars(Base).items() if inspect.isfunction(value) and name[0] != "_"
]


def test_the_interface_names_what_stages_use():
    """Whatever sft.py and the others ask of a model stands in base.py."""
    known = {*METHODS, *get_type_hints(Base)}
    module = {*dir(torch.nn.Module), *vars(torch.nn.Module())}
    for file in ("sft", "qa_adapter", "golden", "dpo", "caption", "generate", "adapters"):
        text = (CODE / f"{file}.py").read_text()
        names = set(re.findall(r"\b(?:model|policy|prompts)\.([a-z_]+)", text))
        assert names <= known | module | {"py"}, file


@pytest.mark.parametrize("kind", [QwenVL, HFModel])
def test_both_kinds_have_the_methods_with_their_arguments(kind):
    assert {"look", "head", "request", "caption_prompt", "forward", "cache", "places"} <= set(
        METHODS
    )
    for name in METHODS:
        wanted = list(inspect.signature(getattr(Base, name)).parameters)
        assert list(inspect.signature(getattr(kind, name)).parameters) == wanted, name


def test_both_kinds_have_the_attributes(tiny_base, qwen3):
    for folder in (tiny_base, qwen3):
        model = open_base(folder)
        for name in get_type_hints(Base):
            assert getattr(model, name) is not None, name
        assert isinstance(model.seq_length, int) and isinstance(model.device, torch.device)


def test_a_folder_of_either_kind_is_known_by_its_configuration(tiny_base, qwen3):
    assert isinstance(open_base(tiny_base), QwenVL) and isinstance(open_base(str(qwen3)), HFModel)


def test_transformers_is_imported_only_where_it_is_needed(tiny_base):
    code = f"import sys, base; base.open_base({str(tiny_base)!r}); print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=CODE, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


# ---------------------------------------------------------------- what is refused
def refused(folder, match, **how):
    with pytest.raises(InputError, match=match) as error:
        open_base(folder, **how)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def changed(source, folder, **values):
    """A copy of a folder with other values in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_language_model_is_no_base(tmp_path):
    for kind in (GPT2Config(), BertConfig()):
        folder = tmp_path / kind.model_type
        kind.save_pretrained(folder)
        refused(folder, f"{kind.model_type} model and no vision-language model")


def test_an_architecture_that_nobody_knows(qwen3, tmp_path):
    refused(
        changed(qwen3, tmp_path / "a", model_type="sees_all"), "sees_all model, which transformers"
    )


def test_code_of_its_own_is_never_run(qwen3, tmp_path):
    folder = changed(
        qwen3,
        tmp_path / "a",
        model_type="remote_kind",
        auto_map={
            "AutoConfig": "configuration_remote.RemoteConfig",
            "AutoModelForImageTextToText": "modeling_remote.Remote",
        },
    )
    (folder / "configuration_remote.py").write_text("raise SystemExit('it ran')")
    (folder / "modeling_remote.py").write_text("raise SystemExit('it ran')")
    refused(folder, "needs code of its own, which is never run")


def test_a_quantised_folder(qwen3, tmp_path):
    folder = changed(qwen3, tmp_path / "a", quantization_config={"quant_method": "awq", "bits": 4})
    refused(folder, "quantised checkpoint")


def test_a_folder_without_processor(qwen3, tmp_path):
    folder = changed(qwen3, tmp_path / "a")
    for file in folder.glob("*processor*"):
        file.unlink()
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder, "has no processor")


def test_a_package_that_the_processor_needs_is_named(tmp_path):
    folder = families.make("smolvlm", tmp_path / "smolvlm")
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", None):
        refused(folder, "needs the package num2words; pip install num2words")


def test_weights_that_lack_a_tensor(qwen3, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = changed(qwen3, tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "mlp" in name)
    save_file(
        {name: t for name, t in tensors.items() if name != gone},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(folder, "the weights lack")
    save_file(
        {**tensors, gone: tensors[gone][:1].clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(folder, "another shape|cannot be read")


def test_towers_without_blocks(tmp_path):
    from transformers import Blip2Config

    folder = tmp_path / "blip"
    Blip2Config().save_pretrained(folder)
    with mock.patch("plumbing.hub.read_processor"):
        refused(folder, "adapters")


def test_prompts_that_continuations_cannot_share(tmp_path):
    refused(families.make("paligemma", tmp_path), "tokens see later ones")


def test_what_does_not_fit_the_memory_is_refused_before_its_weights_are_read(qwen3):
    with (
        mock.patch("plumbing.weights.free_bytes", return_value=1000),
        mock.patch("plumbing.hub.filled", side_effect=AssertionError("read")),
    ):
        refused(qwen3, "needs .* GB as float32 on cpu")


def test_neither_a_folder_nor_a_hub_name():
    refused("no/such/folder/anywhere", "not a folder, and not a Hub name")


# ---------------------------------------------------------------- prompts
def test_a_caption_prompt_is_text(tiny_base, qwen3):
    for folder, special in ((tiny_base, "<|endoftext|>"), (qwen3, "<|im_end|>")):
        refused(folder, "spells", caption_prompt=f"Say {special} now")
        asked = open_base(folder, caption_prompt="What is it?")
        assert asked.caption_text == "What is it?"
        text = asked.tokenizer.decode(asked.caption_prompt(1))
        assert "What is it?" in text
        assert "What is it?" not in asked.tokenizer.decode(open_base(folder).caption_prompt(1))


def test_adapters_remember_the_prompt_that_they_were_trained_with(qwen3, tmp_path):
    model = open_base(qwen3, caption_prompt="What is it?")
    adapters.attach(model, "caption")
    adapters.save(model, tmp_path / "a", "caption")
    other = open_base(qwen3)
    adapters.load(other, tmp_path / "a")
    assert other.caption_text == "What is it?"


def one_line(capsys, code):
    """The last line of stderr of a command that failed as it should."""
    assert code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and "Traceback" not in "".join(lines)
    return lines[-1]


def test_bad_input_on_the_command_line_is_one_line(qwen3, tiny_base, tmp_path, capsys):
    data = write_data(tmp_path, 2)
    image = str(data / "00000.png")
    common = ["--device", "cpu"]
    code = caption.main(
        [
            image,
            "--base",
            str(qwen3),
            "--adapters",
            "none",
            "--caption-prompt",
            "a <|im_end|>",
            *common,
        ]
    )
    assert "--caption-prompt: spells <|im_end|>" in one_line(capsys, code)
    small = tmp_path / "small"
    shutil.copytree(qwen3, small)
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 40
    (small / "config.json").write_text(json.dumps(config))
    code = caption.main([image, "--base", str(small), "--adapters", "none", *common])
    assert "the context 40; take fewer views" in one_line(capsys, code)
    one = ["--views", "one", "--caption-prompt", "a"]
    assert caption.main([image, "--base", str(small), "--adapters", "none", *one, *common]) == 0
    capsys.readouterr()
    model = open_base(tiny_base)
    adapters.attach(model, "caption")
    adapters.save(model, tmp_path / "other", "caption")
    code = caption.main(
        [image, "--base", str(qwen3), "--adapters", str(tmp_path / "other"), *common]
    )
    assert "is another base" in one_line(capsys, code)
    code = sft.main(
        [
            "--base",
            str(tmp_path),
            "--data",
            str(data / "captions.jsonl"),
            "--out",
            str(tmp_path / "o"),
        ]
    )
    assert "config.json" in one_line(capsys, code)


@pytest.mark.parametrize(
    "stage, argv, match",
    [
        (golden, ["--images", ".", "--captioner", "none", "--qa", "none"], "needs --base"),
        (golden, ["--images", ".", "--captioner", "none", "--base", "x"], "goes with --qa none"),
        (golden, ["--images", ".", "--caption-prompt", "x"], "remember theirs"),
        (golden, ["--images", ".", "--calibrate", "x"], "leave it out"),
        (dpo, ["--caption-prompt", "x"], "remember theirs"),
        (sft, ["--caption-prompt", "x", "--init", "y"], "remember theirs"),
    ],
)
def test_flags_that_do_not_go_together(stage, argv, match, capsys):
    with pytest.raises(SystemExit) as stop:
        stage.parse_args(argv)
    assert stop.value.code == 2 and match in capsys.readouterr().err


def test_no_family_is_named_outside_base_and_hf_model():
    """Stages, decoding and adapters know the interface and no model by name."""
    kinds = (
        "qwen3_vl",
        "qwen2_5_vl",
        "internvl",
        "gemma",
        "smolvlm",
        "llava",
        "isinstance(model",
        "hf_model",
    )
    for file in ("sft", "qa_adapter", "golden", "dpo", "caption", "generate", "adapters"):
        text = (CODE / f"{file}.py").read_text().lower()
        assert not [kind for kind in kinds if kind in text], file


def test_an_empty_caption_prompt_is_refused(tiny_base):
    with pytest.raises(InputError, match="--caption-prompt: is empty"):
        open_base(tiny_base, caption_prompt=" ")


def test_an_image_that_a_processor_refuses_is_one_error_among_captions(qwen3, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (1000, 3)).save(tmp_path / "long.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "square.png")
    argv = ["--base", str(qwen3), "--adapters", "none", "--views", "one", "--max-new-tokens", "3"]
    code = caption.main([str(tmp_path), *argv, "--jsonl", "--device", "cpu"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 1 and "refuses an image of 1000×3" in rows[0]["error"] and "caption" in rows[1]


def test_the_fingerprint_is_that_of_every_precision(qwen3):
    marks = {
        open_base(qwen3, dtype).fingerprint
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert len(marks) == 1
