"""What the stages share: rows and their order, the sharded optimizer, checkpoints, log, signals, the loop itself."""

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import signal
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import stages
import torch

import adapters
import plumbing.data
import plumbing.files
import plumbing.train
from model import Config, QwenVL
from plumbing import arguments
from plumbing.errors import InputError
from plumbing.train import Ranks, Run, Stop, adamw

ALONE = Ranks(0, 1, torch.device("cpu"))


def ranks_of(world):
    return [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]


# ---------------------------------------------------------------- arguments
def parser():
    p = arguments.stage_parser(
        "A stage.", out="out/x", rows_at="x.jsonl", rows="rows", lr=1e-3, batch=8, epochs=1.0
    )
    p.add_argument("--init", type=Path)
    return p


@pytest.mark.parametrize(
    "argv, expected_word",
    [
        ("--batch 0", "--batch"),
        ("--batch 2.5", "--batch"),
        ("--micro-batch -1", "--micro-batch"),
        ("--lr nan", "--lr"),
        ("--lr 0", "--lr"),
        ("--epochs inf", "--epochs"),
        ("--max-steps 0", "--max-steps"),
        ("--save-every 0", "--save-e"),
        ("--grad-clip 0", "--grad-clip"),
        ("--holdout 1", "--holdout"),
        ("--holdout nan", "--holdout"),
        ("--warmup -1", "--warmup"),
        ("--workers -1", "--workers"),
        ("--weight-decay -1", "--weight-decay"),
        ("--dtype int8", "--dtype"),
        ("--colour", "--colour"),
    ],
)
def test_nonsense_is_refused_in_a_line(argv, expected_word, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(argv.split())
    message = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2 and message.count("\n") == 1 and expected_word in message


def test_a_mistake_is_one_line_of_the_first_rank_and_a_bug_is_not_hidden(capsys, monkeypatch):
    def mistaken(ranks):
        raise InputError("x.jsonl: is not there")

    assert plumbing.train.run_stage("sft.py", "cpu", mistaken) == 1
    assert capsys.readouterr().err == "sft.py: x.jsonl: is not there\n"
    monkeypatch.setattr(plumbing.train, "start_ranks", lambda device, patient: ranks_of(2)[1])
    monkeypatch.setattr(Ranks, "close", lambda self: None)
    assert plumbing.train.run_stage("sft.py", "cpu", mistaken) == 1
    assert capsys.readouterr().err == ""
    assert (
        plumbing.train.run_stage("golden.py", "cpu", mistaken, patient=True) == 1
    )  # such ranks make mistakes of their own
    assert capsys.readouterr().err == "golden.py: x.jsonl: is not there\n"
    with pytest.raises(ZeroDivisionError):
        plumbing.train.run_stage("sft.py", "cpu", lambda ranks: 1 / 0)


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert plumbing.train.run_stage("sft.py", "cuda:99", lambda ranks: 0) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--device cuda:99" in err


# ---------------------------------------------------------------- optimizer and learning rate
def test_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [plumbing.train.cosine(step, 100, 1e-3, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert max(rates) == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(5.5e-4) and rates[100] == pytest.approx(1e-4)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert plumbing.train.cosine(0, 5, 1e-3, 0) == pytest.approx(1e-3)
    assert plumbing.train.cosine(0, 3, 1e-3, 20) == pytest.approx(5e-5)  # shorter than its warm-up


def parameters(seed=0):
    torch.manual_seed(seed)
    shapes = {
        "a.weight": (8, 4),
        "a.bias": (8,),
        "b.weight": (4, 8),
        "b.bias": (4,),
        "c.weight": (2, 2),
    }
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def give_gradients(trained, seed):
    torch.manual_seed(seed)
    for parameter in trained.values():
        parameter.grad = torch.randn(parameter.shape)


def take_step(trained, optimizer, lr, seed):
    give_gradients(trained, seed)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def test_one_rank_is_plain_adamw_without_decay_of_vectors():
    trained, plain = parameters(), parameters()
    groups = [
        {
            "params": [p for p in plain.values() if (p.ndim > 1) == decays],
            "weight_decay": 0.1 * decays,
        }
        for decays in (True, False)
    ]
    optimizer = adamw(trained, 0.1, ALONE)
    expected = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(3):
        take_step(plain, expected, 1e-2 / (step + 1), step)
        take_step(trained, optimizer, 1e-2 / (step + 1), step)
    assert all(torch.equal(trained[name], plain[name]) for name in plain)


def sharded_rank(rank, world, port, folder):
    """What a rank of adamw leaves: its moments after two steps, and all weights after two and three."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks, trained = plumbing.train.start_ranks("cpu"), parameters()
    optimizer, left = adamw(trained, 0.1, ranks), {}
    for step in range(3):
        if step == 2:
            left["moments"] = copy.deepcopy(plumbing.train.own_moments(optimizer, trained))
            left["weights"] = {name: p.detach().clone() for name, p in trained.items()}
        take_step(trained, optimizer, 1e-2, step)
    left["after"] = {name: p.detach() for name, p in trained.items()}
    torch.save(left, folder / f"{rank}.pt")
    ranks.barrier()
    ranks.close()


def sharded(world, folder):
    """What `world` real ranks left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        stages.fork_server().Process(target=sharded_rank, args=(rank, world, port, folder))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * world
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def test_state_is_spread_over_the_ranks_and_may_be_taken_over_by_another_number(tmp_path):
    first, second = parts = sharded(2, tmp_path)
    trained = parameters()
    assert not first["moments"].keys() & second["moments"].keys()
    moments = first["moments"] | second["moments"]
    assert moments.keys() == trained.keys()
    loads = [sum(trained[name].numel() for name in part["moments"]) for part in parts]
    assert max(loads) <= 1.3 * min(loads)
    plain = parameters()
    optimizer = adamw(plain, 0.1, ALONE)
    for step in range(2):
        take_step(plain, optimizer, 1e-2, step)
    alone = {name: torch.nn.Parameter(tensor) for name, tensor in first["weights"].items()}
    assert all(torch.equal(alone[name], plain[name]) for name in plain)  # nothing is lost to one rank
    optimizer = adamw(alone, 0.1, ALONE)
    plumbing.train.load_moments(optimizer, alone, moments)
    take_step(alone, optimizer, 1e-2, 2)
    for part in parts:
        assert all(torch.equal(alone[name], part["after"][name]) for name in alone)


def test_there_may_be_more_ranks_than_parameters(tmp_path):
    many, trained = sharded(7, tmp_path), parameters()
    assert sorted(name for part in many for name in part["moments"]) == sorted(trained)
    assert [] in [list(part["moments"]) for part in many]
    assert all(torch.equal(part["after"][name], many[0]["after"][name]) for part in many for name in trained)


# ---------------------------------------------------------------- checkpoints
RUN = {"lr": "0.01", "base": "abc"}


def stepped(seed, steps=1):
    """{name: parameter} and their optimizer, after some steps."""
    trained = parameters(seed)
    optimizer = adamw(trained, 0.1, ALONE)
    for step in range(steps):
        take_step(trained, optimizer, 1e-2, step)
    return trained, optimizer


def save(out, step, state):
    plumbing.train.save_checkpoint(out, ALONE, step, RUN, *state)


def load(out, state, run=RUN):
    return plumbing.train.load_checkpoint(out, run, *state)


def same(one, other):
    return all(torch.equal(one[0][name], p) for name, p in other[0].items())


def test_a_checkpoint_gives_back_all_of_it(tmp_path):
    written, read = stepped(0, 3), stepped(1, 1)
    assert load(tmp_path, stepped(0)) == 0
    save(tmp_path, 3, written)
    assert load(tmp_path, read) == 3
    for trained, optimizer in (written, read):
        take_step(trained, optimizer, 1e-2, 9)
    assert same(read, written)


def test_only_the_newest_whole_checkpoint_counts(tmp_path):
    for step in (1, 10, 9):
        save(tmp_path, step, stepped(step))
    assert stages.checkpoint_of(tmp_path) == 9  # the others went when it was whole
    torn = tmp_path / "resume/step-00000012.tmp"
    torn.mkdir()
    (torn / "moments-0.pt").write_bytes(b"half")
    assert load(tmp_path, stepped(0)) == 9
    killed = tmp_path / "resume/step-00000011"  # before the tidying
    shutil.copytree(tmp_path / "resume/step-00000009", killed)
    (killed / "run.json").write_text(json.dumps({"step": 11, "run": RUN}))
    assert load(tmp_path, stepped(0)) == 11
    save(tmp_path, 12, stepped(0))
    assert stages.checkpoint_of(tmp_path) == 12


def test_a_step_may_be_saved_twice(tmp_path):
    """As where a stop comes right behind a checkpoint, or before a resumed run's first step is done."""
    save(tmp_path, 2, stepped(0, 2))
    save(tmp_path, 2, stepped(0, 2))
    read = stepped(1)
    assert stages.checkpoint_of(tmp_path) == 2 and load(tmp_path, read) == 2
    assert same(read, stepped(0, 2))


@pytest.mark.parametrize("fails_at", range(3))
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, fails_at):
    save(tmp_path, 1, stepped(0))
    whole, calls = plumbing.files.whole, []

    @contextlib.contextmanager
    def failing(path):
        calls.append(path)
        if len(calls) > fails_at:
            path.write_bytes(b"as far as it went")
            raise OSError(28, "No space left on device")
        with whole(path) as temporary:
            yield temporary

    monkeypatch.setattr(plumbing.files, "whole", failing)
    with pytest.raises(OSError):
        save(tmp_path, 2, stepped(0, 2))
    monkeypatch.undo()
    read = stepped(1)
    assert load(tmp_path, read) == 1
    assert same(read, stepped(0))
    save(tmp_path, 2, stepped(0, 2))
    assert stages.checkpoint_of(tmp_path) == 2


def test_another_run_is_refused_by_the_name_of_what_differs(tmp_path):
    save(tmp_path, 1, stepped(0))
    for run, expected_word in (
        ({**RUN, "lr": "0.02"}, "another lr"),
        ({**RUN, "new": "1"}, "another new"),
    ):
        with pytest.raises(InputError, match=expected_word) as error:
            load(tmp_path, stepped(0), run)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_log_forgets_what_came_after_the_checkpoint(tmp_path):
    log = plumbing.files.Log(tmp_path, 0, ALONE)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / 3})
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    plumbing.files.Log(tmp_path, 5, ALONE).write({"step": 6, "loss": 0.1})
    assert [row["step"] for row in stages.read_rows(log.path)] == [1, 2, 3, 4, 5, 6]
    plumbing.files.Log(tmp_path, 3, ALONE).write({"step": 4, "loss": 0.2})
    rows = stages.read_rows(log.path)
    assert (
        [row["step"] for row in rows] == [1, 2, 3, 4]
        and rows[3]["loss"] == 0.2
        and rows[0]["loss"] == 1 / 3
    )
    plumbing.files.Log(tmp_path, 1, ranks_of(2)[1]).write({"step": 9})  # only the first rank writes
    assert len(stages.read_rows(log.path)) == 4
    assert plumbing.files.Log(tmp_path, 0, ALONE).path.read_text() == ""


