"""Invalid requests and unsupported models are refused before anything is computed, with a remedy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from megatron_mtp.config.mcore.effects import SAME_FUNCTION
from megatron_mtp.config.mcore_table import MCORE_FIELDS
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.decode import support
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.sampling import Sampling
from megatron_mtp.decode.speculate import Options, generate
from megatron_mtp.decode.support import refuse_unsupported
from megatron_mtp.errors import ConfigError, DataError, UnsupportedError
from tests.decode.models import DENSE, VARIANTS, decoder_of, plain_model
from tests.model.plain_to_config import run_config

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def decoder():
    return decoder_of(plain_model(DENSE))


def test_no_mtp_layers():
    plain = decoder_of(plain_model(replace(DENSE, num_depths=0)))
    with pytest.raises(UnsupportedError, match=r"num_draft = 2.*this model has none.*num_draft = 0.*mtp_finetune"):
        generate(plain, [[1]], Options(max_new_tokens=4, num_draft=2))
    assert len(generate(plain, [[1]], Options(max_new_tokens=4, num_draft=0)).tokens[0]) == 4
    assert len(generate(plain, [[1]], Options(max_new_tokens=4, num_draft="auto")).tokens[0]) == 4


def test_more_drafts_than_parallel_heads():
    heads = decoder_of(plain_model(VARIANTS["parallel"]))
    with pytest.raises(UnsupportedError, match=r"num_draft = 4.*mtp_num_layers = 3"):
        generate(heads, [[1]], Options(max_new_tokens=4, num_draft=4))


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([[1] * 14], Options(max_new_tokens=4), r"14 tokens and 4 are to follow.*context of 16"),
        ([[1], []], Options(max_new_tokens=4), r"Prompt 1 is empty"),
        ([[1, 50]], Options(max_new_tokens=4), r"id 50: the model knows ids 0 to 49"),
        ([], Options(max_new_tokens=4), r"no prompt"),
        ([[1]] * 64, Options(max_new_tokens=10**9, context=2 * 10**9), r"GiB are free"),
    ],
)
def test_prompts(decoder, prompts, options, text):
    with pytest.raises(DataError, match=text):
        generate(decoder, prompts, options)


def test_options(decoder):
    with pytest.raises(ConfigError) as error:
        generate(decoder, [[1]], Options(max_new_tokens=0, num_draft="some", widths=()))
    assert len(error.value.problems) == 3
    with pytest.raises(UnsupportedError, match="draft tree"):
        generate(decoder, [[1]], Options(max_new_tokens=4, widths=(2,), sampling=Sampling(1.0)))


def test_models():
    model = run_config(DENSE, 1, 1).copy().model
    refuse_unsupported(model)
    model.mcore = {"window_size": [4, 0]}
    model.attention_output_gate = True
    with pytest.raises(UnsupportedError) as error:
        refuse_unsupported(model)
    assert len(error.value.problems) == 2
    # An export refuses this field as well, so it is no way out.
    assert not any("mcore" in str(problem) and "Export" in str(problem) for problem in error.value.problems)
    with pytest.raises(UnsupportedError):
        Decoder.build(model, {})


def test_every_field_of_a_model_is_classified_once():
    """A new field fails here until somebody decides whether decoding computes it."""
    lists = [support.COMPUTED, support.WITHOUT_EFFECT, support.REFUSED.keys()]
    assert sorted(name for names in lists for name in names) == sorted(field.name for field in fields(ModelConfig))
    assert MCORE_FIELDS.keys() >= SAME_FUNCTION


def test_an_unknown_field_is_refused():
    @dataclass(kw_only=True, slots=True)
    class Newer(ModelConfig):
        attention_sink: bool = False

    refuse_unsupported(Newer())
    with pytest.raises(UnsupportedError, match=r"model\.attention_sink = True: it is not known"):
        refuse_unsupported(Newer(attention_sink=True))
