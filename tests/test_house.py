"""The house: who imports whom, and that files stay short enough to be read."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for p in ROOT.rglob("*.py") if not p.relative_to(ROOT).parts[0].startswith("."))
CODE = [p for p in FILES if p.relative_to(ROOT).parts[0] in ("plumbing", "toy_world") or p.parent == ROOT]
ROOMS = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in CODE if p.name != "__init__.py"}
STAGES = {"sft", "qa_adapter", "golden", "dpo", "caption"}
AT_THE_ROOT = {name for name in ROOMS if "." not in name}


@cache
def tree(path):
    return ast.parse(path.read_text("utf-8"))


def imported(path):
    """The modules of this project that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & ROOMS.keys()


GRAPH = {name: imported(path) for name, path in ROOMS.items()}


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


# ---------------------------------------------------------------- imports
def test_the_graph_is_read_right():
    assert {"base", "plumbing.data", "plumbing.train"} <= GRAPH["dpo"] and not GRAPH["plumbing.errors"]


def test_plumbing_imports_nothing_of_the_method():
    for name in (name for name in GRAPH if name.startswith("plumbing.")):
        assert all(other.startswith("plumbing.") for other in GRAPH[name]), name


def test_no_stage_imports_a_stage():
    assert GRAPH.keys() >= STAGES
    for stage in STAGES:
        assert not GRAPH[stage] & STAGES, stage


def depth(name, above=()):
    """How many imports lead down from a module at most; fails where they lead back to it."""
    assert name not in above, " -> ".join([*above, name])
    return max((1 + depth(other, (*above, name)) for other in GRAPH[name]), default=0)


def test_the_imports_have_no_cycle_and_a_stage_is_not_deep():
    depths = {name: depth(name) for name in GRAPH}
    assert max(depths[stage] for stage in STAGES) <= 5, depths


def test_one_error_class_from_one_place():
    for path in CODE:
        defined = [n.name for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef)]
        assert ("InputError" in defined) == (path == ROOMS["plumbing.errors"]), path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and any(a.name == "InputError" for a in node.names):
                assert node.module == "plumbing.errors", path


# ---------------------------------------------------------------- sizes
def test_the_root_holds_the_method_and_the_commands():
    assert len(AT_THE_ROOT) <= 15
    assert {*STAGES, "model", "chunking", "adapters", "generate", "tool_llm", "evaluate"} <= AT_THE_ROOT


def functions(node):
    return [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@named(CODE)
def test_files_and_functions_are_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 450
    for function in functions(tree(path)):
        assert function.end_lineno - function.lineno < 60, function.name


@named([ROOMS[name] for name in sorted(AT_THE_ROOT)])
def test_a_file_of_the_root_has_hardly_a_function_in_a_function(path):
    nested = {inner.name for outer in functions(tree(path)) for inner in functions(outer)[1:]}
    assert len(nested) <= 2, nested


def nesting(node, depth=0):
    """How deep ifs, loops, withs and tries are nested below a node, not counting inner functions."""
    deeper = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    inner = (n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.FunctionDef | ast.ClassDef))
    return max((nesting(n, depth + isinstance(n, deeper)) for n in inner), default=depth)


@named(CODE)
def test_nothing_is_nested_deeply(path):
    assert all(nesting(function) <= 4 for function in functions(tree(path)))


@named(FILES)
def test_lines_fit_a_hundred_columns(path):
    lines = path.read_text("utf-8").splitlines()
    assert sum(len(line) > 100 for line in lines) <= 0.05 * len(lines)


# ---------------------------------------------------------------- README
def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 1500
    links = re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", text)
    outside = [link for link in links if "://" in link]
    assert len(outside) >= 12 and all(re.fullmatch(r"https://[\w.-]+(/[^\s]*)?", link) for link in outside)
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text("utf-8")
        pictures = re.findall(r'src="([^"]+)"', text)
        for link in re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", text) + pictures:
            if "://" not in link and not link.startswith("#"):
                assert (page.parent / link.split("#")[0]).exists(), f"{page.name}: {link}"


def test_every_picture_is_shown_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = " ".join(page.read_text("utf-8") for page in pages)
    for picture in (ROOT / "assets").rglob("*.png"):
        if picture.parent.name != "examples":
            assert picture.name in shown, picture


def test_every_file_is_in_the_readme_s_layout():
    text = (ROOT / "README.md").read_text("utf-8")
    layout = text + "".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    for name, path in ROOMS.items():
        assert path.name in layout or path.stem in layout, name
