"""The `nanomoe` command: each subcommand is a few calls into the modules that the notebooks export.

- Heavy modules are imported inside the commands, so that `--help` answers at once.
- A `UserError` is printed as its one sentence, with exit status 1; a stopped run exits with 130.
- `run` skips what an earlier run has finished, so that the same command goes on after a kill.
"""
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nanomoe.config import override, preset
from nanomoe.files import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
                  help="Build, train and look inside a small mixture-of-experts language model. Start with `nanomoe run`.")
bench = typer.Typer(no_args_is_help=True, help="Measure this machine: ratios side by side, in one run.")
app.add_typer(bench, name="bench")
out = Console(highlight=False, soft_wrap=True)

STAGES = {"pretrain": "pretraining", "sft": "sft", "dpo": "dpo"}    # what --checkpoint calls them -> folder in artifacts/

PresetName = Annotated[str, typer.Option("--preset", help="How big: `smoke` (a minute), `laptop` (minutes, real stories) or `full` (a GPU, or patience).")]
Home = Annotated[Path, typer.Option(help="The folder that holds everything a run reads and writes.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same stories, weights and samples.")]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda` or `mps`; `auto` takes the fastest there is.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Change one number of the preset, for instance `--set d_model=256`; may be repeated. `nanomoe settings` lists them all.")]
Stories = Annotated[str, typer.Option(help="`storybook` (bundled), `tinystories` (downloaded), or a .parquet, .jsonl or .txt file or a folder of them.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on from what an earlier run left.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile: a slow start, then faster steps.")]


def _choose(name, settings, seed, compile=False):
    return override(preset(name), [f"seed={seed}", f"compile={compile}", *settings])


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


def _describe(stories, cfg, vocab_size, seed):
    "What tokenizer and shards are made of; kept in meta.json to tell whether they are still what is asked for."
    return f"{stories}, {cfg.stories} + {cfg.val_stories} stories, vocabulary {vocab_size} from {cfg.tokenizer_stories}, seed {seed}"


def _train_tokenizer(home, stories, chosen, seed):
    from nanomoe.stories import open_stories
    from nanomoe.tokenizer import save_tokenizer, train_tokenizer
    tok = train_tokenizer((story.text for story in open_stories(stories, "train", chosen.train.tokenizer_stories, seed)), chosen.model.vocab_size)
    save_tokenizer(tok, home / "tokenizer.json")
    out.print(f"Tokenizer: {tok.get_vocab_size():,} tokens, in {home / 'tokenizer.json'}")
    return tok


def _write_shards(home, stories, chosen, seed, tok):
    from nanomoe.data import write_shards
    from nanomoe.stories import open_stories
    cfg, folder = chosen.train, home / "data" / "shards"
    splits = {"train": open_stories(stories, "train", cfg.stories, seed), "val": open_stories(stories, "val", cfg.val_stories, seed)}
    meta = write_shards(splits, tok, folder, _describe(stories, cfg, chosen.model.vocab_size, seed))
    for name, split in meta["splits"].items():
        out.print(f"Shard {name}: {split['stories']:,} stories, {split['tokens']:,} tokens, {split['bytes'] / split['tokens']:.2f} bytes a token")


def _shards_are_right(home, stories, chosen, seed):
    from nanomoe.data import load_shards
    from nanomoe.tokenizer import load_tokenizer
    try: meta = load_shards(home / "data" / "shards", load_tokenizer(home / "tokenizer.json")).meta
    except UserError: return False
    return meta["source"] == _describe(stories, chosen.train, chosen.model.vocab_size, seed)


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


def _find_checkpoint(home, name):
    if name not in ("latest", *STAGES): return Path(name)
    for stage in reversed(STAGES) if name == "latest" else [name]:
        path = home / "artifacts" / STAGES[stage] / "ckpt_best.pt"
        if path.is_file() or name != "latest": return path
    raise UserError(f"{home} holds no checkpoint yet: make one with `nanomoe run --home {home}`, or name a file with --checkpoint.")


@app.command()
def run(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
        fresh: Fresh = False, compile: Compile = False, set: Settings = []):
    "Everything, one after the other: stories, tokenizer, shards, pretraining, and a few stories told by the new model."
    from nanomoe.checkpoint import load_model
    from nanomoe.generate import tell_story
    from nanomoe.tokenizer import load_tokenizer
    started = time.perf_counter()
    chosen, device = _choose(preset, set, seed, compile), _pick_device(device)
    _check_home(home)
    right = _shards_are_right(home, stories, chosen, seed)
    if not fresh and not right and (home / "artifacts" / "pretraining" / "ckpt_last.pt").exists():
        raise UserError(f"{home} holds a model trained on other stories or with other settings: give those again, add --fresh to replace it, or use another --home.")
    if fresh or not right:
        _write_shards(home, stories, chosen, seed, _train_tokenizer(home, stories, chosen, seed))
    else: out.print("Tokenizer and shards: there already, and right")
    _pretrain(home, chosen, device, fresh)
    tok, model = load_tokenizer(home / "tokenizer.json"), load_model(home / "artifacts" / "pretraining" / "ckpt_best.pt", device)
    for i in range(3):
        out.print(f"\n[bold]Story {i + 1}[/bold]")
        out.print(tell_story(model, tok, temperature=0.7, top_p=0.95, seed=seed + i, max_new_tokens=400), markup=False)
    out.print(f"\nDone in {time.perf_counter() - started:.0f} s. In {home.resolve()}:")
    out.print("  tokenizer.json, data/shards/                     what the model reads\n"
              "  artifacts/pretraining/                           checkpoints and logs\n"
              "  reports/figs/pretrain_training_summary.png       how the training went")
    at = "" if home == Path(".") else f" --home {home}"
    out.print(f'Next: `nanomoe generate "Once upon a time"{at}`, or a longer training: `nanomoe run --preset full --home full-run`.', markup=False)


@app.command()
def tokenizer(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, set: Settings = []):
    "Train the byte-level BPE tokenizer on the first stories, and write tokenizer.json."
    chosen = _choose(preset, set, seed)
    _check_home(home)
    _train_tokenizer(home, stories, chosen, seed)


@app.command()
def prepare_data(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, set: Settings = []):
    "Write the stories as tokens into data/shards, with the tokenizer that is there."
    from nanomoe.tokenizer import load_tokenizer
    _write_shards(home, stories, _choose(preset, set, seed), seed, load_tokenizer(home / "tokenizer.json"))


@app.command()
def pretrain(preset: PresetName = "laptop", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
             fresh: Fresh = False, compile: Compile = False, set: Settings = []):
    "Train the model on the shards; goes on where it stopped. Several GPUs: `torchrun --nproc-per-node 2 -m nanomoe.cli pretrain`."
    chosen = _choose(preset, set, seed, compile)
    _pretrain(home, chosen, _pick_device(device), fresh)


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
    device = _pick_device(device)
    path = _find_checkpoint(home, checkpoint)
    from nanomoe.checkpoint import load_model
    from nanomoe.generate import stream_text
    from nanomoe.tokenizer import load_tokenizer
    model, tok = load_model(path, device), load_tokenizer(home / "tokenizer.json")
    while True:
        if chat and not prompt and not (prompt := input("Story begins: ")): return
        pieces = stream_text(model, tok, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p,
                             min_p=min_p or None, repetition_penalty=repetition_penalty, seed=seed, use_cache=cache)
        reason = _tell(prompt, pieces)
        if reason != "stop": out.print(f"\n[dim](stopped: {'--max-new-tokens reached' if reason == 'length' else 'the context is full'})[/dim]", end="")
        print()
        if not chat: return
        prompt = ""


def _tell(prompt, pieces):
    "Print a story as it comes, after its prompt; returns why it ended."
    while True:
        try: print(prompt + next(pieces), end="", flush=True)
        except StopIteration as end: return end.value
        prompt = ""     # it is printed with the first piece, once it has proved short enough


@app.command()
def settings(preset: PresetName = "laptop"):
    "List every setting of a preset, for use with `--set`."
    from dataclasses import fields
    for title, config in zip(("The model", "The training run"), _choose(preset, [], 0)):
        table = Table("setting", "value", title=title, title_justify="left")
        for field in fields(config): table.add_row(field.name, str(getattr(config, field.name)))
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
    cfg = _choose(preset, set, 0).model

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
    tokens = torch.randint(4, cfg.vocab_size, (batch_size, cfg.max_seq_len + 1), generator=torch.Generator().manual_seed(0))
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
def bench_data(preset: PresetName = "laptop", stories: Stories = "storybook", runs: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 5):
    "Writing shards beside bare `encode_batch_fast` on the same text."
    from nanomoe.data import bench_shards
    from nanomoe.stories import open_stories
    from nanomoe.tokenizer import train_tokenizer
    texts = [story.text for story in open_stories(stories, "train", 10_000)]
    speeds = bench_shards(texts, train_tokenizer(texts[:2_000], _choose(preset, [], 0).model.vocab_size), runs)
    _print_speeds(f"Tokenizing {len(texts):,} stories, median of {runs} alternating runs", "MB/s", speeds, "encode_batch_fast")


def _print_speeds(title, unit, speeds, *baselines):
    best = max(speeds[name] for name in baselines)
    table = Table("", unit, "of the baseline", title=title, title_justify="left")
    for name, speed in speeds.items(): table.add_row(name, f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}", f"{speed / best:.2f}x")
    out.print(table)


def main():
    "Run the command line: a user's mistake is one sentence on standard error and exit status 1."
    try: app()
    except UserError as error:
        status = getattr(error, "status", 1)    # a run that was asked to stop is no error
        _leave(f"Error: {error}" if status == 1 else f"\n{error}", status)
    except KeyboardInterrupt: _leave("Stopped.", 130)
    except BrokenPipeError: os._exit(1)     # the reader of our output has gone; nothing can be said to it


def _leave(sentence, status):
    print(sentence, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__": main()
