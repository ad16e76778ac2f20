"""What the training stages share and no paper mentions: ranks, rows on disk, batches, the optimizer's shards, the
learning rate, checkpoints, log lines and signals. Nothing of the method is in here.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from adapters import folder_hash
from chunking import SUFFIXES
from loading import InputError, usable_device
from model import LOGITS_AT_ONCE

MAX_SKIPPED = 5             # steps in a row without a finite gradient before a run stops


# ---------------------------------------------------------------- arguments
def stage_parser(doc, out, data, rows, lr, batch, epochs):
    """The flags that every training stage has, with this stage's defaults."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, default=Path(data), help=f"{rows} to learn from")
    p.add_argument("--out", type=Path, default=Path(out), help="adapter folder to write, and to go on from")
    p.add_argument("--epochs", type=float, default=epochs, help=f"times through the {rows}")
    p.add_argument("--max-steps", type=int, help="steps, whatever --epochs says")
    p.add_argument("--batch", type=int, default=batch, help=f"{rows} per step, over all ranks")
    p.add_argument("--micro-batch", type=int, default=1, help=f"{rows} at once on a rank")
    p.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    p.add_argument("--warmup", type=int, default=20, help="steps until the peak")
    p.add_argument("--weight-decay", type=float, default=0.01, help="of matrices; biases have none")
    p.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--seed", type=int, default=0, help="of fresh adapters, held-out rows and the order of rows")
    p.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--holdout", type=float, default=0.02, help="share of the images kept for validation")
    p.add_argument("--workers", type=int, default=2, help="processes per rank that decode images")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the frozen weights; left out, "
                   "bfloat16 on a GPU and float32 on the CPU")
    return p


