"""evaluate.py with a judge: CAPEval's checklist and CaptionQA's questions, answered by a scripted chat model."""

import hashlib
import json
import random
import re
from collections import Counter

import pytest
import stages
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import read_rows, write_rows
from test_chat import completion, serving
from test_tool_llm import EVIL, slept, strings_in  # noqa: F401  (slept: a fixture)

import evaluate
import tool_llm
from plumbing import capeval, captionqa, chat, quotes, verdicts
from plumbing.answers import loose_json
from plumbing.chat import READINGS
from plumbing.rules import Unreadable, clean

CAPEVAL = stages.CODE.parent / "shared/data/capeval"
NAMES = {
    "SO": "Scene & Object",
    "PA": "People & Activity",
    "TI": "Text & Interface",
    "DK": "Design & Knowledge",
}
CHECKLIST = [
    {
        "img_path": "SO001.jpg",
        "instance_checklist": [
            {"Tags": "object", "Question": f"Is a ring{k} mentioned?"} for k in range(60)
        ],
        "ui_checklist": None,
    },
    {
        "img_path": "TI002.png",
        "text_checklist": [{"Question": "Is a cross described?"}, {"Question": "Is it red?"}],
    },
    {"img_path": "PA003.jpg", "x_checklist": [{"Question": "Is a person described?"}]},
]
CAPTIONS = [
    {"image": "photos/SO001.jpg", "caption": ", ".join(f"ring{k}" for k in range(15))},
    {"image": "photos/TI002.png", "caption": "a red cross"},
    {"image": "photos/XX.png", "caption": "a cat"},
    {"image": "photos/bad.png", "error": "cannot be read"},
]


# ---------------------------------------------------------------- a scripted judge
def parts(text):
    """(caption, the other strings with their numbers or letters) of a prompt."""
    data = text.split(quotes.DATA)[1]
    strings = re.findall(r'(?m)^(?:(\w+)\. )?(".*")$', data)
    (_, caption), *others = [(mark, json.loads(string)) for mark, string in strings]
    return caption, others


def opinion(caption, item):
    """What the scripted judge thinks of an item: a function of both, by chance."""
    digest = hashlib.sha256(f"{caption}|{item}".encode()).digest()
    return ("yes", "no", "not_mentioned", "not_mentioned")[digest[0] % 4]


def judge(text, n):
    caption, items = parts(text)
    return completion(json.dumps({mark: opinion(caption, item) for mark, item in items}))


def run(*argv):
    return evaluate.main([str(argument) for argument in argv])


def run_judge(server, captions, path, *more, kind="--checklist", model="m", cache="cache"):
    """evaluate.py by a server -> its exit code; its cache of replies is in a folder of this name."""
    folder = captions.parent / cache
    tool = ["--tool", server.url, "--tool-model", model, "--tool-cache", folder]
    return run(captions, kind, path, *tool, *more)


@pytest.fixture
def inputs(tmp_path):
    return (
        write_rows(tmp_path / "captions.jsonl", CAPTIONS),
        write_rows(tmp_path / "checklist.jsonl", CHECKLIST),
    )


def verdicts_of(folder):
    return read_rows(folder / "captions.verdicts.jsonl")


# ---------------------------------------------------------------- CAPEval: the released checklist
def expected_figures(captions):
    """{category: (items, C, P)} of {image: caption} by the scripted judge's opinions, counted from the released rows."""
    n = {}
    for row in read_rows(CAPEVAL / "checklist.jsonl"):
        image = row["img_path"]
        if image in captions:
            for entry in (e for key in row if key.endswith("_checklist") for e in row[key] or []):
                answer = opinion(clean(captions[image]), clean(entry["Question"]))
                for category in ("all", NAMES[image[:2]]):
                    n.setdefault(category, Counter())[answer] += 1
    return {
        name: (
            sum(c.values()),
            100 * (c["yes"] + c["no"]) / sum(c.values()),
            100 * c["yes"] / (c["yes"] + c["no"]),
        )
        for name, c in n.items()
    }


