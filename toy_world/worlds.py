"""The toy worlds by name, and which one the folder of a base belongs to.

A world is a module with these names: make_scene, facts, truth, draw, draw_scenes, close_up,
as_close_up, questions; MARKS; WORDS, all words of its texts; STARTS, with which they begin;
RARE_WORDS, and if there are any TAIL, the `tail` of make_scene and draw_scenes for tests on them.
"""
import json

from plumbing import files
from plumbing.errors import InputError
from toy_world import hard, world

WORLDS = {"easy": world, "hard": hard}


def remember(folder, name):
    """Write to the folder of a base which world it is trained on."""
    files.write_json(folder / "world.json", {"world": name})


def name_of(folder, name=None):
    """The world of a base: as its folder says, "easy" where it says nothing.

    name: as the flag --world says; InputError where the folder says otherwise.
    """
    path = folder / "world.json"
    try:
        known = json.loads(path.read_text("utf-8"))["world"] if path.is_file() else name or "easy"
        WORLDS[known]
    except (ValueError, LookupError, TypeError):
        raise InputError(f'{path}: does not name a world; write {{"world": "hard"}}') from None
    if name not in (None, known):
        raise InputError(f"--world {name}: {folder} was trained on the {known} world; leave "
                         "the flag out")
    return known
