"""What every test gets: no network, no telemetry, nothing of the developer's own settings."""

import os

# before anything imports a model library
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ANONYMIZED_TELEMETRY"] = "False"

from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty configuration; only the cache of converted models is shared with other runs."""
    for name in [name for name in os.environ if name.startswith("MEMOS_") and name != "MEMOS_CACHE_DIR"]:
        monkeypatch.delenv(name)
    folder = tmp_path_factory.mktemp("settings")
    config = folder / "config.toml"
    config.touch()
    monkeypatch.setenv("MEMOS_CONFIG", str(config))
    for place in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(place, str(folder / place))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The project's real conversations and books, which lie next to the checkout and not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data, and {folder} is not there")
    return folder
