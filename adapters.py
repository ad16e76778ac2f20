"""Bottleneck adapters and the soft prompt: attach, stack, switch, save, load.

    y = x + up(relu(down(x)))           down: D -> D/reduction, up: D/reduction -> D

One sits after the attention output projection and one after the MLP of every block, before the residual sum. `up`
starts at zero, so a fresh adapter is exactly the identity. The base is never changed: attaching freezes all of it.
The trained tensors stay in fp32 and are cast to the compute dtype where they are used.
"""
import contextlib
import hashlib
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from model import CAPTION_PROMPT, Slot
from plumbing.errors import InputError


class Adapter(nn.Module):
    """x (..., D) -> (..., D) through a bottleneck of R = D / reduction."""

    def __init__(self, width, reduction, device=None):
        super().__init__()
        self.size = reduction
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

    def forward(self, x, here):
        """x (B, L, D) with the k-th place of each row that `here` (B, L) marks taken by the k-th vector."""
        counts = here.sum(dim=1)
        if bool(((counts != 0) & (counts != len(self.vectors))).any()):
            raise ValueError(f"a row holds all {len(self.vectors)} soft-prompt slots or none, not {counts.tolist()}")
        index = (here.cumsum(dim=1) - 1).clamp(min=0, max=len(self.vectors) - 1)
        return torch.where(here[..., None], self.vectors.to(x.dtype)[index], x)


