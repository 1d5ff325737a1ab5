"""Summaries of texts of any length: levels, flash, limits, resuming, tracing, forgetting. Real SQLite, scripted LLM."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_os import ConfigError, InvalidInputError, LLMError, Memory, UnknownNameError
from memory_os.adapters.scripted import ScriptedLLM, WordCounter
from memory_os.adapters.tokenizers import counter_for
from memory_os.summarize import DOCUMENT_BLOCK, FLASH, GROUP, MEETING_BLOCK, packed

# A quarter of the words, and which prompt it was: the same for the same prompt, in every process.
GIST = """
import hashlib
def gist(messages):
    text = messages[-1]["content"]
    words = text.split() if " " in text[:400] else list(text)
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return "This section describes " + mark + " " + " ".join(words[: max(8, min(len(words) // 8, 200))])
"""
exec(GIST)


def opened(path, llm=None, **options):
    llm = llm or ScriptedLLM(gist, tokenizer=WordCounter())  # noqa: F821
    return Memory.open(path, llm=llm, embedder="hash", **options)


def story(n, words=120):
    return "\n\n".join(f"Paragraph {i}. " + " ".join(f"word{i}" for _ in range(words)) for i in range(n))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(story(120), encoding="utf-8")
    return path


def shape(summary):
    return [[(s.text, s.metadata["level"], len(s.metadata["of"])) for s in level] for level in summary.levels]


def prompts(llm):
    return [call.messages[-1]["content"] for call in llm.calls]


# levels


def test_levels_end_in_one_summary_and_every_passage_is_reached_once(tmp_path, book):
    llm = ScriptedLLM(gist)  # noqa: F821
    with opened(tmp_path / "m.db", llm) as memory:
        scope = memory.namespace("a")
        summary = scope.summarize(book)
        passages = [s for s in scope.history(10_000) if s.kind == "document"]
        [top] = summary.levels[-1]
        assert summary.complete
        assert summary.text == top.text
        assert len(summary.levels) >= 2
        assert [s.id for s in scope.sources(top.seq)] == [s.id for s in passages]
        leaves = [id_ for block in summary.levels[0] for id_ in block.metadata["of"]]
        assert leaves == [s.id for s in passages]
        for below, level in zip(summary.levels, summary.levels[1:], strict=False):
            assert [id_ for s in level for id_ in s.metadata["of"]] == [s.id for s in below]
    assert summary.calls == len(llm.calls) == sum(map(len, summary.levels))
    assert top.who == "summary of story.txt"
    assert top.offset == (passages[0].offset[0], passages[-1].offset[1])


def test_a_short_text_has_one_summary_and_one_call(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("Rex is a dog. He likes cheese.", encoding="utf-8")
    with opened(tmp_path / "m.db") as memory:
        summary = memory.namespace("a").summarize(path)
    assert [len(level) for level in summary.levels] == [1]
    assert summary.calls == 1


def test_no_prompt_holds_more_than_a_block_or_a_group(tmp_path, book):
    llm = ScriptedLLM(gist)  # noqa: F821
    with opened(tmp_path / "m.db", llm) as memory:
        memory.namespace("a").summarize(book)
    for prompt in prompts(llm):
        section = re.search(r"Section:\n(.*)\n\nSummarise this", prompt, re.DOTALL)
        merged = re.search(r"sections:\n(.*)\n\nMerge them", prompt, re.DOTALL)
        assert llm.count_text((section or merged)[1]) <= (DOCUMENT_BLOCK if section else GROUP)


@given(costs=st.lists(st.integers(1, 50), max_size=40), limit=st.integers(1, 60))
def test_packing_keeps_the_order_and_only_a_long_one_stands_alone(costs, limit):
    runs = packed(costs, lambda cost: cost, limit)
    assert [cost for run in runs for cost in run] == costs
    assert all(sum(run) <= limit or len(run) == 1 for run in runs)
    assert all(a + b[0] > limit for a, b in zip(map(sum, runs), runs[1:], strict=False))


# flash


def test_the_block_before_is_carried_as_it_is_if_it_is_short_and_as_its_summary_if_not(tmp_path, book):
    llm = ScriptedLLM(gist)  # noqa: F821
    with opened(tmp_path / "m.db", llm) as memory:
        summary = memory.namespace("a").summarize(book)
    blocks = [prompt for prompt in prompts(llm) if "Summarise this" in prompt]
    assert "Background" not in blocks[0]
    for prompt, before in zip(blocks[1:], summary.levels[0], strict=False):
        assert prompt.startswith(f"Background, what came before; do not repeat it:\n{before.text}\n\nSection:")
    # blocks of fewer tokens than FLASH: a small window makes them small
    small = ScriptedLLM(gist, context_window=900)  # noqa: F821
    with opened(tmp_path / "n.db", small) as memory:
        memory.namespace("a").summarize(book)
    first, second = [prompt for prompt in prompts(small) if "Summarise this" in prompt][:2]
    text = re.search(r"Section:\n(.*)\n\nSummarise this", first, re.DOTALL)[1]
    assert (text in second) == (small.count_text(text) < min(FLASH, 900 // 5))


def test_a_block_shorter_than_flash_is_carried_verbatim(tmp_path):
    path = tmp_path / "two.txt"
    path.write_text(story(1, 20) + "\n\n" + "long " * 150 + "\n\n" + story(1, 100), encoding="utf-8")
    llm = ScriptedLLM(gist, context_window=900)  # noqa: F821
    with opened(tmp_path / "m.db", llm) as memory:
        memory.namespace("a").summarize(path)
    blocks = [prompt for prompt in prompts(llm) if "Summarise this" in prompt]
    carried = [re.search(r"repeat it:\n(.*?)\n\nSection:", prompt, re.DOTALL) for prompt in blocks[1:]]
    assert all(carried)
    for found, before in zip(carried, blocks, strict=False):
        text = re.search(r"Section:\n(.*)\n\nSummarise this", before, re.DOTALL)[1]
        assert (found[1] == text) == (llm.count_text(text) < 180)


# guards


def test_a_model_whose_summaries_do_not_shrink_is_stopped(tmp_path, book):
    class Endless(ScriptedLLM):
        """Heeds no limit."""

        def generate(self, messages, *, max_tokens, stop=()):
            self.calls.append(messages)
            yield "This section describes " + "more " * 3000

    llm = Endless([])
    with opened(tmp_path / "m.db", llm) as memory:
        summary = memory.namespace("a").summarize(book)
    assert not summary.complete
    assert "hardly shorter than the one below it" in summary.notes[0]
    assert summary.text.count("This section describes") == len(summary.levels[-1])
    assert len(llm.calls) == sum(map(len, summary.levels)) < 50


def test_a_model_that_shortens_by_a_word_a_level_is_stopped_too(tmp_path, book):
    class Slow(ScriptedLLM):
        def generate(self, messages, *, max_tokens, stop=()):
            self.calls.append(messages)
            yield "more " * (1500 - len(self.calls))

    llm = Slow([])
    with opened(tmp_path / "m.db", llm) as memory:
        summary = memory.namespace("a").summarize(book)
    assert not summary.complete
    assert len(summary.levels) == 2


def test_a_passage_longer_than_a_block_is_cut_and_the_result_says_so(tmp_path):
    chat = [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "Short."}]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(chat), encoding="utf-8")
    llm = ScriptedLLM(gist)  # noqa: F821
    with opened(tmp_path / "m.db", llm) as memory:
        summary = memory.namespace("a").summarize(path)
    assert any(f"was cut to {MEETING_BLOCK}" in note for note in summary.notes)


def test_errors_name_the_fix_and_change_nothing(tmp_path, book):
    with Memory.open(tmp_path / "m.db", embedder="hash") as memory, pytest.raises(ConfigError, match="needs an LLM"):
        memory.namespace("a").summarize(book)
    with opened(tmp_path / "m.db", ScriptedLLM(gist, context_window=200)) as memory:  # noqa: F821
        with pytest.raises(ConfigError, match="200 tokens is too small"):
            memory.namespace("a").summarize(book)
        with pytest.raises(InvalidInputError, match="cannot read it"):
            memory.namespace("a").summarize(tmp_path / "nowhere.txt")
        seq = memory.namespace("a").add("no summary").seq
        with pytest.raises(UnknownNameError, match="not a summary"):
            memory.namespace("a").sources(seq)
    with opened(tmp_path / "n.db", ScriptedLLM(lambda messages: "  ")) as memory:
        with pytest.raises(LLMError, match="its summary cannot be kept"):
            memory.namespace("a").summarize(book)
        assert not [s for s in memory.namespace("a").history(10_000) if s.kind == "summary"]


# languages and meetings


def test_a_chinese_text_is_asked_about_in_chinese(tmp_path):
    path = tmp_path / "zh.txt"
    path.write_text("\n\n".join(f"第{i}回。" + "话说天下大势，分久必合，合久必分。" * 20 for i in range(40)), "utf-8")
    llm = ScriptedLLM(lambda m: "本节讲述天下大势。", tokenizer=counter_for("cl100k_base"))
    with opened(tmp_path / "m.db", llm) as memory:
        summary = memory.namespace("a").summarize(path)
    assert summary.complete
    assert len(summary.levels) == 2
    assert all("概括" in prompt for prompt in prompts(llm))
    assert "背景，即前文内容" in prompts(llm)[1]


def test_a_meeting_gets_a_theme_and_its_speakers(tmp_path):
    turns = [{"speaker": f"P{i % 3}", "text": f"Point {i}: " + "budget matters " * 60} for i in range(80)]
    path = tmp_path / "meeting.json"
    path.write_text(json.dumps(turns), encoding="utf-8")
    llm = ScriptedLLM(lambda m: "The yearly budget" if "Theme:" in m[-1]["content"] else gist(m))  # noqa: F821
    with opened(tmp_path / "m.db", llm) as memory:
        summary = memory.namespace("a").summarize(path)
        again = memory.namespace("a").summarize(path)
    first = prompts(llm)[0]
    assert first.startswith("Opening of a meeting:\nP0: Point 0")
    assert len(first) < 1400
    assert all("A meeting about: The yearly budget" in p for p in prompts(llm)[1 : 1 + len(summary.levels[0])])
    assert "P1: Point 1" in prompts(llm)[1]
    assert again.calls == 0
    assert again.text == summary.text


# memory


def test_every_level_is_found_by_search_and_enters_contexts_under_its_name(tmp_path, book):
    with opened(tmp_path / "m.db") as memory:
        scope = memory.namespace("a")
        summary = scope.summarize(book)
        for level in summary.levels:
            found = scope.search(level[0].text, k=5)
            assert level[0].id in [hit.segment.id for hit in found]
        context = scope.context(summary.text, budget=4000)
        assert "summary of story.txt: This section describes" in context.text


def test_an_export_carries_the_summaries_and_what_they_were_made_of(tmp_path, book):
    with opened(tmp_path / "m.db") as memory:
        summary = memory.namespace("a").summarize(book)
        memory.namespace("a").export(tmp_path / "a.jsonl")
    with opened(tmp_path / "n.db") as memory:
        scope = memory.namespace("b")
        scope.import_(tmp_path / "a.jsonl")
        top = summary.levels[-1][0]
        assert scope.segment(top.id).metadata == top.metadata
        assert len(scope.sources(top.id)) == sum(len(s.metadata["of"]) for s in summary.levels[0])
        assert scope.summarize(book).calls == 0


def test_forgetting_a_passage_takes_every_summary_that_rests_on_it_and_no_other(tmp_path, book):
    with opened(tmp_path / "m.db") as memory:
        scope = memory.namespace("a")
        summary = scope.summarize(book)
        *other_blocks, last_block = summary.levels[0]
        passage = last_block.metadata["of"][-1]
        above = [level[-1].id for level in summary.levels]  # of the last block, and of everything over it
        preview = scope.forget(passage, preview=True)
        counts = scope.forget(passage)
        left = {s.id for s in scope.history(10_000)}
        assert preview["segments"] == counts["segments"] == 1 + len(above)
        assert not {passage, *above} & left
        assert {s.id for s in other_blocks} <= left
        # every later block was shown the one before it, and may repeat it
        scope.forget(summary.levels[0][0].metadata["of"][0])
        assert not [s for s in scope.history(10_000) if s.kind == "summary"]


def test_what_is_forgotten_while_the_llm_is_at_it_does_not_live_on_in_a_summary(tmp_path, book):
    asked = []

    def forgets(messages):
        asked.append(messages)
        if len(asked) == 2:
            scope.forget(summary_of[0])
        return gist(messages)  # noqa: F821

    with opened(tmp_path / "m.db", ScriptedLLM(forgets)) as memory:
        scope = memory.namespace("a")
        scope.ingest(book)
        summary_of = [scope.history(10_000)[30].id]
        with pytest.raises(InvalidInputError, match="forgotten meanwhile; run it again"):
            scope.summarize(book)
        rest = [s for s in scope.history(10_000) if s.kind == "summary"]
        assert not any(summary_of[0] in s.metadata["of"] + s.metadata["background"] for s in rest)
        assert len(asked) == 2


def test_an_edited_file_is_summarised_as_it_is_now(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("OLD: she is called Ann.\n\n" + story(3), encoding="utf-8")
    llm = ScriptedLLM(gist)  # noqa: F821
    with opened(tmp_path / "m.db", llm) as memory:
        memory.namespace("a").summarize(path)
        path.write_text("NEW: she is called Eve.\n\n" + story(3), encoding="utf-8")
        memory.namespace("a").summarize(path)
    last = prompts(llm)[-1]
    assert "OLD" not in last
    assert last.index("NEW") < last.index("Paragraph 2")


def test_a_summary_s_name_is_no_speaker_and_it_is_no_flash_memory(tmp_path):
    path = tmp_path / "jane_eyre.txt"
    path.write_text(story(3), encoding="utf-8")
    with opened(tmp_path / "m.db") as memory:
        scope = memory.namespace("a").session("s")
        scope.add("The cat is called Miso.", speaker="Ana")
        scope.summarize(path)
        for query in ("What is the name of the cat?", "Where did Jane go?"):
            assert all(hit.signals["speaker"] == 0.0 for hit in scope.search(query, k=20))
        flash = scope.context("Go on", budget=4000).trace.flash
        assert [scope.segment(id_).kind for id_ in flash] == ["turn"]


def test_a_summary_has_the_date_of_what_it_is_about(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"content": "Hi", "timestamp": "2023-05-08T10:00:00Z"}]), encoding="utf-8")
    with opened(tmp_path / "m.db") as memory:
        summary = memory.namespace("a").summarize(path)
    assert summary.levels[0][0].created_at.date().isoformat() == "2023-05-08"


@pytest.mark.parametrize("of", [5, ["sum-1"], [1, 2], None])
def test_an_import_may_claim_any_sources(tmp_path, of):
    segment = {
        "text": "x", "session": "s", "role": "system", "speaker": "summary of x", "kind": "summary",
        "created_at": "2023-01-01", "source": None, "offset": None, "key": "summary.x", "id": "sum-1", "seq": 5,
        "metadata": {"of": of},
    }  # fmt: skip
    with opened(tmp_path / "m.db") as memory:
        scope = memory.namespace("a")
        scope.add("hello")
        scope.import_([json.dumps({"memory_os_export": 1}), json.dumps({"segment": segment})])
        assert scope.sources("sum-1") == []
        assert scope.forget(1)["segments"] == 1


def test_whatever_the_llm_raises_or_says_is_one_typed_error(tmp_path, book):
    class Broken(ScriptedLLM):
        def generate(self, messages, *, max_tokens, stop=()):
            raise RuntimeError("socket closed")

    for llm, words in ((Broken([]), "socket closed"), (ScriptedLLM(lambda m: "a\x00b"), "cannot be kept")):
        with opened(tmp_path / "m.db", llm) as memory, pytest.raises(LLMError, match=words):
            memory.namespace("a").summarize(book)


# stopping and going on


def test_a_failure_in_the_middle_keeps_what_was_done_and_only_the_rest_is_asked(tmp_path, book):
    whole = ScriptedLLM(gist)  # noqa: F821
    with opened(tmp_path / "whole.db", whole) as memory:
        undisturbed = memory.namespace("a").summarize(book)
    left = iter(range(3))

    def breaks(messages):
        if next(left, None) is None:
            raise LLMError("scripted", "no power")
        return gist(messages)  # noqa: F821

    with opened(tmp_path / "m.db", ScriptedLLM(breaks)) as memory, pytest.raises(LLMError, match="no power"):
        memory.namespace("a").summarize(book)
    rest = ScriptedLLM(gist)  # noqa: F821
    with opened(tmp_path / "m.db", rest) as memory:
        resumed = memory.namespace("a").summarize(book)
    assert shape(resumed) == shape(undisturbed)
    assert resumed.found == 3
    assert resumed.calls == len(rest.calls) == len(whole.calls) - 3
    assert prompts(rest) == prompts(whole)[3:]


SUMMARIZE = (
    GIST
    + """
import sys, time
from memory_os import Memory
from memory_os.adapters.scripted import ScriptedLLM
def slow(messages):
    time.sleep(float(sys.argv[3]))
    return gist(messages)
with Memory.open(sys.argv[1], llm=ScriptedLLM(slow), embedder="hash") as memory:
    summary = memory.namespace("a").summarize(sys.argv[2], progress=lambda *at: print(*at, flush=True))
    print("calls", summary.calls, summary.found)
"""
)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_result(tmp_path, book):
    with opened(tmp_path / "whole.db", ScriptedLLM(gist)) as memory:  # noqa: F821
        undisturbed = memory.namespace("a").summarize(book)
    command = [sys.executable, "-c", SUMMARIZE, str(tmp_path / "m.db"), str(book)]
    killed = subprocess.Popen([*command, "0.3"], stdout=subprocess.PIPE, text=True)
    with killed:
        for line in killed.stdout:
            if line.split()[:2] == ["1", "3"]:
                time.sleep(0.1)  # the fourth is under way
                os.kill(killed.pid, signal.SIGKILL)
                break
    with opened(tmp_path / "m.db", ScriptedLLM(gist)) as memory:  # noqa: F821
        resumed = memory.namespace("a").summarize(book)
        assert not any(memory.check().values())
    assert shape(resumed) == shape(undisturbed)
    assert resumed.found == 3


# the command


def test_the_command_prints_the_summary_and_its_levels(tmp_path, monkeypatch, capsys):
    from memory_os import build
    from memory_os.cli.main import app

    path = tmp_path / "story.txt"
    path.write_text(story(40), encoding="utf-8")
    monkeypatch.setattr(build, "make_llm", lambda name: ScriptedLLM(gist))  # noqa: F821
    flags = ["--store", str(tmp_path / "m.db"), "--embedder", "hash"]
    app(["summarize", str(path), *flags], standalone_mode=False)
    out, err = capsys.readouterr()
    assert out.startswith("This section describes")
    assert "level 1: 1 of" in err
    assert "0 were there" in err
    app(["summarize", str(path), *flags, "--json"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == out.strip()
    assert printed["calls"] == 0
    assert printed["complete"] is True
    assert printed["levels"][-1][0]["of"] == [s["id"] for s in printed["levels"][-2]]


# whole books


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jane_eyre.txt", "san_guo_yan_yi_zh.txt"])
def test_a_whole_book(shared_data, tmp_path, name):
    llm = ScriptedLLM(gist, tokenizer=counter_for("cl100k_base"))  # noqa: F821
    with opened(tmp_path / "m.db", llm) as memory:
        scope = memory.namespace("a")
        summary = scope.summarize(shared_data / name)
        passages = [s.id for s in scope.history(100_000) if s.kind == "document"]
        assert [s.id for s in scope.sources(summary.levels[-1][0].seq)] == passages
        again = scope.summarize(shared_data / name)
    assert summary.complete
    assert len(summary.levels) >= 3
    assert len(llm.calls) == summary.calls  # the second run asked nothing
    assert again.text == summary.text
    zh = "zh" in name
    assert all(("概括" in prompt) == zh for prompt in prompts(llm)[: len(summary.levels[0])])


@pytest.mark.slow
def test_a_chapter_with_the_embedded_llm(shared_data, tmp_path):
    from memory_os.adapters.huggingface import HuggingFaceLLM

    text = (shared_data / "jane_eyre.txt").read_text(encoding="utf-8")
    chapter = text[text.index("\nCHAPTER I\n") : text.index("\nCHAPTER II\n")]
    path = tmp_path / "chapter.txt"
    path.write_text(chapter, encoding="utf-8")
    llm = HuggingFaceLLM("smollm2")
    with Memory.open(tmp_path / "m.db", llm=llm) as memory:
        scope = memory.namespace("a")
        summary = scope.summarize(path)
        assert summary.complete
        assert 20 < llm.count_text(summary.text) <= 700
        assert scope.summarize(path).calls == 0
        assert any(hit.segment.kind == "summary" for hit in scope.search("What happens in the chapter?"))
