"""Seeds, the filter and the files of instructions: what is promised, on many texts, many stories and damaged files."""
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanomoe.config import preset
from nanomoe.files import UserError
from nanomoe.sft import encode_example, prompt_ids
from nanomoe.stories import THEMES, Story, open_stories
from nanomoe.synth import (MAX_REPETITION, MAX_WORDS, RULES, Seed, article, broken_rules, contains, corpus_writer, count_sentences, frequent_pairs,
                           is_held_out, load_prompt_seeds, make_prompt_seeds, make_seeds, make_sft_data, pairs_of_words, read_rows, read_story,
                           repetition, seed_from, seed_row, write_rows)
from nanomoe.tokenizer import train_tokenizer

SEED = Seed("train-000000", "train", "Lily", "kindness", ("red kite", "tall hill"), ("cold rain",), 2, 5, 0)
GOOD = "Lily took the red kite.\nShe ran up the tall hill. It was a fine day!"

words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join)
anything = st.text(max_size=200) | st.lists(st.sampled_from(["Lily", "red kite", ".", "!?", "…", '"', " ", "\n", "Mr.", "3.5", "é", "’", "\u2028", "\x00"])).map("".join)
seeds = st.builds(Seed, st.just("x"), st.just("train"), words, st.sampled_from(THEMES), st.lists(phrases, max_size=4).map(tuple),
                  st.lists(phrases, max_size=2).map(tuple), st.integers(1, 10), st.integers(1, 20), st.just(0))


# Words, not substrings

