"""Attention over remembered keys and values: against references written out here, on random models and the real one."""

import json
from dataclasses import replace
from inspect import signature

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.joint import (
    SMOLLM2_GATES,
    GatedMemory,
    Gates,
    LayerMemory,
    encode,
    merged,
    weights_fingerprint,
)
from memory_os.errors import CapabilityError, ConfigError
from memory_os.protocols import KV

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
TEXT = list(range(10, 47))
BOTH = (0, 1)


def random_model(config_class=LlamaConfig, model_class=LlamaForCausalLM, **sizes):
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **sizes})).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.normal_(std=0.25)  # as they are made, all attention is nearly uniform
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def kvs(model):
    torch.manual_seed(1)
    return [encode(model, torch.randint(1, 100, (n,)).tolist(), after=[0]) for n in (13, 6, 1)]


@pytest.fixture(scope="module")
def smollm2():
    return HuggingFaceLLM(dtype="float32")


def logits(model, ids=TEXT, **more):
    with torch.no_grad():
        return model(torch.tensor([ids]), **more).logits[0]


def fixed(model, start, layers=BOTH, **more):
    return Gates.untrained(model, layers, start=start, **more)


def with_cache(model, cache=None):
    """The cache as an argument: transformers 5.24 has renamed it, and warns of the old name."""
    name = "cache" if "cache" in signature(model.model.forward).parameters else "past_key_values"
    return {name: DynamicCache(config=model.config) if cache is None else cache}


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_two_attentions_merge_into_the_softmax_over_both():
    torch.manual_seed(0)
    scores, values = torch.randn(3, 5, 12) * 4, torch.randn(3, 12, 8)
    (s_a, s_r), (v_a, v_r) = scores.split([7, 5], dim=2), values.split([7, 5], dim=1)
    both = merged(s_a.softmax(-1) @ v_a, s_a.logsumexp(-1), s_r.softmax(-1) @ v_r, s_r.logsumexp(-1))
    torch.testing.assert_close(both, scores.softmax(-1) @ values, atol=1e-5, rtol=0)
    far = merged(torch.zeros(1, 2), torch.tensor([-500.0]), torch.ones(1, 2), torch.tensor([500.0]))
    assert far.tolist() == [[1.0, 1.0]]


def random_memory(lengths=(9, 4, 2, 7), heads=2, size=8):
    torch.manual_seed(2)
    made = [(torch.randn(3, heads, n, size), torch.randn(3, heads, n, size)) for n in lengths]
    return [KV(tuple(range(k.shape[2])), k, v) for k, v in made]


def chunks_by_hand(kvs, layer, head, size=4):
    """``(keys, values)`` of each chunk, in order."""
    return [
        (kv.keys[layer, head, start : start + size], kv.values[layer, head, start : start + size])
        for kv in kvs
        for start in range(0, len(kv.ids), size)
    ]


