"""The Streamlit app: stories on one screen, their routing on the other. `nanomoe app` starts it, and so does `streamlit run nanomoe/app.py`.

- Its checkpoints are those of the folder NANOMOE_HOME; without one, of the first folder that has any: the current one, those above it, this clone.
  If there are none, it takes those that a clone brings in `checkpoints/`.
- A model is kept by path, time and size of its file, and shared by all browsers: a new file is a new model, and nothing here changes one.
- What a visitor or a model writes is escaped wherever it is shown.
"""
import errno
import html
import json
import os
import shlex
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import streamlit as st
import torch

from nanomoe.checkpoint import check_tokenizer, load_model, vocabulary_hash
from nanomoe.files import UserError, checkpoint_path, find_checkpoints, home_or_shipped
from nanomoe.generate import encode_prompt, stream
from nanomoe.routing import trace_routing
from nanomoe.sft import prompt_ids
from nanomoe.stories import THEMES
from nanomoe.style import PALETTE
from nanomoe.synth import Seed, broken_rules, contains, count_sentences
from nanomoe.tokenizer import BOS, EOS, load_tokenizer, tokenizer_hash
from nanomoe.viz import figure_png, measure_decoding, throughput_figure, token_pieces, tokens_html

ENDS = {"stop": "came to its end", "length": "stopped at the most tokens", "context": "stopped, the context is full", None: "interrupted"}
FORM = {"who": "Lily", "theme": "kindness", "phrases": "big brass bell, long rope", "banned": "", "sentences": (12, 18)}


# What is there

def find_home() -> Path:
    if home := os.environ.get("NANOMOE_HOME"): return Path(home)
    places = [Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]]
    return next((place for place in places if find_checkpoints(place)), Path.cwd())


def edition(path: Path) -> tuple[str, int, int]: # path, time and size: another one for every new file
    try: return str(path), path.stat().st_mtime_ns, path.stat().st_size
    except OSError: return str(path), 0, 0      # whoever loads it says what is wrong


@st.cache_resource(max_entries=6, show_spinner=False)
def _model(path, time, size):
    model = load_model(path)
    list(stream(model, torch.full((1, min(16, model.cfg.max_seq_len)), BOS), 2))   # the first steps of a process are slow, and no story's fault
    return model


@st.cache_resource(max_entries=6, show_spinner=False)
def _tokenizer(path, time, size): return load_tokenizer(path)


def load(home: Path, name: str): # -> (model, tokenizer), which everybody shares: only read them
    model, tok = _model(*edition(checkpoint_path(home, name))), _tokenizer(*edition(home / "tokenizer.json"))
    check_tokenizer(tok, model)
    if _other_tokenizer(home / "data" / "shards" / "meta.json", tok):
        raise UserError(f"{home / 'tokenizer.json'} is not the tokenizer that the stories in {home / 'data'} were written with: put that one back.")
    return model, tok


def _other_tokenizer(meta, tok):
    try: return json.loads(meta.read_text(encoding="utf-8"))["tokenizer_hash"] != tokenizer_hash(tok)
    except (OSError, ValueError, KeyError, TypeError): return False     # without shards there is nothing to compare


# Screen 1: stories

@dataclass
class Answer:
    "What one checkpoint writes. It fills while the model writes, so that an interrupted story stays."
    name: str                   # of the checkpoint
    prompt: list[int] = field(default_factory=list) # tokens that were given
    ids: list[int] = field(default_factory=list)    # tokens that were written
    waits: list[float] = field(default_factory=list)    # seconds for each of them
    text: str = ""
    end: str | None = None      # a key of ENDS
    cached: bool = True
    error: str = ""
    edition: tuple = ()
    vocabulary: str = ""        # of the tokenizer that its tokens belong to


@dataclass
class Turn:
    "A prompt and its answers."
    prompt: str                 # how the story begins, or an instruction
    seed: Seed | None           # what the instruction asks for
    answers: list[Answer]


def write(home: Path, turn: Turn, answer: Answer, sampling: dict, show):
    "Let the checkpoint answer; `show()` is called some twenty times a second. Only the model's own time is measured."
    answer.edition, answer.cached = edition(checkpoint_path(home, answer.name)), sampling["use_cache"]
    model, tok = load(home, answer.name)
    answer.vocabulary = vocabulary_hash(tok)
    answer.prompt = prompt_ids(tok, turn.prompt) if turn.seed else encode_prompt(tok, turn.prompt)[0].tolist()
    source, shown = stream(model, torch.tensor([answer.prompt]), eos_id=EOS, **sampling), 0
    while True:
        started = time.perf_counter()
        try: answer.ids.append(next(source).item())
        except StopIteration as end:
            answer.text, answer.end = tok.decode(answer.ids), end.value[0]
            return show()
        now = time.perf_counter()
        answer.waits.append(now - started)
        if now - shown > 0.05:
            answer.text, shown = tok.decode(answer.ids).rstrip("\N{REPLACEMENT CHARACTER}"), now    # the rest of a letter may follow
            show()


