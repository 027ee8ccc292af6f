"""Where stories come from: files, folders, the hub and the storybook, and what is said when they do not come."""
import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomoe.files import UserError
from nanomoe.stories import Story, open_stories

ROOT = Path(__file__).resolve().parents[1]
TINYSTORIES = ROOT.parent / "shared" / "tinystories"
END = "<|endoftext|>"


def texts(source, split="train", **options):
    return [story.text for story in open_stories(source, split, **options)]


def both(source):
    "All stories of a source without a split of its own, in their order."
    train, val = texts(source), texts(source, "val")
    return [val.pop(0) if i % 50 == 0 else train.pop(0) for i in range(len(train) + len(val))]


def write(path, stories):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": stories}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": s}) + "\n" for s in stories), encoding="utf-8")
    else:
        path.write_text(f"\n{END}\n".join(stories), encoding="utf-8")
    return path


def refusal(*args, **options):
    "The one sentence in which a source is refused."
    with pytest.raises(UserError) as caught:
        list(open_stories(*args, **options))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 500, message
    return message


# --- files

STORIES = ["Once there was a hen.\nShe had a red hat.\n\nThe end.", "  ", "Ünï saw a 🐢.", 'Mum said, "Hello."', "Bye."]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt", ".PARQUET", ".TXT"])
def test_every_format_tells_the_same_stories(tmp_path, suffix):
    path = write(tmp_path / "a.txt", STORIES) if suffix == ".TXT" else write(tmp_path / f"a{suffix.lower()}", STORIES)
    path = path.rename(path.with_suffix(suffix))
    assert both(path) == [s for s in STORIES if s.strip()]
    assert all(isinstance(story, Story) for story in open_stories(path))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=2, max_size=8))
@settings(max_examples=30)
def test_any_text_comes_through_jsonl_and_parquet(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("any")
    for suffix in (".jsonl", ".parquet"):
        assert both(write(folder / f"a{suffix}", stories)) == [s.strip() for s in stories]


@pytest.mark.parametrize("raw", [
    "One.\nTwo.\n<|endoftext|>\nThree.\n<|endoftext|>\n",
    "One.\r\nTwo.\r\n<|endoftext|>\r\nThree.",
    "\ufeffOne.\nTwo.<|endoftext|>Three.<|endoftext|><|endoftext|>",
    "<|endoftext|>\n\nOne.\nTwo.\n\n<|endoftext|> <|endoftext|>\nThree.\n\n",
])
def test_a_text_file_is_cut_at_the_sign_alone(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw.encode())
    assert both(tmp_path / "a.txt") == ["One.\nTwo.", "Three."]


def test_a_text_file_without_signs_is_one_story_unless_it_is_absurdly_long(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("A line.\n\nAnother.\n")
    assert texts(path, "val") == ["A line.\n\nAnother."]
    path.write_text("This book has no signs in it.\n" * 40_000)
    assert END in refusal(path, "val") and "a.txt" in refusal(path, "val")


@pytest.mark.parametrize("name", ["odd [1] #x/a [b]*?.txt", "with space.jsonl", "名前.parquet", "%41.txt"])
def test_odd_names_are_names_and_not_patterns(tmp_path, name):
    write(tmp_path / "odd 1 #x" / "a b.txt", ["another file"])
    assert both(write(tmp_path / name, ["One.", "Two."])) == ["One.", "Two."]


def test_paths_may_be_relative_or_start_at_home(tmp_path, monkeypatch):
    write(tmp_path / "sub" / "a.txt", ["One.", "Two."])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("sub/a.txt") == texts("sub") == texts("~/sub") == texts(Path("sub")) == ["Two."]


def test_a_path_object_is_a_path_even_if_it_is_called_storybook(tmp_path, monkeypatch):
    write(tmp_path / "storybook" / "a.txt", ["One.", "Two."])
    monkeypatch.chdir(tmp_path)
    assert texts(Path("storybook")) == texts("./storybook") == ["Two."]
    assert next(open_stories("storybook")).theme


def test_limit_counts_the_stories_of_the_split(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"Story {i}." for i in range(200)])
    assert texts(path, limit=3) == ["Story 1.", "Story 2.", "Story 3."]
    assert texts(path, "val", limit=3) == ["Story 0.", "Story 50.", "Story 100."]


def test_other_columns_and_missing_values_do_no_harm(tmp_path):
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["One.", None, "Two."]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "One.", "n": 1}\n\n{"text": null}\n{"n": "two", "text": "Two."}\n')
    assert both(tmp_path / "a.parquet") == both(tmp_path / "b.jsonl") == ["One.", "Two."]


