"""Executes notebooks in place and keeps their outputs: ``python notebooks/execute.py [FILE...]``.

What says nothing about ferrotune is left out: times of cells, versions of the kernel, and what
other libraries write to stderr, which depends on what else is installed. A notebook's difference
in version control is then that of its text and results.
"""

import sys
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 600  # of one cell


def execute(path: Path) -> Any:
    """The notebook at ``path`` with the outputs of a fresh kernel.

    Raises nbclient's ``CellExecutionError`` with the traceback of a cell that fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=TIMEOUT_SECONDS, kernel_name="python3", record_timing=False
    )
    client.execute(cwd=str(path.parent))
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [found for found in cell.outputs if not _is_chatter(found)]
    return notebook


def _is_chatter(output: Any) -> bool:
    return output.get("name") == "stderr" and "ferrotune" not in output.text


def main(paths: list[str]) -> None:
    """Executes the notebooks at ``paths``, or all beside this file."""
    import nbformat

    folder = Path(__file__).parent
    for path in map(Path, paths) if paths else sorted(folder.glob("*.ipynb")):
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main(sys.argv[1:])
