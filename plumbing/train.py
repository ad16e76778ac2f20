"""What a training loop needs and no paper mentions: ranks, the optimizer's shards, resume, signals,
clipping, the learning rate, the log, checkpoints.

The loop itself is in each stage. A stage iterates over Run.steps(), and does forward, loss,
backward.
"""
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from plumbing import data, files
from plumbing.errors import InputError
from plumbing.weights import usable_device

MAX_SKIPPED = 5             # steps in a row without a finite loss and gradient before a run stops

# Arguments that must not change on resume, in every stage.
FIXED = ("batch", "lr", "warmup", "weight_decay", "grad_clip", "seed", "holdout", "quantize")


def fixed(args, *names, **more):
    """{name: text} of what must not change on resume: FIXED, this stage's arguments, and more."""
    values = {name: vars(args)[name] for name in (*names, *FIXED)}
    return {name: str(value) for name, value in (values | more).items()}


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

    def sum(self, number):
        """A number summed over all ranks, as a float."""
        return self.sums([number])[0]

    def sums(self, numbers):
        """Each number summed over all ranks, as floats: from host to host, not through a GPU."""
        return self.added(torch.tensor([*map(float, numbers)], dtype=torch.float64)).tolist()

    def added(self, tensor):
        """A tensor, summed over all ranks in place; on a GPU the host does not wait for it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

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
    """Join the ranks that torchrun's variables describe: gloo for what is on the CPU, nccl for what
    is on GPUs.

    patient: always gloo, and no limit on how long a rank may wait for the others; for stages whose
    ranks meet only at their end.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = usable_device(f"cuda:{local}" if device == "cuda" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # torchrun keeps one store over its restarts: without a prefix a rank may find a dead one's
        # address there
        store, rank, world = next(dist.rendezvous("env://", rank, world))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and not patient else "gloo"
        limit = timedelta(days=365) if patient else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return Ranks(rank, world, device)


def run_stage(script, device, stage, patient=False):
    """stage(ranks) among the ranks that torchrun started -> exit code.

    A user's mistake is one line from rank 0. Patient ranks (see start_ranks) work apart and meet
    mistakes of their own, so each of them reports its own.
    """
    ranks = None
    try:
        ranks = start_ranks(device, patient)
        code = stage(ranks)
        ranks.barrier()         # an early rank must not close the group before the others are done
        return code
    except InputError as error:
        if ranks is None or ranks.is_master or patient:
            print(f"{script}: {error}", file=sys.stderr)
        return 1
    finally:
        if ranks:
            ranks.close()


def distributed(model, ranks, all_weights=False):
    """The model as the loop calls it: with several ranks, DDP averages its gradients over them.

    Gradients exist from here on, and stay (see Step.finish): DDP then makes them views of its
    buffers, and again when it rebuilds these. Gradients that a micro-batch makes under no_sync
    would be a second copy. all_weights: the base trains as a whole, and some of it may have no part
    in the loss, hence no gradient.
    """
    if ranks.world == 1:
        return model
    for p in () if all_weights else model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return DistributedDataParallel(model, gradient_as_bucket_view=True,
                                   find_unused_parameters=all_weights)


def announce(what, model, trained, ranks, micro_batch, longest, views):
    """What a stage starts from and how much memory it will need, on stderr.

    longest: tokens of its longest row, with the images of so many views.
    """
    count = sum(p.numel() for p in trained.values())
    need = model.training_bytes(trained, ranks.world, micro_batch, longest, views) / 2 ** 30
    print(f"{what}\n{count:,} parameters train; a card will need about {need:.2f} GiB",
          file=sys.stderr)


# ---------------------------------------------------------------- optimizer and learning rate
def adamw(trained, weight_decay, ranks):
    """AdamW (https://arxiv.org/abs/1711.05101) for {name: parameter}; only matrices decay.

    With several ranks each keeps the moments of its share of the parameters, updates those, and
    sends them to the others (ZeRO, stage 1: https://arxiv.org/abs/1910.02054). On a GPU it is the
    fused one: the usual one there makes temporaries as large as all of its parameters.
    """
    if not trained:
        raise InputError("nothing is left to train; give another --init, or leave out "
                         "--no-soft-prompt")
    groups = [{"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options = {"betas": (0.9, 0.95), "fused": ranks.device.type == "cuda"}
    if ranks.world == 1:
        return torch.optim.AdamW(groups, **options)
    # imported late: with it come a hundred modules that one process never needs
    from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **options)


def local_part(optimizer):
    """The AdamW that holds this rank's moments: the optimizer itself, or ZeRO's inner one."""
    return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optim


def own_moments(optimizer, trained):
    """{name: moments} of the parameters that this rank updates."""
    state, names = local_part(optimizer).state, {p: name for name, p in trained.items()}
    return {names[p]: moments for p, moments in state.items()}


def load_moments(optimizer, trained, moments):
    """Take from {name: moments} of all parameters those that this rank updates."""
    local, names = local_part(optimizer), {p: name for name, p in trained.items()}
    for p in (p for group in local.param_groups for p in group["params"] if names[p] in moments):
        # the step too: AdamW has it on the CPU, the fused one on its parameter's GPU
        local.state[p] = {key: value.to(p.device) for key, value in moments[names[p]].items()}


def cosine(step, steps, lr, warmup):
    """The learning rate of step `step` (from 0) of `steps`: warm-up, then a cosine to a tenth."""
    if step < warmup:
        return lr * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(out, ranks, step, fixed, trained, optimizer):
    """Write out/resume/step-N: trained tensors, every rank's moments, and what must not change.

    It gets its name once all ranks have written; then older ones are deleted.
    """
    final = Path(out) / "resume" / f"step-{step:08d}"
    temporary = final.with_suffix(".tmp")
    if final.is_dir():              # stopped right after it was saved
        return
    if ranks.is_master:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    with files.whole(temporary / f"moments-{ranks.rank}.pt") as path:
        torch.save(own_moments(optimizer, trained), path)
    if ranks.is_master:
        with files.whole(temporary / "trained.pt") as path:
            torch.save({name: p.detach().cpu() for name, p in trained.items()}, path)
        files.write_json(temporary / "run.json", {"step": step, "run": fixed})
    ranks.barrier()
    if ranks.is_master:
        os.replace(temporary, final)
        for old in final.parent.iterdir():
            if old != final:
                shutil.rmtree(old)
    ranks.barrier()


def load_checkpoint(out, fixed, trained, optimizer):
    """Load the newest whole checkpoint -> its step; 0 without one. InputError for another run's."""
    whole = [p for p in (Path(out) / "resume").glob("step-*") if p.suffix != ".tmp"]
    if not whole:
        return 0
    newest = max(whole)
    saved = json.loads((newest / "run.json").read_text())
    # a run older than a flag had none: its default
    if differs := [key for key in fixed if saved["run"].get(key, "None") != fixed[key]]:
        key = differs[0]
        raise InputError(f"{out}: holds a run with another {key} ({saved['run'].get(key)!r}, now "
                         f"{fixed[key]!r}); delete it or give another --out")
    for name, tensor in torch.load(newest / "trained.pt", weights_only=True).items():
        trained[name].data.copy_(tensor)
    moments = {}
    for path in sorted(newest.glob("moments-*.pt")):        # of as many ranks as there were then
        moments |= torch.load(path, weights_only=True, map_location="cpu")
    load_moments(optimizer, trained, moments)
    return saved["step"]


# ---------------------------------------------------------------- signals
class Stop:
    """SIGTERM and SIGINT ask for a stop (see Step.micro_batches); a second ^C quits at once.

    A second SIGTERM does not: a scheduler may signal the whole group, and torchrun then passes on
    its own.
    """

    def __init__(self):
        self.asked = 0
        self.before = {number: signal.signal(number, self)
                       for number in (signal.SIGTERM, signal.SIGINT)}

    def release(self):
        """Restore the handlers from before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)
        self.asked = number


# ---------------------------------------------------------------- the run, step by step
class Run:
    """The steps of a training run, from the last checkpoint to the last step.

        run = Run(args, ranks, policy, optimizer, trained, rows, make, fixed)
        for step in run.steps():
            n = ranks.sum(len(step.examples))                   # rows of this step, over all ranks
            for examples in step.micro_batches():
                loss = …                                        # a sum over these examples, ÷ n
                (loss * ranks.world).backward()                 # DDP averages; a sum is meant
                step.log(loss=loss)
            step.finish()                                       # clip, learning rate, update
        if run.exit_code: return run.exit_code                  # stopped by a signal, and saved

    rows are made into examples by make(row, epoch) in worker processes; trained {name: parameter}
    is what the optimizer updates; fixed {name: value} must be the same on resume.
    """

    def __init__(self, args, ranks, policy, optimizer, trained, rows, make, fixed):
        if args.batch < ranks.world:
            raise InputError(f"--batch {args.batch} is less than the {ranks.world} processes: each "
                             "needs a row per step")
        self.args, self.ranks, self.policy, self.optimizer = args, ranks, policy, optimizer
        self.trained, self.rows, self.make, self.fixed = trained, rows, make, fixed
        self.last = args.max_steps or math.ceil(args.epochs * len(rows) / args.batch)
        self.skipped, self.exit_code, self.stop = 0, 0, None
        self.replaced, self.reported = set(), set()     # rows whose image could not be read

    def steps(self):
        """Yield a Step for every step that is left; log and save when the stage is done with it."""
        args, ranks = self.args, self.ranks
        first = load_checkpoint(args.out, self.fixed, self.trained, self.optimizer)
        log, self.stop = files.Log(args.out, first, ranks), Stop()
        batches = data.MicroBatches(len(self.rows), args.batch, args.micro_batch, first, self.last,
                                    args.seed, ranks)
        decoded = iter(data.loader(data.Examples(self.rows, self.make), args.workers,
                                   batch_sampler=batches))
        for number in tqdm(range(first, self.last), initial=first, total=self.last, unit="step",
                           disable=not ranks.is_master):
            began = time.perf_counter()
            parts = [self.readable(next(decoded)) for _ in range(batches.per_step)]
            step = Step(self, number, parts, began)
            yield step
            if self.exit_code:                          # the unfinished step is dropped
                self.save(number)
                return
            log.write(step.row)
            if step.saves:
                self.save(number + 1)
        self.stop.release()

    def readable(self, decoded):
        """The examples of a micro-batch; rows that had to be replaced are reported and counted."""
        for problem in (problem for _, problems in decoded for problem in problems):
            self.report("replaced", problem)
            self.replaced.add(problem)
        return [example for example, _ in decoded]

    def held_out(self, rows):
        """Yield this rank's held-out examples; rows whose image cannot be read are left out."""
        for row in rows[self.ranks.rank::self.ranks.world]:
            try:
                yield self.make(row, 0)
            except InputError as error:
                self.report("left out", f"{row['where']}: {error}")

    def report(self, verdict, problem):
        """A line on stderr about an image that cannot be read, once."""
        if problem not in self.reported:
            self.reported.add(problem)
            tqdm.write(f"{verdict}: {problem}", file=sys.stderr)

    def stops(self):
        """Whether any rank was asked to stop; all ranks ask this together, and get one answer."""
        if not self.exit_code:
            self.heed(self.ranks.sum(self.stop.asked))
        return bool(self.exit_code)

    def heed(self, asked):
        """Stop if any rank was asked to; asked: summed over the ranks."""
        if asked:
            self.exit_code = 128 + (self.stop.asked or signal.SIGTERM)

    def save(self, step):
        save_checkpoint(self.args.out, self.ranks, step, self.fixed, self.trained, self.optimizer)

    def count_replaced(self):
        """How many rows were replaced because their image could not be read, over all ranks."""
        return len(set(self.ranks.gather(self.replaced)))


class Step:
    """One optimizer step. `examples` are this rank's; `row` will be its line of the log."""

    def __init__(self, run, number, micro_batches, began):
        self.run, self.number, self.parts, self.began = run, number, micro_batches, began
        self.examples = [example for part in micro_batches for example in part]
        lost, asked = run.ranks.sums([None in self.examples, run.stop.asked])
        run.heed(asked)                                 # while images were decoded, or validating
        if lost:
            raise InputError(f"step {number + 1}: not one image can be read any more. The last "
                             f"checkpoint is in {run.args.out}/resume")
        self.figures, self.row = {}, {}

    def micro_batches(self):
        """Yield lists of examples. Gradients are averaged over ranks after the last one only.

        A stop is noticed before the next micro-batch by one process, and by several at the end of
        the step: a question to all ranks in between would come among DDP's own messages, at another
        moment on a rank with fewer micro-batches.
        """
        run = self.run
        for k, examples in enumerate(self.parts):
            if run.exit_code or (run.ranks.world == 1 and run.stops()):
                return
            if not examples:                            # this rank has fewer rows than others
                continue
            averages = run.ranks.world == 1 or k + 1 == len(self.parts)
            with contextlib.nullcontext() if averages else run.policy.no_sync():
                yield examples
        run.stops()

    def log(self, **figures):
        """Add to the figures of this step: its sums over micro-batches and ranks are logged."""
        for name, value in figures.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.run.ranks.device)
            self.figures[name] = self.figures.get(name, 0.0) + value.detach()

    def finish(self):
        """Clip the gradient, set the learning rate, update; skip a step that is not finite.

        This is where the host waits for the GPU, once in a step.
        """
        run, args = self.run, self.run.args
        if run.exit_code:
            return
        norm = torch.nn.utils.clip_grad_norm_(run.trained.values(), args.grad_clip)
        figures = run.ranks.added(torch.stack(list(self.figures.values())))
        *sums, norm = torch.cat([figures, norm.double()[None]]).tolist()
        sums = dict(zip(self.figures, sums))
        lr = cosine(self.number, run.last, args.lr, args.warmup)
        if math.isfinite(norm) and math.isfinite(sums["loss"]):     # the same numbers on all ranks
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            run.optimizer.step()
            run.skipped = 0
        else:
            run.skipped += 1
        if run.skipped == MAX_SKIPPED:
            raise InputError(f"{MAX_SKIPPED} steps in a row had no finite loss, up to step "
                             f"{self.number + 1}; try a smaller --lr. The last checkpoint is in "
                             f"{args.out}/resume")
        run.optimizer.zero_grad(set_to_none=run.ranks.world == 1)       # see distributed
        self.row = {"step": self.number + 1, **sums, "grad_norm": norm, "learning_rate": lr,
                    "seconds": round(time.perf_counter() - self.began, 4)}
        if run.ranks.device.type == "cuda":
            self.row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)

    @property
    def saves(self):
        """Whether a checkpoint follows this step: the moment to validate."""
        done = self.number + 1
        return not self.run.exit_code and (
            done % self.run.args.save_every == 0 or done == self.run.last)
