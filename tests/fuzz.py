"""Coverage-guided fuzzing: python tests/fuzz.py TARGET [options of libFuzzer, for instance -max_total_time=600]

Atheris looks which branches an input takes, and makes its next inputs from those that took new ones. An exception
other than `UserError` ends the run with exit status 77, and what caused it lies in a file named crash-….
"""
import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nanomoe"]):
    from nanomoe.checkpoint import save_checkpoint
    from nanomoe.config import ModelConfig, Preset, override, preset
    from nanomoe.export import model_card
    from nanomoe.files import UserError, sha256_of
    from nanomoe.model import NanoMoE
    from nanomoe.synth import Seed, load_prompt_seeds, read_rows, seed_row
    from nanomoe.tokenizer import load_tokenizer, train_tokenizer
    from nanomoe.train import log_columns, read_log

HOME = Path(tempfile.mkdtemp())
(HOME / "data" / "synthetic").mkdir(parents=True)
GOOD = json.dumps(seed_row(Seed("a", "train", "Lily", "kindness", ("red ball", "big tree"), ("dark",), 3, 7, 0))).encode()
TOK = train_tokenizer(["Lily ran to the big red ball. It was [BOS] fun."] * 3, 300)


def rows(data):
    (HOME / "rows.jsonl").write_bytes(data)
    assert all("id" in row for row in read_rows(HOME / "rows.jsonl", "id"))


def log(data):
    (HOME / "log.jsonl").write_bytes(data)
    assert all(isinstance(row["step"], (int, float)) for row in read_log(HOME / "log.jsonl"))
    assert all(len(column) == len(read_log(HOME / "log.jsonl")) for column in log_columns(HOME / "log.jsonl", "tokens", "load"))


def prompt(data):
    (HOME / "data" / "synthetic" / "prompt_seeds.jsonl").write_bytes(data)
    for seed in load_prompt_seeds(HOME):
        assert seed.theme in seed.instruction and all(phrase in seed.instruction for phrase in (*seed.required, *seed.banned))


def text(data):
    written = data.decode("utf-8", errors="replace")
    ids = TOK.encode(written).ids
    assert TOK.decode(ids) == written and all(i >= 4 for i in ids)      # no text can write a special token


def tokenizer(data):
    (HOME / "tokenizer.json").write_bytes(data)
    load_tokenizer(HOME / "tokenizer.json")


def setting(data): assert isinstance(override(preset("smoke"), data.decode("utf-8", errors="replace").split("\n")), Preset)


RUN, MODEL = HOME / "artifacts" / "pretraining", NanoMoE(ModelConfig(300, 16, 1, 2, 1, 16, max_seq_len=16))
save_checkpoint(RUN / "ckpt_best.pt", MODEL)
METRIC = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}
SCORED = {name: {"greedy": {metric: METRIC for metric in ("protagonist", "required_all", "length_kept", "finished")}} for name in ("seen", "unseen")}
REPORT = {"base": {"sha256": sha256_of((RUN / "ckpt_best.pt").read_bytes()), "bpb": 1.5, **SCORED}, "source": "x", "splits": {"train": {"stories": 5, "tokens": 9}},
          "step": 1, "tokens": 3, "tokens_per_s": 9.5}
for folder in (HOME / "data" / "shards", HOME / "reports"): folder.mkdir(parents=True)


def card(data):
    for file in (HOME / "data" / "shards" / "meta.json", HOME / "reports" / "scorecard.json", RUN / "train_log.jsonl", RUN / "val_log.jsonl"): file.write_bytes(data)
    assert f"| Parameters | {MODEL.num_parameters():,};" in model_card(RUN / "ckpt_best.pt", MODEL)


# each with inputs to begin from
TARGETS = {"rows": (rows, [GOOD, b'{"id": 1}\n{"id": 2}\n', b"[]\n"]), "log": (log, [b'{"step": 1}\n{"step": 2.5}\n{"st', b'{"step": NaN}\n', b'{"step": 1, "tokens": 5, "load": [[0.5, 0.5]]}\n']),
           "card": (card, [json.dumps(REPORT).encode(), json.dumps({**REPORT, "bpb": 2.5}).encode()]),
           "prompt": (prompt, [GOOD, GOOD + b"\n" + GOOD]), "text": (text, ["Lily’s [EOS] 🦊\r\n".encode()]),
           "tokenizer": (tokenizer, [TOK.to_str().encode()]), "setting": (setting, [b"d_model=128", b"sft.examples=1_0\ndpo.beta=0.1", b"compile=true\nlr=1e-3"])}


def main(name, *options):
    target, begin = TARGETS[name]
    corpus = HOME / "corpus"
    corpus.mkdir()
    for i, data in enumerate(begin): (corpus / str(i)).write_bytes(data)

    def once(data):
        try: target(data)
        except UserError as error: assert str(error) and "\n" not in str(error)     # one sentence

    atheris.Setup([sys.argv[0], "-max_len=20000", *options, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__": main(*sys.argv[1:])
