"""What is drawn and what is written as HTML: complete, escaped, without pyplot's state and without widgets."""
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from matplotlib.figure import Figure
from typer.testing import CliRunner

from nanomoe import cli, viz
from nanomoe.checkpoint import save_checkpoint
from nanomoe.config import ModelConfig
from nanomoe.data import write_shards
from nanomoe.files import UserError
from nanomoe.lab import lab_figure
from nanomoe.generate import encode_prompt
from nanomoe.routing import Trace, expert_words, trace_routing, trace_stories
from nanomoe.stories import storybook
from nanomoe.style import PALETTE
from nanomoe.tokenizer import save_tokenizer, train_tokenizer
from nanomoe.train import plot_training
from test_oracle import random_model

TEXTS = [story.text for story in storybook(n=40)]
TOK = train_tokenizer(TEXTS, 400)
CFG = ModelConfig(vocab_size=400, d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=8, max_seq_len=96)
MODEL = random_model(CFG, 0).eval()
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def fake_trace(T, L=2, E=4, K=2):
    probs = torch.randn(L, T, E, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weights, experts = probs.topk(K)
    return Trace(experts, weights / weights.sum(-1, keepdim=True), probs)


class Page(HTMLParser):
    "What a browser would make of it: the tokens as (text, number), the tooltips, and every tag."
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.tips, self.styles, self.tokens, self.open = [], [], [], [], []
        self.feed(page), self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "br": self.tokens[-1][0] += "\n"; return
        self.open.append((tag, attributes := dict(attributes)))
        if "data-tip" in attributes:
            self.tips.append(attributes["data-tip"]), self.styles.append(attributes["style"]), self.tokens.append(["", ""])

    def handle_endtag(self, tag): assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any("data-tip" in attributes for _, attributes in self.open): self.tokens[-1][self.open[-1][0] == "sub"] += data


@given(pieces=st.lists(st.one_of(any_text, st.sampled_from(["<script>alert(1)</script>", "</span>", '" onmouseover="x', "&amp;", "\n", " ", ""])), min_size=1, max_size=8))
def test_every_token_comes_out_as_text_with_its_number_and_all_experts(pieces):
    trace = fake_trace(len(pieces))
    for layer in (0, 1, -1):
        page = Page(viz.tokens_html(pieces, trace, layer))
        assert set(page.tags) <= {"div", "style", "span", "sub", "br"}
        for t, (piece, (text, number), tip) in enumerate(zip(pieces, page.tokens, page.tips, strict=True)):
            assert text.replace("⏎\n", "\n").replace("⏎", "\n") == (piece.replace("\r\n", "\n").replace("\r", "\n") or "·")
            assert int(number) == trace.experts[layer, t, 0]
            experts = re.findall(r"^expert (\d+) .* (\d+)%(?:   weight (\d\.\d\d))?$", tip, re.M)
            assert [int(e) for e, _, _ in experts] == [0, 1, 2, 3]
            assert [int(p) for _, p, _ in experts] == [round(100 * p) for p in trace.probs[layer, t].tolist()]
            assert {int(e): float(w) for e, _, w in experts if w} == pytest.approx(dict(zip(trace.experts[layer, t].tolist(), trace.weights[layer, t].tolist())), abs=0.006)


def test_a_script_in_a_story_is_text():
    text = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    ids = encode_prompt(TOK, text)[0]
    page = viz.tokens_html(viz.token_pieces(TOK, ids), trace_routing(MODEL, ids))
    assert "<script" not in page and "<img" not in page
    assert "".join(word for word, _ in Page(page).tokens).removeprefix("·").replace("·", "") == text
    whole = viz.tokens_html([text], fake_trace(1))
    assert "<script" not in whole and "<img" not in whole and "&lt;script&gt;" in whole


def test_layers_selection_and_many_experts():
    trace = fake_trace(5, L=2, E=11, K=3)
    first, last = (viz.tokens_html(list("abcde"), trace, layer) for layer in (0, -1))
    assert first != last and last == viz.tokens_html(list("abcde"), trace, 1)
    assert [("outline" in style) for style in Page(viz.tokens_html(list("abcde"), trace, selected=3)).styles] == [False, False, False, True, False]
    assert all(tip.count("\nexpert ") == 11 for tip in Page(first).tips)
    with pytest.raises(UserError, match="pieces"): viz.tokens_html(["a"], trace)


def sureness(page):
    "What the page says about confidence and entropy: of the selected token, if there is one, and of the layer."
    return [tuple(map(float, both)) for both in re.findall(r"confidence (\d\.\d\d), entropy (\d\.\d\d) bits", page)]


def sure(probs): return pytest.approx((max(probs.tolist()), -sum(p * math.log2(p) for p in probs.tolist())), abs=0.006)


def test_how_sure_the_router_is():
    trace, pieces = fake_trace(5), ["<b>", "'", "c", "", "e"]
    for layer in (0, 1):
        means = [sum(column) / 5 for column in zip(*(sureness(viz.tokens_html(pieces, trace, layer, t))[0] for t in range(5)))]
        for t in range(5):
            one, all_of_them = sureness(viz.tokens_html(pieces, trace, layer, t))
            assert one == sure(trace.probs[layer, t]) and all_of_them == pytest.approx(means, abs=0.011)
        assert sureness(viz.tokens_html(pieces, trace, layer)) == [all_of_them]
    assert "Token 0, &#x27;&lt;b&gt;&#x27;: confidence" in viz.tokens_html(pieces, trace, selected=0)


SEEN_WITH = {"protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
             "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
             "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]}    # of linear RGB: Machado et al. 2009, severity 1


def linear_rgb(colour): # "#RRGGBB" -> (3,)
    return torch.tensor([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in bytes.fromhex(colour[1:]))])


def lab(linear): # (3,) -> CIE L*a*b*, for daylight
    xyz = torch.tensor([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]) @ linear
    x, y, z = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (xyz / torch.tensor([0.95047, 1, 1.08883])).tolist())
    return torch.tensor([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", SEEN_WITH)
def test_the_colours_of_four_experts_differ_for_any_colour_vision(kind):
    "About 2 can just be told apart side by side; the closest pair here has 17. (As pale as a token's background, it has 3.)"
    seen = torch.stack([lab((torch.tensor(SEEN_WITH[kind]) @ linear_rgb(colour)).clamp(0, 1)) for colour in PALETTE[:4]])
    assert torch.pdist(seen).min() > 15


def test_no_colour_hides_the_text():
    "Translucent backgrounds, and never a colour for the letters: they keep that of the page, light or dark."
    page = viz.tokens_html(["a", "b"], fake_trace(2))
    for style in Page(page).styles: assert re.search(r"background-color:#[0-9A-F]{6}38", style) and not re.search(r"(^|;)color:", style)


@given(text=any_text, special=st.booleans())
def test_pieces_join_to_the_text(text, special):
    ids = TOK.encode(text).ids
    pieces = viz.token_pieces(TOK, encode_prompt(TOK, text)[0] if special else ids)
    assert "".join(pieces) == text and len(pieces) == len(ids) + special


def test_a_broken_character_at_the_end_is_still_a_piece():
    ids = TOK.encode("\N{SNOWMAN}").ids[:2]
    assert viz.token_pieces(TOK, ids) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_words_are_escaped():
    tok = train_tokenizer(["<b>&<b>& " * 50], 270)
    ids = torch.tensor(tok.encode("<b>& " * 50).ids)
    page = viz.words_html(expert_words(ids, torch.arange(len(ids)) % 2, 2, least=1), tok)
    assert "<b>&<" not in page and "expert 0" in page and "expert 1" in page
    assert viz.words_html([[], []], tok).count("<th ") == 2


# figures

def titles(figure): return [ax.get_title(loc="left") for ax in figure.axes if ax.axison]


def figures(folder):
    log(folder / "train_log.jsonl", *TRAINED)
    trace, usage = fake_trace(50, L=5), torch.rand(6, 5, 4)
    return {"weights": viz.weights_figure(trace, 3, "a $ sign"), "usage": viz.usage_figure({"pretrain": usage, "sft": usage, "dpo": usage[:, :2]}),
            "confidence": viz.confidence_figure({"pretrain": trace.confidence, "sft": trace.confidence[:2]}), "heat": viz.heat_figure({"a": trace.pairs[0], "b": -trace.pairs[1]}),
            "throughput": viz.throughput_figure(torch.arange(3), {"with": torch.rand(4, 3), "without": torch.rand(4, 3)}), "scorecard": viz.scorecard_figure(SCORES),
            "training": viz.plot_training(folder), "lab": lab_figure(json.loads((Path(__file__).parents[1] / "nbs" / "results" / "lab.json").read_text(encoding="utf-8"))["rows"])}


SCORES = {"base": {"a": {"mean": 0.3, "low": 0.2, "high": 0.5}, "b": {"mean": 5}}, "sft": {"a": {"mean": 0.4, "low": 0.35, "high": 0.5}}}


def test_figures_are_drawn_in_one_style_and_leave_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt
    for name, figure in figures(tmp_path).items():
        assert isinstance(figure, Figure) and viz.figure_png(figure).startswith(b"\x89PNG"), name
        for ax in figure.axes:
            assert ax.get_title(loc="center") == "" and not (ax.axison and ax.spines["top"].get_visible() or ax.axison and ax.spines["right"].get_visible()), name
            assert (ax._left_title.get_size() == 10 or not ax.axison) and {line.get_color() for line in ax.get_lines()} <= {*PALETTE, "#444444"}, name
    assert not plt.get_fignums()


def test_usage_shows_mean_and_spread():
    usage = torch.tensor([[[0.1, 0.9]], [[0.3, 0.7]]])
    ax = viz.usage_figure({"pretrain": usage}).axes[0]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.2, 0.8])
    spread = [end for collection in ax.collections for segment in collection.get_segments() for end in segment[:, 1]]
    assert spread == pytest.approx([0.1, 0.3, 0.7, 0.9])


