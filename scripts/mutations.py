"""Small faults that the tests must notice: what `scripts/mutate.py` changes in a copy of the source.

A fault replaces one text, which must be found exactly once in its file, so that the list cannot rot. `tests` are the
likeliest to fail, in the order in which they run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One text of one file replaced."""

    name: str
    file: str  # below src/longspan
    old: str
    new: str
    tests: tuple[str, ...]  # pytest's names: file::test or file::test[case]


_RANKS = "tests/ranks/test_attention_is_exact.py"
_DENSE = f"{_RANKS}::test_every_row_equals_dense_attention"
_WINDOWED = f"{_RANKS}::test_windowed_layers_see_their_window_and_no_more"
_SHORT = (
    "tests/engine/test_recorded_decode.py::test_recorded_short_steps_with_prompt_tokens_give_the_tokens_of_the_oracle"
)
_SCHEDULER = "tests/unit/test_scheduler.py"
_ANY_LOAD = f"{_SCHEDULER}::test_any_load_ends_with_every_token_computed_where_its_page_is_and_nothing_lost"
_PAGES = "tests/unit/test_pages.py"
_SAMPLER = "tests/unit/test_sampler.py"
_OFFLOAD = "tests/unit/test_offload.py"
_REQUESTS = "tests/engine/test_requests.py"
_CONSTRAINTS = "tests/engine/test_constraints.py"
_CONSTRAINED = f"{_CONSTRAINTS}::test_constrained_tokens_are_those_of_transformers_under_the_same_rules"
_MODULE = "tests/engine/test_multi_token_prediction.py"
_UNDER = "tests/engine/test_drafts_under_constraints.py"
_AHEAD = "tests/engine/test_drafts_ahead.py"
_SEVERAL = "tests/engine/test_recorded_drafts_of_several_ranks.py"
_MAPPED = "tests/engine/test_mapped_pages.py"
_FAMILIES = "tests/models/test_families_equal_transformers.py::test_logprobs_and_tokens_equal_transformers"

