"""The site, without Quarto: its pages as nbdev makes them, and everything in them that can break.

The pages are made once, as in `nbdev_docs` before it calls Quarto; then links, anchors, pictures and maths are
followed in what they hold. What the plain pages say is compared with the code that it is about.
"""
import ast
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ET
from configparser import ConfigParser
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from latex2mathml.converter import convert
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PAGES = [p.relative_to(NBS) for p in sorted([*NBS.glob("*.ipynb"), *NBS.glob("*.qmd"), *NBS.glob("solutions/*.ipynb")])]
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
SITE = SETTINGS["doc_host"] + SETTINGS["doc_baseurl"] + "/"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.as_posix())


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "What the site needs of the repository."
    folder = tmp_path_factory.mktemp("clone")
    for name in ("nbs", "nanomoe"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_quarto.yml"))
    for target in (folder, folder / "nbs"): shutil.copy(ROOT / "_quarto.yml", target)
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


@pytest.fixture(scope="module")
def preview(clone):
    "The process and the port of `nanomoe docs-preview`, which makes all pages and serves them."
    with socket.create_server(("127.0.0.1", 0)) as probe: port = probe.getsockname()[1]
    # it ends with this process, too: its standard input closes then
    leash = "import os, sys, threading; threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start(); "
    start = f"sys.argv[1:] = ['docs-preview', '--no-open', '--port', '{port}']; from nanomoe.cli import main; main()"
    with open(clone / "log", "w") as log, subprocess.Popen([sys.executable, "-W", "ignore", "-c", leash + start], cwd=clone, stdin=subprocess.PIPE, stdout=log, stderr=log) as server:
        try:
            deadline = time.monotonic() + 240
            while f"serving {clone}" not in (clone / "log").read_text():
                assert server.poll() is None and time.monotonic() < deadline, (clone / "log").read_text()[-2000:]
                time.sleep(0.3)
            yield server, port
        finally:
            server.terminate()
            server.wait(60)      # before its standard input closes


@pytest.fixture(scope="module")
def site(request, clone):
    "The folder of the pages that Quarto would turn into HTML."
    if importlib.util.find_spec("smalldocs"): request.getfixturevalue("preview")
    else:
        code = "from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs\nrefresh_quarto_yml(); proc_nbs(n_workers=0)"
        made = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=clone, capture_output=True, text=True, encoding="utf-8")
        assert made.returncode == 0, made.stderr[-3000:]
    return clone / "_proc"


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text_of(path):
    "What a page says: its Markdown, and the Markdown that its cells put out."
    if path.suffix == ".qmd": return re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.S)
    parts = []
    for cell in cells(path):
        if cell["cell_type"] == "markdown": parts.append("".join(cell["source"]))
        for output in cell.get("outputs", []): parts.append("".join(output.get("data", {}).get("text/markdown", "")))
    return "\n\n".join(parts)


def test_every_lesson_shows_its_api(site):
    for lesson in (path for path in PAGES if re.match(r"\d\d", path.name)):
        page = ["".join(cell["source"]) for cell in cells(site / lesson)]
        assert page[0].startswith("---\n") and "title: " in page[0]
        assert any("show_doc(" in cell for cell in page) or "solutions" in lesson.parts, f"{lesson} documents nothing"


def spans(text):
    "All pieces of the Markdown, inner ones too."
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or []


def links(text): return [token.attrs["href"] for token in spans(text) if token.type == "link_open"]


def html_of(path):
    "The HTML of a page, in its Markdown and in what its cells put out; what is shown as code is none."
    outputs = [output for cell in (cells(path) if path.suffix == ".ipynb" else []) for output in cell.get("outputs", [])]
    return without_code(text_of(path) + "".join("".join(output.get("data", {}).get("text/html", "")) for output in outputs))


def links_in_html(html): return re.findall(r"<a\b[^>]*\bhref=[\"']([^\"']+)", html)


