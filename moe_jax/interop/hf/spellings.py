"""How files spell the weights of experts: the names of the tensors and their axes, by our names. Data only."""

from moe_jax.interop.hf.layouts import Layout, Stored


def per_expert(gate: str, up: str, down: str) -> Layout:
    """A tensor [F, H] for each projection of each expert, as torch.nn.Linear has it."""
    name = "experts.{{e}}.{}.weight"
    return {
        "w_gate": Stored(name.format(gate), "F H"),
        "w_up": Stored(name.format(up), "F H"),
        "w_down": Stored(name.format(down), "H F"),
    }


def fused(inner: str, inner_axes: str, down: str, down_axes: str, *, interleaved: bool = False) -> Layout:
    """One tensor for the gates and ups of all experts, and one for their down projections."""
    return {
        "w_gate": Stored(inner, inner_axes, 0, interleaved),
        "w_up": Stored(inner, inner_axes, 1, interleaved),
        "w_down": Stored(down, down_axes),
    }


def biased(layout: Layout, *, interleaved: bool = False) -> Layout:
    """``layout`` with the biases of gpt-oss."""
    return layout | {
        "b_gate": Stored("experts.gate_up_proj_bias", "E 2F", 0, interleaved),
        "b_up": Stored("experts.gate_up_proj_bias", "E 2F", 1, interleaved),
        "b_down": Stored("experts.down_proj_bias", "E H"),
    }


NAMED = per_expert("gate_proj", "up_proj", "down_proj")
NUMBERED = per_expert("w1", "w3", "w2")
FUSED = fused("experts.gate_up_proj", "E 2F H", "experts.down_proj", "E H F")
FUSED_BACKWARD = fused("experts.gate_up_proj", "E H 2F", "experts.down_proj", "E F H")
INTERLEAVED = fused("experts.gate_up_proj", "E H 2F", "experts.down_proj", "E F H", interleaved=True)
LINEARS = fused("input_linear.weight", "E 2F H", "output_linear.weight", "E H F")
DBRX = {
    "w_gate": Stored("experts.mlp.w1", "EF H"),
    "w_up": Stored("experts.mlp.v1", "EF H"),
    "w_down": Stored("experts.mlp.w2", "EF H"),
}
STACKED = {
    "w_gate": Stored("gate_proj.weight", "E F H"),
    "w_up": Stored("up_proj.weight", "E F H"),
    "w_down": Stored("down_proj.weight", "E H F"),
}


def shared(below: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Layout:
    """The shared expert's projections, as torch.nn.Linear has them."""
    return {
        "shared_gate": Stored(f"{below}.{gate}.weight", "S H"),
        "shared_up": Stored(f"{below}.{up}.weight", "S H"),
        "shared_down": Stored(f"{below}.{down}.weight", "H S"),
    }


SHARED_FUSED = {
    "shared_gate": Stored("../shared_mlp.input_linear.weight", "2S H"),
    "shared_up": Stored("../shared_mlp.input_linear.weight", "2S H", 1),
    "shared_down": Stored("../shared_mlp.output_linear.weight", "H S"),
}
