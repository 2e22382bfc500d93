"""Hardware from the table and from YAML files."""

import pytest

from longspan.config import CostConstants, Fixed
from longspan.errors import ConfigError
from longspan.planner.hardware import Hardware, hardware, hardware_from_yaml, hardware_table, hardware_to_yaml

LEAST = "tflops: 900\nmemory_gb: 80\nmemory_tb_s: 3\nintra_gb_s: 400\ninter_gb_s: 50\n"


def test_hardware_written_to_a_file_is_read_back_unchanged(tmp_path):
    machine = Hardware(
        0.1, 16, 0.02, 10, 10, parallelism=1.5, calls_per_segment=True, product_s=((1, 1e-10), (8, 2e-10)),
        attention_cost=CostConstants(call_s=1e-5, fixed={"ring_q": Fixed(1e-4, 2e-4)}),
    )  # fmt: skip
    path = tmp_path / "here.yaml"
    path.write_text(hardware_to_yaml(machine))
    assert hardware_from_yaml(path) == machine


def test_fields_with_defaults_may_be_missing_and_numbers_may_have_exponents(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(LEAST + "kernel_s: 2e-6\n")
    assert hardware(str(path)) == Hardware(900, 80, 3, 400, 50, kernel_s=2e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST.replace("80", "much"), "line 2, column 1: memory_gb: Expected `float`"),
        (LEAST.replace("80", "0"), "line 2, column 1: memory_gb: 0.0 is not positive; give a positive number"),
        (LEAST + "kernel_s: -1\n", "line 6, column 1: kernel_s: -1.0 is negative"),
        (LEAST + "memory: 0\n", "line 6, column 1: memory: 0.0 is not positive"),
        (LEAST.replace("memory_gb", "memory_bg"), "line 2, column 1: memory_bg: is not a field .* memory_gb"),
        (LEAST + "product_s: [[8, 1.0], [1, 2.0]]\n", "line 6, column 1: product_s: is not in order"),
        ("tflops: 900\n", "missing required field `memory_gb`"),
        ("tflops: 900\n a: b: c\n", "line 2, column 3"),
        ("900\n", "line 1, column 1: no fields"),
    ],
)
def test_a_malformed_file_is_refused_with_line_column_and_remedy(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        hardware_from_yaml(path)


def test_a_missing_file_and_an_unknown_name_are_refused():
    with pytest.raises(ConfigError, match="cannot be read"):
        hardware("nowhere.yaml")
    with pytest.raises(ConfigError, match="h2000: is not in the table; use one of h200"):
        hardware("h2000")


def test_no_hardware_of_the_table_achieves_more_than_its_peak():
    for name, machine in hardware_table().items():
        fractions = (machine.matmul, machine.fp8_matmul, machine.attention, machine.memory, machine.intra_link)
        assert all(0 < fraction <= 1 for fraction in (*fractions, machine.inter_link)), name
