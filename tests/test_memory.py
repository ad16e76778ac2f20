"""Memory of a training step: said beforehand, measured, simulated at full size; and no wait for a GPU inside."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapters
import dpo
import plumbing.data
from base import open_base
from model import Config, QwenVL, VisionConfig
from plumbing import int8, memory
from plumbing.train import Ranks, Run, Step, adamw

EOS, START, SOFT = 0, 2900, 2950
BOTH, LANGUAGE = ("vision", "language"), ("language",)
GiB = 2**30
FULL = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "vision": vars(VisionConfig()),
}


def qwen(dtype=torch.float32, where=BOTH, quantize=False, vision=(), **text):
    """A Qwen-VL on the meta device, with fresh adapters, ready to train."""
    sizes = {"image_size": 112, "width": 128, "layers": 4, "heads": 4, "output_dim": 256}
    sizes |= {"n_queries": 16, "image_start_id": START, **dict(vision)}
    numbers = {"vocab_size": 3000, "hidden_size": 256, "num_hidden_layers": 2, "kv_channels": 64}
    numbers |= {"num_attention_heads": 4, "intermediate_size": 1376, **text}
    with torch.device("meta"):
        model = QwenVL(Config(**numbers, visual=VisionConfig(**sizes)))
    if quantize:
        int8.replace(model, [model.transformer.wte, model.lm_head])
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    model.tokenizer = SimpleNamespace(soft_prompt_id=SOFT, eos_id=EOS)
    model.to("meta")  # the table of positions comes from NumPy
    adapters.attach(model, "caption", where)
    model.train().checkpointing = True
    return model


def row(model, *captions):
    """Six views, a request of 8 tokens, and captions of so many tokens, packed."""
    v = model.config.visual
    span = [v.image_start_id, *[v.image_start_id + 2] * v.n_queries, v.image_start_id + 1]
    packed = dpo.pack(span * 6 + [1] * 8, [[1] * n for n in captions])
    return {**packed, "views": torch.zeros(6, 3, v.image_size, v.image_size)}


def trained_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def simulated_peak(model, world, rows):
    def micro_batch():
        dpo.caption_logps(model, rows, EOS, "cpu").sum().backward()

    with memory.simulated(model):
        return memory.training_peak(model, world, micro_batch)


# ---------------------------------------------------------------- counting
def test_live_bytes_are_those_of_tensors_that_exist():
    with memory.Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[3:]  # no storage of its own
        assert live.now == 4000
        c = b + 1
        assert live.now == 4000 + 2800
        del c
        a = a.double()
        assert live.now == 4000 + 8000 == live.peak  # b holds the old one
        del a, b
        assert live.now == 0 and live.peak == 12000


def test_a_simulation_peaks_like_the_step_itself():
    model = open_base("assets/toy")
    adapters.attach(model, "caption", reduction=4)
    model.train().checkpointing = True
    example = {
        **dpo.pack(model.caption_prompt(1), [[5] * 9, [5] * 7]),
        "views": torch.zeros(1, 3, 32, 32),
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def micro_batch():
        dpo.caption_logps(model, [example], EOS, "cpu").sum().backward()

    measured = memory.training_peak(model, 2, micro_batch)
    with memory.simulated(model):
        assert memory.training_peak(model, 2, micro_batch) == measured
    assert model.training_bytes(trained_of(model), 2, 1, len(example["ids"]), 1) == pytest.approx(
        measured, rel=0.05
    )
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# ---------------------------------------------------------------- estimates
BF16 = torch.bfloat16
SIZES = {
    "bf16, six ranks": (6, 1, {"dtype": BF16}),
    "rows": (6, 3, {}),
    "language alone": (1, 2, {"where": LANGUAGE}),
    "a large ViT, seen only": (
        1,
        1,
        {"where": LANGUAGE, "vision": {"image_size": 224, "width": 256}},
    ),
    "wide MLP": (1, 2, {"intermediate_size": 4096}),
    "deep": (1, 1, {"dtype": BF16, "num_hidden_layers": 6}),
    "int8": (6, 1, {"dtype": BF16, "quantize": True}),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_estimate_is_within_five_percent_of_the_peak(size, monkeypatch):
    monkeypatch.setitem(int8.AT_ONCE, "cpu", int8.AT_ONCE["cuda"])
    world, n_rows, changes = SIZES[size]
    model = qwen(**changes)
    example = row(model, 60, 50)
    said = model.training_bytes(trained_of(model), world, n_rows, len(example["ids"]))
    peak = simulated_peak(model, world, [example] * n_rows)
    print(f"{size}: estimate {said / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB")
    assert said == pytest.approx(peak, rel=0.05)


def test_so_it_is_for_a_base_of_transformers():
    model = open_base("assets/toy-qwen3-vl", BF16)
    adapters.attach(model, "caption")
    model.train().checkpointing = True
    look = model.prompts.blank(6)
    example = {**dpo.pack(model.caption_prompt(6), [[5] * 20] * 2), "views": look}
    said = model.training_bytes(trained_of(model), 6, 1, len(example["ids"]))
    assert said == pytest.approx(simulated_peak(model, 6, [example]), rel=0.05)


@pytest.mark.parametrize("quantize, limit", [(False, 22.5), (True, 16.0)])
def test_a_dpo_row_of_qwen_vl_fits_a_card_of_24_gb(quantize, limit):
    """By the estimate, which the test above holds against simulations."""
    model = qwen(BF16, quantize=quantize, **FULL)
    length = len(row(model, 300, 300)["ids"])
    said = model.training_bytes(trained_of(model), 6, 1, length) / GiB
    print(f"int8 {quantize}: {length} tokens, {said:.2f} GiB")
    assert 10 < said < limit


# ---------------------------------------------------------------- inside a step
class Waits(TorchDispatchMode):
    """Lists what makes a host wait for a device, played by "meta": numbers asked of a tensor there, an index or a mask
    whose True it must count, and copies in either direction that block. A copy to the host gives ones."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if tensor.is_meta]
        if (
            name == "_to_copy"
            and there
            and torch.device(kwargs.get("device") or "meta").type == "cpu"
        ):
            self.found.append("read")
            return torch.ones(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
        comes = not there and str(kwargs.get("device")) == "meta" and tensors
        if name == "_to_copy" and comes and not kwargs.get("non_blocking"):
            self.found.append("blocking copy")
        if there and name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.found.append(name)
        if there and name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            if any(not index.is_meta or index.dtype == torch.bool for index in indices):
                self.found.append("mask or index from the host")
        return func(*args, **kwargs)


def dpo_micro_batch(model, ranks, step, loss):
    args = SimpleNamespace(loss=loss, beta=0.1, ce=1.0)
    kl = dpo.mismatched_ratio(model, ranks, step.examples) if loss == "kto" else None
    for examples in step.micro_batches():
        pairs = dpo.pair_up(dpo.caption_logps(model, examples, EOS, ranks.device), examples)
        losses, figures = dpo.pair_losses(args, pairs, kl)
        value = pairs.share @ losses
        value.backward()
        step.log(loss=value, **{name: pairs.share @ x for name, x in figures.items()})


def sft_micro_batch(model, ranks, step, loss):
    for examples in step.micro_batches():
        value = -model(**plumbing.data.collate(examples, EOS)).sum()
        value.backward()
        step.log(loss=value)


def examples_of(model, micro_batch):
    """Two micro-batches of two rows, of different lengths."""
    found = []
    for n in (9, 7, 8, 8):
        example = row(model, n, n + 2)
        prompt = example["ids"][: example["branch"].index(1)]
        if micro_batch is sft_micro_batch:
            slots = [SOFT] * len(model.soft_prompts["caption"].vectors)
            ids = [*prompt, *slots, *[1] * n]
            example = {"ids": ids, "n_prompt": len(ids) - n, "views": example["views"]}
        else:
            example |= {"drawn": [0], "lengths": [n, n + 2], "ref_chosen": -3.0}
            example |= {"ref_rejected": [-4.0], "ref_mismatched": -5.0}
            example |= {"mismatched": dpo.pack(prompt, [[1] * 5])}
        found.append(example)
    return [found[:2], found[2:]]


def a_run(model, ranks):
    args = SimpleNamespace(batch=4, lr=1e-3, warmup=0, grad_clip=1.0, max_steps=9, out="")
    trained = trained_of(model)
    run = Run(args, ranks, model, adamw(trained, 0.1, ranks), trained, [], None, {})
    run.stop = SimpleNamespace(asked=0)
    return run


@pytest.mark.parametrize(
    "micro_batch, loss",
    [(dpo_micro_batch, "dpo"), (dpo_micro_batch, "kto"), (sft_micro_batch, None)],
)
def test_a_step_waits_for_the_device_once(micro_batch, loss):
    """Forward, loss, backward, clipping, log and update of two micro-batches: where the step's figures are read."""
    model, ranks = qwen(), Ranks(0, 1, torch.device("meta"))
    if micro_batch is sft_micro_batch:
        vectors = torch.zeros(3, 256, device="meta")
        model.soft_prompts["caption"] = adapters.SoftPrompt(vectors)
        model.soft_prompts.stack = ("caption",)
    parts, run = examples_of(model, micro_batch), a_run(model, ranks)
    with Waits() as waits:
        step = Step(run, 0, parts, 0.0)
        micro_batch(model, ranks, step, loss)
        assert waits.found == []
        step.finish()
    assert waits.found == ["read"] and step.row["loss"] == step.row["grad_norm"] == 1


def test_waits_are_found():
    there, host = torch.zeros(4, device="meta"), torch.tensor([1, 2])
    with Waits() as waits:
        host.to("meta", non_blocking=True)
        assert waits.found == []
        there.tolist()
        host.to("meta")
        there[host]
        there[there == 0] = 1.0
    assert waits.found == ["read", "blocking copy", *["mask or index from the host"] * 2]


def test_steps_allocate_nothing_that_grows():
    """Bytes alive after a step are those after the second one, when AdamW has its moments."""
    model, ranks = open_base("assets/toy"), Ranks(0, 1, torch.device("cpu"))
    adapters.attach(model, "caption")
    model.train().checkpointing = True
    prompt, alive = model.caption_prompt(1), []
    run = a_run(model, ranks)
    with memory.Live() as live:
        for number in range(5):
            rows = []
            for n in (4, 6 + number % 2):
                packed = dpo.pack(prompt, [[5] * n, [6] * n])
                views = torch.zeros(1, 3, 32, 32)
                rows.append({**packed, "views": views, "drawn": [0], "lengths": [n, n]})
                rows[-1] |= {"ref_chosen": -3.0, "ref_rejected": [-4.0]}
            step = Step(run, number, [rows], 0.0)
            dpo_micro_batch(model, ranks, step, "dpo")
            step.finish()
            del step, rows, packed, views
            gc.collect()
            alive.append(live.now)
    assert alive[0] > 0 and len(set(alive[1:])) == 1, alive


def full_size():
    """A DPO row of Qwen-VL on a card of six, estimated and simulated: python -m tests.test_memory, minutes."""
    int8.AT_ONCE["cpu"] = int8.AT_ONCE["cuda"]
    for quantize in (False, True):
        model = qwen(BF16, quantize=quantize, **FULL)
        example = row(model, 300, 300)
        said = model.training_bytes(trained_of(model), 6, 1, len(example["ids"]))
        stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        print(
            f"int8 {quantize}: {stored / GiB:.2f} GiB of weights, estimate {said / GiB:.2f} GiB, "
            f"peak {simulated_peak(model, 6, [example]) / GiB:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    full_size()
