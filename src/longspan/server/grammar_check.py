"""A program of its own that makes a grammar and tries it, within a limit on its CPU time.

Standard input is JSON: `schema`, a JSON schema, with `whitespace`, the pattern of white space in it; or `lark`, a
grammar in the library's own language. Standard output gets JSON: the grammar, and the problem ('' for none). It imports
nothing of this package, so that it starts within a tenth of a second.
"""

from __future__ import annotations

import json
import signal
import sys


def main(cpu_seconds: float) -> None:
    """Make and try the grammar. Ends by SIGPROF when its CPU time is over."""
    from llguidance import LLMatcher, LLTokenizer

    source = json.load(sys.stdin)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    grammar = ""
    try:
        if "schema" in source:
            grammar = LLMatcher.grammar_from_json_schema(
                source["schema"], defaults={"whitespace_pattern": source["whitespace"]}
            )
        else:
            grammar = LLMatcher.grammar_from_lark(source["lark"])
        problem = LLMatcher.validate_grammar(grammar)
        if not problem:
            # what a rank will do; the tokens of the model make little difference to the time it takes
            matcher = LLMatcher(LLTokenizer("byte"), grammar)
            matcher.compute_bitmask()
            problem = matcher.get_error()
    except ValueError as error:
        problem = str(error)
    json.dump([grammar, problem], sys.stdout)


if __name__ == "__main__":
    main(float(sys.argv[1]))