ATTENTION = (
    Fault(
        "another request's page table is read", "plan/reach.py",
        "        table = requests[segment.request_id].table\n        whole",
        "        table = next(iter(requests.values())).table\n        whole",
        (
            f"{_DENSE}[12over3-gather_q-(1, 2, 1)]",
            f"{_RANKS}::test_more_requests_than_memory_are_preempted_and_stay_exact",
        ),
    ),
    Fault(
        "a part that came back is not merged", "attention/schedules/base.py",
        "self.variant.merge([unpack(part) for part in packed], self.dtype)",
        "self.variant.merge([unpack(part) for part in packed[:-1] or packed], self.dtype)",
        (f"{_DENSE}[12over3-gather_q-(1, 2, 1)]",),
    ),
    Fault(
        "the diagonal is not merged", "attention/attend.py",
        "[part for part in (diagonal, joined) if part is not None]",
        "[part for part in (diagonal, joined) if part is not None][-1:]",
        (f"{_DENSE}[12over3-gather_q-(1, 2, 1)]",),
    ),
    Fault(
        "the smallest lse has the largest weight", "attention/state.py",
        "weights = torch.softmax(lse, 0)", "weights = torch.softmax(-lse, 0)",
        ("tests/unit/test_merge_algebra.py::test_merging_shards_equals_attention_over_all_keys",),
    ),
    Fault(
        "a merged lse is in base 2", "attention/state.py",
        "torch.logsumexp(lse, 0))", "torch.logsumexp(lse, 0) * 1.4426950408889634)",
        ("tests/unit/test_merge_algebra.py::test_merging_shards_equals_attention_over_all_keys",),
    ),
    Fault(
        "a kernel's lse is in base 2", "attention/backends/cpu.py",
        "lse.reshape(1, heads))", "lse.reshape(1, heads) * 1.4426950408889634)",
        (f"{_RANKS}::test_states_of_bf16_rows_are_fp32_with_a_natural_lse",),
    ),
    Fault(
        "garbage of weight zero is multiplied", "attention/state.py",
        "torch.where(weights > 0, outs, 0.0).mul_(weights)", "outs.mul_(weights)",
        ("tests/unit/test_merge_algebra.py::test_garbage_of_weight_zero_is_skipped_not_multiplied",),
    ),
    Fault(
        "a sink counts as a value", "attention/state.py",
        "part.out * torch.sigmoid(part.lse - sink)[..., None]", "part.out",
        ("tests/unit/test_merge_algebra.py::test_a_sink_is_one_more_key_whose_value_is_zero",),
    ),
    Fault(
        "a window is one position too wide", "plan/plan.py",
        "max(0, position + 1 - window)", "max(0, position - window)",
        (f"{_WINDOWED}[(1, 2, 1)-(3,)-gather_q]",),
    ),
    Fault(
        "a shard's round is attended as another's", "attention/prepared.py",
        "key = shard, start, stop, rows", "key = start, stop, rows",
        ("tests/ranks/test_attention_is_exact.py::test_several_requests_travel_in_one_step[(1, 2, 1)-gather_kv]",),
    ),
    Fault(
        "a refilled step writes to the slots of the step before", "attention/refillable.py",
        "self._writer.refill(view.writes)", "pass",
        ("tests/engine/test_recorded_decode.py::test_tokens_are_those_of_the_oracle[{}-llama]",),
    ),
    Fault(
        "a refilled step attends to the pages of the step before", "attention/refillable.py",
        "refillable.fill(runs)", "True",
        ("tests/engine/test_recorded_decode.py::test_tokens_are_those_of_the_oracle[{}-llama]",),
    ),
    Fault(
        "rows that read themselves through shards see their segment's later tokens", "plan/reach.py",
        "yield start, at, span.length > 1", "yield start, at, False",
        (f"{_RANKS}::test_rows_that_read_their_own_tokens_on_the_shards_that_store_them_need_no_diagonal",),
    ),
    Fault(
        "the decode rows of a short step are attended as its prompt's", "attention/refillable.py",
        "firsts = accumulate((rows for rows, _ in phases), initial=0)", "firsts = [0] * len(phases)",
        (f"{_SHORT}[llama-alone]",),
    ),
    Fault(
        "fresh rows of a short step see beyond their window", "attention/refillable.py",
        "starts = None if window is None else tuple(", "starts = None if window else tuple(",
        (f"{_SHORT}[gpt-oss-dcp]",),
    ),
    Fault(
        "a rank's own rows decide which graph a short step has", "engine/rank/short_steps.py",
        "max(rows_of_pcp(plan.segments, self._pcp))", "sum(rows_of_pcp(plan.segments, self._pcp))",
        (f"{_SHORT}[llama-pcp]",),
    ),
    Fault(
        "short steps are recorded under a schedule that was not", "engine/rank/short_steps.py",
        "None if others or schedule not in self._schedules else (size, schedule)", "(size, schedule)",
        ("tests/engine/test_recorded_decode.py::test_a_short_step_takes_a_schedule_that_can_be_recorded",),
    ),
    Fault(
        "the driver counts a step's rows over all pcp indices", "scheduler/step.py",
        "rows = max(self._load)", "rows = sum(self._load)",
        ("tests/engine/test_recorded_decode.py::test_a_short_step_takes_a_schedule_that_can_be_recorded",),
    ),
    Fault(
        "a segment's diagonal begins where another's does", "attention/prepared.py",
        "(row - start, length) for row, length in some", "(0, length) for row, length in some",
        (f"{_RANKS}::test_several_requests_travel_in_one_step[(1, 2, 1)-gather_q]",),
    ),
    Fault(
        "a row sees the tokens of its segment that follow it", "plan/reach.py",
        "range(tokens - self.length + 1, tokens + 1) if self.causal", "(tokens,) * self.length if self.causal",
        (f"{_RANKS}::test_a_quantised_cache_is_read_as_it_was_written_whatever_travels[torch.int8-gather_q]",),
    ),
    Fault(
        "a segment with tokens on another shard reads itself", "plan/reach.py",
        "if segment.length == 1 or segment.num_remote_groups:", "if segment.length == 1:",
        (f"{_RANKS}::test_requests_that_travel_in_some_layers_and_not_in_others[2-gather_q]",),
    ),
    Fault(
        "a decode row does not see its own token", "plan/decode.py",
        "before + start + 1 - first", "before + start - first",
        ("tests/unit/test_decode_view.py::test_the_quick_view_of_a_decode_step_is_the_view_of_any_step",),
    ),
    Fault(
        "a decode row is written to the page that the request had before", "plan/decode.py",
        "if not first <= start < stop:", "if not first <= start:",
        ("tests/unit/test_decode_view.py::test_the_quick_view_of_a_decode_step_is_the_view_of_any_step",),
    ),
    Fault(
        "decode work that grows ends with the column that it was planned for",
        "attention/backends/triton/plan.py",
        "items[last, _STOP] = stops", "items[last, _STOP] = items[last, _STOP]",
        ("tests/gpu/test_triton_decode.py::test_work_that_grows_with_its_contexts_covers_what_rows_see",),
    ),
    Fault(
        "the counter of stored parts is not set back", "attention/backends/triton/attend.py",
        "tl.store(arrived + part * heads + head, 0)", "tl.store(arrived + part * heads + head, others + 1)",
        ("tests/gpu/test_triton_parts.py::"
         "test_counters_are_at_0_after_each_launch_so_that_the_next_one_merges_too",),
    ),
    Fault(
        "a new page is not put into the index of slots", "attention/backends/triton/columns.py",
        "if made.filled < columns:", "if not made.filled:",
        ("tests/gpu/test_triton_decode.py::test_every_row_sees_the_slots_of_its_context_at_every_step",),
    ),
    Fault(
        "decode work is cut into pieces of another length", "attention/backends/triton/decode.py",
        "number * size[piece]", "0",
        ("tests/gpu/test_triton_decode.py::test_the_work_is_that_of_the_planner",),
    ),
    Fault(
        "rows that begin anywhere are given to the kernel for Hopper", "attention/backends/triton/backend.py",
        "and rows.data_ptr() % 16 == 0", "",
        ("tests/gpu/test_triton_latents.py::test_tensors_that_it_cannot_read_are_left_to_the_other_kernel",),
    ),
    Fault(
        "the diagonal forgets its window", "attention/prepared.py",
        "self.backend.prepare_diagonal(counted, stop - start, window)",
        "self.backend.prepare_diagonal(counted, stop - start, None)",
        (f"{_WINDOWED}[(1, 2, 1)-(3,)-gather_q]",),
    ),
    Fault(
        "a row's window starts where the segment's first does", "plan/reach.py",
        "yield _VisibleTokens(row, len(seeing), first, until - first, seeing if seeing[-1] else None)",
        "yield _VisibleTokens(row, len(seeing), first, until - first, None)",
        (f"{_WINDOWED}[(1, 2, 1)-(3,)-gather_q]",),
    ),
    Fault(
        "the diagonal is not causal", "attention/backends/cpu.py",
        "is_causal=band is None", "is_causal=False",
        (f"{_RANKS}::test_the_backends_of_a_cpu_equal_the_reference_in_fp32",),
    ),
    Fault(
        "the plain diagonal hides a token from itself", "attention/backends/dense.py",
        "seen = back >= 0 if window is None else", "seen = back > 0 if window is None else",
        ("tests/unit/test_torch_backend.py::test_the_diagonal_is_causal_and_values_may_be_narrower",),
    ),
    Fault(
        "one token too few is visible in a half-full page", "cache/pages.py",
        "partly = rest if", "partly = max(0, rest - 1) if",
        (f"{_PAGES}::test_visible_spans_are_the_slots_of_earlier_positions_in_order",),
    ),
    Fault(
        "every token of a page is written to its first slot", "cache/pages.py",
        "slot = page.index * self.page_size + row", "slot = page.index * self.page_size",
        (f"{_PAGES}::test_write_slots_cover_exactly_a_shards_positions",),
    ),
    Fault(
        "the scales of another head are read", "attention/rows.py",
        "return (self.values.float() * _spread(self.scales, self.groups)).to(dtype)",
        "return (self.values.float() * _spread(self.scales.roll(1, 1), self.groups)).to(dtype)",
        (f"{_RANKS}::test_the_cpu_backend_reads_a_quantised_cache_as_the_reference_does",),
    ),
    Fault(
        "a fresh row is attended unrounded", "attention/rows.py",
        "    return (values.float() * _spread(scales, like.groups)).to(x.dtype)", "    return x",
        ("tests/unit/test_rows.py::test_a_fresh_row_is_attended_as_it_will_be_read",),
    ),
)  # fmt: skip

