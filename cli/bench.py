"""``memos bench``: measure recall and speed on data of one's own, beside simpler retrievers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from memory_os.cli import figures, render
from memory_os.cli.common import Json

__all__ = ["app"]

app = typer.Typer(help="Measure recall and speed, beside simpler retrievers.", no_args_is_help=True)

Compare = Annotated[str, typer.Option("--compare", help="Peers beside us, with commas: bm25, chroma, recency, rrf.")]
Embedder = Annotated[str, typer.Option("--embedder", help="minilm, st:NAME, provider:model or hash.")]
NoPlot = Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")]
More = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More files.", show_default=False)]


@app.command()
def locomo(
    data: Annotated[Path, typer.Option("--data", help="A file of LoCoMo's form.")],
    budgets: Annotated[str, typer.Option("--budgets", help="Tokens, with commas.")] = "256,512,1024,2048,4096",
    compare: Compare = "",
    json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="The plot's file; bench-locomo.png, and none with --json.")
    ] = None,
    no_plot: NoPlot = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure how much of the evidence for questions about very long conversations enters the context.

    Peers get the same texts at equal tokens. Progress goes to standard error.

    Example: memos bench locomo --data locomo.json --budgets 512,1024 --compare rrf,chroma

    JSON: overall {budget: {recall, all, tokens, n}}, by_category {category: {budget: ...}}, session_recall_at_10,
    latency_ms {p50, p95, query_embedding_p50}, peers {name: {budget: ...}}, left_out.
    """
    from memory_os.benchmarks import locomo, measure

    limits, peers, file = numbers(budgets), words(compare), plot_file(plot, "bench-locomo.png", json, no_plot)
    conversations, left_out = locomo.read(data)
    with progress() as show:
        report = measure.measure(
            conversations, budgets=limits, compare=peers, embedder=embedder, left_out=left_out, by_session=True,
            progress=show,
        )  # fmt: skip
    names = {key: f"{key} {name}" for key, name in locomo.CATEGORIES.items()}
    figures.print_report(report, json, "LoCoMo", names)
    draw_curves(file, report, "LoCoMo: evidence in the context")