released = pytest.mark.skipif(not CAPEVAL.is_dir(), reason="needs CAPEval beside the repository")


@released
def test_the_released_checklist_and_photographs_with_a_scripted_judge(tmp_path, capsys):
    images = sorted(CAPEVAL.glob("image/*"))
    captions = {path.name: f"A photograph.\nIt is number {path.stem}." for path in images}
    rows = [{"image": str(path), "caption": captions[path.name]} for path in images]
    written = write_rows(tmp_path / "captions.jsonl", rows)
    flags = ["--json", tmp_path / "f.json", "--submission", tmp_path / "s.json"]
    with serving(judge) as server:
        assert run_judge(server, written, CAPEVAL / "checklist.jsonl", *flags) == 0
        name = f"{server.url} m"
    result = json.loads((tmp_path / "f.json").read_text())
    figures = {key: (v["items"], v["C"], v["P"]) for key, v in result["figures"].items()}
    expected = expected_figures(captions)
    assert figures.keys() == expected.keys()
    for category, numbers in expected.items():
        assert figures[category] == pytest.approx(numbers), category
    assert set(figures) == {"all", *NAMES.values()} and figures["all"][0] > 900
    assert result["judge"] == name and result["images"] == 23 and result["missing"] == 277
    for row in result["figures"].values():
        for key in "CP":
            low, high = row["intervals"][key]
            assert low < row[key] < high and high - low < 60
    assert len({len(v["intervals"]["C"]) for v in result["figures"].values()}) == 1
    submission = json.loads((tmp_path / "s.json").read_text())
    assert submission == [{"image_id": key, "caption": captions[key]} for key in sorted(captions)]
    table = capsys.readouterr().out.splitlines()
    assert name in table[0] and "23 of 300 images" in table[1]
    shown = next(line for line in table if line.startswith("Text & Interface"))
    assert re.findall(r"(\d+\.\d) \[", shown) == [f"{v:.1f}" for v in figures[NAMES["TI"]][1:]]


@released
def test_the_released_checklist_is_read_whole():
    items = evaluate.read_items(CAPEVAL / "checklist.jsonl", capeval)
    assert len(items) == 300 and sum(map(len, items.values())) == 14965
    n = Counter(item["category"] for part in items.values() for item in part)
    assert n == {NAMES["SO"]: 7039, NAMES["PA"]: 3164, NAMES["TI"]: 2146, NAMES["DK"]: 2616}


# ---------------------------------------------------------------- asking, and the file of verdicts
def test_the_items_of_an_image_share_requests_and_all_are_asked(inputs, tmp_path):
    with serving(judge) as server:
        assert run_judge(server, *inputs) == 0
        asked = [parts(text) for text in server.texts()]
    assert sorted(len(items) for _, items in asked) == [2, 30, 30]
    rows = verdicts_of(tmp_path)
    assert {row["asked"] for row in rows} == {
        entry["Question"]
        for row in CHECKLIST[:2]
        for key in row
        if key.endswith("_checklist")
        for entry in row[key] or []
    }
    for row in rows:
        caption = next(c["caption"] for c in CAPTIONS if c["image"].endswith(row["image"]))
        assert row["verdict"] == opinion(caption, row["asked"])
        assert row["judge"] == f"{server.url} m"


def test_a_second_run_asks_nothing_and_a_torn_line_is_asked_again(inputs, tmp_path):
    path = tmp_path / "captions.verdicts.jsonl"
    with serving(judge) as server:
        outs = [tmp_path / f"{k}.json" for k in range(3)]
        assert run_judge(server, *inputs, "--json", outs[0]) == 0
        n_requests, whole = len(server.seen), path.read_bytes()
        assert run_judge(server, *inputs, "--json", outs[1], cache="other") == 0
        assert len(server.seen) == n_requests and path.read_bytes() == whole

        path.write_bytes(whole[:-20])
        torn = json.loads(whole.splitlines()[-1])
        assert run_judge(server, *inputs, "--json", outs[2], cache="third") == 0
        assert [items for _, items in map(parts, server.texts()[n_requests:])] == [
            [("1", torn["asked"])]
        ]
        assert path.read_bytes().startswith(whole[:-20] + b"\n")
        assert json.loads(path.read_bytes().splitlines()[-1]) == torn
    figures = [json.loads(out.read_text())["figures"] for out in outs]
    assert figures[0] == figures[1] == figures[2]


