"""Any vision-language model of transformers as the base, behind the interface of base.py.

transformers loads the model, prepares its images and runs its blocks. The rest is here: adapters by
hooks behind attention and MLP of every block, the soft prompt, and many continuations of one image
in one sequence. No family is known by name: what a model has is found by its structure, and what
it can do by a try when it is loaded.

    model = open_base("Qwen/Qwen3-VL-4B-Instruct")      # or a folder: assets/toy-qwen3-vl
    images = model.look([picture])                      # the views of one image, as PIL images
    ids = torch.tensor([model.caption_prompt(images)])  # (1, L)
    logits = model(ids, [images])                       # (1, L, vocab)

A prompt is what the model's own processor makes of its own chat template: a head with the images,
the user's text, and a tail, behind which the answer begins. Text is encoded apart from both, so
that none of it becomes a special token.
"""
import functools
import inspect
import os

import torch
from PIL import Image
from torch import nn

from plumbing import branches, hub, int8, memory, weights
from plumbing.errors import InputError
from plumbing.parts import LOGITS_AT_ONCE, Adaptable, Slot, log_probabilities, moved
from plumbing.prompts import Prompts, joined, view_side
from plumbing.tokenizer import ChatTokenizer
from plumbing.towers import block_shapes, blocks, check_towers, patch_numbers, projections

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # images are decoded by forked workers

CAPTION_PROMPT = ("Describe the image in short factual statements, separated by commas: every "
                  "object with color, number, place and details, and all text. No filler.")
USUAL = 4096            # tokens of the context of a model that does not say
COMPARED = 8            # positions at which a model is compared with itself when it is loaded
ROWS = 8                # rows at once of a model that cannot pack branches in one
LONG_CAPTION = 512      # tokens behind a prompt, for estimates of memory


# ---------------------------------------------------------------- where adapters go
def adapt(slot, module, args, output):
    """A forward hook: what a sublayer adds to its block, changed by a slot's active adapters."""
    y = output[0] if isinstance(output, tuple) else output
    for adapter in slot.active():
        y = adapter(y)
    return (y, *output[1:]) if isinstance(output, tuple) else y


def add_lora(slot, module, args, output):
    """A forward hook: the output of a projection plus a slot's active low-rank updates."""
    for lora in slot.active():
        output = output + lora(args[0])
    return output


def slots_of(tower):
    """Empty slots behind attention and MLP of each block, and at its projections: a ModuleList."""
    slots = nn.ModuleList()
    for attention, mlp, _ in blocks(tower):
        block = nn.ModuleDict({"attn_slot": Slot(), "mlp_slot": Slot()})
        attention.register_forward_hook(functools.partial(adapt, block["attn_slot"]))
        mlp.register_forward_hook(functools.partial(adapt, block["mlp_slot"]))
        for name, layer in projections(attention).items():
            slot = block[f"{name}_lora_slot"] = Slot()
            layer.register_forward_hook(functools.partial(add_lora, slot))
        slots.append(block)
    return slots


