"""The Fisher kernel written out, the error of its sketch, and the entropy gradient from scores alone, for tests."""

from jaxtyping import Float, Int
from torch import Tensor


def exact_kernel(rows: Float[Tensor, "N D"], preconditioner: Float[Tensor, "D"] | None = None) -> Float[Tensor, "N N"]:
    """(T12): K_ij = phi_i' M phi_j, in float64; nats^2 per unit of the update's coefficient.

    `preconditioner` is the diagonal of M, 0 where parameters were never updated; M = 1 (SGD, or a sketch) by default.
    """
    rows = rows.double()
    return (rows if preconditioner is None else rows * preconditioner.double()) @ rows.T


def sketch_stderr(gram: Float[Tensor, "N N"], dim: int) -> Float[Tensor, "N N"]:
    """(T13): the standard error of every entry of a sketched Gram, sqrt((K_ii K_jj + K_ij^2)/dim).

    Relative to sqrt(K_ii K_jj) that is sqrt((1 + cos^2)/dim): sqrt(2/dim) on the diagonal. An upper bound: the exact
    variance has 2 sum_d M_d^2 x_id^2 x_jd^2 / dim less, which no Gram knows and which many-parameter rows do not have.
    """
    diagonal = gram.double().diagonal()
    return ((diagonal.outer(diagonal) + gram.double().square()) / dim).sqrt()


def score_form_coefficients(
    sequence_logps: Float[Tensor, "B"], num_tokens: Int[Tensor, "B"] | Float[Tensor, "B"], policy_entropy: float
) -> Float[Tensor, "B"]:
    """(T12): w_i = -(S_i + h T_i) / sum T, with which sum_i w_i grad S_i is grad h in expectation only.

    Turns changes of S_i into one of the entropy, sum_i w_i (change of S_i), from scores alone. Unbiased with h and
    E[T] given, bias O(1/B) with their estimates; more variance than (T8), which has the token entropies' gradients.
    """
    lengths = num_tokens.double()
    return -(sequence_logps.double() + policy_entropy * lengths) / lengths.sum()