def test_a_run_that_lost_its_judge_keeps_what_it_had(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "GIVE_UP", 1)
    lost = []

    def dying(text, n):
        lost.append(text)
        return judge(text, n) if len(lost) <= 2 else lambda handler: handler.send_error(500)

    with serving(dying) as server:
        assert run_judge(server, *inputs, "--tool-requests", 1) == 1
        assert capsys.readouterr().err.count("Run the same command again") == 1
        kept = verdicts_of(tmp_path)
        assert len(kept) == 60
        lost.clear()
        assert run_judge(server, *inputs, "--tool-requests", 1, cache="other") == 0
        assert len(lost) == 1 and verdicts_of(tmp_path)[:60] == kept


@pytest.mark.parametrize("change", ["judge", "caption", "item", "version"])
def test_what_a_verdict_depends_on_is_asked_anew(change, tmp_path, monkeypatch):
    checklist = write_rows(tmp_path / "checklist.jsonl", CHECKLIST[1:2])
    captions = write_rows(tmp_path / "captions.jsonl", CAPTIONS[1:2])
    with serving(judge) as server:
        assert run_judge(server, captions, checklist) == 0 and len(server.seen) == 1
        model, n_items = "m", 2
        if change == "judge":
            model = "another"
        elif change == "caption":
            write_rows(captions, [{**CAPTIONS[1], "caption": "a blue cross"}])
        elif change == "item":
            row = {**CHECKLIST[1], "y_checklist": [{"Question": "Is a dot described?"}]}
            write_rows(checklist, [row])
            n_items = 1
        else:
            monkeypatch.setattr(capeval, "VERSION", capeval.VERSION + 1)
        assert run_judge(server, captions, checklist, model=model, cache="other") == 0
        assert [len(items) for _, items in map(parts, server.texts()[1:])] == [n_items]


def test_an_item_without_an_answer_is_asked_again_and_counts_apart(inputs, tmp_path, capsys):
    def forgetful(text, n):
        _, items = parts(text)
        answers = {mark: "yes" for mark, item in items if "ring7 " not in item}
        return completion(json.dumps(answers) if answers else "I would rather not say.")

    out = tmp_path / "f.json"
    with serving(forgetful) as server:
        assert run_judge(server, *inputs, "--json", out) == 1
        asked = [items for _, items in map(parts, server.texts())]
        about_7 = [items for items in asked if any("ring7 " in item for _, item in items)]
        assert [len(items) for items in about_7] == [30] * READINGS + [1] * READINGS
        assert run_judge(server, *inputs, "--json", out) == 1
        assert len(server.seen) == len(asked) + READINGS * 2  # one item, in both sizes of request
    figures = json.loads(out.read_text())["figures"]
    assert (figures["all"]["items"], figures["all"]["unreadable"]) == (61, 1)
    assert figures["all"]["C"] == figures["all"]["P"] == 100
    assert figures[NAMES["TI"]]["unreadable"] == 0
    captured = capsys.readouterr()
    assert "items without a verdict: 1 (" in captured.err and "unreadable" in captured.out


def test_several_captions_of_an_image_are_all_judged(tmp_path):
    rows = [{"image": "TI002.png", "caption": text} for text in ("a red cross", "", "a cross")]
    captions = write_rows(tmp_path / "captions.jsonl", rows)
    checklist = write_rows(tmp_path / "checklist.jsonl", CHECKLIST)
    assert run(captions, "--checklist", checklist, "--json", tmp_path / "f.json") == 0
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["captions"] == 3 and result["judge"] == "shorthand"
    assert result["figures"]["all"]["items"] == 6
    assert result["figures"]["all"]["C"] == pytest.approx(100 * 3 / 6)


