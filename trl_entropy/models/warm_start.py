"""The embedded model after supervised training (the warm start), from which RL on word problems starts; cached."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from trl_entropy.models import embedded as embedded_model
from trl_entropy.models import embedded_agent
from trl_entropy.models.fine_tuning import tokenize_demonstrations, train_on_tokens
from trl_entropy.models.loading import EMBEDDED_AGENT, EMBEDDED_MODEL
from trl_entropy.runs.strict_json import Json
from trl_entropy.tasks import calculator, r1_template, word_problems

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

# What determines the warm start, in addition to the files that write the data and build the model. Raise the version
# when a change of this file changes the result.
WARM_START_RECIPE: Json = {
    "version": 1,
    "num_clean": 7_200,
    "num_flawed": 2_400,
    "flawed_share": 0.5,
    "per_device_train_batch_size": 16,
    "learning_rate": 1.5e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 20,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}
COMPLETE_MARK = "warm_start.json"  # written last: a directory without it is not a warm start
_SAYS = "warm start: "  # begins a line of the build that is for the user


def warm_start(cache_dir: str | os.PathLike | None = None, seed: int = 0, name: str = EMBEDDED_MODEL) -> Path:
    """Returns the directory of an embedded model after its warm start, and builds it if it is missing.

    The result is cached under a hash of everything that determines it. It is built in a process of its own, so that
    the random state, the threads and the accelerator of the caller do not change. All ranks of a distributed run may
    call this: one builds, and the others wait. The remains of a build that was killed are never used.

    Args:
        cache_dir: Where to cache it; by default `$TRL_ENTROPY_CACHE`, else `$XDG_CACHE_HOME/trl_entropy`, else
            `~/.cache/trl_entropy`.
        seed: Of the initial weights and of the demonstrations.
        name: `"embedded"`, for word problems, or `"embedded-agent"`, which calls a calculator.

    Returns:
        A directory from which `from_pretrained` loads model and tokenizer.

    Raises:
        RuntimeError: If the build fails; the message ends with the last lines that it printed.
    """
    from filelock import FileLock

    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    kind = "warm_start" if name == EMBEDDED_MODEL else f"warm_start-{name}"
    directory = root / f"{kind}-seed{seed}-{_recipe_hash(seed, name)}"
    if (directory / COMPLETE_MARK).exists():
        return directory
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{directory.name}.lock"):
        if not (directory / COMPLETE_MARK).exists():
            print(f"building the warm start, once; cached in {directory}", file=sys.stderr, flush=True)
            _build_into(directory, seed, name)
    return directory


def default_cache_dir() -> Path:
    """`$TRL_ENTROPY_CACHE`, else `$XDG_CACHE_HOME/trl_entropy`, else `~/.cache/trl_entropy`."""
    if path := os.environ.get("TRL_ENTROPY_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_entropy"


def build_warm_start(directory: str | os.PathLike, seed: int, name: str = EMBEDDED_MODEL) -> None:
    """Trains an embedded model by its recipe and saves model, tokenizer, and the file that marks them as complete.

    Args:
        directory: Where to save them; it is created if it is missing.
        seed: Of the initial weights and of the demonstrations.
        name: Of the model.
    """
    from datasets import concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    directory = Path(directory)
    build, load = _AGENT if name == EMBEDDED_AGENT else _WORD_PROBLEMS
    tokenizer = build()
    model = embedded_model.build_model(tokenizer, seed)
    # Correct demonstrations first: with flawed ones among them from the start, training takes twice as many steps.
    recipe = _recipe(seed, name)["recipe"]
    clean = load(tokenizer, recipe["num_clean"], seed, 0.0)
    flawed = load(tokenizer, recipe["num_flawed"], seed + 1_000_000, recipe["flawed_share"])
    args = warm_start_config(directory, seed)
    data = concatenate_datasets([clean, flawed])
    train_on_tokens(model, tokenizer, data, args, callbacks=[_time_left_callback()])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / COMPLETE_MARK).write_text(json.dumps(_recipe(seed, name), indent=2) + "\n")


def _solved_problems(tokenizer: "PreTrainedTokenizerBase", number: int, seed: int, flawed_share: float) -> "Dataset":
    return tokenize_demonstrations(word_problems.load_demonstrations(number, seed, flawed_share), tokenizer)


def _episodes(tokenizer: "PreTrainedTokenizerBase", number: int, seed: int, flawed_share: float) -> "Dataset":
    return embedded_agent.demonstrated(tokenizer, calculator.demonstrations(number, seed, flawed_share))


# How the tokenizer is built, and how the demonstrations are made.
_WORD_PROBLEMS = embedded_model.build_tokenizer, _solved_problems
_AGENT = embedded_agent.build_agent_tokenizer, _episodes


def warm_start_config(output_dir: str | os.PathLike, seed: int) -> "SFTConfig":
    """The `SFTConfig` of the warm start: one epoch in the order of the dataset, float32 on the CPU, no logs."""
    from trl import SFTConfig

    own = ("version", "num_clean", "num_flawed", "flawed_share")
    return SFTConfig(
        output_dir=os.fspath(output_dir),
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        seed=seed,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{name: value for name, value in WARM_START_RECIPE.items() if name not in own},
    )


def _recipe(seed: int, name: str = EMBEDDED_MODEL) -> dict:
    """What determines the weights: recipe, seed, versions, and the files that write the data and build the model."""
    files = [r1_template, word_problems, embedded_model]
    if name == EMBEDDED_AGENT:
        files += [calculator, embedded_agent]
    return {
        "recipe": WARM_START_RECIPE | (embedded_agent.RECIPE if name == EMBEDDED_AGENT else {}),
        "seed": seed,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "trl")},
        "files": {
            module.__name__: hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in files
        },
    }


def _recipe_hash(seed: int, name: str = EMBEDDED_MODEL) -> str:
    return hashlib.sha256(json.dumps(_recipe(seed, name), sort_keys=True).encode()).hexdigest()[:12]


def _build_into(directory: Path, seed: int, name: str) -> None:
    """Builds in a temporary directory and moves the result to `directory` in one step; the caller holds the lock."""
    for leftover in directory.parent.glob(f"{directory.name}.building-*"):
        shutil.rmtree(leftover)
    if directory.exists():  # the file that marks it as complete is missing: files were deleted in it
        shutil.rmtree(directory)
    building = Path(tempfile.mkdtemp(prefix=f"{directory.name}.building-", dir=directory.parent))
    try:
        _run_build(building, seed, name)
        os.replace(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _time_left_callback() -> "TrainerCallback":
    """Says once how long the rest of the build will take, from the time of its first steps."""
    from transformers import TrainerCallback

    class TimeLeft(TrainerCallback):
        first, last = 10, 60  # steps: the first ones are slower

        def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if state.global_step == self.first:
                self.start = time.perf_counter()
            elif state.global_step == self.last:
                each = (time.perf_counter() - self.start) / (self.last - self.first)
                seconds = each * (state.max_steps - state.global_step)
                print(f"{_SAYS}about {seconds:.0f} s are left, at the pace of its first steps", flush=True)

    return TimeLeft()


def _run_build(building: Path, seed: int, name: str) -> None:
    module = "trl_entropy.models.warm_start"
    code = f"import sys, {module} as w; w.build_warm_start(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
    with subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(building), str(seed), name],
        env=_single_process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        try:
            printed = _pass_on(child.stdout or ())
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise RuntimeError(f"building the warm start failed with exit status {child.returncode}:\n{printed[-4000:]}")


def _pass_on(lines: Iterable[str]) -> str:
    """Show the lines that are for the user while they come; returns the others."""
    others = []
    for line in lines:
        if line.startswith(_SAYS):
            print(line, end="", file=sys.stderr, flush=True)
        else:
            others.append(line)
    return "".join(others)


def _single_process_environment() -> dict[str, str]:
    """The environment without a launcher's variables: the build would wait for ranks that wait for it."""
    prefixes = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "PMI_", "OMPI_", "MV2_", "MASTER_", "GROUP_", "ROLE_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in names and not name.startswith(prefixes)}
    # Two threads are best for this model. They wait asleep: on busy cores, threads that wait actively were up to 25
    # times slower than one thread, and on idle cores sleeping costs little. The weights are the same.
    threads = {"OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)), "OMP_WAIT_POLICY": "passive"}
    return {**threads, **kept, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
