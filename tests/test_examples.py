"""Labelled examples in the bank: what is stored, which are used, and that they enter as keys and values alone."""

import asyncio
import math
import re
from collections.abc import Iterator, Sequence

import pytest
import torch

from memory_os import AsyncMemory, Memory
from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.benchmarks import icl
from memory_os.errors import BudgetError, CapabilityError, ConfigError, InvalidInputError, LLMError
from memory_os.protocols import KV, CachingLLM
from memory_os.types import BankOptions, CachedPrompt

LABELS = ("negative", "positive")
REVIEWS = [
    ("a stirring , funny and finally transporting film", "positive"),
    ("one long string of cliches", "negative"),
    ("a gorgeous , witty , seductive movie", "positive"),
    ("dull , lifeless and far too long", "negative"),
    ("the best thriller of the year", "positive"),
    ("a thriller without a single thrill", "negative"),
]


class WordLLM(ScriptedLLM):
    """A caching LLM whose tokens are words: the likeliest label is the one that its memory holds most often.

    It knows of the memory what its keys and values say, and remembers what it was asked to do. It may lean to a label
    (nats), by which alone it goes where a text says nothing.
    """

    def search_layer(self):
        return 0

    def __init__(self, *, context_window: int = 8192) -> None:
        super().__init__([], context_window=context_window)
        self.encoded: list[str] = []
        self.asked: list[tuple[CachedPrompt, int]] = []
        self.fails_after = math.inf
        self.leaning = dict.fromkeys(LABELS, 0.0)
        self._words: list[str] = []

    def _ids(self, text: str) -> tuple[int, ...]:
        words = re.findall(r"\w+|[^\w\s]", text)
        self._words += [word for word in dict.fromkeys(words) if word not in self._words]
        return tuple(map(self._words.index, words))

    def kv_fingerprint(self, prompt: CachedPrompt) -> str:
        return f"words after {prompt.system}{prompt.opening}"

    def encode_kv(self, prompt: CachedPrompt, *, surprisal: bool = False) -> Iterator[KV]:
        for line in prompt.lines:
            if len(self.encoded) >= self.fails_after:
                raise LLMError(self.name, "out of order")
            self.encoded.append(line)
            ids = self._ids(line)
            values = torch.tensor(ids, dtype=torch.float16)[None, None, :, None].repeat(1, 1, 1, 4)
            yield KV(ids, torch.ones_like(values), values)

    def query_keys(self, text, layer):
        raise AssertionError("examples are found by their vectors")

    def count_cached(self, prompt: CachedPrompt) -> int:
        return sum(map(self.count_text, (*prompt.lines, prompt.messages[0]["content"] if prompt.messages else "")))

    def generate_cached(self, prompt, memory, *, max_tokens, stop=()):
        raise AssertionError("a label is not generated")

    def continuations(self, prompt: CachedPrompt, memory: Sequence[KV], texts: Sequence[str]) -> list[float]:
        assert [kv.ids for kv in memory] == [self._ids(line) for line in prompt.lines]
        if self.count_cached(prompt) + max(map(self.count_text, texts)) > self.context_window:
            raise LLMError(self.name, "over its context window")
        self.asked.append((prompt, len(memory)))
        # from the values, not the ids: whoever spoils them sees it
        known = [self._words[int(number)] for kv in memory for number in kv.values[0, 0, :, 0].tolist()]
        if "N/A" in prompt.messages[0]["content"]:
            known = []
        return [math.log(1 + known.count(text.strip())) + self.leaning.get(text.strip(), 0.0) for text in texts]


@pytest.fixture
def llm():
    return WordLLM()


@pytest.fixture
def memory(tmp_path, llm):
    with Memory.open(tmp_path / "memory.db", llm=llm, embedder="hash") as opened:
        yield opened


def reviews(memory, *labels, k=20, names=("Review", "Sentiment")):
    return memory.namespace(*(labels or ("reviews",))).examples(*names, labels=LABELS, k=k)


def entries(memory, *labels):
    return memory.namespace(*(labels or ("reviews",))).bank_status().n_segments


