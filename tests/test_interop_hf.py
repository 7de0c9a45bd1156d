"""Models of Hugging Face: what transformers' own blocks compute, what goes back into files, and what may be wrong."""

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
import types
from pathlib import Path

import hf_golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moe_jax as moe
from moe_jax.errors import CheckpointError, ConfigError, InvalidArgumentError, UnsupportedError
from moe_jax.interop import hf
from moe_jax.interop.hf import families, files
from moe_jax.interop.hf.quantised import find_quantised
from moe_jax.reference.weightless import WeightlessExperts

GOLDEN = sorted(path.name for path in hf_golden.DATA.iterdir())
# Of what is compiled; the slow ones differ in an option of the layer or in the layout of the experts.
QUICK = [("qwen2_moe", dict(ep=8)), ("gpt_oss", dict(ep=8))]
SLOW = [
    "dbrx", "deepseek_v3", "deepseek_v4", "gemma4_text", "gpt_oss", "granitemoeshared", "inkling2_text", "llama4_text",
    "longcat_flash", "mixtral", "nemotron_h", "step3p5",
]  # fmt: skip
MESHES = [dict(ep=8), dict(ep=4, tp=2)]
TOLERANCE = 2e-5  # of values of about 1: fp32 sums in another order


def golden(model_type: str) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder of a block, and what the block computes."""
    folder = hf_golden.DATA / model_type
    return folder, load_file(folder / "golden.safetensors")


def read(folder: Path, mesh, **options) -> tuple[hf.ModelLayer, moe.Plan, dict[str, jax.Array]]:
    """The layer, the plan and the parameters in a folder."""
    layer = hf.read_config(folder, 0)
    tokens = hf_golden.TOKENS // mesh.size
    plan = moe.make_plan(mesh, tokens_per_rank=tokens, dtype="float32", **layer.plan)
    return layer, plan, hf.read_params(folder, 0, mesh, plan, **options)


def changed(folder: Path, target: Path, change) -> Path:
    """A copy of a folder with the tensors that ``change`` makes of its own."""
    target.mkdir(exist_ok=True)
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    shutil.copy(folder / "config.json", target)
    return target


def golden_gradients(folder: Path, values: dict, mesh, target: Path) -> dict[str, np.ndarray]:
    """The gradients of transformers as gradients of our parameters; zeros where there are none."""

    def gradients(tensors):
        return {name: values.get(f"grad {name}", np.zeros(array.shape, np.float32)) for name, array in tensors.items()}

    _, _, params = read(changed(folder, target, gradients), mesh, param_dtype="float32")
    return {name: np.asarray(array) for name, array in params.items()}


def difference(ours, theirs) -> float:
    """The largest one, relative where values are large."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs)), initial=0.0))


def differences_on_mesh(folder: Path, values: dict, mesh, target: Path) -> dict[str, float]:
    """Between our layer on a mesh and the block: its output and all gradients; the load must be the same."""
    layer, plan, params = read(folder, mesh, param_dtype="float32")
    _, apply = moe.moe_on_mesh(mesh, plan, layer.router, **layer.options)
    seen = values.get("router_x")

    @jax.jit
    def run(params, x, router_x, ct):
        def loss(params, x, router_x):
            y, stats = apply(params, x, router_x=router_x)
            return jnp.sum(y * ct), (y, stats.load)

        of = (0, 1) if router_x is None else (0, 1, 2)
        return jax.value_and_grad(loss, of, has_aux=True)(params, x, router_x)

    (_, (y, load)), (grads, *others) = run(params, values["x"], seen, values["ct"])
    np.testing.assert_array_equal(load, np.bincount(values["ids"].ravel(), minlength=load.size))
    expected = golden_gradients(folder, values, mesh, target)
    found = {"y": difference(y, values["y"])}
    for name, ours in zip(("grad_x", "grad_router_x"), others, strict=False):
        found[name] = difference(ours, values[name])
    return found | {name: difference(grads[name], expected[name]) for name in expected}


