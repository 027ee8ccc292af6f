"""A checkpoint with a wrong bit is refused, or is the very same one."""
import random
import warnings
from hashlib import sha256
from zipfile import ZipFile

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from nanomoe.checkpoint import load_checkpoint, load_model, save_checkpoint
from nanomoe.config import ModelConfig, TrainConfig
from nanomoe.files import SHIPPED, UserError, find_checkpoints
from nanomoe.model import NanoMoE
from nanomoe.train import make_optimizers


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = NanoMoE(ModelConfig(vocab_size=40, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8, max_seq_len=16))
    model.vocabulary = "0123456789abcdef" * 4
    return model


@pytest.fixture(scope="module")
def state(model):
    "What a resume needs, after a step."
    optimizers = make_optimizers(model, TrainConfig())
    model.loss(torch.arange(16).view(1, 16), torch.arange(1, 17).view(1, 16)).total.backward()
    for optimizer in optimizers: optimizer.step()
    return {"step": 1, "best": {"bpb": 1.5}, "rng": torch.get_rng_state(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


@pytest.fixture(params=["ckpt.pt", "ckpt.safetensors", "before.pt", "before.safetensors"])
def path(request, model, state, tmp_path):
    "A checkpoint as it is saved now, or as it was before all of it had a fingerprint."
    path = tmp_path / request.param
    save_checkpoint(path, model, **state)
    if path.name == "before.pt": torch.save(load_checkpoint(path), path)
    if path.name == "before.safetensors":       # as those in checkpoints/
        with safe_open(path, "pt") as file: metadata = file.metadata()
        weights = safetensors.torch.load_file(path)
        digest = sha256(metadata["config"].encode() + b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
        assert digest != metadata["sha256"]
        safetensors.torch.save_file(weights, path, {**metadata, "sha256": digest})
    return path


def plain(value): # so that == says whether two are the same
    if isinstance(value, torch.Tensor): return value.shape, value.dtype, value.numpy().tobytes()
    if isinstance(value, dict): return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def all_of(path):
    content, model = load_checkpoint(path), load_model(path)
    return plain({**content, "vocabulary": None}), plain(model.state_dict()), content["vocabulary"]


def refused_or_the_same(path, bits):
    "How many of the files with one flipped bit are refused. The others must be the very same checkpoint."
    whole, good, refused = path.read_bytes(), [*all_of(path)], 0
    for bit in bits:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                *found, vocabulary = all_of(path)
        except UserError: refused += 1
        else:
            assert found == good[:2], bit
            if path.name == "before.safetensors": assert vocabulary     # another one, perhaps: no tokenizer has that
            else: assert vocabulary == good[2], bit
    path.write_bytes(whole)
    return refused


def test_what_is_whole_is_loaded(path, model, state):
    content = load_checkpoint(path)
    assert "sha256" not in content and plain(content["model"]) == plain(dict(model.state_dict())) and content["vocabulary"] == model.vocabulary
    if path.suffix == ".pt": assert plain({name: content[name] for name in state}) == plain(state)


def test_any_bit(path):
    bits = random.Random(0).sample(range(8 * path.stat().st_size), 300)
    assert refused_or_the_same(path, bits) > 100


@pytest.mark.parametrize("path", ["ckpt.pt", "before.pt"], indirect=True)
def test_a_tensor_that_is_called_a_folder(path):
    "PyTorch leaves it as the memory was."
    data = path.read_bytes()
    with ZipFile(path) as archive: start, count = archive.start_dir, len(archive.infolist())
    entries = [i for i in range(start, len(data)) if data.startswith(b"PK\x01\x02", i)]
    assert len(entries) == count > 10
    assert refused_or_the_same(path, [8 * (entry + 38) + 4 for entry in entries]) == count
    assert refused_or_the_same(path, [8 * at + bit for entry in entries for at in range(entry, entry + 46) for bit in range(8)][::67]) > 100


@pytest.mark.parametrize("path", ["ckpt.safetensors", "before.safetensors"], indirect=True)
def test_every_bit_of_the_name_of_the_vocabulary(path):
    data = path.read_bytes()
    start = data.index(b'"vocabulary"')
    assert refused_or_the_same(path, range(8 * start, 8 * (start + 12))) == 96


@pytest.mark.parametrize("changed", ["model", "optimizers", "rng", "step"])
def test_whatever_torch_makes_of_a_file_is_compared(model, state, tmp_path, monkeypatch, changed):
    save_checkpoint(tmp_path / "ckpt.pt", model, **state)
    load = torch.load

    def forgetful(*args, **named):
        content = load(*args, **named)
        if changed == "step": content["step"] += 1
        else: {"model": lambda: content["model"]["embed.weight"], "rng": lambda: content["rng"],
               "optimizers": lambda: content["optimizers"][-1]["state"][0]["exp_avg"]}[changed]().view(-1)[3] += 1
        return content

    monkeypatch.setattr(torch, "load", forgetful)
    with pytest.raises(UserError, match="damaged.*--fresh"): load_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="this clone brings no checkpoints")
def test_the_shipped_ones_cannot_forget_their_tokenizer(tmp_path):
    for path in find_checkpoints(SHIPPED).values():
        data, copy = bytearray(path.read_bytes()), tmp_path / path.name
        data[data.index(b'"vocabulary"') + 3] ^= 1
        copy.write_bytes(data)
        with pytest.raises(UserError, match="damaged"): load_checkpoint(copy)
