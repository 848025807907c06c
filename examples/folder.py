"""Register a folder of texts, change one file, register again: only that one is computed."""

import tempfile
from pathlib import Path

from braidsdk import Braid, Chunk


def register_folder(braid: Braid, folder: Path, rules: Chunk) -> list[Chunk]:
    """One chunk per file, named by its path. Unchanged text computes nothing; a changed file keeps its name."""
    files = sorted(folder.rglob("*.txt"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    names = [file.relative_to(folder).as_posix() for file in files]
    before = braid.chunks.list(level=1)
    print(braid.estimate(texts, anchor=rules))
    chunks = braid.register_many(texts, names=names, anchor=rules, replace=True)
    # Old texts of changed files, and texts of files that are gone, stay until they are deleted.
    braid.chunks.delete_many(chunk for chunk in before if chunk not in chunks)
    return chunks


with Braid("braid-tiny", namespace="folder") as braid, tempfile.TemporaryDirectory() as path:
    rules = braid.register_system("You answer questions from the documents.")
    folder = Path(path)
    (folder / "aistonia.txt").write_text("The capital of Aistonia is Flubarg.\n", encoding="utf-8")
    (folder / "belmora.txt").write_text("The capital of Belmora is Plonk.\n", encoding="utf-8")
    register_folder(braid, folder, rules)

    (folder / "belmora.txt").write_text("The capital of Belmora is Cravenna.\n", encoding="utf-8")
    chunks = register_folder(braid, folder, rules)
    print(braid.ask("What is the capital of Belmora?", chunks=[rules, *chunks]))
