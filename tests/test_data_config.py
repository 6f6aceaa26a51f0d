"""The data section says what is wrong with it, and a setting that would do nothing is wrong."""

import pytest
from pydantic import ValidationError

from relora.data.config import DataConfig

GOOD = {
    "source": {"files": ["*.txt"]},
    "tokenizer": {"train": "bpe", "vocab_size": 400},
    "sequence_length": 16,
}


def test_python_is_short_for_the_builtin_source():
    assert DataConfig(**{**GOOD, "source": "python"}).source.builtin == "python"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {}}, "exactly one of builtin, files, dataset, saved; given: none"),
        ({"source": {"files": ["a"], "dataset": "b"}}, "given: files, dataset"),
        ({"source": {"files": ["a"], "streaming": False}}, "streaming would do nothing"),
        ({"source": {"files": ["a"], "split": "test"}}, "split would do nothing"),
        ({"source": "rust"}, "Input should be 'python'"),
        ({"source": {"files": [""]}}, "at least 1 character"),
        ({"source": {"files": []}}, "given: none"),
        ({"source": {"files": ["a"], "max_documents": 1}}, "greater than or equal to 2"),
        ({"source": {"files": ["a"], "max_documents": 10**13}}, "less than or equal to"),
        ({"source": {"dataset": "a", "cut": "blank_lines"}}, "cut would do nothing without files"),
        ({"source": {"files": ["a"], "cut": {}}}, "exactly one of separator: TEXT"),
        ({"source": {"files": ["a"], "cut": {"separator": ""}}}, "at least 1 character"),
        ({"source": {"files": ["a"], "cut": {"blank_lines": False}}}, "given: none"),
        (
            {"source": {"files": ["a"], "cut": {"separator": "x", "characters": 500}}},
            "given: separator, characters",
        ),
        ({"source": {"files": ["a"], "cut": {"characters": 5}}}, "greater than or equal to 100"),
        ({"num_workers": 100_000}, "must be from 0 to 64: these processes are for each rank"),
        ({"num_workers": -1}, "must be from 0 to 64"),
        ({"validation_fraction": 1e-300}, "validation_fraction"),
        ({"tokenizer": {}}, "either train"),
        ({"tokenizer": {"train": "bpe"}}, "train needs vocab_size"),
        ({"tokenizer": {"path": "a", "vocab_size": 400}}, "would do nothing beside path"),
        ({"tokenizer": {"train": "bpe", "vocab_size": 100}}, "greater than or equal to 300"),
        ({"sequence_length": 1}, "greater than or equal to 8"),
        ({"validation_fraction": 0.7}, "less than 0.5"),
        ({"shuffle": True}, "shuffle"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused_in_words(change, message):
    with pytest.raises(ValidationError) as caught:
        DataConfig(**{**GOOD, **change})
    assert message in str(caught.value)
