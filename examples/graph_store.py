"""Long-term memory in a LangGraph graph: what one thread stores, another finds by meaning.

Run it with ``python examples/graph_store.py``. Everything is local: MiniLM finds, SQLite keeps, and no LLM is asked.
"""

import tempfile
from pathlib import Path
from typing import TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from memory_os import Memory
from memory_os.adapters.langgraph import MemoryStore


class State(TypedDict, total=False):
    """One turn: what the user says, and what is remembered of it."""

    said: str
    found: list[str]


def remember(state: State, runtime: Runtime) -> State:
    """Keep what is told, and look up what is asked: an agent would have a model decide."""
    said, store = state["said"], runtime.store
    if not said.endswith("?"):
        store.put(("facts",), said, {"text": said}, index=["text"])
        return {"found": []}
    return {
        "found": [f"{item.value['text']} ({item.score:.2f})" for item in store.search(("facts",), query=said, limit=2)]
    }


def main(folder: Path) -> None:
    """Tell it in one thread, ask in another, and ask as somebody else."""
    with Memory.open(folder / "memory.db") as memory:
        graph = StateGraph(State)
        graph.add_node("remember", remember)
        graph.add_edge(START, "remember")
        graph.add_edge("remember", END)
        agent = graph.compile(store=MemoryStore(memory))  # the namespace comes with each call

        def turn(said: str, *, thread: str, who: str) -> None:
            config = {"configurable": {"thread_id": thread, "namespace": ("acme", who)}}
            found = agent.invoke({"said": said}, config)["found"]
            print(f"{who}, {thread}: {said}", *(f"    {line}" for line in found), sep="\n")

        turn("My cat is called Miso.", thread="monday", who="alice")
        turn("I work in a bakery in Lyon.", thread="monday", who="alice")
        turn("The train leaves at nine.", thread="monday", who="alice")
        turn("Do you remember my pet?", thread="friday", who="alice")
        turn("Do you remember my pet?", thread="friday", who="bob")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