def without_code(text): return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```+|~~~+).*?^\1", "", text, flags=re.S | re.M))


def anchor(heading):
    "The name that Pandoc gives to a heading."
    heading = re.sub(r"[^\w\-. ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", heading)) or "section"


def anchors(path):
    text = text_of(path)
    found = re.findall(r"\{[^}\n]*#([\w.-]+)[^}\n]*\}|\bid=\"([^\"]+)\"", text)
    headings = re.findall(r"^#{1,6} +(.+?) *(?:\{.*\})?$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {a or b for a, b in found} | {anchor(h) for h in headings}


def front_matter(path):
    text = path.read_text(encoding="utf-8") if path.suffix == ".qmd" else "".join(cells(path)[0]["source"])
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.S)[1])


def html_names(site):
    "The address of each page on the site -> its file."
    names = {}
    for page in PAGES:
        name = front_matter(site / page).get("output-file", page.with_suffix(".html").name)
        names[(page.parent / name).as_posix()] = site / page
    return names


def problem_of(link, page, site):
    "What is wrong with a link of a page; None if nothing is."
    repository = SETTINGS["git_url"] + "/"
    if link.startswith(repository):
        path = re.sub(r"^(blob|tree|edit)/[^/]+/|#.*$", "", link[len(repository):])
        return None if (ROOT / path).exists() else "no such file in the repository"
    if link.startswith(SITE):
        address, _, place = link[len(SITE):].partition("#")
        target = html_names(site).get(address)
    elif re.match(r"https?:", link): return None if re.match(r"https://[\w.-]+\.\w+(/|$)", link) else "not an address"
    elif re.match(r"\w+:", link): return "neither a page nor https"
    else:
        address, _, place = unquote(link).partition("#")
        target = (site / page).parent / address if address else site / page
        if target.exists() and target.suffix in (".ipynb", ".qmd") and target.resolve().relative_to(site.resolve()) not in PAGES: return "not a page of the site"
    if target is None or not target.exists(): return "no such page"
    return None if not place or place in anchors(target) else f"no such place: {sorted(anchors(target))}"


@each_page
def test_links_lead_somewhere(page, site):
    problems = {link: said for link in [*links(text_of(site / page)), *links_in_html(html_of(site / page))] if (said := problem_of(link, page, site))}
    assert not problems


def test_a_link_in_html_is_one():
    assert links_in_html('<p><a class="x" href="nowhere.ipynb">a</a> <a\nhref=\'#b\'>b</a></p>') == ["nowhere.ipynb", "#b"]


@each_page
def test_nothing_refers_to_a_number_that_only_quarto_knows(page, site):
    "A reader of the notebook, and of the preview, would see @fig-loss."
    assert not re.findall(r"@(?:fig|eq|tbl|sec|lst)-[\w-]+", without_code(text_of(site / page)))


def test_a_broken_link_is_found(site):
    for link in ("nowhere.ipynb", "glossary.qmd#nowhere", "modules/00_files.ipynb", "#nowhere", SITE + "nowhere.html", SITE + "moe.html#nowhere",
                 SETTINGS["git_url"] + "/blob/main/nowhere.py", "file:///etc/passwd"):
        assert problem_of(link, Path("index.ipynb"), site), link
    for link in ("glossary.qmd#b", "03_moe.ipynb#balance", "#start", SITE + "moe.html#moe", SETTINGS["git_url"] + "/blob/main/settings.ini", "https://example.org"):
        assert problem_of(link, Path("index.ipynb"), site) is None, link


@each_page
def test_pictures_are_there_and_say_what_they_show(page, site):
    text = text_of(site / page)
    for token in spans(text):
        if token.type == "image":
            assert len(token.content) > 10, f"a picture without words: {token.attrs['src']}"
            assert ((site / page).parent / token.attrs["src"]).is_file(), token.attrs["src"]
    for tag in re.findall(r"<img\b[^>]*>", html_of(site / page)):
        assert re.search(r'\balt="[^"]+"', tag), tag
        source = re.search(r'\bsrc="([^"]+)"', tag)[1]
        assert source.startswith("data:image/") or ((site / page).parent / source).is_file(), source


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".ipynb"], ids=lambda p: p.as_posix())
def test_prose_before_a_cell_can_describe_its_picture(page):
    "nbs/alt.lua makes it the picture's alternative text, if the cell gives none with `#| fig-alt:`."
    before = ""
    for cell in cells(NBS / page):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": before = source.strip().split("\n\n")[-1]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}) and "fig-alt:" not in source: assert len(before) > 15, source[:200]


