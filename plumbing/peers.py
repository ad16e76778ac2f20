"""bench.py --against: next to other people's code, on a random Qwen2.5-VL and one image of 400
tokens, then of 1,200.

Each contestant has a process of its own, and they take turns. Images are prepared beforehand.
Memory is the peak above the loaded model.

trl         forward and backward of a pair, with gradient checkpointing: captions of 60 tokens
            packed | as two rows | by TRL's DPOTrainer with loss_type ["sigmoid", "sft"]. It trains
            LoRA of the size of our adapters: all-linear, as in TRL's example for vision models, or
            only where our adapters stand. It runs the reference in every step, since it caches
            none for images. Here that is done once for each caption, and timed apart.
generate    8 captions of 64 tokens on one prefix | by model.generate(num_return_sequences=8)
"""
import functools
import importlib.util
import math
import multiprocessing
import random
import re
import statistics
import tempfile
import time
import warnings
from types import SimpleNamespace

import tokenizers
import torch
import transformers as tf
from PIL import Image
from torch import nn

from plumbing import weights
from plumbing.errors import InputError
from plumbing.speed import peak_memory, reset_peak, versions, wait_for

NEEDED = {"trl": ("torchvision", "trl", "peft", "accelerate", "datasets"),
          "generate": ("torchvision",)}
# Tokens of a prompt's text, of a caption that is trained on, its end token among them, and of one
# that is written.
PROMPT, CAPTION, SAMPLE = 20, 60, 64
VOCABULARY = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PIXELS = 28             # the side of an image token: 2 × 2 patches of 14
# Where TRL trains LoRA: as in its example for vision models, or behind attention and MLP of every
# block of both towers, where adapters stand.
ALL_LINEAR, AS_ADAPTERS = "all-linear", r".*\.(o_proj|attn\.proj|down_proj)"


# ---------------------------------------------------------------- a base
def make_tokenizer():
    """Byte-level BPE of VOCABULARY tokens, learned from random words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 6)))
             for _ in range(9000)]
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = letters, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), initial_alphabet=letters.alphabet(),
        show_progress=False)
    bpe.train_from_iterator([" ".join(words), "user assistant Yes No a b c d " * 99], trainer)
    bpe.add_special_tokens(list(SPECIAL))
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                      pad_token="<|endoftext|>")


def write_base(folder, hidden, layers):
    """A random Qwen2.5-VL as a folder -> how many parameters, and words that are one token each."""
    tokenizer = make_tokenizer()
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    depth = max(1, layers // 2)
    text = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers,
            "intermediate_size": hidden * 43 // 8, "num_attention_heads": hidden // 64,
            "num_key_value_heads": max(1, hidden // 256), "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [8, 12, 12]},
            "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"], "bos_token_id": None}
    vision = {"depth": depth, "hidden_size": hidden // 2, "num_heads": hidden // 128,
              "intermediate_size": hidden * 4 // 3, "out_hidden_size": hidden,
              "fullatt_block_indexes": [depth - 1]}
    torch.manual_seed(0)
    tf.utils.logging.disable_progress_bar()
    model = tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"]))
    model.save_pretrained(folder)
    tf.Qwen2_5_VLProcessor(tf.Qwen2VLImageProcessor(), tokenizer, tf.Qwen2VLVideoProcessor(),
                           chat_template=TEMPLATE).save_pretrained(folder)
    words = [token[1:] for token in sorted(tokenizer.get_vocab()) if token[0] == "Ġ"]
    return model.num_parameters(), [word for word in words if word.isalpha()]


def picture(n_tokens):
    """Noise that becomes n image tokens, as near to a square as they allow."""
    rows = max(n for n in range(1, math.isqrt(n_tokens) + 1) if n_tokens % n == 0)
    shape = rows * PIXELS, n_tokens // rows * PIXELS, 3
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return Image.fromarray((noise * 255).byte().numpy())


# ---------------------------------------------------------------- contestants take turns
class Turns:
    """`with turns:` waits for this contestant's turn, times what is inside, and reports it."""

    def __init__(self, connection, device):
        self.connection, self.device = connection, torch.device(device)
        self.at_rest = 0        # bytes in use between turns
        self.facts = {}         # what else to report

    def __enter__(self):
        self.connection.send({})
        is_warm = self.connection.recv()
        if is_warm and not self.at_rest:
            self.at_rest = reset_peak(self.device)
        self.began = time.perf_counter()

    def __exit__(self, kind, error, traceback):
        if error is None:
            wait_for(self.device)
            seconds = time.perf_counter() - self.began
            megabytes = (peak_memory(self.device) - self.at_rest) / 1e6
            self.connection.send({**self.facts, "seconds": seconds, "megabytes": megabytes})