RANKS = (
    Fault(
        "keys of the same step are read before they are written", "attention/schedules/mapped_kv.py",
        "join.group.collectives.await_writes(", "(lambda *_: None)(",
        (f"{_MAPPED}::test_a_layer_reads_what_a_late_rank_has_yet_to_write_in_the_same_step",),
    ),
    Fault(
        "a step starts while another rank reads the pages of the one before it", "engine/driver/executors/threads.py",
        "self._step_starts[rank].wait()", "pass",
        (f"{_MAPPED}::test_steps_that_are_submitted_at_once_read_each_others_pages_in_order[reader]",),
    ),
    Fault(
        "a rank's own slots come last among those that it reads in place", "plan/reach.py",
        "    after = slots[own]\n", "    after = 0\n",
        (f"{_RANKS}::test_several_requests_travel_in_one_step[(1, 2, 1)-mapped_kv]",),
    ),
    Fault(
        "ring neighbours are swapped", "attention/schedules/ring.py",
        "group.start_shift(current, ring[-1], shapes[following], ring[1], label)",
        "group.start_shift(current, ring[1], shapes[following], ring[-1], label)",
        (f"{_DENSE}[12over3-ring_q-(1, 8, 1)]",),
    ),
    Fault(
        "an all-to-all returns the members in reverse", "parallel/collectives.py",
        "return self._exchange(sends, shapes)", "return self._exchange(sends, shapes)[::-1]",
        (f"{_DENSE}[12over3-gather_q-(1, 2, 1)]",),
    ),
    Fault(
        "a reduced partial is not weighed", "attention/schedules/gather_q_rs.py",
        "weight = torch.exp(part.lse - total)", "weight = torch.exp(part.lse - part.lse)",
        (f"{_DENSE}[12over3-gather_q_rs-(1, 2, 1)]",),
    ),
    Fault(
        "a tree merges nothing on the way home", "attention/schedules/tree_q.py",
        "return pack(join.variant.merge([unpack(part) for part in parts]))", "return parts[0]",
        (f"{_DENSE}[12over3-tree_q-(1, 2, 1)]", f"{_RANKS}::test_states_are_merged_inside_machines_of_any_size"),
    ),
    Fault(
        "a round of gathered keys is read from its beginning", "attention/prepared.py",
        "Span(low - start, high - low)", "Span(0, high - low)",
        (f"{_RANKS}::test_several_requests_travel_in_one_step[(1, 2, 1)-gather_kv]",),
    ),
    Fault(
        "KV heads of a DCP group are counted from each member's own", "parallel/sharding.py",
        "return head_blocks(theirs, self.kv_extent[0], self._group)",
        "return head_blocks(theirs, theirs[0] // self._group, self._group)",
        (
            "tests/unit/test_grid.py::test_every_query_head_reads_its_own_kv_head",
            f"{_DENSE}[12over3-gather_q-(4, 1, 4)]",
        ),
    ),
    Fault(
        "a KV head that two ranks share is held by one", "parallel/heads.py",
        "return start // group, -(-stop // group)", "return start // group, max(start // group + 1, stop // group)",
        ("tests/unit/test_grid.py::test_every_query_head_reads_its_own_kv_head",),
    ),
    Fault(
        "a row's sum of experts goes to another row", "parallel/experts.py",
        "total.index_add_(0, rows, part)", "total.index_add_(0, rows.flip(0), part)",
        ("tests/engine/test_stages_and_experts.py::test_experts_over_all_ranks_of_a_stage_give_the_same_tokens",),
    ),
    Fault(
        "ranks that get all rows return the sums of the first", "parallel/collectives.py",
        "shape = (rows[self.rank], *x.shape[1:])\n        return _sum(self.all_to_all(torch.split(x, list(rows)),",
        "shape = (rows[self.rank], *x.shape[1:])\n        return _sum(self.all_to_all([x[: count] for count in rows],",
        ("tests/unit/test_experts.py::test_both_exchanges_give_a_rows_sum_wherever_its_experts_are",),
    ),
    Fault(
        "rows of experts that are not held are summed as they are", "models/ops/plain.py",
        "places < stops[-1]", "places < stops[-1] + len(found)",
        ("tests/unit/test_experts.py::test_rows_in_no_group_are_not_read_whatever_they_hold",),
    ),
    Fault(
        "experts take all ranks to have equally many rows", "engine/rank/runner.py",
        "self._experts.expect(rows_of_pcp(plan.segments, self._grid.pcp))", "self._experts.expect(None)",
        ("tests/engine/test_stages_and_experts.py::test_experts_that_get_the_rows_of_all_ranks_give_the_same_tokens",),
    ),
    Fault(
        "tiles of an expert begin with its first rows", "models/fused_experts.py",
        "rank = tl.cumsum(chosen.to(tl.int32), 0) - 1 - skipped", "rank = tl.cumsum(chosen.to(tl.int32), 0) - 1",
        ("tests/gpu/test_experts.py::test_an_expert_may_be_chosen_by_all_rows_and_need_several_tiles",),
    ),
    Fault(
        "ranks do not compare their plans", "engine/rank/runner.py",
        "if not torch.equal(digest, mine):", "if torch.equal(digest, mine) and False:",
        ("tests/engine/test_ranks_agree.py",),
    ),
)  # fmt: skip

