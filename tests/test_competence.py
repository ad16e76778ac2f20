"""toy_world/competence.py: the ladder of bases, and captions by votes. The experiments run in test_claims.py."""

from toy_world import competence
from toy_world.lab import Lab
from toy_world.steps import CODE


def test_a_rung_is_trained_into_the_ladder_unless_it_is_the_shipped_base(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(Lab, "run", lambda lab, makes, *command, **how: commands.append(command))
    shipped = competence.rung_of(Lab(tmp_path, 0), f"{competence.SHIPPED} steps")
    assert shipped.base == CODE / "assets/toy" and not commands
    low = competence.rung_of(Lab(tmp_path, 0), "1000 steps")
    assert low.base == tmp_path / "ladder/steps-1000"
    assert commands == [("toy.py", "pretrain", "--steps", 1000, "--out", low.base)]
    assert low.out != shipped.out and low.scenes == shipped.scenes
    assert competence.rung_of(Lab(tmp_path, 1), "1000 steps").scenes != low.scenes


def statement(text, votes, group=None):
    return {"text": text, "votes": votes, "group": group}


def test_a_caption_by_votes_asks_nothing_and_resolves_by_votes():
    first = {"caption": "red ring", "finish": "eos"}
    rows = [
        {
            "image": "a.png",
            "samples": [first, {"caption": "blue ring", "finish": "eos"}],
            "statements": [
                statement("background gray", 2),
                statement("top-left red ring", 3, "g"),
                statement("top-left blue ring", 4, "g"),
                statement("center blue cross", 1),
            ],
        },
        {"image": "b.png", "samples": [first], "statements": [statement("red ring", 6)]},
    ]
    assert competence.voted(rows) == [
        {"image": "a.png", "chosen": "background gray, top-left blue ring", "rejected": [first]}
    ]