def contestant(run, job, connection):
    """A contestant's process: run(job, turns) takes turns until it is ended."""
    import torch._dynamo  # an optimizer would import it in the first turn

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", FutureWarning)
    tf.utils.logging.disable_progress_bar()
    try:
        run(job, Turns(connection, job.device))
    except InputError as error:
        connection.send({"error": str(error)})
    except (EOFError, BrokenPipeError):         # the race is over
        pass


def message_of(name, connection):
    """The next message of a contestant. InputError where it has failed."""
    try:
        message = connection.recv()
    except (EOFError, OSError):
        raise InputError(f"the process of {name} has failed") from None
    if "error" in message:
        raise InputError(f"{name}: {message['error']}")
    return message


def race(contestants, job):
    """{name: (run, parts)} -> {name: {part: [reports]}}, one of each round; the first is warm-up.

    Each runs in a process of its own, and only while the others wait. A part is one turn.
    """
    context = multiprocessing.get_context("spawn")
    processes, connections = [], {}
    reports = {name: {part: [] for part in parts} for name, (_, parts) in contestants.items()}
    try:
        for name, (run, _) in contestants.items():
            connections[name], theirs = context.Pipe()
            process = context.Process(target=contestant, args=(run, job, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            message_of(name, connections[name])
        for number in range(job.rounds + 1):
            for name, parts in reports.items():
                for part in parts:
                    connections[name].send(number > 0)
                    parts[part].append(message_of(name, connections[name]))
                    message_of(name, connections[name])     # it has tidied up and waits again
    finally:
        for connection in connections.values():
            connection.close()
        for process in processes:
            process.join()
    return reports


# ---------------------------------------------------------------- the others
def open_plain(job):
    """-> transformers' model and processor, and the prompt as text."""
    processor = tf.AutoProcessor.from_pretrained(job.folder)
    hf = tf.AutoModelForImageTextToText.from_pretrained(job.folder, dtype=job.dtype)
    hf = hf.to(job.device)
    for parameter in hf.parameters():           # what is mapped from a file is read now
        parameter.data = parameter.data.clone()
    content = [{"type": "image"}, {"type": "text", "text": job.request}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                           add_generation_prompt=True)
    return hf, processor, prompt


def rank_of(hf, places):
    """The rank at which LoRA in some places has about as many numbers as adapters of width ÷ 8."""
    layers = {name: layer for name, layer in hf.named_modules() if isinstance(layer, nn.Linear)
              and layer is not hf.get_output_embeddings()}
    widths = [layer.out_features for name, layer in layers.items()
              if re.fullmatch(AS_ADAPTERS, name)]
    n_adapters = sum((2 * width + 1) * (width // 8) + width for width in widths)
    chosen = [layer for name, layer in layers.items()
              if places == ALL_LINEAR or re.fullmatch(places, name)]
    return round(n_adapters / sum(layer.in_features + layer.out_features for layer in chosen))


def train_trl(places, job, turns):
    """TRL's DPOTrainer on the pair; a turn is its training_step, forward and backward."""
    from datasets import Dataset  # here, since `generate` does without
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    hf, processor, prompt = open_plain(job)
    chosen, rejected = (text + processor.tokenizer.eos_token for text in job.captions)
    row = {"images": [picture(job.n_tokens)], "prompt": prompt, "chosen": chosen,
           "rejected": rejected}
    steps = job.rounds + 2
    config = DPOConfig(
        output_dir=f"{job.folder}/trl", loss_type=["sigmoid", "sft"], beta=job.beta,
        max_length=None, max_steps=steps, per_device_train_batch_size=1, bf16=False,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=job.device == "cpu", save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True)
    trainer = DPOTrainer(
        hf, args=config, processing_class=processor, train_dataset=Dataset.from_list([row] * steps),
        peft_config=LoraConfig(r=rank_of(hf, places), target_modules=places))
    turns.facts["trained"] = sum(p.numel() for p in hf.parameters() if p.requires_grad)
    trainer.training_step = functools.partial(in_turn, turns, trainer.training_step)
    trainer.train()


def in_turn(turns, training_step, model, inputs, *rest):
    turns.facts["tokens"] = inputs["input_ids"].numel()
    with turns:
        loss = training_step(model, inputs, *rest)
        turns.facts["loss"] = loss.item()
    return loss


def generate(job, turns):
    """The captions of an image by transformers' own generate."""
    hf, processor, prompt = open_plain(job)
    inputs = processor(text=[prompt], images=[[picture(job.n_tokens)]], return_tensors="pt")
    inputs = inputs.to(job.device, job.dtype)
    never = list(processor.tokenizer.added_tokens_decoder)      # all special, also the end token
    n = turns.facts["tokens"] = inputs["input_ids"].shape[1]
    hf.eval()
    while True:
        with turns:
            ids = hf.generate(**inputs, num_return_sequences=job.n_samples, do_sample=True,
                              top_k=0, max_new_tokens=job.sample, min_new_tokens=job.sample,
                              suppress_tokens=never)
        assert ids.shape == (job.n_samples, n + job.sample)


# ---------------------------------------------------------------- figures
def summary(parts):
    """{part: reports} -> a contestant's median seconds, peak memory and other facts."""
    *_, last_part = parts.values()
    seconds = {part: statistics.median(report["seconds"] for report in reports[1:])
               for part, reports in parts.items()}
    facts = {"loss": last_part[0]["loss"]} if "loss" in last_part[0] else {}    # the warm-up's
    return {**last_part[-1], **facts, "seconds": seconds}


def ratios(ours, other):
    """How many times as long, all parts and the last one alone, and how much memory."""
    *_, (part, ours_last) = ours["seconds"].items()
    return {"all seconds": sum(other["seconds"].values()) / sum(ours["seconds"].values()),
            f"{part} seconds": other["seconds"][part] / ours_last,
            "megabytes": other["megabytes"] / ours["megabytes"]}


def show(n_tokens, figures):
    """Print the figures of one size of image, the first contestant's first."""
    print(f"image of {n_tokens} tokens")
    ours = next(iter(figures.values()))
    for name, row in figures.items():
        parts = "   ".join(f"{part} {s:7.3f} s" for part, s in row["seconds"].items())
        facts = [f"{row['tokens']} tokens"]
        facts += [f"{row['trained'] / 1e6:.2f} M trained, first loss {row['loss']:.4f}"
                  ] if "loss" in row else []
        print(f"  {name:15} {parts:>36}   + {row['megabytes']:5.0f} MB   {', '.join(facts)}")
    for name, row in list(figures.items())[1:]:
        times = "   ".join(f"{key} {x:5.2f}" for key, x in ratios(ours, row).items())
        print(f"  {name} / {next(iter(figures))}: {times}", flush=True)


def compare(args, contestants, beta, n_samples):
    """Race bench.py's contestants {name: (run, parts)} against those of --against, and print it.

    -> versions, and figures {image tokens: {name: figures}}. InputError where a package is missing.
    """
    needed = NEEDED[args.against]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise InputError(f"--against {args.against} needs {', '.join(missing)}; pip install "
                         f"{' '.join(missing)}")
    if args.against == "generate":
        contestants["generate"] = (generate, ("captions",))
    else:
        contestants["trl"] = (functools.partial(train_trl, ALL_LINEAR), ("step",))
        contestants["trl, our places"] = (functools.partial(train_trl, AS_ADAPTERS), ("step",))
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        numbers, words = write_base(folder, args.hidden, args.layers)
        print(f"Qwen2.5-VL of {numbers / 1e6:.1f} M parameters, {args.device}, {args.threads} "
              "threads", flush=True)
        texts = [words[i::3] for i in range(3)]
        job = SimpleNamespace(
            folder=folder, device=args.device, threads=args.threads, rounds=args.rounds, beta=beta,
            dtype=weights.usual_dtype(weights.usable_device(args.device)), n_samples=n_samples,
            sample=SAMPLE, request=" ".join(texts[0][:PROMPT]),
            captions=["".join(f" {word}" for word in text[:CAPTION - 1]) for text in texts[1:]])
        for job.n_tokens in args.image_tokens:
            job.picture = picture(job.n_tokens)
            reports = race(contestants, job)
            figures[job.n_tokens] = {name: summary(parts) for name, parts in reports.items()}
            show(job.n_tokens, figures[job.n_tokens])
    packages = ("torch", "transformers", *needed)
    return {"versions": versions(packages), "figures": figures}