def assert_small(differences: dict[str, float]) -> None:
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("model_type", GOLDEN)
def test_oracle_agrees_with_transformers(model_type, tmp_path):
    """Its output, the chosen experts and, where the oracle has them, all gradients."""
    folder, values = golden(model_type)
    mesh = moe.make_mesh(ep=8)
    layer, plan, params = read(folder, mesh, param_dtype="float32")
    params = {name: np.asarray(array) for name, array in params.items()}
    options = {name: layer.options[name] for name in ("shared_activation", "weigh_inputs") if name in layer.options}
    options |= dict(top_k=plan.top_k, activation=layer.options["activation"], router_x=values.get("router_x"))
    special = WeightlessExperts(num_experts=plan.num_experts, num_copy=plan.num_copy_experts)
    y, routing = moe.reference.moe_layer(params, values["x"], layer.router, **options, special=special)
    np.testing.assert_array_equal(np.sort(routing.expert_ids, axis=-1), values["ids"])
    found = {"y": difference(y, values["y"])}
    if isinstance(layer.options["activation"], str | moe.ClampedSwiGLU) and not plan.num_copy_experts:
        ours, ct_x = moe.reference.moe_layer_vjp(params, values["x"], values["ct"], layer.router, **options)
        given = [values[name] for name in ("grad_x", "grad_router_x") if name in values]
        found["x"] = difference(ct_x, np.concatenate(given, axis=1))
        expected = golden_gradients(folder, values, mesh, tmp_path)
        found |= {name: difference(ours[name], expected[name]) for name in expected}
    assert_small(found)