@app.command()
def dialogues(
    data: Annotated[list[Path], typer.Option("--data", help="A file of the form of SCM's dialogues.")],
    more: More = None,
    budgets: Annotated[str, typer.Option("--budgets", help="Tokens, with commas.")] = "512,1024",
    compare: Compare = "",
    json: Json = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure the same for long dialogues with an assistant, where evidence is found by the reference answer's words.

    A turn is evidence if it holds at least 60 % of the distinct words of the answer; questions without are left out.

    Example: memos bench dialogues --data dialogues_en.json dialogues_zh.json --compare rrf

    JSON: as memos bench locomo, by_category with the files' names and the questions' modes, and partly: the share of
    evidence that entered cut.
    """
    from memory_os.benchmarks import dialogues, measure

    limits, peers = numbers(budgets), words(compare)
    conversations, left_out = dialogues.read([*data, *(more or [])])
    with progress() as show:
        report = measure.measure(
            conversations, budgets=limits, compare=peers, embedder=embedder, left_out=left_out, partly=True,
            progress=show,
        )  # fmt: skip
    figures.print_report(report, json, "Dialogues", {})


@app.command()
def scm(
    data: Annotated[list[Path], typer.Option("--data", help="A file of the form of SCM's dialogues.")],
    more: More = None,
    budgets: Annotated[str, typer.Option("--budgets", help="Tokens, with commas.")] = "1024",
    systems: Annotated[
        str, typer.Option("--systems", help="With commas; also: scm.")
    ] = "scm-paper,scm-repo,auto,no-controller,no-flash,no-activation",
    llm: Annotated[str, typer.Option("--llm", help="smollm2, hf:NAME, URL#MODEL or provider:model.")] = "smollm2",
    answers: Annotated[bool, typer.Option("--answers/--no-answers", help="Have the questions answered.")] = True,
    free: Annotated[bool, typer.Option("--free", help="Gates and summaries without the LLM.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most questions of a dialogue.")] = 1000,
    json: Json = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure SCM's presets and ablations beside the default controller, at equal tokens.

    Recall is as in memos bench dialogues; F1 is the overlap of the LLM's answer with the reference answer.

    Example: memos bench scm --data dialogues_en.json dialogues_zh.json --budgets 512,1024

    JSON: systems {name: {overall {budget: {recall, partly, f1, tokens, calls, call_tokens, unreadable, not_needed,
    n}}, by_group}}, llm, left_out.
    """
    from dataclasses import replace

    from memory_os.benchmarks import dialogues, scm
    from memory_os.build import make_llm

    sizes, names = numbers(budgets), words(systems)
    conversations, left_out = dialogues.read([*data, *(more or [])])
    conversations = [replace(each, questions=each.questions[:limit]) for each in conversations]
    options = {"gate": "free", "summaries": "free"} if free else {}
    with progress() as show:
        report = scm.compare(
            conversations, systems=names, budgets=sizes, llm=make_llm(llm) if answers or not free else None,
            answers=answers, options=options, embedder=embedder, left_out=left_out, progress=show,
        )  # fmt: skip
    figures.print_systems(report, json)


@app.command()
def xl3m(
    books: Annotated[
        list[Path] | None, typer.Option("--data", help="English books as text files; the project's own if left out.")
    ] = None,
    conversations: Annotated[
        Path | None, typer.Option("--locomo", help="A file of LoCoMo's form, for the part rerank.")
    ] = None,
    parts: Annotated[
        str, typer.Option("--parts", help="With commas: ranking, rerank, document, cost.")
    ] = "ranking,rerank,document,cost",
    sizes: Annotated[str, typer.Option("--sizes", help="Segments among which the fact is, with commas.")] = "10,50,200",
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials of each of the 25 facts.")] = 4,
    budgets: Annotated[str, typer.Option("--budgets", help="Tokens of the contexts of rerank.")] = "512,1024",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most questions of a conversation.")] = None,
    length: Annotated[str, typer.Option("--length", help="Tokens of the document.")] = "1M",
    score: Annotated[str, typer.Option("--score", help="By which the document is read.")] = "hybrid",
    seed: Annotated[int, typer.Option("--seed", help="Of what is planted where.")] = 0,
    json: Json = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure XL3M with SmolLM2: what finds a planted fact, whether it adds to recall, a long document, and the cost.

    All of it takes an hour on two cores; --parts chooses.

    Example: memos bench xl3m --parts ranking --sizes 10,50 --trials 1

    JSON: by part: ranking {kind: {size: {system: {r@1, r@3: {percent, low, high, n}}}}}, rerank {order: {budget:
    {recall, n}}}, document {tokens, seconds, peak_mb, found, ...}, cost {segment tokens: {bare_ms, ours_ms, kept_ms,
    throughput, kept_ratio}}.
    """
    from memory_os.adapters.huggingface import HuggingFaceLLM
    from memory_os.benchmarks import locomo, measure, needle, xl3m
    from memory_os.build import make_embedder
    from memory_os.errors import InvalidInputError, UnknownNameError

    wanted, among, limits = words(parts), numbers(sizes), numbers(budgets)
    for part in wanted:
        if part not in xl3m.PARTS:
            raise UnknownNameError("part", part, xl3m.PARTS)
    files = books or sorted(measure.SHARED.glob("*.txt"))
    talks = conversations or measure.SHARED / "locomo_dev.json"
    book = needle.books(files).get("en") if files else None
    if book is None:
        raise InvalidInputError("no English book given; name one with --data FILE")
    llm, model = HuggingFaceLLM(), make_embedder(embedder)
    report: dict[str, Any] = {}
    with progress() as show:
        if "cost" in wanted:
            report["cost"] = xl3m.cost(book, llm=llm)
        if "ranking" in wanted:
            report["ranking"] = xl3m.ranking(
                book, llm=llm, embedder=model, sizes=among, trials=trials, seed=seed, progress=show
            )
        if "rerank" in wanted:
            read, _ = locomo.read(talks)
            report["rerank"] = xl3m.rerank(read, budgets=limits, llm=llm, embedder=model, limit=limit, progress=show)
        if "document" in wanted:
            report["document"] = xl3m.document(book, numbers(length)[0], score=score)
    figures.print_xl3m(report, json)


@app.command()
def alr2(
    conversations: Annotated[
        Path | None, typer.Option("--locomo", help="A file of LoCoMo's form; the project's own if left out.")
    ] = None,
    books: Annotated[
        list[Path] | None, typer.Option("--data", help="English books as text files; the project's own if left out.")
    ] = None,
    parts: Annotated[str, typer.Option("--parts", help="With commas: locomo, planted.")] = "locomo,planted",
    budget: Annotated[int, typer.Option("--budget", min=1, help="Tokens of a context.")] = 1024,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most questions of a conversation.")] = 40,
    shortlist: Annotated[int, typer.Option("--shortlist", min=1, help="Turns that the LLM looks through.")] = 20,
    extract_tokens: Annotated[int, typer.Option("--extract-tokens", min=16, help="Of an answer of it.")] = 192,
    llm: Annotated[str, typer.Option("--llm", help="smollm2, hf:NAME, URL#MODEL or provider:model.")] = "smollm2",
    json: Json = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure how much of the evidence that an LLM quotes is invented, and what the verifier leaves of it.

    Questions about LoCoMo's conversations, and about facts planted in a book beside sentences that only repeat them.

    Example: memos bench alr2 --parts planted

    JSON: by part: {system: {recall, quotes, invented, hallucination_rate, tokens, calls, fallback, n}}; llm.
    """
    from memory_os.benchmarks import alr2, locomo, measure, needle
    from memory_os.build import make_embedder, make_llm
    from memory_os.errors import InvalidInputError, UnknownNameError

    wanted = words(parts)
    for part in wanted:
        if part not in alr2.PARTS:
            raise UnknownNameError("part", part, alr2.PARTS)
    sets: dict[str, list[measure.Conversation]] = {}
    if "locomo" in wanted:
        sets["locomo"] = locomo.read(conversations or measure.SHARED / "locomo_dev.json")[0]
    if "planted" in wanted:
        files = books or sorted(measure.SHARED.glob("*.txt"))
        book = needle.books(files).get("en") if files else None
        if book is None:
            raise InvalidInputError("no English book given; name one with --data FILE")
        sets["planted"] = [alr2.planted_facts(book)]
    report: dict[str, Any] = {"llm": llm}
    model, model_embedder = make_llm(llm), make_embedder(embedder)
    options = {"shortlist": shortlist, "extract_tokens": extract_tokens}
    with progress() as show:
        for part, told in sets.items():
            report[part] = alr2.evidence(
                told, llm=model, budget=budget, options=options, embedder=model_embedder,
                limit=limit if part == "locomo" else None, progress=show,
            )  # fmt: skip
    figures.print_evidence(report, json)


@app.command()
def atc(
    links: Annotated[str, typer.Option("--links", help="Relations that an answer follows from.")] = "2,4,8",
    budgets: Annotated[str, typer.Option("--budgets", help="Tokens of the contexts, with commas.")] = "256,512,1024",
    n: Annotated[int, typer.Option("--traces", min=1, help="Traces of each number of links.")] = 20,
    distractors: Annotated[int, typer.Option("--distractors", min=0, help="Turns that belong to no trace.")] = 200,
    language: Annotated[str, typer.Option("--language", help="en or zh.")] = "en",
    seed: Annotated[int, typer.Option("--seed", help="Of families and their places.")] = 0,
    json: Json = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure chains of evidence: ancestral traces, one relation a turn among others, asked about at the end.

    Hops look up what each find leads to; a single search fills the same budget at once. No LLM takes part.

    Example: memos bench atc --links 4,8 --budgets 512

    JSON: {links: {budget: {system: {links, all (percent), tokens, n}}}}.
    """
    from memory_os.benchmarks import alr2, ancestors
    from memory_os.build import make_embedder
    from memory_os.errors import UnknownNameError

    if language not in ancestors.LANGUAGES:
        raise UnknownNameError("language", language, ancestors.LANGUAGES)
    lengths, limits = numbers(links), numbers(budgets)
    with progress() as show:
        report = alr2.chains(
            links=lengths, budgets=limits, n=n, n_distractors=distractors, language=language,
            embedder=make_embedder(embedder), seed=seed, progress=show,
        )  # fmt: skip
    figures.print_chains(report, json)


@app.command()
def bank(
    books: Annotated[
        list[Path] | None, typer.Option("--data", help="English books as text files; the project's own if left out.")
    ] = None,
    parts: Annotated[
        str, typer.Option("--parts", help="With commas: exact, first-token, answers, storage, growth, icl.")
    ] = "exact,first-token,answers,storage,growth,icl",
    sizes: Annotated[str, typer.Option("--sizes", help="Tokens of memory of first-token.")] = "512,1024,2048,4096",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of first-token.")] = 5,
    counts: Annotated[str, typer.Option("--counts", help="Segments of answers.")] = "1,3,8",
    trials: Annotated[int, typer.Option("--trials", min=1, help="Of each of the 25 facts of answers.")] = 4,
    repairs: Annotated[str, typer.Option("--repairs", help="Of answers; with commas, or all.")] = "spliced",
    tokens: Annotated[str, typer.Option("--tokens", help="Of the bank of storage.")] = "65536",
    grown: Annotated[str, typer.Option("--grown", help="Tokens of the banks of growth.")] = "1k,4k,16k,65536",
    examples: Annotated[
        Path | None, typer.Option("--icl", help="A folder with sst2_train.tsv and sst2_dev.tsv, for icl.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most sentences of icl.")] = None,
    json: Json = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure the bank of cached keys and values with SmolLM2, beside the same memory read as text.

    All of it takes an hour on two cores; --parts chooses.

    Example: memos bench bank --parts first-token,answers

    JSON: by part: exact {what: difference}, first-token {tokens: {text_ms, spliced_ms, ..., text_over_cached}}, answers
    {segments: {way: {percent, low, high, n, of_full, same, kl}}}, storage {dtype: {bytes_on_disk, ...}}, growth
    {tokens: {search_ms, first_token_ms, peak_mb, ...}}, icl {systems: {name: {plain, calibrated, ms}}, bank, ...}.
    """
    from memory_os.adapters.huggingface import HuggingFaceLLM
    from memory_os.benchmarks import bank, icl, measure, needle
    from memory_os.build import make_embedder
    from memory_os.errors import InvalidInputError, UnknownNameError

    wanted = words(parts)
    known = list(bank.REPAIRS)
    chosen = known if repairs == "all" else words(repairs)
    for kind, names, all_names in (("part", wanted, bank.PARTS), ("repair", chosen, known)):
        for name in names:
            if name not in all_names:
                raise UnknownNameError(kind, name, all_names)
    files = books or sorted(measure.SHARED.glob("*.txt"))
    book = needle.books(files).get("en") if files else None
    if book is None:
        raise InvalidInputError("no English book given; name one with --data FILE")
    folder = examples or measure.SHARED / "icl"
    llm = HuggingFaceLLM()
    report: dict[str, Any] = {}
    with progress() as show:
        if "exact" in wanted:
            report["exact"] = bank.exactness(book)
        if "first-token" in wanted:
            report["first-token"] = bank.first_token(book, llm=llm, sizes=numbers(sizes), rounds=rounds, progress=show)
        if "answers" in wanted:
            report["answers"] = bank.agreement(
                book, llm=llm, counts=numbers(counts), trials=trials, repairs=chosen, progress=show
            )
        if "storage" in wanted:
            report["storage"] = bank.storage(book, llm=llm, tokens=numbers(tokens)[0], progress=show)
        if "growth" in wanted:
            report["growth"] = bank.growth(book, llm=llm, sizes=numbers(grown), progress=show)
        if "icl" in wanted:
            train, dev = (icl.read_tsv(folder / f"sst2_{name}.tsv") for name in ("train", "dev"))
            report["icl"] = icl.measure(
                train, dev, llm=llm, embedder=make_embedder(embedder), limit=limit, progress=show
            )
    figures.print_bank(report, json)


@app.command()
def needle(
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Books as text files; the project's own if left out.")
    ] = None,
    more: More = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens, with commas.")] = "4k,16k,64k,256k,1M",
    depths: Annotated[str, typer.Option("--depths", help="Where the facts are, in percent.")] = "0,25,50,75,100",
    budget: Annotated[int, typer.Option("--budget", min=1, help="Tokens of the context.")] = 512,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Plantings to average over.")] = 2,
    compare: Annotated[str, typer.Option("--compare", help="Peers beside us: rrf.")] = "",
    json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="The plot's file; bench-needle.png, and none with --json.")
    ] = None,
    no_plot: NoPlot = False,
    embedder: Embedder = "minilm",
) -> None:
    """Plant invented facts in books and see whether a question brings the fact's sentence into the context.

    English facts are planted in English books and Chinese ones in Chinese books.

    Example: memos bench needle --data jane_eyre.txt --lengths 4k,64k --compare rrf

    JSON: recall {language: {length: {depth: percent}}}, overall {language: percent}, peers {name: the same two},
    budget, trials.
    """
    from memory_os.benchmarks import measure, needle
    from memory_os.errors import InvalidInputError

    sizes, places, peers = numbers(lengths), numbers(depths, least=0), words(compare)
    file = plot_file(plot, "bench-needle.png", json, no_plot)
    files = [*(data or []), *(more or [])] or sorted(measure.SHARED.glob("*.txt"))
    if not files:
        raise InvalidInputError("no books given; name them with --data FILE")
    with progress() as show:
        report = needle.measure(
            needle.books(files), lengths=sizes, depths=places, budget=budget, compare=peers, trials=trials,
            embedder=embedder, progress=show,
        )  # fmt: skip
    if json:
        render.print_json(report)
    else:
        figures.print_needles(report)
    draw_maps(file, report)


