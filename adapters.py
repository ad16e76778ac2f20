"""Bottleneck adapters and the soft prompt: attach, stack, switch, save, load.

An adapter (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751; in an image captioner: MAGMA,
https://arxiv.org/abs/2112.05253) is a small MLP in the residual branch of a frozen block:

    y = x + up(relu(down(x)))           down: D -> R, up: R -> D, with R = D / reduction

One follows the attention output projection and one the MLP of every block of both towers, before
the residual sum. `up` starts at zero, so that a fresh adapter is exactly the identity: training
starts from the base itself, and nothing that the base knows is disturbed by random numbers.

The soft prompt (https://arxiv.org/abs/2104.08691) replaces the caption prompt's tokens by as many
trainable vectors. They start as the embeddings of those tokens, for the same reason: step 0 is the
base with its own prompt, which it was pre-trained to answer.

The base is never changed: attaching freezes everything else. Trained tensors are kept in fp32 and
cast to the compute dtype where they are used.
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

from chunking import LAYOUTS
from plumbing import files, weights
from plumbing.errors import InputError
from plumbing.parts import Slot, moved

TOWERS = ("vision", "language")


# ---------------------------------------------------------------- what is trained
class Adapter(nn.Module):
    """x (..., D) -> (..., D) through a bottleneck of R = D / reduction (Houlsby et al., fig. 2)."""

    def __init__(self, width, reduction, device=None):
        super().__init__()
        self.down = nn.Linear(width, width // reduction, device=device)
        self.up = nn.Linear(width // reduction, width, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        down, up = self.down, self.up
        h = F.relu(F.linear(x, down.weight.to(x.dtype), down.bias.to(x.dtype)))       # (..., R)
        return x + F.linear(h, up.weight.to(x.dtype), up.bias.to(x.dtype))


class LoRA(nn.Module):
    """x (..., D) -> (..., E), added to a frozen projection of x to q, k, v: 2 · up(down(x)).

    LoRA (https://arxiv.org/abs/2106.09685, eq. 3) with B = up, A = down and a scale of
    alpha / rank = 2. A rival of the adapters, for comparison.
    """

    def __init__(self, width, width_out, rank, device=None):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, device=device)
        self.up = nn.Linear(rank, width_out, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        h = F.linear(x, self.down.weight.to(x.dtype))                                 # (..., rank)
        return 2 * F.linear(h, self.up.weight.to(x.dtype))


class SoftPrompt(nn.Module):
    """Trainable vectors (n, D) in place of the n tokens of the caption prompt."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach().float().clone())

    def forward(self, x, slots):
        """x (B, L, D) with the k-th slot of each row, marked in `slots` (B, L), set to vector k.

        Slots on the CPU are checked there, and moved to the device of x.
        """
        n, counts = len(self.vectors), slots.sum(dim=1)
        if bool(((counts != 0) & (counts != n)).any()):
            raise ValueError(f"a row must hold all {n} soft-prompt slots or none, not "
                             f"{counts.tolist()}")
        index = (slots.cumsum(dim=1) - 1).clamp(min=0, max=n - 1)                     # (B, L)
        slots, index = moved(slots, x.device), moved(index, x.device)
        return torch.where(slots[..., None], self.vectors.to(x.dtype)[index], x)


# ---------------------------------------------------------------- where it goes
def all_slots(model):
    """Every slot of a model, of adapters, LoRA and soft prompts."""
    return [module for module in model.modules() if isinstance(module, Slot)]


def names_of(model, name):
    """The parameter names of one named adapter and its soft prompt, sorted."""
    parts = (f"slot.{name}.", f"soft_prompts.{name}.")
    return sorted(n for n, _ in model.named_parameters() if any(part in n for part in parts))


def check_attachable(model, name, where, reduction, below, kind):
    """InputError for what a user may get wrong about new adapters, ValueError for the rest."""
    attached = {n for slot in all_slots(model) for n in slot}
    if name in attached:
        raise InputError(f"adapters named {name} are attached already")
    if not name.isidentifier() or hasattr(Slot(), name):
        raise ValueError(f"want an identifier as the name of adapters, got {name!r}")
    if not set(where) <= set(TOWERS) or kind not in ("adapter", "lora"):
        raise ValueError(f"want towers among {TOWERS} and adapter or lora, got {where}, {kind!r}")
    if below is not None and below not in attached:
        raise ValueError(f"no adapters named {below} are attached to go below")
    places = [place for tower in where for place in model.places(tower, kind)]
    if any(not 1 <= reduction <= width for _, width, _ in places):
        flag = "--reduction" if kind == "adapter" else "--rank"
        raise InputError(f"{flag} {reduction}: want a whole number from 1 to the model's width")
    if where and not places:
        raise InputError(f"{model.base}: has no projections of its own for LoRA; take --tune "
                         "adapters")


def attach(model, name, where=TOWERS, reduction=8, below=None, soft_prompt=False, kind="adapter"):
    """Add fresh adapters by name to every block of the towers in `where`, switched on.

    They are put on top of the stack, or below the adapters named `below` (nearer the base).
    soft_prompt: also a trainable prompt in place of the model's caption_text. kind "lora": low-rank
    updates of the q, k, v projections, of rank `reduction`, instead. All else is frozen: the
    parameters that train now, whose names are returned, are exactly the new ones.
    """
    check_attachable(model, name, where, reduction, below, kind)
    model.requires_grad_(False)
    for tower in where:
        for slot, width, width_out in model.places(tower, kind):
            if kind == "adapter":
                slot[name] = Adapter(width, reduction, model.device)
            else:
                slot[name] = LoRA(width, width_out, reduction, model.device)
            at = slot.stack.index(below) if below in slot.stack else len(slot.stack)
            slot.stack = (*slot.stack[:at], name, *slot.stack[at:])
    if soft_prompt:
        model.soft_prompts[name] = SoftPrompt(model.embed_text(model.caption_text))
        model.soft_prompts.stack = (name,)
    model.attached[name] = {
        "kind": kind, "where": [tower for tower in TOWERS if tower in where],
        "reduction": reduction, "soft_prompt": soft_prompt, "below": below,
        "caption_prompt": model.caption_text}
    trained = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert trained == names_of(model, name), "exactly the new parameters must train"
    return trained


@contextlib.contextmanager
def active(model, names):
    """Inside, only the named adapters act, in this order from the base up; [] is the bare base."""
    if unknown := [n for n in names if n not in model.attached]:
        raise ValueError(f"no adapters named {', '.join(unknown)} are attached")
    before = [(slot, slot.stack) for slot in all_slots(model)]
    try:
        for slot, _ in before:
            slot.stack = tuple(n for n in names if n in slot)
        yield
    finally:
        for slot, stack in before:
            slot.stack = stack


# ---------------------------------------------------------------- adapter folders
def newest(out=Path("out")):
    """The folder that out/best.txt names, else the newest out/dpo*, else out/sft, else None."""
    if (out / "best.txt").is_file():
        best = Path((out / "best.txt").read_text(encoding="utf-8", errors="replace").strip())
        for folder in (best, out / best):
            if (folder / "adapters.json").is_file():
                return folder
        raise InputError(f"{out / 'best.txt'} names {str(best)!r}, which is not an adapter folder; "
                         "correct it, or give --adapters")
    rounds = [p for p in out.glob("dpo*") if (p / "adapters.json").is_file()]
    if rounds:
        return max(rounds, key=lambda p: (p / "adapters.json").stat().st_mtime)
    return out / "sft" if (out / "sft/adapters.json").is_file() else None


def threshold_of(folder, given=None):
    """The lowest P(yes) of a statement that is kept: as given, or as a QA folder was calibrated.

    InputError where there is neither, or no such folder.
    """
    calibrated = read_card(folder).get("threshold")
    threshold = calibrated if given is None else given
    if not isinstance(threshold, int | float):
        raise InputError(f"{folder}: has no threshold; give one with --threshold")
    return threshold


def folder_hash(folder):
    """sha256 of a folder's trained tensors, by which a later stage knows its parent."""
    digest = hashlib.sha256()
    with (Path(folder) / "adapters.safetensors").open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def lineage(init):
    """The adapter folder that a run started from and the hash of its tensors, for adapters.json."""
    if not init:
        return {"parent": None, "parent_hash": None}
    return {"parent": str(init), "parent_hash": folder_hash(init)}


def read_card(folder):
    """adapters.json of a folder, as a dict. InputError if it is not an adapter folder."""
    path = Path(folder) / "adapters.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no adapters.json; give a folder that a training stage "
                         "wrote") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    types = {"base": str, "fingerprint": str, "name": str, "where": list, "reduction": int,
             "soft_prompt": bool}
    if not isinstance(card, dict) or not all(
            isinstance(card.get(key), wanted) for key, wanted in types.items()):
        raise InputError(f"{path}: is not the description of an adapter folder")
    if not isinstance(card.get("caption_prompt", ""), str):
        raise InputError(f"{path}: caption_prompt is not a text")
    boxes = card.get("views", [list(box) for box in LAYOUTS["six"]])
    if not isinstance(boxes, list) or not boxes or not all(map(is_box, boxes)):
        raise InputError(f"{path}: views is not a list of boxes (left, top, right, bottom from 0 "
                         "to 1)")
    return card


