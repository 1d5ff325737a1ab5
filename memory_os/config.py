"""Settings of the command line: flag, then environment (``MEMOS_*``), then one TOML file, then default.

The SDK reads none of this: ``Memory.open`` takes what it is given.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from platformdirs import user_config_dir, user_data_dir
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from memory_os.address import DatabaseUrl
from memory_os.errors import ConfigError
from memory_os.limits import is_storable
from memory_os.turn import Options
from memory_os.types import BankOptions

__all__ = ["Origin", "Settings", "config_path", "format_labels", "load", "parse_labels", "without_secrets"]

PREFIX = "MEMOS_"
OTHER_VARIABLES = {"MEMOS_CONFIG", "MEMOS_CACHE_DIR", "MEMOS_DEBUG", "MEMOS_LOG_JSON"}
DEFAULTS = Options()
BANK = BankOptions()


def parse_labels(text: str) -> tuple[str, ...]:
    r"""Give back the labels of a namespace written with ``/`` between them; ``\/`` is a slash, ``\\`` a backslash.

    >>> parse_labels(r"acme/team a\/b")
    ('acme', 'team a/b')
    """
    labels = [""]
    for piece in re.split(r"(\\[\\/]|/)", text):
        if piece == "/":
            labels.append("")
        else:
            labels[-1] += piece[1] if piece in (r"\/", r"\\") else piece
    return tuple(labels)


def format_labels(labels: Iterable[str]) -> str:
    """The labels as ``parse_labels`` reads them, so that what is shown can be typed."""
    return "/".join(label.replace("\\", r"\\").replace("/", r"\/") for label in labels)


def _address(value: object) -> object:
    """A URL as such: as a path it would lose a slash, and be shown with its password."""
    if not isinstance(value, str) or "://" not in value:
        return value
    return value.removeprefix("sqlite://") if value.startswith("sqlite:///") else DatabaseUrl(value)


def without_secrets(value: object) -> str:
    """A setting as it may be shown: what a URL holds before ``@`` is left out.

    >>> without_secrets("chroma+https://:abc@host:443")
    'chroma+https://***@host:443'
    """
    return re.sub(r"://[^/@?#]*@", "://***@", str(value))


class Settings(BaseSettings):
    """Everything that a command can be told; ``memos config`` lists it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid")

    store: Annotated[Path | DatabaseUrl, BeforeValidator(_address)] = Field(
        default_factory=lambda: Path(user_data_dir("memory_os")) / "memory.db"
    )
    namespace: str = "default"
    session: str | None = None
    llm: str = "smollm2"
    embedder: str = "minilm"
    vectors: str = Field("exact", repr=False)  # may hold the token of a server
    controller: str = "auto"
    tokenizer: str | None = None
    budget: int = DEFAULTS.budget
    reply_tokens: int = DEFAULTS.reply_tokens
    flash_turns: int = DEFAULTS.flash_turns
    system: str = DEFAULTS.system
    retention_days: float | None = None
    redact: bool = False
    derive: Literal["here", "workers"] = "here"
    max_pending: int | None = None
    telemetry: bool = False
    bank_tokens: int = BANK.max_tokens
    bank_mb: int = BANK.max_bytes // 1_000_000
    bank_policy: Literal["fifo", "lru", "surprisal"] = BANK.policy
    bank_dtype: Literal["float16", "int8"] = BANK.dtype
    bank_resident_mb: int = BANK.resident_bytes // 1_000_000

    @property
    def bank(self) -> BankOptions:
        """How the bank of cached keys and values is kept.

        :raises ConfigError: for bounds that cannot be.
        """
        return BankOptions(
            max_tokens=self.bank_tokens,
            max_bytes=self.bank_mb * 1_000_000,
            policy=self.bank_policy,
            dtype=self.bank_dtype,
            resident_bytes=self.bank_resident_mb * 1_000_000,
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The namespace's labels: ``acme/alice`` is two of them."""
        return parse_labels(self.namespace)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what ``load`` hands over: it has read flags, environment and file, and knows where each came from."""
        return (init_settings,)


class Origin(NamedTuple):
    """A setting's value, and where it comes from."""

    value: Any
    source: str


def config_path() -> Path:
    """The configuration file: ``MEMOS_CONFIG``, or ``config.toml`` in the user's configuration folder."""
    return Path(os.environ.get("MEMOS_CONFIG") or Path(user_config_dir("memory_os")) / "config.toml").expanduser()


def load(flags: Mapping[str, Any]) -> tuple[Settings, dict[str, Origin]]:
    """The settings, and the origin of each.

    :param flags: values given on the command line; ``None`` is not given.
    :raises ConfigError: for a value that cannot be used, a name that is no setting, or a file that is not TOML.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, given in ((f"file {config_path()}", _file()), ("environment", _environment()), ("flag", flags)):
        for name, value in given.items():
            if name not in Settings.model_fields:
                known = ", ".join(Settings.model_fields)
                raise ConfigError(f"{_place(source, name)}: {name!r} is not a setting; known: {known}")
            if value is not None:
                values[name] = value
                sources[name] = _place(source, name)
    for name, value in values.items():
        if isinstance(value, str) and not is_storable(value):
            problem = "holds a NUL or bytes that are no UTF-8; write it anew"
            raise ConfigError(f"{sources[name]}: {name} = {value!r} {problem}")
    try:
        settings = Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(f"{sources[name]}: {name} = {values[name]!r}: {first['msg']}") from error
    return settings, {
        name: Origin(getattr(settings, name), sources.get(name, "default")) for name in Settings.model_fields
    }


def _place(source: str, name: str) -> str:
    return f"environment {PREFIX}{name.upper()}" if source == "environment" else source


def _environment() -> dict[str, str]:
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in os.environ.items()
        if name.startswith(PREFIX) and name not in OTHER_VARIABLES
    }


def _file() -> dict[str, Any]:
    path = config_path()
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8, no TOML, or a number or a nesting beyond it
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