def test_a_submission_has_the_captions_of_the_benchmark_s_images_alone(inputs, tmp_path):
    """CAPEval's own code refuses empty captions and unknown images."""
    rows = [*CAPTIONS, {"image": "PA003.jpg", "caption": " "}]
    captions = write_rows(tmp_path / "more.jsonl", rows)
    assert run(captions, "--checklist", inputs[1], "--submission", tmp_path / "new/s.json") == 0
    assert json.loads((tmp_path / "new/s.json").read_text()) == [
        {"image_id": "SO001.jpg", "caption": CAPTIONS[0]["caption"]},
        {"image_id": "TI002.png", "caption": "a red cross"},
    ]


# ---------------------------------------------------------------- CAPEval: prompts and answers
def question(n):
    return {"caption": "a", "items": [{"item": f"item {k}?"} for k in range(n)]}


@pytest.mark.parametrize("caption", EVIL)
def test_captions_and_items_are_data(caption):
    items = [{"item": caption}, {"item": "Is it red?"}]
    data = capeval.prompt({"caption": caption, "items": items}).split(quotes.DATA)[1]
    strings, others = strings_in(data)
    assert strings == [(None, clean(caption)), (1, clean(caption)), (2, "Is it red?")]
    assert others == ["Caption:", "Items:"] and not re.search(r"[<>\[\]]", data)


@pytest.mark.parametrize(
    "reply",
    [
        '{"1": "yes", "2": "not_mentioned", "3": "no"}',
        '{"answers": {"3": "No", "2": "Not mentioned", "1": "YES."}}',
        '{"answers": [{"item": 3, "answer": "no"}, {"item": "1", "answer": "yes"}, '
        '{"item": 2, "answer": "not-mentioned"}]}',
        '[{"n": 1, "why": "No dog is mentioned", "verdict": "yes"}, [2, "not_mentioned"], [3, "no"]]',
        '{"1": {"why": "it is there", "verdict": "yes"}, "2": ["not_mentioned"], "3": "no"}',
        'Here it is:\n```json\n["yes", "not mentioned", "no"]\n```',
        "1. yes\n2. not_mentioned\n3. no",
    ],
)
def test_verdicts_are_read_by_number_in_whatever_form(reply):
    value, complete = loose_json(reply)
    assert complete and capeval.read(value, question(3)) == ["yes", "not_mentioned", "no"]


@pytest.mark.parametrize(
    "value, partial",
    [
        ({"1": "yes", "3": "no", "4": "yes"}, ["yes", None, "no"]),
        ({"1": "yes", "2": "No dog is mentioned", "3": "no"}, ["yes", None, "no"]),
        ([{"item": 1, "answer": "yes"}, {"item": 2}, "yes"], ["yes", None, None]),
        (["yes", "no"], None),
        ({"1": True, "2": 1, "3": None}, None),
        ({"0": "yes"}, None),
        (["yes"], None),
    ],
)
def test_a_missing_verdict_is_unreadable_and_the_others_are_kept(value, partial):
    with pytest.raises(Unreadable) as error:
        capeval.read(value, question(3))
    assert error.value.partial == partial and str(error.value)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["yes", "1", "no"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("123ab") | st.text(), inner),
    max_leaves=6,
)


@given(ANY_JSON.filter(lambda value: isinstance(value, list | dict) and value))
@settings(max_examples=60, deadline=None)
def test_any_json_is_read_or_unreadable(value):
    item = {"question": "Which?", "choices": ["red", "blue"], "answer": "red"}
    for benchmark, asked in (
        (capeval, question(3)),
        (captionqa, {"caption": "a", "items": [item]}),
    ):
        try:
            assert None not in benchmark.read(value, asked)
        except Unreadable as error:
            assert error.partial is None or None in error.partial


