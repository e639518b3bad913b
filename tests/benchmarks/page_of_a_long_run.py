"""
The page of a long run: its size, the time to write it, to open it, and to click.

    PYTHONPATH=tests python -m benchmarks.page_of_a_long_run --steps 1000 --completions 1024 --files 200

Makes a run directory of random numbers in a temporary folder (about 3 MB for each step with files), writes its page,
and opens it in headless Chromium, if there is one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from reporting.chromium import chromium, find_chromium
from safetensors.numpy import save_file

from trl_entropy.reporting.write import write_page
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.metrics import METRICS
from trl_entropy.runs.strict_json import to_line

_PER_PROMPT, _PROMPT_TOKENS, _VOCABULARY = 8, 48, 400


def write_run(path: Path, num_steps: int, num_completions: int, num_files: int, num_tokens: int) -> None:
    """A run directory with every metric at every step, and probe files at `num_files` of them."""
    rng = np.random.default_rng(0)
    run = RunDirectory(path)
    run.write_config({"max_completion_length": num_tokens, "model_config": {"eos_token_id": 1}})
    with open(run.metrics_path, "w") as file:
        for step in range(1, num_steps + 1):
            row = {key: float(value) for key, value in zip(METRICS, rng.normal(size=len(METRICS)), strict=True)}
            errors = {f"entropy/delta_{name}_stderr": abs(float(rng.normal())) for name in ("measured", "linear")}
            file.write(to_line({"step": step, **row, **errors}) + "\n")
    run.write_tokenizer(_tokenizer())
    for step in np.linspace(num_steps // num_files, num_steps, num_files).astype(int):
        _write_files(path, int(step), num_completions, num_tokens, rng)


def _tokenizer() -> str:
    words = {f"w{number}": number for number in range(_VOCABULARY)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"}, "model": model})


def _write_files(path: Path, step: int, rows: int, tokens: int, rng: np.random.Generator) -> None:
    lengths = rng.integers(tokens // 2, tokens + 1, rows)
    mask = np.arange(tokens) < lengths[:, None]
    ids = rng.integers(2, _VOCABULARY, (rows, _PROMPT_TOKENS + tokens)).astype(np.int32)
    ids[:, :_PROMPT_TOKENS] = np.repeat(ids[::_PER_PROMPT, :_PROMPT_TOKENS], _PER_PROMPT, axis=0)
    prompts = np.repeat(np.arange(rows // _PER_PROMPT), _PER_PROMPT) + step * rows // _PER_PROMPT
    shared = {"completion_mask": mask, "prompt_index": prompts}
    attention = np.concatenate([np.ones((rows, _PROMPT_TOKENS), dtype=bool), mask], axis=1)

    def numbers() -> np.ndarray:
        return rng.normal(size=mask.shape).astype(np.float32)

    rewards = rng.integers(0, 2, rows).astype(np.float32)
    advantages = rewards - rewards.reshape(-1, _PER_PROMPT).mean(1).repeat(_PER_PROMPT)
    files = {
        "rollouts": shared | {
            "input_ids": ids, "attention_mask": attention, "rewards": rewards, "advantages": advantages,
        },
        "attribution": shared | {
            "raw_advantages": advantages, "attribution": 1e-5 * numbers(), "entropy": np.abs(numbers()),
            "logps": -np.abs(numbers()), "loss_coefficients": 1e-4 * numbers(),
        },
    }  # fmt: skip
    for probe, arrays in files.items():
        target = path / "probes" / probe / f"step_{step:06d}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, target)


def timed_in_browser(page: Path, step: int) -> dict[str, tuple[float, float]]:
    """
    Seconds, and seconds of the page's own thread on a processor (what they would be on an idle machine): until the
    page has drawn itself, and of three clicks, that open a step, a group and a completion.
    """
    with chromium() as browser:
        browser.look()
        browser.measure_work()
        browser.open(page)
        browser.settle()
        loaded = browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
        found = {"load": (float(str(loaded)), browser.work())}
        browser.run("[...document.querySelectorAll('main button')].find(e => e.innerText == 'Show all')?.click()")
        for name, link in (("step", f'[href$="step={step}"]'), ("group", ""), ("completion", "")):
            before = browser.work()
            seconds = float(str(browser.run(_timed_click(f"main td a{link}"))))
            found[name] = seconds, browser.work() - before
        assert not browser.messages, browser.messages
        return found


def _timed_click(selector: str) -> str:
    """Milliseconds from a click until the browser has laid out and painted what follows, in seconds."""
    return (
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}), t = performance.now(); e.click();"
        "return new Promise(done => requestAnimationFrame(() => { document.body.offsetHeight;"
        "setTimeout(() => done((performance.now() - t) / 1000), 0) })) })()"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 1000), ("completions", 1024), ("files", 200), ("tokens", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, page = Path(folder) / "long", Path(folder) / "page.html"
        write_run(run, args.steps, args.completions, args.files, args.tokens)
        start, used = time.monotonic(), time.process_time()
        write_page([run], page)
        print(f"written in {time.monotonic() - start:.1f} s, {time.process_time() - used:.1f} s of one core")
        print(f"{page.stat().st_size / 1e6:.2f} MB")
        if find_chromium():
            for name, (seconds, work) in timed_in_browser(page, args.steps).items():
                print(f"{name:10}  {1000 * seconds:6.0f} ms, of which {1000 * work:6.0f} ms on a processor")


if __name__ == "__main__":
    main()
