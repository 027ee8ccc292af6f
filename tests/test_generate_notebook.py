"""Notebook 07's widgets: nothing of them is stored, and the button comes to an end."""
import json
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
WIDGET = "application/vnd.jupyter.widget-"


@pytest.mark.parametrize("path", sorted(NBS.rglob("*_*.ipynb")), ids=lambda path: path.stem)
def test_no_notebook_stores_widgets(path):
    "A page with a stored widget would load scripts from elsewhere. Clear such a cell's output before you commit; a picture stands beside it."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    stored = [kind for cell in notebook["cells"] for output in cell.get("outputs", []) for kind in output.get("data", {}) if kind.startswith(WIDGET)]
    assert not stored


@pytest.fixture(scope="module")
def lesson():
    "The lesson's names after its cells have run, up to the button's."
    notebook = json.loads((NBS / "07_kv_cache.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    last = next(i for i, text in enumerate(code) if "button.on_click" in text)
    names = {}
    for text in code[:last + 1]: exec(text, names)
    names["plt"].close("all")
    yield names
    names["plt"].close("all")   # other tests count the figures that are open


def test_the_button_measures_and_can_be_pressed_again(lesson, monkeypatch):
    button, seen = lesson["button"], []
    draw, measure = lesson["draw_speeds"], lesson["measure"]
    monkeypatch.setitem(lesson, "measure", lambda counts, runs: measure(counts, runs=2))     # in the browser's test it takes its time
    def watch(*measured):
        seen.append((button.disabled, *measured))
        draw(*measured)
    monkeypatch.setitem(lesson, "draw_speeds", watch)
    for press in (1, 2):
        button.click()
        assert (button.disabled, button.description) == (False, "measure again") and len(seen) == press
    busy, counts, *both = seen[0]
    assert busy and all(speeds.shape == (len(counts), 2) and speeds.min() > 0 for speeds in both)


def test_the_calculator_knows_its_kinds(lesson):
    said = lambda: lesson["answer"].value
    assert "GQA: 1,179,648 bytes" in said()
    for heads, kind in ((8, "MHA"), (1, "MQA"), (3, "cannot share")):
        lesson["kv_heads"].value = heads
        assert kind in said()
    for name, value in {"layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "length": 8192, "batch": 3, "dtype": 2}.items(): lesson[name].value = value
    assert "GQA: 3,221,225,472 bytes = 3,072.00 MiB" in said() and "1/4 of MHA's" in said()


def test_the_slider_draws_each_step(lesson, monkeypatch):
    drawn = []
    monkeypatch.setitem(lesson, "draw_step", drawn.append)
    for step in range(1, lesson["step"].max + 1): lesson["step"].value = step
    assert drawn == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_step_shows_what_is_new_and_what_it_costs(lesson):
    axes = lesson["plt"].subplots(2)[1]
    lesson["draw_step"](5, axes=axes)
    for ax, marks, title in zip(axes, ("·" * 8 + "+", "+" * 9), ("1 new (+), 8 kept (·), 7,809,216 multiplications", "9 new (+), 0 kept (·), ")):
        assert "".join(text.get_text() for text in ax.texts) == marks and title in ax.get_title(loc="left")
    assert lesson["multiplications"](9, 9) == 9 * lesson["multiplications"](1, 1) - 8 * lesson["HEAD"] + 36 * 2 * 192 * 6
