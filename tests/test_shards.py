"""shards.py: who owns an image, what counts as done, and files that a kill cannot damage."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from stages import Full, read_rows, write_rows

from plumbing import shards
from plumbing.errors import InputError

ALONE = SimpleNamespace(rank=0, world=1, is_master=True)


def rank_of(rank, world):
    return SimpleNamespace(rank=rank, world=world, is_master=rank == 0)


def length(row):
    return {**row, "n": len(row["image"])}


def no_work(row):
    raise AssertionError("there is nothing to do")


def run_pass(out, ranks, name, work, images=(), **how):
    """Do a pass that makes work(row) of each row -> (images done, seconds)."""
    with shards.Pass(out, ranks, name, images, **how) as todo:
        for row in todo.rows():
            todo.write(work(row))
    return todo.count, todo.seconds


# ---------------------------------------------------------------- owners
def test_an_owner_is_the_hash_of_the_name():
    names = ("00000.png", "a b.png", "more/deep/ä.png", "\udcff.png", "")
    expected_owners = {
        1: [0, 0, 0, 0, 0],
        2: [0, 1, 0, 1, 0],
        6: [4, 5, 4, 1, 4],
        1000: [604, 787, 794, 799, 652],
    }
    for world, expected in expected_owners.items():
        assert [shards.owner(name, world) for name in names] == expected


@pytest.mark.parametrize("world", [2, 3, 6, 48])
def test_images_spread_evenly_over_the_ranks(world):
    n = 400 * world
    owned = Counter(shards.owner(f"folder/{k:06d}.jpg", world) for k in range(n))
    assert sorted(owned) == list(range(world))
    chi_squared = sum((count - 400) ** 2 / 400 for count in owned.values())
    assert chi_squared < world + 4 * (2 * world) ** 0.5


# ---------------------------------------------------------------- what is done
def test_finished_finds_the_rows_of_all_ranks_but_no_torn_line(tmp_path):
    write_rows(tmp_path / "look-0.jsonl", [{"image": "a", "n": 1}, {"image": "ä\n", "n": 2}])
    write_rows(tmp_path / "look-12.jsonl", [{"image": "c", "n": 3}])
    write_rows(tmp_path / "other-0.jsonl", [{"image": "x", "n": 4}])
    with (tmp_path / "look-0.jsonl").open("a") as file:
        file.write('{"image": "d", "n": 5}')  # whole but for its end: it may be a part of a number
    places, failed = shards.finished(tmp_path, "look")
    assert [row["n"] for row in shards.rows_at(places[name] for name in ("c", "a", "ä\n"))] == [
        3,
        1,
        2,
    ]
    assert places.keys() == {"a", "ä\n", "c"} and not failed
    assert shards.finished(tmp_path, "nothing") == ({}, set())


def test_a_good_row_replaces_an_error_of_the_image_in_whatever_file(tmp_path):
    write_rows(
        tmp_path / "look-0.jsonl",
        [{"image": "a", "error": "e"}, {"image": "b", "n": 1}, {"image": "c", "error": "e"}],
    )
    write_rows(
        tmp_path / "look-1.jsonl",
        [{"image": "c", "n": 2}, {"image": "b", "error": "e"}, {"image": "d", "error": "e"}],
    )
    places, failed = shards.finished(tmp_path, "look")
    assert failed == {"a", "d"} and places.keys() == {"a", "b", "c", "d"}
    assert [row.get("n") for row in shards.rows_at(places[name] for name in "abcd")] == [
        None,
        1,
        2,
        None,
    ]


@pytest.mark.parametrize("whole", [0, 1, 3])
@pytest.mark.parametrize("torn", [0, 1, 70_000, 140_000])
def test_an_appender_cuts_off_a_torn_line_and_continues(tmp_path, whole, torn):
    """Also a line longer than the block that it reads at once."""
    rows = [{"image": str(k), "text": "x" * 60_000} for k in range(whole)]
    path = write_rows(tmp_path / "look-3.jsonl", rows)
    with path.open("a") as file:
        file.write("y" * torn)
    shards.Appender(tmp_path, "look", 3).write({"image": "new"})
    assert read_rows(path) == [*rows, {"image": "new"}]


def test_a_line_is_there_as_soon_as_it_is_written_and_is_plain_ascii(tmp_path):
    appender = shards.Appender(tmp_path, "look", 0)
    row = {"image": "\udcff\n\u2028ä.png", "text": "</x>\x00"}
    appender.write(row)
    assert (tmp_path / "look-0.jsonl").read_bytes() == json.dumps(row).encode("ascii") + b"\n"


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_is_reported_and_the_next_run_cuts_off_the_partial_line(tmp_path, room):
    appender = shards.Appender(tmp_path, "look", 0)
    appender.write({"image": "a"})
    appender.file = Full(appender.file, room)
    with pytest.raises(
        InputError, match=r"look-0\.jsonl: No space left.*make room and run the same"
    ) as error:
        appender.write({"image": "b", "text": "c" * 40})
    assert "\n" not in str(error.value)
    shards.Appender(tmp_path, "look", 0).write({"image": "c"})
    assert read_rows(tmp_path / "look-0.jsonl") == [{"image": "a"}, {"image": "c"}]


# ---------------------------------------------------------------- a pass
def test_a_pass_does_each_image_once_with_any_number_of_ranks(tmp_path):
    """Rounds with another number of ranks each, a few images more in each."""
    rng, names = random.Random(0), [f"{k}.png" for k in range(60)]
    rng.shuffle(names)
    for until, world in ((10, 2), (25, 3), (25, 1), (40, 7), (60, 2)):
        seen = []

        def look(row, seen=seen):
            seen.append(row["image"])
            return length(row)

        for rank in rng.sample(range(world), world):
            before = len(seen)
            n, seconds = run_pass(tmp_path, rank_of(rank, world), "look", look, names[:until])
            assert n == len(seen) - before and seconds >= 0
            assert seen[before:] == sorted(seen[before:])
            assert {shards.owner(name, world) for name in seen[before:]} <= {rank}
    rows = [row for path in tmp_path.glob("look-*.jsonl") for row in read_rows(path)]
    assert sorted(row["image"] for row in rows) == sorted(names)
    assert all(row["n"] == len(row["image"]) for row in rows)
    assert run_pass(tmp_path, ALONE, "look", no_work, names) == (0, 0.0)


def test_a_pass_without_anything_to_do_leaves_no_file(tmp_path):
    run_pass(tmp_path, ALONE, "look", length, "ab")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run_pass(tmp_path, rank_of(1, 2), "look", no_work, "ab") == (0, 0.0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pass_reads_the_rows_of_the_one_before_and_hands_its_errors_on(tmp_path):
    write_rows(tmp_path / "one-0.jsonl", [{"image": "b", "n": 2}, {"image": "a", "error": "torn"}])
    write_rows(tmp_path / "one-5.jsonl", [{"image": "c", "n": 3}])
    run_pass(tmp_path, ALONE, "two", lambda row: {**row, "m": 10 * row["n"]}, before="one")
    assert read_rows(tmp_path / "two-0.jsonl") == [
        {"image": "b", "n": 2, "m": 20},
        {"image": "c", "n": 3, "m": 30},
        {"image": "a", "error": "torn"},
    ]


def test_where_only_errors_are_left_they_are_handed_on_without_any_work(tmp_path):
    write_rows(tmp_path / "one-0.jsonl", [{"image": name, "error": "torn"} for name in "ba"])
    with shards.Pass(tmp_path, ALONE, "two", before="one") as todo:
        assert todo.images == [] and todo.source.keys() == {"a", "b"}
    assert todo.count == 2
    assert read_rows(tmp_path / "two-0.jsonl") == [{"image": k, "error": "torn"} for k in "ab"]
    assert run_pass(tmp_path, ALONE, "two", no_work, before="one") == (0, 0.0)


def test_errors_are_done_again_only_when_that_is_asked_for(tmp_path):
    images, broken = "abcd", {"b", "d"}

    def look(row):
        return {**row, "error": "broken"} if row["image"] in broken else {**row, "n": 1}

    run_pass(tmp_path, ALONE, "look", look, images)
    assert run_pass(tmp_path, ALONE, "look", no_work, images) == (0, 0.0)
    broken.discard("d")
    assert run_pass(tmp_path, ALONE, "look", look, images, retry_errors=True)[0] == 2
    assert [row["image"] for row in read_rows(tmp_path / "look-0.jsonl")] == list("abcdbd")
    places, failed = shards.finished(tmp_path, "look")
    rows = shards.rows_at(places[name] for name in "abcd")
    assert failed == {"b"} and [row.get("n") for row in rows] == [1, None, 1, 1]
    broken.clear()
    rank = rank_of(shards.owner("b", 2), 2)
    assert run_pass(tmp_path, rank, "look", look, images, retry_errors=True)[0] == 1
    assert run_pass(tmp_path, ALONE, "look", no_work, images, retry_errors=True) == (0, 0.0)


def test_what_was_done_before_a_pass_broke_off_is_kept(tmp_path):
    write_rows(tmp_path / "one-0.jsonl", [{"image": name} for name in "abcd"])
    write_rows(tmp_path / "one-1.jsonl", [{"image": "e", "error": "torn"}])

    def look(row):
        if row["image"] == "c":
            raise InputError("enough")
        return {**row, "n": 1}

    with pytest.raises(InputError, match="enough"):
        run_pass(tmp_path, ALONE, "look", look, before="one")
    assert [row["image"] for row in read_rows(tmp_path / "look-0.jsonl")] == ["a", "b"]
    seen = []
    run_pass(tmp_path, ALONE, "look", lambda row: seen.append(row["image"]) or row, before="one")
    assert seen == ["c", "d"]
    assert [row["image"] for row in read_rows(tmp_path / "look-0.jsonl")] == list("abcde")


# ---------------------------------------------------------------- settings
def settings(**more):
    first = {"n": 8, "seed": 0, **more}
    return {"one": first, "two": {**first, "threshold": more.get("threshold", 0.5)}}


def test_settings_are_remembered_and_another_one_is_refused_where_there_are_rows(tmp_path):
    shards.check_settings(tmp_path, ALONE, ["one", "two"], settings())
    shards.check_settings(
        tmp_path, ALONE, ["one", "two"], settings(seed=1)
    )  # there are no rows of the other yet
    write_rows(tmp_path / "one-4.jsonl", [{"image": "a"}])
    remembered = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(
        InputError,
        match=r"one was done with another seed \(1, now 0\).*another --out.*one-\*\.jsonl",
    ):
        shards.check_settings(tmp_path, ALONE, ["one", "two"], settings())
    assert (tmp_path / "settings.json").read_bytes() == remembered
    shards.check_settings(
        tmp_path,
        ALONE,
        ["one", "two"],
        settings(seed=1, threshold=0.25) | {"one": settings(seed=1)["one"]},
    )


def test_a_pass_that_is_not_run_is_not_checked_and_keeps_its_settings(tmp_path):
    shards.check_settings(tmp_path, ALONE, ["one", "two"], settings())
    for what in ("one", "two"):
        write_rows(tmp_path / f"{what}-0.jsonl", [{"image": "a"}])
    (tmp_path / "one-0.jsonl").unlink()
    shards.check_settings(tmp_path, ALONE, ["one"], settings(n=4))
    with pytest.raises(InputError, match=r"two was done with another n \(8, now 4\)"):
        shards.check_settings(tmp_path, ALONE, ["two"], settings(n=4))


def test_only_the_first_rank_writes_settings(tmp_path):
    shards.check_settings(tmp_path, rank_of(1, 2), ["one"], settings())
    assert list(tmp_path.iterdir()) == []