@pytest.mark.parametrize("k", [1, 3, 7, 50])
def test_search_and_attention_are_those_of_a_plain_loop(k):
    kvs = random_memory()
    memory = LayerMemory(kvs, 1, 4, torch.float32, torch.device("cpu"))
    queries, looked_for = torch.randn(6, 5, 8), torch.randn(2, 5, 8)  # 6 heads share 2 KV heads
    found = memory.search(looked_for, k)
    read, log_sum_exp = memory.attend(queries, found, 0.3)
    for head in range(6):
        chunks = chunks_by_hand(kvs, 1, head // 3)
        assert len(chunks) == 3 + 1 + 1 + 2  # no chunk spans two texts
        for token in range(5):
            scores = [float(looked_for[head // 3, token] @ keys.mean(0)) for keys, _ in chunks]
            best = sorted(range(len(chunks)), key=lambda i: -scores[i])[:k]
            assert set(found[head // 3, token].tolist()) == set(best)
            keys, values = (torch.cat([chunks[i][which] for i in best]) for which in (0, 1))
            own = keys @ queries[head, token] * 0.3
            torch.testing.assert_close(read[head, token], own.softmax(0) @ values, atol=1e-5, rtol=0)
            torch.testing.assert_close(log_sum_exp[head, token], own.logsumexp(0), atol=1e-5, rtol=0)


def test_keys_and_values_are_those_before_rotation(model):
    """At position 0 nothing is rotated: there the model's own cache holds the same."""
    kv = encode(model, TEXT)
    assert kv.keys.shape == kv.values.shape == (2, 2, len(TEXT), 8)
    cache = DynamicCache(config=model.config)
    logits(model, **with_cache(model, cache))
    for layer in range(2):
        torch.testing.assert_close(kv.keys[layer, :, 0], cache.layers[layer].keys[0, :, 0])
        torch.testing.assert_close(kv.values[layer], cache.layers[layer].values[0])
    assert not torch.allclose(kv.keys[0, :, 1], cache.layers[0].keys[0, :, 1], atol=1e-3)
    behind = encode(model, TEXT[3:], after=TEXT[:3])
    assert behind.ids == tuple(TEXT[3:])
    torch.testing.assert_close(behind.values, kv.values[:, :, 3:], atol=1e-5, rtol=1e-5)


# -- inside a model ----------------------------------------------------------------------------------------------------


def reference(model, kvs, ids, distance, k_chunks, share=None):
    """The model's logits, written out, with memory in both layers."""
    n, x = len(ids), model.model.embed_tokens(torch.tensor(ids))
    theta = 10000.0 ** (-torch.arange(0, 8, 2) / 8)

    def turned(x, positions):
        angles = torch.outer(positions.float(), theta)
        (a, b), cos, sin = x.chunk(2, dim=-1), angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def unseen(queries, chunks):
        """Which remembered tokens are in none of the best chunks, by the mean query that is not rotated."""
        means = torch.stack([keys.mean(0) for keys, _ in chunks])
        best = (queries.mean(1) @ means.T).topk(min(k_chunks, len(chunks))).indices
        owner = torch.tensor([i for i, (keys, _) in enumerate(chunks) for _ in keys])
        return torch.tensor([[int(i) not in row for i in owner] for row in best.tolist()])

    for number, layer in enumerate(model.model.layers):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        outs = []
        for head in range(4):
            shared = slice(8 * (head // 2), 8 * (head // 2) + 8)  # two heads share a KV head
            queries = (h @ attention.q_proj.weight.T).view(n, 4, 8)
            q, k, v = queries[:, head], (h @ attention.k_proj.weight.T)[:, shared], attention.v_proj(h)[:, shared]
            local = turned(q, torch.arange(n)) @ turned(k, torch.arange(n)).T / 8**0.5
            local = local.masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf)
            chunks = chunks_by_hand(kvs, number, head // 2)
            keys, values = (torch.cat(parts) for parts in zip(*chunks, strict=True))
            remembered = turned(q, torch.full((n,), distance)) @ keys.T / 8**0.5
            remembered[unseen(queries[:, 2 * (head // 2) : 2 * (head // 2) + 2], chunks)] = -torch.inf
            if share is None:
                outs.append(torch.cat([local, remembered], dim=1).softmax(-1) @ torch.cat([v, values]))
            else:
                outs.append((1 - share) * (local.softmax(-1) @ v) + share * (remembered.softmax(-1) @ values))
        x = x + attention.o_proj(torch.cat(outs, dim=1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@pytest.mark.parametrize("k_chunks", [2, 100])
@pytest.mark.parametrize("distance", [0, 20])
@pytest.mark.parametrize("start", [None, 0.7])
def test_the_model_computes_what_is_written_out_here(model, kvs, start, distance, k_chunks):
    gates = start and replace(fixed(model, start), distance=distance, k_chunks=k_chunks)
    expected = reference(model, kvs, TEXT, distance, k_chunks, start and torch.tensor(start).sigmoid())
    with GatedMemory(model, gates, kvs, layers=BOTH, k_chunks=k_chunks, distance=distance):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (logits(model) - expected).abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("start", [None, 0.0])
def test_token_by_token_is_the_same_as_at_once(model, kvs, start, implementation):
    model.set_attn_implementation(implementation)
    gates = None if start is None else fixed(model, start)
    with GatedMemory(model, gates, kvs, layers=BOTH):
        whole, cache = logits(model), with_cache(model)
        parts = (TEXT[:20], TEXT[20:26], *([token] for token in TEXT[26:]))
        piecewise = torch.cat([logits(model, part, **cache) for part in parts])
        torch.testing.assert_close(piecewise, whole, atol=1e-4, rtol=1e-4)
        # padding on the left is not attended to
        padded = logits(
            model,
            [5, 5, *TEXT],
            attention_mask=torch.tensor([[0, 0, *[1] * len(TEXT)]]),
            position_ids=torch.tensor([[0, 0, *range(len(TEXT))]]),
        )
        torch.testing.assert_close(padded[2:], whole, atol=1e-4, rtol=1e-4)
    model.set_attn_implementation("sdpa")


def test_long_prompts_are_looked_up_in_blocks(model, kvs, monkeypatch):
    for gates in (None, fixed(model, 0.0)):
        with GatedMemory(model, gates, kvs, layers=BOTH, k_chunks=None if gates else 2):
            whole = logits(model)
            monkeypatch.setattr("memory_os.adapters.joint.BLOCK", 8)
            torch.testing.assert_close(logits(model), whole, atol=1e-5, rtol=1e-5)
            monkeypatch.undo()


def test_generate_goes_on_as_one_forward_pass_would(model, kvs):
    for gates in (None, fixed(model, 1.0)):
        with GatedMemory(model, gates, kvs, layers=BOTH):
            made = model.generate(torch.tensor([TEXT]), max_new_tokens=8, do_sample=False)[0].tolist()
            assert logits(model, made[:-1])[len(TEXT) - 1 :].argmax(-1).tolist() == made[len(TEXT) :]


def test_closed_gates_and_empty_memory_are_the_plain_model(model, kvs):
    plain = logits(model)
    with GatedMemory(model, fixed(model, -40.0), kvs):
        torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=0)
    with GatedMemory(model, fixed(model, 40.0), kvs):
        assert (logits(model) - plain).abs().max() > 0.1
    nothing = KV((), torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, 8))
    for gates in (None, fixed(model, 40.0)):
        for memory in ([], [nothing]):
            with GatedMemory(model, gates, memory, layers=BOTH) as opened:
                assert opened.n_tokens == 0
                assert torch.equal(logits(model), plain)
        with GatedMemory(model, gates, [nothing, *kvs]) as opened:
            assert opened.n_tokens == 20


def test_what_is_remembered_matters_but_not_its_order(model, kvs):
    zeroed = [KV(kv.ids, kv.keys, torch.zeros_like(kv.values)) for kv in kvs]
    for gates in (None, fixed(model, 0.0)):
        made = []
        for memory in (kvs, kvs[::-1], zeroed):
            with GatedMemory(model, gates, memory, layers=BOTH):
                made.append(logits(model))
        torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)
        assert (made[0] - made[2]).abs().max() > 0.1


def test_only_the_chosen_layers_read_and_are_kept(model, kvs):
    changed = [KV(kv.ids, kv.keys * torch.tensor([9.0, 1.0])[:, None, None, None], kv.values) for kv in kvs]
    made = []
    for memory, layers in ((kvs, [1]), (changed, None), (kvs, BOTH)):
        with GatedMemory(model, None, memory, layers=layers) as opened:
            assert opened.layers == tuple(layers or [1])  # by default one at two thirds
            assert len(opened._memories) == len(opened.layers)
            made.append(logits(model))
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2], atol=1e-2)


def test_a_model_that_normalises_queries_and_keys_is_read_too():
    model = random_model(Qwen3Config, Qwen3ForCausalLM)
    assert hasattr(model.model.layers[0].self_attn, "q_norm")
    kv = encode(model, TEXT)
    cache = DynamicCache(config=model.config)
    logits(model, **with_cache(model, cache))
    torch.testing.assert_close(kv.keys[1, :, 0], cache.layers[1].keys[0, :, 0])
    plain = logits(model, TEXT[:1])
    # one token that remembers only itself sees the same key twice
    with GatedMemory(model, None, [encode(model, TEXT[:1])], layers=BOTH):
        torch.testing.assert_close(logits(model, TEXT[:1]), plain, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_close(model, kvs):
    low = random_model().to(torch.bfloat16)
    for start in (None, 0.0):
        made = []
        for own in (model, low):
            with GatedMemory(own, None if start is None else fixed(own, start), kvs, layers=BOTH):
                made.append(logits(own).float().log_softmax(-1))
        assert made[1].dtype == torch.float32
        assert (made[0] - made[1]).abs().mean() < 0.15


# -- hooks, refusals ---------------------------------------------------------------------------------------------------


def test_nothing_is_left_in_the_model(model, kvs):
    assert hooks(model) == 0
    memory = GatedMemory(model, None, kvs, layers=BOTH)
    assert hooks(model) == 0
    with memory:
        assert hooks(model) == 4
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="on purpose"), memory:
        raise RuntimeError("on purpose")
    assert hooks(model) == 0
    with pytest.raises(IndexError):
        encode(model, [1000])
    assert hooks(model) == 0


def test_more_than_one_sequence_is_refused(model, kvs):
    with GatedMemory(model, None, kvs), pytest.raises(ConfigError, match="one sequence at a time, not 2"):
        model(torch.tensor([TEXT, TEXT]))


def test_a_cache_of_fixed_size_is_refused_where_its_keys_are_read(model, kvs):
    ask = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with GatedMemory(model, None, kvs), pytest.raises(ConfigError, match="cache that grows"):
        model.generate(torch.tensor([TEXT]), **ask)


@pytest.mark.parametrize(
    ("made", "needs"),
    [
        (lambda: random_model(Phi3Config, Phi3ForCausalLM), "q_proj and k_proj and v_proj"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)), "rotary positions"),
        (
            lambda: random_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "one rotation for all lengths, not 'dynamic'",
        ),
    ],
)  # fmt: skip
def test_a_model_of_another_build_is_refused(made, needs):
    with pytest.raises(CapabilityError, match=needs):
        GatedMemory(made(), None, [])
    with pytest.raises(CapabilityError, match=needs):
        encode(made(), [1, 2])


@pytest.mark.parametrize("layers", [[2], [-1], [0, 0]])
def test_layers_must_be_those_of_the_model(model, layers):
    with pytest.raises(ConfigError, match="0 to 1"):
        GatedMemory(model, None, [], layers=layers)


# -- gates -------------------------------------------------------------------------------------------------------------


def test_gates_come_back_as_they_were_saved(model, tmp_path):
    gates = Gates(torch.randn(1, 4), (1,), weights_fingerprint(model), 2, 5, 30, {"data": ["a book"], "steps": 3})
    gates.save(tmp_path / "g.safetensors")
    loaded = Gates.load(tmp_path / "g.safetensors", model)
    assert torch.equal(loaded.bias, gates.bias)
    for name in ("layers", "fingerprint", "chunk_tokens", "k_chunks", "distance", "provenance"):
        assert getattr(loaded, name) == getattr(gates, name)
    opened = GatedMemory(model, loaded, [])
    assert (opened.layers, opened.chunk_tokens, opened.k_chunks, opened.distance) == ((1,), 2, 5, 30)
    with pytest.raises(ConfigError, match="trained with distance=30, not 0"):
        GatedMemory(model, loaded, [], distance=0)


def test_gates_of_another_model_are_refused(model, tmp_path):
    path = tmp_path / "g.safetensors"
    fixed(model, 0.0).save(path)
    other = random_model()
    assert Gates.load(path, other).layers == BOTH
    assert Gates.load(path, random_model().to(torch.bfloat16)).layers == BOTH
    other.model.layers[1].mlp.up_proj.weight[3, 3] += 0.1
    with pytest.raises(ConfigError, match=r"belong to the model .*train_gate\.py"):
        Gates.load(path, other)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read"),
        (lambda path: rewrite(path, bias=torch.zeros(2, 3)), "shape"),
        (lambda path: rewrite(path, format="memory_os gates 9"), "gates 9"),
        (lambda path: save_file({"bias": torch.zeros(2, 4)}, path), "no file of gates"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(model, tmp_path, change, problem):
    path = tmp_path / "g.safetensors"
    fixed(model, 0.0).save(path)
    change(path)
    with pytest.raises(ConfigError, match=f"{problem}.*pass gates=None"):
        Gates.load(path, model)


def rewrite(path, bias=None, **about):
    with safe_open(path, "pt") as file:
        about, bias = {**file.metadata(), **about}, file.get_tensor("bias") if bias is None else bias
    save_file({"bias": bias}, path, about)


def test_training_moves_the_gates_alone_and_lowers_the_loss():
    """The memory holds the very text: whoever attends to it can tell what comes next."""
    model = random_model().requires_grad_(True)
    before = weights_fingerprint(model)
    kvs = [encode(model, TEXT)]
    gates = fixed(model, 0.0)
    gates.bias.requires_grad_()
    solver = torch.optim.Adam([gates.bias], lr=0.3)
    model.requires_grad_(False)
    losses = []
    for _ in range(15):
        with GatedMemory(model, gates, kvs):
            made = model(torch.tensor([TEXT])).logits[0]
        loss = torch.nn.functional.cross_entropy(made[:-1], torch.tensor(TEXT[1:]))
        solver.zero_grad()
        loss.backward()
        assert (gates.bias.grad != 0).all()
        solver.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert weights_fingerprint(model) == before
    assert all(weight.grad is None for weight in model.parameters())


# -- the real model ----------------------------------------------------------------------------------------------------

FACT = "The code of the wine cellar is 4812. Only the butler knows it."


@pytest.fixture(scope="module")
def remembered(smollm2):
    return [encode(smollm2.model, smollm2._chat.text(FACT), after=[smollm2._chat.tokenizer.bos_token_id])]


def reply(smollm2):
    return "".join(smollm2.generate([{"role": "user", "content": "Say hello."}], max_tokens=12))


@pytest.mark.slow
def test_smollm2_generates_with_the_gates_that_ship(smollm2, remembered):
    gates = Gates.load(SMOLLM2_GATES, smollm2.model)
    plain = reply(smollm2)
    ids = torch.tensor([smollm2._chat.prompt([{"role": "user", "content": "Say hello."}])])
    with torch.inference_mode():
        without = smollm2.model(ids).logits[0, -1]
        with GatedMemory(smollm2.model, gates, remembered) as opened:
            assert opened.n_tokens == len(remembered[0].ids)
            assert reply(smollm2)
            assert (smollm2.model(ids).logits[0, -1] - without).abs().max() > 1e-3
        with GatedMemory(smollm2.model, gates, []):
            assert torch.equal(smollm2.model(ids).logits[0, -1], without)
            assert reply(smollm2) == plain


def test_the_gates_that_ship_say_how_they_were_made(smollm2):
    made = Gates.load(SMOLLM2_GATES, smollm2.model).provenance
    perplexity = made["perplexity"]
    assert made["made_by"] == "benchmarks/train_gate.py"
    assert perplexity["trained"] < perplexity["no_memory"]
    assert perplexity["trained"] < perplexity["at_init"]
    assert perplexity["trained"] < perplexity["other_book"]
    assert json.dumps(made)
    assert SMOLLM2_GATES.stat().st_size < 16_384