# ---------------------------------------------------------------- the model
class HFModel(Adaptable):
    """A model of transformers (`hf`) with its processor, as base.py wants it."""
    question_form = "{} Answer Yes or No."
    soft_prompt_id = -1         # no token of the vocabulary is reserved

    def __init__(self, hf, processor, base):
        super().__init__()
        self.hf, self.config = hf, hf.config
        self.text_config = hf.config.get_text_config()
        self.seq_length = getattr(self.text_config, "max_position_embeddings", None) or USUAL
        self.image_size = view_side(processor.image_processor, hf.config)
        tokenizer = ChatTokenizer(processor.tokenizer, hf.config, hf.generation_config)
        self.start(base, tokenizer, CAPTION_PROMPT)
        self.prompts = Prompts(processor, tokenizer, self.image_size)
        tokenizer.end_with(self.prompts.end_of_answer())
        self.towers = {"vision": hf.get_encoder(modality="image"), "language": hf.get_decoder()}
        self.slots = nn.ModuleDict({name: slots_of(tower) for name, tower in self.towers.items()})
        self.packs = True           # whether branches can be held apart
        self.soft_slots = None      # where the soft prompt stands in the rows that run
        hf.get_input_embeddings().register_forward_hook(self.put_soft_prompt)
        branches.watch(self.towers["language"])
        self.takes_cache = "cache" in inspect.signature(hf.base_model.forward).parameters
        vocab = hf.get_output_embeddings().weight.shape[0]
        never = self.tokenizer.reserved - self.tokenizer.ends
        never |= set(range(len(self.tokenizer.fast), vocab))
        self.never = torch.tensor(sorted(i for i in never if i < vocab), device=hf.device)

    @classmethod
    def from_pretrained(cls, name, dtype=None, device="cpu", weights_too=True, quantize=None):
        """A folder or Hub name -> the model in eval mode; without weights for its prompts alone.

        InputError where it cannot run here, or does not fit the memory.
        """
        device = weights.usable_device(device)
        dtype = dtype or weights.usual_dtype(device)
        name = os.path.expanduser(str(name))
        config, processor = hub.read_config(name), hub.read_processor(name)
        empty = hub.on_meta(name, config)
        check_towers(name, empty)
        if quantize:
            int8.replace(empty, [empty.get_input_embeddings(), empty.get_output_embeddings()])
        with hub.understood(name, config.model_type):
            model = cls(empty, processor, name)
        if model.tokenizer.eos_id is None:
            raise InputError(f"{name}: neither its template nor its tokenizer ends an answer; give "
                             "another base")
        if not weights_too:
            return model
        weights.check_fits(empty, name, dtype, device)
        hf, mark = hub.filled(name, config, dtype, device, quantize)
        with hub.understood(name, config.model_type):
            model = cls(hf, processor, name)
            model.fingerprint = mark
            try_out(model, name)
        return model.eval()

    def save(self, folder):
        """Write the model with its processor as transformers does, in bfloat16."""
        state = {name: t.detach().to("cpu", torch.bfloat16)
                 for name, t in self.hf.state_dict().items()}
        self.hf.save_pretrained(folder, state_dict=state)
        self.prompts.processor.save_pretrained(folder)

    # ---- prompts and images
    def look(self, pictures):
        """The views of one image, PIL -> what forward takes as the images of one row."""
        return self.prompts.look(pictures)

    def head(self, images):
        """Ids (list) before the user's text. images: from `look`, or how many views."""
        images = self.prompts.blank(images) if isinstance(images, int) else images
        return images["head"].tolist()

    def request(self, text):
        """Ids (list) of a user's text and of what stands between it and the answer."""
        return self.tokenizer.encode(text) + self.prompts.tail

    def answer(self, text):
        """Ids (list) of a text that the model writes, without an end token."""
        return self.tokenizer.encode(text)

    def embed_text(self, text):
        """A text's embeddings (n, D), from which a soft prompt starts."""
        ids = torch.tensor(self.tokenizer.encode(text), device=self.device)
        return self.hf.get_input_embeddings()(ids)

    def put_soft_prompt(self, module, args, x):
        """A forward hook of the embeddings: the soft prompt's vectors in its slots."""
        if self.soft_slots is not None:
            for soft_prompt in self.soft_prompts.active():
                x = soft_prompt(x, self.soft_slots)
        return x

    # ---- what adapters and stages ask for
    def places(self, tower, kind="adapter"):
        """[(slot, width in, width out)] of a tower, for adapters or for LoRA ("lora")."""
        found = []
        for slots, (attention, _, width) in zip(self.slots[tower], blocks(self.towers[tower])):
            if kind == "adapter":
                found += [(slots["attn_slot"], width, width), (slots["mlp_slot"], width, width)]
            else:
                found += [(slots[f"{name}_lora_slot"], layer.in_features, layer.out_features)
                          for name, layer in projections(attention).items()]
        return found

    @property
    def output_layer(self):
        return self.hf.get_output_embeddings()

    @property
    def checkpointing(self):
        """Whether blocks are recomputed in backward, not kept."""
        return self.hf.is_activation_checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted):
        if wanted:
            self.hf.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.hf.activation_checkpointing_disable()

    def cache(self, samples, room):
        """For forward: the cache of `samples` continuations of each prefix, of up to `room`."""
        return branches.Cache(self.config, self.packs, samples, room)

    # ---- forward
    def forward(self, ids, images=None, mask=None, branch=None, positions=None, logp_of=None,
                cache=None):
        """As model.QwenVL.forward. images: what `look` gave, for each row; mask: padding is on the
        right."""
        images = [images] if isinstance(images, dict) else images
        ids, mask, branch, positions = (
            moved(t, self.device) for t in (ids, mask, branch, positions))
        if cache is not None and cache.filled:
            return self.never_sampled(self.logits(self.step(ids, cache)))
        layout = branches.logical(ids, mask, branch)
        if branch is not None and not self.packs:
            hidden = self.hidden_of_rows(ids, images, layout.branch)
        else:
            hidden = self.hidden(ids, images, layout, branch is not None, cache)
        if positions is not None:
            row = torch.arange(len(hidden), device=hidden.device)[:, None]
            hidden = hidden[row, positions.expand(len(hidden), -1)]           # (B, K, D)
        if logp_of is not None:
            return log_probabilities(self.logits, hidden, logp_of)
        logits = self.logits(hidden)
        return logits if cache is None else self.never_sampled(logits)

    def hidden(self, ids, images, layout, has_branches=False, cache=None):
        """The last hidden states (B, L, D) of rows (B, L)."""
        kinds, inputs = self.inputs_of(ids, images)
        where = self.where(ids, layout, kinds, inputs, cache.room + 1 if cache else 0)
        slots = ids == self.soft_prompt_id
        self.soft_slots = slots if bool(slots.any()) else None
        try:
            output = self.run(ids.masked_fill(slots, self.tokenizer.filler_id),
                              branches.Turn(layout, layout) if has_branches else None,
                              past=cache.past if cache else None, **kinds, **inputs,
                              position_ids=branches.take(where, layout.place))
        finally:
            self.soft_slots = None
        if cache is not None:
            cache.start(layout, where)
        return output

    def run(self, ids, turn, past, **more):
        """One forward of the model below its output layer; past: transformers' cache, or None."""
        # releases before 5.24 call the argument otherwise
        more["cache" if self.takes_cache else "past_key_values"] = past
        if self.hf.base_model is self.hf:       # some models have none without an output layer
            more |= {"output_hidden_states": True, "logits_to_keep": 1}
        with branches.within(turn):
            length = ids.shape[1] + (past.get_seq_length() if past is not None else 0)
            output = self.hf.base_model(
                # 2-D ones: without a mask, positions would be read as packed sequences
                input_ids=ids, attention_mask=ids.new_ones(len(ids), length),
                use_cache=past is not None, return_dict=True, **more)
        if "logits_to_keep" in more:
            return output.hidden_states[-1]
        return output.last_hidden_state

    def step(self, ids, cache):
        """The hidden states (I·n, 1, D) of one new token (I·n, 1) for every sample."""
        if not self.packs:
            place = (cache.length + cache.now[:, None]).repeat_interleave(cache.samples, dim=0)
            where = cache.where.repeat_interleave(cache.samples, dim=-2)
            return self.run(ids, None, cache.past, position_ids=branches.take(where, place))
        turn = cache.turn()
        place = turn.queries.place                                            # (I, n)
        hidden = self.run(ids.view_as(place), turn, cache.past,
                          position_ids=branches.take(cache.where, place))              # (I, n, D)
        return hidden.flatten(0, 1)[:, None]

    def inputs_of(self, ids, images):
        """What forward takes of the images -> {name: (B, L), a number per token}, and the rest."""
        kinds, inputs = {}, {}
        for name in (images[0] if images else {}).keys() - {"head"}:
            parts = [moved(look[name], ids.device) for look in images]
            if name.startswith("token:"):
                kind = kinds[name.removeprefix("token:")] = torch.zeros_like(ids)
                for row, part in zip(kind, parts):
                    row[:len(part)] = part
            else:
                whole = joined(parts)
                inputs[name] = whole.to(self.dtype) if whole.is_floating_point() else whole
        return kinds, inputs

    def where(self, ids, layout, kinds, inputs, room):
        """The positions (B or 1, n) or (rows, B, n) that the model gives the logical places."""
        place, n = layout.place, int(layout.place.max()) + 1 + room
        plain = ids.new_full((len(ids), n), self.tokenizer.filler_id)         # of text, but for
        row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)     # the prefix
        prefix = (layout.branch == 0) & (ids >= 0)
        plain[row[prefix], place[prefix]] = ids[prefix]
        kinds = {name: nn.functional.pad(kind, (0, n))[:, :n] for name, kind in kinds.items()}
        return self.hf._prepare_position_ids_for_generation(
            plain, {"attention_mask": torch.ones_like(plain), **kinds, **inputs})

    def hidden_of_rows(self, ids, images, branch):
        """The hidden states (B, L, D) of packed rows, computed with a row for each branch."""
        hidden = []
        for b, of_token in enumerate(branch):
            prefix = (of_token == 0).nonzero()[:, 0]
            members = [(of_token == k).nonzero()[:, 0] for k in range(1, int(of_token.max()) + 1)]
            of_row = None
            for k in range(0, max(len(members), 1), ROWS):
                group = members[k:k + ROWS] or [prefix[:0]]
                rows = nn.utils.rnn.pad_sequence(
                    [ids[b][torch.cat([prefix, member])] for member in group],
                    batch_first=True, padding_value=self.tokenizer.filler_id)   # (ROWS, longest)
                looks = [images[b]] * len(rows) if images else None
                states = self.hidden(rows, looks, branches.logical(rows, None, None))
                if of_row is None:
                    of_row = states.new_zeros(ids.shape[1], states.shape[-1])
                    of_row = of_row.index_copy(0, prefix, states[0, :len(prefix)])
                for state, member in zip(states, group):
                    of_member = state[len(prefix):len(prefix) + len(member)]
                    of_row = of_row.index_copy(0, member, of_member)
            hidden.append(of_row)
        return torch.stack(hidden)

    def logits(self, hidden):
        """Hidden states (..., D) -> logits (..., vocab), scaled and capped as the model does it."""
        config, logits = self.text_config, self.output_layer(hidden)
        logits = logits * (getattr(config, "logit_scale", None) or 1)
        logits = logits / (getattr(config, "logits_scaling", None) or 1)
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def never_sampled(self, logits):
        """Logits with special tokens and placeholders of images ruled out."""
        return logits.index_fill(-1, self.never, float("-inf"))

    # ---- memory
    @property
    def cache_bytes(self):
        """Bytes of keys and values of one token."""
        c = self.text_config
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        heads = heads if isinstance(heads, int) else max(heads)         # some have a list
        return 2 * c.num_hidden_layers * heads * head * self.dtype.itemsize

    def training_bytes(self, trained, world, rows, length=None, views=6):
        """As base.py; without a length, rows have a caption of LONG_CAPTION tokens."""
        look = self.prompts.blank(views)
        length = length or len(self.caption_prompt(views)) + LONG_CAPTION
        pixels = [t for t in look.values() if t.is_floating_point()]
        patches = sum(t.numel() for t in pixels) // patch_numbers(self.towers["vision"])
        given = rows * sum(t.numel() * t.element_size() for t in pixels)
        vision = memory.tower(self, "vision", rows * patches, self.towers["vision"], given=given,
                              **block_shapes(self.towers["vision"], turned=False))
        language = memory.tower(self, "language", rows * length, self.towers["language"],
                                **block_shapes(self.towers["language"], turned=True))
        masks = rows * length ** 2 * (1 + self.dtype.itemsize)
        return memory.training_bytes(self, trained, world, vision, language, masks,
                                     LOGITS_AT_ONCE * self.text_config.vocab_size)


