"""Decoding: one image prefix, many samples of it or many questions about it.

The prefix (six views are 1548 tokens) is computed and kept once per image. Each sample adds a short
tail to the key/value cache, and a decode step attends to both; questions are packed behind the
prefix in one forward. A step draws its tokens on the device and has the same shape at every token,
so that it can be compiled once and repeated without the host (`next_tokens`). The random numbers of
a sample depend on (seed, image name, sample index) alone, so neither the batch nor the number of
cards changes them.
"""
import functools
import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from chunking import seen_by
from plumbing import data, files
from plumbing.compiled import WORTH_COMPILING, Compiled
from plumbing.errors import InputError
from plumbing.parts import evaluating
from plumbing.positions import ntk_alpha
from plumbing.slots import Slots, room_left, timed
from plumbing.tokenizer import yes_and_no
from plumbing.weights import enough_memory

MAX_PACKED = 8192       # tokens of one packed row of questions; its mask takes the square in bytes


# ---------------------------------------------------------------- one step after another
def prefill(model, ids, images, mask, samples, room):
    """Run the prefixes -> a filled cache, and the logits (I·samples, vocab) of the first token."""
    cache = model.cache(samples, room)
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    logits = model(ids, images, mask, positions=last, cache=cache)[:, 0]      # (I, vocab)
    return cache, logits.repeat_interleave(samples, dim=0)


def decode(model, cache, tokens):
    """Append one token (B,) to each sample -> the logits (B, vocab) of the next."""
    cache.reach()
    logits = decode_there(model, cache, tokens)
    cache.used += 1
    return logits


def decode_there(model, cache, tokens):
    """What `decode` does on the device."""
    logits = model(tokens[:, None], cache=cache)[:, 0]
    cache.now.add_(1).clamp_(max=cache.room)
    return logits


def next_tokens(model, cache, rows, how, is_end):
    """The next token of every sample: decode the last one, and draw. The step that is compiled.

    rows: "tokens" and "u", both (I·n, room + 1), a token and a random number for each moment. All
    of it happens on the device, in tensors that keep their place, and the host waits for nothing.
    """
    last = rows["tokens"].gather(1, cache.now.repeat_interleave(how.n)[:, None])[:, 0]
    draw(decode_there(model, cache, last), cache, rows, how, is_end)


def draw(logits, cache, rows, how, is_end):
    """Put the token of the moment cache.now in its place."""
    now = cache.now.repeat_interleave(how.n)[:, None]                         # (I·n, 1)
    if how.min_tokens:
        logits = logits.masked_fill((now < how.min_tokens) & is_end, float("-inf"))
    u = rows["u"].gather(1, now)[:, 0]
    tokens = choose(logits, u, how.temperature, how.top_p)                    # (I·n,)
    rows["tokens"].scatter_(1, now, tokens[:, None])


def compiles(model, wanted, n_images):
    """Whether decode steps are to be compiled: as wanted, or None: on a GPU, if it is worth it.

    InputError for a base whose layers have a state, and therefore a cache that grows.
    """
    if wanted and not model.packs:
        raise InputError(f"--compile: {model.base} has layers with a state, whose steps have no "
                         "fixed shape; leave it out")
    if wanted is None:
        wanted = model.device.type == "cuda" and n_images >= WORTH_COMPILING
    return wanted and model.packs


@functools.cache
def compiled_step(device):
    """`next_tokens`, compiled when it first runs."""
    return Compiled(next_tokens, device)


# ---------------------------------------------------------------- greedy
def greedy(model, ids, images, mask=None, max_new_tokens=16, eos_id=None):
    """Append the most likely token again and again -> new ids only (B, at most max_new_tokens).

    ids, images, mask as in the model's forward, with padding on the left, for which a base of
    transformers has no room: there, rows must be equally long. Once a row has reached
    eos_id it is filled with it; eos_id None never stops early.
    """
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("padding must be on the left: every row's last token is continued")
    new = ids.new_zeros(len(ids), 0)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    with evaluating(model):
        while new.shape[1] < max_new_tokens and not bool(done.all()):
            if new.shape[1] == 0:
                cache, logits = prefill(model, ids, images, mask, 1, max_new_tokens)
            else:
                logits = decode(model, cache, new[:, -1])
            token = logits.argmax(-1)
            if eos_id is not None:
                token = token.masked_fill(done, eos_id)
                done = done | (token == eos_id)
            new = torch.cat([new, token[:, None]], dim=1)
    return new


# ---------------------------------------------------------------- samples
def uniforms(seed, name, index, count):
    """`count` numbers in [0, 1) of one sample of one image, the same on every machine."""
    key = hashlib.sha256(f"{seed}\0{name}\0{index}".encode("utf-8", "surrogatepass")).digest()
    philox = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    return np.random.Generator(philox).random(count)


