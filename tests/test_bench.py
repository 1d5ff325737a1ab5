"""``memos bench``: what it counts, checked by hand on small data, and what it does with bad data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.benchmarks import alr2, dialogues, locomo, needle, peers, plot, riddles, scale, scale_data, scm, xl3m
from memory_os.benchmarks.measure import Conversation, Question, Turn, measure
from memory_os.cli.main import run
from memory_os.errors import InvalidInputError, UnknownNameError
from memory_os.lexical import query_terms, terms_of
from memory_os.stem import by_rules

LONG = "I told you about the lighthouse keeper Osvald and his seven geese. " + "It went on and on for hours. " * 60
KEYS = {"overall", "by_category", "session_recall_at_10", "latency_ms", "peers", "left_out"}


def said(key, speaker, text):
    return {"dia_id": key, "speaker": speaker, "text": text}


LOCOMO = [
    {
        "sample_id": "tiny",
        "conversation": {
            "speaker_a": "Ana",
            "speaker_b": "Ben",
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                said("D1:1", "Ana", "I adopted a tabby cat called Miso."),
                said("D1:2", "Ben", "I started to play the trombone."),
                said("D1:3", "Ben", " "),
            ],
            "session_2_date_time": "10:00 am on 1 June, 2023",
            "session_2": [
                said("D2:1", "Ana", LONG),
                said("D2:2", "Ben", "My trombone is stolen."),
            ],
        },
        "qa": [
            {"question": "What is Ana's tabby cat called?", "evidence": ["D1:1"], "category": 4},
            {"question": "Which cat and which geese does Ana know?", "evidence": ["D1:1; D02:01"], "category": 1},
            {"question": "When did Ana tell of Osvald's geese?", "evidence": ["D:2:1", "D9:9"], "category": 2},
            {"question": "Does Ana like Mozart?", "evidence": [], "category": 3},
            {"question": "Would Ben like brass bands?", "category": 3},
            {"question": "Who stole the trombone of Ben?", "evidence": ["D2:2"], "category": 5},
            {"question": "Who stole the cat?", "evidence": [], "category": 5},
        ],
    }
]


@pytest.fixture
def memos(tmp_path, monkeypatch, capfd):
    """Run a command in this process and an empty folder: ``(exit code, stdout, stderr)``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["memos", *map(str, arguments)])
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(LOCOMO))
    return file


def test_evidence_is_read_however_it_is_written():
    assert locomo.evidence_of({"evidence": ["D8:6; D9:17", "D:11:26", "D8:06", "", "D"]}) == ["D8:6", "D9:17", "D11:26"]
    assert locomo.evidence_of({}) == []


def test_locomo_is_read_as_its_readers_expect(tiny):
    [conversation], left_out = locomo.read(tiny)
    assert left_out == 2  # category 5 without evidence is not missed
    assert [turn.key for turn in conversation.turns] == ["D1:1", "D1:2", "D2:1", "D2:2"]  # blank text says nothing
    assert conversation.turns[0].when.isoformat() == "2023-05-08T13:56:00+00:00"
    assert [(q.evidence, q.counted) for q in conversation.questions] == [
        (("D1:1",), True), (("D1:1", "D2:1"), True), (("D2:1",), True), (("D2:2",), False),
    ]  # fmt: skip


def test_recall_is_what_a_hand_counts(memos, tiny):
    """The long turn is over 300 tokens: 1, 1/2 and 0 of the evidence fits; in 2,048 tokens all of it."""
    arguments = ["--embedder", "hash", "--budgets", "300,2048", "--compare", "recency,bm25,rrf,chroma"]
    code, out, err = memos("bench", "locomo", "--data", tiny, "--json", *arguments)
    report = json.loads(out)
    assert (code, set(report)) == (0, KEYS)
    small, large = report["overall"]["300"], report["overall"]["2048"]
    assert (small["recall"], small["all"], small["n"]) == (50.0, 33.33, 3)
    assert (large["recall"], large["all"], large["n"]) == (100.0, 100.0, 3)
    assert small["tokens"] <= 300
    assert {name: figures["300"]["recall"] for name, figures in report["by_category"].items()} == {
        "1": 50.0, "2": 0.0, "4": 100.0,
    }  # fmt: skip
    assert report["session_recall_at_10"] == 100.0
    assert report["left_out"] == 2
    assert set(report["latency_ms"]) == {"p50", "p95", "query_embedding_p50"}
    for name in ("recency", "bm25", "rrf", "chroma"):
        assert (report["peers"][name]["300"]["recall"], report["peers"][name]["2048"]["recall"]) == (50.0, 100.0)
        assert set(report["peers"][name]["300"]) == {"recall", "all", "tokens", "n"}
    assert "tiny" in err
    assert not Path("bench-locomo.png").exists()  # JSON is for programs