def test_throughput_shows_mean_and_range():
    figure = viz.throughput_figure([10, 20], {"with cache": [[1.0, 2.0], [3.0, 6.0]]})
    (line,), (band,) = figure.axes[0].lines, figure.axes[0].collections
    assert line.get_ydata().tolist() == [2, 4]
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} >= {(10, 1), (10, 3), (20, 2), (20, 6)}


def test_the_scorecard_takes_what_it_can():
    assert titles(viz.scorecard_figure(SCORES)) == ["a", "b"]
    ax = viz.scorecard_figure(SCORES).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.3, 0.4] and [label.get_text() for label in ax.get_xticklabels()] == ["base", "sft"]
    assert [segment[:, 1].tolist() for collection in ax.collections for segment in collection.get_segments()] == [[0.2, 0.5], [0.35, 0.5]]
    odd = {"base": {"a": 1, "nan": float("nan"), "text": "x", "none": None, "flag": True, "list": [1]}, "meta": "x", "empty": {}, "sft": {"other_metric": {"mean": 2, "low": None}}}
    assert titles(viz.scorecard_figure(odd)) == ["a", "other metric"]
    for nothing in ({}, {"base": {"mean": 1}}, {"base": {}}, {"base": {"a": None}}, {"meta": 3}):
        with pytest.raises(UserError, match="no numbers"): viz.scorecard_figure(nothing)