PLACEMENT = (
    Fault(
        "a page is placed on another shard than that of the rank that computes it", "scheduler/step.py",
        "self._grid.shards_of_pcp[piece.pcp])", "self._grid.shards_of_pcp[piece.pcp - 1])",
        (_ANY_LOAD,),
    ),
    Fault(
        "a zigzag is no zigzag", "scheduler/segments.py",
        "owners = [*order, *reversed(order)]", "owners = [*order, *order]",
        ("tests/unit/test_segments.py::test_zigzag_balances_causal_work_within_a_page_a_piece",),
    ),
    Fault(
        "pieces are out of order", "scheduler/segments.py",
        "return [Piece(a, b, r) for a, b, r in zip(bounds, bounds[1:], owners, strict=False)]",
        "return [Piece(a, b, r) for a, b, r in zip(bounds, bounds[1:], owners, strict=False)][::-1]",
        ("tests/unit/test_segments.py::test_pieces_cover_the_chunk_in_order_and_fit_the_room",),
    ),
    Fault(
        "a short context is spread", "scheduler/step.py",
        "len(sequence.tokens) <= self._local_context:", "len(sequence.tokens) <= 0:",
        (f"{_RANKS}::test_short_contexts_stay_on_one_shard_and_move_nothing",),
    ),
    Fault(
        "a cached page is found whatever its salt", "scheduler/sequence.py",
        "root_key(root, salt) if salt else root", "root",
        ("tests/engine/test_requests.py::test_a_cached_prefix_is_found_by_requests_of_the_same_salt_only",),
    ),
    Fault(
        "a row that is no number gets a token", "engine/rank/sampling/sampler.py",
        "if i not in problems and name not in errors", "if True",
        ("tests/unit/test_sampler.py::test_nan_logits_end_their_request_and_no_other",),
    ),
    Fault(
        "a page's key does not cover what is before it", "cache/prefix.py",
        "blake2b(parent + array(", "blake2b(array(", (f"{_PAGES}::test_keys_cover_parent_tokens_and_model",),
    ),
    Fault(
        "a page has one holder too few", "cache/manager.py",
        "self._holders.get(page, 0) + 1", "max(1, self._holders.get(page, 0))",
        (f"{_PAGES}::test_two_holders_of_a_page_and_one_lets_go",),
    ),
    Fault(
        "a page in use can be evicted", "cache/prefix.py",
        "self._idle[page.shard].pop(page, None)", "self._idle[page.shard].setdefault(page, None)",
        (f"{_PAGES}::test_cached_pages_are_shared_and_evicted_oldest_first_only_when_idle",),
    ),
    Fault(
        "the youngest idle page is evicted", "cache/prefix.py",
        "popitem(last=False)", "popitem(last=True)",
        (f"{_PAGES}::test_the_page_that_nobody_has_held_for_longest_is_evicted_first",),
    ),
    Fault(
        "a half-full page is published", "scheduler/prefix_hits.py",
        "whole := min(stop // self._cache.page_size, len(sequence.table.pages))",
        "whole := min(-(-stop // self._cache.page_size), len(sequence.table.pages))",
        (f"{_SCHEDULER}::test_a_half_full_page_is_not_found_by_others_and_a_page_that_two_steps_filled_is",),
    ),
    Fault(
        "a damaged page is found again", "cache/offload.py",
        "self._tiers[load.tier].drop(load.key)", "self._tiers[load.tier].use(load.key)",
        (f"{_OFFLOAD}::test_a_lost_page_is_computed_again_and_the_ones_before_it_are_not",),
    ),
    Fault(
        "a slot is given away while a step reads it", "cache/offload.py",
        "next((old for old in self._slot_of if old not in self.busy), None)", "next(iter(self._slot_of), None)",
        (f"{_OFFLOAD}::test_a_slot_that_a_step_under_way_uses_is_not_given_to_another_page",),
    ),
    Fault(
        "a page of another key is loaded", "engine/rank/page_store.py",
        "intact = _buffer(record)[:_KEY_BYTES] == load.key", "intact = True",
        ("tests/unit/test_offload_store.py::test_an_intact_page_of_another_key_is_noticed",),
    ),
    Fault(
        "rows of another head are sent to the decode side", "disaggregation/pool_access.py",
        "part[:, heads[0] - first : heads[1] - first]", "part[:, : heads[1] - heads[0]]",
        (
            "tests/disaggregation/test_pairs.py::test_the_tokens_of_any_two_layouts_are_those_of_one_instance"
            "[llama-{'tp': 4, 'page_size': 1}-{'pcp': 3, 'page_size': 7}]",
        ),
    ),
)  # fmt: skip

