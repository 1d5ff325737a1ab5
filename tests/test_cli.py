"""The ``memos`` command as a user runs it: what it prints, what it exits with, and what it never shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memory_os.cli.main import COMMANDS, app, run

MEMOS = Path(sys.executable).with_name("memos")
CHAT = [
    {"role": "user", "content": "My cat is called Miso."},
    {"role": "assistant", "content": "A fine name."},
    {"role": "user", "content": "I work at the harbour museum."},
]


@pytest.fixture
def memos(tmp_path, monkeypatch, capfd):
    """Run a command in this process, as the console script does: ``(exit code, stdout, stderr)``."""
    monkeypatch.setenv("MEMOS_STORE", str(tmp_path / "memory.db"))
    monkeypatch.setenv("MEMOS_EMBEDDER", "hash")
    monkeypatch.setenv("MEMOS_TOKENIZER", "cl100k_base")

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
def chat(tmp_path, memos):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(CHAT))
    assert memos("ingest", file)[0] == 0
    return file


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert "Example: " in result.output
    assert "--json" in result.output
    assert "JSON" in result.output


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from typer.testing import CliRunner; from memory_os.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'sqlalchemy', 'pydantic', 'transformers', 'chromadb', 'prompt_toolkit'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_ingest_tells_what_it_stored_and_doubles_nothing(memos, chat):
    assert memos("ingest", chat)[1] == "Stored 0 segments; 3 were already there.\n"
    assert json.loads(memos("ingest", chat, "--json")[1]) == {"stored": 0, "already_there": 3}


def test_ingest_reads_standard_input_and_resumes_after_a_broken_line(tmp_path):
    environment = {"MEMOS_STORE": str(tmp_path / "m.db"), "MEMOS_EMBEDDER": "hash", "PATH": ""}
    lines = "\n".join(json.dumps(line) for line in CHAT)
    for given, code, words in (
        (lines + '\n{"role": "us', 1, "line 4"),
        (lines, 0, "3 were already there"),
    ):
        result = subprocess.run(
            [MEMOS, "ingest", "-"], input=given, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == code
        assert words in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


def test_context_is_shown_to_the_token(memos, chat):
    code, out, _ = memos("context", "What is my cat called?", "--budget", 200, "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["n_tokens"] == shown["account"]["total"] <= 200
    assert "Miso" in shown["messages"][-1]["content"]
    assert {entry["action"] for entry in shown["ledger"]} <= {"activated", "trimmed", "dropped"}
    assert shown["segments"][0]["text"] == "My cat is called Miso."
    _, out, _ = memos("context", "What is my cat called?", "--budget", 200, "--why")
    assert "of at most 200 tokens (cl100k_base)" in out
    assert "activated, relevant" in out


def test_search_history_stats_and_their_json(memos, chat):
    assert "Miso" in memos("search", "cat")[1]
    [hit] = json.loads(memos("search", "cat", "-k", 1, "--json")[1])
    assert hit["segment"]["text"] == "My cat is called Miso."
    assert hit["score"] == pytest.approx(sum(hit["contributions"].values()), abs=0.01)
    assert set(hit["contributions"]) == set(hit["signals"]) >= {"dense", "lexical", "speaker"}
    assert "harbour museum" in memos("history")[1]
    assert [s["seq"] for s in json.loads(memos("history", "--last", 2, "--json")[1])] == [2, 3]
    assert json.loads(memos("stats", "--json")[1])["segments"] == 3
    assert memos("history", "-n", "somebody/else")[1] == ""


def test_export_and_import_move_a_namespace(memos, chat, tmp_path):
    assert memos("export", tmp_path / "out.jsonl")[1].startswith("Wrote 3 segments")
    assert json.loads(memos("import", tmp_path / "out.jsonl", "-n", "copy", "--json")[1])["stored"] == 3
    assert memos("export", "-", "-n", "copy")[1].count("\n") == 4


def test_forget_asks_or_is_told(memos, chat):
    assert memos("forget", 1, "--preview")[1] == "Would forget 1 segment.\n"
    code, _, err = memos("forget", 1)
    assert (code, "--yes" in err) == (2, True)
    assert memos("forget", 1, "--yes")[1] == "Forgot 1 segment.\n"
    assert "Miso" not in memos("history")[1]
    assert memos("forget")[0] == 2
    assert json.loads(memos("forget", "--everything", "--yes", "--json")[1])["segments"] == 2


def test_doctor_finds_mends_and_says_so(memos, chat, tmp_path):
    import sqlite3

    assert memos("doctor")[0] == 0
    with sqlite3.connect(tmp_path / "memory.db") as raw:
        raw.execute("DELETE FROM lexical WHERE rowid = 1")
    raw.close()
    code, out, err = memos("doctor")
    assert (code, "1 FAULTY" in out, "--repair" in err) == (1, True, True)
    code, out, _ = memos("doctor", "--repair", "--json")
    assert code == 0
    assert json.loads(out)["found"]["missing_lexical"] == 1
    assert not any(json.loads(out)["remaining"].values())


def test_config_tells_where_each_value_comes_from(memos, monkeypatch):
    monkeypatch.setenv("MEMOS_BUDGET", "1000")
    shown = json.loads(memos("config", "--llm", "hf:x", "--json")[1])
    assert shown["budget"] == {"value": 1000, "source": "environment MEMOS_BUDGET"}
    assert shown["llm"] == {"value": "hf:x", "source": "flag"}
    assert shown["vectors"]["source"] == "default"
    assert "environment MEMOS_BUDGET" in memos("config")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["context", "x", "--budget", "3"], 1, "raise the budget"),
        (["context", " "], 1, "empty"),
        (["search", "x", "-n", "a//b"], 1, "namespace label ''"),
        (["search", "x", "--vectors", "faiss"], 1, "known: chroma, exact"),
        (["context", "x", "--controller", "nope"], 1, "known: alr2, auto, longmem-free, recency"),
        (["chat", "--llm", "nope"], 1, "unknown LLM 'nope'"),
        (["context", "x", "--llm", "nope", "--tokenizer", ""], 1, "unknown LLM 'nope'"),
        (["search", "x", "--store", "/no/such/folder/m.db"], 1, "create it first"),
        (["ingest", "/no/such/file"], 1, "No such file"),
        (["forget", "99", "--yes"], 1, "unknown segment '99'"),
        (["why"], 1, "no turn was answered"),
        (["why", "99"], 1, "unknown turn '99'"),
        (["import", __file__], 1, "line 1"),
        (["nope"], 2, "No such command"),
        (["search"], 2, "Missing argument"),
        (["search", "x", "-k", "0"], 2, "Invalid value"),
    ],
)
def test_a_mistake_is_one_clear_line_and_an_exit_code(memos, arguments, code, words):
    got, out, err = memos(*arguments)
    assert got == code
    assert words in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("command", ["history -k 2000", "export -"])
def test_a_reader_that_goes_away_is_no_error(memos, tmp_path, command):
    text = tmp_path / "long.txt"  # more than a pipe holds, so that the writer is still at it
    text.write_text("\n\n".join(f"{number} " + "words " * 180 for number in range(150)))
    assert memos("ingest", text)[0] == 0
    environment = {"MEMOS_STORE": str(tmp_path / "memory.db"), "MEMOS_EMBEDDER": "hash", "PATH": "/usr/bin:/bin"}
    script = f"set -o pipefail; '{MEMOS}' {command} | head -1"
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_ctrl_c_outside_a_chat_is_exit_code_130(tmp_path):
    environment = {"MEMOS_STORE": str(tmp_path / "memory.db"), "MEMOS_EMBEDDER": "hash", "PATH": ""}
    script = "import os, signal, sys\nfrom memory_os.cli import main\n"
    script += "main.sys.stdin = type('Stdin', (), {'__iter__': lambda self: os.kill(os.getpid(), signal.SIGINT)})()\n"
    script += "sys.argv = ['memos', 'import', '-']\nmain.run()"
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("debug", "shown"), [("", False), ("1", True)])
def test_a_bug_is_called_one_and_shows_where_only_when_asked(tmp_path, debug, shown):
    script = "from memory_os.cli import main\nmain.app = lambda: 1 / 0\nmain.run()"
    environment = {"MEMOS_DEBUG": debug, "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert ("Traceback" in result.stderr) is shown
    assert ("This is a bug in memory_os" in result.stderr) is not shown


def test_stored_text_and_names_are_neither_markup_nor_escapes(memos, chat, tmp_path, monkeypatch):
    hostile = tmp_path / "hostile.json"
    hostile.write_text(json.dumps([{"role": "user", "content": "[bold]x[/] \x1b[31m red \x1b]0;title\x07"}]))
    assert memos("ingest", hostile, "-n", "hostile")[0] == 0
    shown = memos("history", "-n", "hostile")[1] + memos("search", "red", "-n", "hostile")[1]
    assert shown.count("[bold]x[/]") == 2
    assert "\x1b" not in shown
    assert "\x1b[31m" in json.loads(memos("history", "-n", "hostile", "--json")[1])[0]["text"]
    monkeypatch.chdir(tmp_path)
    assert memos("export", "[a].jsonl")[1] == "Wrote 3 segments to [a].jsonl.\n"


def test_a_label_may_hold_a_slash(memos, chat):
    memos("ingest", chat, "-n", r"acme/a\/b")
    assert json.loads(memos("stats", "--json")[1])["namespaces"] == [r"acme/a\/b", "default"]
    assert json.loads(memos("stats", "-n", r"acme/a\/b", "--json")[1])["segments"] == 3
    assert json.loads(memos("stats", "-n", "acme/a/b", "--json")[1])["segments"] == 0


@pytest.mark.slow
def test_ask_answers_from_a_file_that_is_not_stored(memos, tmp_path):
    told = [f"In room {number} there is a chair and a table." for number in range(60)]
    told.insert(30, "The code of the wine cellar is 4812.")
    (tmp_path / "house.txt").write_text("\n".join(told))
    arguments = [tmp_path / "house.txt", "What is the code of the wine cellar?", "--segment-tokens", "64", "--budget"]
    code, out, err = memos("ask", *arguments, "400", "--show")
    assert code == 0
    assert "The code of the wine cellar is 4812." in out
    assert "ranked by hybrid" in err
    code, out, _ = memos("ask", *arguments, "400", "--json")
    answer = json.loads(out)
    assert set(answer) == {"text", "passages", "notes", "account"}
    assert {"start", "end", "entropy", "question_nll", "text"} <= set(answer["passages"][0])
    assert answer["account"]["total"] <= 400
    assert json.loads(memos("stats", "--json")[1])["segments"] == 0
    assert memos("ask", tmp_path / "nowhere.txt", "What?")[0] == 1
    assert memos("ask", *arguments, "400", "--score", "likelihood")[0] == 1