def checklist(story: str, seed: Seed, end: str | None) -> list[tuple[str, bool]]: # what was asked for, and whether it was kept
    broken, n = broken_rules(story, seed), count_sentences(story)
    return [(f"about {seed.protagonist}", "missing_protagonist" not in broken),
            *((f"uses “{phrase}”", contains(story, phrase)) for phrase in seed.required),
            *((f"avoids “{phrase}”", not contains(story, phrase)) for phrase in seed.banned),
            (f"{seed.min_sentences} to {seed.max_sentences} sentences: it has {n}", "wrong_sentence_count" not in broken),
            ("comes to an end", end == "stop"),
            ("does not repeat itself", "repeats_itself" not in broken)]


def show_text(text: str, opening: str = "", more: str = "", place=st):
    "Text as it was written, with its line breaks. `more` is HTML of our own."
    place.html('<div style="white-space:pre-wrap;overflow-wrap:anywhere;max-width:46em;line-height:1.6">'
               f'<span style="opacity:.6">{html.escape(opening)}</span>{html.escape(text)}{more}</div>')


def show_answer(turn: Turn, answer: Answer, write=None): # write(turn, answer, show), if it has not been written yet
    st.markdown(f"**{answer.name}**")
    opening, place = "" if turn.seed else turn.prompt, st.empty()
    if write:
        try: write(turn, answer, lambda: show_text(answer.text, opening, "" if answer.end else " ▌", place))
        except UserError as error: answer.error = str(error)
    if answer.error: return place.error(answer.error)
    show_text(answer.text, opening, place=place)
    if turn.seed and answer.text:
        lines = (f'<b style="color:{"#009E73" if kept else "#D55E00"}">{"✓" if kept else "✗"}</b> {html.escape(what)}'
                 for what, kept in checklist(answer.text, turn.seed, answer.end))
        st.html(f'<div style="overflow-wrap:anywhere;max-width:46em">{"<br>".join(lines)}<br><small>Whether it is about {html.escape(turn.seed.theme)}, only a reader can tell.</small></div>')
    if len(answer.waits) > 1:
        speed = (len(answer.waits) - 1) / sum(answer.waits[1:])
        st.caption(f"{len(answer.ids)} tokens, {ENDS[answer.end]} · {speed:,.0f} tokens/s {'with' if answer.cached else 'without'} KV cache · "
                   f"first token after {1000 * answer.waits[0]:,.0f} ms")
    else: st.caption(ENDS[answer.end])


def show_turn(turn: Turn, write=None):
    with st.chat_message("user"): show_text(turn.prompt or "(The model begins by itself.)")
    with st.chat_message("assistant"):
        for column, answer in zip(st.columns(len(turn.answers)), turn.answers):
            with column: show_answer(turn, answer, write)


def ask_for() -> Seed | None: # what the form asks for, when it is sent
    with st.expander("Ask for a particular story"), st.form("ask", border=False):
        st.caption("For checkpoints that were trained on instructions, sft and dpo. A pretrained one only goes on with the text.")
        left, right = st.columns(2)
        left.text_input("About", key="who", help="A name, or words such as: brave teapot")
        right.selectbox("Theme", THEMES, key="theme")
        left.text_input("Phrases to use, with commas between", key="phrases")
        right.text_input("Phrases to avoid", key="banned")
        st.slider("Sentences", 1, 30, key="sentences")
        if not st.form_submit_button("Write this story"): return
        who, theme, phrases, banned, sentences = (st.session_state[key] for key in FORM)
        phrases, banned = (tuple(p for part in text.split(",") if (p := " ".join(part.split()))) for text in (phrases, banned))
        if who.strip() and phrases: return Seed("app", "val", " ".join(who.split()), theme, phrases, banned, *sentences, story=0)
        st.error("Say who the story is about, and at least one phrase to use.")


