"""What a stage needs from a base, written down once, and how a base is opened.

    model = open_base("Qwen/Qwen3-VL-4B-Instruct")      # a Hub name, or a folder: assets/toy

Stages, generate.py and adapters.py know a base by the interface below and by nothing else.
model.QwenVL implements it from scratch, hf_model.HFModel around any vision-language model of
transformers.

A row of tokens is [head | request | answer]: the head holds the images, the request what is asked
of them, and the answer is what the model writes. Several requests or answers can stand behind one
head, as branches that do not see each other. Letters for shapes are those of model.py: B rows, L
tokens, K positions picked from them, V views of an image, S pixels of their side, D width.
"""
import json
from pathlib import Path
from typing import Any, Protocol

import torch

from model import QwenVL
from plumbing import weights
from plumbing.errors import InputError

Images = Any        # what `look` gives for the views of one image; plumbing.data.together: a batch


class Base(Protocol):
    """A base, with whatever adapters are attached to it; an nn.Module."""
    base: str                       # Hub name or folder
    fingerprint: str                # of the checkpoint's tensors: adapters know their base by it
    tokenizer: Any                  # encode, decode, plain_text; eos_id, and `ends` of an answer
    seq_length: int                 # tokens of the trained context
    image_size: int                 # S
    device: torch.device
    dtype: torch.dtype
    output_layer: torch.nn.Module   # a linear layer; the rows of its weight are the vocabulary
    cache_bytes: int                # of the keys and values of one token
    packs: bool                     # whether branches share a row; else each has one, at a price
    quantize: str                   # "int8", or "": frozen weights in dtype
    caption_text: str               # what is asked for a caption; adapters remember it
    checkpointing: bool             # recompute the blocks of both towers in backward
    attached: dict                  # name of adapters -> how adapters.py attached them
    loaded: dict                    # name of adapters -> hash of the folder they came from
    soft_prompts: dict              # by the name of their adapters; at most one is active

    def look(self, pictures: list) -> Images:
        """The V views of one image, RGB, as PIL images; done by worker processes.

        A single view may keep its own size, where the model takes any.
        """

    def head(self, images: Images | int) -> list:
        """Ids of the head; here and below, a number instead of images stands for V of them, the
        largest that there are."""

    def request(self, text: str) -> list:
        """Ids of a request, in which special tokens are plain text."""

    def question(self, text: str) -> list:
        """Ids of the request for a yes or no."""

    def answer(self, text: str) -> list:
        """Ids of an answer, without an end token."""

    def caption_prompt(self, images: Images | int) -> list:
        """Ids of head and request for a caption, or of head and soft prompt where one is active."""

    def forward(self, ids, images=None, mask=None, branch=None, positions=None, logp_of=None,
                cache=None) -> torch.Tensor:
        """Logits (B, L, vocab), or (B, K, vocab) at `positions`; with `logp_of` log-probs (B, K).

        Everything that trains goes through it, so that DDP sees it. ids (B, L) int64; images: of a
        batch; mask (B, L) bool, False = padding, on the right; branch (B, L) int, 0 = prefix, k =
        its k-th continuation; positions int64, (K,) or (B, K); logp_of (B, K) int64, the tokens
        whose log-probability is wanted, -100 = padding; cache: what `cache` gives.
        """

    def cache(self, samples: int, room: int) -> Any:
        """Keys and values of `samples` continuations of each prefix, of up to `room` tokens.

        The first forward with it takes the prefixes (I, L), the others one token for each sample
        (I·samples, 1). generate.py counts them in `used`.
        """

    def places(self, tower: str, kind: str = "adapter") -> list:
        """[(slot, width in, width out)]: where adapters, or LoRA ("lora"), go in a tower."""

    def embed_text(self, text: str) -> torch.Tensor:
        """The embeddings (n, D) of a text, from which a soft prompt starts."""

    def training_bytes(self, trained: dict, world: int, rows: int, length: int | None = None,
                       views: int = 6) -> int:
        """Bytes that one of `world` cards needs to train {name: parameter}, `rows` rows at once, of
        `length` tokens with `views` views each. None: as long as rows can usefully be."""

    def save(self, folder: Path) -> None:
        """Write the base itself in the layout in which it was read, in bfloat16."""


def open_base(name, dtype=None, device="cpu", weights_too=True, caption_prompt=None,
              quantize=None):
    """A base by its Hub name or folder, in eval mode.

    dtype None is bfloat16 on a GPU, float32 on the CPU. Without the weights it is good for its
    prompts and numbers alone. caption_prompt is asked in place of the base's own. quantize "int8"
    keeps the frozen weights in a byte each, see plumbing/int8.py. InputError for what is no
    vision-language model, cannot be adapted, or does not fit the memory; nothing large is
    downloaded before that is known.
    """
    if is_qwen_vl(weights.resolve(name, weights=False)):
        kind = QwenVL
    else:
        kind = hf_model_class(name)
    model = kind.from_pretrained(name, dtype, device, weights_too, quantize)
    model.quantize = quantize or ""
    if caption_prompt is not None:
        if not caption_prompt.strip():
            raise InputError("--caption-prompt: is empty; leave it out for the base's own")
        if special := model.tokenizer.special_in(caption_prompt):
            raise InputError(f"--caption-prompt: spells {special[0]}, a special token of {name}; "
                             "write it without")
        model.caption_text = caption_prompt
    return model


def hf_model_class(name):
    """hf_model.HFModel, imported only now, since transformers is slow to import."""
    try:
        from hf_model import HFModel
    except ImportError as error:            # a package that does not fit the others, mostly
        cause = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{name}: transformers cannot be used ({cause}); install a torchvision "
                         "that belongs to this torch, or none") from None
    return HFModel


def is_qwen_vl(folder):
    """Whether a folder is for model.py: Qwen-VL of 2023, or no model of any kind."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return True                                             # model.py says what is wrong
    return not isinstance(config, dict) or config.get("model_type", "qwen") == "qwen"