@app.command()
def speed(
    data: Annotated[Path | None, typer.Option("--data", help="Turns and questions, of LoCoMo's form.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds to take the median of.")] = 5,
    segments: Annotated[str, typer.Option("--segments", help="How many are stored, with commas.")] = "10k,100k",
    json: Json = False,
) -> None:
    """Measure ingest, context and start, as ratios against a peer in the same run. Takes some minutes.

    Example: memos bench speed --data locomo.json --rounds 3

    JSON: machine, start {help_s, import_s}, ingest, context (a list, by number of segments).
    """
    from memory_os.benchmarks import run

    limits = numbers(segments)
    with render.talk().status("Measuring"):
        results = run.measure(data or run.DATA, rounds=rounds, segments=limits)
    if json:
        render.print_json(results)
    else:
        figures.print_speed(results)


@app.command()
def scale(
    sizes: Annotated[str, typer.Option("--sizes", help="Segments in one namespace, with commas.")] = "1k,10k,100k,1M",
    namespaces: Annotated[
        int, typer.Option("--namespaces", min=0, help="So many namespaces of 100 segments each, too.")
    ] = 10_000,
    peers: Annotated[
        str, typer.Option("--peers", help="chroma, langgraph-memory, langgraph-sqlite, mem0; with commas.")
    ] = "chroma,langgraph-memory,langgraph-sqlite,mem0",
    limit: Annotated[float, typer.Option("--limit", min=1, help="Seconds that a peer may take for a size.")] = 600.0,
    questions: Annotated[int, typer.Option("--questions", min=1, help="How many are asked of each size.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of texts, vectors and questions.")] = 0,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where the databases lie meanwhile; 1M segments take 5 GB.")
    ] = None,
    postgres: Annotated[
        str | None,
        typer.Option("--postgres", help="The URL of a PostgreSQL database made for this: ours is measured there too."),
    ] = None,
    json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="The plot's file; bench-scale.png, and none with --json.")
    ] = None,
    no_plot: NoPlot = False,
) -> None:
    """Measure what a memory costs as it grows: ingest, search, context, cold start and bytes, beside peers.

    Texts and vectors are made up from the seed, and no encoder takes part. A peer is stopped after --limit seconds of
    a size, and not asked for larger ones.

    Example: memos bench scale --sizes 1k,10k --namespaces 100 --peers chroma

    JSON: machine, systems {name: {segments: {ingest_per_s, bytes_per_segment, search_p95_ms, ...} or {stopped}}},
    namespaces {the same}, growth {name: {cost: exponent}}, left_out {peer: why}, seed, k, budget, questions.
    """
    from memory_os.benchmarks import scale as benchmark

    lengths, names = numbers(sizes), words(peers)
    file = plot_file(plot, "bench-scale.png", json, no_plot)
    for line in benchmark.missing(names).values():
        render.talk().print(line, markup=False, soft_wrap=True)
    with progress() as show:
        report = benchmark.measure(
            sizes=lengths, peers=names, namespaces=namespaces, seed=seed, questions=questions, limit_s=limit,
            folder=folder, postgres=postgres, progress=show,
        )  # fmt: skip
    if json:
        render.print_json(report)
    else:
        figures.print_scale(report)
    draw_costs(file, report)