def compare_speeds(home, name):
    with st.expander("Measure what the KV cache saves"):
        st.caption("Two stories are written word by word, with and without the cache in turns. It takes up to a minute.")
        if st.button(f"Measure {name}"):
            try:
                model, tok = load(home, name)
                prompts = [encode_prompt(tok, text)[0] for text in ("Once upon a time there was", "One day, a little bird")]
                with st.spinner("Measuring …"): measured = measure_decoding(model, [prompt[:min(map(len, prompts))] for prompt in prompts], 128)
                st.session_state.measured = name, *measured
            except UserError as error: st.error(str(error))
        if "measured" in st.session_state:
            name, lengths, speeds = st.session_state.measured
            fast, slow = (speeds[way].mean(0)[-1].item() for way in ("with cache", "without cache"))
            figure = throughput_figure(lengths, speeds)
            figure.set_size_inches(4.5, 2.8)    # can be read on a phone
            st.image(figure_png(figure, dpi=200), width=560)
            st.caption(f"{name}, at {lengths[-1]:.0f} tokens: {fast:,.0f} tokens/s with the cache and {slow:,.0f} without, {fast / slow:.1f} times as fast.")


def settings(checkpoints: dict) -> tuple[list[str], dict]: # the checkpoints to ask, and how to sample
    side, names = st.sidebar, list(checkpoints)
    side.caption("For the next story:")
    name = side.selectbox("Checkpoint", names, index=len(names) - 1)
    others = [other for other in names if other != name]
    other = side.selectbox("Side by side with", [None, *others], format_func=lambda name: name or "nothing", disabled=not others,
                           help="Both get the same prompt and seed." if others else "There is only one checkpoint so far.")
    sampling = dict(
        use_cache=side.toggle("KV cache", True, help="The same story either way; without it every token costs more than the one before."),
        temperature=side.slider("Temperature", 0.0, 2.0, 0.7, 0.05, help="0 always takes the likeliest token; 1 draws as the model believes."),
        top_k=side.number_input("Top-k", 0, 100_000, 0, help="Draw from the k likeliest tokens; 0 turns this off.") or None,
        top_p=side.slider("Top-p", 0.0, 1.0, 0.95, 0.01, help="Draw from the fewest tokens that hold this much probability."),
        repetition_penalty=side.slider("Repetition penalty", 1.0, 2.0, 1.0, 0.05, help="Above 1, tokens that occurred become less likely."),
        max_new_tokens=side.slider("Most tokens", 10, 500, 300, 10, help="A story that comes to its end is shorter."),
        seed=side.number_input("Seed", 0, 2**32 - 1, 0, help="Same prompt, same settings and same seed: same story."))
    return [name, *([other] if other else [])], sampling


def stories_screen(home: Path, names: list[str], sampling: dict):
    hint, past, turns = st.empty(), st.container(), st.session_state.turns
    if not turns: hint.info("Write how a story begins, and the model goes on. Or let it begin by itself.")
    begin = st.button("Let the model begin")
    seed = ask_for()
    compare_speeds(home, names[0])
    prompt = st.chat_input("How does the story begin?", max_chars=10_000)
    with past:
        for turn in turns: show_turn(turn)
        if not (begin or seed or prompt is not None): return
        turn = Turn(seed.instruction if seed else (prompt or "").strip(), seed, [Answer(name) for name in names])
        st.session_state.turns = [*turns, turn][-20:]
        hint.empty()
        show_turn(turn, lambda turn, answer, show: write(home, turn, answer, sampling, show))


# Screen 2: routing

def routing_screen(home: Path, checkpoints: dict):
    answers = [answer for turn in reversed(st.session_state.turns) for answer in turn.answers if answer.ids]
    if not answers: return st.info("There is no story yet. Let one be written under Stories: its tokens appear here.")
    left, right = st.columns(2)
    chosen = left.selectbox("Story", range(len(answers)), format_func=lambda i: f"{answers[i].name}: {answers[i].text.strip()[:50]} …")
    answer = answers[chosen]
    other = right.selectbox("Also read by", [None, *(name for name in checkpoints if name != answer.name)], format_func=lambda name: name or "nothing else")
    names, read = [answer.name, *([other] if other else [])], {}
    for name in names:
        try:
            model, tok = load(home, name)
            if vocabulary_hash(tok) != answer.vocabulary: return st.warning("The tokenizer is another one than when this was written, so its tokens mean something else now.")
            ids = (answer.prompt + answer.ids)[:model.cfg.max_seq_len]
            read[name] = token_pieces(tok, ids), trace_routing(model, torch.tensor(ids))
        except UserError as error: st.error(str(error))
    if not read: return
    if answer.edition != edition(checkpoint_path(home, answer.name)):
        st.warning(f"The checkpoint {answer.name} is another one than when it wrote this. What you see is how the new one reads it.")
    last = max(len(trace.probs) for _, trace in read.values()) - 1
    layer = st.slider("Layer", 0, last, last) if last else 0
    for column, (name, (pieces, trace)) in zip(st.columns(len(read)), read.items()):
        with column: show_routing(name, pieces, trace, min(layer, len(trace.probs) - 1))
    tops = [trace.top[layer] for _, trace in read.values() if layer < len(trace.probs)]
    if len(tops) == 2 and len(tops[0]) == len(tops[1]):
        st.caption(f"In layer {layer}, {' and '.join(read)} send {(tops[0] == tops[1]).float().mean():.0%} of these tokens to the same top expert.")


