"""The `nanomoe` command: each subcommand is a few calls into the modules that the notebooks export.

- Heavy modules are imported inside the commands, so that `--help` answers at once.
- A `UserError` is printed as its one sentence, with exit status 1; a stopped run exits with 130.
- `run` skips what an earlier run has finished, so that the same command goes on after a kill.
"""
import errno
import math
import os
import re
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nanomoe.config import override, preset
from nanomoe.files import UserError, sha256_of

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
                  help="Build, train and look inside a small mixture-of-experts language model. Start with `nanomoe run`.")
bench = typer.Typer(no_args_is_help=True, help="Measure this machine: ratios side by side, in one run.")
app.add_typer(bench, name="bench")
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)    # a folder may be called "[a]" or ":b:"

STAGES = {"pretrain": "pretraining", "sft": "sft", "dpo": "dpo"}    # what --checkpoint calls them -> folder in artifacts/

PresetName = Annotated[str, typer.Option("--preset", help="How big: `smoke` (a minute), `laptop` (minutes, real stories) or `full` (a GPU, or patience).")]
Home = Annotated[Path, typer.Option(help="The folder that holds everything a run reads and writes.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same stories, weights and samples.")]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda` or `mps`; `auto` takes the fastest there is.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Change one number of the preset, for instance `--set d_model=256`; may be repeated. `nanomoe settings` lists them all.")]
Stories = Annotated[str, typer.Option(help="`storybook` (bundled), `tinystories` (downloaded), or a .parquet, .jsonl or .txt file or a folder of them.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on from what an earlier run left.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile: a slow start, then faster steps.")]


def _choose(name, settings, seed=0, compile=False, device="cpu"):
    "The preset with its changes. What is said without a prefix about seed, compile and dtype holds for every stage."
    dtype = "bfloat16" if device == "cuda" else "float32"
    chosen = override(preset(name), [f"seed={seed}", f"compile={compile}", f"dtype={dtype}", *settings])
    common = [f"{stage}.{name}={getattr(chosen.train, name)}" for stage in ("sft", "dpo") for name in ("seed", "compile", "dtype")]
    return override(chosen, [*common, *settings])


def _pick_device(name):
    import torch
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto": return next(d for d in ("cuda", "mps", "cpu") if there[d])
    if name not in there: raise UserError(f'There is no device "{name}": choose from auto, {", ".join(there)}.')
    if not there[name]: raise UserError(f'This machine, or its PyTorch, has no "{name}" device: leave --device out to take the best there is.')
    return name


def _check_home(home):
    try:
        home.mkdir(parents=True, exist_ok=True)
        writable = os.access(home, os.W_OK)
    except OSError: writable = False
    if not writable: raise UserError(f"Cannot write into {home}: name a folder that you may write to with --home.")


def _check_memory(cfg):
    "Refuse a model that cannot be trained here before any work is done for it."
    attention = 2 * cfg.d_model ** 2 + 2 * cfg.d_model * cfg.n_kv_heads * cfg.head_dim
    experts = cfg.num_experts * cfg.d_model + 3 * (cfg.num_experts + cfg.num_shared_experts) * cfg.d_ff * cfg.d_model
    size = cfg.vocab_size * cfg.d_model + cfg.n_layers * (attention + experts) + 2 * cfg.max_seq_len * cfg.head_dim
    try: memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError): return     # Windows does not say
    if 16 * size > memory:  # four float32 for each: the weight, its gradient, and what AdamW remembers
        raise UserError(f"A model of {size:.2g} parameters needs {16 * size / 1e9:,.0f} GB for its training, and this machine has {memory / 1e9:,.0f} GB: choose smaller sizes.")


def _describe(stories, chosen):
    "What tokenizer and shards are made of; kept in meta.json to tell whether they are still what is asked for."
    cfg, path = chosen.train, Path(stories).expanduser()
    files = [] if stories in ("storybook", "tinystories") else sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    stamps = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]    # the files may be huge
    edition = f" (files {sha256_of(repr(stamps))[:12]})" if files else ""
    return f"{stories}{edition}, {cfg.stories} + {cfg.val_stories} stories, vocabulary {chosen.model.vocab_size} from {cfg.tokenizer_stories}, seed {cfg.seed}"


def _train_tokenizer(home, stories, chosen):
    from nanomoe.stories import open_stories
    from nanomoe.tokenizer import save_tokenizer, train_tokenizer
    tok = train_tokenizer((story.text for story in open_stories(stories, "train", chosen.train.tokenizer_stories, chosen.train.seed)), chosen.model.vocab_size)
    save_tokenizer(tok, home / "tokenizer.json")
    out.print(f"Tokenizer: {tok.get_vocab_size():,} tokens, in {home / 'tokenizer.json'}")
    return tok


def _write_shards(home, stories, chosen, tok):
    from nanomoe.data import write_shards
    from nanomoe.stories import open_stories
    cfg, folder = chosen.train, home / "data" / "shards"
    splits = {"train": open_stories(stories, "train", cfg.stories, cfg.seed), "val": open_stories(stories, "val", cfg.val_stories, cfg.seed)}
    meta = write_shards(splits, tok, folder, _describe(stories, chosen))
    for name, split in meta["splits"].items():
        out.print(f"Shard {name}: {split['stories']:,} stories, {split['tokens']:,} tokens, {split['bytes'] / split['tokens']:.2f} bytes a token")


def _shards_are_right(home, stories, chosen):
    from nanomoe.data import load_shards
    from nanomoe.tokenizer import load_tokenizer
    try: meta = load_shards(home / "data" / "shards", load_tokenizer(home / "tokenizer.json")).meta
    except UserError: return False
    return meta["source"] == _describe(stories, chosen)


def _pretrain(home, chosen, device, fresh):
    from nanomoe.generate import tell_story
    from nanomoe.tokenizer import load_tokenizer
    from nanomoe.train import plot_training, pretrain
    tok = load_tokenizer(home / "tokenizer.json")
    best = pretrain(home, chosen, device, fresh, sample=lambda model: tell_story(model, tok, temperature=0.8, seed=chosen.train.seed, max_new_tokens=150))
    if int(os.environ.get("RANK", 0)) == 0:
        _save_figure(plot_training(home / "artifacts" / "pretraining"), home / "reports" / "figs" / "pretrain_training_summary.png")
        out.print(f"Validation: {best['bpb']:.4f} bits per byte, {best['nats']:.4f} nats per token (best, after step {best['step']:,})")
    return best


def _save_figure(figure, path):
    from nanomoe.files import write_atomically
    with write_atomically(path) as file: figure.savefig(file, dpi=120, format="png")


def _at(home): return "" if home == Path(".") else f" --home {shlex.quote(str(home))}"


def _find_checkpoint(home, name):
    if Path(name).is_file(): return Path(name)
    if name not in ("latest", *STAGES): raise UserError(f"There is no checkpoint {name}: it is latest, {', '.join(STAGES)}, or a file.")
    for stage in reversed(STAGES) if name == "latest" else [name]:
        path = home / "artifacts" / STAGES[stage] / "ckpt_best.pt"
        if path.is_file() or name != "latest": return path
    raise UserError(f"{home} holds no checkpoint yet: make one with `nanomoe run{_at(home)}`, or name a file with --checkpoint.")


@app.command()
def run(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
        fresh: Fresh = False, compile: Compile = False, set: Settings = []):
    "Everything, one after the other: stories, tokenizer, shards, pretraining, and a few stories told by the new model."
    from nanomoe.checkpoint import load_model
    from nanomoe.generate import tell_story
    from nanomoe.tokenizer import load_tokenizer
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("`run` is one process: under torchrun, start `pretrain`, after `nanomoe tokenizer` and `nanomoe prepare-data` without it.")
    started, device = time.perf_counter(), _pick_device(device)
    chosen = _choose(preset, set, seed, compile, device)
    _check_memory(chosen.model)
    _check_home(home)
    right = _shards_are_right(home, stories, chosen)
    if not fresh and not right and (home / "artifacts" / "pretraining" / "ckpt_last.pt").exists():
        raise UserError(f"{home} holds a model trained on other stories or with other settings: give those again, add --fresh to replace it, or use another --home.")
    if fresh or not right:
        _write_shards(home, stories, chosen, _train_tokenizer(home, stories, chosen))
    else: out.print("Tokenizer and shards: there already, and right")
    _pretrain(home, chosen, device, fresh)
    tok, model = load_tokenizer(home / "tokenizer.json"), load_model(home / "artifacts" / "pretraining" / "ckpt_best.pt", device)
    for i in range(3):
        out.print(f"\nStory {i + 1}", style="bold")
        out.print(tell_story(model, tok, temperature=0.7, top_p=0.95, seed=chosen.train.seed + i, max_new_tokens=400))
    out.print(f"\nDone in {time.perf_counter() - started:.0f} s. In {home.resolve()}:")
    out.print("  tokenizer.json, data/shards/                     what the model reads\n"
              "  artifacts/pretraining/                           checkpoints and logs\n"
              "  reports/figs/pretrain_training_summary.png       how the training went")
    out.print(f'Next: `nanomoe generate "Once upon a time"{_at(home)}`, or a longer training: `nanomoe run --preset full --home full-run`.')


@app.command()
def tokenizer(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, set: Settings = []):
    "Train the byte-level BPE tokenizer on the first stories, and write tokenizer.json."
    chosen = _choose(preset, set, seed)
    _check_home(home)
    _train_tokenizer(home, stories, chosen)


@app.command()
def prepare_data(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, set: Settings = []):
    "Write the stories as tokens into data/shards, with the tokenizer that is there."
    from nanomoe.tokenizer import load_tokenizer
    _write_shards(home, stories, _choose(preset, set, seed), load_tokenizer(home / "tokenizer.json"))


@app.command()
def pretrain(preset: PresetName = "laptop", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
             fresh: Fresh = False, compile: Compile = False, set: Settings = []):
    "Train the model on the shards; goes on where it stopped. Several GPUs: `torchrun --nproc-per-node 2 -m nanomoe.cli pretrain`."
    device = _pick_device(device)
    chosen = _choose(preset, set, seed, compile, device)
    _check_memory(chosen.model)
    _pretrain(home, chosen, device, fresh)


@app.command()
def generate(prompt: Annotated[str, typer.Argument(help="How the story begins; nothing lets the model begin.")] = "",
             checkpoint: Annotated[str, typer.Option(help="`pretrain`, `sft` or `dpo` of the home folder, or a file; `latest` takes the furthest there is.")] = "latest",
             home: Home = Path("."), seed: Seed = 0, device: Device = "cpu",
             max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 300,
             temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token; 1 draws as the model believes.")] = 0.8,
             top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 turns this off.")] = 0,
             top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the fewest tokens that hold this much probability.")] = 0.95,
             min_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from tokens at least this likely, relative to the likeliest.")] = 0.0,
             repetition_penalty: Annotated[float, typer.Option(min=0.1, help="Above 1, tokens that occurred become less likely.")] = 1.0,
             cache: Annotated[bool, typer.Option(help="Keep keys and values of earlier tokens (the same text either way).")] = True,
             chat: Annotated[bool, typer.Option("--chat", help="Keep asking for prompts until an empty line.")] = False):
    "Let a trained model tell a story, as it comes to it."
    if not math.isfinite(temperature + repetition_penalty) or 0 < temperature < 0.001:
        raise UserError("--temperature takes 0 or a number from 0.001 up, and --repetition-penalty one from 0.1 up.")
    device, path = _pick_device(device), _find_checkpoint(home, checkpoint)
    from nanomoe.checkpoint import load_model
    from nanomoe.tokenizer import load_tokenizer
    model, tok = load_model(path, device), load_tokenizer(home / "tokenizer.json")
    if model.cfg.vocab_size != tok.get_vocab_size():
        raise UserError(f"{path} knows {model.cfg.vocab_size:,} tokens and {home / 'tokenizer.json'} has {tok.get_vocab_size():,}: give the --home that the model was trained in.")
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p, min_p=min_p or None,
                    repetition_penalty=repetition_penalty, seed=seed, use_cache=cache)
    if not chat: return _tell(model, tok, prompt, sampling)
    while prompt or (prompt := _ask()):
        try: _tell(model, tok, prompt, sampling)
        except UserError as error: print(error, file=sys.stderr)
        prompt = ""


def _ask():
    "The next prompt; nothing when there is none, at Ctrl-D."
    try: return input("Story begins: ")
    except EOFError: return print() or ""


def _tell(model, tok, prompt, sampling):
    "Print a story as it comes, after its prompt."
    from nanomoe.generate import stream_text
    try: prompt.encode()
    except UnicodeEncodeError: raise UserError("The prompt is not UTF-8 text: set the terminal to UTF-8, or write the prompt in plain letters.") from None
    pieces = stream_text(model, tok, prompt, **sampling)
    while True:
        try: piece = next(pieces)
        except StopIteration as end:
            print(prompt)   # there is still one if the model had nothing to add
            if end.value != "stop": print("(stopped: --max-new-tokens reached)" if end.value == "length" else "(stopped: the context is full)", file=sys.stderr)
            return
        print(prompt + piece, end="", flush=True)
        prompt = ""         # it is printed with the first piece, once it has proved short enough


@app.command()
def settings(preset: PresetName = "laptop"):
    "List every setting of a preset, for use with `--set`."
    from dataclasses import fields
    titles = {"model": "The model", "train": "Pretraining", "sft": "Instruction tuning", "dpo": "Preference tuning"}
    for part, config in _choose(preset, [])._asdict().items():
        table, prefix = Table("setting", "value", title=titles[part], title_justify="left"), f"{part}." if part in ("sft", "dpo") else ""
        for field in fields(config): table.add_row(prefix + field.name, str(getattr(config, field.name)))
        out.print(table)


@bench.command("train")
def bench_train(steps: Annotated[int, typer.Option(min=2, help="Timed steps of each contestant.")] = 7,
                threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
                batch_size: Annotated[int, typer.Option(min=1)] = 8,
                compile: Compile = False,
                preset: PresetName = "full", set: Settings = []):
    "Training steps of this model beside transformers' GraniteMoeShared of the same shape: AdamW, float32, alternating in one process."
    import torch
    from nanomoe.model import NanoMoE
    try: from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM
    except ImportError: raise UserError("The benchmark compares with transformers: install it with `pip install 'nanomoe[export]'`.") from None
    torch.set_num_threads(threads)
    cfg = _choose(preset, set).model
    _check_memory(cfg)

    def theirs(experts):
        config = GraniteMoeSharedConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, num_local_experts=cfg.num_experts, num_experts_per_tok=cfg.top_k,
            shared_intermediate_size=cfg.num_shared_experts * cfg.d_ff, max_position_embeddings=cfg.max_seq_len, attention_multiplier=cfg.head_dim ** -0.5,
            embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0, tie_word_embeddings=True)
        config._experts_implementation = experts
        model = GraniteMoeSharedForCausalLM(config)
        return model, lambda x, y: model(x, labels=x).loss

    def ours(compiled):
        model = NanoMoE(cfg)
        if compiled: model.hidden = torch.compile(model.hidden, dynamic=False)
        return model, lambda x, y: model.loss(x, y).total

    contestants = {"transformers eager": theirs("eager"), "transformers grouped_mm": theirs("grouped_mm"), "nanomoe": ours(False)}
    if compile: contestants["nanomoe --compile"] = ours(True)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, (model, _) in contestants.items()}
    tokens = torch.randint(cfg.vocab_size, (batch_size, cfg.max_seq_len + 1), generator=torch.Generator().manual_seed(0))
    seconds = {name: [] for name in contestants}
    for step in range(steps + 1):
        for name, (model, loss) in contestants.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
            optimizers[name].step()
            if step: seconds[name].append(time.perf_counter() - start)     # the first step warms up, or compiles
    count = batch_size * cfg.max_seq_len
    _print_speeds(f"Training, batch {batch_size} x {cfg.max_seq_len}, {threads} threads, median of {steps} alternating steps", "tokens/s",
                  {name: count / statistics.median(s) for name, s in seconds.items()}, "transformers eager", "transformers grouped_mm")


@bench.command("data")
def bench_data(preset: PresetName = "laptop", stories: Stories = "storybook", runs: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 5, set: Settings = []):
    "Writing shards beside bare `encode_batch_fast` on the same text."
    from nanomoe.data import bench_shards
    from nanomoe.stories import open_stories
    from nanomoe.tokenizer import train_tokenizer
    chosen = _choose(preset, set)
    texts = [story.text for story in open_stories(stories, "train", min(chosen.train.stories, 10_000), chosen.train.seed)]
    speeds = bench_shards(texts, train_tokenizer(texts[:2_000], chosen.model.vocab_size), runs)
    _print_speeds(f"Tokenizing {len(texts):,} stories, median of {runs} alternating runs", "MB/s", speeds, "encode_batch_fast")


def _print_speeds(title, unit, speeds, *baselines):
    best = max(speeds[name] for name in baselines)
    table = Table("", unit, "of the baseline", title=title, title_justify="left")
    for name, speed in speeds.items(): table.add_row(name, f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}", f"{speed / best:.2f}x")
    out.print(table)


def main():
    "Run the command line: a user's mistake is one sentence on standard error and exit status 1."
    sys.stdout.reconfigure(errors="replace")    # a letter that the terminal cannot show is no reason to stop
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))      # Typer would say "Aborted!" or nothing, depending on its version
    try: app()
    except SystemExit as end:
        if end.code == 130: print("\nStopped.", file=sys.stderr)
        raise
    except UserError as error:
        status = getattr(error, "status", 1)    # a run that was asked to stop is no error
        _leave(f"Error: {error}" if status == 1 else f"\n{error}", status)
    except BrokenPipeError: os._exit(1)     # the reader of our output has gone; nothing can be said to it
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT): raise
        _leave("Error: The disk is full: free some space, and the same command goes on from what was saved.", 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory|Storage size", str(error)): raise
        _leave("Error: The memory does not suffice: choose a smaller model, or a smaller batch with `--set batch_size=1`.", 1)


def _leave(sentence, status):
    print(sentence, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__": main()
