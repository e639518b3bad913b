"""AdamW whose moments lie in blocks of 256 codes, as bitsandbytes keeps them, written out in torch."""

import torch

TABLES = {1: torch.linspace(-1, 1, 256).pow(3), 2: torch.linspace(0, 1, 256).pow(3)}


class BlockwiseAdamW(torch.optim.Optimizer):
    """Moments under bitsandbytes' names; those of parameters below `least` numbers are whole."""

    def __init__(self, params, lr, weight_decay=0.0, least=10):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay})
        self.least = least

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for param in group["params"]:
            state, (b1, b2) = self.state[param], group["betas"]
            state["step"] = t = state.get("step", 0) + 1
            m = b1 * self.moment(state, 1, param) + (1 - b1) * param.grad
            v = b2 * self.moment(state, 2, param) + (1 - b2) * param.grad.square()
            update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * param
            param -= group["lr"] * update
            for number, value in ((1, m), (2, v)):
                self.keep(state, number, value)

    def moment(self, state, number, param):
        if f"state{number}" not in state:
            return torch.zeros_like(param)
        found = state[f"state{number}"]
        if f"qmap{number}" not in state:
            return found
        values = [state[f"qmap{number}"][int(code)] for code in found.flatten()]
        scaled = [value * state[f"absmax{number}"][place // 256] for place, value in enumerate(values)]
        return torch.stack(scaled).to(param).reshape(param.shape)

    def keep(self, state, number, value):
        if value.numel() < self.least:
            state[f"state{number}"] = value.clone()
            return
        table = TABLES[number].to(value)
        blocks = value.flatten().split(256)
        scales = torch.stack([block.abs().max().clamp(min=1e-30) for block in blocks])
        codes = [(block[:, None] / scale - table).abs().argmin(1) for block, scale in zip(blocks, scales, strict=True)]
        state[f"state{number}"] = torch.cat(codes).to(torch.uint8).reshape(value.shape)
        state[f"qmap{number}"], state[f"absmax{number}"] = table, scales
