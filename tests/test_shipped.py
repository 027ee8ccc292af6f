"""The checkpoints that a clone brings: small enough, whole, and at work where a home has none."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nanomoe.checkpoint import check_tokenizer, load_model, vocabulary_hash
from nanomoe.config import preset
from nanomoe.export import export_checkpoints, export_hf
from nanomoe.files import SHIPPED, STAGES, UserError, find_checkpoints, home_or_shipped
from nanomoe.tokenizer import BOS, EOS, load_tokenizer
from nanomoe.train import evaluate
from test_cli import nanomoe

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="this clone brings no checkpoints")


def test_all_three_are_there_in_the_full_shape():
    assert SHIPPED == ROOT / "checkpoints" and list(find_checkpoints(SHIPPED)) == list(STAGES)
    tok = load_tokenizer(SHIPPED / "tokenizer.json")
    for path in find_checkpoints(SHIPPED).values():
        assert path.stat().st_size <= 23e6
        with safe_open(path, "pt") as file: assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
        model = load_model(path)
        check_tokenizer(tok, model)
        assert model.vocabulary == vocabulary_hash(tok) and model.cfg == preset("full").model and model.embed.weight.dtype == torch.float32
        assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["model"]["d_model"] == model.cfg.d_model


def test_nothing_of_the_machine_they_come_from_is_in_them():
    for path in SHIPPED.iterdir(): assert not re.search(rb"/(work|home|root|tmp|Users)/", path.read_bytes()), path


STORY = """Once upon a time, there was a little girl named Lily. She loved to play in the park with her dog, Max. One day, Max ran after a big red ball.
The ball rolled down the hill and into the pond. "Oh no!" said Lily. "My ball is wet." Max jumped into the water and swam to the ball. He took it in his mouth and brought it back.
Lily was very happy. She gave Max a big hug and said, "Thank you, Max. You are a good dog." Then they went home and had a snack together."""


def test_they_know_how_stories_go():
    "Half of what a model would need that knows how often each token of this very story occurs, and nothing else."
    tok = load_tokenizer(SHIPPED / "tokenizer.json")
    tokens = np.array([BOS, *tok.encode(STORY).ids, EOS], dtype=np.uint16)
    counted = -np.log2(np.bincount(tokens)[tokens] / len(tokens)).sum() / len(STORY.encode())
    for path in find_checkpoints(SHIPPED).values(): assert evaluate(load_model(path), tokens, len(STORY.encode()), 1, 512)["bpb"] < counted / 2, path


def test_an_empty_home_tells_a_story_at_once(tmp_path):
    for name in ("latest", *STAGES):
        told = nanomoe("generate", "Once upon a time", "--home", tmp_path / "none", "--checkpoint", name, "--temperature", 0, "--max-new-tokens", 12)
        assert told.returncode == 0 and told.stdout.startswith("Once upon a time") and "comes with the course" in told.stderr, told.stderr
    assert not (tmp_path / "none").exists()
    named = nanomoe("generate", "Once upon a time", "--checkpoint", SHIPPED / "dpo.safetensors", "--temperature", 0, "--max-new-tokens", 12)
    assert named.returncode == 0 and named.stdout.startswith("Once upon a time"), named.stderr


def test_a_home_with_a_checkpoint_is_never_passed_over(tmp_path):
    (tmp_path / "artifacts" / "sft").mkdir(parents=True)
    (tmp_path / "artifacts" / "sft" / "ckpt_best.pt").write_bytes(b"damaged, and still theirs")
    assert home_or_shipped(tmp_path) == tmp_path
    done = nanomoe("generate", "--home", tmp_path)
    assert done.returncode == 1 and "damaged" in done.stderr


def test_its_card_goes_with_an_exported_model(tmp_path):
    ours = (SHIPPED / "README.md").read_text(encoding="utf-8")
    base, of_sft, of_dpo = re.findall(r"^\| Bits per byte \| (0\.\d{4}) on the whole validation split", ours, re.M)
    assert base < of_sft <= of_dpo     # what tuning costs
    card = (export_hf(SHIPPED / "dpo.safetensors", SHIPPED / "tokenizer.json", tmp_path / "hf") / "README.md").read_text(encoding="utf-8")
    assert f"| Bits per byte | {of_dpo} on the whole validation split |" in card and "about known protagonists" in card
    assert card.endswith(ours.partition("## dpo.safetensors")[2].partition("| | |")[2]) and card.count("Bits per byte") == 1 and base not in card
    sft = (export_hf(SHIPPED / "sft.safetensors", SHIPPED / "tokenizer.json", tmp_path / "hf") / "README.md").read_text(encoding="utf-8")
    assert of_sft in sft and sft.count("Bits per byte") == 1 and "## " not in sft
    other = shutil.copy(SHIPPED / "dpo.safetensors", tmp_path / "dpo.safetensors")      # with somebody else's words beside it
    (tmp_path / "README.md").write_text("# My models\n\n## dpo.safetensors\n\n| | |\n|---|---|\n| Bits per byte | 0.1 |\n")
    assert "Bits per byte" not in (export_hf(other, SHIPPED / "tokenizer.json", tmp_path / "hf") / "README.md").read_text(encoding="utf-8")


def test_given_away_again_nothing_changes(tmp_path):
    again = export_checkpoints(SHIPPED, tmp_path / "again", (SHIPPED / "README.md").read_text(encoding="utf-8").split("\n\n")[1])
    for name in ("README.md", *(path.name for path in SHIPPED.glob("*.json"))): assert (again / name).read_text(encoding="utf-8") == (SHIPPED / name).read_text(encoding="utf-8"), name
    for name, path in find_checkpoints(SHIPPED).items():
        ours, theirs = load_model(path).state_dict(), load_model(again / path.name).state_dict()
        assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[key]) for key, tensor in ours.items()), name
    with pytest.raises(UserError, match="no checkpoint yet"): export_checkpoints(tmp_path / "nothing", tmp_path / "given")
    assert not (tmp_path / "given").exists()