def test_the_fake_is_a_caching_llm(llm):
    assert isinstance(llm, CachingLLM)


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_an_example_is_stored_once_as_it_will_stand_in_the_prompt(memory):
    examples = reviews(memory)
    [first, second] = examples.add(REVIEWS[:2])
    assert first.text == "Review: a stirring , funny and finally transporting film\nSentiment: positive"
    assert (first.kind, first.role, first.metadata) == ("note", "user", {"label": "positive"})
    assert first.session == second.session == examples.session
    assert examples.add([*REVIEWS[:3], REVIEWS[2], (f" {REVIEWS[0][0]}\n", "positive")]) == [
        memory.namespace("reviews").history(1)[0]
    ]
    assert [s.seq for s in memory.namespace("reviews").history()] == [1, 2, 3]


def test_the_same_text_may_have_another_label_and_another_task(memory):
    reviews(memory).add(REVIEWS[:1])
    assert len(reviews(memory).add([(REVIEWS[0][0], "negative")])) == 1
    assert len(reviews(memory, names=("Text", "Sentiment")).add(REVIEWS[:1])) == 1
    assert len(reviews(memory, "others").add(REVIEWS[:1])) == 1
    # the same letters, of two tasks
    one = memory.namespace("reviews").examples("Review", "Verdict", labels=("so: good", "so: bad"))
    other = memory.namespace("reviews").examples("Review", "Verdict: so", labels=("good", "bad"))
    assert len(one.add([("fine", "so: good")])) == len(other.add([("fine", "good")])) == 1


@pytest.mark.parametrize(
    ("text", "label", "says"),
    [("fine", "neutral", "unknown label 'neutral'; the labels are negative, positive"), (" \n", "positive", "empty")],
)
def test_what_cannot_be_an_example_is_refused_with_nothing_stored(memory, text, label, says):
    with pytest.raises(InvalidInputError, match=says):
        reviews(memory).add([*REVIEWS, (text, label)])
    assert memory.namespace("reviews").history() == []


@pytest.mark.parametrize(
    ("names", "labels", "k", "says"),
    [
        (("Review", "Sentiment"), ("positive",), 20, "at least two labels"),
        (("Review", "Sentiment"), ("positive", "positive"), 20, "each once"),
        (("Review", "Sentiment"), "yes", 20, "at least two labels, each once, not 'yes'"),
        (("Review", "Senti\nment"), LABELS, 20, "one line"),
        (("", "Sentiment"), LABELS, 20, "one line"),
        (("Review", "Sentiment"), (" positive", "negative"), 20, "without blanks around it"),
        (("Review", "Sentiment"), LABELS, -1, "k must not be negative"),
    ],
)
def test_names_and_labels_that_cannot_be_used_are_refused(memory, names, labels, k, says):
    with pytest.raises(ConfigError, match=says):
        memory.namespace("reviews").examples(*names, labels=labels, k=k)


@pytest.mark.parametrize("llm", [None, ScriptedLLM(["positive"])], ids=["none", "without keys and values"])
def test_an_llm_without_keys_and_values_is_refused(tmp_path, llm):
    with (
        Memory.open(tmp_path / "memory.db", llm=llm, embedder="hash") as memory,
        pytest.raises(CapabilityError, match="'examples' needs an LLM with CachingLLM"),
    ):
        reviews(memory)


# -- which are used ----------------------------------------------------------------------------------------------------


def test_the_nearest_examples_are_used_in_the_order_of_seq(memory, llm):
    examples = reviews(memory, k=2)
    examples.add(REVIEWS)
    prediction = examples.classify("the best thriller without a thrill")
    assert [s.seq for s in prediction.examples] == [5, 6]
    (prompt, n_memory), _ = llm.asked
    assert prompt == CachedPrompt(
        "",
        "",
        tuple(f"{segment.text}\n\n" for segment in prediction.examples),
        ({"role": "user", "content": "Review: the best thriller without a thrill\nSentiment:"},),
        plain=True,
    )
    assert n_memory == 2


def test_the_likeliest_label_is_predicted_and_of_equals_the_first(memory):
    examples = reviews(memory, k=1)
    examples.add(REVIEWS)
    for text, label in REVIEWS:
        prediction = examples.classify(text)
        assert prediction.label == label
        assert prediction.log_probs[label] == max(prediction.log_probs.values()) == pytest.approx(math.log(2 / 3))
        assert sum(map(math.exp, prediction.log_probs.values())) == pytest.approx(1)
    assert list(prediction.log_probs) == list(LABELS)
    assert reviews(memory, k=2).classify("the best thriller without a thrill").label == "negative"