def test_the_scorecard_may_be_nested():
    def row(mean): return {"protagonist": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 50}, "finished": {"mean": 1.0, "low": 0.9, "high": 1.0, "n": 50}}
    scores = {stage: {"bpb": 1.0, **{name: {"greedy": row(0.3), "sampled": row(0.4)} for name in ("seen", "unseen")}} for stage in ("base", "sft", "dpo")}
    figure = viz.scorecard_figure(scores)
    assert titles(figure) == ["bpb", "protagonist", "finished"]
    assert [len(ax.patches) for ax in figure.axes if ax.axison] == [3, 12, 12]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["seen\ngreedy", "seen\nsampled", "unseen\ngreedy", "unseen\nsampled"]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0.3, 0.4, 0.3, 0.4] * 3


def test_writing_speed_is_measured_along_the_length():
    lengths, speeds = viz.measure_decoding(MODEL, [encode_prompt(TOK, text)[0, :6] for text in TEXTS[:2]], new_tokens=500, parts=4)
    assert lengths.tolist() == [6 + 22 * (part + 0.5) for part in range(4)]     # 90 are left in the context: 88 in four parts
    assert list(speeds) == ["with cache", "without cache"] and all(v.shape == (2, 4) and (v > 0).all() for v in speeds.values())
    with pytest.raises(UserError, match="shorter"): viz.measure_decoding(MODEL, [torch.full((95,), 5)], parts=4)


# the figures of a home folder

@pytest.fixture
def home(tmp_path):
    save_tokenizer(TOK, tmp_path / "tokenizer.json")
    write_shards({"train": TEXTS[:30], "val": TEXTS[30:]}, TOK, tmp_path / "data" / "shards")
    save_checkpoint(tmp_path / "artifacts" / "pretraining" / "ckpt_best.pt", MODEL)
    return tmp_path


ALWAYS = ["expert_usage_mean.png", "kv_throughput_mean.png", "routing_confidence_hist.png"]


