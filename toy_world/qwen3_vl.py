"""A small Qwen3-VL for the toy world, as transformers builds and saves it: about as many parameters
as the toy Qwen-VL, a tokenizer of the world's words, a processor for views of 32 pixels."""
import re

import torch
from tokenizers import decoders
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from hf_model import CAPTION_PROMPT, HFModel
from plumbing.tokenizer import byte_pair_encoder
from toy_world import world as easy

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PATCH, MERGE = 8, 2                     # four tokens for a view of 32 pixels


def tokenizer(world=easy):
    """All bytes, then each word of the world's texts as one token, then the special tokens."""
    texts = [CAPTION_PROMPT, easy.CAPTION_PROMPT, HFModel.question_form, easy.ask("it"),
             "user assistant", "assistant", "Is", " Yes No yes no", "Yes", "No", "yes", "no",
             *world.STARTS, f" {' '.join(world.WORDS)}"]
    words = [word for text in texts for word in re.findall(r"[^A-Za-z]?[A-Za-z]+", text)]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [word.encode() for word in dict.fromkeys(words) if len(word) > 1]
    # every byte is a token, so that none is missing
    encoder, _ = byte_pair_encoder({token: rank for rank, token in enumerate(tokens)}, len(tokens))
    encoder.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=encoder, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL, clean_up_tokenization_spaces=False)


def processor(world=easy):
    """The processor, which makes every image one square view."""
    sizes = {"size": {"shortest_edge": (side := easy.SIDE // 2) ** 2, "longest_edge": side ** 2},
             "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=tokenizer(world),
        video_processor=Qwen3VLVideoProcessor(**sizes), chat_template=TEMPLATE)


def config(words):
    """Its configuration, for a tokenizer."""
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    eos, pad = words.eos_token_id, words.pad_token_id
    text = {"vocab_size": 64 * -(-len(words) // 64), "hidden_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
            "intermediate_size": 352, "max_position_embeddings": 320, "eos_token_id": eos,
            "bos_token_id": None, "pad_token_id": pad,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                "mrope_section": [6, 5, 5], "mrope_interleaved": True}}
    vision = {"depth": 3, "hidden_size": 96, "num_heads": 3, "intermediate_size": 384,
              "patch_size": PATCH, "spatial_merge_size": MERGE, "out_hidden_size": 128,
              "num_position_embeddings": (easy.SIDE // 2 // PATCH) ** 2,
              "deepstack_visual_indexes": [1]}
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=False)


def write(folder, seed, world=easy):
    """A whole folder of an untrained model, as save_pretrained writes it."""
    torch.manual_seed(seed)
    together = processor(world)
    model = Qwen3VLForConditionalGeneration(config(together.tokenizer))
    model.generation_config.eos_token_id = together.tokenizer.eos_token_id
    model.generation_config.pad_token_id = together.tokenizer.pad_token_id
    model.save_pretrained(folder)
    together.save_pretrained(folder)