def test_without_examples_the_label_is_the_llms_own(memory):
    prediction = reviews(memory).classify("fine")
    assert (prediction.examples, prediction.label) == ((), "negative")
    assert prediction.n_tokens == len("Review : fine Sentiment :".split())
    examples = reviews(memory, k=0)
    examples.add(REVIEWS)
    assert examples.classify("fine").examples == ()


def test_only_the_tasks_own_examples_are_used_though_others_are_nearer(memory, llm):
    scope = memory.namespace("reviews")
    examples = reviews(memory, k=2)
    nearer = "Review: dull , lifeless and far too long\nSentiment: positive"
    for n in range(40):
        scope.add(f"{nearer} {n}")
    scope.session(examples.session).add(f"{nearer}, says a turn of the session", metadata={"label": "positive"})
    memory.namespace("others").examples("Review", "Sentiment", labels=LABELS).add([(REVIEWS[3][0], "positive")])
    reviews(memory, names=("Text", "Mood")).add([(REVIEWS[3][0], "positive")])
    wider = scope.examples("Review", "Sentiment", labels=(*LABELS, "mixed"))
    wider.add([(REVIEWS[3][0], "mixed")])
    examples.add(REVIEWS[:4])
    prediction = examples.classify(REVIEWS[3][0])
    assert len(prediction.examples) == 2
    assert {(s.text, s.namespace) for s in prediction.examples} <= {
        (f"Review: {text}\nSentiment: {label}", ("reviews",)) for text, label in REVIEWS[:4]
    }
    assert f"Review: {REVIEWS[3][0]}\nSentiment: negative" in {s.text for s in prediction.examples}


def test_what_was_forgotten_is_used_no_more(memory):
    examples = reviews(memory, k=1)
    examples.add(REVIEWS)
    examples.fill()
    [used] = examples.classify(REVIEWS[3][0]).examples
    memory.namespace("reviews").forget(used.id)
    assert used not in examples.classify(REVIEWS[3][0]).examples
    assert entries(memory) == len(REVIEWS) - 1


# -- the budget --------------------------------------------------------------------------------------------------------


def test_the_prompt_is_never_over_the_budget(memory, llm):
    examples = reviews(memory)
    examples.add(REVIEWS)
    text = "a gorgeous , witty , seductive movie"
    alone = llm.count_text(f"Review: {text}\nSentiment:")
    sizes = []
    for budget in range(alone, 120, 4):
        for calibrate in (False, True):
            prediction = examples.classify(text, budget=budget, calibrate=calibrate)
            assert prediction.n_tokens <= budget
            assert prediction.n_tokens == max(llm.count_cached(prompt) for prompt, _ in llm.asked[-1 - calibrate :])
        sizes.append(len(prediction.examples))
    assert (sizes[0], sizes[-1]) == (0, len(REVIEWS))
    with pytest.raises(BudgetError) as caught:
        examples.classify(text, budget=alone - 1)
    assert (caught.value.limit, caught.value.needed) == (alone - 1, alone)


def test_a_text_shorter_than_one_that_says_nothing_is_calibrated_within_the_budget(memory, llm):
    examples = reviews(memory)
    examples.add(REVIEWS)
    for budget in range(7, 60, 3):
        examples.classify("no", budget=budget)
        assert max(llm.count_cached(prompt) for prompt, _ in llm.asked[-2:]) <= budget


def test_the_nearest_that_fit_enter_and_one_that_is_too_long_does_not_end_it(memory, llm):
    examples = reviews(memory)
    long = f"a gorgeous , witty , seductive movie {'and a gorgeous movie ' * 20}"
    examples.add([*REVIEWS, (long, "positive")])
    budget = 2 * llm.count_text("Review: a gorgeous , witty , seductive movie\nSentiment: positive")
    used = examples.classify("a gorgeous , witty , seductive movie", budget=budget).examples
    assert [s.text for s in used] == ["Review: a gorgeous , witty , seductive movie\nSentiment: positive"]


