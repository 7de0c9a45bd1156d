"""A Mixture-of-Experts block of a Hugging Face model on a mesh, beside what transformers itself computed with it.

The folder is one of the tests: a Mixtral of 8 tiny experts, and results of transformers' own module. It needs
safetensors, the extra "hf", and neither torch nor transformers. Run: python examples/load_a_hugging_face_block.py
"""

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

import moe_jax as moe
from moe_jax.interop import hf

moe.emulate_devices(8)  # leave this out where there are accelerators
folder = Path(__file__).parents[1] / "tests" / "data" / "hf" / "mixtral"  # config.json and model.safetensors
transformers = load_file(folder / "golden.safetensors")
x, wanted = transformers["x"], transformers["y"]  # [16, 16] each

layer = hf.read_config(folder)
mesh = moe.make_mesh(ep=4, tp=2)
plan = moe.make_plan(mesh, tokens_per_rank=len(x) // mesh.size, dtype="float32", **layer.plan)
_, apply = moe.moe_on_mesh(mesh, plan, layer.router, **layer.options)
params = hf.read_params(folder, 0, mesh, plan)  # every process reads the experts of its own devices
y, stats = jax.jit(apply)(params, x)

np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
np.testing.assert_array_equal(stats.load, np.bincount(transformers["ids"].ravel(), minlength=plan.num_experts))
shapes = {name: f"{value.shape} as {value.sharding.spec}" for name, value in params.items()}
print(f"{layer.model_type}: {shapes}")
print(f"{len(x)} tokens through {plan.num_experts} experts on {dict(mesh.shape)}: what transformers computes")
