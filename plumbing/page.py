"""index.html of golden samples, or of captions with their proof: for a hundred images, the samples,
the verdict on each statement and the caption. It is a single file that refers to nothing outside.
"""
import base64
import html
import io
import json
import random

from plumbing import files
from plumbing.errors import InputError
from plumbing.images import open_image

ROWS = 100
THUMBNAIL = 320             # pixels of the longer side
SMALL = 128                 # up to this many pixels a thumbnail is shown pixelated, hence lossless
DOUBTFUL = 0.15             # a P(yes) this close to the threshold is marked as doubtful

STYLE = """
:root { color-scheme: light dark; --line: #8884; --yes: #2a8f4e; --no: #c8372d; --soft: #8888; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; }
header { position: sticky; top: 0; z-index: 1; background: Canvas; padding: .5rem 0;
         border-bottom: 1px solid var(--line); }
h1 { font-size: 1.15rem; margin: 0 0 .25rem; }
label { margin-right: 1rem; white-space: nowrap; }
article { display: grid; grid-template-columns: minmax(120px, 260px) 1fr; gap: 1rem;
          padding: 1rem 0; border-bottom: 1px solid var(--line); }
img { width: 100%; border-radius: 4px; }
img.small { image-rendering: pixelated; }
h2 { font-size: .8rem; margin: 0; color: GrayText; font-weight: 600; overflow-wrap: anywhere; }
h3 { font-size: .72rem; letter-spacing: .04em; text-transform: uppercase; color: GrayText;
     margin: .6rem 0 .1rem; }
p, ol { margin: 0; overflow-wrap: anywhere; }
ol { padding-left: 1.4rem; color: GrayText; font-size: .88rem; }
.s { border-radius: 3px; cursor: help; text-decoration: underline; text-underline-offset: 3px; }
.kept { color: var(--yes); text-decoration-color: var(--yes); }
.refused { color: var(--no); text-decoration: line-through; }
.doubtful { outline: 1.5px dashed var(--soft); }
.s::after { content: attr(data-p); font-size: .68em; vertical-align: super; margin-left: .15em;
            opacity: .8; }
.golden { font-weight: 600; }
.reason { color: var(--no); font-weight: 600; }
@media (max-width: 620px) {
  article { grid-template-columns: 1fr; }
  img { max-width: 260px; }
  header { position: static; }
}
"""
SCRIPT = """
const only = document.getElementById("only"), near = document.getElementById("near");
function show() {
  let shown = 0;
  document.querySelectorAll("article").forEach(row => {
    let doubtful = false;
    row.querySelectorAll(".s").forEach(s => {
      const is = Math.abs(Number(s.dataset.exact) - THRESHOLD) <= Number(near.value);
      s.classList.toggle("doubtful", is);
      doubtful = doubtful || is;
    });
    row.hidden = only.checked && !doubtful;
    row.style.display = row.hidden ? "none" : "";
    shown += !row.hidden;
  });
  document.getElementById("shown").textContent = shown;
  document.getElementById("width").textContent = Number(near.value).toFixed(2);
}
only.addEventListener("change", show); near.addEventListener("input", show); show();
"""


def thumbnail(path, opened=open_image):
    """An <img> that contains the picture, or a paragraph with the reason why it cannot be read."""
    try:
        image = opened(path)
    except InputError as error:
        return f'<p class="reason">{html.escape(str(error))}</p>'
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    small = max(image.size) <= SMALL
    kind, css = ("png", "class=small ") if small else ("jpeg", "")
    encoded = io.BytesIO()
    image.save(encoded, kind, quality=85)
    text = base64.b64encode(encoded.getvalue()).decode()
    return f'<img {css}alt="" src="data:image/{kind};base64,{text}">'


def statement(row):
    """A statement in the colour of its verdict, with question, P(yes) and votes on hover."""
    p_yes = row["p_yes"]
    excludes = f", excludes others of {row['group']}" if row["group"] else ""
    title = f"{row['question']} P(yes) = {p_yes:.4f}, in {row['votes']} of the samples{excludes}"
    verdict = "kept" if row["kept"] else "refused"
    return (f'<span class="s {verdict}" data-exact="{p_yes}" data-p="{p_yes:.2f}" tabindex="0" '
            f'title="{html.escape(title)}">{html.escape(row["text"])}</span>')


def samples_list(samples):
    """The samples of an image as a numbered list, each with how it ended."""
    items = []
    for sample in samples:
        caption = html.escape(sample["caption"].strip() or "(empty)")
        finish = html.escape(str(sample["finish"]))
        items.append(f"<li>{caption} <small>{finish}</small></li>")
    return f"<ol>{''.join(items)}</ol>"


def article(row, path, opened=open_image):
    """A row of record.jsonl and its image as an <article>."""
    parts = [f"<h2>{html.escape(row['image'])}</h2>"]
    if "error" in row:
        parts.append(f'<p class="reason">{html.escape(row["error"])}</p>')
    else:
        statements = ", ".join(map(statement, row.get("statements", []))) or "(empty)"
        golden = html.escape(row.get("chosen", row.get("caption")) or "–")
        parts += [f"<h3>samples</h3>{samples_list(row.get('samples', []))}",
                  f"<h3>combined, judged</h3><p>{statements}</p>",
                  f'<h3>golden</h3><p class="golden">{golden}</p>']
        if "left_out" in row:
            parts.append(f'<p class="reason">left out: {html.escape(row["left_out"])}</p>')
    return f"<article><div>{thumbnail(path, opened)}</div><div>{''.join(parts)}</div></article>\n"


def drawn_rows(path, seed):
    """A random ROWS rows of a JSONL file, in its order -> (rows, how many it has)."""
    with path.open("rb") as file:
        starts = [0]
        for line in file:
            starts.append(starts[-1] + len(line))
        count = len(starts) - 1
        numbers = sorted(random.Random(seed).sample(range(count), min(ROWS, count)))
        rows = []
        for number in numbers:
            file.seek(starts[number])
            rows.append(json.loads(file.readline()))
    return rows, count


def write_page(out, threshold, seed, made_of="record.jsonl", keys=("image", "caption"),
               opened=open_image):
    """out/index.html: a random hundred of the rows of out/record.jsonl, or of another file.

    keys: what the file calls image and caption. opened(path) is the image at a path.
    """
    rows, count = drawn_rows(out / made_of, seed)
    rows = [{**row, "image": row[keys[0]], "caption": row.get(keys[1])} for row in rows]
    body = "".join(article(row, out / row["image"], opened) for row in rows)
    text = f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>golden samples</title><style>{STYLE}</style>
<header><h1>Golden samples: {len(rows)} of {count} images</h1>
<span class="s kept">kept</span> <span class="s refused">refused</span> at P(yes) {threshold:.2f};
hover or touch a statement for its question. Shown: <b id="shown">{len(rows)}</b>.<br>
<label><input type="checkbox" id="only"> only images with doubtful statements</label>
<label>within <input type="range" id="near" min="0.01" max="0.5" step="0.01" value="{DOUBTFUL}">
<span id="width">{DOUBTFUL}</span> of the threshold</label></header>
{body}<script>const THRESHOLD = {threshold};{SCRIPT}</script></html>
"""
    with files.whole(out / "index.html") as temporary:
        temporary.write_text(text, "utf-8", "replace")
