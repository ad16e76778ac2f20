"""Decoding: one image prefix, many samples of it or many questions about it.

The prefix (six views are 1548 tokens) is computed and kept once per image. Each sample adds a short
tail to the key/value cache, and a decode step attends to both; questions are packed behind the
prefix in one forward. The random numbers of a sample depend on (seed, image name, sample index)
alone, so neither the batch nor the number of cards changes them.
"""
import contextlib
import hashlib
import json
import re
from collections import defaultdict
from itertools import pairwise

import numpy as np
import torch

from chunking import seen_by
from plumbing import data, files
from plumbing.errors import InputError
from plumbing.positions import ntk_alpha
from plumbing.weights import free_bytes

COPIES = 3              # a statement this many times in a row is a loop
LOOP_TOKENS = 24        # so is a run this long of a shorter pattern, such as one endless word
STATEMENT_ENDS = ",.;:!?\n，。；、"
LONGEST = 2048          # tokens of a caption where no limit is given and the context is longer
MOST_AT_ONCE = 16       # images in a batch, even where memory allows more
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
    logits = model(tokens[:, None], cache=cache)[:, 0]
    cache.used += 1
    return logits


@contextlib.contextmanager
def evaluating(model):
    """Eval mode without gradients inside; the previous mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


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


def room_left(model, images, max_new_tokens=None, past_context=False):
    """How many tokens a caption may have: max_new_tokens, and unless past_context no more than the
    trained context has left. InputError where the prompt alone fills the context.

    images: what `look` gave for an image, or how many views there are.
    """
    prefix = len(model.caption_prompt(images))
    left = model.seq_length - prefix
    if past_context and max_new_tokens is not None:
        return max_new_tokens
    if left < 1:
        raise InputError(f"the prompt is {prefix} tokens, the context {model.seq_length}; take "
                         "fewer views (--views one)")
    return min(left, LONGEST if max_new_tokens is None else max_new_tokens)


def images_at_once(model, n_views, samples, room):
    """How many images, with `samples` tails of `room` tokens each, fit in half the free memory."""
    free = free_bytes(model.device)
    if free is None:
        return MOST_AT_ONCE
    prefixes = 1 if model.packs else samples
    tokens = prefixes * len(model.caption_prompt(n_views)) + samples * room
    return max(1, min(MOST_AT_ONCE, int(free / 2 / (model.cache_bytes * tokens))))


def sample(model, views, names, n=1, max_new_tokens=None, temperature=1.0, top_p=1.0, seed=0,
           past_context=False):
    """n captions for each image -> a list per image of n results {"caption", "finish", "tokens"}.

    views (I): what the model's `look` gave for each image; names (I): what the images are called,
    for their random numbers. caption is the raw text as the model wrote it, leading space and any
    loop included; finish says why it ended: "eos" (an end token), "length", or "repeat" (the same
    statement again and again); tokens counts the caption's tokens without the end token.
    """
    I = len(views)
    if (len(names) != I or n < 1 or temperature < 0 or not 0 < top_p <= 1
            or (max_new_tokens or 1) < 1):
        raise ValueError(f"want {I} names, n ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1 and "
                         "max_new_tokens ≥ 1")
    prompts = [model.caption_prompt(images) for images in views]
    alike = defaultdict(list)                   # images of other proportions may have other lengths
    for i, prompt in enumerate(prompts):
        alike[len(prompt)].append(i)
    results = [None] * I
    for members in alike.values():
        room = room_left(model, views[members[0]], max_new_tokens, past_context)
        numbers = [uniforms(seed, names[i], k, room) for i in members for k in range(n)]
        ids = torch.tensor([prompts[i] for i in members], device=model.device)
        u = torch.tensor(np.array(numbers), device=model.device)              # (I·n, room)
        with enough_memory(f"{len(ids)} images × {n} captions; try a smaller --batch or "
                           "--max-new-tokens, or fewer captions"):
            of_members = draw(model, ids, data.together([views[i] for i in members]), n, room, u,
                              temperature, top_p)
        for k, i in enumerate(members):
            results[i] = of_members[k * n:(k + 1) * n]
    return results


@contextlib.contextmanager
def enough_memory(what):
    """Inside, an error for want of memory becomes an InputError that says what to lessen."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = ("out of memory", "allocate memory", "not enough memory")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        raise InputError(f"out of memory with {what}") from None


