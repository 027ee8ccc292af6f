"""The Streamlit app without a browser: what each screen says, and what it does with what goes wrong."""
import html
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("streamlit", reason="the app needs streamlit")
import streamlit as st
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

import nanomoe.generate
from nanomoe import app, cli
from nanomoe.checkpoint import load_model, save_checkpoint
from nanomoe.config import ModelConfig
from nanomoe.files import UserError
from nanomoe.generate import tell_story
from nanomoe.model import NanoMoE
from nanomoe.sft import prompt_ids
from nanomoe.stories import storybook
from nanomoe.synth import Seed
from nanomoe.tokenizer import EOS, load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer

SCRIPT = "<script>alert(1)</script>"
CFG = ModelConfig(vocab_size=400, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=32, max_seq_len=256)


def save_model(home, stage, seed):
    "A model that has learned nothing, but does write, and differently for every seed."
    torch.manual_seed(seed)
    model = NanoMoE(CFG)
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    save_checkpoint(app.checkpoint_path(home, stage), model)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_tokenizer(train_tokenizer((story.text for story in storybook(0, 200)), CFG.vocab_size), home / "tokenizer.json")
    for seed, stage in enumerate(("pretrain", "sft")): save_model(home, stage, seed)
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch): # a copy to break
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("NANOMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe: return probe.getsockname()[1]


def start(): return AppTest.from_file(app.__file__, default_timeout=120).run()
def by_label(widgets, label): return next(widget for widget in widgets if widget.label == label)
def ask(at, prompt): return at.chat_input[0].set_value(prompt).run()
def markup(at): return [element.proto.body for element in at.get("html")]
def shown(at): return [html.unescape(re.sub("<[^>]*>", "", body)) for body in markup(at)]
def captions(at): return [caption.value for caption in at.caption]
def begin(at): return by_label(at.button, "Let the model begin").click().run()


def press(at, label):
    by_label(at.button, label).click().run()
    return fine(at)


def fine(at, errors=0):
    assert not at.exception, at.exception
    assert len(at.error) == errors, at.error
    return at


def expected(home, stage, prompt, **changes):
    "What the checkpoint writes with the settings that the app begins with."
    model, tok = load_model(app.checkpoint_path(home, stage)), load_tokenizer(home / "tokenizer.json")
    return tell_story(model, tok, prompt, **{"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 300, "seed": 0, **changes})


def test_a_home_without_checkpoints_takes_those_of_the_clone(home, tmp_path, monkeypatch):
    monkeypatch.setattr("nanomoe.files.SHIPPED", home)
    monkeypatch.setenv("NANOMOE_HOME", str(tmp_path / "empty"))
    at = fine(ask(start(), "Once upon a time"))
    assert expected(home, "sft", "Once upon a time") in shown(at)
    assert captions(at)[0].startswith("These are the models that come with the course")


def test_without_a_checkpoint_it_says_which_command_makes_one(tmp_path, monkeypatch):
    monkeypatch.setattr("nanomoe.files.SHIPPED", tmp_path / "as in a wheel")
    home = tmp_path / "a home"
    monkeypatch.setenv("NANOMOE_HOME", str(home))
    at = fine(start())
    assert "no checkpoint" in at.info[0].value
    assert at.code[0].value == f"nanomoe run --home '{home}'"
    assert not at.chat_input and not at.button


def test_home_is_found_from_the_folders_inside_it(home, tmp_path, monkeypatch):
    assert app.find_home() == home
    monkeypatch.delenv("NANOMOE_HOME")
    monkeypatch.chdir(home / "artifacts" / "pretraining")
    assert app.find_home() == home
    assert list(app.find_checkpoints(home)) == ["pretrain", "sft"]


@pytest.mark.parametrize("words, variable, found", [((), None, "home"), ((), "other", "other"), (("--home", "given"), None, "given"), (("--home", "given"), "other", "given")])
def test_the_command_finds_its_home_as_the_page_does(home, tmp_path, monkeypatch, words, variable, found):
    "A home that is named counts first, then NANOMOE_HOME, then the folders from here upwards."
    seen = []
    monkeypatch.delenv("NANOMOE_HOME")
    if variable: monkeypatch.setenv("NANOMOE_HOME", str(tmp_path / variable))
    monkeypatch.chdir(home / "artifacts")
    monkeypatch.setattr("streamlit.web.cli.main", lambda *_, **__: seen.append(app.find_home()))
    result = CliRunner().invoke(cli.app, ["app", "--port", str(free_port()), *words])
    assert result.exit_code == 0, result.output
    assert seen == [home / "artifacts" / "given" if found == "given" else tmp_path / found]


def test_a_story_is_what_generate_writes_with_and_without_the_cache(home):
    at = fine(ask(start(), "Once upon a time"))
    story = expected(home, "sft", "Once upon a time")
    assert story in shown(at)
    assert re.search(r"\d+ tokens, .* tokens/s with KV cache · first token after [\d,]+ ms", captions(at)[0])
    by_label(at.sidebar.toggle, "KV cache").set_value(False).run()
    fine(ask(at, "Once upon a time"))
    assert shown(at).count(story) == 2
    assert "without KV cache" in captions(at)[1]


def test_every_setting_reaches_the_model(home):
    at = start()
    for widgets, label, value in ((at.sidebar.slider, "Temperature", 1.2), (at.sidebar.number_input, "Top-k", 7), (at.sidebar.slider, "Top-p", 0.5),
                                  (at.sidebar.slider, "Repetition penalty", 1.3), (at.sidebar.slider, "Most tokens", 40), (at.sidebar.number_input, "Seed", 5)):
        by_label(widgets, label).set_value(value)
    fine(ask(at.run(), "One day"))
    assert expected(home, "sft", "One day", temperature=1.2, top_k=7, top_p=0.5, repetition_penalty=1.3, max_new_tokens=40, seed=5) in shown(at)


def test_two_checkpoints_side_by_side_get_the_same_prompt_and_seed(home):
    at = start()
    by_label(at.sidebar.selectbox, "Side by side with").set_value("pretrain").run()
    fine(ask(at, "The red"))
    assert {expected(home, stage, "The red") for stage in ("sft", "pretrain")} <= set(shown(at))
    assert [text.value for text in at.markdown] == ["**sft**", "**pretrain**"]


def test_stories_stay_and_can_be_forgotten(home):
    at = ask(ask(start(), "One day"), "Two days")
    assert len(at.chat_message) == 4
    assert len(press(at, "Start over").chat_message) == 0


@pytest.mark.parametrize("send", [begin, lambda at: ask(at, "  \n ")])
def test_an_empty_prompt_lets_the_model_begin(home, send):
    at = fine(send(start()))
    assert expected(home, "sft", "") in shown(at)


def test_a_prompt_that_is_too_long_is_one_sentence(home):
    at = fine(ask(start(), "word " * 900), errors=1)
    assert "context holds 256: shorten it." in at.error[0].value
    ask(at, "One day")
    assert expected(home, "sft", "One day") in shown(at)


def test_a_prompt_as_long_as_the_context_says_why_it_stops(home):
    tok = load_tokenizer(home / "tokenizer.json")
    prompt = "a" * next(n for n in range(1, 3000) if len(tok.encode("a" * (n + 1)).ids) == CFG.max_seq_len)
    at = fine(ask(start(), prompt))
    assert "context is full" in captions(at)[0]


def writes(text, *, then=EOS):
    "A model that writes this."
    def stream(model, prompt_ids, *_, **__):
        tok = load_tokenizer(Path(app.find_home()) / "tokenizer.json")
        for token in tok.encode(text).ids: yield torch.tensor([token])
        if then is None: st.stop()      # what a click elsewhere does
        yield torch.tensor([then])
        return ["stop"]
    return stream


def test_nothing_that_is_written_becomes_markup(home, monkeypatch):
    monkeypatch.setattr(nanomoe.generate, "stream", writes(f"{SCRIPT} ![x](http://x.example/y.png) **b**"))
    at = fine(ask(start(), SCRIPT))
    by_label(at.text_input, "About").set_value(SCRIPT)
    by_label(at.text_input, "Phrases to use, with commas between").set_value(f"{SCRIPT}, <b>")
    press(at, "Write this story")
    at.radio[0].set_value("Routing").run()
    bodies = markup(fine(at))
    at.radio[0].set_value("Stories").run()
    bodies += markup(fine(at))
    assert sum("&lt;script&gt;" in body for body in bodies) >= 4
    assert not [body for body in bodies if "<script" in body or "<img" in body]
    assert not [text for text in at.markdown if "x.example" in text.value or "script" in text.value]
    assert any("![x](http://x.example/y.png) **b**" in text for text in shown(at))


def test_an_interrupted_story_stays(home, monkeypatch):
    at = ask(start(), "Two days")
    monkeypatch.setattr(nanomoe.generate, "stream", writes("The little cat", then=None))
    ask(at, "One day")
    by_label(at.sidebar.toggle, "KV cache").set_value(True).run()
    assert any("interrupted" in caption for caption in captions(fine(at)))
    assert any(text.startswith("One day") and len(text) > len("One day") for text in shown(at))


def test_the_form_asks_in_the_words_of_the_training(home, monkeypatch):
    asked = []
    def stream(model, ids, *rest, **sampling):
        asked.append(ids[0].tolist())
        return writes("Tom rang the big bell. He was kind.")(model, ids)
    at = start()
    monkeypatch.setattr(nanomoe.generate, "stream", stream)
    for label, value in (("About", "brave owl"), ("Phrases to use, with commas between", " big   bell, red kite ,"), ("Phrases to avoid", "wet mud")):
        by_label(at.text_input, label).set_value(value)
    by_label(at.selectbox, "Theme").set_value("courage")
    at.main.slider[0].set_value((2, 4))
    press(at, "Write this story")
    instruction = "Theme: courage. Length: 2 to 4 sentences. Use: big bell, red kite. Avoid: wet mud. Tell a story about a brave owl."
    assert instruction in shown(at)
    assert asked[-1] == prompt_ids(load_tokenizer(home / "tokenizer.json"), instruction)
    ticks = next(text for text in shown(at) if "about brave owl" in text)
    assert ticks.endswith("Whether it is about courage, only a reader can tell.")
    assert ticks.startswith("✗ about brave owl✓ uses “big bell”✗ uses “red kite”✓ avoids “wet mud”✓ 2 to 4 sentences: it has 2✓ comes to an end")
    at.radio[0].set_value("Routing").run()
    at.radio[0].set_value("Stories").run()
    assert by_label(at.text_input, "About").value == "brave owl"


def test_the_form_needs_somebody_and_a_phrase(home):
    at = start()
    by_label(at.text_input, "Phrases to use, with commas between").set_value(" , ")
    by_label(at.button, "Write this story").click().run()
    assert "at least one phrase" in fine(at, errors=1).error[0].value
    assert not at.chat_message


def test_the_checklist_ticks_what_was_kept():
    seed = Seed("x", "val", "Lily", "kindness", ("red ball",), ("blue",), 2, 3, 0)
    assert all(kept for _, kept in app.checklist("Lily had a red ball. She was glad.", seed, "stop"))
    kept = dict(app.checklist("Tom had a blue ball. " * 6, seed, "length"))
    assert not any(kept.values()), kept


def test_a_broken_checkpoint_is_one_sentence_and_the_others_work(home):
    app.checkpoint_path(home, "sft").write_bytes(b"no checkpoint")
    at = fine(ask(start(), "One day"), errors=1)
    assert "damaged" in at.error[0].value
    by_label(at.sidebar.selectbox, "Checkpoint").set_value("pretrain").run()
    ask(at, "One day")
    assert expected(home, "pretrain", "One day") in shown(at)
    by_label(at.button, "Measure pretrain").click().run()
    by_label(at.sidebar.selectbox, "Checkpoint").set_value("sft").run()
    by_label(at.button, "Measure sft").click().run()
    assert len(at.error) == 2 and not at.exception


@pytest.mark.parametrize("what, says", [("size", "give the home that the model was trained in"), ("other", "not the tokenizer"), ("missing", "no tokenizer"), ("broken", "not a readable tokenizer")])
def test_a_tokenizer_that_does_not_belong_is_one_sentence(home, what, says):
    other = train_tokenizer((story.text for story in storybook(9, 200)), CFG.vocab_size - 1 if what == "size" else CFG.vocab_size)
    if what == "other":
        (home / "data" / "shards").mkdir(parents=True)
        (home / "data" / "shards" / "meta.json").write_text(json.dumps({"tokenizer_hash": tokenizer_hash(load_tokenizer(home / "tokenizer.json"))}))
        fine(ask(start(), "One day"))
    if what in ("size", "other"): save_tokenizer(other, home / "tokenizer.json")
    elif what == "missing": (home / "tokenizer.json").unlink()
    else: (home / "tokenizer.json").write_text("{")
    assert says in fine(ask(start(), "One day"), errors=1).error[0].value


def test_a_checkpoint_replaced_meanwhile_is_used_at_once(home):
    at = ask(start(), "One day")
    old = expected(home, "sft", "One day")
    save_model(home, "sft", seed=77)
    at.radio[0].set_value("Routing").run()
    assert "another one than when it wrote this" in fine(at).warning[0].value
    at.radio[0].set_value("Stories").run()
    fine(ask(at, "One day"))
    new = expected(home, "sft", "One day")
    assert old != new and {old, new} <= set(shown(at))


def test_tokens_of_another_tokenizer_are_not_shown(home):
    "They would be another text."
    at = ask(start(), "One day")
    save_tokenizer(train_tokenizer((story.text for story in storybook(9, 200)), CFG.vocab_size), home / "tokenizer.json")
    at.radio[0].set_value("Routing").run()
    assert "The tokenizer is another one" in fine(at).warning[0].value and not at.dataframe


def test_a_checkpoint_removed_meanwhile_is_one_sentence(home):
    at = ask(start(), "One day")
    app.checkpoint_path(home, "sft").unlink()
    at.radio[0].set_value("Routing").run()
    assert "There is no checkpoint" in fine(at, errors=1).error[0].value
    at.radio[0].set_value("Stories").run()
    ask(at, "One day")
    assert expected(home, "pretrain", "One day") in shown(at)


def test_routing_needs_a_story(home):
    at = start()
    at.radio[0].set_value("Routing").run()
    assert "no story yet" in fine(at).info[0].value


def test_routing_shows_the_tokens_layer_by_layer(home):
    at = ask(start(), "One day, a cat")
    at.radio[0].set_value("Routing").run()
    layer = by_label(at.main.slider, "Layer")
    assert layer.value == 2, "the last layer comes first"
    last, table = markup(at)[0], at.dataframe[0].value
    assert re.sub("[0-9·↵ ]", "", re.sub("<sub>.*?</sub>|<style>.*?</style>|<div>.*", "", last)), "no tokens"
    assert "layer 2&#10;" in last and "expert 3" in last
    assert list(table.columns) == ["token", "text", "choice 1", "weight 1", "choice 2", "weight 2"]
    assert (table["weight 1"] + table["weight 2"]).sub(1).abs().max() < 0.002
    assert "".join(table["text"]).startswith("·One day, a cat")
    assert "Share of each expert" in shown(at)[1]
    layer.set_value(0).run()
    assert markup(fine(at))[0] != last and "layer 0&#10;" in markup(at)[0]


def test_routing_of_two_checkpoints(home):
    shutil.copy(app.checkpoint_path(home, "sft"), home / "dpo")
    app.checkpoint_path(home, "dpo").parent.mkdir()
    shutil.copy(home / "dpo", app.checkpoint_path(home, "dpo"))     # the same model under another name
    at = ask(start(), "One day")
    at.radio[0].set_value("Routing").run()
    by_label(at.main.selectbox, "Also read by").set_value("sft").run()
    assert len(fine(at).dataframe) == 2
    assert any("send 100% of these tokens to the same top expert" in caption for caption in captions(at))
    by_label(at.main.selectbox, "Also read by").set_value("pretrain").run()
    assert not any("send 100%" in caption for caption in captions(fine(at)))


def test_measuring_leaves_a_chart_and_changes_no_story(home):
    at = ask(start(), "One day")
    press(at, "Measure sft")
    assert any(re.search(r"sft, at \d+ tokens: .* times as fast", caption) for caption in captions(at))
    assert len([*at.get("imgs"), *at.get("image")]) == 1     # its name depends on the release of Streamlit
    ask(at, "One day")
    assert shown(at).count(expected(home, "sft", "One day")) == 2


def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} is in use"): app.run_app(tmp_path, port)
    for host, port in (("127.0.0.1", 70_000), ("no.such.host.invalid", 8501)):
        with pytest.raises(UserError, match="Cannot serve at"): app.run_app(tmp_path, port, host)