TRAINED = [{"step": step, "tokens": 100 * step, "ce": 5 / step, "load_balance": 1.1, "z": 2.0, "load": [[0.25] * 4] * 3, "tokens_per_s": 1000} for step in (1, 2, 3)]


def log(path, *rows): path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_plots_of_what_there_is(home):
    made = viz.make_plots(home, prompts=4)
    assert sorted(path.name for path in made) == ALWAYS == sorted(path.name for path in (home / "reports" / "figs").iterdir())
    log(home / "artifacts" / "pretraining" / "train_log.jsonl", *TRAINED)
    log(home / "artifacts" / "pretraining" / "val_log.jsonl", {"step": 3, "tokens": 300, "nats": 2.0})
    save_checkpoint(home / "artifacts" / "dpo" / "ckpt_best.pt", MODEL)
    log(home / "artifacts" / "dpo" / "train_log.jsonl", *({"step": step, "dpo": 0.7, "chosen_reward": 0, "rejected_reward": -1, "accuracy": 1} for step in (1, 2, 3)))
    (home / "reports" / "scorecard.json").write_text(json.dumps(SCORES), encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["make-plots", "--home", str(home)], catch_exceptions=False)
    figures = sorted((home / "reports" / "figs").iterdir())
    assert [path.name for path in figures] == sorted([*ALWAYS, "pretrain_training_summary.png", "dpo_training_summary.png", "scorecard.png"])
    assert done.exit_code == 0 and done.output.count("Drawn: ") == 6 and all(path.read_bytes().startswith(b"\x89PNG") for path in figures)


def test_plots_without_shards_or_with_those_of_another_tokenizer(home):
    (home / "data" / "shards" / "meta.json").unlink()
    assert len(viz.make_plots(str(home))) == 3
    write_shards({"train": TEXTS[:30], "val": TEXTS[30:]}, train_tokenizer(TEXTS, 500), home / "data" / "shards")
    assert len(viz.make_plots(home)) == 3


