"""
`ResumableTrainer`: TRL's `GRPOTrainer` with checksums in its checkpoints, whose resumed runs equal uninterrupted runs.

Every override calls `super()`, and was written against trl 1.16 and transformers 5.23.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from trl.trainer.utils import RepeatSampler

from trl_entropy.config.resume_contract import contract_settings
from trl_entropy.engine import ending_together, rank_symmetric
from trl_entropy.evaluation.kept import discard_stale
from trl_entropy.rollouts.user_functions import UserFunctionsTrainer
from trl_entropy.runs import checkpoints, file_errors, tensorboard
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.durable import discard_unfinished_files
from trl_entropy.runs.lock import locked
from trl_entropy.runs.set_aside import set_aside_after
from trl_entropy.runs.state import StateOwner
from trl_entropy.tasks.completion_functions import by_file_name
from trl_entropy.trainer import training_state
from trl_entropy.trainer.curriculum import PassRateSampler
from trl_entropy.trainer.fingerprints import adapter_settings, data_fingerprint, model_fingerprint
from trl_entropy.trainer.training_state import GenerationWindow

logger = logging.getLogger(__name__)
VLLM_ROUNDS = (
    "use_vllm with an adapter: the resumed run is not bit for bit the uninterrupted one, since TRL merges the adapter "
    "into the frozen weights before each draw and takes it out again, which rounds them"
)


# Settings whose values an optimizer or a learning-rate schedule keeps in its own state.
_OF_THE_OPTIMIZER = (
    *("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "warmup_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "max_steps", "num_train_epochs"),
)


class ResumableTrainer(UserFunctionsTrainer):
    """The part of [`~trl_entropy.DrGRPOTrainer`] for checkpoints, with `runs/checkpoints.py`, `training_state.py`."""

    function_files: Mapping[str, str] = MappingProxyType({})  # the user's own files, by path, with their hashes
    _train_sampler: Any = None
    _data_fingerprint: str | None = None

    def state_owners(self) -> dict[str, StateOwner]:
        """Objects whose state a checkpoint keeps in addition to transformers' own files, by name."""
        return {"generation_window": GenerationWindow(self)}

    def begin_training(self) -> None:
        """Called when `train()` begins, before a checkpoint is loaded: forget what an exception has left half done."""
        GenerationWindow(self).reset()

    def checkpoints_in_use(self) -> set[int]:
        """The steps whose checkpoints `save_total_limit` must not delete yet."""
        return set()

    def end_training(self) -> None:
        """Called when `train()` ends, with an exception too."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`]; on a CPU a resumed run equals an uninterrupted one bit for bit.

        A run that is resumed after its last step is left as it is; the model gets the checkpoint's weights.

        Args:
            resume_from_checkpoint: path of a complete checkpoint; `"latest"` or True: the newest one in `output_dir`,
                or the beginning if no step has been logged there; `"latest_or_new"`: the newest one, or the beginning.

        Raises:
            ValueError: if `output_dir` holds a run already, which is not resumed.
            CheckpointError: if the checkpoint is incomplete, damaged, or of another run.
            RunIsLocked: if another process trains in `output_dir` now.
            OtherRankFailed: if another process has failed first; that process raises its own exception.
        """
        with ending_together(self.accelerator), self._locked_run():
            checkpoint, is_finished = self._checked_checkpoint(resume_from_checkpoint)
            if checkpoint is not None and is_finished:
                return self._leave_finished(checkpoint)
            self._prepare_run(checkpoint, resumes=bool(resume_from_checkpoint))
            self.begin_training()
            try:
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            finally:
                self.end_training()
            self._delete_old_checkpoints(Path(self.args.output_dir))  # whose evaluation has been waited for
            return output

    @contextlib.contextmanager
    def _locked_run(self) -> Iterator[None]:
        """Inside, no other process trains in the run directory; the main process holds the lock."""
        with contextlib.ExitStack() as stack:
            with rank_symmetric(self.accelerator, "locking the run directory"):
                if self.is_world_process_zero():
                    stack.enter_context(locked(Path(self.args.output_dir)))
            yield

    def _leave_finished(self, checkpoint: Path) -> TrainOutput:
        """What `train()` does after the last step: only load what it would have trained."""
        told = checkpoints.describe_finished(checkpoint)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # whose weights are loaded inside of `train()`
            told += " The trainer's model still has the weights that it was made with."
        else:
            self._load_from_checkpoint(str(checkpoint))
        if self.is_world_process_zero():
            logger.warning(told)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        return TrainOutput(self.state.global_step, math.nan, {})

    def _prepare_run(self, checkpoint: Path | None, resumes: bool) -> None:
        """Make settings, metrics and TensorBoard continue after the checkpoint's step."""
        step = 0 if checkpoint is None else checkpoints.read_seal(checkpoint)["step"]
        if self.args.additional_steps:
            self.args.max_steps = step + self.args.additional_steps
        if resumes and self.is_world_process_zero():
            set_aside_after(RunDirectory(self.args.output_dir), step)
        if self.is_world_process_zero():
            self._discard_unfinished(Path(self.args.output_dir), step)
            RunDirectory(self.args.output_dir).append_start(step, checkpoint, self._allowed_changes)
        if checkpoint is not None:
            self.args.eval_on_start = False  # the run did it before its first step, and would now draw other samples
            if self.is_world_process_zero():
                logger.info("going on from %s, after step %d", checkpoint, step)
                if self.args.use_vllm and isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
                    logger.warning(VLLM_ROUNDS)
                tensorboard.continue_after(self.callback_handler.callbacks, step)

    @staticmethod
    def _discard_unfinished(run: Path, step: int) -> None:
        """Remove what a killed training, or an evaluation of its later steps, has left unfinished."""
        discard_stale(run, step)
        for folder in (*run.glob("probes/*/"), run / "completions"):
            discard_unfinished_files(folder)

    def _checked_checkpoint(self, resume_from: str | bool | None) -> tuple[Path | None, bool]:
        """The checkpoint to resume from, checked to be of this run, or None; and whether it is that of the last step.

        The same on all ranks.
        """
        found: list[Any] = [None, False, {}]
        with rank_symmetric(self.accelerator, "reading the run directory"):
            if self.is_world_process_zero():
                run, args = Path(self.args.output_dir), self.args
                path = checkpoints.resolve(resume_from, run)
                if not resume_from:
                    RunDirectory(run).check_unused()
                    if args.resume_allow_changes:
                        logger.warning(
                            "resume_allow_changes is %s, but nothing is resumed: set resume_from_checkpoint with it",
                            args.resume_allow_changes,
                        )
                if path is not None:
                    changes = checkpoints.check_contract(path, self._contract(), args.resume_allow_changes)
                    finished = checkpoints.is_finished(path, args.max_steps, args.num_train_epochs)
                    found = [str(path), finished and not args.additional_steps, changes]
        broadcast_object_list(found)
        path, finished, self._allowed_changes = found
        return None if path is None else Path(path), finished

    def _contract(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that wrote its checkpoint."""
        model = self.accelerator.unwrap_model(self.model)
        if self._data_fingerprint is None:
            self._data_fingerprint = data_fingerprint(self.train_dataset)
        settings = contract_settings(
            self.args,
            reward_funcs=self.reward_func_names,
            function_files=by_file_name(self.function_files),
            tools=[tool.__name__ for tool in self.tools],  # those of environments too
            rollout_func=getattr(self.rollout_func, "__qualname__", type(self.rollout_func).__qualname__),
        )
        return {
            "settings": settings | adapter_settings(model),
            "model": model_fingerprint(model),
            "data": self._data_fingerprint,
            "format": training_state.STATE_FORMAT,
        }

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs_trained, steps_in_epoch = super()._init_training_state(*args, **kwargs)
        # The sampler draws one permutation per epoch from its own generator, whose state is not saved: redraw them.
        if isinstance(self._train_sampler, RepeatSampler) and self._train_sampler.shuffle:
            for _ in range(epochs_trained):
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)
        if isinstance(self._train_sampler, PassRateSampler):
            self._train_sampler.resumes_within_epoch = steps_in_epoch > 0
        return epochs_trained, steps_in_epoch

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        training_state.load(self.state_owners(), Path(checkpoint), self.args.process_index)
        changed = any(name in _OF_THE_OPTIMIZER for name in self._allowed_changes)
        if changed:
            self._set_hyperparameters()
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        follows_steps = not isinstance(scheduler, ReduceLROnPlateau)
        if (changed or self.args.additional_steps) and follows_steps:  # the loaded rate is that of the other schedule
            scheduler.base_lrs = [self.args.learning_rate] * len(scheduler.base_lrs)
            scheduler.last_epoch -= 1
            scheduler.step()

    def _set_hyperparameters(self) -> None:
        """Give the optimizer those of the arguments: it has loaded the checkpoint's."""
        args = self.args
        values = {
            "lr": args.learning_rate,
            "initial_lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
        }
        values |= {"eps": args.adam_epsilon, "weight_decay": args.weight_decay}
        for place, group in enumerate(self.optimizer.param_groups):
            kept = ("weight_decay",) if place else ()  # transformers' second group is that without decay
            group.update({name: value for name, value in values.items() if name in group and name not in kept})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(path, model, trial)
        except Exception as error:
            whole = [str(p) for p in checkpoints.checkpoints_of(path.parent) if (p / checkpoints.SEAL).exists()]
            anew = "begin anew with resume_from_checkpoint=latest_or_new: no checkpoint is complete yet"
            go_on = f"resume from {whole[0]}" if whole else anew
            raise checkpoints.CheckpointError(
                f"writing {path} failed: {str(error).removesuffix('.')}. {_remedy(error, path)}; then {go_on}."
            ) from error

    def _write_checkpoint(self, path: Path, model: Any, trial: Any) -> None:
        """Write all files, then a seal with checksums, then delete old checkpoints, never the only complete one."""
        if self.args.should_save and path.exists():  # of a run that was interrupted, or resumed from an earlier step
            checkpoints.remove(path)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.save_only_model:
            training_state.save(self.state_owners(), path, self.args.process_index)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(path, {"step": self.state.global_step, **self._contract()})
        self._delete_old_checkpoints(path.parent)

    def _delete_old_checkpoints(self, run: Path) -> None:
        """Keep `save_total_limit` of them, the newest, the best one, and those that something else reads still."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if not limit or not self.args.should_save:
            return
        found = checkpoints.checkpoints_of(run)  # by step: a clock may have been set back
        kept = set(found[:1]) | ({Path(best)} if best else set())
        in_use = self.checkpoints_in_use()
        old = [p for p in reversed(found) if p not in kept and checkpoints.step_of(p) not in in_use]
        for path in old[: max(0, len(found) - max(limit, len(kept)))]:
            with contextlib.suppress(OSError):  # as in transformers: what cannot be deleted stays
                checkpoints.remove(path)


def _remedy(error: Exception, path: Path) -> str:
    if file_errors.is_full(error, path):
        return "Make room, or set save_total_limit"
    return file_errors.remedy(error).capitalize()
