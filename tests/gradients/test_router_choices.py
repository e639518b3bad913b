"""The experts that scoring sees chosen are those of a plain forward, in any order of derivatives and any batches."""

import pytest
import torch
from accelerate import Accelerator

from trl_entropy.gradients.router_choices import routers_of
from trl_entropy.gradients.scores import score
from trl_entropy.models.tiny import family_config, tiny_config, tiny_model
from trl_entropy.probes.router_flips import router_flips
from trl_entropy.rollouts.completions import Completions

PROMPT, WIDTH = 3, 4


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    return tiny_model(tiny_config(family_config("mixtral"))).eval()


@pytest.fixture(scope="module")
def completions():
    """Of two prompts that share their reading, of other lengths, the longest not first."""
    ids = torch.randint(3, 128, (4, PROMPT + WIDTH), generator=torch.Generator().manual_seed(0))
    ids[1, :PROMPT], ids[3, :PROMPT] = ids[0, :PROMPT], ids[2, :PROMPT]
    mask = torch.ones_like(ids)
    mask[2:, 0] = mask[0, -2:] = mask[3, -1:] = 0
    own = mask[:, PROMPT:]
    return Completions(ids, mask, own, torch.tensor([0, 0, 1, 1]), loss_mask=own)


def plain(model, completions):
    """(row, token, layer) -> the set of experts, one row without padding at a time."""
    found = {}
    for row, mask in enumerate(completions.attention_mask.bool()):
        ids = completions.input_ids[row][mask][None]
        with torch.no_grad():
            logits = model(input_ids=ids, output_router_logits=True).router_logits
        drawn = int(completions.loss_mask[row].sum())
        for layer, values in enumerate(logits):
            for token, chosen in enumerate(values.topk(2).indices[-drawn:].tolist()):
                found[row, token, layer] = set(chosen)
    return found


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_sets_are_those_of_a_plain_forward(mixture, completions, order, batch_size):
    direction = {name: torch.full_like(param, 1e-3) for name, param in mixture.named_parameters()}
    expected = plain(mixture, completions)  # transformers has set hooks of its own
    hooks = [len(router._forward_hooks) for router in routers_of(mixture)]
    experts = score(mixture, completions, 1.0, batch_size, direction=direction, order=order).experts
    assert experts.shape == (4, WIDTH, 2, 2) and len(expected) == 2 * int(completions.loss_mask.sum())
    assert all(set(experts[place].tolist()) == chosen for place, chosen in expected.items())
    assert [len(router._forward_hooks) for router in routers_of(mixture)] == hooks


def test_the_share_is_that_of_tokens_whose_set_differs(mixture, completions):
    """One router's rows are turned over, so that some tokens get other experts; the padding does not count."""
    before = score(mixture, completions, 1.0, None).experts
    at = {name: param.detach() for name, param in mixture.named_parameters()}
    gate = routers_of(mixture)[1].weight
    name = next(name for name, param in mixture.named_parameters() if param is gate)
    old, at[name] = plain(mixture, completions), gate.detach() + 0.1 * gate.detach().flip(0)
    after = score(mixture, completions, 1.0, None, params=at).experts
    gate.data, kept = at[name], gate.data
    new = plain(mixture, completions)
    gate.data = kept
    share = sum(old[place] != new[place] for place in old) / len(old)
    found = router_flips(before, after, completions.loss_mask.bool(), Accelerator(cpu=True))
    assert 0 < share < 0.5 and found == {"entropy/router_flip_share": pytest.approx(share)}
    assert router_flips(before, before, completions.loss_mask.bool(), Accelerator(cpu=True)) == {
        "entropy/router_flip_share": 0
    }


def test_a_dense_model_has_none(completions):
    model = tiny_model(tiny_config(family_config("llama")))
    assert not routers_of(model)
    assert score(model, completions, 1.0, None).experts is None
    assert router_flips(None, None, completions.loss_mask.bool(), Accelerator(cpu=True)) == {}
