"""How many kernels a decode step launches on a GPU, counted without one."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from longspan.engine.rank.build import TensorParallelGroup
from longspan.models.config import MLAConfig, ModelConfig, RopeConfig
from longspan.models.context import Alone, LayerContext
from longspan.models.decoder import DecoderModel
from longspan.models.ops.triton import TritonOps
from longspan.parallel.collectives import Traffic
from longspan.parallel.nccl import NcclCollectives
from longspan.parallel.sum_norm import SumNorm
from longspan.parallel.symmetric import FastSums, SymmetricSum
from tests.gpu.launches import META, PRODUCTS, MetaLoader, counted, decode_attention

ROWS = 4
LLAMA = ModelConfig(
    "LlamaForCausalLM", num_layers=2, hidden_size=4096, num_q_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14336, vocab_size=128_256, max_position_embeddings=131_072, rms_norm_eps=1e-5, rope=RopeConfig(),
)  # fmt: skip
QWEN3 = replace(LLAMA, qk_norm=True)
QWEN2 = replace(LLAMA, attention_bias=True, tie_word_embeddings=True)
DEEPSEEK = replace(
    LLAMA, num_kv_heads=1, head_dim=576,
    mla=MLAConfig(q_lora_rank=1536, kv_lora_rank=512, query_dim=128, rope_dim=64, value_dim=128),
)  # fmt: skip
ATTENTION = ["write", "attend"]
MOST_WITH_ATTENTION = 11  # one of them converts queries where there is no GPU


def step_of(config, attention=None, tp=None):
    """What a decode step of a model launches; without `attention` three launches stand for that of a layer."""
    model = DecoderModel(config, LayerContext(MetaLoader(), tp or Alone(), ops=TritonOps()), torch.bfloat16)
    token_ids = positions = torch.zeros(ROWS, dtype=torch.int64, device=META)
    with torch.inference_mode(), counted() as launches:

        def attend(layer, q, k, v):
            launches.names.extend(ATTENTION)
            return q.new_empty(*q.shape[:2], layer.latent.value_dim if layer.latent else v.shape[-1])

        logits = model.head(model.layers(model.embedding(token_ids), positions, attention or attend))
    assert (logits.shape, logits.dtype) == ((ROWS, config.vocab_size), torch.bfloat16)
    return launches


def layer_of(config, attention=lambda config: None, tp=None):
    """What one more layer launches."""
    depths = [replace(config, num_layers=layers) for layers in (2, 3)]
    shallow, deep = (step_of(model, attention(model), tp).names for model in depths)
    for name in shallow:
        deep.remove(name)
    return deep


@pytest.mark.parametrize("config", [LLAMA, QWEN3, QWEN2], ids=["llama", "qwen3", "qwen2"])
def test_a_dense_layer_is_ten_launches_four_of_them_products(config):
    layer = layer_of(config)
    assert len(layer) <= 10, layer
    assert sum(name in PRODUCTS for name in layer) == 4, layer


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_so_it_is_with_the_engines_own_attention(config):
    layer = layer_of(config, lambda model: decode_attention(model, ROWS))
    assert len(layer) <= MOST_WITH_ATTENTION, layer
    assert "rope_kernel" in layer and "attend_kernel" in layer


def test_a_layer_of_latent_attention_launches_a_norm_and_a_product_more_for_its_queries_and_another_for_its_rows():
    layer = layer_of(DEEPSEEK)
    assert sum(name in PRODUCTS for name in layer) == 6, layer
    assert sorted(name for name in layer if name not in (*PRODUCTS, *ATTENTION)) == [
        *["norm_kernel"] * 4, "rope_kernel", "swiglu_kernel",
    ], layer  # fmt: skip


class WholeHead(TensorParallelGroup):
    """A TP group whose ranks have all logits."""

    def all_gather_last(self, x):
        return x


def one_of_four(with_norm):
    """The TP group of a rank that sums over four GPUs through symmetric memory, and the group's traffic."""
    buffers = [torch.empty(SumNorm.ELEMENTS, dtype=torch.bfloat16, device=META) for _ in range(4)]
    plain = SymmetricSum(torch.empty(4 << 20, dtype=torch.bfloat16, device=META), "name", 4, multicast=False)
    group = NcclCollectives([0], 0, Traffic(), META)
    group._members, group.size = True, 4
    group._sums = FastSums(plain, SumNorm(buffers, 1, 512 << 10) if with_norm else None)
    return WholeHead(group, ()), group.traffic


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK], ids=["llama", "latent"])
def test_a_layer_of_several_gpus_launches_no_more_than_that_of_one_where_sums_take_their_norm_along(config):
    alone = layer_of(config)
    (apart, sent_apart), (together, sent) = one_of_four(with_norm=False), one_of_four(with_norm=True)
    assert sorted(layer_of(config, tp=apart)) == sorted([*alone, *["one_shot_all_reduce_copy"] * 2])
    for _ in range(2):
        alone.remove("norm_kernel")
    assert sorted(layer_of(config, tp=together)) == sorted([*alone, *["sum_norm_kernel"] * 2])
    assert sent == sent_apart and sent.bytes_by_label["tp"] > 0


def test_a_bias_behind_a_sum_is_added_before_the_norm():
    """To the sum of all ranks, so that this sum is an operation of its own; the other one of the layer is not."""
    tp, _ = one_of_four(with_norm=True)
    layer = layer_of(replace(LLAMA, attention_output_bias=True), tp=tp)
    for name in ("one_shot_all_reduce_copy", "add", "norm_kernel", "sum_norm_kernel"):
        assert layer.count(name) == 1, (name, layer)


def test_a_step_launches_four_more_for_all_layers_together():
    """The embedding, the rope table, the last norm and the head, whose bf16 logits the kernels of sampling read."""
    step = step_of(LLAMA)
    around = list(step.names)
    for name in layer_of(LLAMA) * LLAMA.num_layers:
        around.remove(name)
    assert sorted(around) == sorted(["embedding", "rope_table_kernel", "norm_kernel", "mm"])


@pytest.mark.parametrize("config", [LLAMA, QWEN3, DEEPSEEK], ids=["llama", "qwen3", "latent"])
def test_a_step_copies_nothing_to_the_device_and_reads_nothing_back(config):
    """Reading back would raise: tensors on the meta device have no contents."""
    assert step_of(config).copies == []


def test_what_is_read_back_or_copied_is_noticed():
    with counted() as launches:
        x = torch.ones(4, device=META)
        x + torch.arange(4).to(META)
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises(NotImplementedError):
            x.cpu()
    assert launches.copies == ["_to_copy"]
