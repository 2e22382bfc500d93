"""The lists of files in docs/architecture.md are those that run."""

from scripts.count_trips import SOURCE, run_by_a_decode_token, trips

from tests.oracle import tiny_folder


def test_the_trips_name_files_that_exist():
    assert len(trips()) == 5
    for title, files in trips().items():
        assert files, title
        assert [file for file in files if not (SOURCE / file).exists() and "mine" not in file] == [], title


def test_a_decode_token_runs_no_file_that_its_trip_does_not_name():
    assert run_by_a_decode_token(tiny_folder("llama")) <= set(next(iter(trips().values())))