@each_page
def test_maths_can_be_read(page, site):
    "Every formula becomes MathML, and nothing of TeX is left in it."
    for formula in re.findall(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)\$(?!\d)", without_code(text_of(site / page)), re.S):
        tex = "".join(formula).strip()
        assert not re.search(r"\\\\(?!\s*$)", tex) or "\\begin" in tex, f"a doubled backslash: {tex}"
        assert "\\" not in re.sub(r"<annotation.*?</annotation>", "", convert(tex)), tex


def test_maths_that_cannot_be_read_is_found():
    with pytest.raises(Exception): convert(r"\frac{a}{")
    assert "\\" in convert(r"\nonsense{a}")


# What we use of Quarto's options, each looked up in its reference (Quarto 1.9).
ITEM = {"href": str, "text": str, "icon": str, "section": str, "contents": "items"}
KEYS = {
    "project": {"type": str, "output-dir": str, "render": list},
    "execute": {"enabled": bool},
    "website": {
        "title": str, "description": str, "site-url": str, "repo-url": str, "repo-branch": str, "repo-subdir": str, "repo-actions": list,
        "page-navigation": bool, "back-to-top-navigation": bool, "search": bool, "llms-txt": bool,
        "navbar": {"left": "items", "right": "items"},
        "sidebar": {"style": str, "contents": "items"},
    },
    "format": {"html": {"theme": {"light": str, "dark": list}, "respect-user-color-scheme": bool, "html-math-method": str, "toc": bool, "toc-depth": int,
                        "grid": {"sidebar-width": str, "body-width": str, "margin-width": str},
                        "code-copy": bool, "include-after-body": str, "filters": list}},
}


def unknown_keys(config, known, path=""):
    for key, value in config.items():
        if key not in known: yield f"{path}{key}"
        elif known[key] == "items":
            for item in value: yield from unknown_keys(item, ITEM, f"{path}{key}: ")
        elif isinstance(known[key], dict): yield from unknown_keys(value, known[key], f"{path}{key}: ")
        elif not isinstance(value, known[key]): yield f"{path}{key}: {value!r}"


def test_quarto_knows_what_we_tell_it():
    assert not list(unknown_keys(CONFIG, KEYS))
    assert list(unknown_keys({"website": {"navbar": {"left": [{"hrf": "x"}]}}, "formats": {}}, KEYS)) == ["website: navbar: left: hrf", "formats"]


def test_the_site_is_one_that_needs_nobody_else():
    html = CONFIG["format"]["html"]
    assert html["html-math-method"] == "mathml" and html["theme"]["light"] == "default" and html["theme"]["dark"][0] == "default"
    for path in NBS.glob("*.scss"): assert not re.search(r"https?:|@import|url\(", path.read_text(encoding="utf-8"))
    assert CONFIG["website"]["llms-txt"] and CONFIG["website"]["search"] and CONFIG["execute"] == {"enabled": False}
    for option in ([html["include-after-body"]] + html.get("filters", []) + html["theme"]["dark"][1:]): assert (NBS / option).is_file()


def hrefs(items): return [href for item in items for href in ([item["href"]] if "href" in item else hrefs(item["contents"]))]


def test_every_page_is_in_the_sidebar_once():
    assert sorted(hrefs(CONFIG["website"]["sidebar"]["contents"])) == sorted(p.as_posix() for p in PAGES)
    for item in hrefs(CONFIG["website"]["navbar"]["left"]): assert Path(item) in PAGES


