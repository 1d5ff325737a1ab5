"""The main job on real input: store a conversation of four months, ask about its first day, and see why.

Run it with ``make demo``. Everything is local: SmolLM2 answers, MiniLM finds, SQLite keeps.
"""

import tempfile
from pathlib import Path

from memory_os import Memory
from memory_os.cli.render import ledger_table, out

CONVERSATION = Path(__file__).with_name("conversation.json")
QUESTION = "What is the name of my sister's dog?"
BUDGET = 320

console = out()


def main(folder: Path) -> None:
    """Store, ask, and show what the model saw and why."""
    with Memory.open(folder / "memory.db", llm="smollm2", budget=BUDGET, reply_tokens=48) as memory:
        nora = memory.namespace("nora")
        stored, _ = nora.ingest(CONVERSATION)
        console.print(f"Stored {stored} turns of a conversation over four months.\n")

        console.print(f"[bold]You[/]    {QUESTION}")
        reply = nora.session("today").chat(QUESTION)
        console.print(f"[bold]Reply[/]  {reply.text.strip()}\n")

        account = reply.context.account
        console.print("[bold]What the model saw of the past[/], chosen from all that is stored")
        console.print(reply.context.text, markup=False, highlight=False)
        console.print(
            f"\n[bold]{account.total} tokens[/] of at most {account.limit}, in {account.tokenizer}'s own tokens: "
            f"system {account.system}, question {account.query}, flash memory {account.flash}, "
            f"recalled {account.activated}.\n"
        )
        console.print("[bold]Why[/] (memos why shows this for any turn)")
        console.print(ledger_table(reply.trace, nora.segment))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
