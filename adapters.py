"""Bottleneck adapters and the soft prompt: attach, stack, switch, save, load.

    y = x + up(relu(down(x)))           down: D -> D/reduction, up: D/reduction -> D

One sits after the attention output projection and one after the MLP of every block, before the residual sum. `up`
starts at zero, so a fresh adapter is exactly the identity. The base is never changed: attaching freezes all of it.
The trained tensors stay in fp32 and are cast to the compute dtype where they are used.
"""
import contextlib
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from model import CAPTION_PROMPT, InputError, Slot


class Adapter(nn.Module):
    """x (..., D) -> (..., D) through a bottleneck of R = D / reduction."""

    def __init__(self, width, reduction, device=None):
        super().__init__()
        self.reduction = reduction
        self.down = nn.Linear(width, width // reduction, device=device)
        self.up = nn.Linear(width // reduction, width, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        down, up = self.down, self.up
        h = F.relu(F.linear(x, down.weight.to(x.dtype), down.bias.to(x.dtype)))
        return x + F.linear(h, up.weight.to(x.dtype), up.bias.to(x.dtype))


class SoftPrompt(nn.Module):
    """Vectors (n, D) in place of the prompt's tokens; they start as those tokens' embeddings."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach().float().clone())


def slots(model, where=("vision", "language")):
    """Yield (slot, width) of every slot of the named towers."""
    if "vision" in where:
        for block in model.transformer.visual.transformer["resblocks"]:
            yield from ((slot, model.config.visual.width) for slot in (block.attn_slot, block.mlp_slot))
    if "language" in where:
        for block in model.transformer.h:
            yield from ((slot, model.config.hidden_size) for slot in (block.attn_slot, block.mlp_slot))


def names_of(model, name):
    """The parameter names of one named adapter and its soft prompt, sorted."""
    parts = (f"slot.{name}.", f"soft_prompts.{name}.")
    return sorted(n for n, _ in model.named_parameters() if any(part in n for part in parts))


def attach(model, name, where=("vision", "language"), reduction=8, below=None, soft_prompt=False):
    """Add fresh adapters under a name to every block of the towers in `where`, switched on; freeze all else.

    They go on top of the stack, or directly below the adapters named `below` (nearer the base). soft_prompt: also a
    trainable prompt. Returns the names of the parameters that train now: exactly the new ones.
    """
    if any(name in slot for slot, _ in slots(model)):
        raise InputError(f"adapters named {name} are attached already")
    if not name.isidentifier() or hasattr(Slot(), name) or not set(where) <= {"vision", "language"}:
        raise ValueError(f"want an identifier as name and towers among vision and language, got {name!r}, {where}")
    if below is not None and not any(below in slot for slot, _ in slots(model)):
        raise ValueError(f"no adapters named {below} are attached to go below")
    if any(not 1 <= reduction <= width for _, width in slots(model, where)):
        raise InputError(f"--reduction {reduction}: want a whole number from 1 to the width of the model")
    model.requires_grad_(False)
    for slot, width in slots(model, where):
        slot[name] = Adapter(width, reduction, model.lm_head.weight.device)
        at = slot.stack.index(below) if below in slot.stack else len(slot.stack)
        slot.stack = (*slot.stack[:at], name, *slot.stack[at:])
    if soft_prompt:
        ids = torch.tensor(model.tokenizer.encode(CAPTION_PROMPT), device=model.lm_head.weight.device)
        model.soft_prompts[name] = SoftPrompt(model.transformer.wte(ids))
        model.soft_prompts.stack = (name,)
    trains = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert trains == names_of(model, name), "attach must leave exactly the new parameters trainable"
    return trains


@contextlib.contextmanager
def active(model, names):
    """Inside, only the named adapters act, in this order from the base up; [] is the bare base. Restored on exit."""
    places = [slot for slot, _ in slots(model)] + [model.soft_prompts]
    if unknown := [n for n in names if not any(n in slot for slot in places)]:
        raise ValueError(f"no adapters named {', '.join(unknown)} are attached")
    before = [slot.stack for slot in places]
    try:
        for slot in places:
            slot.stack = tuple(n for n in names if n in slot)
        yield
    finally:
        for slot, stack in zip(places, before):
            slot.stack = stack


# ---------------------------------------------------------------- adapter folders
def folder_hash(folder):
    """sha256 of a folder's trained tensors: what a later stage remembers of its parent."""
    digest = hashlib.sha256()
    with (Path(folder) / "adapters.safetensors").open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_card(folder):
    """adapters.json of a folder, as a dict. InputError where it is none of ours."""
    path = Path(folder) / "adapters.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no adapters.json; give a folder that a training stage wrote") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    kinds = {"base": str, "fingerprint": str, "name": str, "where": list, "reduction": int, "soft_prompt": bool}
    if not isinstance(card, dict) or not all(isinstance(card.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"{path}: is not the description of an adapter folder")
    return card


def save(model, folder, name, **more):
    """Write one named adapter, its soft prompt and what they fit on to a folder; `more` is added to adapters.json.

    adapters.json appears last and whole: a folder without it is not an adapter folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = dict(model.named_parameters())
    where = [tower for tower in ("vision", "language") if any(name in slot for slot, _ in slots(model, (tower,)))]
    slot = next(slot for slot, _ in slots(model, where) if name in slot)
    card = {"base": model.base, "fingerprint": model.fingerprint, "name": name, "where": where,
            "reduction": slot[name].reduction, "soft_prompt": name in model.soft_prompts, **more}
    tensors = {n: trained[n].detach().contiguous().cpu() for n in names_of(model, name)}
    save_file(tensors, folder / "adapters.safetensors.tmp")
    (folder / "adapters.safetensors.tmp").replace(folder / "adapters.safetensors")
    (folder / "adapters.json.tmp").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "adapters.json.tmp").replace(folder / "adapters.json")


def load(model, folder):
    """Attach the adapters of a folder to its base, switched on and frozen -> the folder's description.

    InputError for another base, for missing, left-over or misshaped tensors, or where the name is taken.
    """
    card, path = read_card(folder), Path(folder) / "adapters.safetensors"
    if card["fingerprint"] != model.fingerprint:
        raise InputError(f"{folder}: was trained on {card['base']}, and {model.base} is another base; give its own "
                         "with --base, or other adapters")
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is not a whole safetensors file ({error})") from None
    attach(model, card["name"], tuple(card["where"]), card["reduction"], soft_prompt=card["soft_prompt"])
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if odd := sorted(expected.keys() ^ stored.keys()):
        raise InputError(f"{path}: {odd[0]} is {'missing' if odd[0] in expected else 'left over'}")
    for n, p in expected.items():
        if stored[n].shape != p.shape:
            raise InputError(f"{path}: {n} has shape {tuple(stored[n].shape)}, the model asks for {tuple(p.shape)}")
        p.data.copy_(stored[n])
    model.requires_grad_(False)
    return card