# ---------------------------------------------------------------- signals
@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(handlers, number):
    stop = Stop()
    assert stop.asked == 0
    os.kill(os.getpid(), number)
    assert stop.asked == number


def test_a_second_interrupt_quits_at_once_and_a_second_sigterm_does_not(handlers, monkeypatch):
    """SIGTERM comes twice where a whole group gets it (timeout, a cluster's scheduler) and torchrun passes it on."""
    codes = []
    monkeypatch.setattr(plumbing.train.os, "_exit", codes.append)
    stop = Stop()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [] and stop.asked == signal.SIGTERM
    stop = Stop()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [128 + signal.SIGINT]


# ---------------------------------------------------------------- the loop, on a model of one linear layer
class Line(torch.nn.Linear):
    """A policy that needs no image: its loss on number x is (w x + b - 1)²."""

    def __init__(self):
        super().__init__(1, 1)
        torch.nn.init.constant_(self.weight, 0.5)
        torch.nn.init.constant_(self.bias, 0.0)


def number_of(row, epoch):
    return row["x"]


def fit_line(
    out, numbers, steps=6, batch=2, validate=dict, ranks=ALONE, make=number_of, loss=None, **more
):
    """A loop as in the stages, on numbers -> exit code, rows replaced, weight and bias."""
    line = Line()
    rows = [{"x": x, "where": f"rows:{k}"} for k, x in enumerate(numbers, 1)]
    trained = dict(line.named_parameters())
    optimizer = adamw(trained, 0.0, ALONE)
    args = argparse.Namespace(
        **{
            "out": out,
            "max_steps": steps,
            "epochs": 1,
            "batch": batch,
            "micro_batch": 1,
            "seed": 0,
            "workers": 0,
            "grad_clip": 1.0,
            "lr": 0.1,
            "warmup": 2,
            "save_every": 100,
            **more,
        }
    )

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run = Run(args, ranks, line, optimizer, trained, rows, make, RUN)
        for step in run.steps():
            n = ranks.sum(len(step.examples))
            for examples in step.micro_batches():
                value = ((line(torch.tensor(examples).view(-1, 1)) - 1) ** 2).sum() / n
                value = loss(value, examples) if loss else value
                value.backward()
                step.log(loss=value, seen=len(examples) / n)
            step.finish()
            if step.saves:
                step.row |= validate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return run.exit_code, run.count_replaced(), [p.item() for p in line.parameters()]