@given(st.lists(words, min_size=1, max_size=30), st.data())
def test_a_phrase_that_stands_in_a_text_is_found_whatever_surrounds_it(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    phrase = " ".join(text[start:start + data.draw(st.integers(1, 3))])
    between = data.draw(st.sampled_from([" ", "\n", ", ", " \n ", "\u00a0", "; ", " – "]))
    case = data.draw(st.sampled_from([str.lower, str.upper, str.title]))
    assert contains(case(between.join(text)), phrase) and contains(f'“{between.join(text)}!”', phrase.upper())


@given(st.lists(words, max_size=30), phrases)
def test_contains_agrees_with_comparing_lists_of_words(text, phrase):
    wanted = phrase.split()
    assert contains(" ".join(text), phrase) == any(text[i:i + len(wanted)] == wanted for i in range(len(text)))


@given(words, words)
def test_a_part_of_a_word_is_not_the_word(word, more):
    assert not contains(word + more, word) and not contains(more + word, word)
    assert contains(f"{more} ({word})", word)


@pytest.mark.parametrize("text, phrase, there", [
    ("a useful skill", "kill", False), ("Kill the lights", "kill", True), ("He kills.", "kill", False),
    ("a red\nkite", "red kite", True), ("a red,\n kite", "red kite", True), ("redkite", "red kite", False), ("a red old kite", "red kite", False),
    ("Lily's hat", "Lily", True), ("“Lily!”", "lily", True), ("Lilyana", "Lily", False), ("the café was shut", "caf", False), ("CAFÉ", "café", True),
    ("well-known", "known", True), ("3.5 apples", "3", True), ("a+b", "a+b", True), ("aab", "a+b", False), ("naïve", "na", False), ("", "kite", False)])
def test_what_a_text_contains(text, phrase, there): assert contains(text, phrase) is there


@pytest.mark.parametrize("text, phrase", [("Mother’s hat", "mother's hat"), ("_Lily_ ran.", "Lily")])
def test_typography_does_not_hide_a_phrase(text, phrase): assert contains(text, phrase)


# Sentences

@pytest.mark.parametrize("text, count", [
    ("", 0), ("   \n ", 0), ("Lily ran.", 1), ("Lily ran", 1), ("Lily ran. She fell", 2), ("Lily ran.\nShe fell.", 2),
    ('"Hello!" said Tom.', 1), ('"Hello," said Tom. "Come in."', 2), ('"Why?" asked Mia. "Why not!"', 2), ("What!? No! Yes?!", 3), ("No!!! Stop...", 2),
    ("Mr. Fox met Mrs. Hen. Dr. Owl came.", 2), ("Wait... what?", 1), ("Wait... Then he ran.", 2), ("Wait… what?", 1), ("Wait… Then he ran.", 2),
    ("He had 3.5 apples. 4 were red.", 2), ("“Hello!” said Tom. ‘Hi.’ (She smiled.) Good.", 4), ('He said, "I ran." She did not.', 2),
    ('"Come here. Sit down," she said.', 2), ("She sang. (He did not.)", 2)])
def test_how_many_sentences(text, count): assert count_sentences(text) == count


@pytest.mark.parametrize("text", ["He left. Éva came.", "It was late. Ödön slept.", "Он ушёл. Она пришла."])
def test_sentences_begin_with_any_capital(text): assert count_sentences(text) == 2


@pytest.mark.parametrize("text, count", [
    ('"Stop!" Tom shouted.', 1), ('"Wow!" Lily exclaimed.', 1), ("“Wow!” the old owl yelled.", 1), ('"Wait..." Tom said.', 1), ("'Stop!' Tom shouted.", 1), ("‘Why?’ Mia asked.", 1),
    ('"Wait..." Tom ran.', 2), ('He said, "I ran." Tom said no.', 2), ('"Go." Tom said so.', 2), ('"Stop!" Tom ran.', 2), ('"Hi!" Tom laughed, and ran.', 2)])
def test_speech_before_a_name_is_one_sentence(text, count): assert count_sentences(text) == count


sentences = st.lists(words, min_size=1, max_size=6).flatmap(lambda ws: st.sampled_from(
    [".", "!", "?", "!?", "...", "…"]).map(lambda end: " ".join(ws).capitalize() + end)) | st.sampled_from(
    ['"Come in," said Mr. Fox.', "It took 3.5 days.", '“Why?” asked the hen.', "(He smiled.)", 'He said, "Wait... now!"', "Mrs. Hen met Dr. Owl!?"])


@given(st.lists(sentences, max_size=8), sentences, st.sampled_from([" ", "\n", "  ", "\n\n"]))
def test_adding_a_sentence_adds_one(text, one, between):
    assert count_sentences(between.join([*text, one])) == count_sentences(between.join(text)) + 1 == len(text) + 1


@given(anything)
def test_counting_never_fails_and_white_space_around_changes_nothing(text):
    assert count_sentences(text) == count_sentences(f" \n{text}\n ") >= bool(text.strip())


# Repetition

@given(st.lists(words, max_size=40))
def test_repetition_is_a_share(text):
    assert 0 <= repetition(" ".join(text)) < 1
    if len(set(text)) == len(text): assert repetition(" ".join(text)) == 0


def test_repetition_by_hand():
    assert repetition("a b c d e") == 0 == repetition("a b c")
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)        # five runs, the last is the first again
    assert repetition("One, two, three, four! ONE two three four.") == pytest.approx(1 / 5)


# The rules

@given(anything, seeds)
@example("\ud800", SEED)
@example("." * 3000 + "a", SEED)
def test_the_filter_takes_any_text_and_lists_rules_in_their_order(text, seed):
    broken = broken_rules(text, seed)
    assert broken == [rule for rule in RULES if rule in broken] and len(set(broken)) == len(broken)


@pytest.mark.parametrize("text, broken", [
    (GOOD, []), (GOOD.replace("Lily", "LILY"), []), (GOOD.replace("red kite", "red\nkite"), []), (GOOD + '"', []), (GOOD[:-1] + "…”  \n", []),
    (GOOD.replace("Lily", "Lilyana"), ["missing_protagonist"]), (GOOD.replace("tall hill", "tall hills"), ["missing_required"]),
    (GOOD + " Then cold\nrain fell.", ["contains_banned"]), (GOOD + " Then cold raindrops fell.", []),
    (GOOD[:-1], ["unfinished"]), (GOOD + " And then,", ["unfinished"]), (GOOD.replace("\n", " ").replace(". ", ", ").replace("!", "."), ["wrong_sentence_count"]),
    (GOOD + " One. Two. Three.", ["wrong_sentence_count"]), (GOOD + " so it went" * 6 + ".", ["repeats_itself"]),
    ("", ["empty", "wrong_sentence_count", "missing_required", "missing_protagonist", "unfinished"]),
    (GOOD + " It was" + "".join(f" w{i}" for i in range(MAX_WORDS)) + ".", ["too_long"])])
