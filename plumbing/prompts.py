"""Images and prompts of transformers' models: what a processor makes of its own chat template.

A prompt is a head with the images, the user's text, and a tail, behind which the answer begins.
Only the head and the tail come from the processor.
"""
import functools
import math

import torch
from PIL import Image

from plumbing.errors import InputError

VIEW = 448              # pixels of a view's side, where a processor takes any size
LONGEST = 1344          # a single view is scaled down to the area of a square of this side
UNCUT = {"do_image_splitting": False, "crop_to_patches": False, "do_pan_and_scan": False}


def view_side(processor, config):
    """The side of a square view: what the processor is fixed to, or VIEW within its limits."""
    size = dict(getattr(processor, "size", None) or {})
    largest = dict(getattr(processor, "max_image_size", None) or {})
    if size.get("longest_edge") and hasattr(processor, "merge_size"):       # numbers of pixels
        step = processor.patch_size * processor.merge_size
        side = VIEW
        if size["longest_edge"] < VIEW ** 2:
            side = math.isqrt(size["longest_edge"])
        if size["shortest_edge"] > VIEW ** 2:
            side = math.ceil(size["shortest_edge"] ** 0.5)
        return max(step, side // step * step)
    sides = (largest.get("longest_edge"), size.get("height"), size.get("shortest_edge"),
             size.get("longest_edge"), getattr(config.vision_config, "image_size", None), VIEW)
    side = next(side for side in sides if side)
    return side if isinstance(side, int) else side[0]


class Prompts:
    """What a processor makes of the chat template: images, and the ids around the user's text."""

    def __init__(self, processor, tokenizer, image_size):
        self.processor, self.tokenizer, self.image_size = processor, tokenizer, image_size
        self.template = (getattr(processor, "chat_template", None)
                         or getattr(processor.tokenizer, "chat_template", None))
        if not self.template and not getattr(processor, "image_token", None):
            raise InputError("the base has no chat template, and no image token to do without")
        self.marker_id = self.marker = None
        self.options = {name: value for name, value in UNCUT.items()
                        if hasattr(processor.image_processor, name)}
        self.of_blank = {}
        self.choose_marker()

    def render(self, n_views, text, answer=None):
        """The chat template's text for n images, a user's text, and an answer if there is one."""
        if not self.template:
            return self.processor.image_token * n_views + text + (answer or "")
        content = [{"type": "image"}] * n_views + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.processor.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=answer is None,
            tokenize=False, enable_thinking=False)

    def choose_marker(self):
        """A special token that stands for the user's text while the processor is at work."""
        plain = self.render(1, "text", "answer")
        for i, token in sorted(self.tokenizer.fast.added_tokens_decoder.items()):
            free = i in self.tokenizer.reserved - self.tokenizer.placeholders
            if free and not token.lstrip and not token.rstrip and str(token) not in plain:
                self.marker, self.marker_id = str(token), i
                if self.marker in self.render(1, self.marker):
                    return
        raise InputError("the base's tokenizer has no special token that its template leaves free")

    def end_of_answer(self):
        """The id of the first special token that the template puts behind an answer, or None."""
        _, _, rest = self.render(1, "text", self.marker).partition(self.marker)
        ids = self.tokenizer.encode(rest, special=True)
        return next((i for i in ids if i in self.tokenizer.reserved), None)

    def inputs(self, pictures, text):
        """What the processor makes of images and a user's text: {name: tensor}."""
        text = self.render(len(pictures), text)
        bos = self.processor.tokenizer.bos_token
        options = dict(self.options)
        if bos and text.startswith(bos):            # the template has written it already
            options["add_special_tokens"] = False
        return dict(self.processor(text=[text], images=[pictures], return_tensors="pt", **options))

    def look(self, pictures):
        """PIL images, the views of one image -> {name: tensor}, as the processor makes them.

        Several views become squares of the model's side; a single one keeps its proportions where
        the model takes any. "head" are the ids before the user's text; "token:..." have a number
        for each of them.
        """
        side = self.image_size
        if len(pictures) > 1:
            pictures = [picture.resize((side, side), Image.BICUBIC) for picture in pictures]
        elif math.prod(pictures[0].size) > LONGEST ** 2:
            scale = LONGEST / math.prod(pictures[0].size) ** 0.5
            size = [max(1, round(length * scale)) for length in pictures[0].size]
            pictures = [pictures[0].resize(size, Image.BICUBIC)]
        try:
            inputs = self.inputs(pictures, self.marker)
        except (ValueError, RuntimeError, TypeError) as error:      # an image that it cannot take
            reason = str(error).strip().splitlines()[:1]
            raise InputError(f"the base's processor refuses an image of {pictures[0].width}×"
                             f"{pictures[0].height} pixels ({' '.join(reason)[:160]})") from None
        ids = inputs.pop("input_ids")[0].tolist()
        at = ids.index(self.marker_id)
        looks = {"head": torch.tensor(ids[:at])}
        inputs.pop("attention_mask", None)
        for name, tensor in inputs.items():
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if tensor.shape == (1, len(ids)):
                looks[f"token:{name}"] = tensor[0, :at]
            else:
                looks[name] = tensor
        return looks

    @functools.cached_property
    def tail(self):
        """Ids (list) between the user's text and the answer, whatever the images."""
        picture = Image.new("RGB", (self.image_size, self.image_size))
        ids = self.inputs([picture], self.marker)["input_ids"][0].tolist()
        return ids[ids.index(self.marker_id) + 1:]

    def blank(self, n_views):
        """What `look` gives for n grey views, the single one of the largest size."""
        if n_views not in self.of_blank:
            side = self.image_size if n_views > 1 else max(LONGEST, self.image_size)
            picture = Image.new("RGB", (side, side), "gray")
            self.of_blank[n_views] = self.look([picture] * n_views)
        return self.of_blank[n_views]


def joined(parts):
    """Tensors one behind the other, smaller images padded with zeros as a processor does it."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
    padded = []
    for part in parts:
        missing = [(0, most - size) for most, size in zip(shape, part.shape[1:])]
        ends = [n for pair in reversed(missing) for n in pair]      # pad counts from the last one
        padded.append(torch.nn.functional.pad(part, ends))
    return torch.cat(padded)
