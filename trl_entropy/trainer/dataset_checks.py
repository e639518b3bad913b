"""What the datasets of a run must have, checked before a model is loaded: prompts, enough of them, drawn by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from datasets import Dataset, IterableDataset

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.probes import FisherProbe, MutualInformationProbe, NoiseScaleProbe
from trl_entropy.probes.entropy_change import EntropyChangeProbe
from trl_entropy.rollouts.drawing import has_images
from trl_entropy.runs.counted import counted
from trl_entropy.tasks.arguments import too_few_prompts
from trl_entropy.trainer.step_prompts import most_generations


class Draw(NamedTuple):
    """A probe or a control that draws prompts: what turned it on, from where, how many."""

    name: str
    source: str
    num_prompts: int


def check_datasets(
    args: DrGRPOConfig,
    train_dataset: object,
    eval_dataset: object,
    *,
    prompts_from_environment: bool = False,
    has_episodes: bool = False,
    callbacks: Iterable[object] = (),
) -> None:
    """
    Refuse datasets that the settings cannot train on, or draw from.

    Args:
        eval_dataset: one dataset, or several by name.
        prompts_from_environment: whether TRL may take prompts from an environment instead of a column.
        has_episodes: whether completions are episodes with tools or of a `rollout_func`.
        callbacks: the caller's own, of which probes may draw prompts.

    Raises:
        ValueError: for too few prompts, a missing column `prompt`, a streamed dataset of which rows are drawn, an
            evaluation set that a probe draws from and that is not there, or images where they cannot be followed.
    """
    callbacks = list(callbacks)
    draws = draws_of(args, callbacks)
    sets = _named("eval_dataset", eval_dataset)
    for name, dataset in {"train_dataset": train_dataset, **sets}.items():
        _check_prompts(name, dataset, prompts_from_environment)
    _check_rows_of_training(args, train_dataset)
    selecting = {
        "curriculum='pass_rate'": args.curriculum != "none",
        "resample_uninformative_groups=True": args.resample_uninformative_groups,
    }
    _check_rows_are_drawn([name for name, is_set in selecting.items() if is_set], {"train_dataset": train_dataset})
    for draw in draws:
        _check_draw(args, draw, sets if draw.source == "eval" else {"train_dataset": train_dataset})
    drawn_from = sets if any(draw.source == "eval" for draw in draws) else {}
    drawn_episodes = [draw.name for draw in draws] if has_episodes else []
    _check_images(args, {"train_dataset": train_dataset, **drawn_from}, callbacks, drawn_episodes)


def draws_of(args: DrGRPOConfig, callbacks: Iterable[object]) -> list[Draw]:
    """The probes and controls that draw prompts, of the settings and of the caller's own callbacks."""
    return [*_draws_of_settings(args), *_draws_of_callbacks(callbacks)]


def _named(name: str, dataset: object) -> dict[str, object]:
    if isinstance(dataset, Mapping):
        return {f"{name}[{key!r}]": one for key, one in dataset.items()}
    return {} if dataset is None else {name: dataset}


def _draws_of_settings(args: DrGRPOConfig) -> Iterator[Draw]:
    if args.entropy_probe and args.entropy_probe_completions in ("held_out", "eval"):
        source = args.entropy_probe_completions
        yield Draw(f"entropy_probe_completions={source!r}", source, args.num_entropy_completions())
    if args.entropy_control != "none" and args.entropy_control_completions == "probe":
        yield Draw("entropy_control_completions='probe'", "held_out", args.entropy_control_num_completions)


def _draws_of_callbacks(callbacks: Iterable[object]) -> Iterator[Draw]:
    sources = {"held_out": "held_out", "eval": "eval", "probe": "held_out"}
    for callback in callbacks:
        source = sources.get(str(getattr(callback, "source", None)))
        if source is not None and getattr(callback, "draw", None) is None:  # else it draws from elsewhere
            yield Draw(f"{type(callback).__name__} (source={source!r})", source, getattr(callback, "num_prompts", 0))


def _check_prompts(name: str, dataset: object, prompts_from_environment: bool) -> None:
    columns = getattr(dataset, "column_names", None)  # None: of a stream that says nothing of itself
    if columns is not None and "prompt" not in columns and not prompts_from_environment:
        raise ValueError(f"{name} has no column 'prompt', only {sorted(columns)}. Rename the column with the prompts.")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} has no rows.")


def _check_rows_of_training(args: DrGRPOConfig, dataset: object) -> None:
    """TRL makes generations of whole batches of prompts, and none of fewer: it would train nothing."""
    needed = int(args.generation_batch_size or 0) // int(args.num_generations or 1)
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(too_few_prompts(f"train_dataset has {counted(len(dataset), 'prompt')}", needed))


