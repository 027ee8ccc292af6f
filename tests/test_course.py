"""What holds for every notebook of the course, for the README and for the package as a whole."""
import ast
import json
import re
import runpy
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
LESSONS = sorted(NBS.glob("[0-9][0-9]*_*.ipynb"))
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
by_name = dict(ids=lambda p: p.stem)


def cells(path, kind=None):
    all_cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in all_cells if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def prose(path):
    return "\n".join(source(c) for c in cells(path, "markdown"))


def exported_modules(path):
    "The modules that a lesson exports into: its default and those it names."
    text = "\n".join(source(c) for c in cells(path, "code"))
    return set(re.findall(r"^#\| *(?:default_exp|exports?) +(\w+)", text, re.M))


@pytest.mark.parametrize("path", [NBS / "index.ipynb", *LESSONS], **by_name)
def test_the_first_cell_is_title_and_subtitle_alone(path):
    "nbdev makes the page's title of this cell, and drops whatever else stands in it."
    first, *_ = cells(path)
    assert first["cell_type"] == "markdown"
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+\n*", source(first))


@pytest.mark.parametrize("path", LESSONS, **by_name)
def test_import_cells_hold_only_imports(path):
    "To build the site nbdev runs each cell that imports something, and none of the lesson before it."
    for cell in cells(path, "code"):
        code = source(cell)
        if re.search(r"^#\| *exports?\b", code, re.M):
            continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.M)).body}
        assert len(kinds) < 2, code


@pytest.mark.parametrize("path", LESSONS, **by_name)
def test_the_site_shows_the_source_of_what_is_exported(path):
    "nbdev hides the source of a function under `#| export`; `#| exports` shows it."
    for cell in cells(path, "code"):
        code = source(cell)
        if re.search(r"^#\| *export\b", code, re.M):
            public = [n.name for n in ast.parse(code).body
                      if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
            assert not public, f"say `#| exports`: {public}"


@pytest.mark.parametrize("path", LESSONS, **by_name)
def test_a_lesson_opens_with_what_it_exports_and_how_long_it_takes(path):
    opening = prose(path)[:2000]
    for module in exported_modules(path):
        assert f"nanomoe.{module}" in opening, f"the opening does not say that it exports nanomoe.{module}"
    assert re.search(r"\b(second|minute)s?\b", opening), "the opening does not say how long it takes"


@pytest.mark.parametrize("path", LESSONS, **by_name)
def test_a_lesson_ends_with_recap_pitfalls_and_exercises(path):
    headings = re.findall(r"^#{2,3} (.*)$", prose(path), re.M)
    assert any(re.search("recap", h, re.I) for h in headings), headings
    assert any(re.search("what could go wrong", h, re.I) for h in headings), headings
    assert 3 <= sum(h.startswith("Exercise ") for h in headings) <= 4, headings
    assert (NBS / "solutions" / f"{path.stem}_solutions.ipynb").exists()


@pytest.mark.parametrize("path", LESSONS, **by_name)
def test_a_lesson_opens_every_module_it_exports(path):
    "A second module of a lesson has a notebook in nbs/modules that opens it, or nbdev_export would append for ever."
    text = "\n".join(source(c) for c in cells(path, "code"))
    default = re.findall(r"^#\| *default_exp +(\w+)", text, re.M)
    assert len(default) == 1
    for module in exported_modules(path) - set(default):
        opener = NBS / "modules" / f"00_{module}.ipynb"
        assert opener.exists() and opener.name < path.name


@pytest.mark.parametrize("path", NOTEBOOKS, **by_name)
def test_stored_outputs_are_small_and_tell_nothing_of_the_machine(path):
    outputs = [o for c in cells(path, "code") for o in c.get("outputs", [])]
    text = json.dumps(outputs)
    assert len(text) < 600_000
    private = re.search(r"/(home|Users|root|work|tmp|private|var/folders)/[\w.-]+|[A-Z]:\\\\\w+|site-packages|ipykernel_\d+", text)
    assert not private, private
    kinds = {o["output_type"] for o in outputs}
    assert "error" not in kinds
    stderr = "".join("".join(o["text"]) for o in outputs if o.get("name") == "stderr")
    assert "Warning" not in stderr, stderr


@pytest.mark.parametrize("path", NOTEBOOKS, **by_name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)", prose(path)):
        if not re.match(r"\w+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_site_lists_the_lessons_in_order():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert config["project"]["output-dir"] == settings["DEFAULT"]["doc_path"]
    assert config["website"]["repo-url"] == settings["DEFAULT"]["git_url"]
    assert config["execute"] == {"enabled": False}
    listed = re.findall(r"href: (\d\d\w*_\w+\.ipynb)\n\s+text: \d", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert listed == [p.name for p in LESSONS]


def test_the_readme_is_the_home_page():
    render = runpy.run_path(str(ROOT / ".ci" / "readme.py"))["render"]
    assert (ROOT / "README.md").read_text(encoding="utf-8") == render(), "run: python .ci/readme.py"


def test_the_readme_links_to_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"\w+:", t)]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_importing_the_package_is_light():
    code = ("import sys, time; start = time.perf_counter(); import nanomoe; took = time.perf_counter() - start;"
            "assert took < 0.2, took; assert nanomoe.__version__;"
            "heavy = {'torch', 'numpy', 'datasets', 'tokenizers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "nanomoe").glob("[a-z]*.py")), **by_name)
def test_imports_run_one_way(path):
    "A module of one lesson imports only modules of the same lesson or an earlier one."
    order = {m: k for k, lesson in reversed(list(enumerate(LESSONS))) for m in exported_modules(lesson)}    # a module belongs to the first lesson that writes in it
    if path.stem not in order:
        return
    text = path.read_text(encoding="utf-8")
    imported = re.findall(r"^\s*(?:from \.(\w+) import|from nanomoe\.(\w+) import|import nanomoe\.(\w+))", text, re.M)
    for module in {"".join(m) for m in imported}:
        assert order.get(module, 99) <= order[path.stem], f"nanomoe.{path.stem} imports nanomoe.{module}"
