"""
Everything that a GPU may do otherwise than a CPU, in two tables and within ten minutes; see `launch/gpu-check.sh`.

    bash launch/gpu-check.sh [--output DIR] [--only TEXT] [--minutes 10] [--device cpu]

The exit status is 1 if a check fails, and 2 if nothing can be checked here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.devices.gpu_rows import Check
    from tests.devices.step_costs import Cost

NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
RESERVE = 60.0  # seconds before the limit in which no row begins


@dataclass
class Report:
    """What was found: the rows of both tables, on which machine, when, and with what."""

    device: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        checks = [row["check"] for row in self.rows if row["result"] == "FAIL"]
        return checks + [f"cost of {cost.name}: {cost.error[:160]}" for cost in self.costs if cost.error]

    def markdown(self) -> str:
        """Both tables, to be put into docs/results/diary.md as they are."""
        from tests.devices.step_costs import table

        packages = ", ".join(f"{name} {version}" for name, version in self.environment["packages"].items() if version)
        lines = [f"`bash launch/gpu-check.sh --device {self.device}`, {self.environment['time'][:10]}:"]
        lines += [f"{self.environment['device']}; {packages}; commit {self.environment['git_commit']}.", ""]
        lines += ["| check | result | found | s |", "| --- | --- | --- | --- |"]
        lines += [f"| {row['check']} | {row['result']} | {row['found']} | {row['s']:.0f} |" for row in self.rows]
        if self.costs:
            shape = "Qwen2.5-1.5B's shape" if self.device == "cuda" else "the smallest model's"
            lines += ["", f"A step of 64 completions at {shape}, |E| = 16, LoRA r = 64:", "", *table(self.costs)]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu-check.md").write_text(self.markdown(), encoding="utf-8")
        costs = [cost._asdict() | {"ratio": cost.ratio} for cost in self.costs]
        costs = [{name: None if value != value else value for name, value in cost.items()} for cost in costs]  # nan
        found = {"environment": self.environment, "device": self.device, "checks": self.rows, "costs": costs}
        (folder / "gpu-check.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"gpu-check: not installed: {', '.join(missing)}. launch/gpu-check.sh says how to carry wheels along.")
        return 2
    _quiet()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here. --device cpu tries whether the script itself runs.")
        return 2
    return _checked(options)


def _options(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__, formatter_class=layout)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), help="folder of gpu-check.md and .json")
    parser.add_argument("--only", default="", help="only rows whose name has this text")
    parser.add_argument("--minutes", type=float, default=10.0, help="rows that would begin later are skipped")
    return parser.parse_args(argv)


def _quiet() -> None:
    """No hub, cuBLAS as reproducible as it can be, and only what this script prints."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from trl_entropy.runs.console import quiet_libraries

    quiet_libraries()


def _checked(options: argparse.Namespace) -> int:
    import torch

    from tests.devices.gpu_rows import checks
    from tests.devices.step_costs import costs
    from trl_entropy.runs.directory import describe_environment

    start, name = time.monotonic(), torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    environment = describe_environment() | {"device": name, "cuda": torch.version.cuda}
    report, deadline = Report(options.device, environment), start + 60 * options.minutes - RESERVE
    for check, function in checks(options.device).items():
        if options.only in check:
            row = _row(check, function, deadline)
            report.rows.append(row)
            report.write(options.output)  # after each row: a machine may be taken away
            print(f"{row['result']:8} {row['s']:5.0f} s  {check}: {row['found']}", flush=True)
    try:
        for cost in costs(options.device, deadline, options.only):
            report.costs.append(cost)
            report.write(options.output)
            found = cost.error[:200] or f"{cost.seconds:.2f} s/step, {cost.ratio:.2f} x, {cost.peak:.1f} GiB"
            print(f"cost            {cost.name}: {found}", flush=True)
    except Exception as error:  # what was found before is worth having
        traceback.print_exc(file=sys.stderr)
        report.rows.append({"check": "table of costs", "result": "FAIL", "found": _short(error), "s": 0.0})
    report.write(options.output)
    print(f"\n{len(report.rows)} checks and {len(report.costs)} costs in {time.monotonic() - start:.0f} s; "
          f"{options.output}/gpu-check.md")  # fmt: skip
    for check in report.failed:
        print(f"FAIL  {check}")
    return int(bool(report.failed))


def _row(check: str, function: Check, deadline: float) -> dict[str, Any]:
    start = time.monotonic()
    if start > deadline:
        return {"check": check, "result": "skipped", "found": "no time is left", "s": 0.0}
    try:
        result, found = function()
    except Exception as error:
        traceback.print_exc(limit=-6, file=sys.stderr)
        result, found = "FAIL", _short(error)
    return {"check": check, "result": result, "found": found, "s": time.monotonic() - start}


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


if __name__ == "__main__":
    sys.exit(main())