REQUESTS = (
    Fault(
        "the budget is not used up", "scheduler/step.py",
        "self.budget -= length", "self.budget -= 0", (_ANY_LOAD,),
    ),
    Fault(
        "a chunk is sampled before its prompt ends", "scheduler/step.py",
        "sample=min(length, max(0, start + length + 1 - known - sequence.pending))", "sample=1", (_ANY_LOAD,),
    ),
    Fault(
        "a preempted request loses its last token", "scheduler/sequence.py",
        "self.table = new_table()",
        "self.table, self.tokens[self.num_prompt :] = new_table(), self.tokens[self.num_prompt : -1]",
        (f"{_SCHEDULER}::test_a_preempted_decode_goes_on_behind_the_tokens_it_had",),
    ),
    Fault(
        "completions of a request are all in line", "scheduler/waiting.py",
        "        if self._num_in_line[sequence.parent_id]:\n            self._behind.setdefault(",
        "        if False:\n            self._behind.setdefault(",
        (f"{_SCHEDULER}::test_of_two_free_places_one_is_for_the_request_that_came_after_many_completions",),
    ),
    Fault(
        "a newcomer takes the only place of a request", "scheduler/preemption.py",
        "if self._running[each.parent_id] > 1 and", "if self._running[each.parent_id] > 0 and",
        (f"{_SCHEDULER}::test_requests_of_one_completion_are_not_preempted_for_later_ones",),
    ),
    Fault(
        "a newcomer takes the place of a more important request", "scheduler/preemption.py",
        "and self._rank(each) >= least", "",
        (f"{_SCHEDULER}::test_a_more_important_requests_completions_are_not_preempted_for_a_less_important_one",),
    ),
    Fault(
        "all drafts are computed however few are right", "scheduler/draft_length.py",
        "likely = (right + likely) / (reached + 1)", "likely = 1.0",
        ("tests/unit/test_draft_length.py",),
    ),
    Fault(
        "tokens after a wrong draft are kept", "scheduler/progress.py",
        "if right[-1].token_id != draft or ", "if ",
        ("tests/engine/test_speculation.py::test_right_drafts_save_steps_and_wrong_ones_are_taken_back",),
    ),
    Fault(
        "a stop token is passed over", "engine/driver/core.py",
        "if token.token_id in self._stops:", "if token.token_id in ():",
        (f"{_REQUESTS}::test_a_stop_token_ends_the_completion_and_is_kept",),
    ),
    Fault(
        "a continued segment is one position too far", "plan/view.py",
        "positions += range(segment.start, segment.stop)",
        "positions += range(segment.start + bool(segment.start), segment.stop + bool(segment.start))",
        (f"{_DENSE}[12over3-gather_q-(1, 2, 1)]",),
    ),
    Fault(
        "nearly tied tokens are drawn by approximate noise", "engine/rank/sampling/winner.py",
        "if alone == False:", "if alone != alone:",
        ("tests/gpu/test_sampling_scores.py::"
         "test_the_best_of_tokens_whose_scores_are_nearly_tied_is_that_of_fp64",),
    ),
    Fault(
        "what is before an unkept token is not kept", "engine/rank/sampling/winner.py",
        "(tried >= second) & (before_second >= target)", "(tried <= second) & (before_second >= target)",
        ("tests/gpu/test_triton_sampling.py::test_a_top_p_that_few_tokens_of_many_blocks_are_in",),
    ),
    Fault(
        "the bound of top-k is too high", "engine/rank/sampling/edges.py",
        ">= top_k, tried, found", ">= top_k - 1, tried, found",
        ("tests/gpu/test_sampling_scores.py::"
         "test_the_best_of_tokens_whose_scores_are_nearly_tied_is_that_of_fp64",),
    ),
    Fault(
        "noise does not depend on the seed", "engine/rank/sampling/random_numbers.py",
        "_splitmix64(_splitmix64(seed & _MASK64) ^ position)", "_splitmix64(_splitmix64(0) ^ position)",
        (f"{_SAMPLER}::test_seeds_give_different_tokens",),
    ),
    Fault(
        "noise does not depend on the position", "engine/rank/sampling/random_numbers.py",
        "_splitmix64(_splitmix64(seed & _MASK64) ^ position)", "_splitmix64(_splitmix64(seed & _MASK64))",
        (f"{_SAMPLER}::test_sampled_frequencies_are_the_probabilities[position-plain]",),
    ),
    Fault(
        "bad words of several tokens forget the output", "plan/mirror.py",
        "return self.history[self.num_prompt : self.num_prompt + count]", "return []",
        (f"{_CONSTRAINED}[{{}}]",),
    ),
    Fault(
        "a penalty forgets what was sampled", "engine/rank/sampling/logit_changes.py",
        "counts.add(numbers, token_ids.index_select(0, indices))", "counts.add(numbers[:0], token_ids[:0])",
        (f"{_SAMPLER}::test_sampled_tokens_count_without_being_told",),
    ),
    Fault(
        "a penalty counts wrong drafts for good", "plan/view.py",
        "found.setdefault(segment.request_id, segment.start)", "found[segment.request_id] = segment.start",
        (
            "tests/unit/test_mirror.py::"
            "test_rows_of_a_step_know_how_many_drafts_are_before_them_in_whichever_segment_these_are",
        ),
    ),
    Fault(
        "a gap among a step's tokens is passed over", "scheduler/progress.py",
        " or token.position != right[-1].position + 1", "",
        (f"{_UNDER}::test_a_token_counts_only_where_all_before_it_could_be_sampled",),
    ),
    Fault(
        "drafts that a grammar forbids are computed", "scheduler/sequence.py",
        "return drafts[: self._grammar.count_allowed(self.tokens[self.num_prompt :], drafts)]", "return drafts",
        (f"{_UNDER}::test_tokens_under_a_grammar_are_those_without_drafts",),
    ),
    Fault(
        "a grammar takes drafts for tokens", "engine/rank/runner.py",
        "known.output(position), drafts)", "known.output(position))",
        (f"{_UNDER}::test_tokens_under_a_grammar_are_those_without_drafts",),
    ),
    Fault(
        "what is sent to draft counts as the model's", "parallel/collectives.py",
        "label = self.prefix + label", "label = str(label)",
        ("tests/engine/test_bytes_of_drafts.py::"
         "test_dcp_4_sends_the_bytes_of_the_formula_to_verify_and_to_draft",),
    ),
    Fault(
        "a grammar keeps wrong drafts", "engine/rank/sampling/grammar.py",
        "if self._consumed > same:", "if False:",
        ("tests/unit/test_grammar.py::test_drafts_that_are_taken_back_leave_no_trace",),
    ),
    Fault(
        "a row behind drafts ends its request", "engine/rank/sampling/sampler.py",
        "for i, problem in problems.items() if not rows[i].drafts}", "for i, problem in problems.items()}",
        (f"{_UNDER}::test_a_draft_after_which_no_token_is_left_ends_no_request",),
    ),
    Fault(
        "a penalty counts a token once only", "engine/rank/sampling/logit_changes.py",
        "frequency * output +", "frequency * (output > 0) +",
        (f"{_SAMPLER}::test_frequency_penalty_counts_every_occurrence_in_the_output",),
    ),
    Fault(
        "a banned token is sampled", "engine/rank/sampling/logit_changes.py",
        "if self.banned is not None:", "if self.banned is not None and False:",
        (f"{_CONSTRAINTS}::test_a_bad_word_of_one_token_needs_no_history_and_runs_ahead",),
    ),
    Fault(
        "a bad word is forbidden after any token", "engine/rank/sampling/constraints.py",
        "list(output[-len(begin) :]) == begin", "output", (f"{_CONSTRAINED}[{{'pcp': 3}}]",),
    ),
    Fault(
        "an end comes before min_tokens", "engine/rank/sampling/constraints.py",
        "if position < self._params.min_tokens", "if position < 0", (f"{_CONSTRAINED}[{{'tp': 4, 'dcp': 2}}]",),
    ),
    Fault(
        "bad words of several tokens see no output", "request.py",
        "return self.penalises or self.needs_output or", "return self.penalises or",
        (f"{_CONSTRAINED}[{{'pages_per_shard': (16,)}}]",),
    ),
    Fault(
        "priorities are not looked at", "scheduler/scheduler.py",
        'return sequence.params.priority if self.config.scheduling_policy == "priority" else 0', "return 0",
        (f"{_SCHEDULER}::test_requests_of_a_lower_priority_number_start_first_and_equal_ones_in_order",),
    ),
    Fault(
        "top-p is off", "engine/rank/sampling/sampler.py",
        "if params.top_p < 1.0:", "if params.top_p < 0.0:",
        (f"{_SAMPLER}::test_filters_leave_the_tokens_and_probabilities_of_their_definitions",),
    ),
    Fault(
        "log-probabilities are not normalised", "engine/rank/sampling/logprobs.py",
        "logits.logsumexp(-1, keepdim=True)", "logits.amax(-1, keepdim=True)",
        (f"{_SAMPLER}::test_logprobs_of_the_whole_vocabulary_are_sorted_and_sum_to_one",),
    ),
    Fault(
        "weights of experts are not normalised", "models/moe.py",
        "if moe.normalise:", "if moe.normalise and False:", (f"{_FAMILIES}[qwen3-moe-one rank]",),
    ),
    Fault(
        "the correction bias counts for an expert's weight", "models/moe.py",
        "weights = scores.gather(1, experts)", "weights = merit.gather(1, experts)",
        (f"{_FAMILIES}[deepseek-v3-one rank]",),
    ),
    Fault(
        "the module of the end of a chunk sees another token", "plan/drafts.py",
        "        known[row] = token", "        known[row] = 0",
        (f"{_MODULE}::test_the_logits_of_random_weights_follow_the_papers_equations",),
    ),
    Fault(
        "a draft behind a wrong one is accepted on a rank", "plan/drafts.py",
        "                    wrong.add(request)", "                    pass",
        (f"{_MODULE}::test_rows_behind_a_wrong_draft_are_not_accepted_on_any_rank",),
    ),
    Fault(
        "a recorded step drafts after the tokens of the step before", "engine/rank/draft_graphs.py",
        "        self._drawn[:, : drawn.shape[1]] = drawn\n", "",
        ("tests/engine/test_recorded_drafts.py",),
    ),
    Fault(
        "a recorded further run sees the contexts of the step before", "engine/rank/draft_graphs.py",
        "if self._later is not None and not self._later.fill(later.runs):", "if False:",
        ("tests/engine/test_recorded_drafts.py",),
    ),
    Fault(
        "the device accepts a draft behind a wrong one", "engine/rank/draft_chain.py",
        ".long().cumprod(1).sum(1)", ".long().sum(1)",
        ("tests/engine/test_recorded_drafts.py::"
         "test_drafts_behind_a_wrong_one_are_not_accepted_even_if_they_are_right",),
    ),
    Fault(
        "a further run reads what was never written", "engine/rank/draft_chain.py",
        "numbers >= place[:, None] if run == 1 else ", "", ("tests/engine/test_recorded_drafts.py",),
    ),
    Fault(
        "a further run writes to the first slot that it may have", "engine/rank/draft_chain.py",
        "else numbers == place[:, None]", "else numbers == 0 * place[:, None]",
        ("tests/engine/test_recorded_drafts.py",),
    ),
    Fault(
        "rows are at the positions of the plan, wherever their drafts begin", "engine/rank/settled_rows.py",
        "self.positions + shifts,", "self.positions,",
        (_AHEAD,),
    ),
    Fault(
        "rows see what they would if all drafts before them were wrong", "engine/rank/settled_rows.py",
        "places = self.places + shifts[: len(self.places)]", "places = self.places",
        (_AHEAD,),
    ),
    Fault(
        "noise follows from the positions of the plan, wherever drafts begin", "engine/rank/sampling/sampler.py",
        "_draw_rows(logits, changed, chosen, rows if late is None else _shifted(rows, late.shifts))",
        "_draw_rows(logits, changed, chosen, rows)",
        (_AHEAD,),
    ),
    Fault(
        "a place behind the rows keeps what was never written", "engine/rank/settled_rows.py",
        "self.slots.where(begun, NO_SLOT).int()",
        "self.slots.where(torch.zeros_like(begun).index_fill(0, places, value=True), NO_SLOT).int()",
        (_AHEAD,),
    ),
    Fault(
        "a draft is accepted behind which no token could be sampled", "engine/rank/draft_chain.py",
        "right &= usable[(before + 1).clamp_max(len(sampled) - 1)] & (", "right &= (",
        (f"{_AHEAD}::test_a_row_that_could_not_be_sampled_is_computed_again",),
    ),
    Fault(
        "what is drawn behind wrong drafts counts for penalties", "engine/rank/sampling/logit_changes.py",
        "(drafts <= accepted[columns])", "(drafts >= 0)",
        (_SAMPLER, f"{_AHEAD}::test_penalties_count_what_only_the_device_knows"),
    ),
    Fault(
        "a rank without room for a step drafts with the attention of the step before", "engine/rank/short_steps.py",
        "        self.prepared = prepared\n", "",
        (f"{_SEVERAL}::test_a_rank_without_room_computes_in_the_shapes_of_the_others",),
    ),
    Fault(
        "a rank without room for drafting has rows for its requests only", "engine/rank/draft_graphs.py",
        "self._chain.prepare(later, self._requests)", "self._chain.prepare(later, len(sampled))",
        (f"{_SEVERAL}::test_a_rank_without_room_computes_in_the_shapes_of_the_others",),
    ),
    Fault(
        "what recorded drafting sends is counted as the model's", "engine/rank/recorder.py",
        "traffic.prefix = purpose\n", "traffic.prefix = \"\"\n",
        ("tests/engine/test_bytes_of_drafts.py::test_tp_2_sends_the_bytes_of_the_formula_recorded_or_not",),
    ),
    Fault(
        "the driver does not correct where a request is", "scheduler/sequence.py",
        "self.computed += len(right) - 1", "pass",
        (_AHEAD,),
    ),
    Fault(
        "a step that is planned ahead may be behind the end of its request", "scheduler/sequence.py",
        "self.max_stored - self.length - self.slack)", "self.max_stored - self.length)",
        (f"{_AHEAD}::"
         "test_no_row_can_be_behind_the_last_position_of_its_request_however_many_drafts_are_right",),
    ),
    Fault(
        "attention of a checkpoint that drafts is not prepared", "engine/rank/drafting.py",
        "own = self._view(widened(step.plan), requests) if self.has_own_attention else None", "own = None",
        ("tests/engine/test_small_model_drafts.py::test_a_model_that_drafts_for_itself_is_nearly_always_right",),
    ),
    Fault(
        "an EAGLE-3 module takes what layers give", "models/decoder.py",
        "if number in self._observed_layers:", "if number - 1 in self._observed_layers:",
        ("tests/engine/test_eagle3.py::test_the_logits_of_random_weights_follow_the_papers_equations",),
    ),
    Fault(
        "a rank's row is overwritten before the others have added it", "parallel/sum_norm.py",
        "(2 * row + (turn & 1)) * AREA", "2 * row * AREA",
        ("tests/processes/test_sum_norm.py::test_no_member_overwrites_what_another_has_not_read",),
    ),
    Fault(
        "a bias behind a sum is lost where the norm takes the sum along", "models/layers.py",
        "None if x.bias is not None else x.tp", "x.tp",
        ("tests/gpu/test_launches.py::test_a_bias_behind_a_sum_is_added_before_the_norm",),
    ),
    Fault(
        "rope turns the wrong way", "models/ops/plain.py",
        "signed = torch.cat((-sin, sin), dim=-1)", "signed = torch.cat((sin, -sin), dim=-1)",
        (f"{_FAMILIES}[llama-one rank]",),
    ),
    Fault(
        "a part of a weight begins within a block and is taken as it is", "engine/rank/loading.py",
        " and all(bound % width == 0 for bound in self.bounds[-1])", "",
        ("tests/unit/test_block_products.py",),
    ),
    Fault(
        "weights with and without offsets are joined in 4 bits", "compiled/blocks.py",
        " if len(has_offsets) == 1 else 8", "", ("tests/unit/test_block_products.py",),
    ),
)  # fmt: skip

FAULTS = (*ATTENTION, *RANKS, *PLACEMENT, *REQUESTS)
