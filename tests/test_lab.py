"""The lab: every variant on the same budget, what is finished is kept, and sizes are what they are said to be."""
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from nanomoe import cli, lab
from nanomoe.config import ModelConfig, override, preset
from nanomoe.data import load_shards, write_shards
from nanomoe.files import UserError
from nanomoe.model import NanoMoE
from nanomoe.stories import storybook
from nanomoe.tokenizer import save_tokenizer, train_tokenizer
from nanomoe.train import evaluate

TINY = ["d_model=16", "n_heads=2", "n_kv_heads=1", "d_ff=16", "n_layers=1", "max_seq_len=64", "seq_len=64", "batch_size=4", "vocab_size=400", "tokens=1024", "evals=1"]
SMALL = override(preset("smoke"), TINY)
NAMES = [v.name for v in lab.router_variants(SMALL)]


@pytest.fixture(scope="module")
def shards_home(tmp_path_factory):
    "A home with a tokenizer and shards, and nothing else."
    home = tmp_path_factory.mktemp("lab")
    texts = [story.text for story in storybook(n=120)]
    tok = train_tokenizer(texts, 400)
    save_tokenizer(tok, home / "tokenizer.json")
    write_shards({"train": texts[:100], "val": texts[100:]}, tok, home / "data" / "shards")
    return home


def command(home, *more, **options):
    "`nanomoe lab` on this home, without the second that a new Python takes to import torch."
    cli.lab(preset="smoke", home=home, device="cpu", set=[*TINY, *more], **options)


def read(home, report): return json.loads((home / "reports" / f"{report}.json").read_text(encoding="utf-8"))


def stamps(home): return {path.parent.name: path.stat().st_mtime_ns for path in home.glob("artifacts/lab/*/result.json")}


def test_the_lab_from_nothing_resumed_and_changed(tmp_path, capsys, monkeypatch):
    "One after the other on one home, as a user would: make everything, do nothing again, train what is missing."
    monkeypatch.setattr(cli.out, "width", 200)      # or names would be broken into two lines
    few = ["stories=150", "val_stories=20", "tokenizer_stories=150"]
    command(tmp_path, *few)
    said = capsys.readouterr().out
    assert (tmp_path / "reports" / "figs" / "lab.png").read_bytes().startswith(b"\x89PNG")
    assert "1,024 training tokens" in said and all(said.count(name) >= 2 for name in NAMES)
    report = read(tmp_path, "lab")
    assert [row["variant"] for row in report["rows"]] == NAMES and report["source"].startswith("storybook")
    for row in report["rows"]:
        assert row["tokens"] == 1024 and 2 < row["bpb"] < 9 and row["tokens_per_s"] > 0
        assert 0 <= row["load_min"] <= 1 <= row["load_max"] and 0 <= row["entropy"] <= 2.33
    before = stamps(tmp_path)
    assert len(before) == len(NAMES) and not list(tmp_path.rglob("ckpt_last.pt")) and not list(tmp_path.rglob("*.tmp"))

    # one result is lost
    next(tmp_path.glob("artifacts/lab/top-1-no-shared-expert-*/result.json")).unlink()
    command(tmp_path, *few)
    again = stamps(tmp_path)
    assert [name for name in before if before[name] != again[name]] == [name for name in before if name.startswith("top-1-no")]
    assert read(tmp_path, "lab") == report, "the same settings, the same losses"


def test_the_baselines_on_the_shards_of_a_home(shards_home, capsys):
    "The shards are used as they are, and the mixture is trained once for both comparisons."
    command(shards_home, baselines=True)
    assert "Shard" not in capsys.readouterr().out
    rows = read(shards_home, "lab_baselines")["rows"]
    assert [(row["group"], row["variant"]) for row in rows] == [(group, name) for group in ("same tokens", "same time") for name in ("mixture", "dense, same active", "dense, same total")]
    assert rows[0] == {**rows[3], "group": "same tokens"} and len(list(shards_home.glob("artifacts/lab/mixture-*"))) == 1
    for row in rows[3:]:
        assert abs(row["tokens"] - rows[0]["tokens"] * row["tokens_per_s"] / rows[0]["tokens_per_s"]) <= 4 * 64


