"""An agent that remembers across threads: ``create_agent`` with ``MemoryMiddleware``, offline.

What was told in one thread is there in the next. The agent's state holds what was said, and nothing that memory put
into the request; ``memory.namespace(...).why()`` tells what the model was shown, and why.
"""

import tempfile
from pathlib import Path

from langchain.agents import create_agent
from langgraph.checkpoint.memory import InMemorySaver

from memory_os import Memory
from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.langchain import ChatLLM
from memory_os.adapters.middleware import MemoryMiddleware


def main(folder: Path) -> None:
    """Tell the agent something in one thread, and ask for it in another."""
    with Memory.open(folder / "memory.db") as memory:
        agent = create_agent(
            ChatLLM(llm=HuggingFaceLLM("smollm2"), max_tokens=32),
            middleware=[MemoryMiddleware(memory)],
            checkpointer=InMemorySaver(),
            system_prompt="You are a helpful assistant with a long-term memory. Answer in one short sentence.",
        )

        def say(thread: str, words: str) -> None:
            config = {"configurable": {"thread_id": thread, "namespace": ("acme", "alice")}}
            state = agent.invoke({"messages": [{"role": "user", "content": words}]}, config)
            print(f"[{thread}] {words}\n         {state['messages'][-1].text.strip()}")

        say("monday", "My cat is called Miso, and she is afraid of thunder.")
        say("friday", "What is the name of my cat?")
        trace, _ = memory.namespace("acme", "alice").why()
        print(f"\nThe model was shown, in {trace.account.total} tokens of at most {trace.account.limit}:")
        for entry in trace.ledger:
            print(f"  #{entry.seq} {entry.action}: {entry.reason}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
