"""Render README.md from nbs/index.ipynb:  python .ci/readme.py

It is `jupyter nbconvert --to markdown` and one more step: the links and pictures of a notebook
in nbs/ get the prefix that they need in a file at the root.
"""
import re
from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]


def render(notebook=root / "nbs" / "index.ipynb"):
    text, _ = MarkdownExporter().from_filename(str(notebook))
    return re.sub(r"\]\((?!https?://|#|mailto:)", "](nbs/", text).strip() + "\n"


if __name__ == "__main__":
    (root / "README.md").write_text(render(), encoding="utf-8", newline="\n")