# -- what is given -----------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """What stands between the commas.

    >>> words("rrf, bm25,")
    ['rrf', 'bm25']
    """
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, least: int = 1) -> list[int]:
    """Whole numbers between commas, with k for thousands and M for millions.

    >>> numbers("512,4k,1M")
    [512, 4000, 1000000]
    """
    units = {"k": 1_000, "m": 1_000_000}
    found = []
    for word in words(text):
        unit = units.get(word[-1].lower(), 1)
        digits = word[:-1] if unit > 1 else word
        if not digits.isdecimal():
            raise typer.BadParameter(f"{word!r} is not a whole number")
        if int(digits) < least:
            raise typer.BadParameter(f"{word} is not at least {least}")
        found.append(int(digits) * unit)
    if not found:
        raise typer.BadParameter("give at least one number")
    return found


def plot_file(given: Path | None, default: str, json: bool, no_plot: bool) -> Path | None:
    """Where to draw; ``None`` for nowhere. Checked before anything is measured."""
    from memory_os.benchmarks.plot import writable

    if no_plot and given:
        raise typer.BadParameter("either --plot or --no-plot")
    if no_plot or (json and not given):
        return None
    return writable(given or Path(default))


# -- what is shown -----------------------------------------------------------------------------------------------------


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, a line per part elsewhere; both on standard error."""
    console = render.talk()
    if not console.is_terminal:
        seen: set[str] = set()

        def line(part: str, done: int, total: int) -> None:
            if part not in seen:
                seen.add(part)
                console.print(f"{done} of {total}: {part}", markup=False)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Measuring", total=None)

        def show(part: str, done: int, total: int) -> None:
            bar.update(task, description=part, completed=done, total=total)

        yield show