def is_box(box):
    """Whether a value from JSON is [left, top, right, bottom] in fractions of an image."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(isinstance(edge, int | float) and 0 <= edge <= 1 for edge in box):
        return False
    left, top, right, bottom = box
    return left < right and top < bottom


def views_of(folder, name=None):
    """The boxes of the views that a folder's adapters were trained with; see chunking.LAYOUTS.

    name: what --views asks for, if anything. It decides where there is no folder (None) and must
    agree with the folder otherwise, else InputError. Folders that do not say have six views.
    """
    if folder is None:
        return LAYOUTS[name or "six"]
    boxes = read_card(folder).get("views", LAYOUTS["six"])
    boxes = tuple(tuple(float(edge) for edge in box) for box in boxes)
    if name is not None and boxes != LAYOUTS[name]:
        trained = next((n for n, layout in LAYOUTS.items() if layout == boxes), list(boxes))
        raise InputError(f"--views {name}: the adapters in {folder} were trained with the views "
                         f"{trained}; leave --views out")
    return boxes


def save(model, folder, name, **more):
    """Write one named adapter and its soft prompt to a folder; `more` is added to adapters.json.

    README.md is a model card. The files replace older ones only once all are whole; adapters.json
    comes last, since a folder without it is not an adapter folder.
    """
    if name not in model.attached:
        raise ValueError(f"no adapters named {name} are attached")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: model.get_parameter(n).detach().contiguous().cpu() for n in names_of(model, name)}
    card = {"base": model.base, "fingerprint": model.fingerprint, "name": name,
            "quantize": model.quantize or None, **model.attached[name], **more,
            "versions": {"torch": torch.__version__, "python": platform.python_version()}}
    readme = model_card(folder, card, sum(tensor.numel() for tensor in tensors.values()))
    with files.whole(folder / "adapters.json") as json_file, \
            files.whole(folder / "README.md") as readme_file, \
            files.whole(folder / "adapters.safetensors") as tensor_file:     # renamed last to first
        save_file(tensors, tensor_file)
        readme_file.write_text(readme, encoding="utf-8")
        json_file.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def load(model, folder):
    """Attach the adapters of a folder, switched on and frozen -> the folder's description.

    Those that belong below others (QA below its captioner) need those attached. InputError for
    another base or another captioner, for missing, left-over or misshaped tensors, or where the
    name is taken.
    """
    card, path = read_card(folder), Path(folder) / "adapters.safetensors"
    if card["fingerprint"] != model.fingerprint:
        raise InputError(f"{folder}: was trained on {card['base']}, and {model.base} is another "
                         "base; name the right one with --base, or give other adapters")
    below = card.get("below")
    if below and model.loaded.get(below) != card.get("parent_hash"):
        raise InputError(f"{folder}: was trained below the captioner {card.get('parent')}, which "
                         "is not the one loaded; train it again for this one")
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is not a whole safetensors file ({error})") from None
    model.caption_text = card.get("caption_prompt", model.caption_text)
    try:
        attach(model, card["name"], tuple(card["where"]), card["reduction"], below,
               card["soft_prompt"], card.get("kind", "adapter"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}/adapters.json: {error}") from None
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if odd := sorted(expected.keys() ^ stored.keys()):
        status = "missing" if odd[0] in expected else "left over"
        raise InputError(f"{path}: {odd[0]} is {status}")
    for n, p in expected.items():
        if stored[n].shape != p.shape:
            raise InputError(f"{path}: {n} has shape {tuple(stored[n].shape)}, the model asks for "
                             f"{tuple(p.shape)}")
        p.data.copy_(stored[n])
    model.requires_grad_(False)
    model.loaded[card["name"]] = folder_hash(folder)
    return card


# ---------------------------------------------------------------- model card
CARD = """---
{head}
---
# {title}