def test_locomo_prints_tables_and_draws(memos, tiny):
    pytest.importorskip("matplotlib")
    arguments = ["--embedder", "hash", "--budgets", "300,2048", "--compare", "rrf"]
    code, out, err = memos("bench", "locomo", "--data", tiny, *arguments)
    assert code == 0
    assert "1 multi-hop" in out
    assert "query's embedding alone" in out
    assert "The plot is bench-locomo.png" in err
    assert Path("bench-locomo.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_what_to_install(memos, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = memos("bench", "locomo", "--data", tiny, "--embedder", "hash", "--budgets", "300")
    assert (code, "1 multi-hop" in out) == (0, True)
    assert 'pip install "memory-os[bench]"' in err
    assert not Path("bench-locomo.png").exists()


def test_a_conversation_is_chunked_into_whole_lines():
    turns = [Turn(str(number), "s", "word " * 80, speaker="Ana") for number in range(5)]
    chunks, holds = peers.chunked(turns)
    assert [sorted(keys) for keys in holds] == [["0", "1"], ["2", "3"], ["4"]]
    assert all(len(chunk) <= 1000 for chunk in chunks)


def test_a_peer_passes_over_what_does_not_fit():
    pieces = peers.Pieces([5, 9, 4, 1], [frozenset("a"), frozenset("b"), frozenset("cd"), frozenset("e")])
    assert pieces.filled([0, 1, 2, 3], 10) == ({"a", "c", "d", "e"}, 10)


def test_silver_evidence_holds_most_of_the_answer():
    turns = [
        Turn("0", "s", "The harbour museum opens at nine on Mondays."),
        Turn("1", "s", "The museum is near the harbour."),
        Turn("2", "s", "Nothing of the kind."),
    ]
    # harbour, museum, opens, nine, Mondays: the first holds 5 of 5, the second 2 of 5
    assert dialogues.silver("The harbour museum opens at nine on Mondays", turns) == ("0",)
    # harbour, museum, far: 2 of 3 are enough
    assert dialogues.silver("far harbour museum", turns) == ("0", "1")
    assert dialogues.silver("?", turns) == ()


def test_dialogues_count_what_entered_and_what_entered_cut(memos, tmp_path):
    data = {
        "dialogues": [{"id": "d", "dialogue": ["My cat is called Miso.", "Noted.", LONG, "I see."]}],
        "questions": [
            {"id": "d", "mode": "single-turn", "question": "What is my cat called?", "answer": "Your cat is Miso"},
            {"id": "d", "mode": "single-turn", "question": "What is unheard of?", "answer": "Quantum chromodynamics"},
            {"id": "other", "mode": "single-turn", "question": "Cat?", "answer": "Miso"},
        ],
    }
    file = tmp_path / "talks.json"
    file.write_text(json.dumps(data))
    arguments = ["--embedder", "hash", "--budgets", "300", "--compare", "rrf"]
    report = json.loads(memos("bench", "dialogues", "--data", file, "--json", *arguments)[1])
    figure = report["overall"]["300"]
    assert (figure["recall"], figure["partly"], figure["n"], report["left_out"]) == (100.0, 0.0, 1, 1)
    assert set(report["by_category"]) == {"talks", "single-turn"}
    assert report["peers"]["rrf"]["300"]["recall"] == 100.0
    code, out, _ = memos("bench", "dialogues", "--data", file, *arguments)
    assert (code, "partly" in out) == (0, True)


def test_evidence_that_entered_cut_is_told_apart(memos, tmp_path):
    """The only turn is longer than the budget: it enters cut, and that is not recall."""
    asked = {"id": "d", "question": "Who kept the lighthouse and the geese?", "answer": "The lighthouse keeper Osvald"}
    file = tmp_path / "talks.json"
    file.write_text(json.dumps({"dialogues": [{"id": "d", "dialogue": [LONG]}], "questions": [asked]}))
    arguments = ["--embedder", "hash", "--budgets", "200,1000"]
    overall = json.loads(memos("bench", "dialogues", "--data", file, "--json", *arguments)[1])["overall"]
    assert [(overall[budget]["recall"], overall[budget]["partly"]) for budget in ("200", "1000")] == [
        (0, 100),
        (100, 0),
    ]


def test_facts_are_planted_at_their_depths():
    book = needle.Book([f" Sentence number {number}." for number in range(100)], [4] * 100)
    facts = [(f"Fact {n}.", "?") for n in range(3)]
    text = needle.planted(book, 400, [0, 50, 100], facts, start=0).text
    assert text.startswith("Fact 0. Sentence number 0.")
    assert "number 49. Fact 1. Sentence number 50." in text
    assert text.endswith("Sentence number 99. Fact 2.")
    longer = needle.planted(book, 800, [50], facts[:1], start=90).text  # the book begins again
    assert longer.count("Sentence number 5.") == 2
    assert longer.startswith(" Sentence number 90.")


def test_sentences_are_the_text_and_end_where_sentences_end():
    text = "Mr. Fox ran. “Stop!” said J. Hare.\n\n却说曹操大喜。“善！”遂行。"
    parts = needle.sentences_of(text)
    assert "".join(parts) == text
    assert parts[:2] == ["Mr. Fox ran.", " “Stop!”"]
    assert parts[-3:] == ["\n\n却说曹操大喜。", "“善！”", "遂行。"]


def test_needles_are_found_in_books_of_either_language(memos, tmp_path):
    english, chinese = tmp_path / "en.txt", tmp_path / "zh.txt"
    english.write_text("\n\n".join(f"The ship of day {n} sailed on. Nobody spoke of it." for n in range(200)))
    chinese.write_text("\n\n".join(f"却说第{n}日大军前行。众人不言。" for n in range(200)))
    arguments = ["--lengths", "500,1k", "--depths", "0,100", "--budget", 4000, "--embedder", "hash", "--compare", "rrf"]
    code, out, _ = memos("bench", "needle", "--data", english, chinese, *arguments, "--json")
    report = json.loads(out)
    assert (code, set(report)) == (0, {"recall", "overall", "peers", "budget", "trials"})
    assert set(report["recall"]) == {"en", "zh"}
    assert set(report["recall"]["en"]) == {"500", "1000"}
    assert set(report["recall"]["en"]["500"]) == {"0", "100"}
    assert report["peers"]["rrf"]["overall"] == {"en": 100.0, "zh": 100.0}  # all of it fits
    code, out, _ = memos("bench", "needle", "--data", english, *arguments, "--plot", "maps.png")
    assert (code, "depth 100 %" in out) == (0, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{not json", "not JSON"),
        ('{"a": 1}', "LoCoMo's form"),
        ('[{"conversation": {}}]', "LoCoMo's form"),
        ('[{"conversation": {"session_1": [{}]}, "qa": []}]', "LoCoMo's form"),
        ("[]", "no conversation"),
        ('[{"conversation": {}, "qa": []}]', "no question"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_is_one_clear_error(memos, tmp_path, content, words):
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_text(content)
    code, out, err = memos("bench", "locomo", "--data", file, "--embedder", "hash")
    assert (code, words in err, "Traceback" in out + err) == (1, True, False)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["locomo", "--compare", "oracle"], 1, "known: bm25, chroma, recency, rrf"),
        (["locomo", "--budgets", "many"], 2, "not a whole number"),
        (["locomo", "--budgets", "0"], 2, "at least 1"),
        (["locomo", "--plot", "no/such/folder/a.png"], 1, "create it first"),
        (["locomo", "--plot", "a.pdf"], 1, "PNG"),
        (["dialogues"], 1, "dialogues' form"),
        (["needle", "--compare", "chroma"], 1, "known: rrf"),
        (["needle", "--depths", "0,101"], 1, "from 0 to 100"),
        (["speed", "--segments", "x"], 2, "not a whole number"),
    ],
)
def test_a_mistake_is_one_clear_line(memos, tiny, arguments, code, words):
    got, out, err = memos("bench", *arguments, "--data", tiny)
    assert (got, words in err, "Traceback" in out + err) == (code, True, False)


def test_names_are_checked_before_anything_is_stored(tiny):
    conversations, _ = locomo.read(tiny)
    with pytest.raises(UnknownNameError):
        measure(conversations, budgets=[300], compare=["nope"], embedder="hash")
    with pytest.raises(InvalidInputError):
        measure([], budgets=[300])


@pytest.mark.slow
def test_real_conversations_beside_a_peer(memos, shared_data):
    arguments = ["--embedder", "hash", "--budgets", "512", "--compare", "recency", "--json"]
    report = json.loads(memos("bench", "locomo", "--data", shared_data / "locomo_dev.json", *arguments)[1])
    assert report["overall"]["512"]["n"] + report["left_out"] == 762
    assert report["overall"]["512"]["recall"] > 10 * report["peers"]["recency"]["512"]["recall"]
    assert "disagreements" not in report


def test_real_dialogues_are_read(shared_data):
    for language, n in (("en", 21), ("zh", 28)):
        conversations, left_out = dialogues.read([shared_data / f"scm_dialogue_{language}_dev.json"])
        assert sum(len(conversation.questions) for conversation in conversations) + left_out == n


@pytest.mark.parametrize("name", ["locomo", "dialogues", "needle", "scale", "speed", "xl3m"])
def test_every_benchmark_has_help_with_an_example_and_json(memos, name):
    code, out, _ = memos("bench", name, "--help")
    assert code == 0
    assert "Example: " in out
    assert "JSON" in out


# scale


@pytest.mark.slow
def test_scale_measures_every_size_and_every_peer_that_is_there(memos, monkeypatch):
    from memory_os.benchmarks import scale_peers

    monkeypatch.setattr(scale_peers.Mem0, "modules", ("no_such_package",))
    arguments = ["--sizes", "300,900", "--namespaces", "3", "--questions", "6", "--peers", "langgraph-memory,mem0"]
    code, out, err = memos("bench", "scale", *arguments, "--json", "--plot", "costs.png")
    assert code == 0
    report = json.loads(out)
    assert set(report["systems"]) == {"memory_os", "langgraph-memory"}
    assert "pip install mem0ai" in report["left_out"]["mem0"]
    assert err.count("mem0 is left out") == 1
    for figures in report["systems"].values():
        assert set(figures) == {"300", "900"}
        for each in figures.values():
            assert each["recall"] == 1.0
            assert min(each["search_p95_ms"], each["ingest_per_s"], each["bytes_per_segment"]) > 0
    assert report["systems"]["memory_os"]["900"]["cold_first_answer_s"] > 0
    assert report["namespaces"]["namespaces"] == 3
    assert set(report["growth"]["memory_os"]) >= {"search_p95_ms", "context_p95_ms", "cold_first_answer_s"}
    assert Path("costs.png").read_bytes().startswith(b"\x89PNG")


def test_scale_stops_a_peer_that_takes_too_long_and_refuses_one_that_it_does_not_know(memos, monkeypatch):
    monkeypatch.setattr(scale, "_in_a_process", slow := Slow())
    report = scale.measure(sizes=[10, 20, 30], peers=["langgraph-memory"], namespaces=0, limit_s=5)
    assert report["systems"]["langgraph-memory"] == {"10": {"stopped": "after 5 s, with 7 of 10 stored"}}
    assert set(report["systems"]["memory_os"]) == {"10", "20", "30"}
    assert slow.limits == {None, 5}
    code, _, err = memos("bench", "scale", "--peers", "pinecone")
    assert code == 1
    assert "unknown peer 'pinecone'" in err


def test_a_system_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    figures, make = [], plot._figure
    monkeypatch.setattr(plot, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    points = [(10, 1.0), (100, 2.0)]
    panels = {"a": {"ours": points, "one": points, "two": points}, "b": {"ours": points, "one": [], "two": points}}
    plot.costs(tmp_path / "costs.png", "Costs", panels)
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figures[0].axes]
    assert colours[1].items() <= colours[0].items()
    assert len(set(colours[0].values())) == 3


@pytest.mark.slow
def test_scale_measures_ours_on_a_server_too_and_shows_no_password(postgres_server):
    url = postgres_server.url(postgres_server.new())
    report = scale.measure(sizes=[300], peers=[], namespaces=0, questions=3, postgres=url)
    assert list(report["systems"]) == ["memory_os", "memory_os on PostgreSQL", "memory_os on pgvector"]
    for each in report["systems"].values():
        assert each["300"]["recall"] == 1.0
        assert min(each["300"]["search_p95_ms"], each["300"]["bytes_per_segment"]) > 0
    assert "p%25w" not in json.dumps(report)


@pytest.mark.slow
def test_a_peer_that_is_stopped_says_how_much_it_had_stored():
    figures = scale._measured(
        {"system": "langgraph-memory", "size": 10**7, "namespaces": 1, "seed": 0, "questions": 1}, 8, None
    )
    stored = int(re.fullmatch(r"after 8 s, with ([\d,]+) of 10,000,000 stored", figures["stopped"])[1].replace(",", ""))
    assert 0 < stored < 10**7
    assert stored % scale_data.BLOCK == 0


class Slow:
    def __init__(self):
        self.limits = set()

    def __call__(self, job, limit_s, url):
        self.limits.add(limit_s)
        if limit_s:
            raise subprocess.TimeoutExpired("work", limit_s, output=b'{"stored": 3}\n{"stored": 7}\n')
        return {"search_p95_ms": 1.0}


def test_what_is_stored_at_scale_depends_on_the_seed_alone():
    one, two, other = scale_data.Data(1), scale_data.Data(1), scale_data.Data(2)
    [*_, (texts, vectors)] = one.batches(5300)
    assert len(texts) == len(vectors) == 300
    assert texts == two.block(1)[0][:300]
    assert (vectors == two.block(1)[1][:300]).all()
    assert texts != other.block(1)[0][:300]
    assert 0.9 < scale_data.energy(one.block(0)[1])[128] < 0.95  # MiniLM over LoCoMo's turns: 0.92
    asked, queries = one.questions(5300, 20)
    nearest = max(float((queries[0] @ rows.T).max()) for _, rows in one.batches(5300))
    assert 0.5 < nearest < 0.95
    assert asked == two.questions(5300, 20)[0]


# SCM


SCM = {
    "dialogues": [
        {
            "id": "d",
            "dialogue": [
                "My tabby cat is called Miso.",
                "What a lovely name.",
                "I play the trombone on Sundays.",
                "How loud.",
                "What else is new?",
                "Nothing much.",
            ],
        }
    ],
    "questions": [
        {
            "id": "d",
            "question": "What is my tabby cat called?",
            "answer": "tabby cat called Miso",
            "mode": "single-turn",
        },
        {"id": "d", "question": "What else is there?", "answer": "Nothing much", "mode": "multi-turn"},
    ],
}


def test_token_f1_by_hand():
    assert scm.token_f1("Miso!", "The Miso") == 1.0
    assert scm.token_f1("it is Miso", "Miso") == pytest.approx(2 * 1 / 4)
    assert scm.token_f1("Miso Miso", "Miso") == pytest.approx(2 * 1 / 3)
    assert scm.token_f1("a dog", "Miso") == scm.token_f1("", "Miso") == 0.0
    assert scm.token_f1("他住在北京。", "北京") == pytest.approx(2 * 2 / 7)


def test_every_scm_system_runs_at_the_same_budget_and_the_ablations_do_what_they_say(tmp_path):
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps(SCM), encoding="utf-8")
    conversations, left_out = dialogues.read([path])
    llm = ScriptedLLM(lambda messages: "A" if "A or B" in messages[-1]["content"] else "Miso", context_window=9000)
    report = scm.compare(
        conversations, systems=list(scm.SYSTEMS), budgets=[300], llm=llm, embedder="hash", left_out=left_out
    )
    figures = {name: each["overall"]["300"] for name, each in report["systems"].items()}
    assert set(report) == {"systems", "llm", "left_out"}
    assert all(figure["n"] == 2 and figure["tokens"] <= 300 for figure in figures.values())
    assert figures["scm-paper"]["recall"] == figures["auto"]["recall"] == 100.0
    assert figures["scm-paper"]["calls"] == 1.0
    assert figures["scm-repo"]["calls"] == figures["no-controller"]["calls"] == figures["auto"]["calls"] == 0.0
    assert figures["no-activation"]["recall"] == 50.0  # the last turn only
    assert figures["no-flash"]["recall"] == 100.0
    assert figures["scm-paper"]["f1"] == pytest.approx(50 * 2 * 1 / 5)
    assert set(report["systems"]["auto"]["by_group"]) == {"dialogues", "single-turn", "multi-turn"}