def test_the_loop_logs_sums_over_weights_and_validates_at_checkpoints(tmp_path):
    asked = []
    code, replaced, _ = fit_line(
        tmp_path,
        [1.0, 2.0, 3.0],
        batch=3,
        save_every=2,
        steps=5,
        lr=1e-12,
        validate=lambda: asked.append(1) or {"held_out_loss": 7.0},
    )
    rows = stages.steps_of(tmp_path)
    assert code == 0 and len(asked) == 3 and replaced == 0
    expected_loss = sum((0.5 * x - 1) ** 2 for x in (1, 2, 3)) / 3
    assert all(
        row["loss"] == pytest.approx(expected_loss) and row["seen"] == 1 for row in rows.values()
    )
    assert [step for step, row in rows.items() if "held_out_loss" in row] == [2, 4, 5]
    expected_norm = math.hypot(
        *(
            2 * sum((0.5 * x - 1) * k for x, k in zip((1, 2, 3), f)) / 3
            for f in ((1, 2, 3), (1, 1, 1))
        )
    )
    assert rows[1]["grad_norm"] == pytest.approx(expected_norm)
    assert rows[1]["learning_rate"] == 0.5e-12 and stages.checkpoint_of(tmp_path) == 5


def test_epochs_count_rows_and_max_steps_overrides_them_upwards_too(tmp_path):
    for epochs, max_steps, expected_steps in ((2.0, None, 4), (0.5, None, 1), (1.0, 7, 7)):
        out = tmp_path / str(expected_steps)
        fit_line(out, [1.0] * 5, batch=3, epochs=epochs, steps=max_steps)
        assert len(stages.steps_of(out)) == expected_steps


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, bad):
    def loss(value, examples):
        return value * bad if calls.pop(0) else value

    calls = [0, 0, 0, 1] + [0] * 8  # one of the second step's two micro-batches
    code, _, after = fit_line(tmp_path / "a", [1.0, 2.0], steps=2, loss=loss)
    assert code == 0
    calls = [0, 0, 0, 0]
    lines = fit_line(tmp_path / "b", [1.0, 2.0], steps=2, loss=loss)[2]
    expected = torch.load(tmp_path / "a/resume/step-00000002/trained.pt")
    assert after == [p.item() for p in expected.values()] != lines
    one_step = fit_line(
        tmp_path / "c", [1.0, 2.0], steps=2, loss=lambda v, e: v
    )  # what step 1 alone leaves
    moments = torch.load(tmp_path / "a/resume/step-00000002/moments-0.pt")
    assert all(m["step"] == 1 for m in moments.values()) and one_step[2] == lines
    logged = stages.read_rows(tmp_path / "a/log.jsonl")
    assert [row["loss"] is None for row in logged] == [False, True]  # JSON has no NaN


