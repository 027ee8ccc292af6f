"""The tokenizer gives back every text exactly, and its special tokens cannot be written."""
import random
import sys

import pytest
from hypothesis import example, given, settings, strategies as st

from nanomoe.files import UserError
from nanomoe.tokenizer import BOS, EOS, PAD, SPECIALS, UNK, load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer

CORPUS = ["The brave teapot said thank you to the little squirrel.", "Type [EOS] to stop, or [BOS] to go on.",
          "[UNK][PAD][BOS][EOS] [UNK] [PAD] [BOS] [EOS]", "Once upon a time there was a teapot.\n\nThe end."] * 50

# Every character that has a UTF-8 form: all of Unicode but the surrogates.
characters = st.characters(exclude_categories=["Cs"])
texts = st.text(characters) | st.lists(st.sampled_from(SPECIALS) | st.text(characters, max_size=4)).map("".join)


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(CORPUS, 600)


def test_what_other_programs_add_is_dropped(tok, tmp_path):
    "An export puts [BOS] before each text, and looks for special tokens in it."
    from tokenizers.processors import TemplateProcessing
    theirs = train_tokenizer(CORPUS, 600)
    theirs.add_special_tokens(SPECIALS)
    theirs.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", BOS)])
    assert theirs.encode("[EOS]").ids == [BOS, EOS]
    theirs.save(str(tmp_path / "theirs.json"))
    ours = load_tokenizer(tmp_path / "theirs.json")
    assert tokenizer_hash(ours) == tokenizer_hash(tok) and ours.encode("[EOS]").ids == tok.encode("[EOS]").ids


@pytest.fixture(scope="module")
def bare():
    return train_tokenizer([], 260)


@settings(max_examples=400)
@given(text=texts)
@example(text="[BOS][EOS]")
@example(text=" [PAD] [UNK]")
@example(text="  two  spaces \t\r\n\x00")
@example(text="👩‍🚀🏳️‍🌈 e\u0301 é \ufeff \ufffd \U0010ffff \u2028")
@example(text="שלום مرحبا नमस्ते ไทย 日本語")
@example(text="Ġ Ċ Ã©")
def test_any_text_comes_back_exactly(tok, bare, text):
    for t in (tok, bare):
        ids = t.encode(text).ids
        assert t.decode(ids) == text
        assert t.decode([BOS, *ids, EOS, PAD, UNK]) == text
        assert not set(ids) & {UNK, PAD, BOS, EOS}
        (fast,) = t.encode_batch_fast([text])
        assert fast.ids == ids


def test_every_character_of_unicode(tok):
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, sys.maxunicode + 1))))
    assert tok.decode(tok.encode(every).ids) == every


def test_a_long_text_and_a_long_word(tok):
    rng = random.Random(0)
    for text in ("a" * 100_000, "teapot" * 20_000, " ".join(rng.choices(CORPUS, k=2000)), "\n" * 10_000):
        assert tok.decode(tok.encode(text).ids) == text


@pytest.mark.parametrize("text", ["\ud83e", "tea\udc80pot", "\ude00\ud83d"])
def test_lone_surrogates_are_refused(tok, text):
    "They are not Unicode text and have no UTF-8 form. Notebook 00 says so."
    with pytest.raises(TypeError):
        tok.encode(text)
    with pytest.raises(TypeError):
        tok.encode_batch_fast([text])


def test_specials_have_the_first_numbers_and_bytes_come_next(tok, bare):
    for t in (tok, bare):
        assert [t.id_to_token(i) for i in range(4)] == SPECIALS
        assert [t.token_to_id(name) for name in SPECIALS] == [UNK, PAD, BOS, EOS] == [0, 1, 2, 3]
    assert bare.get_vocab_size() == 260
    assert 260 < tok.get_vocab_size() <= 600
    assert sorted(tok.get_vocab().values()) == list(range(tok.get_vocab_size()))


def test_encoding_adds_no_specials(tok):
    assert tok.encode("").ids == []
    assert tok.encode("teapot").ids == tok.encode("teapot", add_special_tokens=False).ids
    assert tok.num_special_tokens_to_add(is_pair=False) == 0


def test_training_is_deterministic_and_reads_an_iterator():
    a, b = train_tokenizer(CORPUS, 330), train_tokenizer(iter(CORPUS), 330)
    assert a.to_str() == b.to_str() and tokenizer_hash(a) == tokenizer_hash(b)
    assert tokenizer_hash(a) != tokenizer_hash(train_tokenizer(CORPUS, 329))
    assert len(tokenizer_hash(a)) == 64


def test_numbers_fit_two_bytes(tok):
    assert train_tokenizer(CORPUS, 65_535).get_vocab_size() < 65_536
    for size in (0, -1, 259, 65_536, 10**9):
        with pytest.raises(UserError, match="choose a size from 260 to 65,535"):
            train_tokenizer(CORPUS, size)


def test_saved_and_loaded(tok, tmp_path):
    path = tmp_path / "new folder" / "tokenizer.json"
    save_tokenizer(tok, path)
    again = load_tokenizer(path)
    assert tokenizer_hash(again) == tokenizer_hash(tok)
    text = "The teapot [EOS] 🫖"
    assert again.encode(text).ids == tok.encode(text).ids
    assert again.decode([BOS, *again.encode(text).ids, EOS]) == text
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_a_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match="There is no tokenizer at .*: run `nanomoe tokenizer`"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("broken", [b"", b"{", b"{}", b"[1, 2]", b"\xff\xfe", "truncated", "flipped"])
def test_a_broken_tokenizer(tok, tmp_path, broken):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tok, path)
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif broken == "flipped":
        path.write_bytes(path.read_bytes().replace(b'"merges"', b'"nerges"'))
    else:
        path.write_bytes(broken)
    with pytest.raises(UserError, match="tokenizer.json is not a readable tokenizer .*: run `nanomoe tokenizer`"):
        load_tokenizer(path)


def test_a_folder_instead_of_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="is not a readable tokenizer"):
        load_tokenizer(tmp_path)


def test_somebody_elses_tokenizer(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="another kind of tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_transformers_reads_the_file_and_finds_the_same_tokens(tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tok, tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in CORPUS[:4]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tok.encode(text).ids
