"""What both kinds of base are made of: slots for adapters, and log-probabilities that do not hold
all logits at once."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def call(block, *args, checkpointing):
    """Run a block. With checkpointing its activations are recomputed in backward, not kept."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def log_probabilities(head, x, tokens):
    """log p of tokens (B, K) after hidden states x (B, K, D): LOGITS_AT_ONCE rows at a time.

    head: the output layer. -100 is padding; it costs no logits and gives 0.
    """
    real = tokens != PADDING
    chunks = zip(x[real].split(LOGITS_AT_ONCE), tokens[real].split(LOGITS_AT_ONCE))
    parts = [call(logps_of_chunk, head, *chunk, checkpointing=True) for chunk in chunks]
    zeros = torch.zeros(tokens.shape, device=x.device)
    return zeros.masked_scatter(real, torch.cat(parts))


def logps_of_chunk(head, x, tokens):
    return -F.cross_entropy(head(x).float(), tokens, reduction="none")
