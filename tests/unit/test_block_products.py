"""Weights that stay in the 4 or 8 bits of a GGUF file give the products of the dequantised weights, bit by bit."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from longspan.compiled.blocks import joined, quantised
from longspan.compiled.library import problem_of_kernels
from longspan.config import ParallelConfig
from longspan.engine.measured_products import Products, choose_products
from longspan.engine.rank.loading import RankLoader, TensorStore
from longspan.models.blocks import BlockLinear
from longspan.models.layers import PanelLinear
from longspan.models.ops import choose_ops
from longspan.models.params import Param
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding
from longspan.weights.checkpoint import RandomWeights
from longspan.weights.gguf import GGUFCheckpoint
from longspan.weights.gguf_blocks import block_width_of, unpacked

pytestmark = pytest.mark.skipif(problem_of_kernels() is not None, reason=f"no kernels: {problem_of_kernels()}")
FACTORS = {  # of each type, the bytes of a block that are fp16 numbers
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # fmt: skip
KINDS = [GGMLQuantizationType[name] for name in FACTORS]
UP = Param("model.layers.0.mlp.up_proj.weight", (96, 64), ("ffn", None))
GATE = Param("model.layers.0.mlp.gate_proj.weight", (96, 64), ("ffn", None))
DOWN = Param("model.layers.0.mlp.down_proj.weight", (64, 96), (None, "ffn"))
HEAD = Param("model.embed_tokens.weight", (61, 64), ("vocab", None))
MATRICES = ((UP,), (UP, GATE), (DOWN,), (HEAD,))


def rows_of(kind, rows, blocks):
    """Random rows of a type, with scales that are numbers."""
    generator, size = np.random.default_rng(0), GGML_QUANT_SIZES[kind][1]
    stored = generator.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    for at in FACTORS[kind.name]:
        stored[:, at : at + 2] = generator.normal(0, 0.1, (len(stored), 1)).astype(np.float16).view(np.uint8)
    return stored.reshape(rows, -1)


def dequantised(stored, kind):
    return torch.from_numpy(gguf.quants.dequantize(stored, kind))


@pytest.fixture
def checkpoint(tmp_path):
    """Products in two types, of which one has offsets, and an embedding table in a third."""
    kinds = {"ffn_up": "Q4_0", "ffn_gate": "Q4_1", "ffn_down": "Q5_1"}
    shapes = {"ffn_up": UP.shape, "ffn_gate": GATE.shape, "ffn_down": DOWN.shape}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, kind in kinds.items():
        stored = rows_of(GGMLQuantizationType[kind], shapes[name][0], shapes[name][1] // 32)
        writer.add_tensor(f"blk.0.{name}.weight", stored, raw_dtype=GGMLQuantizationType[kind])
    head = rows_of(GGMLQuantizationType.Q8_0, HEAD.shape[0], HEAD.shape[1] // 32)
    writer.add_tensor("token_embd.weight", head, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFCheckpoint(tmp_path / "model.gguf")


def loaders(checkpoint, form, parallel):
    store = TensorStore(checkpoint, torch.float32, form=form)
    grid = Grid(parallel)
    return [RankLoader(store, Sharding(grid, rank, 4, 2)) for rank in range(parallel.world_size)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_scales_and_offsets_stand_for_the_numbers_that_the_gguf_package_computes(kind):
    stored = rows_of(kind, rows=5, blocks=4)
    found = unpacked(stored, kind)
    assert torch.equal(found.dequantised(), dequantised(stored, kind))
    assert found.block_width == block_width_of(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_product_is_that_of_the_dequantised_weight_bit_by_bit_whatever_the_number_of_rows(kind):
    stored = rows_of(kind, rows=37, blocks=3)
    product, expected = BlockLinear(unpacked(stored, kind)), PanelLinear(dequantised(stored, kind))
    x = torch.randn(530, GGML_QUANT_SIZES[kind][0] * 3, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 37)
    for rows in (0, 1, 2, 4, 5, 13, 530):
        for offset in (None, bias):
            assert torch.equal(product(x[:rows], offset), expected(x[:rows], offset))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_are_looked_up_in_blocks(kind):
    stored = rows_of(kind, rows=37, blocks=3)
    ops, token_ids = choose_ops(torch.device("cpu"), compiled=True), torch.arange(60)
    table = BlockLinear(unpacked(stored, kind)).panels
    assert torch.equal(ops.embed(token_ids, table, 9), ops.embed(token_ids, dequantised(stored, kind), 9))


def test_weights_of_several_types_are_one_weight():
    parts = [unpacked(rows_of(kind, rows=3, blocks=256 * 2 // GGML_QUANT_SIZES[kind][0]), kind) for kind in KINDS]
    for some in (parts[:1], parts[:2], parts[5:7], parts):
        assert torch.equal(joined(some).dequantised(), torch.cat([part.dequantised() for part in some]))


def test_columns_between_blocks_are_those_of_the_weight():
    weight = unpacked(rows_of(GGMLQuantizationType.Q4_1, rows=3, blocks=4), GGMLQuantizationType.Q4_1)
    assert torch.equal(weight.columns(slice(32, 96)).dequantised(), weight.dequantised()[:, 32:96])


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_every_ranks_products_and_tables_are_those_of_dequantised_weights(checkpoint, tp):
    """With two ranks the parts of a down projection begin within a block: they are dequantised."""
    x, ops = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)), choose_ops(torch.device("cpu"), True)
    kept = set()
    for ours, plain in zip(
        *(loaders(checkpoint, form, ParallelConfig(tp)) for form in ("blocks", "panels")), strict=True
    ):
        for params in MATRICES:
            start, stop = ours.extent(params[0].axes[1], params[0].shape[1]) if params[0].axes[1] else (0, 64)
            product, expected = ours.linear(*params), plain.linear(*params)
            assert torch.equal(product(x[:, start:stop]), expected(x[:, start:stop]))
            kept |= {params} if isinstance(product, BlockLinear) else set()
        for is_multiplied in (False, True):
            tables = (loader.table(HEAD, is_multiplied) for loader in (ours, plain))
            assert torch.equal(*(ops.embed(torch.arange(61), table, 0) for table in tables))
    assert kept == set(MATRICES) - ({(DOWN,)} if tp == 2 else set())


def test_only_a_file_with_such_blocks_is_multiplied_in_them(checkpoint):
    products = Products((UP, DOWN), torch.float32, 1, checkpoint)
    assert choose_products("none", "cpu", lambda: products, compiled=True).form == "blocks"
    dense = replace(products, checkpoint=RandomWeights())
    assert choose_products("none", "cpu", lambda: dense, compiled=True).form == "panels"
    assert choose_products("none", "cpu", lambda: products, compiled=False).form == "plain"


@pytest.mark.parametrize("bits", [4, 8])
def test_any_weight_can_be_rounded_to_blocks(bits):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = quantised(weight, bits)
    error = (found.dequantised() - weight).abs().view(5, 2, 32)
    assert (error <= found.scales[..., None] * 0.51).all()
