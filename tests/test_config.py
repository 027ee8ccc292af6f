"""Configuration: presets hold, and nonsense gets one sentence, whatever it is."""
import dataclasses
import re

import pytest
from hypothesis import example, given, settings, strategies as st

from nanomoe.config import ModelConfig, Preset, TrainConfig, override, preset
from nanomoe.files import UserError

PRESETS = ["smoke", "laptop", "full"]
FIELDS = {f.name: f.type for config in (ModelConfig, TrainConfig) for f in dataclasses.fields(config)}


def sentence(fn):
    "What `fn` complains about: one sentence on one line."
    with pytest.raises(UserError) as error: fn()
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and not re.search(r"Error|Traceback|None", text)
    return text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    model, train, sft, dpo = preset(name)
    assert isinstance(preset(name), Preset) and isinstance(model, ModelConfig) and isinstance(train, TrainConfig)
    assert override(preset(name), []) == preset(name)       # passes every check once more
    assert train.seq_len <= model.max_seq_len and train.steps >= train.evals
    assert sft.steps >= sft.evals and dpo.steps >= dpo.evals
    assert train.tokenizer_stories >= 1 and model.vocab_size >= 260


def test_the_defaults_are_the_full_preset_and_the_design():
    model = preset("full").model
    assert model == ModelConfig()
    values = dict(vocab_size=10_000, d_model=192, n_layers=6, n_heads=8, n_kv_heads=2, d_ff=512, num_experts=4, num_shared_experts=1,
                  top_k=2, max_seq_len=512, rope_theta=10_000, norm_eps=1e-6, load_balance_coef=1e-2, z_coef=1e-3, balance="aux")
    assert {name: getattr(model, name) for name in values} == values
    assert model.head_dim == 24


def test_no_name_is_in_both_configs():
    "Or --set could not tell which one is meant."
    assert len(FIELDS) == len(dataclasses.fields(ModelConfig)) + len(dataclasses.fields(TrainConfig))


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_can_be_set_to_what_it_is(name):
    chosen = preset(name)
    for part, config in chosen._asdict().items():
        for field in dataclasses.fields(config):
            path = field.name if part in ("model", "train") else f"{part}.{field.name}"
            assert override(chosen, [f"{path}={getattr(config, field.name)}"]) == chosen


def test_a_prefix_names_the_training():
    chosen = override(preset("smoke"), ["lr=1e-3", "sft.lr=2e-3", "dpo.lr=3e-3", "dpo.beta=0.5"])
    assert (chosen.train.lr, chosen.sft.lr, chosen.dpo.lr, chosen.dpo.beta) == (1e-3, 2e-3, 3e-3, 0.5)
    for setting, near in (("sft.beta=1", "sft.beta2"), ("dpo.bta=1", "dpo.beta"), ("spo.lr=1", "dpo.lr")):
        assert near in sentence(lambda: override(preset("smoke"), [setting]))


def test_override():
    chosen = override(preset("full"), ["d_model=256", " lr = 1e-3 ", "compile=Yes", "tokens=1_000_000", "optimizer=adamw", "balance=bias", "seed=1", "seed=2"])
    assert chosen.model == dataclasses.replace(ModelConfig(), d_model=256, balance="bias")
    assert (chosen.train.lr, chosen.train.compile, chosen.train.tokens, chosen.train.optimizer) == (1e-3, True, 1_000_000, "adamw")
    assert chosen.train.seed == 2       # the last one counts
    assert preset("full").model.d_model == 192


@pytest.mark.parametrize("setting, says", [("sft.val_examples=1", "at least 2"), ("sft.dpo.lr=1", "no setting"), ("dpo.val_examples=4", "no setting"), ("dpo.replay=1", "no setting")])
def test_settings_that_would_do_nothing_or_fail_late(setting, says):
    assert says in sentence(lambda: override(preset("smoke"), [setting]))


# Values that a person might type, values that a fuzzer would, and names that are nearly right.
names = st.sampled_from(sorted(FIELDS)) | st.sampled_from(["d_modle", "head_dim", "steps", "__class__", "", "model", "lr "]) | st.text(max_size=12)
values = (st.integers().map(str) | st.floats().map(str) | st.integers(-2, 600).map(str) | st.text(max_size=12)
          | st.sampled_from(["true", "no", "nan", "-inf", "1e999", "0x10", "1_0", "_", "", "aux", "adamw", "bfloat16", "9" * 5000, "999999999999999989", "٣"]))
overrides = st.lists(st.builds("{}={}".format, names, values) | st.text(max_size=20), max_size=4)