@pytest.mark.parametrize("chosen", [preset("smoke"), preset("laptop"), preset("full"), override(preset("full"), ["num_experts=8", "top_k=3", "num_shared_experts=2"])])
def test_what_is_compared_is_as_large(chosen):
    def size(variant, active):
        with torch.device("meta"): return NanoMoE(variant.preset.model).num_parameters(active)   # numbers without memory

    mixture, active, total = lab.baselines(chosen)
    routers = chosen.model.n_layers * chosen.model.d_model * (chosen.model.num_experts - 1)
    assert size(active, False) == size(mixture, True) - routers and abs(size(active, False) / size(mixture, True) - 1) < 0.01
    assert size(total, False) == size(mixture, False) - routers and abs(size(total, False) / size(mixture, False) - 1) < 0.01
    variants = {variant.name: variant for variant in lab.router_variants(chosen)}
    for name, variant in variants.items():
        for active in (True, False):
            ratio = size(variant, active) / size(variants["auxiliary + z"], active)
            assert abs(ratio - 1) < 0.01 if variant.group != "less work" else ratio < 0.95 or not active, name
    assert variants["auxiliary + z"].preset == chosen
    assert size(variants["top-1"], True) < size(variants["auxiliary + z"], True)


def test_the_widths_of_the_full_model():
    assert [v.preset.model.d_ff for v in lab.baselines(preset("full"))] == [512, 1_536, 2_560]


def test_one_thing_changes():
    "Balance, seed, or how many experts: never two of them."
    chosen = preset("laptop")
    for variant in lab.router_variants(chosen):
        model = {name for name, value in asdict(variant.preset.model).items() if value != getattr(chosen.model, name)}
        train = {name for name, value in asdict(variant.preset.train).items() if value != getattr(chosen.train, name)}
        assert [bool(model & {"balance", "z_coef"}), bool(model & {"num_experts", "top_k", "num_shared_experts"}), train == {"seed"}].count(True) == (variant.name != "auxiliary + z")
        assert model <= {"balance", "z_coef", "num_experts", "top_k", "num_shared_experts"} and train <= {"seed"}


def test_examine_agrees_with_evaluate_and_sees_a_dead_expert(shards_home):
    shards = load_shards(shards_home / "data" / "shards")
    torch.manual_seed(0)
    model = NanoMoE(replace(SMALL.model, vocab_size=shards.meta["vocab_size"], balance="bias"))
    found = lab.examine(model, shards, SMALL.train)
    for name, value in evaluate(model, shards.val, shards.meta["splits"]["val"]["bytes"], 4, 64).items(): assert found[name] == pytest.approx(value)
    model.blocks[0].moe.bias[0] = -9.0
    assert lab.examine(model, shards, SMALL.train)["load_min"] == 0
    torch.nn.init.zeros_(model.blocks[0].moe.router.weight)
    assert lab.examine(model, shards, SMALL.train)["entropy"] == pytest.approx(2.0)


def test_other_settings_are_other_runs_and_fresh_forgets(shards_home, monkeypatch):
    variant = lab.router_variants(SMALL)[0]
    first = lab.train_variant(shards_home, variant)
    before = stamps(shards_home)
    assert lab.train_variant(shards_home, variant) == first and stamps(shards_home) == before
    longer = variant._replace(preset=override(variant.preset, ["tokens=2048"]))
    assert lab.train_variant(shards_home, longer)["tokens"] == 2048 and len(stamps(shards_home)) == len(before) + 1
    assert lab.train_variant(shards_home, variant, fresh=True) == first
    assert stamps(shards_home) != before
    twice, runs, fit = lab.baselines(SMALL)[:1] * 2, [], lab.fit
    monkeypatch.setattr(lab, "fit", lambda *words, **named: runs.append(1) or fit(*words, **named))
    lab.run_lab(shards_home, twice, {"mixture": 1.0}, fresh=True, say=lambda name: None)
    assert len(runs) == 1, "what stands in two groups is trained once"
    monkeypatch.setattr(lab, "fit", None)
    assert lab.train_variant(shards_home, lab.router_variants(SMALL)[2])["variant"] == "auxiliary + z", "the mixture, by another name"


