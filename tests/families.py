"""Tiny random vision-language models of transformers, written as the folders of released models.

    folder = make("qwen2_5_vl", tmp_path)  # config, weights, tokenizer, processor, chat template
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

Every model has two language and two vision layers and 0.1 to 0.4 million parameters. Where the
layers of a family differ (windows, linear attention, convolutions), there is one of each. A square
view has nine image tokens, unless the family's function says otherwise. The released quirks are
kept: processors that cut images into tiles by default, templates and tokenizers that both add a
start token, several end tokens, a vocabulary padded beyond the tokenizer.
"""

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken

SIDE = 84  # of a view: 6 x 6 patches of 14 pixels, or 3 x 3 image tokens of 2 x 2 patches
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
SMALL = {"size": {"height": 42, "width": 42}}  # for families with one image token for each patch

CAPTIONS = """Yes No Yes No Yes No
Is there a red cube on the table? Answer Yes or No. Yes
What is shown? Describe the image in short factual statements.
a small red cube on the left, a large blue ball on the right, a green cone in the center
two yellow cups on a wooden table, a white plate with three slices of bread, a glass of water
a black dog lies on the grass, a brown cat sits behind the window, a bird flies in the sky
the sign reads OPEN, a man in a gray coat walks on the street, a woman holds a blue umbrella
""".splitlines()


# ---------------------------------------------------------------- shared by the families
def pairs(text):
    """The dict of strings that is written "a=1 b=2"."""
    return dict(pair.split("=") for pair in text.split())


def end_ids(tokenizer):
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def make_tokenizer(special, named="", **options):
    """Byte-level BPE of 400 tokens, with the special tokens behind them.

    The first three special tokens are eos, pad and bos ("-" for none). `named` gives attributes
    that a processor reads, "image_token=<image>". As in released folders, only these and the first
    three are in `all_special_ids`.
    """
    eos, pad, bos = special.split()[:3]
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CAPTIONS * 2 + ["Yes", "No"] * 20, trainer)
    added = [token for token in special.split() if token != "-"]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    options |= {"eos_token": eos, "pad_token": pad, "extra_special_tokens": pairs(named)}
    options |= {} if bos == "-" else {"bos_token": bos}
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **options)