class LoRA(nn.Module):
    """x (..., in) -> (..., out), added to what a frozen linear layer makes of x: up(down(x)) · 2, rank R."""

    def __init__(self, width, rank, device=None):
        super().__init__()
        self.size = rank
        self.down = nn.Linear(width, rank, bias=False, device=device)
        self.up = nn.Linear(rank, 3 * width, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return 2 * F.linear(F.linear(x, self.down.weight.to(x.dtype)), self.up.weight.to(x.dtype))


def slots(model, where=("vision", "language"), kind="adapter"):
    """Yield (slot, width) of every slot of the named towers: two a block for adapters, one at q, k, v for "lora"."""
    towers = {"vision": (model.transformer.visual.transformer["resblocks"], model.config.visual.width),
              "language": (model.transformer.h, model.config.hidden_size)}
    for tower in where:
        blocks, width = towers[tower]
        for block in blocks:
            for slot in (block.attn_slot, block.mlp_slot) if kind == "adapter" else (block.attn.lora_slot,):
                yield slot, width


def all_slots(model):
    return [slot for kind in ("adapter", "lora") for slot, _ in slots(model, kind=kind)] + [model.soft_prompts]


def names_of(model, name):
    """The parameter names of one named adapter and its soft prompt, sorted."""
    parts = (f"slot.{name}.", f"soft_prompts.{name}.")
    return sorted(n for n, _ in model.named_parameters() if any(part in n for part in parts))


def attach(model, name, where=("vision", "language"), reduction=8, below=None, soft_prompt=False, kind="adapter"):
    """Add fresh adapters under a name to every block of the towers in `where`, switched on; freeze all else.

    They go on top of the stack, or directly below the adapters named `below` (nearer the base). soft_prompt: also a
    trainable prompt. kind "lora" instead puts low-rank updates of rank `reduction` beside the q, k, v projections.
    Returns the names of the parameters that train now: exactly the new ones.
    """
    if any(name in slot for slot in all_slots(model)):
        raise InputError(f"adapters named {name} are attached already")
    if not name.isidentifier() or hasattr(Slot(), name) or not set(where) <= {"vision", "language"}:
        raise ValueError(f"want an identifier as name and towers among vision and language, got {name!r}, {where}")
    if below is not None and not any(below in slot for slot in all_slots(model)):
        raise ValueError(f"no adapters named {below} are attached to go below")
    if any(not 1 <= reduction <= width for _, width in slots(model, where)):
        raise InputError(f"--{'reduction' if kind == 'adapter' else 'rank'} {reduction}: want a whole number from 1 to "
                         "the width of the model")
    model.requires_grad_(False)
    for slot, width in slots(model, where, kind):
        make = Adapter if kind == "adapter" else LoRA
        slot[name] = make(width, reduction, model.lm_head.weight.device)
        slot[name].below = below
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
    places = all_slots(model)
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


def lineage(init):
    """Which adapter folder a run started from, and the hash of its tensors; nothing for a fresh start."""
    return {"parent": str(init), "parent_hash": folder_hash(init)} if init else {"parent": None, "parent_hash": None}


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


CARD = """---
library_name: pytorch
base_model: {base}
tags: [image-captioning, adapter]
---
# {title}

{kind} for [{base}], written by stage `{stage}`{parent}.

| where | size | soft prompt | trained parameters |
|---|---|---|---|
| {where} | {size} | {soft_prompt} | {count:,} |

{use} All arguments are in `adapters.json`, every step in `log.jsonl`.
Adapters trained on Qwen-VL's weights come under the licence of those weights.
"""


def model_card(folder, card, count):
    """README.md of an adapter folder with this description and `count` trained parameters."""
    lora = card["kind"] == "lora"
    return CARD.format(base=card["base"], title=folder.name, count=count, stage=card.get("stage"),
                       parent=f" from `{card['parent']}`" if card.get("parent") else "",
                       kind="LoRA" if lora else "Bottleneck adapters", where=", ".join(card["where"]) or "none",
                       size=f"rank {card['reduction']}" if lora else f"width ÷ {card['reduction']}",
                       soft_prompt="yes" if card["soft_prompt"] else "no",
                       use="They work below their captioner's adapters only." if card["below"] else
                       f"Use: `python caption.py img.jpg --adapters {folder}`.")


def save(model, folder, name, **more):
    """Write one named adapter, its soft prompt and what they fit on to a folder; `more` is added to adapters.json.

    adapters.json appears last and whole: a folder without it is not an adapter folder. README.md is its model card.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: model.get_parameter(n).detach().contiguous().cpu() for n in names_of(model, name)}
    if not tensors:
        raise ValueError(f"no adapters named {name} are attached")
    kind = "lora" if any("lora_slot" in n for n in tensors) else "adapter"
    where = [tower for tower in ("vision", "language") if any(name in s for s, _ in slots(model, (tower,), kind))]
    size, below = next(((s[name].size, s[name].below) for s, _ in slots(model, where, kind) if name in s), (8, None))
    card = {"base": model.base, "fingerprint": model.fingerprint, "name": name, "kind": kind, "where": where,
            "reduction": size, "soft_prompt": name in model.soft_prompts, "below": below, **more,
            "versions": {"torch": torch.__version__, "python": platform.python_version()}}
    count = sum(tensor.numel() for tensor in tensors.values())
    save_file(tensors, folder / "adapters.safetensors.tmp")
    (folder / "README.md.tmp").write_text(model_card(folder, card, count), encoding="utf-8")
    (folder / "adapters.json.tmp").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    for file in ("adapters.safetensors", "README.md", "adapters.json"):    # all are written whole before one counts
        (folder / f"{file}.tmp").replace(folder / file)


def load(model, folder):
    """Attach the adapters of a folder to its base, switched on and frozen -> the folder's description.

    Those that belong below others (QA below its captioner) need those attached. InputError for another base or another
    captioner, for missing, left-over or misshaped tensors, or where the name is taken.
    """
    card, path = read_card(folder), Path(folder) / "adapters.safetensors"
    if card["fingerprint"] != model.fingerprint:
        raise InputError(f"{folder}: was trained on {card['base']}, and {model.base} is another base; give its own "
                         "with --base, or other adapters")
    below = card.get("below")
    if below and model.loaded.get(below) != card.get("parent_hash"):
        raise InputError(f"{folder}: was trained below the captioner {card.get('parent')}, which is not the one "
                         "loaded; train it again for this one")
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is not a whole safetensors file ({error})") from None
    try:
        attach(model, card["name"], tuple(card["where"]), card["reduction"], below, card["soft_prompt"],
               card.get("kind", "adapter"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}/adapters.json: {error}") from None
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if odd := sorted(expected.keys() ^ stored.keys()):
        raise InputError(f"{path}: {odd[0]} is {'missing' if odd[0] in expected else 'left over'}")
    for n, p in expected.items():
        if stored[n].shape != p.shape:
            raise InputError(f"{path}: {n} has shape {tuple(stored[n].shape)}, the model asks for {tuple(p.shape)}")
        p.data.copy_(stored[n])
    model.requires_grad_(False)
    model.loaded[card["name"]] = folder_hash(folder)
    return card
