"""The files that probes write into the run directory: `probes/<probe>/step_*.safetensors`, rows of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.step_files import ROLLOUTS, write_probe_file

_ROLLOUTS = ("input_ids", "attention_mask", "completion_mask", "loss_mask", "prompt_index", "rewards", "advantages")


class ProbeFiles:
    """
    Writes the files of all probes of a run.

    Args:
        args: says where to write, and how many files to keep.
        accelerator: gathers the rows of all processes.
        learning_rate: returns the learning rate of the present step, for the files' metadata.
        processing_class: the tokenizer, or a processor that has one; it is kept beside the files, which hold token
            ids, since a run need not have a checkpoint. One without a form in `tokenizer.json` is not kept.
    """

    def __init__(
        self,
        args: ProbeChecks,
        accelerator: Accelerator,
        learning_rate: Callable[[], float],
        processing_class: Any = None,
    ) -> None:
        self._args, self._accelerator, self._learning_rate = args, accelerator, learning_rate
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._tokenizer = getattr(self.tokenizer, "backend_tokenizer", None)
        self._rollouts_written: int | None = None  # the step whose rollouts were written last

    def reset(self) -> None:
        """Called when training begins: the next step's rollouts are not written yet."""
        self._rollouts_written = None

    def write(
        self, probe: str, step: int, tensors: dict[str, Tensor], distribution: str | None = None, **more: object
    ) -> None:
        """
        Gather rows over the processes and write `probes/<probe>/step_*.safetensors` on the main one. Collective.

        Token ids are stored as int32, tensors named `*_mask` as bytes (bool), and numbers of each completion token as
        float32; what there is one of for each row is stored as it is.

        Args:
            tensors: this process's rows by name; the width of `completion_mask`, which must be among them, is the
                number of columns of the completions. `loss_mask` is written if it differs from `completion_mask` in
                any process's rows: where completions hold tokens of tools or environments.
            distribution: which prompts and groups the numbers describe, if not the step's own.
            more: entries of the file's metadata.
        """
        columns = tensors["completion_mask"].shape[1]
        width = torch.tensor([columns], device=self._accelerator.device)
        missing = int(self._accelerator.gather(width).max() - width)  # columns that this rank lacks
        gathered = {}
        for name, given in tensors.items():
            rows = _narrow(name, given, columns)
            if rows.ndim > 1:  # completions are padded on the right, then prompts on the left
                rows = torch.nn.functional.pad(rows, (0, missing))
                rows = self._accelerator.pad_across_processes(rows, dim=1, pad_first=True)
            whole = self._accelerator.gather(rows)
            gathered[name] = whole.bool() if _is_mask(name) else whole
        if "loss_mask" in gathered and torch.equal(gathered["loss_mask"], gathered["completion_mask"]):
            del gathered["loss_mask"]
        self.write_gathered(probe, step, gathered, distribution, **more)

    def write_gathered(
        self, probe: str, step: int, tensors: dict[str, Tensor], distribution: str | None = None, **more: object
    ) -> None:
        """Write `probes/<probe>/step_*.safetensors` on the main process; `tensors` hold the rows of all. Local."""
        args = self._args
        if not self._accelerator.is_main_process or args.probe_files_keep == 0:
            return
        metadata = {
            "temperature": args.temperature,
            "learning_rate": self._learning_rate(),
            "sampler": "vllm" if "sampling_logps" in tensors else "policy",
            "distribution": distribution or args.distribution_of_rollouts(),
            **more,
        }
        run = RunDirectory(args.output_dir)
        write_probe_file(run.path, probe, step, tensors, metadata, args.probe_files_keep)
        if self._tokenizer is not None and not run.tokenizer_path.exists():
            run.write_tokenizer(self._tokenizer.to_str())

    def write_rollouts(self, step: int, rollouts: RolloutBatch) -> None:
        """Write the step's own completions, only once even if several probes call this. Collective."""
        if self._rollouts_written == step:
            return
        self._rollouts_written = step
        self.write(ROLLOUTS, step, {name: getattr(rollouts, name) for name in _ROLLOUTS})


def _is_mask(name: str) -> bool:
    return name.endswith("_mask")


def _narrow(name: str, rows: Tensor, columns: int) -> Tensor:
    """Rows in the type that they are stored in; masks as uint8, since padding makes other numbers of a bool."""
    if _is_mask(name):
        return rows.to(torch.uint8)
    if name == "input_ids":
        return rows.to(torch.int32)
    return rows.float() if rows.dtype == torch.float64 and rows.shape[1:] == (columns,) else rows
