"""What the training stages share and no paper mentions: arguments, ranks, the optimizer's shards, the learning rate,
checkpoints, log lines, signals and the loop. Nothing of the method is in here; rows and batches are in dataset.py.
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing import data
from plumbing.errors import InputError
from plumbing.weights import usable_device

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


def start_ranks(device, patient=False):
    """Join the ranks that torchrun's variables describe, one card each; gloo on the CPU, nccl on GPUs.

    patient: gloo in any case, and no limit on how long a rank may wait for the others, for stages whose ranks meet only
    at their end.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = usable_device(f"cuda:{local}" if device == "cuda" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # torchrun keeps one store over its restarts; without a prefix, a rank may find the address of a dead one
        store, rank, world = next(dist.rendezvous("env://", rank, world))
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.type == "cuda" and not patient else "gloo"
        limit = timedelta(days=365) if patient else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return Ranks(rank, world, device)


def run_stage(script, device, train, patient=False):
    """train(ranks) among the ranks that torchrun started -> exit code; a user's mistake is one line from rank 0.

    patient: see start_ranks; such ranks meet mistakes of their own, and each tells its own.
    """
    ranks = None
    try:
        ranks = start_ranks(device, patient)
        code = train(ranks)
        ranks.barrier()         # a rank that is done early must not take the group down before the others are
        return code
    except InputError as error:
        if ranks is None or ranks.is_master or patient:     # patient ranks meet errors of their own
            print(f"{script}: {error}", file=sys.stderr)
        return 1
    finally:
        if ranks:
            ranks.close()


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


# ---------------------------------------------------------------- checkpoints, log, signals
def without_nan(value):
    """A value that JSON can hold, with None for NaN and infinities, which JSON lacks."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


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
    """out/log.jsonl, one object per step; opened after a resume, it forgets what came after that step.

    The figures of a step that was skipped since they were not finite are null.
    """

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
                file.write(json.dumps(without_nan(row)) + "\n")


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


# ---------------------------------------------------------------- the loop
def announce(what, model, trained, ranks, micro_batch):
    """What a stage took over and will need, on stderr."""
    need = model.training_bytes(trained, ranks.world, micro_batch)
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
    batches = data.MicroBatches(len(rows), args.batch, args.micro_batch, first, steps, args.seed, ranks)
    supply = iter(data.loader(rows, make, batches, args.workers))
    parameters = list(optimizer.trained.values())
    for step in tqdm(range(first, steps), initial=first, total=steps, unit="step", disable=not ranks.is_master):
        began = time.perf_counter()
        found = [data.good_rows(next(supply), broken) for _ in range(batches.per_step)]
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