def draw_curves(file: Path | None, report: dict[str, Any], title: str) -> None:
    """Recall against tokens, ours and the peers'."""
    from memory_os.benchmarks import plot

    everyone = {"memory_os": report["overall"], **report["peers"]}
    series = {name: [(f["tokens"], f["recall"]) for f in figures.values()] for name, figures in everyone.items()}
    drawn(file, lambda target: plot.curves(target, title, series))


def draw_maps(file: Path | None, report: dict[str, Any]) -> None:
    """Recall by length and depth, ours and the peers', a map for each language."""
    from memory_os.benchmarks import plot

    everyone = {"memory_os": report["recall"], **{name: peer["recall"] for name, peer in report["peers"].items()}}
    tables = {f"{name}, {language}": rows for name, tables in everyone.items() for language, rows in tables.items()}
    maps = {title: [list(row.values()) for row in rows.values()] for title, rows in tables.items()}
    first = next(iter(tables.values()))
    lengths, depths = [f"{int(length):,}" for length in first], list(next(iter(first.values())))
    title = f"Planted facts in a context of {report['budget']} tokens, %"
    drawn(file, lambda target: plot.heat_maps(target, title, maps, lengths, depths))


def draw_costs(file: Path | None, report: dict[str, Any]) -> None:
    """Each cost against the number of segments, ours and the peers'."""
    from memory_os.benchmarks import plot

    costs = {
        "search, p95 ms": "search_p95_ms", "cold first answer, s": "cold_first_answer_s",
        "own memory, MB": "resident_own_mb", "ingest, segments per s": "ingest_per_s",
    }  # fmt: skip
    panels = {
        title: {
            name: [(int(size), each[cost]) for size, each in sizes.items() if each.get(cost)]
            for name, sizes in report["systems"].items()
        }
        for title, cost in costs.items()
    }
    drawn(file, lambda target: plot.costs(target, "Cost against segments in one namespace", panels))


def drawn(file: Path | None, draw: Callable[[Path], None]) -> None:
    """Draw, and say where; without matplotlib say in one line what is missing."""
    from memory_os.errors import MissingExtraError

    if file is None:
        return
    try:
        draw(file)
    except MissingExtraError as error:
        render.talk().print(str(error), markup=False, soft_wrap=True)
    except OSError as error:
        render.talk().print(f"{file}: cannot write it: {error.strerror}", markup=False, soft_wrap=True)
    else:
        render.talk().print(f"The plot is {file}", markup=False, soft_wrap=True)