{kind} for {base}, written by stage `{stage}`{parent}.

| where | size | soft prompt | trained parameters |
|---|---|---|---|
| {where} | {size} | {soft_prompt} | {count:,} |

{use} All arguments are in `adapters.json`, every step is in `log.jsonl`.
Adapters come under the licence of their base's weights, too.
"""


def model_card(folder, card, count):
    """README.md of an adapter folder with the description `card` and `count` trained parameters."""
    from huggingface_hub import ModelCardData  # here, since captioning does not need it

    on_hub = weights.is_hub_name(card["base"])          # a folder means nothing to other people
    head = ModelCardData(library_name="pytorch", tags=["image-captioning", card["kind"]],
                         base_model=card["base"] if on_hub else None)
    lora = card["kind"] == "lora"
    use = f"Use: `python caption.py img.jpg --adapters {folder}`."
    return CARD.format(
        head=head.to_yaml(), title=folder.name, stage=card.get("stage"), count=count,
        base=f"[{card['base']}](https://huggingface.co/{card['base']})" if on_hub
        else f"the base in `{card['base']}`",
        parent=f" from `{card['parent']}`" if card.get("parent") else "",
        kind="LoRA" if lora else "Bottleneck adapters", where=", ".join(card["where"]) or "none",
        size=f"rank {card['reduction']}" if lora else f"width ÷ {card['reduction']}",
        soft_prompt="yes" if card["soft_prompt"] else "no",
        use="They work below their captioner's adapters only." if card["below"] else use)
