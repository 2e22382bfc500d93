"""After a start on a GPU no request waits for a kernel to compile or a graph to be recorded."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from longspan import LLM, SamplingParams
from longspan.attention.pool import KVPool
from longspan.cache.layout import KVLayout
from longspan.cache.pages import Span
from longspan.disaggregation.pool_access import PoolAccess
from longspan.engine.rank.page_staging import CudaStreams, PageStaging
from longspan.engine.rank.upload import CudaCopying, Upload
from tests.engine.conftest import THREADS
from tests.oracle import prompt_of, tiny_folder

pytestmark = pytest.mark.gpu
LENGTHS = (30, 1, 7, 100, 47)
PARAMS = [SamplingParams(max_tokens=6, temperature=t, top_p=p) for t, p in ((0, 1), (1, 1), (0.8, 0.9))]


@pytest.fixture(scope="module", params=["llama", "deepseek-v3"])
def started(request):
    options = {**THREADS, "dtype": "bfloat16", "max_num_batched_tokens": 512, "debug": False}
    with LLM(tiny_folder(request.param), **options) as llm:
        yield llm


def test_the_first_requests_compile_no_kernel_and_record_no_graph(started, monkeypatch):
    knobs = pytest.importorskip("triton").knobs
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(str(given.get("fn"))))
    graphs = started.engine.executor.runners[0].cuda_graphs
    before = None if graphs is None else graphs.recorded
    assert graphs is None or len(before) == 4
    for number, length in enumerate(LENGTHS):
        for params in PARAMS:
            started.generate([prompt_of(length, number)], params)
    started.generate([prompt_of(length, 9) for length in LENGTHS], PARAMS[2])
    assert compiled == []
    assert graphs is None or graphs.recorded == before


def test_the_first_token_of_a_short_prompt_takes_no_longer_than_later_ones(started):
    """Printed, not asserted: what is asserted is that nothing is compiled."""
    for _ in range(3):
        begin = time.perf_counter()
        started.generate([prompt_of(30, 77)], SamplingParams(max_tokens=1, temperature=1, top_p=0.9))
        print(f"30 tokens to the first token: {(time.perf_counter() - begin) * 1e3:.1f} ms")


def test_the_cache_takes_what_is_measured_to_be_left_and_the_start_says_what_takes_what():
    """What this process holds is compared, because other tests may use the same GPU; so the share is small, too."""
    options = {**THREADS, "dtype": "bfloat16", "debug": False, "kv_cache_memory_bytes": None, "page_size": 16}
    gc.collect()
    before = torch.cuda.memory_allocated()
    with LLM(tiny_folder("llama"), **options, gpu_memory_utilization=0.05) as llm:
        setup = llm.engine.setup
        held = torch.cuda.memory_allocated() - before
        use = setup.memory
        assert use is not None
        assert use.note in setup.notes
        print(use.note, f"{held / (1 << 30):.2f} GiB are held")
        assert use.pages == use.room > 0
        cache = use.pages * use.page
        assert cache <= held < cache + use.workspace + use.recordings + (1 << 30)  # the weights are much smaller


def test_weights_that_reach_the_device_in_blocks_equal_those_on_the_cpu():
    source = torch.arange(1000 * 64, dtype=torch.float32).view(1000, 64)
    target = torch.zeros(1000, 64, device="cuda")
    upload = Upload(CudaCopying(), buffers=2, size=4096)
    for factor in (1, 2):
        upload.fill(target, lambda start, stop, out, by=factor: out.copy_(source[start:stop] * by) is None)
    torch.cuda.synchronize()
    assert torch.equal(target.cpu(), source * 2)


def test_saved_pages_are_those_before_the_step_and_loaded_ones_arrive():
    device = torch.device("cuda", 0)
    pages = [torch.randint(0, 256, (2, 4, 64, 4096), dtype=torch.uint8, device=device) for _ in range(8)]
    before = [page.cpu() for page in pages]
    staging = PageStaging(pages, CudaStreams(device), block_bytes=1 << 20)
    host, wait = staging.save(range(20))
    for page in pages:
        page[:, :, :20] = 0  # as a step that is launched now does
    wait()
    back = host.clone().pin_memory()
    staging.load(range(40, 60), back)()
    for page, old in zip(pages, before, strict=True):
        assert torch.equal(page[:, :, 40:60].cpu(), old[:, :, :20])
        assert torch.equal(page[:, :, 20:40].cpu(), old[:, :, 20:40])


def test_a_block_for_another_instance_is_read_and_written_by_its_own_stream():
    device = torch.device("cuda", 0)
    pool = KVPool(KVLayout(3, 2, 64, 2), range(3), 8, 16, torch.bfloat16, device)
    for rows in pool.layers.values():
        rows.values.normal_()
    access = PoolAccess(pool, (0, 2), device)
    access.mark()
    for spans in ([Span(3, 20)], [Span(0, 2), Span(10, 3), Span(20, 1), Span(30, 2), Span(40, 4), Span(50, 1)]):
        block = access.read((0, 3), (0, 2), spans).clone()
        slots = [slot for span in spans for slot in range(span.slot, span.slot + span.length)]
        old = [rows.values[:, :, slots].clone() for rows in pool.layers.values()]
        for rows in pool.layers.values():
            rows.values.zero_()
        access.mark()
        access.write((0, 3), (0, 2), spans, block)
        assert all(
            torch.equal(rows.values[:, :, slots], kept) for rows, kept in zip(pool.layers.values(), old, strict=True)
        )
        assert float(pool.layers[0].values[:, :, 60:].abs().sum()) == 0


def test_offloaded_pages_give_the_same_tokens():
    prompt = prompt_of(40)
    options = {**THREADS, "dtype": "float32", "pages_per_shard": (24,), "kv_cache_memory_bytes": None}
    with LLM(tiny_folder("llama"), **options, kv_offload_memory=1 << 20) as llm:
        first = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].token_ids
        for number in range(3):
            llm.generate([prompt_of(60, number + 1)], SamplingParams(temperature=0, max_tokens=2))
        again = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].token_ids
        assert llm.stats().offload.loaded_from_memory > 0
    assert again == first