def test_each_rule(text, broken):
    assert broken_rules(text, SEED) == broken


def test_the_limits_are_inclusive():
    exact = GOOD + " " + " ".join(f"w{i}" for i in range(MAX_WORDS - len(re.findall(r"\w+", GOOD)))) + "."
    assert broken_rules(exact, SEED) == [] and broken_rules(exact[:-1] + " more.", SEED) == ["too_long"]
    assert broken_rules(GOOD, replace(SEED, min_sentences=3, max_sentences=3)) == []
    assert broken_rules(GOOD, replace(SEED, min_sentences=4)) == broken_rules(GOOD, replace(SEED, max_sentences=2)) == ["wrong_sentence_count"]
    assert 0 < MAX_REPETITION < 0.5


@given(st.lists(sentences, min_size=1, max_size=6), words)
def test_a_story_asked_for_what_it_has_breaks_nothing(text, name):
    story = " ".join([f"{name.capitalize()} ran.", *text])
    seed = replace(SEED, protagonist=name.capitalize(), required=(f"{name} ran",), banned=("qq zz",), min_sentences=len(text) + 1, max_sentences=len(text) + 1)
    assert set(broken_rules(story, seed)) <= {"repeats_itself"}


# Instructions

def test_an_instruction_says_everything():
    assert SEED.instruction == "Theme: kindness. Length: 2 to 5 sentences. Use: red kite, tall hill. Avoid: cold rain. Tell a story about Lily."
    thing = replace(SEED, protagonist="old teapot", banned=())
    assert thing.instruction.endswith("Tell a story about an old teapot.") and "Avoid" not in thing.instruction


@pytest.mark.parametrize("words, expected", [("old owl", "an"), ("brave fox", "a"), ("unicorn", "a"), ("umbrella", "an"), ("honest bear", "an"), ("one-eyed cat", "a"),
                                             ("useful pot", "a"), ("eager ant", "an"), ("Orange cup", "an"), ("hopeful mug", "a")])
def test_articles(words, expected): assert article(words) == expected


def test_articles_of_words_in_un(): assert article("uninvited guest") == "an"


# Seeds

COUNTS = {"train": 4_000, "val": 1_200}


@lru_cache
def told(split): return list(open_stories("storybook", split, COUNTS[split], 0))

def open_split(split): return iter(told(split))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "2,000 training seeds of the storybook, 200 for validation, and their home."
    home = tmp_path_factory.mktemp("seeds")
    return home, make_prompt_seeds(home, open_split, 2_000, 200, seed=0)


def of(made, split): return [seed for seed in made if seed.split == split]


def test_seeds_are_what_was_asked_for(many):
    _, made = many
    assert Counter(seed.split for seed in made) == {"train": 2_000, "val_seen": 100, "val": 100}
    assert len({seed.id for seed in made}) == len(made)
    assert {seed.theme for seed in made} == set(THEMES)
    for seed in made:
        assert 2 <= len(seed.required) <= 4 and len(set(seed.required)) == len(seed.required) and len(seed.banned) <= 2
        assert 1 <= seed.min_sentences <= seed.max_sentences <= seed.min_sentences + 4 and not set(seed.required) & set(seed.banned)
    assert {len(seed.required) for seed in made} == {2, 3, 4} and {len(seed.banned) for seed in made} == {0, 1, 2}


def test_seeds_have_many_protagonists(many):
    counts = Counter(seed.protagonist for seed in of(many[1], "train"))
    assert max(counts.values()) <= 5 and len(counts) >= 500