def test_bench_scm_prints_its_tables_and_refuses_unknown_systems(memos, tmp_path):
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps(SCM), encoding="utf-8")
    flags = ["--data", path, "--free", "--no-answers", "--embedder", "hash"]
    code, out, _ = memos("bench", "scm", *flags, "--budgets", "200,300")
    assert code == 0
    assert "no-activation" in out
    assert "single-turn" in out
    code, out, _ = memos("bench", "scm", *flags, "--json", "--systems", "auto")
    assert json.loads(out)["systems"]["auto"]["overall"]["1024"]["recall"] == 100.0
    code, _, err = memos("bench", "scm", *flags, "--systems", "scm9")
    assert code == 1
    assert "unknown system 'scm9'" in err


def test_typographic_quotes_are_punctuation_too():
    assert scm.token_f1("the website's robots", "The “website’s” robots") == 1.0


def test_what_is_named_twice_counts_once():
    turn = Turn("0", "dialogue", "My cat is called Miso.")
    talk = Conversation("d", (turn,), (Question("What is my cat called?", ("0",), answer="Miso"),))
    report = scm.compare([talk], systems=["auto", "auto"], budgets=[300, 300], llm=None, embedder="hash")
    assert report["systems"]["auto"]["overall"]["300"]["n"] == 1


