"""What both kinds of base have in common: slots for adapters, prompts made of their parts, and
log-probabilities that do not hold all logits at once."""
import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing import int8

PADDING = -100          # in `logp_of`, as in torch's cross_entropy
LOGITS_AT_ONCE = 64     # rows of 151,936 logits: 39 MB in fp32, twice that while softmax runs


class Slot(nn.ModuleDict):
    """Modules that adapters.py adds by name. An empty slot adds nothing to the state dict."""

    def __init__(self):
        super().__init__()
        self.stack = ()         # names of the modules that are switched on, from the base up

    def active(self):
        """The modules that are switched on, in that order."""
        return [self[name] for name in self.stack]


class Adaptable(nn.Module):
    """The state of a base's adapters, and its prompts, of which a base gives the parts.

    soft_prompt_id is the id of the soft prompt's slots, question_form the base's own question.
    """
    soft_prompt_id, question_form = None, None

    def start(self, base, tokenizer, caption_text):
        """Without adapters. base: Hub name or folder."""
        self.base, self.tokenizer, self.caption_text = base, tokenizer, caption_text
        self.fingerprint = None          # of the checkpoint's tensors: adapters know their base
        self.attached = {}               # name of adapters -> how adapters.py attached them
        self.loaded = {}                 # name of adapters -> hash of the folder they came from
        self.quantize = ""               # "int8", or all weights are in the model's dtype
        self.soft_prompts = Slot()       # by the name of their adapters; at most one is active

    def question(self, text):
        """Ids (list) of the request for a yes or no."""
        return self.request(self.question_form.format(text))

    def caption_prompt(self, images):
        """Ids (list) of head and request for a caption, the soft prompt's slots in its text's
        place."""
        for soft_prompt in self.soft_prompts.active():
            slots = [self.soft_prompt_id] * len(soft_prompt.vectors)
            return self.head(images) + slots + self.request("")
        return self.head(images) + self.request(self.caption_text)

    @property
    def device(self):
        return self.output_layer.weight.device

    @property
    def dtype(self):
        return int8.dtype_of(self.output_layer)


def call(block, *args, checkpointing):
    """Run a block. With checkpointing its activations are recomputed in backward, not kept."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


@contextlib.contextmanager
def evaluating(model):
    """Eval mode without gradients inside; the previous mode is restored."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()


def moved(tensor, device):
    """A tensor on a device; None stays None. The host does not wait for a copy to a GPU, which
    from memory that is not pinned it would."""
    if tensor is None or tensor.device == torch.device(device):
        return tensor
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def log_probabilities(head, x, tokens):
    """log p of tokens (B, K) after hidden states x (B, K, D): LOGITS_AT_ONCE rows at a time.

    head: the output layer. -100 is padding; it costs no logits and gives 0. Which tokens are
    real is asked where they are: for tokens on the CPU a GPU need not be waited for.
    """
    real = (tokens != PADDING).flatten().nonzero()[:, 0]                      # numbers in B · K
    wanted = moved(tokens.flatten()[real], x.device)
    real = moved(real, x.device)
    chunks = zip(x.flatten(0, 1)[real].split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE))
    parts = [call(logps_of_chunk, head, *chunk, checkpointing=True) for chunk in chunks]
    zeros = torch.zeros(tokens.numel(), device=x.device)
    return zeros.index_put((real,), torch.cat(parts)).view(tokens.shape)


def logps_of_chunk(head, x, tokens):
    return -F.cross_entropy(head(x).float(), tokens, reduction="none")