def _check_rows_are_drawn(names: list[str], datasets: Mapping[str, object]) -> None:
    for dataset_name, dataset in datasets.items():
        if names and isinstance(dataset, IterableDataset):
            raise ValueError(
                f"{' and '.join(names)} draws rows by number; a streamed dataset ({dataset_name}) has none. "
                "Load it whole."
            )
        if names and "prompt" not in (getattr(dataset, "column_names", None) or ["prompt"]):
            raise ValueError(
                f"{' and '.join(names)} draws prompts from {dataset_name}, whose prompts come from an environment. "
                "Turn it off, or add a column 'prompt'."
            )


def _check_draw(args: DrGRPOConfig, draw: Draw, datasets: Mapping[str, object]) -> None:
    if draw.source == "eval" and not datasets:
        raise ValueError(
            f"{draw.name} draws prompts from eval_dataset, and there is none. Pass one, or use 'held_out'."
        )
    _check_rows_are_drawn([draw.name], datasets)
    sizes = [len(dataset) for dataset in datasets.values() if isinstance(dataset, Dataset)]
    of_step = 0
    if draw.source == "held_out":  # the step's own prompts are left out
        of_step = int(args.generation_batch_size or 0) // int(args.num_generations or 1)
        of_step *= most_generations(args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations)
    if len(sizes) == len(datasets) and sum(sizes) < draw.num_prompts + of_step:
        beside = f" beside the {of_step} of a step" if of_step else ""
        raise ValueError(
            f"{draw.name} draws {counted(draw.num_prompts, 'prompt')}{beside}, and {' and '.join(datasets)} has "
            f"{sum(sizes)}. "
            "Lower entropy_probe_num_completions (entropy_control_num_completions), or use more prompts."
        )


def _check_images(
    args: DrGRPOConfig, datasets: Mapping[str, object], callbacks: list[object], drawn_episodes: list[str]
) -> None:
    images = {name: found for name, dataset in datasets.items() if (found := _images_of(dataset))}
    if not images:
        return
    where = "; ".join(f"{name}: {', '.join(sorted(found))}" for name, found in images.items())
    if names := _by_text_of_prompts(args):
        raise ValueError(
            f"{' and '.join(names)} knows a prompt by its text, and there are images ({where}). Turn it off, or use "
            "text alone."
        )
    if names := [*_by_sequence(args), *_callbacks_by_sequence(callbacks)]:
        raise ValueError(
            f"{' and '.join(names)} takes the gradient of each completion by the rows of the layers, which in the "
            f"layers that see are those of images ({where}). Turn it off, or use text alone."
        )
    if names := under_other_prompts(args, callbacks):
        raise ValueError(
            f"{' and '.join(names)} scores completions under the prompts of other processes, whose images are not "
            f"exchanged ({where}). Turn it off, or use text alone."
        )
    if drawn_episodes:
        raise ValueError(
            f"{' and '.join(drawn_episodes)} draws episodes with tools or rollout_func, of which TRL does not hand "
            f"over the images ({where}). Measure on the completions of the steps themselves, or use text alone."
        )


def _images_of(dataset: object) -> set[str]:
    """Where a dataset has images: the columns that TRL reads, or the messages of its first prompt."""
    found = {"image", "images"} & set(getattr(dataset, "column_names", None) or ())
    prompt = dataset[0].get("prompt") if isinstance(dataset, Dataset) and len(dataset) else None
    return found | ({"messages of type image"} if has_images(prompt) else set())


def _by_text_of_prompts(args: DrGRPOConfig) -> list[str]:
    names = ["resample_uninformative_groups=True"] if args.resample_uninformative_groups else []
    return [*names, f"curriculum={args.curriculum!r}"] if args.curriculum != "none" else names


def under_other_prompts(args: DrGRPOConfig, callbacks: Iterable[object]) -> list[str]:
    """What scores completions under other prompts, of the settings and of the caller's own callbacks."""
    names = ["mutual_information_probe"] if args.mutual_information_probe else []
    return [*names, *(type(one).__name__ for one in callbacks if isinstance(one, MutualInformationProbe))]


def _by_sequence(args: DrGRPOConfig) -> Iterator[str]:
    yield from ["fisher_probe"] if args.fisher_probe else []
    yield from ["noise_scale_from='groups'"] if args.noise_scale_probe and args.noise_scale_from == "groups" else []
    yield from ["entropy_attribution='sequence'"] if args.entropy_attribution == "sequence" else []


def _callbacks_by_sequence(callbacks: list[object]) -> Iterator[str]:
    for callback in callbacks:
        attribution = callback.attribution if isinstance(callback, EntropyChangeProbe) else None
        if (
            isinstance(callback, FisherProbe)
            or (isinstance(callback, NoiseScaleProbe) and callback.source == "groups")
            or (attribution is not None and attribution.mode == "sequence")
        ):
            yield type(callback).__name__