# -- xl3m --------------------------------------------------------------------------------------------------------------


def test_riddles_are_what_they_say():
    for riddle in riddles.RIDDLES:
        asked = set(query_terms(riddle.question))
        assert not asked & set(terms_of(riddle.veiled)), riddle.question
        assert len(asked & set(terms_of(riddle.plain))) >= 0.6 * len(asked)
        for decoy in riddle.decoys:
            assert len(asked & set(terms_of(decoy))) >= 0.6 * len(asked), decoy
        assert by_rules(riddle.question), riddle.question


def test_intervals_are_wilsons_over_the_facts():
    half = xl3m.share([True] * 50 + [False] * 50, 1)
    assert (half["percent"], half["low"], half["high"], half["n"]) == (50.0, 40.4, 59.6, 100)
    # trials of one fact that all say the same are one trial
    assert xl3m.share(([True] * 4 + [False] * 4) * 50, 4)["low"] == 40.4
    assert xl3m.share([True] * 100, 1)["low"] == 96.3
    assert xl3m.share([True] * 100, 4)["low"] == xl3m.share([True] * 25, 1)["low"]
    assert xl3m.share([False] * 100, 1)["high"] == 3.7


def test_a_fact_is_planted_between_sentences():
    host = "It was a dark night. Nobody slept well. “Who is there?” he cried. Then all was still."
    assert xl3m.with_sentence(host, "The cat is Rex.") == host.replace("well. ", "well. The cat is Rex. ")
    assert xl3m.with_sentence("no stop", "The cat is Rex.") == "no stop The cat is Rex."


