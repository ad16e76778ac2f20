"""caption.Captioner in Ray Data, with the real Ray: two actors, bytes and paths, a broken image."""

import os

import pytest
from stages import CODE, read_rows, run

import caption
from toy_world import world

ray = pytest.importorskip("ray", reason="needs ray[data]")
TOY = str(CODE / "assets/toy")


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two processors on this machine, whose workers find this code."""
    paths = os.pathsep.join([str(CODE), os.environ["PYTHONPATH"]])
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100 << 20,
        runtime_env={"env_vars": variables},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def test_two_actors_caption_bytes_and_paths(cluster, tmp_path):
    world.draw_scenes(tmp_path / "scenes", [f"ray {k}" for k in range(12)])
    files = sorted((tmp_path / "scenes").glob("*.png"))
    assert run(caption, *files, "--base", TOY, "--adapters", "none", "--out", tmp_path / "out") == 0
    expected = [row["caption"] for row in read_rows(tmp_path / "out/captions.jsonl")]
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:100])
    missing = tmp_path / "missing.png"
    paths = [*map(str, files), str(broken), str(missing)]
    contents = [path.read_bytes() for path in [*files, broken]] + [b"no image"]
    for images in (paths, contents):
        rows = [{"id": k, "image": image, "tag": "x"} for k, image in enumerate(images)]
        data = ray.data.from_items(rows, override_num_blocks=4).map_batches(
            caption.Captioner,
            fn_constructor_args=["--base", TOY, "--adapters", "none"],
            batch_size=4,
            concurrency=2,
            num_cpus=0.5,
        )
        found = sorted(data.take_all(), key=lambda row: int(row["id"]))
        assert [row["id"] for row in found] == list(range(14))
        assert [row["caption"] for row in found] == [*expected, None, None]
        assert [row["error"] is None for row in found] == [True] * 12 + [False] * 2
        assert all(row["error"].isprintable() for row in found[12:])