def test_heroes_with_a_name_are_spread_evenly(many):
    "SFT takes the first seeds and DPO the last ones, and both must have all kinds of heroes."
    named = [seed.protagonist[0].isupper() for seed in of(many[1], "train")]
    parts = [sum(named[start:start + 400]) / 400 for start in range(0, 2_000, 400)]
    assert max(parts) - min(parts) < 0.15 and min(parts) > 0.2, parts


def test_validation_asks_for_what_training_never_does(many):
    train, seen, unseen = (of(many[1], split) for split in ("train", "val_seen", "val"))
    def heroes(some): return {seed.protagonist for seed in some}
    def asked(some): return {phrase for seed in some for phrase in seed.required + seed.banned}
    assert not heroes(train) & heroes(unseen) and not asked(train) & asked(unseen)
    assert not {name.split()[-1] for name in heroes(train)} & {name.split()[-1] for name in heroes(unseen)}
    assert not heroes(seen) & heroes(unseen) and not asked(seen) & asked(unseen)
    assert not any(is_held_out(seed.protagonist, 0.2) for seed in seen) and all(is_held_out(seed.protagonist, 0.2) for seed in unseen)
    assert len(heroes(unseen)) >= 30


def test_seen_protagonists_have_been_seen(many):
    known = {seed.protagonist for seed in of(many[1], "train")}
    assert all(seed.protagonist in known for seed in of(many[1], "val_seen"))


def test_seeds_depend_on_the_seed_alone(many, tmp_path):
    home, made = many
    again = make_prompt_seeds(tmp_path / "again", open_split, 60, 20, seed=0)
    assert again != make_prompt_seeds(tmp_path / "other", open_split, 60, 20, seed=1)
    code = ("from nanomoe.stories import open_stories; from nanomoe.synth import make_prompt_seeds; import sys\n"
            f"make_prompt_seeds(sys.argv[1], lambda split: open_stories('storybook', split, {COUNTS}[split], 0), 60, 20, seed=0)")
    for number in "12":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / number)], check=True, env={**os.environ, "PYTHONHASHSEED": number})
    files = {(tmp_path / name / "data" / "synthetic" / "prompt_seeds.jsonl").read_bytes() for name in ("again", "1", "2")}
    assert len(files) == 1


def test_seeds_survive_their_file(many):
    home, made = many
    assert load_prompt_seeds(home) == made
    rows = read_rows(home / "data" / "synthetic" / "prompt_seeds.jsonl", "instruction")
    assert [row["instruction"] for row in rows] == [seed.instruction for seed in made]


@given(seeds, st.text(max_size=20))
def test_rows_survive_json(seed, text):
    seed = replace(seed, protagonist=text or "x", required=(text, "b"))
    assert seed_from(json.loads(json.dumps(seed_row(seed)))) == seed
    for change in ({"id": 1}, {"required": []}):
        with pytest.raises(UserError, match="wrong kind"): seed_from({**json.loads(json.dumps(seed_row(seed))), **change})


@pytest.mark.parametrize("name", ["smoke", "laptop", "full"])
def test_prompts_and_stories_are_short(many, name):
    "In words, and in the tokens of every preset: all fit into its context, and an instruction leaves room for any answer."
    model, pairs = preset(name).model, list(corpus_writer(open_split)(many[1][:500]))
    tok = train_tokenizer((story.text for story in open_split("train")), model.vocab_size)
    for seed, text in pairs:
        assert len(re.findall(r"\w+", text)) <= MAX_WORDS and len(seed.instruction.split()) <= 60
        assert len(prompt_ids(tok, seed.instruction)) <= 100 and len(encode_example(tok, seed.instruction, text)[0]) <= model.max_seq_len


def test_too_few_stories_are_said_in_one_sentence(tmp_path):
    def nothing(split): return iter([Story("A cat sat.")])
    with pytest.raises(UserError, match="No story is fit for a train instruction"): make_prompt_seeds(tmp_path, nothing, 5, 5)
    assert not (tmp_path / "data").exists()