@pytest.mark.slow
def test_every_part_of_xl3m_measures(memos, shared_data, tmp_path):
    book = needle.books([shared_data / "jane_eyre.txt"])["en"]
    llm = HuggingFaceLLM()
    report = xl3m.ranking(book, llm=llm, embedder=HashEmbedder(), sizes=[2, 6], trials=1, riddles=riddles.RIDDLES[3:5])
    assert set(report) == set(xl3m.KINDS)
    easy = report["easy"]["6"]
    assert set(easy) == set(xl3m.SYSTEMS)
    assert easy["bm25"]["r@1"]["percent"] == easy["question_nll"]["r@1"]["percent"] == 100
    assert report["paraphrased"]["6"]["bm25"]["r@1"]["percent"] == 0
    for by_size in report.values():
        for by_system in by_size.values():
            assert all(figure["r@1"]["percent"] <= figure["r@3"]["percent"] for figure in by_system.values())

    file = tmp_path / "locomo.json"
    file.write_text(json.dumps(LOCOMO))
    orders = xl3m.rerank(locomo.read(file)[0], budgets=[120, 4000], llm=llm, embedder="hash")
    assert set(orders) >= {"recall", "entropy", "recall + hybrid"}
    assert all(figure["4000"]["recall"] == 100 for figure in orders.values())

    cost = xl3m.cost(book, llm=llm, lengths=[32], n=4, rounds=1)["32"]
    assert cost["kept_ms"] < cost["ours_ms"]

    (tmp_path / "book.txt").write_text("".join(book.sentences[:300]))
    arguments = ["--data", tmp_path / "book.txt", "--parts", "document", "--length", "2000", "--json"]
    code, out, _ = memos("bench", "xl3m", *arguments)
    told = json.loads(out)["document"]
    assert code == 0
    assert told["peak_mb"] > 100
    assert told["found"]
    assert memos("bench", "xl3m", "--parts", "speed")[:2] == (1, "")


