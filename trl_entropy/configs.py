"""
The configs that the package brings: `trl-entropy configs` lists them, `trl-entropy configs NAME` prints a path.

So that `accelerate launch --config_file "$(trl-entropy configs zero2)"` works without a clone. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys

from trl_entropy.config.shipped import shipped_configs, shipped_engines
from trl_entropy.runs.file_errors import ending_in_one_line


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Print the list, or the path of the file that the command line names."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy configs", description="List the configs that the package brings, or print the path of one."
    )
    parser.add_argument(
        "name", nargs="?", help="of a config for --config, or of a file for accelerate's --config_file"
    )
    name = parser.parse_args(argv).name
    if name is not None:
        found = (shipped_configs() | shipped_engines()).get(name)
        print(found) if found else sys.exit(
            f"Error: the package brings no config {name!r}: trl-entropy configs lists all."
        )
        return
    for title, files in (("--config", shipped_configs()), ("accelerate launch --config_file", shipped_engines())):
        print(f"for {title}:")
        for stem, path in files.items():
            print(f"  {stem:<30} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")


if __name__ == "__main__":
    main()