@pytest.mark.parametrize("model_type, extents", QUICK)
def test_layer_agrees_with_transformers(model_type, extents, tmp_path):
    assert_small(differences_on_mesh(*golden(model_type), moe.make_mesh(**extents), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SLOW)
def test_layer_agrees_with_transformers_under_tensor_parallelism(model_type, tmp_path):
    assert_small(differences_on_mesh(*golden(model_type), moe.make_mesh(ep=4, tp=2), tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs torch and transformers")
@pytest.mark.parametrize("model_type", sorted(hf_golden.BLOCKS))
def test_layer_agrees_with_transformers_itself(model_type, tmp_path):
    """With other weights, for every block that the table has."""
    block = hf_golden.make(model_type, seed=1)
    hf_golden.write(tmp_path / "model", block)
    for extents in MESHES:
        mesh = moe.make_mesh(**extents)
        found = differences_on_mesh(tmp_path / "model", block.values, mesh, tmp_path / "gradients")
        print(f"{model_type} {extents} {max(found.values()):.1e}")
        assert_small(found)


def test_live_blocks_are_those_of_the_table():
    only_outer = {"gemma4_unified_text", "glm5_next", "kimi_k2", "qwen3_5_moe", "qwen3_vl_moe", "step3p7"}
    assert set(hf_golden.BLOCKS) | only_outer == set(hf.known_types())


@pytest.mark.parametrize("model_type", GOLDEN)
def test_written_tensors_are_those_that_were_read(model_type, tmp_path):
    """Bit by bit, in the dtype of the file, under the names of transformers."""
    (tmp_path / ".model-00001-of-00001.safetensors-of a killed process").touch()
    folder, _ = golden(model_type)
    _, _, params = read(folder, moe.make_mesh(ep=4, tp=2))
    rest = hf.read_rest(folder, 0)
    hf.write_params(tmp_path, {0: params}, folder, rest={0: rest}, prefix=prefix_of(folder))
    written, expected = (
        load_file(tmp_path / "model-00001-of-00001.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    ignored = hf.read_config(folder).family.ignored
    if ignored:  # gates of experts that are the identity
        expected = {name: array for name, array in expected.items() if name in written}
    assert sorted(written) == sorted(expected)
    for name, array in expected.items():
        assert array.dtype == written[name].dtype == ml_dtypes.bfloat16
        if model_type == "qwen3_vl_moe_text" and array.ndim == 3:  # we write what was released; transformers reads both
            array = np.ascontiguousarray(array.swapaxes(1, 2))
        np.testing.assert_array_equal(written[name].view(np.uint16), array.view(np.uint16))
    assert not list(tmp_path.glob(".*"))  # nothing unfinished is left
    assert hf.moe_layers(tmp_path) == (0,)


def prefix_of(folder: Path) -> str:
    return next(iter(load_file(folder / "model.safetensors"))).split(".0.")[0]


# Files.


@pytest.mark.parametrize("extents", MESHES, ids=str)
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "dbrx"])
def test_each_value_is_read_once(model_type, extents, monkeypatch):
    """Every device reads its own slice: in all, each value of an expert once, and no more at a time than a slice."""
    folder, _ = golden(model_type)
    sizes: dict[str, list[int]] = {}
    fetch = files.Tensors.fetch

    def counted(self, name, index):
        values = fetch(self, name, index)
        sizes.setdefault(name, []).append(values.size)
        return values

    monkeypatch.setattr(files.Tensors, "fetch", counted)
    _, plan, params = read(folder, moe.make_mesh(**extents))
    twins = 2 if model_type == "gpt_oss" else 1  # gate and up take turns in one tensor, which is read for both
    for name, array in load_file(folder / "model.safetensors").items():
        split = array.ndim == 3 or "experts" in name
        times = twins if "gate_up" in name else 1
        assert sum(sizes[name]) <= times * array.size, name
        if split and array.size > 64:
            assert max(sizes[name]) <= array.size * (twins if "gate_up" in name else 1) // plan.tp_size, name
    assert params["w_up"].addressable_shards[0].data.size * 8 == params["w_up"].size


def test_weights_split_over_a_data_axis():
    folder, _ = golden("gpt_oss")
    mesh, layer = moe.make_mesh(ep=4, dp=2), hf.read_config(folder)
    plan = moe.make_plan(mesh, tokens_per_rank=2, param_axes="dp", **layer.plan)
    params = hf.read_params(folder, 0, mesh, plan)
    _, _, expected = read(folder, moe.make_mesh(ep=8))
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(array))
    assert params["w_gate"].addressable_shards[0].data.shape == (2, hf_golden.HIDDEN // 2, hf_golden.FFN)


def sharded(folder: Path, target: Path, layers: int = 2) -> Path:
    """A folder with an index and a file for each layer: the one of ``folder``, more than once."""
    target.mkdir(exist_ok=True)
    where = {}
    for layer in range(layers):
        tensors = {name.replace(".0.", f".{layer}.", 1): array for name, array in load_tensors(folder).items()}
        save_file(tensors, target / f"part{layer}.safetensors")
        where |= dict.fromkeys(tensors, f"part{layer}.safetensors")
    where["model.embed_tokens.weight"] = "part0.safetensors"
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    shutil.copy(folder / "config.json", target)
    return target


def load_tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def test_index_says_which_file(tmp_path):
    folder = sharded(golden("mixtral")[0], tmp_path)
    assert hf.moe_layers(folder) == (0, 1)
    mesh = moe.make_mesh(ep=8)
    layer = hf.read_config(folder)
    plan = moe.make_plan(mesh, tokens_per_rank=2, **layer.plan)
    params = hf.read_params(folder, 1, mesh, plan, param_dtype="float16")
    assert params["router"].dtype == jnp.float16
    tensor = load_tensors(golden("mixtral")[0])["model.layers.0.block_sparse_moe.experts.5.w1.weight"]
    np.testing.assert_array_equal(params["w_gate"][5], tensor.astype(np.float16).T)


def broken(tmp_path, change, model_type="mixtral"):
    """Reads a folder whose tensors were changed."""
    return read(changed(golden(model_type)[0], tmp_path / "model", change), moe.make_mesh(ep=8))


def test_wrong_tensors_are_all_named(tmp_path):
    start = "model.layers.0.block_sparse_moe."

    def change(tensors):
        del tensors[start + "experts.3.w2.weight"]
        tensors[start + "experts.1.w1.weight"] = np.zeros((3, 4), np.float32)
        tensors[start + "experts.8.w1.weight"] = np.zeros((6, 16), np.float32)
        tensors[start + "gate.bias"] = np.zeros(8, np.float32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((2, 2), np.float32)
        return tensors

    with pytest.raises(CheckpointError) as error:
        broken(tmp_path, change)
    text = str(error.value)
    assert "4 problems" in text
    assert f"'{start}experts.3.w2.weight' is missing; its shape is (16, 6)" in text
    assert f"'{start}experts.1.w1.weight' has shape (3, 4); config.json says (6, 16)" in text
    assert f"'{start}experts.8.w1.weight' is surplus" in text
    assert f"'{start}gate.bias' is surplus" in text
    assert "self_attn" not in text


def test_quantised_tensors_are_refused(tmp_path):
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"

    def scaled(tensors):
        return tensors | {f"{name}_scale_inv": np.ones((1, 1), np.float32)}

    unnamed = (
        r"weight_scale_inv' and 0 more are quantised in a way that config.json does not name; .*read a copy in bf16"
    )
    with pytest.raises(UnsupportedError, match=unnamed):
        broken(tmp_path, scaled, "deepseek_v3")
    with pytest.raises(UnsupportedError, match=r"gate_proj\.weight' and 0 more are quantised"):
        broken(tmp_path, lambda tensors: tensors | {name: np.zeros((6, 16), ml_dtypes.float8_e4m3fn)}, "deepseek_v3")
    packed = {name.replace("weight", "qweight"): np.zeros((2, 6), np.int32)}
    folder = changed(golden("deepseek_v3")[0], tmp_path / "model", lambda tensors: tensors | packed)
    with_config(folder, quantization_config=dict(quant_method="gptq", bits=4))
    with pytest.raises(
        UnsupportedError, match=r"gate_proj\.qweight' and 0 more are quantised by 'gptq'; 'fp8' in blocks"
    ):
        read(folder, moe.make_mesh(ep=8))


def with_config(folder: Path, **said) -> Path:
    """The folder, whose config.json says this too."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    return folder


def quantised8(tensors, block, rng):
    """``tensors`` with those of experts in e4m3 and a factor for each block, and what they stand for, by loops."""
    stored, meant = dict(tensors), {}
    for name, array in tensors.items():
        if "experts" not in name or not name.endswith("weight"):
            continue
        codes = rng.normal(size=array.shape).astype(ml_dtypes.float8_e4m3fn)
        factors = rng.uniform(0.5, 2, [-(-extent // size) for extent, size in zip(array.shape, block, strict=True)])
        stored[name], stored[f"{name}_scale_inv"] = codes, factors.astype(np.float32)
        meant[name] = np.zeros(array.shape)
        for i, j in np.ndindex(*array.shape):
            factor = float(stored[f"{name}_scale_inv"][i // block[0], j // block[1]])
            meant[name][i, j] = float(codes[i, j]) * factor
    return stored, meant


def test_codes_of_8_bits_are_read_as_what_they_stand_for(tmp_path):
    """Every part of every device: tp cuts F = 6 inside and between blocks. Shared experts are quantised too."""
    block = (2, 3)
    meant = {}

    def quantise(tensors):
        stored, values = quantised8(tensors, block, np.random.default_rng(0))
        meant.update(values)
        return stored

    folder = changed(golden("deepseek_v3")[0], tmp_path / "model", quantise)
    said = dict(quant_method="fp8", fmt="e4m3", weight_block_size=list(block), activation_scheme="dynamic")
    with_config(folder, quantization_config=said)
    layer, _, params = read(folder, moe.make_mesh(ep=4, tp=2))
    assert params["w_up"].dtype == jnp.bfloat16 and layer.quantisation == said
    files_of = {"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
    start = "model.layers.0.mlp."
    for ours, theirs in files_of.items():
        for e in range(8):
            expected = meant[f"{start}experts.{e}.{theirs}.weight"].T.astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(np.asarray(params[ours][e]), expected)
        shared = meant[f"{start}shared_experts.{theirs}.weight"].T.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(params[ours.replace("w_", "shared_")]), shared)
    # What is written is not quantised any more, and its config.json does not say so.
    hf.write_params(tmp_path / "again", {0: params}, folder)
    again, _, kept = read(tmp_path / "again", moe.make_mesh(ep=8))
    assert again.quantisation == {}
    np.testing.assert_array_equal(np.asarray(kept["w_down"]), np.asarray(params["w_down"]))
    # Factors that do not fit are no such quantisation.
    with_config(folder, quantization_config=said | dict(weight_block_size=[6, 5]))
    with pytest.raises(CheckpointError, match=r"is F32 \(3, 6\); expected F8_E4M3, .* block of \[6, 5\], \(1, 4\)"):
        read(folder, moe.make_mesh(ep=8))


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_factors_of_8_bits_are_refused(dtype):
    """Their bytes are exponents, and not the factors themselves."""
    stored = {"w": ((4, 6), "F8_E4M3"), "w_scale_inv": ((2, 2), dtype)}
    said = dict(quant_method="fp8", weight_block_size=[2, 3])
    tensor, _ = find_quantised(stored, said)["w"]
    with pytest.raises(CheckpointError, match=rf"'w_scale_inv' is {dtype} \(2, 2\); expected .* read a copy in bf16"):
        tensor.shape(types.SimpleNamespace(stored=stored.get))


@pytest.mark.parametrize(("codes", "exponents"), [((4,), (4,)), ((2, 4, 3, 16), (2, 4, 1))])
def test_codes_of_4_bits_that_do_not_fit_are_refused(codes, exponents):
    stored = {"w_blocks": (codes, "U8"), "w_scales": (exponents, "U8")}
    tensor, _ = find_quantised(stored, dict(quant_method="mxfp4"))["w"]
    with pytest.raises(CheckpointError, match=r"'w_blocks' is U8 \(.* expected U8 \[\.\.\., R, G, 16\]"):
        tensor.shape(types.SimpleNamespace(stored=stored.get))


def test_codes_of_4_bits_are_read_as_what_they_stand_for(tmp_path):
    """gpt-oss: two numbers in a byte, the first in its low half; groups of 4 along H, and of 2 along F."""
    rng, meant, table = np.random.default_rng(1), {}, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

    def quantise(tensors):
        stored = dict(tensors)
        for name, width in (("gate_up_proj", 2), ("down_proj", 1)):
            whole = f"model.layers.0.mlp.experts.{name}"
            num_experts, columns, rows = stored.pop(whole).shape
            groups = columns // (2 * width)
            blocks = rng.integers(0, 256, (num_experts, rows, groups, width), np.uint8)
            scales = rng.integers(120, 134, (num_experts, rows, groups), np.uint8)
            stored[f"{whole}_blocks"], stored[f"{whole}_scales"] = blocks, scales
            meant[name] = np.zeros((num_experts, columns, rows))
            for e, r, g, b in np.ndindex(*blocks.shape):
                for half, code in enumerate((int(blocks[e, r, g, b]) & 15, int(blocks[e, r, g, b]) >> 4)):
                    number = table[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(scales[e, r, g]) - 127)
                    meant[name][e, 2 * (g * width + b) + half, r] = number
        return stored

    folder = changed(golden("gpt_oss")[0], tmp_path / "model", quantise)
    with_config(folder, quantization_config=dict(quant_method="mxfp4"))
    _, _, params = read(folder, moe.make_mesh(ep=4, tp=2))
    together = meant["gate_up_proj"].astype(ml_dtypes.bfloat16)
    for ours, expected in (("w_gate", together[..., 0::2]), ("w_up", together[..., 1::2])):
        np.testing.assert_array_equal(np.asarray(params[ours]), expected)
    np.testing.assert_array_equal(np.asarray(params["w_down"]), meant["down_proj"].astype(ml_dtypes.bfloat16))
    assert params["b_down"].dtype == jnp.bfloat16


def test_damaged_files_are_named(tmp_path):
    folder = sharded(golden("mixtral")[0], tmp_path)
    part = folder / "part1.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"part1\.safetensors: is damaged or cut off"):
        read_layer(folder, 1)
    part.unlink()
    with pytest.raises(CheckpointError, match=r"names part1\.safetensors, not there"):
        hf.moe_layers(folder)
    shutil.copy(folder / "part0.safetensors", part)
    with pytest.raises(CheckpointError, match=r"part1\.safetensors: lacks 'model\.layers\.1\."):
        read_layer(folder, 1)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no index of tensors"):
        hf.moe_layers(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        hf.moe_layers(folder)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UnsupportedError, match=r"needs safetensors, .*pip install 'moe_jax\[hf\]'"):
        hf.moe_layers(golden("mixtral")[0])


def read_layer(folder: Path, layer: int):
    mesh = moe.make_mesh(ep=8)
    plan = moe.make_plan(mesh, tokens_per_rank=2, **hf.read_config(folder).plan)
    return hf.read_params(folder, layer, mesh, plan)


def test_wrong_requests_are_named(tmp_path):
    folder, _ = golden("mixtral")
    mesh = moe.make_mesh(ep=8)
    sizes = hf.read_config(folder).plan
    with pytest.raises(CheckpointError, match="layer 7 has no experts; those that have: 0"):
        read_layer(folder, 7)
    with pytest.raises(CheckpointError, match=r"under prefix='decoder'; prefixes with routers: 'model\.layers'"):
        hf.moe_layers(folder, prefix="decoder")
    for wrong in (dict(hidden=8), dict(top_k=sizes["top_k"] + 1)):
        plan = moe.make_plan(mesh, tokens_per_rank=2, **sizes | wrong)
        ((name, value),) = wrong.items()
        with pytest.raises(InvalidArgumentError, match=f"{name}={value}, and the model has {sizes[name]}"):
            hf.read_params(folder, 0, mesh, plan)
    plan = moe.make_plan(mesh, tokens_per_rank=2, **sizes)
    params = hf.read_params(folder, 0, mesh, plan)
    wrong = params | dict(w_gate=params["w_up"][:, :, :1], b_up=params["w_up"])
    del wrong["router"]
    with pytest.raises(
        InvalidArgumentError, match=r"(?s)3 problems.*'router' is missing.*'b_up' has no place.*'w_gate'"
    ):
        hf.write_params(tmp_path / "new", {0: wrong}, folder)
    assert not (tmp_path / "new").exists()

    def twice(tensors):
        return tensors | {f"other.{name}": array for name, array in tensors.items()}

    def elsewhere(tensors):
        return {f"{place}.{name}": array for name, array in tensors.items() for place in ("a", "b")}

    hf.moe_layers(changed(folder, tmp_path / "twice", twice))  # the family's own prefix is the one that is meant
    with pytest.raises(CheckpointError, match=r"prefixes with routers: 'a\.model\.layers', 'b\.model\.layers'"):
        hf.moe_layers(changed(folder, tmp_path / "elsewhere", elsewhere))


# config.json.


def test_known_configurations():
    """Those that differ from others in what they say, or where they say it."""
    deepseek = dict(
        model_type="deepseek_v3", hidden_size=7168, moe_intermediate_size=2048, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    layer = hf.read_config(deepseek)
    assert layer.plan == dict(hidden=7168, num_experts=256, top_k=8, num_shared_experts=1)
    assert layer.router == moe.load_config("configs/deepseek_v3.toml").router
    assert layer.options == dict(ffn=2048, activation="swiglu")
    for said, router in [
        (dict(norm_topk_prob=False), dict(renormalize=False)),
        (dict(n_group=None, topk_group=None), dict(num_groups=1, top_groups=1)),
        (dict(routed_scaling_factor=1.5), dict(scale=1.5)),
    ]:
        assert hf.read_config(deepseek | said).router == dataclasses.replace(layer.router, **router)
    # Inside a model of text and pictures, which has other experts in its vision tower.
    outer = dict(model_type="kimi_k25", hidden_size=1, text_config=deepseek, vision_config=dict(num_experts=3))
    assert hf.read_config(outer).plan == layer.plan
    # Values for each layer.
    hunyuan = dict(
        model_type="hunyuan_v1_moe", hidden_size=64, intermediate_size=32, num_experts=8, moe_topk=[1, 2]
    )  # fmt: skip
    assert [hf.read_config(hunyuan, layer).plan["top_k"] for layer in (0, 1)] == [1, 2]
    with pytest.raises(ConfigError, match="'moe_topk' has 2 entries, and none for layer 2"):
        hf.read_config(hunyuan, 2)
    each = hunyuan | dict(moe_topk=1, per_layer_config={"1": dict(num_experts=4)})
    assert [hf.read_config(each, layer).plan["num_experts"] for layer in (0, 1)] == [8, 4]
    oss = dict(
        model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_local_experts=128, num_experts_per_tok=4
    )  # fmt: skip
    assert hf.read_config(oss).options == dict(ffn=2880, activation=moe.ClampedSwiGLU(), use_bias=True)
    longcat = json.loads((hf_golden.DATA / "longcat_flash" / "config.json").read_text())
    assert hf.read_config(longcat).plan["num_copy_experts"] == 4


def test_wrong_configurations_are_named(tmp_path):
    mixtral = dict(model_type="mixtral", hidden_size=8, intermediate_size=8, num_local_experts=8, num_experts_per_tok=2)
    with pytest.raises(
        ConfigError, match="model_type='mixtrel' is unknown; did you mean 'mixtral'.*known: .*qwen3_moe"
    ):
        hf.read_config(mixtral | dict(model_type="mixtrel"))
    with pytest.raises(ConfigError, match="lacks 'hidden_size'; add it"):
        hf.read_config(mixtral | dict(hidden_size=None))
    with pytest.raises(ConfigError, match="lacks 'num_local_experts'; add it"):
        hf.read_config(mixtral | dict(num_local_experts=None))
    with pytest.raises(UnsupportedError, match="activation 'snake' has no name here"):
        hf.read_config(mixtral | dict(hidden_act="snake"))
    with pytest.raises(UnsupportedError, match=r"model_type='phimoe' needs the sparse mixer"):
        hf.read_config(mixtral | dict(model_type="phimoe"))
    with pytest.raises(UnsupportedError, match=r"moe_latent_size=4 needs a projection"):
        hf.read_config(
            json.loads((hf_golden.DATA / "nemotron_h" / "config.json").read_text()) | dict(moe_latent_size=4)
        )
    with pytest.raises(ConfigError, match=r"cannot be read"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"is not JSON"):
        hf.read_config(tmp_path)
    with pytest.raises(ConfigError, match="give the folder of a model"):
        hf.read_config(3)


def without(config, names):
    """A config.json in which no part says any of these."""
    kept = {name: value for name, value in config.items() if name not in names}
    return {name: without(value, names) if isinstance(value, dict) else value for name, value in kept.items()}


@pytest.mark.parametrize("folder", sorted(hf_golden.DATA.iterdir()), ids=lambda folder: folder.name)
def test_a_missing_value_is_said_under_the_names_of_its_family(folder):
    """The released config has one of the names that the error lists, and there are two at most."""
    config = json.loads((folder / "config.json").read_text())
    family = hf.read_config(config).family
    for key in (family.hidden, family.num_experts, family.top_k, family.ffn):
        with pytest.raises(ConfigError, match="lacks '.*'; add it") as error:
            hf.read_config(without(config, key.names))
        listed = re.findall(r"'(\w+)'", str(error.value).split("lacks")[1])
        assert len(listed) <= 2 and any(f'"{name}":' in json.dumps(config) for name in listed)


def test_table_has_each_type_once():
    types = [name for family in families.FAMILIES for name in family.types]
    assert len(types) == len(set(types))
    assert not set(types) & set(families.LACKS)
