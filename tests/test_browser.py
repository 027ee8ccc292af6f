"""The app and the two widget lessons in a real browser.

With NANOMOE_SCREENSHOTS=folder, pictures of every screen are left there. With NANOMOE_NEED_BROWSER=1, a browser that is not there is a failure.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from _pytest.outcomes import Failed

CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    need = "needs Debian's chromium on the PATH (apt-get install chromium)"
    if os.environ.get("NANOMOE_NEED_BROWSER") == "1": pytest.fail(need)
    pytest.skip(need, allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("streamlit", reason="the app needs streamlit")
pytest.importorskip("jupyterlab", reason="the lessons need jupyterlab")

from nanomoe import app
from test_app import expected, free_port, made, save_model    # `made` is a fixture: a home with two checkpoints

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the servers are stopped by a signal")
SCRIPT = "<script>alert(1)</script>"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 180_000   # milliseconds, for a machine that is busy with something else

# A clone brings checkpoints. Where a test is about a home without one, or has no time for the full model, there are none.
NOTHING_SHIPPED = "import nanomoe.files, pathlib; nanomoe.files.SHIPPED = pathlib.Path('nowhere'); "

# A server that also ends when this process dies: its standard input closes then.
LEASH = "import os, sys, threading; threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start(); "


def answers(host, port):
    try: return socket.create_connection((host, port), timeout=1).close() or True
    except OSError: return False


@contextmanager
def serving(code, port, log, **popen):
    "Run Python code that serves on a port, until the block ends."
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-c", LEASH + code], stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, **popen)
    try:
        deadline = time.monotonic() + PATIENCE / 1000
        while not answers("127.0.0.1", port):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        try: server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
            raise
        finally: server.stdin.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    "open_page(url, …) -> a page of its own browser session. At the end, none of them may have complained or called anywhere else."
    pages, trouble = [], []
    def open(url, viewport=WIDE, scheme="light"):
        page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: trouble.append(request.url) if not re.match(r"data:|blob:|(http|ws)://127\.0\.0\.1:", request.url) else None)
        page.goto(url)
        pages.append(page)
        return page
    yield open
    for page in pages: page.context.close()
    assert not trouble


def picture(page, name):
    if folder := os.environ.get("NANOMOE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(400)      # for what moves
        page.screenshot(path=Path(folder) / f"{name}.png")


# The app

@pytest.fixture(scope="module")
def url(made, tmp_path_factory):
    port = free_port()
    code = f"from nanomoe.app import run_app; run_app({str(made)!r}, {port})"
    with serving(code, port, tmp_path_factory.mktemp("log") / "app.log", env={**os.environ, "OMP_NUM_THREADS": "1"}) as url:
        yield url


def test_a_browser_that_is_needed_and_missing_is_a_failure(tmp_path):
    for need, code in (("1", 2), ("", 5)):      # pytest's: an error while it collects, and no test found
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], capture_output=True, text=True, env={**os.environ, "PATH": str(tmp_path), "NANOMOE_NEED_BROWSER": need})
        assert done.returncode == code and ("apt-get install chromium" in done.stdout) == (need == "1"), done.stdout


def settle(page):
    "Wait until the script has run to its end."
    page.wait_for_timeout(300)
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.wait_for_timeout(200)


def open_app(open_page, url, **look):
    page = open_page(url, **look)
    page.get_by_text("Let the model begin").wait_for()
    settle(page)
    return page


def send(page, prompt):
    box = page.get_by_placeholder("How does the story begin?")
    box.fill(prompt)
    box.press("Enter")


def until(shown, click):
    "Click until something is there: while Streamlit draws its page anew, a click is lost now and then, or the list that it opened closes."
    for last in (False,) * 5 + (True,):
        try:
            click()
            return shown.wait_for(timeout=PATIENCE / 6)
        except playwright.TimeoutError:
            if last: raise


def choose(page, label, option):
    box = page.get_by_test_id("stSelectbox").filter(has_text=label)
    def click():
        box.locator("input").click()
        page.get_by_role("option", name=option, exact=True).click(timeout=PATIENCE / 20)
    until(box.locator(f'input[value="{option}"]'), click)
    settle(page)


def fits(page):
    "Nothing sticks out on the right, and nothing went wrong."
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    main = page.locator(".stMain")
    assert main.evaluate("e => e.scrollWidth <= e.clientWidth")
    assert page.locator('[data-testid="stException"]').count() == 0


def tip(token): return token.evaluate("e => getComputedStyle(e, '::after').content")


@pytest.mark.parametrize("name, look", [("wide", {"viewport": WIDE}), ("phone-dark", {"viewport": PHONE, "scheme": "dark"})])
def test_the_app_from_a_story_to_its_routing(open_page, url, made, name, look):
    page, phone = open_app(open_page, url, **look), look["viewport"] is PHONE
    picture(page, f"{name}-1-start")
    fits(page)

    send(page, f"Once upon a time {SCRIPT}")        # generate
    settle(page)
    page.get_by_text("first token after").first.wait_for()
    settle(page)
    assert SCRIPT in page.get_by_test_id("stChatMessage").nth(1).inner_text()
    picture(page, f"{name}-2-story")
    fits(page)

    if phone: until(page.get_by_test_id("stSidebarCollapseButton"), page.get_by_test_id("stExpandSidebarButton").click)
    choose(page, "Side by side with", "pretrain")   # compare
    if phone:
        picture(page, f"{name}-3-settings")
        page.get_by_test_id("stSidebarCollapseButton").locator("button").click()
    send(page, "The red")
    page.wait_for_function("document.querySelectorAll('[data-testid=stChatMessage]').length == 4")
    settle(page)
    both = page.get_by_test_id("stChatMessage").nth(3)
    left, right = (both.get_by_text(stage, exact=True).bounding_box() for stage in ("sft", "pretrain"))
    assert (right["y"] > left["y"]) if phone else (right["y"] == left["y"] and right["x"] > left["x"])
    picture(page, f"{name}-4-side-by-side")
    fits(page)

    until(page.get_by_text("Write this story"), page.get_by_text("Ask for a particular story").click)
    until(page.get_by_text("does not repeat itself").nth(1), page.get_by_text("Write this story").click)
    page.get_by_text("does not repeat itself").nth(1).scroll_into_view_if_needed()
    settle(page)
    picture(page, f"{name}-5-form")
    fits(page)

    until(page.get_by_role("button", name="Measure sft"), page.get_by_text("Measure what the KV cache saves").click)
    until(page.get_by_text("times as fast"), page.get_by_role("button", name="Measure sft").click)
    page.get_by_text("times as fast").scroll_into_view_if_needed()
    chart = page.get_by_test_id("stImage").locator("img")
    assert chart.evaluate("e => e.complete && e.naturalWidth > 300")
    picture(page, f"{name}-6-benchmark")
    fits(page)

    until(page.locator(".nm-tokens"), page.locator("label", has_text="Routing").click)
    settle(page)
    token = page.locator(".nm-tokens > span[data-tip]").nth(8)
    assert tip(token) in ("none", "normal")
    token.hover()
    assert "layer 2" in tip(token) and "expert 3" in tip(token) and "weight" in tip(token)
    picture(page, f"{name}-7-routing")
    handle = page.locator('.stMain [role="slider"], .stMain input[type="range"]')    # depends on the release
    handle.focus()
    handle.press("ArrowLeft")
    page.get_by_text("Layer 1; top expert").wait_for()
    settle(page)
    choose(page, "Also read by", "pretrain")
    assert page.locator(".nm-tokens").count() == 2
    page.get_by_text("to the same top expert").scroll_into_view_if_needed()
    picture(page, f"{name}-8-two-models")
    fits(page)


def test_two_sessions_at_once_do_not_disturb_each_other(open_page, url, made):
    pages = [open_app(open_page, url) for _ in range(2)]
    prompts = ["One day", "The red"]
    for page, prompt in zip(pages, prompts): send(page, prompt)
    for page, prompt in zip(pages, prompts):
        page.get_by_text("first token after").wait_for()
        told = page.get_by_test_id("stChatMessage").nth(1).locator('[data-testid="stHtml"]').first.evaluate("e => e.firstElementChild.textContent")
        assert told == prompt + expected(made, "sft", prompt)[len(prompt):]
        assert page.get_by_test_id("stChatMessage").count() == 2


def test_a_click_elsewhere_leaves_what_was_written(open_page, url):
    page = open_app(open_page, url)
    send(page, "One day")
    page.locator('[data-testid="stChatMessage"]').nth(1).wait_for()
    until(page.locator(".nm-tokens"), page.locator("label", has_text="Routing").click)   # it may have been written to the end by now
    until(page.get_by_placeholder("How does the story begin?"), page.locator("label", has_text="Stories").click)
    settle(page)
    assert page.get_by_test_id("stChatMessage").count() == 2
    fits(page)


def test_without_a_checkpoint_and_then_with_one(open_page, made, tmp_path):
    "Started by `streamlit run`, in a folder inside the home: its own settings bind it to this machine, and it finds the home."
    home, port = tmp_path / "home", free_port()
    (home / "notes").mkdir(parents=True)
    code = f"{NOTHING_SHIPPED}from streamlit.web.cli import main; main(['run', {app.__file__!r}, '--server.port={port}', '--server.headless=true'])"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMLIT_", "NANOMOE_HOME"))}
    with serving(code, port, tmp_path / "log", cwd=home / "notes", env={**env, "OMP_NUM_THREADS": "1"}) as url:
        if sys.platform == "linux": assert not answers("127.0.0.2", port), "it listens on more than 127.0.0.1"
        page = open_page(url, viewport=PHONE)
        page.get_by_text("nanomoe run --home").wait_for()
        fits(page)
        picture(page, "phone-0-no-checkpoint")
        shutil.copytree(made, home, dirs_exist_ok=True)
        page.reload()
        page.get_by_text("Let the model begin").wait_for()
        save_model(home, "sft", seed=5)     # replaced while the app runs
        send(page, "One day")
        page.get_by_text("first token after").wait_for()
        assert page.get_by_text("damaged").count() == 0


# The lessons

@pytest.fixture(scope="module")
def lab(root, tmp_path_factory):
    "JupyterLab on copies of the two lessons."
    folder, settings, port = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings"), free_port()
    log = folder.parent / "lab.log"
    for name in ("07_kv_cache", "08_routing_viz"): shutil.copy(root / "nbs" / f"{name}.ipynb", folder)
    for plugin, choice in {"notebook-extension/tracker": {"windowingMode": "none"},     # all cells are on the page
                           "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}.items():
        file = settings / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(choice))
    startup = settings / "ipython" / "profile_default" / "startup"     # every kernel runs what lies here
    startup.mkdir(parents=True)
    (startup / "00.py").write_text(NOTHING_SHIPPED)
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
               "--ServerApp.disable_check_xsrf=True"]    # a stuck kernel is removed over HTTP
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}   # pytest and Streamlit want no figures shown; a lesson does
    env |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(settings / "ipython"),
           "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTER_CONFIG_DIR": str(settings),
           "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"), "JUPYTER_RUNTIME_DIR": str(settings / "runtime"), "JUPYTER_PREFER_ENV_PATH": "1"}
    with serving(f"from jupyterlab.labapp import main; main({options!r})", port, log, cwd=folder, env=env) as url: yield url, log


LESSON = 240    # seconds for a whole lesson: ten times what it takes where nothing else runs
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'

# What a person would see: each code cell's prompt ("" has not run, "*" waits, "7" has run), the kernel's state, an open dialog, an error.
LOOK = """errors => ({
    prompts: [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.replace(/[^0-9*]/g, '')),
    kernel: document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status ?? '',
    dialog: [...document.querySelectorAll('.jp-Dialog')].map(e => e.innerText).join(' | '),
    errors: [...document.querySelectorAll(errors)].map(e => e.innerText).join(' | ')})"""


class Stuck(Failed):
    "Nothing in the lesson is wrong, and yet it does not come to its end."


def run_all(page, log):
    "Run every cell of the open lesson, or say what stood in the way."
    deadline, click = time.monotonic() + LESSON, 0

    def wait(done, seconds=LESSON):
        "Look twice a second until `done`; False if that takes longer than `seconds`, a failure if it never can be."
        end = time.monotonic() + seconds
        while True:
            seen = page.evaluate(LOOK, ERRORS)
            why = ("a dialog is open" if seen["dialog"] else "a cell failed" if seen["errors"] else "its kernel has died" if re.search("dead|restarting", seen["kernel"])
                   else f"it took longer than {LESSON} s" if time.monotonic() > deadline else "")
            if why:
                picture(page, "lab-failed")
                raise (Failed if seen["errors"] else Stuck)(
                    f"The lesson did not run, because {why}.\n" + "\n".join(f"{name}: {value}" for name, value in seen.items())
                    + f"\nclicks on Run All Cells: {click}\nthe server's last words:\n{log.read_text()[-2000:]}", pytrace=False)
            if done(seen): return True
            if time.monotonic() > end: return False
            page.wait_for_timeout(500)

    wait(lambda seen: len(seen["prompts"]) > 30 and seen["kernel"] == "idle")   # the page comes cell by cell
    while click == 0 or not wait(lambda seen: any(seen["prompts"]) or seen["kernel"] == "busy", seconds=30):   # a click can come before the notebook listens; a second one runs all of it twice
        click += 1
        try:
            page.get_by_role("menuitem", name="Run", exact=True).click(timeout=10_000)
            page.get_by_text("Run All Cells", exact=True).click(timeout=10_000)
        except playwright.TimeoutError: page.keyboard.press("Escape")
    wait(lambda seen: all(prompt.isdigit() for prompt in seen["prompts"]))


def finished_lesson(open_page, lab, name):
    "The page of a lesson all of whose cells have run. JupyterLab gets a second chance, with another kernel; the lesson does not."
    url, log = lab
    for chance in (1, 2):
        page = open_page(f"{url}/lab/tree/{name}.ipynb?reset")     # without the notebook that was open before
        try:
            run_all(page, log)
            return page
        except Stuck as stuck:
            if chance == 2: raise
            print(stuck)
            page.close()
            for kernel in page.context.request.get(f"{url}/api/kernels").json(): page.context.request.delete(f"{url}/api/kernels/{kernel['id']}")


def move(slider): # by one
    slider.locator(".noUi-handle").focus()
    slider.locator(".noUi-handle").press("ArrowRight")


def changed(page, locator, of, before):
    "Wait until `of`, a piece of JavaScript about the element e, gives something else."
    for _ in range(PATIENCE // 200):
        page.wait_for_timeout(200)
        if locator.count() and locator.evaluate(f"e => {of}") != before: return True
    return False


def test_lesson_07_steps_through_decoding(open_page, lab):
    page = finished_lesson(open_page, lab, "07_kv_cache")
    slider = page.locator(".widget-slider").first
    slider.scroll_into_view_if_needed()
    drawn = page.locator(".widget-vbox").filter(has=slider).first.locator("img").first
    before = drawn.evaluate("e => e.src")
    picture(page, "lab-07-before")
    move(slider)
    assert changed(page, drawn, "e.src", before)
    picture(page, "lab-07-after")

    layers = page.locator(".widget-text", has_text="layers").locator("input")     # the calculator of bytes
    page.get_by_text("GQA: 1,179,648 bytes").wait_for()
    layers.fill("12")
    layers.press("Enter")
    page.get_by_text("GQA: 2,359,296 bytes").wait_for()

    page.get_by_role("button", name="measure here").click()
    page.get_by_role("button", name="measure again").wait_for()
    curves = page.locator(".widget-vbox").filter(has=page.get_by_role("button", name="measure again")).locator("img")
    curves.scroll_into_view_if_needed()
    assert curves.evaluate("e => e.complete && e.naturalWidth > 300")
    picture(page, "lab-07-measured")


def test_lesson_08_colours_the_tokens_layer_by_layer(open_page, lab):
    page = finished_lesson(open_page, lab, "08_routing_viz")
    box = page.locator(".widget-vbox").filter(has=page.locator("textarea")).first
    box.scroll_into_view_if_needed()
    words = box.locator(".nm-tokens")
    before = words.inner_html()
    picture(page, "lab-08-before")
    move(box.locator(".widget-slider").first)
    assert changed(page, words, "e.innerHTML", before)
    token = words.locator("span[data-tip]").nth(3)
    token.hover()
    assert "expert 3" in tip(token)
    picture(page, "lab-08-after")
    pairs = page.locator(".widget-vbox").filter(has=page.locator("img"), has_not=page.locator("textarea")).first
    before = pairs.locator("img").evaluate("e => e.src")
    move(pairs.locator(".widget-slider"))
    assert changed(page, pairs.locator("img"), "e.src", before)
    picture(page, "lab-08-pairs")
    off = page.locator(".widget-vbox").filter(has=page.locator(".widget-toggle-buttons")).first
    result = off.locator(".widget-html").last
    before = result.inner_text()
    off.get_by_role("button", name="without 1", exact=True).click()
    assert changed(page, result, "e.innerText", before)
    result.get_by_text("bits per byte").wait_for()      # "measuring ..." comes first
    assert result.inner_text() != before
    picture(page, "lab-08-off")
