"""A chain that answers from memory: retriever, prompt, model, all offline.

The retriever is LangChain's ``BaseRetriever``; what it finds are the segments of one namespace, with who said them and
when. The namespace comes with the call, so that one chain serves every user. As a tool it goes to any agent.
"""

import tempfile
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool

from memory_os import Memory
from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.langchain import ChatLLM, MemoryRetriever

CONVERSATION = Path(__file__).with_name("conversation.json")
QUESTION = "What is the name of my sister's dog?"

prompt = ChatPromptTemplate.from_messages(
    [("system", "Answer from what was said:\n{memory}"), ("user", "{question}")]
)  # fmt: skip


def as_lines(documents: list[Document]) -> str:
    """Documents as lines of a prompt."""
    return "\n".join(f"{d.metadata['date'][:10]} {d.metadata['speaker']}: {d.page_content}" for d in documents)


def main(folder: Path) -> None:
    """Store a conversation, and ask a chain about it."""
    with Memory.open(folder / "memory.db") as memory:
        memory.namespace("acme", "nora").ingest(CONVERSATION)
        retriever = MemoryRetriever(memory=memory, k=3)
        chain = (
            {"memory": retriever | as_lines, "question": RunnablePassthrough()}
            | prompt
            | ChatLLM(llm=HuggingFaceLLM("smollm2"), max_tokens=32)
            | StrOutputParser()
        )
        config = {"configurable": {"namespace": ("acme", "nora")}}
        print(as_lines(retriever.invoke(QUESTION, config)))
        print("\n" + QUESTION)
        print(chain.invoke(QUESTION, config).strip())

        tool = create_retriever_tool(retriever, "search_memory", "What the user said in earlier conversations.")
        print(f"\n{tool.name}: {tool.description}")
        print(tool.invoke({"query": "peanuts"}, config).splitlines()[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