def test_a_stopped_variant_goes_on(shards_home, monkeypatch):
    "Killed in the middle, the second call does the rest, with the same result as if nothing had happened."
    variant = lab.router_variants(override(SMALL, ["save_minutes=0", "seed=5"]))[2]
    whole, batches = lab.train_variant(shards_home, variant), lab.Batches

    class Killed(batches):
        def __call__(self, step, *place):
            if step == 3: raise KeyboardInterrupt
            return super().__call__(step, *place)

    (folder,) = (path.parent for path in shards_home.glob("artifacts/lab/*/result.json") if json.loads(path.read_text(encoding="utf-8")) == whole)
    for path in folder.iterdir(): path.unlink()
    monkeypatch.setattr(lab, "Batches", Killed)
    with pytest.raises(KeyboardInterrupt): lab.train_variant(shards_home, variant)
    assert (folder / "ckpt_last.pt").exists() and not (folder / "result.json").exists()
    seen = []

    class Watched(batches):
        def __call__(self, step, *place):
            seen.append(step)
            return super().__call__(step, *place)

    monkeypatch.setattr(lab, "Batches", Watched)
    assert lab.train_variant(shards_home, variant) == whole and seen == [3]


@pytest.mark.parametrize("settings, sentence", [
    ("top_k=1", "top_k of at least 2"), ("num_shared_experts=0", "a shared expert"), ("top_q=3", 'no setting "top_q"'), ("seq_len=100000", "longer than the model's context")])
def test_a_mistake_leaves_nothing(tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence): command(tmp_path / "home", settings)
    assert not (tmp_path / "home").exists()


def test_a_mistake_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, "-m", "nanomoe.cli", "lab", "--home", tmp_path / "home", "--set", "top_k=1"], capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 1 and done.stderr.startswith("Error: The router lab ") and done.stderr.count("\n") == 1


def test_a_damaged_result_is_named(shards_home):
    variant = lab.router_variants(override(SMALL, ["seed=7"]))[0]
    lab.train_variant(shards_home, variant)
    (path,) = (path for path in shards_home.glob("artifacts/lab/*/config.json") if json.loads(path.read_text(encoding="utf-8"))["train"]["seed"] == 7)
    for damage in ("{", "[]", "{}", '{"bpb": "low"}'):
        path.with_name("result.json").write_text(damage, encoding="utf-8")
        with pytest.raises(UserError, match="result.json is damaged"): lab.train_variant(shards_home, variant)


def test_the_table_and_the_figure_have_every_row(shards_home):
    variants = lab.router_variants(SMALL)
    rows = lab.run_lab(shards_home, variants, lab.race(shards_home, variants, rounds=1), say=lambda name: None)
    text = lab.lab_text(rows)
    assert all(name in text for name in NAMES) and text.count("\n\n") == 2
    figure = lab.lab_figure(rows)
    assert [label.get_text().split("  ")[0] for label in figure.axes[0].get_yticklabels()] == NAMES


def test_a_dense_model_is_as_good_as_its_single_expert():
    cfg = lab.dense(ModelConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8, max_seq_len=16), 3)
    torch.manual_seed(0)
    moe = NanoMoE(cfg).blocks[0].moe
    torch.nn.init.normal_(moe.down)
    x = torch.randn(1, 80, 16)
    gate, up = (x[0] @ moe.gate_up[0].T).chunk(2, -1)
    torch.testing.assert_close(moe(x)[0][0], torch.nn.functional.silu(gate) * up @ moe.down[0].T, rtol=1e-4, atol=1e-4)
    assert cfg.d_ff == 24 and moe(x)[1].weights.eq(1).all()


def test_the_threads_come_back_after_a_mistake(shards_home, monkeypatch):
    def fail(*_): raise UserError("no")
    monkeypatch.setattr(lab, "train_step", fail)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match="no"): lab.race(shards_home, lab.router_variants(SMALL)[:1], fresh=True)
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)
