"""Of which optimizers of transformers, by the setting `optim`, the steps can be split (T5)."""

# transformers' names of optimizers with a rule in `trl_entropy.engine.step_rules`.
SPLIT = (
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "adafactor", "adagrad", "rmsprop", "sgd",
)  # fmt: skip
# Those of them whose state the engines read where DeepSpeed or FSDP spread it over processes.
SPLIT_IN_SLICES = ("adamw_torch", "adamw_torch_fused")
# Those that keep torch's Adam moments, `exp_avg` and `exp_avg_sq`.
WITH_MOMENTS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision")


def why_none(name: str) -> str:
    """Why no rule is known for an optimizer of this name, of transformers (`lion_8bit`) or of a class (`Lion8bit`)."""
    name = name.lower()
    if "lion" in name:
        return "Lion's step is the sign of momentum and gradient together, which no metric times the gradient is"
    if "8bit" in name or "4bit" in name or "bnb" in name or "paged" in name:
        return "its moments are quantised or paged, and no probe reads them"
    if any(word in name for word in ("galore", "apollo")):
        return "it steps in a projection of the gradient, so that its metric is not diagonal"
    if "muon" in name:
        return "its step is an orthogonalised matrix, so that its metric is not diagonal"
    if "schedule" in name:
        return "it steps an average of parameters, not the parameters that the gradient is taken at"
    return "no rule is known for it"
