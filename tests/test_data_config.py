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