# -- alr2 --------------------------------------------------------------------------------------------------------------

TOLD = ("My cat is called Miso. She is old.", "The weather was bad.", "The boat is called Heron.")
TALK = Conversation(
    "d",
    tuple(Turn(str(n), "s", text) for n, text in enumerate(TOLD)),
    (Question("What is my cat called?", ("0",)), Question("What is the boat called?", ("2",))),
)


def half_invented(messages):
    """Copies a true sentence with its number, and invents another."""
    lines = [line for line in messages[-1]["content"].splitlines() if line.startswith(("S1.1", "S3.1"))]
    about = "boat" if "the boat called" in messages[-1]["content"] else "cat"
    return "\n".join([*(f"- {line}" for line in lines if about in line), "- S2.1: The weather was fine."])


def test_invented_quotes_are_counted_before_and_after_the_verifier():
    report = alr2.evidence([TALK], llm=ScriptedLLM(half_invented), budget=300, embedder="hash", options={"union": 0})
    before, after = report["quoted, not verified"], report["quoted, verified"]
    assert (before["recall"], before["quotes"], before["hallucination_rate"]) == (100.0, 2.0, 50.0)
    assert (after["recall"], after["quotes"], after["hallucination_rate"]) == (100.0, 1.0, 0.0)
    assert report["alr2 (with recall's sentences)"]["fallback"] == 0.0
    assert report["auto"]["recall"] == 100.0
    assert before["n"] == 2