def test_several_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
    def loss(value, examples):
        seen.append(1)
        return value * (
            float("nan") if len(seen) > 4 and len(seen) != 9 else 1.0
        )  # one good step in between

    seen = []
    with pytest.raises(InputError, match=f"{plumbing.train.MAX_SKIPPED} steps in a row") as error:
        fit_line(tmp_path, [1.0], steps=50, batch=1, save_every=2, loss=loss)
    message = str(error.value)
    assert "\n" not in message and "resume" in message and "--lr" in message
    assert len(seen) == 9 + plumbing.train.MAX_SKIPPED and f"step {len(seen)}" in message
    assert all(
        torch.isfinite(p).all()
        for p in torch.load(sorted(tmp_path.glob("resume/*/trained.pt"))[0]).values()
    )


def test_rows_that_cannot_be_made_are_replaced_reported_and_counted(tmp_path, capsys):
    def make(row, epoch):
        if row["x"] < 0:
            raise InputError(f"{row['x']}.png: damaged")
        seen.append(row["x"])
        return row["x"]

    seen = []
    code, replaced, _ = fit_line(tmp_path / "a", [1.0, -2.0, 3.0], batch=3, steps=3, make=make)
    err = capsys.readouterr().err
    assert code == 0 and "replaced: rows:2: -2.0.png: damaged" in err
    assert replaced == 1  # a row, however often it comes up
    assert err.count("-2.0.png: damaged") == 1
    assert sorted(seen) == [1.0] * 3 + [3.0] * 6  # by the next row in the file
    assert all(row["seen"] == 1 for row in stages.steps_of(tmp_path / "a").values())
    expected_loss = ((0.5 - 1) ** 2 + 2 * (1.5 - 1) ** 2) / 3
    assert stages.steps_of(tmp_path / "a")[1]["loss"] == pytest.approx(expected_loss)


