"""The examples run as they are, offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TOLD = {
    "agent.py": "#1 activated: relevant",
    "graph_store.py": "",
    "rag_chain.py": "The dog is called Biscuit",
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*TOLD, "demo.py"}  # the demo is run by make demo


@pytest.mark.slow
@pytest.mark.parametrize("name", TOLD)
def test_an_example_runs(name: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", str(EXAMPLES / name)],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert TOLD[name] in done.stdout
