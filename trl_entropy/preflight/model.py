"""Whether the probes of a planned run take its model, tried on a small one of the same architecture and adapter."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from trl_entropy.config.settings_file import one_line
from trl_entropy.gradients.inputs import base_model
from trl_entropy.models.loading import EMBEDDED_MODELS, base_model_of, is_adapter
from trl_entropy.models.tiny import tiny_config, tiny_model
from trl_entropy.preflight.finding import Finding, Findings
from trl_entropy.preflight.shapes import with_adapter, without_zero3
from trl_entropy.probes import model_checks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from trl_entropy.preflight.plan import Plan

Check = functools.partial[None]
# By all that they depend on, so that a report and its findings try a model once
_FOUND: dict[str, list[Finding]] = {}


def probed_model(plan: Plan) -> Findings:
    """
    What probes will refuse of the model, before its weights are loaded. The embedded models are known to be taken;
    quantised ones are refused by the table of support.
    """
    checks = list(_checks(plan))
    name = str(plan.model.model_name_or_path)
    base = base_model_of(name) if is_adapter(name) else name
    if plan.shape is None or base in EMBEDDED_MODELS or plan.quantisation != "none" or not checks:
        return
    config = base_model(plan.shape.module).config
    asked = [(check.func, check.keywords) for check in checks]
    key = f"{config!r} {vars(plan.model)} {asked} {plan.args.router_aux_loss_coef}"
    if key not in _FOUND:
        # Training's random numbers, and one rank's share of a partitioned model, are not this one's
        with torch.random.fork_rng(devices=[]), without_zero3():
            _FOUND[key] = list(_tried(plan, config, checks))
    yield from _FOUND[key]


def _tried(plan: Plan, config: PretrainedConfig, checks: list[Check]) -> Findings:
    try:
        model = with_adapter(tiny_model(tiny_config(config)), plan.model, on_meta=False)
    except Exception as error:  # whatever a family's own code raises on sizes that it does not expect
        text = f"No small model of this architecture could be built ({one_line(error)[:200]})."
        yield Finding(text, "Whether probes take the model is seen when it is loaded.", is_problem=False)
        return
    for check in checks:
        try:
            check(model)
        except ValueError as error:
            yield Finding(one_line(error))  # which training says of the whole model, in the same words
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            text = f"A small model of this architecture could not be tried ({one_line(error)[:200]})."
            yield Finding(text, "See trl-entropy check-model.", is_problem=False)
            return


def _checks(plan: Plan) -> Iterator[Check]:
    """What the enabled probes ask of a model."""
    args = plan.args
    probes = args.enabled_probes()
    if "entropy_probe" in probes:
        predicts = args.entropy_prediction != "none"
        yield functools.partial(model_checks.check_scoring, what="entropy_probe", derivatives=predicts)
        if predicts:
            yield functools.partial(model_checks.check_derivatives, what="entropy_probe")
        if args.entropy_attribution == "sequence":
            yield functools.partial(model_checks.check_sequences, what="entropy_attribution='sequence'")
    if "fisher_probe" in probes:
        yield functools.partial(model_checks.check_scoring, what="fisher_probe")
    of_groups = ["noise_scale_probe"] if args.noise_scale_from == "groups" else []
    for name in [one for one in ("fisher_probe", *of_groups) if one in probes]:
        yield functools.partial(model_checks.check_sequences, what=name)
        yield functools.partial(model_checks.check_no_auxiliary_loss, args, what=name)