def test_a_run_that_finds_no_image_any_more_stops(tmp_path):
    """As where a disk is gone: not a single step is made of nothing, weight decay included."""

    def make(row, epoch):
        if epoch > 1:
            raise InputError("x.png: no such image file")
        return row["x"]

    with pytest.raises(InputError, match="step 3: not one image can be read") as error:
        fit_line(tmp_path, [1.0, 2.0], steps=50, make=make, save_every=2)
    assert "\n" not in str(error.value)
    (checkpoint,) = (tmp_path / "resume").iterdir()
    assert {m["step"].item() for m in torch.load(checkpoint / "moments-0.pt").values()} == {2}


def test_a_batch_smaller_than_the_number_of_ranks_is_refused(tmp_path):
    with pytest.raises(InputError, match="--batch 2 is less than the 3 processes"):
        fit_line(tmp_path, [1.0, 2.0, 3.0], batch=2, ranks=ranks_of(3)[0])


def stopped(out, number, at, workers=0, **more):
    """A line whose at-th micro-batch comes with a signal to this process."""

    def loss(value, examples):
        seen.append(1)
        if len(seen) == at:
            os.kill(os.getpid(), number)
        return value

    seen = []
    return fit_line(out, [float(k) for k in range(5)], loss=loss, workers=workers, **more)


@pytest.mark.parametrize("at", [1, 2, 5, 6, 7, 12])
@pytest.mark.parametrize("number, expected_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_at_any_micro_batch_saves_the_last_step_boundary(
    tmp_path, number, expected_code, at
):
    """Two micro-batches a step, a checkpoint every second step: also right after one, and before the first step."""
    code, _, _ = stopped(tmp_path / "a", number, at, save_every=2)
    assert code == expected_code
    assert (
        stages.checkpoint_of(tmp_path / "a")
        == len(stages.steps_of(tmp_path / "a"))
        == (at - 1) // 2
    )
    code, _, after = stopped(tmp_path / "a", number, 0, save_every=2)
    assert (code, after) == (0, stopped(tmp_path / "b", number, 0, save_every=2)[2])
    assert stages.steps_of(tmp_path / "a") == stages.steps_of(tmp_path / "b")


def test_a_stop_while_validating_is_heeded(tmp_path):
    def validate():
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return {"held_out_loss": 1.0}

    sent = []
    code, _, _ = fit_line(tmp_path, [1.0], steps=6, save_every=2, validate=validate)
    assert (
        code == 143 and stages.checkpoint_of(tmp_path) == 2 and len(stages.steps_of(tmp_path)) == 2
    )
    assert (
        fit_line(tmp_path, [1.0], steps=6, save_every=2)[0] == 0
        and len(stages.steps_of(tmp_path)) == 6
    )


# ---------------------------------------------------------------- memory
def test_the_estimate_of_a_full_size_card_is_that_of_the_design():
    with torch.device("meta"):
        model = QwenVL(Config())
    model.to(torch.bfloat16)
    adapters.attach(model, "caption")
    for name in adapters.names_of(model, "caption"):
        assert model.get_parameter(name).dtype == torch.float32
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    six, two = (model.training_bytes(trained, world, 1) / 2**30 for world in (6, 2))
    # 17.99 base, 1.25 adapters, 1.25 gradients, 2.50 moments over the ranks, and activations
    without_activations = 17.99 + 1.25 + 1.25 + 2.50 / 6
    assert without_activations + 1 < six < 22.5
    assert two - six == pytest.approx(2.5 * (1 / 2 - 1 / 6), abs=0.01)
    assert 1.2 < model.training_bytes(trained, 6, 2) / 2**30 - six < 1.5