# --- folders

@pytest.mark.parametrize("train,val", [
    ("train.parquet", "validation.parquet"), ("train.txt", "val.txt"), ("train.jsonl", "valid.txt"), ("train.txt", "test.txt"),
    ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"), ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
    ("tales_train.txt", "tales-dev.jsonl"), ("stories.txt", "valid.txt"), ("train/1.txt", "validation/1.txt"), ("Train.txt", "VAL.txt"),
])
def test_a_folder_with_a_split_of_its_own_keeps_it(tmp_path, train, val):
    write(tmp_path / train, [f"Train {i}." for i in range(60)])
    write(tmp_path / val, ["Val 0.", "Val 1."])
    write(tmp_path / ".hidden" / "train.txt", ["Hidden."])
    (tmp_path / "README.md").write_text("Not a story.")
    assert texts(tmp_path) == [f"Train {i}." for i in range(60)]
    assert texts(tmp_path, "val") == ["Val 0.", "Val 1."]


def test_validation_files_are_preferred_to_test_files(tmp_path):
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.txt", [f"{name} {i}" for i in range(3)])
    assert texts(tmp_path, "val") == [f"validation {i}" for i in range(3)]
    assert texts(tmp_path) == [f"train {i}" for i in range(3)]


def test_a_folder_without_a_split_is_one_corpus_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.jsonl", [f"Story {i}." for i in range(70, 120)])
    write(tmp_path / "a.txt", [f"Story {i}." for i in range(70)])
    assert both(tmp_path) == [f"Story {i}." for i in range(120)]
    assert texts(tmp_path, "val") == ["Story 0.", "Story 50.", "Story 100."]


@pytest.mark.skipif(not TINYSTORIES.exists(), reason="the slice of TinyStories stands beside the repository, and is not here")
def test_real_stories():
    for split, name in (("train", "train"), ("val", "validation")):
        stories = pq.read_table(TINYSTORIES / f"{name}.parquet")["text"].to_pylist()
        assert texts(TINYSTORIES, split) == [s.strip() for s in stories]


# --- refusals

def test_an_unknown_source_names_the_ones_there_are(tmp_path):
    message = refusal("tinystory")
    assert all(word in message for word in ("'tinystory'", "storybook", "tinystories", ".parquet", ".jsonl", ".txt"))
    assert "split" in refusal("storybook", "validation")
    assert ".txt" in refusal(tmp_path) and str(tmp_path) in refusal(tmp_path)
    (tmp_path / "a.csv").write_text("text\nHello")
    assert ".csv" in refusal(tmp_path / "a.csv") and ".jsonl" in refusal(tmp_path / "a.csv")