@settings(max_examples=500)
@given(name=st.sampled_from(PRESETS), overrides=overrides)
@example(name="full", overrides=["d_model=" + "9" * 4000])
@example(name="full", overrides=["d_model=1000000000002"])      # naming every divisor would take hours
@example(name="full", overrides=["n_heads=999999999989"])
@example(name="full", overrides=["num_experts=0"])
def test_override_gives_a_preset_or_a_sentence(name, overrides):
    try: chosen = override(preset(name), overrides)
    except UserError as error:
        assert str(error).endswith(".")
        return
    assert isinstance(chosen, Preset) and chosen.train.steps >= 1
    model = chosen.model
    assert model.d_model == model.n_heads * model.head_dim and model.head_dim % 2 == 0 and model.n_heads % model.n_kv_heads == 0
    assert 1 <= model.top_k <= model.num_experts and 1 <= model.vocab_size <= 65_535
    for config in chosen:       # every value has its field's type
        for field in dataclasses.fields(config): assert type(getattr(config, field.name)) is field.type


@pytest.mark.parametrize("typed, meant", [("d_modle", "d_model"), ("heads", "n_heads"), ("numexperts", "num_experts"), ("learning_rate", None),
                                          ("batchsize", "batch_size"), ("weight-decay", "weight_decay"), ("zzz", None), ("head_dim", None)])
def test_a_typo_gets_the_nearest_name(typed, meant):
    text = sentence(lambda: override(preset("full"), [f"{typed}=1"]))
    assert f'no setting "{typed}"' in text
    if meant: assert f'did you mean "{meant}"?' in text


@pytest.mark.parametrize("typed, meant", [("labtop", "laptop"), ("Full", "full"), ("smok", "smoke"), ("gigantic", None), ("", None)])
def test_an_unknown_preset(typed, meant):
    text = sentence(lambda: preset(typed))
    assert "smoke, laptop, full" in text
    assert (f'did you mean "{meant}"?' in text) if meant else "did you mean" not in text


@pytest.mark.parametrize("setting, says", [
    ("n_heads=7", "n_heads=7 does not divide d_model=192"),
    ("n_heads=64", "d_model / n_heads = 3 is odd"),
    ("d_model=191", "d_model=191 is odd"),
    ("n_kv_heads=3", "n_kv_heads=3 does not divide n_heads=8"),
    ("n_kv_heads=16", "does not divide n_heads=8"),
    ("top_k=5", "top_k=5 is more than num_experts=4"),
    ("num_experts=1", "top_k=2 is more than num_experts=1"),
    ("vocab_size=65536", "over 65,535"),
    ("d_model=0", "d_model=0 must be at least 1"),
    ("n_layers=-1", "at least 1"),
    ("num_shared_experts=-1", "num_shared_experts=-1 must be at least 0"),
    ("rope_theta=0", "rope_theta=0.0 must be at least 1"),
    ("norm_eps=0", "norm_eps=0.0 must be more than 0"),
    ("balance=both", 'balance="both" is unknown'),
    ("optimizer=sgd", 'optimizer="sgd" is unknown'),
    ("dtype=float16", 'dtype="float16" is unknown'),
    ("lr=-1", "lr=-1.0 must be at least 0"),
    ("lr=nan", "finite"),
    ("muon_lr=1e300", "muon_lr must be at most 1e+30"),
    ("min_lr=1e300", "at most"),
    (f"tokens=1{'0' * 400}", "tokens must be at most"),
    ("batch_size=100_000_000_000", "at most"),
    ("evals=1_000_000_000", "at most"),
    ("lr=fast", 'lr takes a number, and "fast" is none'),
    ("beta2=1", "beta2=1.0 must be at least 0 and less than 1"),
    ("warmup=5", "between 0 and 1"),
    ("seed=-1", "seed=-1 must be at least 0"),
    ("seed=99999999999999999999", "63 bits"),
    ("seq_len=513", "max_seq_len=512"),
    ("batch_size=2.5", "batch_size takes a whole number"),
    ("compile=maybe", "compile takes true or false"),
    ("d_model", "write NAME=VALUE"),
])
def test_nonsense_gets_a_sentence(setting, says):
    assert says in sentence(lambda: override(preset("full"), [setting]))


def test_the_advice_is_good():
    "Every number that a sentence tells a user to choose is accepted."
    for setting in ("n_heads=7", "n_heads=64", "n_kv_heads=3"):
        advice = re.search(r"choose (\w+) from \[(.*)\]", sentence(lambda: override(preset("full"), [setting])))
        for number in advice[2].split(", "):
            extra = ["n_kv_heads=1"] if advice[1] == "n_heads" else []
            assert override(preset("full"), [f"{advice[1]}={number}", *extra])


def test_a_long_sequence_may_come_with_a_long_context():
    assert override(preset("full"), ["seq_len=1024", "max_seq_len=1024"]).train.seq_len == 1024


def test_configs_are_frozen_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError): ModelConfig().d_model = 5
    assert ModelConfig() == ModelConfig() and hash(ModelConfig()) == hash(ModelConfig())
    assert ModelConfig(**dataclasses.asdict(ModelConfig(d_ff=7))).d_ff == 7


def test_steps_is_at_least_one():
    assert TrainConfig(tokens=1).steps == 1
    assert TrainConfig(tokens=10_000, batch_size=2, grad_accum=5, seq_len=100).steps == 10