def test_the_context_window_bounds_what_enters(tmp_path):
    llm = WordLLM(context_window=64)
    with Memory.open(tmp_path / "memory.db", llm=llm, embedder="hash") as memory:
        examples = reviews(memory)
        examples.add([*REVIEWS, ("long " * 100, "positive")])
        assert examples.fill() == len(REVIEWS)
        for budget in (None, 1000):
            prediction = examples.classify("a thriller", budget=budget)
            assert 0 < prediction.n_tokens < 64


# -- the bank ----------------------------------------------------------------------------------------------------------


def test_after_fill_nothing_is_computed_again(memory, llm, tmp_path):
    examples = reviews(memory)
    memory.namespace("reviews").add("no example")
    memory.namespace("reviews").session(examples.session).add("a turn", metadata={"label": "positive"})
    examples.add(REVIEWS)
    seen = []
    assert examples.fill(lambda done, total: seen.append((done, total))) == len(REVIEWS) == entries(memory)
    assert seen == [(6, 6)]
    assert sorted(llm.encoded) == sorted(f"Review: {text}\nSentiment: {label}\n\n" for text, label in REVIEWS)
    llm.encoded.clear()
    assert examples.fill() == 0
    for text, _ in REVIEWS:
        assert len(examples.classify(text).examples) == len(REVIEWS)
    assert llm.encoded == []


def test_classify_computes_what_is_missing_and_keeps_it(memory, llm):
    examples = reviews(memory, k=2)
    examples.add(REVIEWS)
    examples.classify(REVIEWS[0][0])
    assert len(llm.encoded) == entries(memory) == 2
    examples.classify(REVIEWS[0][0])
    assert len(llm.encoded) == 2
    assert examples.fill() == len(REVIEWS) - 2


def test_fill_keeps_to_the_banks_bound_and_takes_the_newest(tmp_path, llm):
    with Memory.open(tmp_path / "memory.db", llm=llm, embedder="hash", bank=BankOptions(max_tokens=30)) as memory:
        examples = reviews(memory)
        examples.add(REVIEWS)
        examples.fill()
        assert set(llm.encoded) == {f"Review: {text}\nSentiment: {label}\n\n" for text, label in REVIEWS[-2:]}
        assert examples.fill() == 0
        assert len(examples.classify("a thriller").examples) == len(REVIEWS)


def test_fill_that_fails_says_so_and_goes_on_where_it_was(memory, llm):
    examples = reviews(memory)
    examples.add([(f"{'word ' * 500} {n}", "positive") for n in range(20)])
    llm.fails_after = 10
    with pytest.raises(LLMError, match="out of order"):
        examples.fill()
    kept = entries(memory)
    assert 0 < kept < 20
    llm.fails_after = math.inf
    assert examples.fill() == 20 - kept


def test_what_is_in_the_bank_is_what_is_read(memory, llm):
    """A text that was read again in secret would give the label that it says."""
    examples = reviews(memory, k=1)
    examples.add(REVIEWS)
    [used] = examples.classify(REVIEWS[0][0]).examples
    bank, fingerprint = memory.parts.bank, examples._bank.fingerprint
    [kv] = bank.get(("reviews",), fingerprint, [used.id]).values()
    [negative] = llm._ids("negative")
    swapped = torch.full_like(kv.values, negative)
    bank.put(("reviews",), fingerprint, {used.id: KV(kv.ids, kv.keys, swapped)}, 0)
    assert examples.classify(REVIEWS[0][0]).label == "negative"


def test_calibration_counts_what_a_label_has_gained(memory, llm):
    examples = reviews(memory, k=1)
    examples.add(REVIEWS)
    unbiased = examples.classify(REVIEWS[0][0], calibrate=False)
    llm.leaning["negative"] = 5.0
    for text, label in REVIEWS:
        assert examples.classify(text, calibrate=False).label == "negative"
        assert examples.classify(text).label == label
    assert examples.classify(REVIEWS[0][0]).log_probs == pytest.approx(unbiased.log_probs)
    assert llm.asked[-1][0].messages[0]["content"] == "Review: N/A\nSentiment:"


def test_asyncio_has_the_same_verbs(tmp_path, llm):
    async def main():
        async with AsyncMemory.open(tmp_path / "memory.db", llm=llm, embedder="hash") as memory:
            examples = memory.namespace("reviews").examples("Review", "Sentiment", labels=LABELS, k=1)
            assert len(await examples.add(REVIEWS)) == await examples.fill() == len(REVIEWS)
            return await examples.classify(REVIEWS[4][0])

    assert asyncio.run(main()).label == "positive"