def test_the_repository_is_named_in_one_place():
    "settings.ini says where it is; _quarto.yml repeats it once, and no page names another."
    text = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    assert text.count(SETTINGS["git_url"]) == 1 and CONFIG["website"]["repo-url"] == SETTINGS["git_url"]
    assert CONFIG["website"]["site-url"] == SITE.rstrip("/") and CONFIG["website"]["repo-branch"] == SETTINGS["branch"]
    assert CONFIG["website"]["repo-subdir"] == SETTINGS["nbs_path"] and CONFIG["website"]["title"] == SETTINGS["title"]
    assert CONFIG["website"]["description"] == SETTINGS["description"]
    user, name = SETTINGS["git_url"].split("/")[-2:]
    for page in PAGES: assert not re.findall(rf"github\.com/(?!{user}/{name}\b)[\w-]*/{SETTINGS['repo']}\b", text_of(NBS / page))


def test_the_home_page_names_every_command():
    "`nanomoe --help` and the table agree; a command that is added or goes has to be said there."
    from typer.main import get_command
    from nanomoe.cli import app

    def names(command, path=()):
        parts = getattr(command, "commands", None)
        return [" ".join(path)] if parts is None else [name for part in parts for name in names(parts[part], (*path, part))]

    said = re.findall(r"^\| `nanomoe ([\w -]+)` \|", text_of(NBS / "index.ipynb"), re.M)
    assert len(said) == len(set(said)) and set(said) == set(names(get_command(app))), "nbs/index.ipynb: the table of commands"


def test_the_home_page_names_every_lesson_and_its_modules():
    rows = dict(re.findall(r"^\| \[(\w+)\]\(\w+\.ipynb\) \| (.*) \|$", text_of(NBS / "index.ipynb"), re.M))
    lessons = sorted(NBS.glob("[0-9][0-9]*_*.ipynb"))
    assert list(rows) == [p.stem for p in lessons]
    for path in lessons:
        code = "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "code")
        for module in re.findall(r"^#\| *(?:default_exp|exports?) +(\w+)", code, re.M): assert f"`nanomoe.{module}`" in rows[path.stem], module


def test_the_home_page_counts_parameters_as_the_code_does():
    from nanomoe.config import preset
    from nanomoe.model import NanoMoE
    text = text_of(NBS / "index.ipynb")
    for name in ("smoke", "laptop", "full"): assert f"{NanoMoE(preset(name).model).num_parameters():,}" in text
    assert f"{NanoMoE(preset('full').model).num_parameters(active=True):,}" in text


def test_the_glossary_is_in_order_and_every_word_is_in_its_lesson():
    entries = re.findall(r"^- \*\*(.+?)\*\*: (.+) \[(\w+)\]\((\w+)\.ipynb\)$", (NBS / "glossary.qmd").read_text(encoding="utf-8"), re.M)
    terms = [term.lower().lstrip("[") for term, *_ in entries]
    assert len(entries) > 70 and terms == sorted(terms)
    for term, text, number, lesson in entries:
        assert lesson.startswith(number + "_") and len(re.findall(r"[.!?](?= |$)", text)) <= 2, term
        everything = json.dumps(cells(NBS / f"{lesson}.ipynb"), ensure_ascii=False).lower()
        for word in re.findall(r"[\w]{3,}", term.lower()):
            assert re.sub(r"(isation|ation|ing|s|e)$", "", word) in everything, f"{term}: not in {lesson}"


def sentences_of_the_code():
    "Every text of the package as a pattern, with anything where a value is filled in."
    for path in (ROOT / "nanomoe").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str): yield re.escape(node.value)


def test_troubleshooting_quotes_what_the_program_says():
    patterns = {p for p in sentences_of_the_code() if len(p.replace(".*", "")) > 12 and " " in p}
    quoted = re.findall(r"^Error: (.+)$", (NBS / "troubleshooting.qmd").read_text(encoding="utf-8"), re.M)
    assert len(quoted) > 25
    for sentence in quoted:
        assert any(re.fullmatch(p, sentence) or re.fullmatch("Error: " + p, sentence) or re.fullmatch(p, "Error: " + sentence) for p in patterns), sentence