def test_coverage_and_precision_by_hand():
    n = Counter()
    for answer in ["yes"] * 3 + ["no"] + ["not_mentioned"] * 4:
        n.update(capeval.count({}, answer))
    assert capeval.formulas(n) == {"C": 50, "P": 75}


def test_the_shorthand_judge_looks_for_words():
    items = ["Does the caption mention two red rings?", "Is a cat described?", "Is it described?"]
    asked = {"caption": "Two rings, red", "items": [{"item": text} for text in items]}
    assert capeval.rule(asked) == ["yes", "not_mentioned", "not_mentioned"]


@pytest.mark.parametrize(
    "row, n_items, fault",
    [
        (
            {"img_path": "a.png", "a_checklist": [{"Question": "a?"}, {"Tags": "b"}, 3]},
            1,
            "2 entries",
        ),
        ({"img_path": "a.png", "a_checklist": []}, 0, "no "),
        ({"img_path": "a.png", "a_checklist": {"Question": "a?"}}, 0, "not a list"),
        ({"a_checklist": [{"Question": "a?"}]}, 0, "img_path"),
        ({}, 0, "img_path"),
    ],
)
def test_bad_rows_of_a_checklist(row, n_items, fault):
    _, items, [reason] = capeval.items_of(row)
    assert len(items) == n_items and fault in reason


# ---------------------------------------------------------------- CaptionQA
CAT = {
    "question": "How does the cat sit?",
    "choices": ["on a chair", "below it", "on the ground"],
    "answer": "on the ground",
    "category": ["Spatial - Relationship"],
}
CAN = {
    "question": "Is there a trash can?",
    "choices": ["Yes", "No"],
    "answer": "No",
    "category": ["Object Existence - Object presence"],
}
QUESTIONS = [
    {
        "id": "nat_001",
        "image_paths": ["images/1.jpg"],
        "questions": [CAT, CAN],
        "domain": "natural",
    },
    {
        "image": "2.jpg",
        "question": "How many?",
        "choices": [1, 2, 3],
        "answer": "B",
        "category": "Count",
    },
    {"file_name": "2.jpg", "question": "What color?", "choices": ["red", "blue"], "answer": 0},
]


def test_questions_in_the_released_form_and_in_flat_rows():
    (image, [cat, can], faults), second, third = map(captionqa.items_of, QUESTIONS)
    assert image == "images/1.jpg" and faults == second[2] == third[2] == []
    assert (cat["answer"], cat["category"], cat["id"]) == ("on the ground", "Spatial", "nat_001")
    assert can["category"] == "Object Existence"
    assert [item["answer"] for item in (*second[1], *third[1])] == ["2", "red"]
    assert third[1][0]["category"] == "other" and third[0] == "2.jpg"


@pytest.mark.parametrize(
    "row, fault",
    [
        ({**QUESTIONS[2], "answer": 2}, "answer 2"),
        ({**QUESTIONS[2], "answer": True}, "answer True"),
        ({**QUESTIONS[2], "answer": "C"}, "answer 'C'"),
        ({**QUESTIONS[2], "answer": "a red one"}, "answer"),
        ({**QUESTIONS[2], "choices": ["red"]}, "choices"),
        ({**QUESTIONS[2], "choices": ["red", "Red "]}, "choices"),
        ({**QUESTIONS[2], "choices": ["red", None]}, "choices"),
        ({**QUESTIONS[2], "choices": list(range(30))}, "30 choices"),
        ({**QUESTIONS[2], "question": " "}, "no question"),
        ({"image": "a.png", "questions": []}, "no question"),
        ({"image": "a.png", "questions": ["Who?"]}, "no question"),
        ({"question": "Who?", "choices": ["a", "b"], "answer": "a"}, "image"),
    ],
)
def test_bad_questions(row, fault):
    _, items, [reason] = captionqa.items_of(row)
    assert items == [] and fault in reason