def show_routing(name, pieces, trace, layer):
    st.markdown(f"**{name}**")
    st.html(tokens_html(pieces, trace, layer))
    table = {"token": range(len(pieces)), "text": [piece or "\N{MIDDLE DOT}" for piece in pieces]}
    for k, (experts, weights) in enumerate(zip(trace.experts[layer].T.tolist(), trace.weights[layer].T.tolist()), 1):
        table[f"choice {k}"] = [f"expert {e}" for e in experts]
        table[f"weight {k}"] = [round(w, 3) for w in weights]
    st.dataframe(table, hide_index=True, height=280)
    st.html(usage_html(trace))


def usage_html(trace) -> str: # a row for each layer; a figure with a panel for each is too small for a phone
    "How the assignments spread over the experts."
    even, rows = 1 / trace.probs.shape[-1], ""
    for layer, shares in enumerate(trace.usage.tolist()):
        cells = (f'<span style="flex:1 0 3.4em">{e}<small> {share:.0%}</small><span style="display:block;height:6px;width:{min(50 * share / even, 100):.0f}%;'
                 f'background:{PALETTE[e % len(PALETTE)]}"></span></span>' for e, share in enumerate(shares))
        rows += f'<div style="display:flex;gap:4px;margin-top:6px"><span style="flex:none;width:4.2em">layer {layer}</span><span style="flex:1;display:flex;flex-wrap:wrap;gap:4px">{"".join(cells)}</span></div>'
    return f'<div class="usage" style="max-width:46em"><b>Share of each expert</b> <small>half a bar is the even share, {even:.0%}</small>{rows}</div>'


def main():
    st.set_page_config("Nano-MoE", layout="wide")
    found = find_home()
    home = home_or_shipped(found)
    checkpoints = find_checkpoints(home)
    st.session_state.setdefault("turns", [])
    for key, value in FORM.items(): st.session_state[key] = st.session_state.get(key, value)     # kept while the other screen is shown
    st.subheader("Nano-MoE")
    if not checkpoints:
        st.info(f"There is no checkpoint in `{home}` yet. This command makes one, in some minutes; then reload this page:")
        st.code(f"nanomoe run --home {shlex.quote(str(home))}", language="bash", wrap_lines=True)
        return st.markdown("Then you can have stories written here, compare checkpoints on the same prompt, measure what the KV cache saves, "
                           "and see which expert each token visits.")
    if home != found: st.caption(f"These are the models that come with the course: `{found}` has none of its own yet.")
    screen = st.radio("Screen", ["Stories", "Routing"], horizontal=True, label_visibility="collapsed")
    names, sampling = settings(checkpoints)
    if st.sidebar.button("Start over", help="Forget the stories on this page."): st.session_state.turns = []
    st.sidebar.caption(f"Checkpoints from `{home}`")
    if screen == "Stories": stories_screen(home, names, sampling)
    else: routing_screen(home, checkpoints)


def run_app(home: str | Path | None = None, port: int = 8501, host: str = "127.0.0.1"):
    "Serve the app until Ctrl-C; without a home, it is found as `find_home` does. The app sends nothing to anybody, and only this machine can open it unless `host` says otherwise."
    from streamlit.web import cli
    try: socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE: raise UserError(f"Port {port} is in use: name another with --port, for instance --port {port + 1}.") from None
        raise UserError(f"Cannot serve at {host}:{port} ({error}): name another --host or --port.") from None
    if home is not None: os.environ["NANOMOE_HOME"] = str(Path(home).resolve())
    cli.main(["run", __file__, f"--server.address={host}", f"--server.port={port}", "--server.headless=true", "--server.fileWatcherType=none",
              "--browser.gatherUsageStats=false", "--client.toolbarMode=viewer"], standalone_mode=False)


if __name__ == "__main__": main()
