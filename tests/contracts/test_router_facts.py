"""Facts of TRL, transformers and torch that the parts of a mixture of experts rely on."""

import inspect

import torch
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralPreTrainedModel, MixtralTopKRouter
from trl import GRPOTrainer

from trl_entropy.gradients.router_choices import ROUTER_OUTPUT
from trl_entropy.models.tiny import family_config, tiny_config, tiny_model


def source(function) -> str:
    return inspect.getsource(inspect.unwrap(function))


def test_trl_adds_the_mean_over_micro_batches_of_a_coefficient_times_the_balancing_loss():
    """`auxiliary_coefficient` and `auxiliary_slope` are of this."""
    init, loss = source(GRPOTrainer.__init__), source(GRPOTrainer._compute_loss)
    assert 'getattr(text_config, "router_aux_loss_coef", 0.0) if coef is None else coef' in init
    assert 'hasattr(text_config, "output_router_logits") and self.router_aux_loss_coef != 0.0' in init
    assert "loss = loss + self.router_aux_loss_coef * aux_loss / normalizer" in loss
    assert 'self.current_gradient_accumulation_steps if mode == "train"' in loss
    assert 'model_inputs["output_router_logits"] = True' in source(GRPOTrainer._get_per_token_logps_and_entropies)


def test_the_loss_is_of_the_whole_batch_without_its_padding_whatever_logits_are_kept():
    torch.manual_seed(0)
    model = tiny_model(tiny_config(family_config("mixtral"))).eval()
    ids = torch.arange(12).view(2, 6) + 3
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    wider, further = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
    given = [(ids, mask, 0), (ids, mask, 1), (wider, further, 1)]
    losses = [
        model(input_ids=i, attention_mask=m, logits_to_keep=keep, output_router_logits=True).aux_loss
        for i, m, keep in given
    ]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_transformers_lists_the_routers_and_they_return_the_chosen_experts():
    listed = MixtralPreTrainedModel._can_record_outputs or {}
    assert listed == {} or ROUTER_OUTPUT in listed
    tables = [getattr(kind, "_can_record_outputs", None) or {} for kind in MixtralForCausalLM.__mro__]
    model = tiny_model(tiny_config(family_config("mixtral")))
    tables += [getattr(type(module), "_can_record_outputs", None) or {} for module in model.modules()]
    specs = [table[ROUTER_OUTPUT] for table in tables if ROUTER_OUTPUT in table]
    assert {getattr(spec, "target_class", spec) for spec in specs} == {MixtralTopKRouter}
    router = next(module for module in model.modules() if isinstance(module, MixtralTopKRouter))
    whole = [part for part in router(torch.randn(5, 32)) if not part.is_floating_point()]
    assert len(whole) == 1 and whole[0].shape == (5, 2)


def test_torch_hands_out_wrappers_in_forward_mode_that_can_be_opened():
    kept = []

    def function(x):
        kept.append(torch._C._functorch.get_unwrapped(x.topk(1).indices))
        return x.sum()

    torch.func.jvp(function, (torch.tensor([1.0, 3.0, 2.0]),), (torch.ones(3),))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept[0]) and kept[0].tolist() == [1]