def test_no_text_column_lists_the_columns(tmp_path):
    pq.write_table(pa.table({"story": ["a"], "title": ["b"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"story": "a", "title": "b"}\n')
    for name in ("a.parquet", "a.jsonl"):
        message = refusal(tmp_path / name, "val")
        assert name in message and "`text`" in message and "story, title" in message


def test_an_empty_corpus_is_refused(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "c.txt").write_text(f"\n{END}\n\n{END}\n")
    for name in ("a.parquet", "b.jsonl", "c.txt"):
        assert name in refusal(tmp_path / name) and "no stories" in refusal(tmp_path / name, "val")
    assert "no stories" in refusal(tmp_path)
    assert "no stories for train" in refusal(write(tmp_path / "one.txt", ["The only story."]))


GOOD = b'{"text": "Good."}\n'
BROKEN = {
    "empty.parquet": b"", "noise.parquet": b"\x00\x01\x02" * 999, "latin.txt": "Good. Caf\xe9".encode("latin-1"), "bytes.txt": bytes(range(256)),
    "latin.jsonl": GOOD + b'{"text": "Caf\xe9"}\n', "half.jsonl": GOOD + b'{"text": "Goo', "list.jsonl": GOOD + b'["text"]\n',
    "surrogate.jsonl": GOOD + b'{"text": "half a character \\ud800"}\n', "number.jsonl": GOOD + b'{"text": 12}\n', "words.jsonl": b"Once upon a time\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name, capfd):
    (tmp_path / name).write_bytes(BROKEN[name])
    assert name in refusal(tmp_path / name)
    assert capfd.readouterr() == ("", ""), "the libraries have nothing to add"


def test_a_parquet_file_that_lost_its_end_or_a_bit_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [f"Story {i} of {i * 7919}." for i in range(5000)])
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    assert "a.parquet" in refusal(path) and "nothing was written" in refusal(path)
    (tmp_path / "b.parquet").write_bytes(raw[:500] + os.urandom(200) + raw[700:])
    assert "b.parquet" in refusal(tmp_path / "b.parquet")


def test_numbers_are_not_stories(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "a.parquet" in refusal(tmp_path / "a.parquet") and "int" in refusal(tmp_path / "a.parquet")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write(tmp_path / "a.txt", ["One."])
    path.chmod(0)
    assert "a.txt" in refusal(path)


# --- the hub

def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=["no network", "offline mode"])
def test_without_the_hub_both_ways_out_are_named_at_once(env, tmp_path):
    out = run("""
import datasets, huggingface_hub, time
from nanomoe.files import UserError
from nanomoe.stories import open_stories
start = time.perf_counter()
try: list(open_stories("tinystories", limit=1))
except UserError as error: print(f"{time.perf_counter() - start:.1f}", error)
""", HF_HOME=str(tmp_path), **env)
    seconds, message = out.split(" ", 1)
    assert float(seconds) < 10
    assert "--stories storybook" in message and "path" in message and message.count("\n") == 1


def test_the_hub_is_streamed_with_its_own_validation_split(monkeypatch):
    import datasets
    import huggingface_hub
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: ({"text": f" {split} {i}. " if i % 3 else " "} for i in range(3000)))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **options: None)
    assert texts("tinystories", limit=2) == ["train 1.", "train 2."]
    assert len(texts("tinystories", "val")) == 2000
    assert asked == [("roneneldan/TinyStories", "train", True), ("roneneldan/TinyStories", "validation", True)]


# --- the storybook

def test_the_storybook_deals_its_stories_into_two_disjoint_splits():
    train, val = texts("storybook", limit=1000), texts("storybook", "val", limit=200)
    assert (len(train), len(val)) == (1000, 200)
    assert not set(train) & set(val)
    assert train == texts("storybook", limit=1000) != texts("storybook", limit=1000, seed=1)
    other = set(texts("storybook", limit=1000, seed=1))
    assert not other & set(val), "another seed's training stories are no validation stories of this one"
    story = next(open_stories("storybook"))
    assert story.protagonist and story.theme and story.phrases


def test_the_storybook_ends_when_nobody_says_how_many(monkeypatch):
    import nanomoe.stories
    monkeypatch.setattr(nanomoe.stories, "storybook", lambda seed: (Story(f"Story {i}.") for i in range(10**9)))
    assert sum(1 for _ in open_stories("storybook")) == 50_000
    assert sum(1 for _ in open_stories("storybook", "val")) == 1_000


# --- its manners

def test_a_story_comes_before_the_file_has_been_read(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"Story {i}. " + "word " * 200 for i in range(40_000)])
    list(islice(open_stories(path), 1))
    start = time.perf_counter()
    first = list(islice(open_stories(path), 10))
    early = time.perf_counter() - start
    everything = sum(1 for _ in open_stories(path))
    late = time.perf_counter() - start - early
    assert len(first) == 10 and everything == 39_200 and early < late / 3


def test_importing_is_light_and_reading_leaves_nothing_behind(tmp_path):
    write(tmp_path / "a.parquet", ["One.", "Two."])
    out = run(f"""
import sys, nanomoe.stories as s
print(sorted({{'torch', 'datasets', 'pandas', 'pyarrow'}} & set(sys.modules)))
print([story.text for story in s.open_stories({str(tmp_path / 'a.parquet')!r})])
""", HF_HOME=str(tmp_path / "hub"))
    assert out.splitlines() == ["[]", "['Two.']"]
    assert not [p for p in (tmp_path / "hub").rglob("*") if p.is_file()]