def checked(parser, argv):
    """Parse, and refuse senseless numbers in one line."""
    args = parser.parse_args(argv)
    for name in ("batch", "micro_batch", "save_every", "epochs", "lr", "grad_clip", "max_steps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= args.holdout < 1 or args.warmup < 0 or args.workers < 0 or not 0 <= args.weight_decay < math.inf:
        parser.error("--holdout must be from 0 to below 1; --warmup, --workers and --weight-decay not negative")
    return args


# ---------------------------------------------------------------- ranks
@dataclass
class Ranks:
    """This process among those that torchrun started; alone without torchrun."""
    rank: int
    world: int
    device: torch.device

    @property
    def is_master(self):
        return self.rank == 0

    def sum(self, *numbers):
        """Each number summed over all ranks, as floats (float64 on the way)."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, values):
        """The lists of all ranks, one after the other."""
        if self.world == 1:
            return list(values)
        parts = [None] * self.world
        dist.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


def start_ranks(device):
    """Join the ranks that torchrun's variables describe, one card each; gloo on the CPU, nccl on GPUs."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = usable_device(f"cuda:{local}" if device == "cuda" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # torchrun keeps one store over its restarts; without a prefix, a rank may find the address of a dead one
        store, rank, world = next(dist.rendezvous("env://", rank, world))
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return Ranks(rank, world, device)


def run_stage(script, device, train):
    """train(ranks) among the ranks that torchrun started -> exit code; a user's mistake is one line from rank 0."""
    ranks = None
    try:
        ranks = start_ranks(device)
        return train(ranks)
    except InputError as error:
        if ranks is None or ranks.is_master:
            print(f"{script}: {error}", file=sys.stderr)
        return 1
    finally:
        if ranks:
            ranks.close()


# ---------------------------------------------------------------- rows on disk
def read_jsonl(path):
    """Yield (where, row) of a JSONL file, where being file:line; row is None where the line is no JSON object."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"{path}:{number}", row if isinstance(row, dict) else None


def caption_files(data):
    """Yield (where, image path, caption or None) from JSONL rows, an imagefolder, or images with .txt beside."""
    data = Path(data)
    if data.is_dir() and not (data / "metadata.jsonl").is_file():
        for image in sorted(p for p in data.rglob("*") if p.suffix.lower() in SUFFIXES):
            text = image.with_suffix(".txt")
            yield str(image), image, text.read_text("utf-8", "replace") if text.is_file() else None
        return
    path = data / "metadata.jsonl" if data.is_dir() else data
    for where, row in read_jsonl(path):
        row = row or {}
        name, caption = row.get("image", row.get("file_name")), row.get("caption", row.get("text"))
        yield where, path.parent / name if isinstance(name, str) else None, caption


def read_captions(data):
    """Captions -> rows [{"image": path, "caption": text}], and what is wrong with the others [(where, reason)]."""
    rows, bad = [], []
    for where, image, caption in caption_files(data):
        if image is None:
            bad.append((where, "no JSON object with image and caption"))
        elif not isinstance(caption, str) or not caption.strip():
            bad.append((where, "no caption"))
        elif not is_there(image):
            bad.append((where, f"{image} is not there"))
        else:
            rows.append({"where": where, "image": image, "caption": " ".join(caption.split())})
    return need_rows(data, rows, bad)


def is_there(image):
    """Whether a path is a file; one that no file can have (a name too long) is none."""
    try:
        return image.is_file()
    except OSError:
        return False


def need_rows(path, rows, bad):
    """rows and bad as they are; InputError where no row is left."""
    if not rows:
        first = f"; the first of {len(bad)} bad ones is {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise InputError(f"{path}: no usable row{first}")
    return rows, bad


def tell_bad(script, bad, most=10):
    """The first bad rows of a file on stderr, with file and line."""
    for where, reason in bad[:most]:
        print(f"{script}: left out: {where}: {reason}", file=sys.stderr)
    if len(bad) > most:
        print(f"{script}: left out: {len(bad) - most} more", file=sys.stderr)


def split(rows, holdout, seed):
    """Rows -> those for training, and those of a share `holdout` of the images for validation, drawn by the seed."""
    images = sorted({str(row["image"]) for row in rows})
    random.Random(f"holdout {seed}").shuffle(images)
    held = set(images[:min(max(round(holdout * len(images)), 1 if holdout > 0 else 0), len(images) - 1)])
    return [row for row in rows if str(row["image"]) not in held], [row for row in rows if str(row["image"]) in held]


# ---------------------------------------------------------------- batches
def step_rows(n_rows, batch, step, seed):
    """Which rows step number `step` (from 0) takes: `batch` pairs (row number, epoch), each epoch in its own order.

    A function of its arguments alone, so that a resumed run takes the same rows, whatever the number of ranks.
    """
    orders, taken = {}, []
    for position in range(step * batch, (step + 1) * batch):
        epoch = position // n_rows
        if epoch not in orders:
            orders[epoch] = random.Random(f"epoch {seed} {epoch}").sample(range(n_rows), n_rows)
        taken.append((orders[epoch][position % n_rows], epoch))
    return taken


class MicroBatches:
    """The (row number, epoch) of this rank's micro-batches, step after step: what a DataLoader asks its workers for.

    Every rank has the same number of micro-batches a step, if need be empty ones at the end.
    """

    def __init__(self, n_rows, batch, micro_batch, first, last, seed, ranks):
        self.n_rows, self.batch, self.micro_batch, self.seed, self.ranks = n_rows, batch, micro_batch, seed, ranks
        self.first, self.last = first, last
        self.per_step = math.ceil(math.ceil(batch / ranks.world) / micro_batch)

    def __iter__(self):
        for step in range(self.first, self.last):
            own = step_rows(self.n_rows, self.batch, step, self.seed)[self.ranks.rank::self.ranks.world]
            for k in range(self.per_step):
                yield own[k * self.micro_batch:(k + 1) * self.micro_batch]

    def __len__(self):
        return (self.last - self.first) * self.per_step


class Rows(Dataset):
    """Rows by (number, epoch), made into examples by make(row, epoch); what cannot be made is its InputError."""

    def __init__(self, rows, make):
        self.rows, self.make = rows, make

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        number, epoch = at
        try:
            return self.make(self.rows[number], epoch)
        except InputError as error:
            where = self.rows[number].get("where")
            return InputError(f"{where}: {error}") if where else error


def loader(rows, make, batches, workers):
    """Iterate over lists of examples, decoded by `workers` processes ahead of their use."""
    # fork, since make is a closure, which the other ways (usual on a Mac, and from Python 3.14) cannot send
    return DataLoader(Rows(rows, make), multiprocessing_context="fork" if workers else None,
                      batch_sampler=batches, num_workers=workers, collate_fn=list,
                      worker_init_fn=worker_signals)


def collate(examples, model, device):
    """Examples {"ids", "n_prompt", "views"} -> arguments of the model's forward; without any, a blank that counts 0.

    Padding stands on the right. targets (M,) are what follows each row's prompt, in order of row and position.
    """
    side, eos = model.config.visual.image_size, model.tokenizer.eos_id
    blank = {"ids": [*model.image_prompt(1, ""), eos], "n_prompt": model.config.visual.n_queries + 2,
             "views": torch.zeros(1, 3, side, side)}
    rows = examples or [blank]
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [eos] * (longest - len(row["ids"])) for row in rows], device=device)
    length, n_prompt = (torch.tensor(n, device=device)[:, None] for n in
                        ([len(row["ids"]) for row in rows], [row["n_prompt"] for row in rows]))
    place = torch.arange(longest, device=device)[None]
    positions = (place >= n_prompt - 1) & (place < length - 1)          # what follows each of them is a target
    return {"ids": ids, "images": torch.cat([row["views"] for row in rows]).to(device), "mask": place < length,
            "positions": positions, "targets": ids[:, 1:][positions[:, :-1]]}


# ---------------------------------------------------------------- optimizer and learning rate
class ShardedAdamW:
    """AdamW whose state is spread over the ranks: each updates its share of the parameters and sends it to the others.

    trained: {name: parameter}, the same on all ranks, gradients already averaged. Matrices decay, vectors do not.
    """

    def __init__(self, trained, weight_decay, ranks):
        self.trained, self.ranks = trained, ranks
        load, self.owner = [0] * ranks.world, {}
        for name in sorted(trained, key=lambda n: (-trained[n].numel(), n)):
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += trained[name].numel()
        self.own = [name for name in trained if self.owner[name] == ranks.rank]
        groups = [{"params": [trained[n] for n in self.own if (trained[n].ndim > 1) == decays],
                   "weight_decay": weight_decay if decays else 0.0} for decays in (True, False)]
        groups = [group for group in groups if group["params"]]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95)) if groups else None

    def step(self, lr):
        if self.adam:
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
        if self.ranks.world > 1:
            for name, parameter in self.trained.items():
                dist.broadcast(parameter.data, src=self.owner[name])

    def state(self):
        """{name: its moments} of the parameters of this rank."""
        return {name: self.adam.state[self.trained[name]] for name in self.own}

    def load(self, state):
        """Take over the moments of this rank's parameters from those of all ranks."""
        for name in self.own:
            parameter = self.trained[name]
            self.adam.state[parameter] = {key: value if key == "step" else value.to(parameter.device)
                                          for key, value in state[name].items()}


def cosine(step, steps, lr, warmup):
    """The learning rate of step number `step` (from 0) of `steps`: linear warm-up, then a cosine to a tenth."""
    if step < warmup:
        return lr * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


# ---------------------------------------------------------------- what a folder remembers
# The arguments that a resumed run must share with the one that it goes on with, in every stage.
RUN = ("batch", "lr", "warmup", "weight_decay", "grad_clip", "seed", "holdout")


def plain(args):
    """The arguments of a run as JSON values."""
    kept = (int, float, bool, type(None))
    return {key: value if isinstance(value, kept) else str(value) for key, value in vars(args).items()}


def rows_hash(rows):
    """A hash of what rows say: texts, and the names of their images."""
    said = [{key: Path(value).name if key == "image" else value for key, value in row.items() if key != "where"}
            for row in rows]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def lineage(init):
    """Which adapter folder a run started from, and the hash of its tensors; nothing for a fresh start."""
    return {"parent": str(init), "parent_hash": folder_hash(init)} if init else {"parent": None, "parent_hash": None}


# ---------------------------------------------------------------- checkpoints, log, signals
def write_whole(path, write):
    """Make a file by write(temporary path), and give it its name only when it is whole and on disk."""
    temporary = Path(f"{path}.tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(out, ranks, step, run, optimizer):
    """out/resume/step-N: the trained tensors, every rank's moments, and which run this is. Older ones go afterwards."""
    final = Path(out) / "resume" / f"step-{step:08d}"
    temporary = final.with_suffix(".tmp")
    if final.is_dir():              # stopped right after it was saved
        return
    if ranks.is_master:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    write_whole(temporary / f"moments-{ranks.rank}.pt", lambda path: torch.save(optimizer.state(), path))
    if ranks.is_master:
        trained = {name: p.detach().cpu() for name, p in optimizer.trained.items()}
        write_whole(temporary / "trained.pt", lambda path: torch.save(trained, path))
        write_whole(temporary / "run.json", lambda path: path.write_text(json.dumps({"step": step, "run": run})))
    ranks.barrier()
    if ranks.is_master:
        os.replace(temporary, final)
        for old in final.parent.iterdir():
            if old != final:
                shutil.rmtree(old)
    ranks.barrier()


def load_checkpoint(out, run, optimizer):
    """Go on from the newest whole checkpoint -> its step, or 0 where there is none. InputError for another run's."""
    whole = [p for p in (Path(out) / "resume").glob("step-*") if p.suffix != ".tmp"]
    if not whole:
        return 0
    newest = max(whole)
    saved = json.loads((newest / "run.json").read_text())
    if differs := [key for key in run if saved["run"].get(key) != run[key]]:
        raise InputError(f"{out}: holds a run with another {differs[0]} ({saved['run'].get(differs[0])!r}, now "
                         f"{run[differs[0]]!r}); delete it or give another --out")
    for name, tensor in torch.load(newest / "trained.pt", weights_only=True).items():
        optimizer.trained[name].data.copy_(tensor)
    moments = {}
    for path in sorted(newest.glob("moments-*.pt")):        # of as many ranks as there were then
        moments |= torch.load(path, weights_only=True, map_location="cpu")
    optimizer.load(moments)
    return saved["step"]


class Log:
    """out/log.jsonl, one object per step; opened after a resume, it forgets what came after that step."""

    def __init__(self, out, step, ranks):
        self.path, self.ranks = Path(out) / "log.jsonl", ranks
        if ranks.is_master:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
            write_whole(self.path, lambda path: path.write_bytes(b"".join(kept)))

    def write(self, row):
        if self.ranks.is_master:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Stop:
    """SIGTERM and SIGINT ask for a stop at the next micro-step; a second SIGINT (^C) quits at once.

    A second SIGTERM does not: a scheduler may send it to the whole group, and torchrun then passes on its own.
    """

    def __init__(self):
        self.asked = 0
        self.before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}

    def release(self):
        """Signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)
        self.asked = number


def worker_signals(_):
    """A loader's workers leave signals to their group to the main process, and end when it says so."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------- the loop
def memory_estimate(model, trained, ranks, rows, tokens):
    """Bytes that a card will need for micro-batches of `rows` sequences of `tokens` with six views each.

    Weights, gradients and this rank's moments of what trains; one kept activation per block (the others are computed
    again), and the widest block while it is.
    """
    config, vision = model.config, model.config.visual
    size = model.lm_head.weight.element_size()
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    learning = sum(p.numel() for p in trained.values()) * (4 + 8 / ranks.world)
    patches = rows * 6 * (vision.image_size // vision.patch_size) ** 2
    kept = patches * vision.width * vision.layers + rows * tokens * config.hidden_size * config.num_hidden_layers
    widest = max(patches * vision.width * (4 + 2 * vision.mlp_ratio) * 2,
                 rows * tokens * (8 * config.hidden_size + 3 * config.intermediate_size)) * size
    logits = 3 * LOGITS_AT_ONCE * config.vocab_size * 4
    return int(weights + learning + kept * size + widest + logits)


def announce(what, model, trained, ranks, micro_batch):
    """What a stage took over and will need, on stderr."""
    need = memory_estimate(model, trained, ranks, micro_batch, model.config.seq_length)
    print(f"{what}\n{sum(p.numel() for p in trained.values()):,} parameters train; a card will need about "
          f"{need / 2 ** 30:.2f} GiB", file=sys.stderr)


def fit(args, ranks, policy, optimizer, rows, make, weigh, loss_of, validate, run, prepare=None):
    """Train from the last checkpoint to the last step -> (exit code, counts of what happened).

    rows are made into examples by `make` in worker processes; weigh(examples) says how much a micro-batch counts, and
    loss_of(policy, examples) gives (loss, figures), sums over that much. A step's loss is the sum over all its
    micro-batches and ranks divided by the sum of their weights: never a mean of means. validate() -> figures for the
    log, asked at every checkpoint on all ranks. `run` is what a resumed run must have in common with this one.
    """
    steps = args.max_steps or math.ceil(args.epochs * len(rows) / args.batch)
    first = load_checkpoint(args.out, run, optimizer)
    log, stop, broken, skipped, in_all = Log(args.out, first, ranks), Stop(), {}, 0, 0
    batches = MicroBatches(len(rows), args.batch, args.micro_batch, first, steps, args.seed, ranks)
    supply = iter(loader(rows, make, batches, args.workers))
    parameters = list(optimizer.trained.values())
    for step in tqdm(range(first, steps), initial=first, total=steps, unit="step", disable=not ranks.is_master):
        began = time.perf_counter()
        found = [good_rows(next(supply), broken) for _ in range(batches.per_step)]
        weight, = ranks.sum(sum(map(weigh, found)))
        if prepare:
            prepare([example for examples in found for example in examples])
        sums = {}
        for micro_step, examples in enumerate(found):
            if ranks.sum(stop.asked)[0]:                    # agreed by all, at the same micro-step
                break
            joins = ranks.world == 1 or micro_step + 1 == len(found)
            with contextlib.nullcontext() if joins else policy.no_sync():
                loss, figures = loss_of(policy, examples)
                (loss * ranks.world / max(weight, 1)).backward()        # DDP averages over ranks, this is a sum
            for name, value in {"loss": loss.item(), **figures}.items():
                sums[name] = sums.get(name, 0.0) + value
        if ranks.sum(stop.asked)[0]:
            save_checkpoint(args.out, ranks, step, run, optimizer)      # the unfinished step is dropped
            return 128 + (stop.asked or signal.SIGTERM), {"broken": len(broken), "skipped": in_all}
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip).item()
        lr = cosine(step, steps, args.lr, args.warmup)
        means = dict(zip(sums, (total / max(weight, 1) for total in ranks.sum(*sums.values()))))
        if weight and math.isfinite(norm) and math.isfinite(means["loss"]):     # the same numbers, so the same choice
            optimizer.step(lr)
            skipped = 0
        else:
            skipped, in_all = skipped + 1, in_all + 1
            if skipped == MAX_SKIPPED:
                reason = "the loss was not finite; try a smaller --lr" if weight else "no image could be read"
                raise InputError(f"{skipped} steps on end were lost, up to step {step + 1}: {reason}. The last "
                                 f"checkpoint is in {args.out}/resume")
        policy.zero_grad(set_to_none=True)
        row = {"step": step + 1, **means, "grad_norm": norm, "learning_rate": lr,
               "seconds": round(time.perf_counter() - began, 4)}
        if ranks.device.type == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
        saves = (step + 1) % args.save_every == 0 or step + 1 == steps
        log.write({**row, **(validate() if saves else {})})
        if saves:
            save_checkpoint(args.out, ranks, step + 1, run, optimizer)
    stop.release()
    return 0, {"broken": len(set(ranks.gather(broken))), "skipped": in_all}


def good_rows(found, broken):
    """What the workers made of a micro-batch -> the examples; a row whose image is broken is told once."""
    for problem in (str(row) for row in found if isinstance(row, InputError)):
        if problem not in broken:
            broken[problem] = True
            tqdm.write(f"left out: {problem}", file=sys.stderr)
    return [row for row in found if not isinstance(row, InputError)]