def test_plots_say_what_is_missing(home, tmp_path_factory):
    with pytest.raises(UserError, match="nanomoe run"): viz.make_plots(tmp_path_factory.mktemp("empty"))
    (home / "reports").mkdir()
    for broken in ("[1, 2]", "{", ""):
        (home / "reports" / "scorecard.json").write_text(broken)
        with pytest.raises(UserError, match="scorecard.json is damaged"): viz.make_plots(home, prompts=2)
    (home / "artifacts" / "pretraining" / "ckpt_best.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="ckpt_best.pt is damaged"): viz.make_plots(home)


LOGGED = {"step": 1, "tokens": 10, "ce": 5.0, "load_balance": 1.0, "z": 0.1, "load": [[0.3, 0.7]], "tokens_per_s": 9.0, "nats": 5.0}
BROKEN = ["five", None, [], [1], [[]], [[1], [2, 3, 4]], [["a"]], {"a": 1}, 10**400, "missing"]


@pytest.mark.parametrize("log", ["train_log", "val_log"])
def test_a_damaged_log_is_one_sentence(tmp_path, log):
    def write(name, *rows): (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("train_log", "val_log"): write(name, LOGGED, {**LOGGED, "step": 2, "tokens": 20})
    assert len(plot_training(tmp_path).axes) == 4
    for key in ("tokens", "nats") if log == "val_log" else [key for key in LOGGED if key not in ("step", "nats")]:
        for value in BROKEN:
            row = {**LOGGED, "step": 2, key: value}
            if value == "missing": del row[key]
            write(log, LOGGED, row)
            try: plot_training(tmp_path)
            except UserError as error: assert f"{log}.jsonl is damaged" in str(error) and "\n" not in str(error)
            else: assert value is None, (key, value)    # a gap


# widgets

def test_the_module_needs_neither_widgets_nor_pyplot(root):
    code = "import sys, nanomoe.viz; loaded = {'ipywidgets', 'matplotlib.pyplot', 'IPython', 'streamlit'} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_a_text_under_your_hands():
    (box, more), (layer, token), words, weights, usage = (getattr(child, "children", None) or child for child in viz.explore_text(MODEL, TOK, "the cat").children)
    def seen(): return words.value, weights.value, usage.value
    before = seen()
    layer.value = 0
    assert "Layer 0;" in words.value and seen() != before
    before = seen()
    token.value = 1
    assert words.value != before[0] and weights.value != before[1]
    trace = trace_routing(MODEL, encode_prompt(TOK, "the cat")[0])
    for t, l in ((1, 0), (1, 2), (2, 2)):           # how sure the router is follows both sliders
        token.value, layer.value = t, l
        assert sureness(words.value) == [sure(trace.probs[l, t]), pytest.approx((trace.confidence[l].mean().item(), trace.entropy[l].mean().item()), abs=0.006)]
    token.value = token.max
    box.value = "a"                                 # shorter: the token slider follows
    assert token.max == len(TOK.encode("a").ids) and token.value <= token.max and usage.value != before[2]
    meanwhile = []
    box.observe(lambda _: meanwhile.append((more.disabled, more.description)), "value")
    more.click()
    assert box.value.startswith("a") and len(Page(words.value).tokens) > 2
    assert meanwhile == [(True, "writing ...")] and (more.disabled, more.description) == (False, "Write on")
    box.value = "<script>" * 3
    assert "<script" not in words.value
    box.value = ""
    assert len(Page(words.value).tokens) == 1


def test_writing_on_at_the_end_of_the_context_leaves_the_text():
    (box, more), _, words, *_ = (getattr(child, "children", None) or child for child in viz.explore_text(MODEL, TOK, "the cat").children)
    for _ in range(4):      # on and on, until nothing fits any more
        more.click()
        assert len(encode_prompt(TOK, box.value)[0]) <= MODEL.cfg.max_seq_len and Page(words.value).tokens and "shorten" not in words.value
    box.value = "the cat sat " * 100
    assert "shorten" in words.value     # it is too long for a look, and said to be


TOO_LONG = "the cat sat " * 100


@pytest.mark.parametrize("first", [TOO_LONG, "the cat"], ids=["at first", "later"])
def test_a_text_that_is_too_long_is_a_sentence_until_a_good_one_comes(first):
    (box, more), (layer, token), words, weights, usage = (getattr(child, "children", None) or child for child in viz.explore_text(MODEL, TOK, first).children)
    token.value = token.max
    box.value = TOO_LONG
    sentence = words.value
    assert "context" in sentence and "<" not in sentence
    layer.value, token.value = 1, 0
    assert (words.value, weights.value, usage.value) == (sentence, b"", b"")
    more.click()
    assert "context" in words.value and "<" not in words.value and (weights.value, usage.value) == (b"", b"")
    assert weights.layout.display == usage.layout.display == "none"     # an empty picture would be drawn as a broken one
    box.value = "the dog"
    assert "".join(piece for piece, _ in Page(words.value).tokens) == "·the dog" and "Layer 1;" in words.value
    assert bytes(weights.value[:4]) == bytes(usage.value[:4]) == b"\x89PNG" and weights.layout.display is usage.layout.display is None
    layer.value, token.value = 0, 1
    assert "Layer 0;" in words.value and [("outline" in style) for style in Page(words.value).styles].index(True) == 1


def test_words_under_your_hands():
    tokens, trace, _ = trace_stories(MODEL, TOK, TEXTS[:5])
    (layer, least), table = (getattr(child, "children", None) or child for child in viz.explore_words(tokens, trace, TOK).children)
    before = table.value
    layer.value = 0
    assert table.value != before
    before = table.value
    least.value = 100
    assert table.value != before


def test_pairs_under_your_hands():
    trace = fake_trace(50, L=3)
    layer, picture = viz.explore_pairs(trace).children
    for layer.value in (2, 0, 1):
        assert picture.value == viz.figure_png(viz.heat_figure({f"Layer {layer.value}": trace.pairs[layer.value]}, "expert", "expert", darkest=trace.pairs.max()))
    assert viz.heat_figure({"a": trace.pairs[0]}, darkest=0.9).axes[0].images[0].get_clim() == (0, 0.9)


def test_an_expert_off_under_your_hands():
    def score(model): return trace_routing(model, torch.arange(20)).usage[1, 0].item()
    layer, off, result = viz.explore_off(MODEL, TOK, score, "<i>the cat").children
    assert "(+0.0000)" in result.value and "<i>" not in result.value
    meanwhile = []
    result.observe(lambda change: meanwhile.append(change["new"]), "value")
    layer.value, off.value = 1, 0
    assert meanwhile[::2] == ["measuring ..."] * 2 and "measuring" not in result.value      # the layer, then the expert
    assert result.value.startswith('<div style="max-width:46em"><b>0.0000 ')
    off.value = None
    assert "(+0.0000)" in result.value and MODEL.blocks[1].moe.bias is None
