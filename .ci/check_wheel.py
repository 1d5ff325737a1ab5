"""Whether a wheel and an sdist hold all that they should, and nothing that they should not.

Usage: check_wheel.py DIST_FOLDER CHECKOUT
"""

import sys
import tarfile
import zipfile
from pathlib import Path

FOLDERS = ("memory_os", "stores", "controllers", "adapters", "cli", "benchmarks")


def main(dist: Path, root: Path) -> None:
    """Exit with a list of faults, one a line, if there are any."""
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        (entry_points,) = (name for name in in_wheel if name.endswith(".dist-info/entry_points.txt"))
        scripts = archive.read(entry_points).decode()
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}

    sources = {
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    installed = {name if name.startswith("memory_os/") else f"memory_os/{name}" for name in sources}
    packaged = {name for name in in_wheel if name.startswith("memory_os/")}
    tops = {name.split("/")[0] for name in in_wheel}

    faults = [
        *(f"the wheel has another top-level name: {top}" for top in tops - {"memory_os", entry_points.split("/")[0]}),
        *(f"the wheel lacks {name}" for name in installed - packaged),
        *(f"the wheel has what the checkout has not: {name}" for name in packaged - installed),
        *(f"the sdist lacks {name}" for name in (sources | {"pyproject.toml", "README.md", "LICENSE"}) - in_sdist),
    ]
    for name in ("py.typed", "stores/migrations/__init__.py", "stores/migrations/env.py"):
        if f"memory_os/{name}" not in packaged:
            faults.append(f"the wheel lacks memory_os/{name}")
    if not any(name.startswith("memory_os/stores/migrations/versions/0") for name in packaged):
        faults.append("the wheel lacks the migration steps")
    if "memos = memory_os.cli.main:run" not in scripts.splitlines():
        faults.append("the wheel lacks the memos command")
    if faults:
        sys.exit("\n".join(faults))
    print(f"{wheel.name}: {len(packaged)} files; {sdist.name}: {len(in_sdist)} files; all there")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).resolve())