def draw(model, ids, images, n, room, u, temperature, top_p):
    """Captions of prompts ids (I, L) that are equally long, drawn with u (I·n, room) -> results."""
    tokenizer = model.tokenizer
    captions, finish = [[] for _ in u], [None] * len(u)
    with evaluating(model):
        cache, logits = prefill(model, ids, images, None, n, room)
        if not bool(logits.amax(-1).isfinite().all()):
            raise InputError("the model's logits are not finite; in float16, try bfloat16 or "
                             "float32")
        for t in range(room):
            tokens = choose(logits, u[:, t], temperature, top_p)              # (I·n,)
            for row, token in enumerate(tokens.tolist()):
                if finish[row] is None:         # a row that ended is still decoded, and not kept
                    finish[row] = append(captions[row], token, tokenizer)
            if all(finish) or t + 1 == room:
                break
            logits = decode(model, cache, tokens)
    return [{"caption": tokenizer.plain_text(caption), "finish": reason or "length",
             "tokens": len(caption)} for caption, reason in zip(captions, finish)]


def append(caption, token, tokenizer):
    """Append a token to a caption (list of ids) -> why the caption ends here, or None."""
    if token in tokenizer.ends:
        return "eos"
    caption.append(token)
    return "repeat" if loops(caption, tokenizer.plain_text) else None


# ---------------------------------------------------------------- questions
def yes_and_no(tokenizer):
    """Ids (two lists) of the spellings of yes and of no that are single tokens.

    InputError where a vocabulary has no such token for one of them.
    """
    sides = []
    for words in ((" Yes", "Yes", " yes", "yes"), (" No", "No", " no", "no")):
        side = []
        for word in words:
            with contextlib.suppress(InputError):       # a small vocabulary may lack the letters
                ids = tokenizer.encode(word)
                side += ids if len(ids) == 1 else []
        if not side:
            raise InputError(f"the vocabulary has none of {', '.join(map(repr, words))} as a "
                             "single token")
        sides.append(side)
    return sides


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


def calibrate(p_yes, truth):
    """The threshold t on P(yes) with the best F1 for "yes"; of equals, the one nearest to .5.

        F1(t) = 2 TP / (TP + FP + TP + FN) = 2 TP(t) / (kept(t) + yes)

    TP(t): questions with P(yes) ≥ t whose answer is yes; kept(t): all with P(yes) ≥ t; yes: all
    whose answer is yes. Candidates lie halfway between neighbouring P(yes). Sorted by P(yes), both
    counts are running sums: n log n.

    Half of the questions are true, but most of the statements that the gate judges. With the share
    s of true statements, which can be estimated from their P(yes), the odds of the threshold could
    be divided by s / (1 - s). That would be right if a statement got P(yes) as a question of its
    class does. Measured in the toy world (docs/claims.md, "prior"), it gains nothing on a base that
    sees everything, and goes the wrong way on one that errs: the false statements of a model are
    those that it tends to believe, and a higher threshold is better. So there is no correction;
    golden.py has --threshold.
    """
    ranked = sorted(zip(p_yes, truth), reverse=True)
    edges = sorted({0.0, 1.0, *p_yes}, reverse=True)
    candidates, right, kept = [], 0, 0
    for above, below in pairwise(edges):
        while kept < len(ranked) and ranked[kept][0] >= above:
            right += ranked[kept][1]
            kept += 1
        f1 = 2 * right / max(kept + sum(truth), 1)
        threshold = (above + below) / 2
        candidates.append((round(f1, 9), -abs(threshold - 0.5), -threshold))
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


# ---------------------------------------------------------------- loops
def loops(ids, text_of):
    """Whether a list of token ids, whose text is text_of(ids), ends in a loop.

    A loop is one or several whole statements COPIES times in a row, or a shorter pattern over
    LOOP_TOKENS tokens. Three dots or a long number are neither.
    """
    for period in range(1, len(ids) // COPIES + 1):
        if ids[-1] != ids[-1 - period]:
            continue                    # implied by the next comparison, and much faster
        pattern = ids[-period:]
        if pattern * COPIES != ids[-COPIES * period:]:
            continue
        text = text_of(pattern)
        is_statement = any(c in STATEMENT_ENDS for c in text) and any(c.isalpha() for c in text)
        long_run = ids[-LOOP_TOKENS:-period] == ids[period - LOOP_TOKENS:]
        if is_statement or (len(ids) >= LOOP_TOKENS and long_run):
            return True
    return False


def trimmed(result):
    """The text of a sample without its loop, or without the statement at which it was cut off."""
    if result["finish"] == "repeat":
        return without_loop(result["caption"])
    if result["finish"] == "length":
        return re.sub(r"(^|[,.;])[^,.;]*$", "", result["caption"])
    return result["caption"]


def without_loop(caption):
    """A caption that finished by "repeat" with its loop written once: for showing, not training."""
    longest, cut = 0, len(caption)      # of the loops that it may end in; where the second copy is
    for period in range(1, len(caption) // COPIES + 1):
        if caption[-period:] * COPIES != caption[-COPIES * period:]:
            continue
        start = len(caption) - COPIES * period
        while start > 0 and caption[start - 1] == caption[start - 1 + period]:
            start -= 1
        if len(caption) - start > longest:
            longest, cut = len(caption) - start, start + period
    return caption[:cut]