def test_the_results_are_those_of_the_files():
    "The stored output of nbs/results.ipynb is what its code makes of nbs/results/*.json now."
    shown, namespace = [], {"Markdown": lambda text: shown.append(text)}
    code = ["".join(c["source"]) for c in cells(NBS / "results.ipynb") if c["cell_type"] == "code"]
    old = Path.cwd()
    try:
        os.chdir(NBS)
        with redirect_stdout(io.StringIO()):
            for source in code: exec(source.replace("from IPython.display import Markdown", ""), namespace)
    finally: os.chdir(old)
    stored = "".join("".join(o["data"]["text/markdown"]) for c in cells(NBS / "results.ipynb") for o in c.get("outputs", []))
    again = "cd nbs && jupyter nbconvert --to notebook --execute --inplace results.ipynb && cd .. && nbdev_clean --fname nbs/results.ipynb"
    assert [stored] == shown, f"run: {again}"
    assert namespace["as_rows"]({"base": {"sha256": "af", "bpb": 1.0}, "sft": {"bpb": 2.0}}) == [{"what": "bpb", "base": 1.0, "sft": 2.0}]
    for path in NBS.glob("results/*.json"):
        assert path.name in stored
        section = next(s for s in re.split(r"^## ", stored, flags=re.M) if path.name in s)
        assert "```bash\n" in section, f"{path.name} names no command that measures it: give it a `command`"


def test_the_picture_of_the_architecture_is_drawn_from_the_config():
    from nanomoe.config import ModelConfig
    draw = runpy.run_path(str(ROOT / ".ci" / "architecture.py"))["architecture_svg"]
    svg = draw(ModelConfig())
    assert (NBS / "images" / "architecture.svg").read_text(encoding="utf-8") == svg, "run: python .ci/architecture.py"
    other = draw(replace(ModelConfig(), num_experts=6, top_k=1, n_layers=3, vocab_size=5_000, d_model=64))
    assert other.count(">rests<") == 5 and "x 3<" in other and "5,000 tokens x 64" in other


def test_all_text_of_the_picture_stands_in_a_box():
    "So it can be read on a white page and on a black one."
    svg = ET.parse(NBS / "images" / "architecture.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    filled = [tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in svg.iter(name + "rect") if r.get("fill") != "none"]
    filled += [(float(c.get("cx")) - 11, float(c.get("cy")) - 11, 22, 22) for c in svg.iter(name + "circle")]
    assert svg.find(name + "title").text
    for text in svg.iter(name + "text"):
        x, y = float(text.get("x")), float(text.get("y"))
        half = len(text.text) * (4.6 if text.get("class") else 3.6)
        assert any(bx <= x - half and x + half <= bx + w and by < y < by + h for bx, by, w, h in filled), text.text


# The preview, without Quarto

@pytest.mark.skipif(not importlib.util.find_spec("smalldocs"), reason="the preview needs smalldocs, which needs Python 3.11")
def test_the_preview_serves_the_course_and_stops(preview):
    server, port = preview
    def page(name): return urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=60).read().decode()
    for name, words in (("index.html", "You will build a language model"), ("03_moe.html", "A mixture of experts")): assert words in page(name)
    server.terminate()
    server.wait(60)
    if sys.platform != "win32": assert server.returncode == 130     # as every command that is asked to stop


def test_the_preview_needs_the_repository(tmp_path):
    said = subprocess.run([sys.executable, "-m", "nanomoe.cli", "docs-preview"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert said.returncode == 1 and said.stderr.startswith("Error: ") and "clone" in said.stderr and said.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_preview_names_the_package_that_it_lacks(clone):
    code = "import sys; sys.modules['smalldocs'] = None; sys.argv[1:] = ['docs-preview']; from nanomoe.cli import main; main()"
    said = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert said.returncode == 1 and "pip install -e '.[dev]'" in said.stderr and "Traceback" not in said.stderr