# ---------------------------------------------------------------- what it can do
class Silence(nn.Module):
    """An adapter that leaves nothing of what a sublayer says."""

    def forward(self, x):
        return torch.zeros_like(x)


def drop_unused(model, ids, look, at, logits):
    """Forget the slots of the last vision blocks where no later layer reads them: adapters there
    would have no gradient."""
    while len(model.slots["vision"]) > 1:
        last = model.slots["vision"][-1]
        for slot in (last["attn_slot"], last["mlp_slot"]):
            slot["silence"], slot.stack = Silence(), ("silence",)
        is_read = not torch.equal(model(ids, [look], positions=at), logits)
        for slot in (last["attn_slot"], last["mlp_slot"]):
            slot.stack = ()
            del slot["silence"]
        if is_read:
            return
        del model.slots["vision"][-1]


def far(a, b, share=0.1):
    """Whether logits differ by more than rounding: rms of the difference over the spread. Kernels
    in bfloat16 differ by .02, models that mix continuations by .7 and more."""
    return bool((a - b).float().pow(2).mean().sqrt() > share * b.float().std())


@torch.no_grad()
def try_out(model, name):
    """Compare with a plain call of the model, and find out whether branches can be held apart.

    InputError where the interface cannot give what the plain call gives.
    """
    noise = torch.rand(model.image_size, model.image_size, 3, generator=torch.manual_seed(0))
    picture = Image.fromarray((noise * 255).byte().numpy())
    inputs = dict(model.prompts.inputs([picture], model.caption_text))
    inputs = {key: t.to(model.device, model.dtype if t.is_floating_point() else None)
              for key, t in inputs.items()}
    ids, look, kind = inputs["input_ids"], model.look([picture]), model.config.model_type
    n, more = ids.shape[1], ids.new_tensor([model.tokenizer.encode("a b c d")])
    m = more.shape[1]
    at = torch.arange(n - min(n, COMPARED), n, device=ids.device)             # of the prompt
    plain = model.hf(**inputs).logits[:, at]
    ours = model(ids, [look], positions=at)
    if far(ours, plain):
        raise InputError(f"{name}: {kind} does not give here what it gives by itself; give another "
                         "base")
    drop_unused(model, ids, look, at, ours)
    longer = torch.cat([ids, more], dim=1)
    behind = model(longer, [look], positions=torch.arange(at[0], n + m, device=ids.device))
    if far(behind[:, :len(at)], ours, share=0.08):
        raise InputError(f"{name}: in a prompt of {kind} tokens see later ones, so that "
                         "continuations cannot share it; give another base")
    branch = torch.tensor([0] * n + [1] * m + [2] * m, device=ids.device)[None]
    second = torch.arange(n + m, n + 2 * m, device=ids.device)
    packed = model(torch.cat([longer, more], 1), [look], branch=branch, positions=second)
    model.packs = not far(packed, behind[:, len(at):])