def test_facts_are_planted_beside_what_repeats_their_questions(shared_data):
    talk = alr2.planted_facts(needle.books([shared_data / "jane_eyre.txt"])["en"])
    texts = {turn.key: turn.text for turn in talk.turns}
    assert len(talk.turns) == 400
    assert len(talk.questions) == len(riddles.RIDDLES)
    for question, riddle in zip(talk.questions, riddles.RIDDLES, strict=True):
        assert riddle.plain in texts[question.evidence[0]]
        assert all(any(decoy in text for text in texts.values()) for decoy in riddle.decoys)


def test_hops_find_the_chains_that_one_search_does_not():
    report = alr2.chains(links=[2, 5], budgets=[400], n=3, n_distractors=60, embedder="hash")
    for length, by_budget in report.items():
        figures = by_budget["400"]
        assert figures["hops (alr2)"]["all"] == 100.0, length
        assert all(figure["tokens"] <= 400 and figure["n"] == 3 for figure in figures.values())
    assert report["5"]["400"]["one search (auto)"]["all"] < 100.0


def test_alr2_and_atc_print_what_they_measure(memos, tmp_path):
    file = tmp_path / "locomo.json"
    file.write_text(json.dumps(LOCOMO))
    code, out, _ = memos("bench", "atc", "--links", "2", "--budgets", "200", "--traces", "2", "--distractors", "20",
                         "--embedder", "hash", "--json")  # fmt: skip
    assert code == 0
    assert set(json.loads(out)["2"]["200"]) == {"one search (auto)", "one search (alr2)", "hops (alr2)"}
    code, out, _ = memos("bench", "atc", "--links", "2", "--traces", "1", "--distractors", "9", "--embedder", "hash")
    assert (code, "hops (alr2)" in out) == (0, True)
    assert memos("bench", "atc", "--language", "xx")[:2] == (1, "")
    assert memos("bench", "alr2", "--parts", "none")[:2] == (1, "")
