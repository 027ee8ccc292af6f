"""Each exercise: its stub fails its check, and its answer passes it.

In a lesson an exercise is a markdown cell `### Exercise k: title`, a code cell with the stub
`exk_name`, and a code cell with the check `check_exk(fn)`. The answer is a cell of
`solutions/NN_name_solutions.ipynb` that defines the same name. Stubs and checks bring their own
imports, so each runs here by itself, without the lesson around it.
"""
import ast
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"


def cells(path):
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def exercises(path):
    "(number, stub, check) for each exercise of a lesson."
    found, all_cells = [], cells(path)
    for i, (kind, text) in enumerate(all_cells):
        heading = re.match(r"### Exercise (\d+): \S", text)
        if kind == "markdown" and heading:
            after = all_cells[i + 1:i + 3]
            assert [k for k, _ in after] == ["code", "code"], f"{path.name}, exercise {heading[1]}: a stub and a check"
            found.append((int(heading[1]), after[0][1], after[1][1]))
    return found


def functions(code):
    return [node.name for node in ast.parse(code).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def run(code):
    space = {"__name__": "exercise"}
    exec(compile(code, "<cell>", "exec"), space)
    return space


def answers(path):
    "Every name that the solutions notebook defines, with the cell that defines it."
    solutions = NBS / "solutions" / f"{path.stem}_solutions.ipynb"
    code = [text for kind, text in cells(solutions) if kind == "code"] if solutions.exists() else []
    return {name: text for text in code for name in functions(text)}


LESSONS = sorted(NBS.glob("[0-9][0-9]*_*.ipynb"))
ALL = [pytest.param(path, k, stub, check, id=f"{path.stem}-{k}") for path in LESSONS for k, stub, check in exercises(path)]


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_exercises_are_numbered_and_answered(path):
    found = exercises(path)
    assert [k for k, _, _ in found] == list(range(1, len(found) + 1))
    stubs = [name for k, stub, _ in found for name in functions(stub) if name.startswith(f"ex{k}_")]
    assert len(stubs) == len(found), "each stub cell defines one exk_name"
    assert set(stubs) <= set(answers(path)), "each stub has its answer"


@pytest.mark.parametrize("path, k, stub, check", ALL)
def test_the_stub_fails_and_the_answer_passes(path, k, stub, check):
    (name,) = [n for n in functions(stub) if n.startswith(f"ex{k}_")]
    assert functions(check) == [f"check_ex{k}"], "the check cell defines check_exk and calls nothing"
    check_fn = run(check)[f"check_ex{k}"]
    with pytest.raises(NotImplementedError):
        check_fn(run(stub)[name])
    check_fn(run(answers(path)[name])[name])