# -- with a real model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    return HuggingFaceLLM("smollm2", dtype="float32")


@pytest.fixture
def real(tmp_path, smollm2):
    with Memory.open(tmp_path / "memory.db", llm=smollm2) as opened:
        examples = reviews(opened, k=4)
        examples.add(REVIEWS)
        yield opened, examples


def read_as_text(llm, prediction, text):
    """Log-probabilities of the labels, among the labels, after an ordinary prefill of the same prompt."""
    shown = "".join(f"{segment.text}\n\n" for segment in prediction.examples)
    prompt = CachedPrompt("", shown, (), ({"role": "user", "content": f"Review: {text}\nSentiment:"},), plain=True)
    likely = llm.continuations(prompt, (), [f" {label}" for label in LABELS])
    among = math.log(sum(map(math.exp, likely)))
    return {label: each - among for label, each in zip(LABELS, likely, strict=True)}


def divergence(one, other):
    """Kullback-Leibler, nats."""
    return sum(math.exp(one[label]) * (one[label] - other[label]) for label in LABELS)


@pytest.mark.slow
def test_one_cached_example_is_as_good_as_read(real, smollm2):
    memory, _ = real
    for text in ("a thriller that thrills", "dull and long , with cliches"):
        prediction = reviews(memory, k=1).classify(text, calibrate=False)
        read = read_as_text(smollm2, prediction, text)
        assert len(prediction.examples) == 1
        assert divergence(read, prediction.log_probs) < 1e-5
        assert prediction.log_probs == pytest.approx(read, abs=0.005)
        assert divergence(read, reviews(memory, k=0).classify(text, calibrate=False).log_probs) > 1e-3


@pytest.mark.slow
def test_the_count_is_what_smollm2_attends_to(real, smollm2):
    _, examples = real
    prediction = examples.classify("a thriller that thrills")
    assert len(prediction.examples) == 4
    lines = "".join(f"{segment.text}\n\n" for segment in prediction.examples)
    whole = smollm2.count_text(f"{lines}Review: a thriller that thrills\nSentiment:")
    # line by line a break of two lines is one token, and the text has something to begin with
    assert prediction.n_tokens == whole + 1 - len(prediction.examples)


@pytest.mark.slow
def test_spoilt_values_in_the_bank_change_what_smollm2_says(real):
    memory, examples = real
    before = examples.classify("a thriller that thrills", calibrate=False)
    bank, fingerprint = memory.parts.bank, examples._bank.fingerprint
    found = bank.get(("reviews",), fingerprint, [segment.id for segment in before.examples])
    spoilt = {id_: KV(kv.ids, kv.keys, torch.zeros_like(kv.values)) for id_, kv in found.items()}
    bank.put(("reviews",), fingerprint, spoilt, 0)
    after = examples.classify("a thriller that thrills", calibrate=False)
    assert (after.examples, after.n_tokens) == (before.examples, before.n_tokens)
    assert divergence(before.log_probs, after.log_probs) > 1e-2


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_the_benchmark_reads_the_data_and_fills_the_same_window(tmp_path):
    path = tmp_path / "data.tsv"
    rows = [(f"film {n} is {word}", label) for n in range(20) for label, word in ((0, "dull"), (1, "fine"))]
    path.write_text("sentence\tlabel\n" + "".join(f'"{text} \t{label}\n' for text, label in rows), encoding="utf-8")
    data = icl.read_tsv(path)
    assert data[0] == ('"film 0 is dull', "negative")
    report = icl.measure(
        data, data[:10], llm=WordLLM(), embedder=HashEmbedder(), n_stored=40, limit=8, ks=(0, 4), folder=tmp_path
    )
    assert list(report["systems"]) == ["text 0", "text 4", "cached 4", "bank", "bank as text", "neighbours"]
    own = report["systems"]["bank"]["plain"]
    assert own["n"] == report["n_queries"] == 8
    assert own["low"] <= own["accuracy"] <= own["high"]
    assert own["bank_gain"] == 0.0
    assert report["bank"]["examples"] <= 4
    assert report["bank"]["prompt_tokens"] <= report["window_tokens"] + 9
    path.write_text("sentence\tlabel\nfine\tgood\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="line 2"):
        icl.read_tsv(path)