def template(image, turn, end, answer, head="", text="{{ part['text'] }}"):
    """A chat template. `turn` and `end` surround a message, `answer` opens the reply."""
    return (
        f"{head}{{% for message in messages %}}{turn}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'text' %}}{text}"
        f"{{% endif %}}{{% endfor %}}{{% endif %}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )


def chatml(image, head="", thought=""):
    turn, answer = "<|im_start|>{{ message['role'] }}\n", "<|im_start|>assistant\n"
    return template(image, turn, "<|im_end|>\n", answer + thought, head)


def make_config(model_type, tokenizer, ids, vision, text=None, **rest):
    """The configuration of a family. `ids` gives its token ids, "image_token_id=<image>"."""
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, **attention}
    shape |= {"vocab_size": -(-len(tokenizer) // 16) * 16, "max_position_embeddings": 512}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in pairs(ids).items()}
    text = {**shape, **end_ids(tokenizer), **(text or {})}
    return tf.AutoConfig.for_model(
        model_type, text_config=text, vision_config=vision, **ids, **rest
    )


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}
VISION = {"hidden_size": 32, "intermediate_size": 64, **LAYERS}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


# ---------------------------------------------------------------- Qwen and GLM
QWEN = (
    "<|im_end|> <|endoftext|> - <|im_start|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <think> </think> "
)
QWEN_IDS = (
    "image_token_id=<|image_pad|> video_token_id=<|video_pad|> "
    "vision_start_token_id=<|vision_start|> vision_end_token_id=<|vision_end|>"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
QWEN_VISION = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64}
QWEN3_VISION = {"patch_size": 16, "num_position_embeddings": 16, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MROPE3 = MROPE | {"mrope_interleaved": True}


def qwen2(family, processor, vision):
    tokenizer = make_tokenizer(QWEN)
    size = {"size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}}
    images, videos = tf.Qwen2VLImageProcessor(**size), tf.Qwen2VLVideoProcessor(**size)
    chat = chatml(QWEN_IMAGE, head=QWEN_SYSTEM)
    config = make_config(family, tokenizer, QWEN_IDS, vision, {"rope_parameters": MROPE})
    return config, processor(images, tokenizer, videos, chat_template=chat)


def qwen2_vl():
    vision = {"depth": 2, "num_heads": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return qwen2("qwen2_vl", tf.Qwen2VLProcessor, vision)


def qwen2_5_vl():
    """The first vision layer has windows of 2 x 2 image tokens, the second sees the whole view."""
    vision = {"window_size": 56, "fullatt_block_indexes": [1], "out_hidden_size": 64}
    return qwen2("qwen2_5_vl", tf.Qwen2_5_VLProcessor, QWEN_VISION | vision)


def qwen3(family, vision, text, thought=""):
    """Position embeddings of 4 x 4 patches, interpolated to the 6 x 6 of 16 pixels in a view."""
    tokenizer = make_tokenizer(QWEN)
    size = {"patch_size": 16, "size": {"shortest_edge": 96**2, "longest_edge": 96**2}}
    images, videos = tf.Qwen2VLImageProcessor(**size), tf.Qwen3VLVideoProcessor(**size)
    chat = chatml(QWEN_IMAGE, thought=thought)
    config = make_config(family, tokenizer, QWEN_IDS, QWEN_VISION | QWEN3_VISION | vision, text)
    return config, tf.Qwen3VLProcessor(images, tokenizer, videos, chat_template=chat)


def qwen3_vl():
    return qwen3("qwen3_vl", {"deepstack_visual_indexes": [0]}, {"rope_parameters": MROPE3})


def qwen3_5():
    """One layer of linear attention and one of full attention; the template opens a thought."""
    text = {"head_dim": 32, "rope_parameters": MROPE3 | {"partial_rotary_factor": 0.5}}
    text |= {"layer_types": ["linear_attention", "full_attention"]}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    thought = "{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n' }}"
    return qwen3("qwen3_5", {}, text, thought)


def glm4v():
    """The pixel budget counts two frames; an answer also ends where a user's turn would begin."""
    special = "<|endoftext|> <|endoftext|> - [gMASK] <sop> <|system|> <|user|> <|assistant|> "
    special += "<|begin_of_image|> <|end_of_image|> <|image|> "
    special += "<|begin_of_video|> <|end_of_video|> <|video|>"
    tokenizer = make_tokenizer(special, "image_token=<|image|> video_token=<|video|>")
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    turn, answer = "<|{{ message['role'] }}|>\n", "<|assistant|>\n"
    size = {"size": {"shortest_edge": 2 * SIDE**2, "longest_edge": 2 * SIDE**2}}
    processor = tf.Glm4vProcessor(
        tf.Glm4vImageProcessor(**size),
        tokenizer,
        tf.Glm4vVideoProcessor(**size),
        chat_template=template(image, turn, "", answer, head="[gMASK]<sop>"),
    )
    ids = "image_token_id=<|image|> video_token_id=<|video|> "
    ids += "image_start_token_id=<|begin_of_image|> image_end_token_id=<|end_of_image|> "
    ids += "video_start_token_id=<|begin_of_video|> video_end_token_id=<|end_of_video|>"
    vision = {**QWEN_VISION, "image_size": SIDE, "out_hidden_size": 64}
    text = {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"])
    return make_config("glm4v", tokenizer, ids, vision, text, eos_token_id=ends), processor


# ---------------------------------------------------------------- Qwen 2 as the language model
def internvl():
    named = "start_image_token=<img> end_image_token=</img> context_image_token=<IMG_CONTEXT> "
    tokenizer = make_tokenizer(
        QWEN + "<img> </img> <IMG_CONTEXT> <video>", named + "video_token=<video>"
    )
    images, videos = tf.GotOcr2ImageProcessor(**SQUARE), tf.InternVLVideoProcessor(**SQUARE)
    chat = {"image_seq_length": 9, "chat_template": chatml("<IMG_CONTEXT>\n")}
    processor = tf.InternVLProcessor(images, tokenizer, videos, **chat)
    vision = VISION | {"model_type": "internvl_vision"}
    rest = {"image_seq_length": 9, "tie_word_embeddings": False}
    ids = "image_token_id=<IMG_CONTEXT>"
    text = {"model_type": "qwen2"}
    return make_config("internvl", tokenizer, ids, vision, text, **rest), processor


def llava_onevision():
    """Each of several images has ten tokens, one of them for a new line.

    A single square image has 51: those of the view, and of its 2 x 2 tiles with new lines.
    """
    tokenizer = make_tokenizer(QWEN + "<image> <video>")
    tiles = {"image_grid_pinpoints": [[42 * h, 42 * w] for h in (1, 2) for w in (1, 2)]}
    chat = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} "
        "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ '\n' + part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(**SMALL, **tiles),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(**SMALL),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        chat_template=chat,
    )
    ids = "image_token_index=<image> video_token_index=<video>"
    vision, text = SIGLIP | {"image_size": 42}, {"model_type": "qwen2"}
    return make_config("llava_onevision", tokenizer, ids, vision, text, **tiles), processor


# ---------------------------------------------------------------- Llama and Mistral
def idefics(family, tokenizer, head):
    """What Idefics 3 and SmolVLM share: roles as words, and tiles by default."""
    size = {"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    colon = "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    turn = "{{ message['role'] | capitalize }}" + colon
    chat = template("<image>", turn, "<end_of_utterance>\n", "Assistant:", head)
    ids = f"image_token_id=<image> pad_token_id={tokenizer.pad_token}"
    text = {"model_type": "llama"}
    config = make_config(family, tokenizer, ids, VISION, text, scale_factor=2)
    return config, size, {"image_seq_len": 9, "chat_template": chat}


def smolvlm():
    special = "<end_of_utterance> <|im_start|> <|im_start|> <|endoftext|> <image> <video> "
    special += "<fake_token_around_image> <global-img> "
    special += " ".join(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5))
    named = "image_token=<image> fake_image_token=<fake_token_around_image> "
    tokenizer = make_tokenizer(special, named + "global_image_token=<global-img>")
    config, size, options = idefics("smolvlm", tokenizer, head="<|im_start|>")
    sampling = {"max_frames": 8, "fps": 1, "video_size": {"longest_edge": SIDE}}
    videos = tf.SmolVLMVideoProcessor(**size, video_sampling=sampling)
    images = tf.SmolVLMImageProcessor(**size)
    return config, tf.SmolVLMProcessor(images, tokenizer, videos, **options)


def idefics3():
    special = "<end_of_utterance> <|end_of_text|> <|begin_of_text|> <image> "
    special += "<fake_token_around_image> <global-img> "
    special += " ".join(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
    tokenizer = make_tokenizer(special, add_bos_token=True)
    config, size, options = idefics("idefics3", tokenizer, head="<|begin_of_text|>")
    return config, tf.Idefics3Processor(tf.Idefics3ImageProcessor(**size), tokenizer, **options)


def llava():
    """The features are those of the last vision layer but one, without the class token."""
    tokenizer = make_tokenizer("</s> <pad> <s> <image>", add_bos_token=True)
    images = tf.CLIPImageProcessor(size={"shortest_edge": 42}, crop_size=SMALL["size"])
    options = {"patch_size": 14, "num_additional_image_tokens": 1}
    options |= {"vision_feature_select_strategy": "default"}
    turn = "{{ message['role'] | upper }}: "
    options |= {"chat_template": template("<image>\n", turn, " ", "ASSISTANT:")}
    vision = VISION | {"model_type": "clip_vision_model", "image_size": 42}
    text, ids = {"model_type": "llama"}, "image_token_index=<image>"
    config = make_config("llava", tokenizer, ids, vision, text, image_seq_length=9)
    return config, tf.LlavaProcessor(images, tokenizer, **options)


def mistral3():
    """Each row of an image ends with a token of its own, which is text to the model."""
    special = "</s> <pad> <s> [INST] [/INST] [IMG] [IMG_BREAK] [IMG_END]"
    tokenizer = make_tokenizer(special, add_bos_token=True)
    turn = "{{ '[INST]' if message['role'] == 'user' else '' }}"
    end = "{{ '[/INST]' if message['role'] == 'user' else eos_token }}"
    options = {"chat_template": template("[IMG]", turn, end, "", head="{{ bos_token }}")}
    options |= {"patch_size": 14, "spatial_merge_size": 2}
    images = tf.PixtralImageProcessor(size={"longest_edge": SIDE}, patch_size=14)
    vision = VISION | {"model_type": "pixtral", "head_dim": 16}
    text, rest = {"model_type": "mistral", "sliding_window": None}, {"tie_word_embeddings": False}
    config = make_config("mistral3", tokenizer, "image_token_index=[IMG]", vision, text, **rest)
    return config, tf.PixtralProcessor(images, tokenizer, **options)


# ---------------------------------------------------------------- Gemma
# Untied, unlike the released ones: with tied embeddings, which Gemma scales up, a random model
# repeats its last token for ever.
def gemma3():
    """One layer with a window of 16 tokens and one without; an image sees all of itself."""
    special = "<eos> <pad> <bos> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> "
    named = "image_token=<image_soft_token> boi_token=<start_of_image> eoi_token=<end_of_image>"
    tokenizer = make_tokenizer(special + "<image_soft_token>", named, add_bos_token=True)
    role = "{{ 'model' if message['role'] == 'assistant' else message['role'] }}"
    chat = template(
        "<start_of_image>",
        turn=f"<start_of_turn>{role}\n",
        end="<end_of_turn>\n",
        answer="<start_of_turn>model\n",
        head="{{ bos_token }}",
        text="{{ part['text'] | trim }}",
    )
    images = tf.Gemma3ImageProcessor(**SQUARE)
    processor = tf.Gemma3Processor(images, tokenizer, image_seq_length=9, chat_template=chat)
    ids = "image_token_index=<image_soft_token> "
    ids += "boi_token_index=<start_of_image> eoi_token_index=<end_of_image>"
    text = {"query_pre_attn_scalar": 16, **WINDOW}
    rest = {"mm_tokens_per_image": 9, "tie_word_embeddings": False}
    rest |= {"eos_token_id": tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])}
    return make_config("gemma3", tokenizer, ids, SIGLIP, text, **rest), processor


def paligemma():
    """Without a chat template; the prompt, images and text, is attended to in both directions."""
    special = "<eos> <pad> <bos> <image>"
    tokenizer = make_tokenizer(special, "image_token=<image>", add_bos_token=True)
    images = tf.SiglipImageProcessor(**SMALL, image_seq_length=9)
    processor = tf.PaliGemmaProcessor(images, tokenizer)  # adds 1,152 tokens for places
    vision, text = SIGLIP | {"image_size": 42}, {"model_type": "gemma"}
    rest = {"projection_dim": 64, "hidden_size": 64, "tie_word_embeddings": False}
    ids = "image_token_index=<image>"
    return make_config("paligemma", tokenizer, ids, vision, text, **rest), processor


# ---------------------------------------------------------------- other language models
def lfm2_vl():
    """One convolution and one layer of attention; pixels come as patches with a mask."""
    special = "<|im_end|> <|pad|> <|startoftext|> <|endoftext|> <|im_start|> <image> "
    special += "<|image_start|> <|image_end|> <|img_thumbnail|> "
    special += " ".join(
        f"<|img_row_{row}_col_{col}|>" for row in (1, 2, 3, 4) for col in (1, 2, 3, 4)
    )
    named = "image_token=<image> image_start_token=<|image_start|> "
    named += "image_end_token=<|image_end|> image_thumbnail_token=<|img_thumbnail|>"
    tokenizer = make_tokenizer(special, named, add_bos_token=True)
    tokens = {"min_image_tokens": 9, "max_image_tokens": 9, "max_tiles": 4}
    images = tf.Lfm2VlImageProcessor(encoder_patch_size=14, tile_size=SIDE, **tokens, **SQUARE)
    chat = chatml("<image>", head="{{ bos_token }}")
    vision = VISION | {"model_type": "siglip2_vision_model", "num_patches": 36}
    vision |= {"vision_use_head": False}
    text = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
    text |= {"block_auto_adjust_ff_dim": False}
    ids, rest = "image_token_id=<image>", {"projector_hidden_size": 64}
    config = make_config("lfm2_vl", tokenizer, ids, vision, text, **rest)
    return config, tf.Lfm2VlProcessor(images, tokenizer, chat_template=chat)


def cohere2_vision():
    """Attention and MLP side by side; one layer with a window of 16 tokens, one without."""
    special = "<|END_OF_TURN_TOKEN|> <PAD> <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|USER_TOKEN|> "
    special += "<|CHATBOT_TOKEN|> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|>"
    named = "boi_token=<|START_OF_IMG|> eoi_token=<|END_OF_IMG|> image_token=<|IMG_PATCH|> "
    named += "img_line_break_token=<|IMG_LINE_BREAK|>"
    tokenizer = make_tokenizer(special, named, add_bos_token=True)
    # The processor makes patch_size² image tokens of a tile, whatever the size of its patches.
    images = tf.Cohere2VisionImageProcessor(patch_size=3, **SQUARE)
    role = "{{ 'USER' if message['role'] == 'user' else 'CHATBOT' }}"
    turn = f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>"
    answer = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    chat = template("<|IMG_PATCH|>", turn, "<|END_OF_TURN_TOKEN|>", answer, "{{ bos_token }}")
    text = {"model_type": "cohere2", "logit_scale": 1.0, **WINDOW}
    ids, rest = "image_token_id=<|IMG_PATCH|>", {"alignment_intermediate_size": 64}
    config = make_config("cohere2_vision", tokenizer, ids, SIGLIP, text, **rest)
    return config, tf.Cohere2VisionProcessor(images, tokenizer, chat_template=chat)


def llama4():
    """One layer with chunks of 32 tokens, one with experts; pixel values come in bfloat16.

    An image larger than a view is cut into up to four tiles, with the whole image behind them.
    """
    special = "<|eot|> <|pad|> <|begin_of_text|> <|header_start|> <|header_end|> <|image|> "
    special += "<|patch|> <|image_start|> <|image_end|> <|tile_x_separator|> <|tile_y_separator|>"
    tokenizer = make_tokenizer(special, add_bos_token=True)
    turn = "<|header_start|>{{ message['role'] }}<|header_end|>\n\n"
    answer = "<|header_start|>assistant<|header_end|>\n\n"
    chat = template("<|image|>", turn, "<|eot|>", answer, head="{{ bos_token }}")
    processor = tf.Llama4Processor(
        tf.Llama4ImageProcessor(**SQUARE, max_patches=4), tokenizer, 14, chat_template=chat
    )
    ids = "image_token_index=<|patch|> "
    ids += "boi_token_index=<|image_start|> eoi_token_index=<|image_end|>"
    vision = VISION | {"intermediate_size": 128, "vision_output_dim": 64}
    vision |= {"projector_input_dim": 64, "projector_output_dim": 64}
    text = {"intermediate_size_mlp": 96, "num_local_experts": 2, "moe_layers": [1]}
    text |= {"attention_chunk_size": 32, "no_rope_layers": [1, 0]}
    return make_config("llama4", tokenizer, ids, vision, text), processor


BUILDERS = (qwen2_5_vl, qwen3_vl, internvl, smolvlm, llava_onevision, gemma3, qwen3_5, lfm2_vl)
BUILDERS += (paligemma, glm4v, mistral3, idefics3, qwen2_vl, llava, cohere2_vision, llama4)
BUILDERS = {builder.__name__: builder for builder in BUILDERS}
FAMILIES = tuple(BUILDERS)
NEEDED = FAMILIES[:8]  # these must run, whatever the release of transformers


def make(family, folder, seed=0):
    """Write a complete folder of a tiny random model, and return its path."""
    config, processor = BUILDERS[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for weight in model.parameters():
            if weight.ndim > 1:  # norms and biases stay; convolutions are those of patches
                torch.nn.init.normal_(weight, std=0.2 if weight.ndim < 4 else 0.05)
    generation = end_ids(processor.tokenizer)
    if getattr(config, "eos_token_id", None):  # a list
        generation["eos_token_id"] = config.eos_token_id
    model.generation_config = tf.GenerationConfig(**generation)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def make_usable(family, folder):
    """`make`; the test is skipped where transformers itself cannot run the model.

    Releases break single families now and then: 5.24.0 breaks llama4.
    """
    make(family, folder)
    if family in NEEDED:
        return Path(folder)
    model = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = tf.AutoProcessor.from_pretrained(folder)
    content = [
        {"type": "image", "image": Image.new("RGB", (60, 60))},
        {"type": "text", "text": "a"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    try:
        model(**inputs)
    except Exception as error:
        pytest.skip(f"transformers {tf.__version__} does not run its own {family}: {error}")
    return Path(folder)
