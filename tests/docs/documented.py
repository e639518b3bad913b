"""
The commands that the documents tell a reader to type: those of README and the other pages at the root, of `docs/`, of
`launch/README.md`, of the notebooks' texts, and of the comments at the head of configs and launchers.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# CHANGELOG tells of what was
PAGES = [*sorted(REPOSITORY.glob("docs/**/*.md")), *sorted(REPOSITORY.glob("*.md")), REPOSITORY / "launch/README.md"]
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
NOTEBOOKS = sorted(REPOSITORY.glob("notebooks/*.ipynb"))
SETTINGS = [*sorted(REPOSITORY.glob("configs/*.yaml")), *sorted(REPOSITORY.glob("launch/*.yaml"))]

_PROGRAMS = {
    *("trl-entropy", "python", "python3", "bash", "pip", "accelerate", "git", "trl", "tensorboard", "kill", "ssh"),
    *("cd", "export", "nohup", "tail", "sbatch", "sky", "ruff", "nvidia-smi", "tmux", "column", "ls", "uv", "."),
}
_BLOCK = re.compile(r"^( *)```(?:bash|sh|shell|console)?\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_ANY_BLOCK = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
_ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=\S+ )+")


def _lines_of_page(text: str) -> Iterator[str]:
    """Lines of blocks without a language and of indented ones, joined where they go on, and code spans."""
    rest = _ANY_BLOCK.sub("", text)
    indented = "\n".join(re.findall(r"^    +(\S.*)$", rest, re.MULTILINE))
    for block in [*(block for _, block in _BLOCK.findall(text)), indented]:
        yield from _with_variables(block.replace("\\\n", " ").splitlines())
    yield from re.findall(r"`([^`\n]+)`", rest)


def _with_variables(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a block, with what it has set, as in NAME="some words", in the place of $NAME."""
    known: dict[str, str] = {}
    for line in lines:
        if given := re.fullmatch(r'([A-Z]+)="(.*)"', line.strip()):
            known[given[1]] = given[2]
        else:
            yield re.sub(r"\$([A-Z]+)\b", lambda found: known.get(found[1], found[0]), line)


def _lines_of_settings(text: str) -> Iterator[str]:
    """The comments at the head, each from `Start: ` or the like on, up to a word on what the command does."""
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        command = re.sub(r"^#\s*(?:Start: |Server: )?", "", line)
        yield re.split(r", which |(?<=\S)\s{2,}", command)[0]


def _is_command(line: str) -> bool:
    """More than the name of a program, whatever is set in its environment."""
    words = _ENVIRONMENT.sub("", line).split()
    return len(words) > 1 and words[0] in _PROGRAMS and not re.search(r"[^.]\.$", line)


def documented() -> dict[str, list[Path]]:
    """Each command with one space between words, without comments -> the documents that name it."""
    lines = [(path, line) for path in PAGES for line in _lines_of_page(path.read_text(encoding="utf-8"))]
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                lines += [(path, line) for line in _lines_of_page(text)]
            else:
                lines += [(path, line[1:]) for line in text.splitlines() if line.startswith("!")]
    lines += [(path, line) for path in SETTINGS for line in _lines_of_settings(path.read_text(encoding="utf-8"))]
    found: dict[str, list[Path]] = {}
    for path, line in lines:
        command = " ".join(line.split(" #")[0].split())
        if _is_command(command) and path not in found.setdefault(command, []):
            found[command].append(path)
    return found


def words_of(command: str) -> list[str]:
    """The command of this package with its own words, or nothing: `accelerate launch ... -m trl_entropy.train` too."""
    line = re.split(r" (?:>>?|2>&1|&)(?: |$)", _ENVIRONMENT.sub("", command))[0]
    found = re.search(r"(?:^|\s)(?:trl-entropy |-m trl_entropy\.)([\w.-]+)(.*)", line)
    return [found[1].replace("_", "-"), *found[2].split()] if found else []
