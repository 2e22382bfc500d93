import logging
import re

import pytest

from longspan.engine.rank.progress import with_progress


@pytest.mark.parametrize("shown", [False, True])
def test_the_rank_that_shows_its_start_logs_how_long_each_part_took(shown, caplog):
    with caplog.at_level(logging.INFO, "longspan.engine"):
        assert list(with_progress("recording decode steps", "abc", 3, shown)) == ["a", "b", "c"]
    found = [re.sub(r"\d+\.\d", "N", message) for message in caplog.messages]
    assert found == (["recording decode steps took N s"] if shown else [])