def test_the_options_are_shuffled_always_alike_and_offer_no_answer_but_for_yes_and_no():
    items = [{**CAT, "question": f"What is {k}?"} for k in range(40)]
    orders = [captionqa.options(item) for item in items]
    assert all(set(order) == {*CAT["choices"], captionqa.CANNOT} for order in orders)
    assert len({order.index("on the ground") for order in orders}) == 4
    assert orders == [captionqa.options(item) for item in items]
    assert sorted(captionqa.options(CAN)) == ["No", "Yes"]


@pytest.mark.parametrize(
    "reply, option",
    [
        ('{"answer": "B"}', 1),
        ('{"answer": "(c)"}', 2),
        ('{"answer": "D. something"}', 3),
        ('{"reason": "A cat sits", "answer": "b"}', 1),
        ('["A"]', 0),
        ('{"answer": "On the ground."}', None),
    ],
)
def test_an_answer_names_an_option_by_its_letter_or_text(reply, option):
    options = captionqa.options(CAT)
    expected = "on the ground" if option is None else options[option]
    assert captionqa.read(loose_json(reply)[0], {"items": [CAT]}) == [expected]


@pytest.mark.parametrize(
    "value", [{"answer": "E"}, {"answer": "A cat sits"}, {"answer": 1}, ["A", "B"]]
)
def test_an_answer_that_names_no_option_is_unreadable(value):
    with pytest.raises(Unreadable):
        captionqa.read(value, {"items": [CAT]})


def test_the_score_by_hand():
    n = Counter()
    for item, answer in (
        (CAT, "on the ground"),
        (CAT, captionqa.CANNOT),
        (CAT, "below it"),
        (CAN, "No"),
    ):
        n.update(captionqa.count(item, answer))
    expected = {"accuracy": 50, "cannot": 25, "score": 25 * (1 + 1 / 3 + 0.05 + 1)}
    assert captionqa.formulas(n) == pytest.approx(expected)


def test_the_shorthand_judge_chooses_by_words():
    def answer(caption, item):
        return captionqa.rule({"caption": caption, "items": [item]})[0]

    assert answer("a cat on the wet ground", CAT) == "on the ground"
    assert answer("a cat", CAT) == captionqa.CANNOT
    assert answer("on the ground, on a chair", CAT) == captionqa.CANNOT
    assert answer("a big trash can", CAN) == "Yes" and answer("a cat", CAN) == "No"


def test_questions_from_end_to_end(tmp_path, capsys):
    """The judge knows that the cat sits on the ground, and nothing about 2.jpg; it sees a question at a time."""

    def judge(text, n):
        _, [(_, asked), *options] = parts(text)
        wanted = {"How does the cat sit?": "on the ground", "Is there a trash can?": "Yes"}
        answer = wanted.get(asked, captionqa.CANNOT)
        letter = next(mark for mark, option in options if option == answer)
        return completion(f'The answer is {{"answer": "{letter}"}}')

    rows = [{"image": f"elsewhere/{k}.jpg", "caption": "a cat on the ground"} for k in (1, 2)]
    captions = write_rows(tmp_path / "captions.jsonl", rows)
    path = write_rows(
        tmp_path / "questions.jsonl", [*QUESTIONS, {**QUESTIONS[2], "answer": "green"}]
    )
    flags = ["--json", tmp_path / "f.json", "--submission", tmp_path / "s.json"]
    with serving(judge) as server:
        assert run_judge(server, captions, path, *flags, kind="--captionqa") == 0
        assert run_judge(server, captions, path, *flags, kind="--captionqa", cache="other") == 0
        assert len(server.seen) == 4
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert list(figures) == ["all", "Count", "Object Existence", "Spatial", "other"]
    assert figures["all"]["accuracy"] == 25 and figures["all"]["cannot"] == 50
    assert figures["all"]["score"] == pytest.approx(25 * (1 + 1 / 3 + 1 / 2 + 0.1))
    assert figures["Spatial"]["accuracy"] == 100 and figures["Object Existence"]["accuracy"] == 0
    submission = json.loads((tmp_path / "s.json").read_text())
    assert submission == {"nat_001": "a cat on the ground", "2.jpg": "a cat on the ground"}
    assert "left out" in capsys.readouterr().err


