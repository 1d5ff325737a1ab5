"""Settings: flag before environment before file before default, and one clear error for each mistake."""

import pytest

from memory_os.config import config_path, format_labels, load, parse_labels
from memory_os.errors import ConfigError
from memory_os.turn import Options


def test_flag_wins_over_environment_over_file_over_default(monkeypatch):
    config_path().write_text('budget = 100\nllm = "from-file"\nnamespace = "from/file"\n')
    monkeypatch.setenv("MEMOS_BUDGET", "200")
    monkeypatch.setenv("MEMOS_LLM", "from-environment")
    settings, origins = load({"budget": 300, "llm": None})
    assert (settings.budget, origins["budget"].source) == (300, "flag")
    assert (settings.llm, origins["llm"].source) == ("from-environment", "environment MEMOS_LLM")
    assert (settings.labels, origins["namespace"].source) == (("from", "file"), f"file {config_path()}")
    assert (settings.reply_tokens, origins["reply_tokens"].source) == (Options().reply_tokens, "default")


@pytest.mark.parametrize(
    ("file", "environment", "words"),
    [
        ("budget = ", {}, "cannot read the configuration file"),
        ("bugdet = 3", {}, "'bugdet' is not a setting; known: .*budget"),
        ("budget = 'many'", {}, "file .*: budget = 'many': .*integer"),
        ("", {"MEMOS_BUDGET": "many"}, "environment MEMOS_BUDGET: budget = 'many'"),
        ("", {"MEMOS_BUGDET": "3"}, "environment MEMOS_BUGDET: 'bugdet' is not a setting"),
    ],
)
def test_a_mistake_names_its_place(monkeypatch, file, environment, words):
    config_path().write_text(file)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        load({})


@pytest.mark.parametrize(
    "labels", [("default",), ("acme", "alice"), ("a/b",), ("a\\", "b"), ("\\/", "/\\"), ("C:\\memory", "猫"), ("", "")]
)
def test_any_label_can_be_written_in_a_namespace(labels):
    assert parse_labels(format_labels(labels)) == labels


def test_a_namespace_without_escapes_is_split_at_slashes():
    settings, _ = load({"namespace": r"acme/team a\/b"})
    assert settings.labels == ("acme", "team a/b")
