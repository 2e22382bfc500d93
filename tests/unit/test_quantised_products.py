"""Products with weights in 16 and 8 bits on a CPU: what they compute, where each is used, and how one is chosen."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from longspan.compiled.folder import KeptFiles
from longspan.config import EngineConfig, ParallelConfig
from longspan.engine import dtypes, measured_products
from longspan.engine.dtypes import choose_dtype, emulation_note
from longspan.engine.measured_products import FEW_ROWS, MANY_ROWS, Products, choose_products, fastest, is_clear
from longspan.engine.rank.loading import RankLoader, TensorStore
from longspan.engine.setup import resolve
from longspan.models import quantised
from longspan.models.layers import DenseLinear, TableLinear
from longspan.models.params import Param
from longspan.models.quantised import HalfLinear, Int8Linear, linear_in_form, problem_of_form
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding
from longspan.weights.checkpoint import RandomWeights
from tests.oracle import tiny_folder

pytestmark = pytest.mark.skipif(problem_of_form("fp16") is not None, reason="this PyTorch has no such products")
ERROR = {"fp16": 1e-3, "int8": 4e-2}
UP = Param("model.layers.0.mlp.up_proj.weight", (80, 24), ("ffn", None))
DOWN = Param("model.layers.0.mlp.down_proj.weight", (24, 80), (None, "ffn"))
HEAD = Param("model.embed_tokens.weight", (61, 24), ("vocab", None))
PRODUCTS = Products((UP, DOWN), torch.float32, 1, RandomWeights())


NO_FBGEMM = SimpleNamespace(quantized=SimpleNamespace(supported_engines=["onednn"]))


def times(few, many):
    return {**dict.fromkeys(FEW_ROWS, few), MANY_ROWS: many}


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_a_form_gives_nearly_the_plain_product_in_the_dtype_of_its_rows(form, dtype, rows):
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 72) * 30, torch.randn(40, 72), torch.randn(40)
    call = linear_in_form(weight, form, is_whole=True)
    for offset in (None, bias):
        found, expected = call(x.to(dtype), offset), F.linear(x, weight, offset)
        assert found.dtype == dtype
        scale = expected.abs().max() if rows else 1
        error = ERROR[form] + (dtype == torch.bfloat16) * 2e-2
        torch.testing.assert_close(found.float(), expected, atol=float(error * scale), rtol=0)


def test_a_rows_int8_product_does_not_depend_on_the_other_rows():
    torch.manual_seed(0)
    x, call = torch.randn(9, 72), Int8Linear(torch.randn(40, 72))
    x[3] *= 1000  # a scale of the whole tensor would leave nothing of the others
    assert torch.equal(call(x), torch.cat([call(row[None]) for row in x]))


def test_the_largest_integers_do_not_overflow():
    found = Int8Linear(torch.ones(8, 256))(torch.ones(1, 256))
    torch.testing.assert_close(found, torch.full((1, 8), 256.0))


def test_rows_and_weights_of_zeros_give_zeros():
    assert not Int8Linear(torch.zeros(8, 64))(torch.ones(2, 64)).any()
    assert not Int8Linear(torch.ones(8, 64))(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("tp", [1, 2])
def test_int8_serves_products_whose_inputs_are_whole_and_the_layout_does_not_change_which(tp):
    grid = Grid(ParallelConfig(tensor_parallel_size=tp))
    kinds = {}
    for form in ("plain", "fp16", "int8"):
        store = TensorStore(RandomWeights(), torch.float32, form=form)
        loader = RankLoader(store, Sharding(grid, 0, 2, 2))
        kinds[form] = [type(loader.linear(param)) for param in (UP, DOWN, HEAD)]
    assert kinds == {
        "plain": [DenseLinear, DenseLinear, TableLinear],
        "fp16": [HalfLinear, HalfLinear, HalfLinear],
        "int8": [Int8Linear, HalfLinear, HalfLinear],
    }


def test_the_fastest_form_with_few_rows_is_chosen_unless_it_loses_with_many():
    plain = times(1.0, 1.0)
    assert fastest({"plain": plain, "fp16": times(0.5, 1.05), "int8": times(0.4, 1.2)}) == "fp16"
    assert fastest({"plain": plain, "fp16": times(1.1, 1.0), "int8": times(1.2, 0.5)}) == "plain"


def test_auto_fast_says_what_was_measured_and_how_far_off_products_are(monkeypatch):
    monkeypatch.setattr(measured_products, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(
        measured_products, "fastest", lambda found: "int8" if set(found) == {"plain", "fp16", "int8"} else "plain"
    )
    monkeypatch.setattr(measured_products, "_DISTURBED", float("inf"))  # the tests' machine may be busy
    found = choose_products("auto-fast", "cpu", lambda: PRODUCTS)
    assert found.form == "int8"
    assert "products: int8 (measured, times of the plain form at 1, 8, 32, 128 rows: fp16 " in found.notes[0]
    assert "a product is off by at most 0.0" in found.notes[1]


@pytest.mark.parametrize(("panels", "measurements"), [((0.7, 0.6), 1), ((0.9, 0.9), 2)], ids=["clear", "near"])
def test_a_clear_choice_is_measured_once_and_kept(tmp_path, monkeypatch, panels, measurements):
    measured = []

    def measure(*forms):
        measured.append(forms)
        return tuple({"plain": times(1.0, 1.0), "panels": times(each, each)} for each in panels)

    monkeypatch.setattr(measured_products, "_measure", measure)
    monkeypatch.setattr(measured_products, "_SMALL_BYTES", 0)
    first, second = (
        choose_products("auto", "cpu", lambda: PRODUCTS, compiled=True, kept=KeptFiles(tmp_path)) for _ in range(2)
    )
    assert first.form == second.form == "panels"
    assert len(measured) == measurements
    assert ("at an earlier start" in second.notes[0]) == (measurements == 1)


def test_a_measurement_that_other_programs_disturb_decides_nothing(tmp_path, monkeypatch):
    halves = tuple({"plain": times(1, 1), "panels": times(2, 2), "fp16": times(few, 1)} for few in (0.1, 0.5))
    monkeypatch.setattr(measured_products, "_measure", lambda *forms: halves)
    form, line = measured_products._fastest_of(("plain", "panels", "fp16"), PRODUCTS, KeptFiles(tmp_path))
    assert form == "panels"
    assert line.startswith("products: panels (other programs disturb a measurement: ")
    assert not list(tmp_path.iterdir())


def test_a_choice_is_clear_if_no_wrong_time_would_change_it():
    plain = times(1.0, 1.0)
    assert is_clear({"plain": plain, "int8": times(0.5, 0.9)})
    assert not is_clear({"plain": plain, "int8": times(0.9, 0.9)})  # nearly as fast
    assert not is_clear({"plain": plain, "int8": times(0.5, 1.09)})  # would lose too much with many rows
    assert not is_clear({"plain": plain, "int8": times(0.5, 1.11)})


@pytest.mark.parametrize("quantization", ["fp16", "int8", "auto-fast"])
def test_a_processor_without_a_form_multiplies_plainly_and_a_line_says_so(monkeypatch, quantization):
    monkeypatch.setattr(quantised, "torch", SimpleNamespace(backends=NO_FBGEMM, __version__="9"))
    found = choose_products(quantization, "cpu", lambda: PRODUCTS)
    assert found.form == "plain"
    assert all("without FBGEMM" in note for note in found.notes)
    assert found.notes


def test_on_a_gpu_weights_stay_as_they_are_and_a_line_says_so():
    found = choose_products("int8", "cuda", lambda: PRODUCTS)
    assert (found.form, found.notes) == ("plain", ("quantization int8: for CPUs only; weights stay as they are",))


@pytest.mark.parametrize("quantization", ["auto", "none", "fp8"])
def test_nothing_is_quantised_unasked(quantization):
    assert choose_products(quantization, "cpu", lambda: PRODUCTS) == measured_products.ProductChoice()


@pytest.mark.parametrize(
    ("multiplies", "tiles", "name"), [(True, True, "bfloat16"), (True, False, "float32"), (False, False, "float32")]
)
def test_auto_is_bfloat16_where_the_processor_multiplies_tiles_of_it_and_the_reason_is_printed(
    monkeypatch, multiplies, tiles, name
):
    monkeypatch.setattr(dtypes, "multiplies_bf16", lambda: multiplies)
    monkeypatch.setattr(dtypes, "multiplies_bf16_tiles", lambda: tiles)
    setup = resolve(EngineConfig(tiny_folder("llama"), num_threads=1))
    assert setup.config.dtype == name  # what ranks in other processes get, whatever processors they have
    assert setup.notes[0] == f"dtype: {name} ({choose_dtype('auto', 'cpu')[1]})"
    assert choose_dtype("auto", "cuda") == ("bfloat16", "")


def test_an_emulated_dtype_is_a_warning_with_the_measured_factor(monkeypatch):
    monkeypatch.setattr(dtypes, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(dtypes, "_times_float32", lambda dtype, threads: 3.14)
    assert "takes 3.1 times as long as in float32 (measured); use --dtype float32" in emulation_note(torch.bfloat16, 1)
    assert emulation_note(torch.float32, 1) is None
    monkeypatch.setattr(dtypes, "multiplies_bf16", lambda: True)
    assert emulation_note(torch.bfloat16, 1) is None


def test_the_factor_is_measured():
    assert dtypes._times_float32(torch.bfloat16, 1) > 0


def test_ranks_and_engines_that_are_started_again_use_the_drivers_choice(monkeypatch):
    monkeypatch.setattr(measured_products, "_READ_BYTES", 1 << 16)
    first = resolve(EngineConfig(tiny_folder("llama"), num_threads=1, quantization="int8")).config
    assert first.products.form == "int8"
    monkeypatch.setattr("longspan.engine.computation.choose_products", None)  # a call would fail
    assert resolve(first).config.products == first.products