# ---------------------------------------------------------------- intervals
def test_intervals_draw_images_with_all_their_items():
    """50 images, each wholly covered or not at all: the interval is as wide as that of 50 coins."""
    items = {
        f"SO{k}.jpg": [{"item": f"{i}?", "category": "x"} for i in range(20)] for k in range(50)
    }
    rng = random.Random(0)
    rows = [{"image": image, "caption": rng.choice(["yes", "not_mentioned"])} for image in items]

    class Known:
        benchmark = capeval

        def get(self, caption, item):
            return caption

    row = verdicts.judged_figures(rows, items, Known(), 1000, 0)["figures"]["all"]
    low, high = row["intervals"]["C"]
    assert 24 < high - low < 32 and row["items"] == 1000


# ---------------------------------------------------------------- a user's mistakes
def one_line(capsys, *argv):
    assert run(*argv) == 1
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if "by file name alone" not in line]
    assert captured.out == "" and line.startswith("evaluate.py: ")
    return line


def test_files_that_cannot_be_used(inputs, tmp_path, capsys):
    captions, checklist = inputs
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert "no usable row" in one_line(capsys, captions, "--checklist", empty)
    assert "no usable row" in one_line(capsys, captions, "--captionqa", checklist)
    assert "cannot be read" in one_line(capsys, captions, "--checklist", tmp_path / "nowhere")
    other = write_rows(tmp_path / "other.jsonl", CAPTIONS[2:3])
    assert "none of its 1 images is in" in one_line(capsys, other, "--checklist", checklist)
    golden = write_rows(tmp_path / "golden.jsonl", [{"image": "TI002.png", "chosen": "a"}])
    assert "--checklist needs captions" in one_line(capsys, golden, "--checklist", checklist)
    twice = write_rows(tmp_path / "twice.jsonl", [CAPTIONS[1], {**CAPTIONS[1], "caption": "b"}])
    flags = ["--checklist", checklist, "--submission", tmp_path / "s.json"]
    assert "several captions" in one_line(capsys, twice, *flags)
    (tmp_path / "taken").write_text("")
    flags = ["--checklist", checklist, "--verdicts", tmp_path / "taken/v.jsonl"]
    assert "taken" in one_line(capsys, captions, *flags)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    "argv",
    [
        "c t --checklist k",
        "c --checklist k --captionqa q",
        "c t --submission s",
        "c t --verdicts v",
        "c t --tool hf:a",
        "c --checklist k --tool http://x/v1",
        "c --checklist k --verdicts ./c",
        "c --checklist k --verdicts k",
    ],
)
def test_senseless_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv.split())
    message = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2 and message.count("\n") == 1


def test_the_judge_s_flags_are_those_of_golden():
    args = evaluate.parse_args(
        ["c.jsonl", "--checklist", "k", "--tool", "hf:a", "--tool-batch", "3"]
    )
    assert tool_llm.tool_name(args) == "hf:a" and args.tool_batch == 3
    assert str(args.verdicts) == "c.verdicts.jsonl"


def test_a_judge_that_is_not_needed_is_not_opened(inputs, tmp_path):
    """A server that is gone, and a model that is not there: nothing is asked of them."""
    with serving(judge) as server:
        assert run_judge(server, *inputs) == 0
    assert run_judge(server, *inputs, cache="other") == 0
    rows = verdicts_of(tmp_path)
    known = verdicts.Verdicts(tmp_path / "captions.verdicts.jsonl", "hf:nowhere", capeval)
    for row in rows:
        caption = next(c["caption"] for c in CAPTIONS if c["image"].endswith(row["image"]))
        question = {"image": row["image"], "caption": caption, "items": [{"item": row["asked"]}]}
        known.add(question, [row["verdict"]])
    assert run(inputs[0], "--checklist", inputs[1], "--tool", "hf:nowhere") == 0
