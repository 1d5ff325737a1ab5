"""``memos bench bank`` on a little of everything: its figures are what they are called."""

import sys

import pytest

from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.benchmarks import bank, needle
from memory_os.benchmarks.riddles import RIDDLES
from memory_os.cli import figures
from memory_os.cli.main import run


@pytest.fixture(scope="module")
def llm():
    return HuggingFaceLLM()


@pytest.fixture(scope="module")
def book(shared_data):
    return needle.books([shared_data / "jane_eyre.txt"])["en"]


def test_every_riddle_has_an_answer_that_only_the_fact_gives():
    for riddle in RIDDLES:
        assert bank.answer_of(riddle)
        assert bank.is_right(riddle.plain, riddle)
        assert bank.is_right(riddle.veiled, riddle)
        assert not bank.is_right(riddle.question, riddle)


@pytest.mark.slow
def test_one_cached_segment_answers_as_full_prefill_does(book, llm):
    report = bank.agreement(book, llm=llm, counts=(1,), trials=1, repairs=("spliced",), riddles=RIDDLES[:3])["1"]
    assert report["no memory"]["percent"] == 0.0
    assert report["spliced"]["percent"] == report["full prefill"]["percent"] > 0
    assert report["spliced"]["kl"] < 0.05
    assert llm.repair is None


@pytest.mark.slow
def test_times_and_sizes_are_told(book, llm, capsys):
    times = bank.first_token(book, llm=llm, sizes=(256,), rounds=1)
    assert times["256"]["tokens"] > 256
    assert {"text_ms", "spliced_ms", "opened_ms", "text_over_cached"} <= set(times["256"])
    sizes = bank.storage(book, llm=llm, tokens=1000)
    for figure, least in ((sizes["float16"], 23_040), (sizes["int8"], 11_520)):
        assert 0 < figure["tokens"] <= 1000
        assert least < figure["bytes_per_token"] < 1.2 * least
    grown = bank.growth(book, llm=llm, sizes=(300, 600), turns=2)
    assert grown["300"]["tokens"] < grown["600"]["tokens"]
    assert grown["600"]["peak_over_model_mb"] > 0
    figures.print_bank({"first-token": times, "storage": sizes, "growth": grown}, json=False)
    assert "text_over_cached" in capsys.readouterr().out


def test_every_repair_can_be_named_in_a_list():
    assert not [name for name in bank.REPAIRS if "," in name]


def test_a_part_that_is_none_is_one_clear_error(monkeypatch, capfd):
    for arguments, words in ((["--parts", "speed"], "unknown part 'speed'"), (["--repairs", "glue"], "unknown repair")):
        monkeypatch.setattr(sys, "argv", ["memos", "bench", "bank", *arguments])
        with pytest.raises(SystemExit) as end:
            run()
        assert end.value.code == 1
        assert words in capfd.readouterr().err