def choose(logits, u, temperature, top_p):
    """Draw a token per row: logits (B, vocab), u (B,) in [0, 1) -> ids (B,).

    top_p < 1 is nucleus sampling (https://arxiv.org/abs/1904.09751, eq. 2 and 3): of the tokens in
    order of probability, keep the fewest that together hold at least top_p. Temperature 0 takes the
    most likely token. u is looked up in the cumulative probabilities in vocabulary order, so that a
    rounding error in the logits changes the token only where u falls next to a border.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # (B, vocab)
    if top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        held_before = ordered.cumsum(-1) - ordered
        dropped = held_before >= top_p          # the token that crosses top_p stays
        p = p.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), 0.0)
    reach = p.cumsum(-1)
    at = torch.searchsorted(reach, u[:, None] * reach[:, -1:], right=True)
    return at.clamp(max=p.shape[-1] - 1)[:, 0]


@dataclass
class Sampling:
    """How captions are drawn. The captions of an image depend on these, its name and its views."""
    n: int = 1                              # captions of each image
    max_new_tokens: int | None = None       # None: what the context leaves
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    past_context: bool = False              # whether max_new_tokens may go beyond the context
    min_tokens: int = 0                     # no caption ends before

    def __post_init__(self):
        if (self.n < 1 or self.temperature < 0 or not 0 < self.top_p <= 1
                or (self.max_new_tokens or 1) < 1):
            raise ValueError("want n ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1 and max_new_tokens ≥ 1")


def sample(model, views, names, n=1, max_new_tokens=None, temperature=1.0, top_p=1.0, seed=0,
           past_context=False, compiled=False):
    """n captions for each image -> a list per image of n results {"caption", "finish", "tokens"}.

    views (I): what the model's `look` gave for each image; names (I): what the images are called,
    for their random numbers. caption is the raw text as the model wrote it, leading space and any
    loop included; finish says why it ended: "eos" (an end token), "length", or "repeat" (the same
    statement again and again); tokens counts the caption's tokens without the end token. compiled:
    as in `stream`.
    """
    how = Sampling(n, max_new_tokens, temperature, top_p, seed, past_context)
    if len(names) != len(views):
        raise ValueError(f"want {len(views)} names")
    images = zip(range(len(views)), names, views)
    results = dict(stream(model, images, max(len(views), 1), how, compiled=compiled))
    if errors := [error for error in results.values() if isinstance(error, InputError)]:
        raise errors[0]
    return [results[i] for i in range(len(views))]


def stream(model, images, slots, how, clock=None, compiled=False):
    """Yield (item, its n results) as soon as the captions of an image end, so in no fixed order.

    images: iterable of (item, name, views). Where views is an InputError, it is yielded in place of
    results. Up to `slots` images are in work: when the captions of some have ended, waiting images
    take their slots while the others continue. Only images whose prompts are equally long can share
    a batch; one of another length waits for the batch to run empty. clock: a Counter that gets the
    seconds spent on "wait" (for images), "prefill" and "decode". compiled: one step of fixed shape,
    compiled when it first runs, serves all tokens; see `compiles`.
    """
    images, waiting = iter(images), []
    batch = Batch(model, slots, how, Counter() if clock is None else clock, compiled)
    while True:
        while images and batch.wants_more(waiting):
            with timed(batch.clock, "wait"):
                image = next(images, None)
            if image is None:
                images = None
                batch.expect(len(waiting))
            elif isinstance(image[2], InputError):
                yield image[0], image[2]
            else:
                waiting.append((*image, model.caption_prompt(image[2])))
        waiting = batch.admit(waiting)
        if batch.is_empty:
            return
        what = f"{len(batch.members)} images × {how.n} captions; try a smaller --batch"
        with timed(batch.clock, "decode"), enough_memory(what):
            ended = batch.step()
        yield from ended


class Batch(Slots):
    """A running batch: plumbing/slots.py keeps the slots, and this is what happens in them."""

    def __init__(self, model, slots, how, clock, compiled=False):
        super().__init__(model, slots, how.n, clock, compiled)
        self.how, self.works = how, False
        self.next_tokens = compiled_step(model.device) if compiled else next_tokens
        vocab_size = len(model.output_layer.weight)
        self.is_end = torch.zeros(vocab_size, dtype=torch.bool, device=model.device)
        self.is_end[list(model.tokenizer.ends)] = True

    def begin(self, names, views, prompts):
        """Prefill equally long prompts and draw the first tokens -> their cache and rows (see
        `next_tokens`), and for each an InputError or None.

        A picture whose logits are not finite is an error, unless no picture ever was better.
        """
        how, device = self.how, self.model.device
        self.room = room_left(self.model, views[0], how.max_new_tokens, how.past_context)
        ids = torch.tensor(prompts, device=device)
        with evaluating(self.model):
            cache, logits = prefill(self.model, ids, data.together(views), None, how.n, self.room)
        broken = InputError("the model's logits are not finite; in float16, try bfloat16 or "
                            "float32")
        finite = logits.amax(-1).isfinite().view(len(ids), -1).all(-1)        # (I,)
        errors = [None if is_finite else broken for is_finite in finite.tolist()]
        self.works = self.works or not all(errors)
        if not self.works:
            raise broken
        u = [uniforms(how.seed, name, k, self.room + 1) for name in names for k in range(how.n)]
        rows = {"u": torch.tensor(np.array(u), device=device)}
        rows["tokens"] = torch.zeros(rows["u"].shape, dtype=torch.long, device=device)
        draw(logits, cache, rows, how, self.is_end)
        return cache, rows, errors

    def step(self):
        """Append a token to every caption -> [(item, results)] of images seen to have ended."""
        ended = self.results_of(self.look())
        if not self.is_empty:
            self.cache.reach()
            with evaluating(self.model):
                self.next_tokens(self.model, self.cache, self.rows, self.how, self.is_end)
            self.cache.used += 1
            self.cache.used[self.idle] = 0          # so that nothing more is read for their sake
        return ended

    def results_of(self, glimpse):
        """What members have written up to a glimpse -> [(item, results)] of those that ended."""
        ended = []
        for i, member, rows in glimpse:             # rows: n lists of tokens
            for k, tokens in enumerate(rows):
                member.append(k, tokens, self.model.tokenizer, self.room)
            if member.has_ended:
                ended.append((member.item, member.error or member.results(self.model.tokenizer)))
                self.members[i] = None
        return ended


# ---------------------------------------------------------------- questions
def packed_rows(questions, n_prefix, seq_length):
    """Lists of ids, in order -> lists of neighbours that can be packed behind one prefix.

    Each has at most MAX_PACKED tokens (but at least one question), and the questions in it need the
    same NTK base: those that reach beyond the context, which is rare, are packed apart.
    """
    rows, used, alpha = [], 0, None
    for ids in questions:
        needed = ntk_alpha(n_prefix + len(ids), seq_length)
        if not rows or n_prefix + used + len(ids) > MAX_PACKED or needed != alpha:
            rows.append([])
            used, alpha = 0, needed
        rows[-1].append(ids)
        used += len(ids)
    return rows


def yes_probability(model, views, questions):
    """P(yes) of each question about one image, each asked alone -> (M,) float32.

    views: what the model's `look` gave; questions (M) as text, asked as the base's own form wants
    it. All are packed behind one image prefix and cannot see each other, in one forward, or in
    several (see packed_rows).
    P(yes) is the softmax mass of the yes tokens against the no tokens at the first answer position.
    """
    device = model.device
    yes, no = yes_and_no(model.tokenizer)
    prefix, images = model.head(views), data.together([views])
    encoded = [model.question(question) for question in questions]
    parts = [torch.zeros(0, device=device)]
    what = f"{len(questions)} questions about one image; lower generate.MAX_PACKED"
    with evaluating(model), enough_memory(what):
        for row in packed_rows(encoded, len(prefix), model.seq_length):
            ids = prefix + [token for question in row for token in question]
            ids = torch.tensor([ids], device=device)                              # (1, L)
            lengths = torch.tensor([len(prefix), *map(len, row)], device=device)
            branch = torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None]
            last = lengths.cumsum(0)[1:] - 1                                      # (M,)
            logits = model(ids, images, branch=branch, positions=last)[0].float()  # (M, vocab)
            log_odds = logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)
            parts.append(torch.sigmoid(log_odds))
    return torch.cat(parts)


def answers(model, boxes, rows, report):
    """P(yes) and truth of question rows, image by image: two lists. report: gets the reason where
    an image cannot be read."""
    about, p_yes, truth = defaultdict(list), [], []
    for row in rows:
        about[row["image"]].append(row)
    for image, asked in about.items():
        try:
            images = seen_by(model, image, boxes)
        except InputError as error:
            report(str(error))
            continue
        p_yes += yes_probability(model, images, [row["question"] for row in asked]).tolist()
        truth += [row["yes"] for row in asked]
    return p_yes, truth


def ask_together(model, boxes, rows, ranks):
    """The `answers` of all ranks, each asked a share of the rows -> P(yes), truth, and [(where,
    reason)] of the images that cannot be read."""
    unread = []
    p_yes, truth = answers(model, boxes, rows[ranks.rank::ranks.world],
                           lambda reason: unread.append(("questions", reason)))
    return ranks.gather(p_yes), ranks.gather(truth), ranks.gather(unread)


# ---------------------------------------------------------------- the gate
def gate(p_yes, truth, threshold):
    """Accuracy, precision and recall of "yes" at a threshold; p_yes and truth are lists."""
    verdicts = [p >= threshold for p in p_yes]
    right = sum(verdict and true for verdict, true in zip(verdicts, truth))
    return {"accuracy": sum(verdict == true for verdict, true in zip(verdicts, truth)) / len(truth),
            "precision": right / max(sum(verdicts), 1), "recall": right / max(sum(truth), 1)}


def judge(statements, threshold, min_votes, resolve):
    """The statements of an image -> the same with "kept": what may be in its golden caption.

    A statement s with the question q passes if

        P(yes | image, q) ≥ threshold   and   votes(s) ≥ min_votes

    P(yes) is the QA model's softmax mass of yes against no at the first token of its answer, and
    votes(s) is the number of samples that contain s. Statements that cannot all be true share a
    group G. With `resolve` only the best of a group's passing statements is kept (the one with the
    highest P(yes), of equals the one with more votes, then the first), and none where several are
    about equally likely, so that the best has less than half of the group's Σ_G P(yes).

    Scoring each claim of a caption by a yes/no question is RLAIF-V's rule
    (https://arxiv.org/abs/2405.17220). Asking each question alone, without the caption, follows
    CapMAS (https://arxiv.org/abs/2412.15484): after a text a model relies on that text and less on
    the image. In its experiments isolated questions detect hallucinations with an AUROC of 81,
    agreement between samples (the votes) with 74, token confidence with 58. Groups are our
    addition: in the toy world contradictions in golden captions taught more of them in every round.
    """
    kept = [s["p_yes"] >= threshold and s["votes"] >= min_votes for s in statements]
    if resolve:
        kept = [passes and share for passes, share in zip(kept, has_its_share(statements))]
        kept = best_of_groups(statements, [(s["p_yes"], s["votes"]) for s in statements], kept)
    return [{**statement, "kept": is_kept} for statement, is_kept in zip(statements, kept)]


def best_of_groups(statements, values, passing):
    """Of the passing statements of each group only the one with the highest value, of equals the
    first -> a boolean for each statement."""
    groups = defaultdict(list)
    for k, (statement, passes) in enumerate(zip(statements, passing)):
        if passes:
            groups[("alone", k) if statement["group"] is None else statement["group"]].append(k)
    kept = {max(numbers, key=values.__getitem__) for numbers in groups.values()}
    return [k in kept for k in range(len(statements))]


def has_its_share(statements):
    """Whether each statement has at least half of the P(yes) of its group -> booleans."""
    sums = Counter()
    for s in statements:
        sums[s["group"]] += s["p_yes"]
    return [s["group"] is None or s["p_yes"] >= sums[s["group"]] / 2 for s in statements]


def calibrate(p_yes, truth, beta=0.5):
    """The threshold t on P(yes) with the best F_β for "yes"; of equals, the one nearest to .5.

        F_β(t) = (1 + β²) P R / (β² P + R) = (1 + β²) TP(t) / (kept(t) + β² yes)

    P, R: precision and recall; TP(t): questions with P(yes) ≥ t whose answer is yes; kept(t): all
    with P(yes) ≥ t; yes: all whose answer is yes. Candidates lie halfway between neighbouring
    P(yes), and both counts are running sums: n log n. Recall counts β times as much as precision:
    half as much, because the false statements that the gate judges are the model's own mistakes,
    which it believes more than wrong answers to questions (docs/claims.md, "competence").
    """
    ranked = sorted(zip(p_yes, truth), reverse=True)
    edges = sorted({0.0, 1.0, *p_yes}, reverse=True)
    candidates, right, kept = [], 0, 0
    for above, below in pairwise(edges):
        while kept < len(ranked) and ranked[kept][0] >= above:
            right += ranked[kept][1]
            kept += 1
        f_beta = (1 + beta**2) * right / max(kept + beta**2 * sum(truth), 1)
        threshold = (above + below) / 2
        candidates.append((round(f_beta, 9), -abs(threshold - 0.5), -threshold))
    return -max(candidates)[2]


def calibrated(questions, path, ranks, open_model, boxes):
    """The threshold that suits a model on a file of questions, found once and kept at `path`.

    The model is opened, by open_model(), only if it has to be asked; all ranks ask together.
    """
    rows, bad = data.read_questions(questions)
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if not all(ranks.gather([known.get("rows") == data.rows_hash(rows)])):
        p_yes, truth, unread = ask_together(open_model(), boxes, rows, ranks)
        if not truth:
            raise InputError(f"{questions}: none of its images can be read")
        threshold = calibrate(p_yes, truth)
        known = {"threshold": threshold, "questions": len(truth), "rows": data.rows_hash(rows),
                 **gate(p_yes, truth, threshold)}
        if ranks.is_master:
            data.report_bad("golden.py", bad + unread)
            files.write_json(path, known)
        ranks.barrier()
    return known["threshold"]