def test_no_stories_are_said_in_one_sentence(tmp_path):
    with pytest.raises(UserError): make_prompt_seeds(tmp_path, lambda split: iter(()), 5, 5)


# What a corpus without metadata says

def test_a_story_is_read():
    text = ("Once there was a girl. One day Mia and her dog Rex went to the big park. Mia had a red ball. Then Mia threw the red ball, and Rex was a good friend. "
            "They were friends for ever. Mom smiled at Mia.")
    story = read_story(Story(text), frozenset(["red ball", "big park", "blue sky"]))
    assert (story.protagonist, story.theme, set(story.phrases)) == ("Mia", "friendship", {"red ball", "big park"}) and story.text == text
    assert read_story(Story("There was a little mouse. It was afraid.")).protagonist == "little mouse"
    assert read_story(Story("It rained.")).protagonist is None and read_story(Story("It rained.")).theme is None
    told = Story("Mia ran.", "Mia", "courage", ("a b",))
    assert read_story(told) is told


def test_phrases_come_from_the_text():
    assert pairs_of_words("the red ball was in the big green park") == ["red ball", "big green", "green park"]
    assert frequent_pairs(["a red ball"] * 5 + ["a blue kite"] * 4) == {"red ball"}


@given(st.text(max_size=300))
def test_any_text_is_read(text):
    story = read_story(Story(text), frozenset(pairs_of_words(text)))
    assert all(contains(text, phrase) for phrase in story.phrases)
    assert story.protagonist is None or contains(text, story.protagonist)


def test_the_protagonist_is_no_phrase():
    text = "Once there was a little bear. The little bear was kind. He had a red ball."
    story = read_story(Story(text), frozenset(["little bear", "red ball"]))
    assert story.protagonist == "little bear" and story.phrases == ("red ball",)


# Writers, and what the filter keeps of them

