"""Products of matrices with rounded operands, as units of low precision make them, on any device."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
TF32_BITS = 10  # of mantissa, without the leading one; float32 has 23


class RoundedProducts(TorchDispatchMode):
    """
    Rounds the float32 operands of every matrix product to `bits` of mantissa, to nearest and ties to even, as tensor
    cores do with TF32; products and sums of them stay float32. Below forward and reverse mode, so that tangents and
    gradients are rounded as they are on a GPU.
    """

    def __init__(self, bits: int = TF32_BITS) -> None:
        super().__init__()
        self.bits, self.num_products = bits, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for place in PRODUCTS.get(func._schema.name.split("::")[1], ()):
            if args[place].dtype == torch.float32 and not args[place]._is_zerotensor():
                self.num_products += 1
                args = (*args[:place], rounded(args[place], self.bits), *args[place + 1 :])
        return func(*args, **(kwargs or {}))


def rounded(values: Tensor, bits: int) -> Tensor:
    """float32 values with `bits` of mantissa."""
    dropped = 23 - bits
    whole = values.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((whole >> dropped) & 1)
    return ((whole + half) & -(1 << dropped)).view(torch.float32)
