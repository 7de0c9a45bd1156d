"""Hugging Face models: from config.json and safetensors files to plans, routers and parameters on a mesh, and back.

``read_config`` says how to make the plan and the layer, ``read_params`` reads the weights of a layer, of which every
process touches only what its devices own, and ``write_params`` writes them. It needs the extra "hf".
"""

from moe_jax.interop.hf.files import moe_layers, read_params, read_rest, write_params
from moe_jax.interop.hf.model import ModelLayer, known_types, read_config

__all__ = ["ModelLayer", "known_types", "moe_layers", "read_config", "read_params", "read_rest", "write_params"]