def rows_of(home, name): return read_rows(home / "data" / "synthetic" / f"{name}.jsonl") if name != "rejects" else [
    json.loads(line) for line in (home / "data" / "synthetic" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_all_comply(home):
    for split in ("train", "val"):
        rows = rows_of(home, f"sft_{split}")
        assert rows and all(broken_rules(row["response"], seed_from(row)) == [] for row in rows)
        assert all((row["split"] == "train") == (split == "train") and row["instruction"] == seed_from(row).instruction for row in rows)


def test_every_row_of_the_storybook_complies(many):
    home, made = many
    some = of(made, "train")[:400] + of(made, "val_seen") + of(made, "val")
    assert make_sft_data(home, corpus_writer(open_split), some) == {"accepted": 600}
    assert_all_comply(home)
    assert len(rows_of(home, "sft_train")) == 400 and len(rows_of(home, "sft_val")) == 200 and rows_of(home, "rejects") == []


def test_a_story_that_is_not_there_is_counted(many, tmp_path):
    some = of(many[1], "train")[:5] + of(many[1], "val")[:5]
    lost = [replace(some[0], story=-3), replace(some[1], story=99_999_999)]
    assert make_sft_data(tmp_path, corpus_writer(open_split), lost + some[2:]) == {"accepted": 8, "no_such_story": 2}
    assert [row["broken"] for row in rows_of(tmp_path, "rejects")] == [["no_such_story"]] * 2


def test_every_row_of_a_corpus_without_metadata_complies(root, tmp_path):
    corpus = root.parent / "shared" / "tinystories"
    if not corpus.is_dir(): pytest.skip("no local corpus beside the repository")
    def read(split): return islice(open_stories(corpus, split), 3_000)
    made = make_prompt_seeds(tmp_path, read, 300, 60, seed=0)
    counts = make_sft_data(tmp_path, corpus_writer(read), made)
    assert counts["accepted"] == sum(counts.values()) == len(made) >= 150
    assert_all_comply(tmp_path)
    train, val = of(made, "train"), of(made, "val")
    assert not {seed.protagonist for seed in train} & {seed.protagonist for seed in val}
    assert not {phrase for seed in train for phrase in seed.required} & {phrase for seed in val for phrase in seed.required}


def careless(seeds):
    "A writer that breaks rules at random, and knows which."
    rng = random.Random(0)
    for seed in seeds:
        story = f"{seed.protagonist} had {' and '.join(seed.required)}." + " So it was." * (seed.min_sentences - 1)
        fault = rng.choice([None, "missing_required", "missing_protagonist", "unfinished", "empty", "wrong_sentence_count", "contains_banned"])
        yield seed, {None: story, "missing_required": story.replace(seed.required[0], "nothing"), "missing_protagonist": story.replace(seed.protagonist, "Nobody"),
                     "unfinished": story[:-1], "empty": " \n", "wrong_sentence_count": story + " No." * 30, "contains_banned": story[:-1] + " " + " ".join(seed.banned) + "."}[fault]


def test_a_careless_writer_is_sorted_out(tmp_path):
    made = [replace(SEED, id=f"{split}-{i}", split=split, min_sentences=2 + i % 3, max_sentences=6) for split in ("train", "val", "val_seen") for i in range(60)]
    counts = make_sft_data(tmp_path, careless, made)
    assert_all_comply(tmp_path)
    rejects, kept = rows_of(tmp_path, "rejects"), rows_of(tmp_path, "sft_train") + rows_of(tmp_path, "sft_val")
    assert len(rejects) + len(kept) == 180 and counts["accepted"] == len(kept) and {row["id"] for row in rejects + kept} == {seed.id for seed in made}
    assert all(row["broken"] == broken_rules(row["response"], seed_from(row)) != [] for row in rejects)
    assert Counter(rule for row in rejects for rule in row["broken"]) == {rule: n for rule, n in counts.items() if rule != "accepted"}
    assert set(RULES) - {"too_long", "repeats_itself"} <= set(counts)


def test_a_writer_that_fails_altogether_is_one_sentence_and_keeps_the_old_files(tmp_path):
    made = [replace(SEED, id=split, split=split) for split in ("train", "val")]
    make_sft_data(tmp_path, lambda seeds: ((seed, GOOD) for seed in seeds), made)
    folder = tmp_path / "data" / "synthetic"
    before = {path.name: path.read_bytes() for path in folder.glob("sft_*")}
    with pytest.raises(UserError, match="No answer for train kept the rules"): make_sft_data(tmp_path, lambda seeds: ((seed, "No") for seed in seeds), made)
    assert before == {path.name: path.read_bytes() for path in folder.glob("sft_*")}


def test_a_writer_that_fails_for_validation_keeps_the_old_files(tmp_path):
    made = [replace(SEED, id=split, split=split) for split in ("train", "val")]
    make_sft_data(tmp_path, lambda seeds: ((seed, GOOD) for seed in seeds), made)
    before = (tmp_path / "data" / "synthetic" / "sft_train.jsonl").read_bytes()
    with pytest.raises(UserError): make_sft_data(tmp_path, lambda seeds: ((seed, GOOD.replace("fine", "new") if seed.split == "train" else "") for seed in seeds), made)
    assert before == (tmp_path / "data" / "synthetic" / "sft_train.jsonl").read_bytes()


@given(st.lists(seeds, max_size=20))
def test_make_seeds_only_gives_what_its_story_keeps(some):
    "Whatever the stories are: an instruction is never made that its own story does not keep."
    stories = [Story(f"{seed.protagonist} saw {', '.join(seed.required)}. So it was.", seed.protagonist, seed.theme, seed.required) for seed in some]
    for split in ("train", "val"):
        for made, text in make_seeds(stories, split, 10): assert broken_rules(text, made) == [] and text == stories[made.story].text


# Files

LINES = [{"id": f"n{i}", "split": "train", "text": f"Zoë said “{i}”\u2028\x85."} for i in range(5)]


def written(tmp_path, lines=None):
    path = tmp_path / "rows.jsonl"
    write_rows(path, LINES)
    if lines is not None: path.write_bytes(b"\n".join(lines(path.read_bytes().split(b"\n"))))
    return path


def test_rows_survive_their_file(tmp_path):
    path = written(tmp_path)
    assert read_rows(path, "id", "split") == LINES and path.read_bytes().count(b"\n") == 5


DAMAGE = {
    "truncated": (lambda lines: [*lines[:4], lines[4][:-9]], "line 5, is not a JSON object"),
    "truncated in the middle": (lambda lines: [lines[0], lines[1][:10], *lines[2:]], "line 2, is not a JSON object"),
    "duplicated": (lambda lines: [*lines[:4], lines[1], *lines[4:]], "line 5, has the id of line 2"),
    "foreign": (lambda lines: [*lines[:2], b'{"prompt": "x"}', *lines[2:]], "line 3, has no id, split: it was not made by Nano-MoE"),
    "a number": (lambda lines: [b"5", *lines], "line 1, is not a JSON object"),
    "half a character": (lambda lines: [lines[0].replace(b"Zo", b"Zo\\ud800"), *lines[1:]], "line 1, is not a JSON object"),
    "a list": (lambda lines: [b"[1, 2]", *lines], "line 1, is not a JSON object"),
    "wrong UTF-8": (lambda lines: [*lines[:3], lines[3].replace(b"Zo", b"\xff"), *lines[4:]], "line 4, is not a JSON object"),
    "UTF-16": (lambda lines: [lines[0].decode().encode("utf-16"), *lines[1:]], "line 1, is not a JSON object"),
    "two on a line": (lambda lines: [lines[0] + lines[1], *lines[2:]], "line 1, is not a JSON object"),
    "an empty line": (lambda lines: [lines[0], b"", *lines[1:]], "line 2, is not a JSON object"),
    "plain text": (lambda lines: [*lines[:1], b"Once upon a time", *lines[1:]], "line 2, is not a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_by_line_and_nothing_is_changed(tmp_path, damage):
    change, sentence = DAMAGE[damage]
    path = written(tmp_path, change)
    before = path.read_bytes()
    with pytest.raises(UserError, match=re.escape(sentence)): read_rows(path, "id", "split")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", [b'{"id": [1], "split": "train"}', b"[" * 200_000])
def test_odd_lines_are_reported_too(tmp_path, line):
    with pytest.raises(UserError, match="line 6"): read_rows(written(tmp_path, lambda lines: [*lines[:5], line]), "id", "split")


@pytest.mark.parametrize("value", [5, None, ["a story"], {"text": "a story"}])
def test_a_text_that_is_none_is_reported(tmp_path, value):
    write_rows(tmp_path / "rows.jsonl", [{"id": "a", "response": "Once."}, {"id": "b", "response": value}])
    with pytest.raises(UserError, match="line 2, has something else than text in response"): read_rows(tmp_path / "rows.jsonl", "id", "response")


@pytest.mark.parametrize("key, value", [("required", None), ("banned", 5), ("required", "red kite"), ("min_sentences", "two")])
def test_foreign_values_are_reported_too(tmp_path, key, value):
    write_rows(tmp_path / "data" / "synthetic" / "prompt_seeds.jsonl", [{**seed_row(SEED), key: value}])
    with pytest.raises(UserError): broken_rules(GOOD, load_prompt_seeds(tmp_path)[0])


@pytest.mark.parametrize("name, command", [("prompt_seeds", "make-prompt-seeds"), ("sft_train", "make-sft-data"), ("dpo_val", "make-dpo-data")])
def test_a_missing_file_names_the_command_that_makes_it(tmp_path, name, command):
    with pytest.raises(UserError, match=f"nanomoe {command}"): read_rows(tmp_path / f"{name}.jsonl")


def test_half_a_character_is_written_or_rejected(tmp_path):
    made = [replace(SEED, id=split, split=split) for split in ("train", "val")]
    make_sft_data(tmp_path, lambda seeds: ((seed, GOOD.replace("fine", "fine \ud83d")) for seed in seeds), made)
