"""Initial projections of new MTP layers: they are the least-squares solution, and useful drafters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mtp.decode.projection import fit_projections
from megatron_mtp.errors import UnsupportedError
from tests.decode.models import DENSE, MLA, decoder_of, plain_model, random_tokens

pytestmark = pytest.mark.unit


def grown_model(plain):
    """A plain model whose MTP layers are copies of its last layer, with norms of ones and random projections."""
    model = plain_model(plain)
    with torch.no_grad():
        for module in model.mtp:
            module.block.load_state_dict(model.layers[-1].state_dict())
            module.final_norm.load_state_dict(model.final_norm.state_dict())
            for norm in (module.enorm, module.hnorm):
                norm.weight.fill_(1.0)
    return model


def documents(count, seed):
    return [row.tolist() for row in random_tokens(count, 24, seed=seed)]


@pytest.mark.parametrize(
    "plain",
    [
        replace(DENSE, num_depths=1),
        replace(MLA, num_depths=1),
        replace(DENSE, num_depths=1, mtp_hidden="pre_final_norm"),
    ],
    ids=["dense", "mla", "pre_final_norm"],
)
def test_it_is_the_solution_of_the_weighted_least_squares(plain):
    model, texts = grown_model(plain), documents(12, seed=1)
    [fit] = fit_projections(decoder_of(model), texts, documents(2, seed=2), ridge=0.0)

    model = model.double()
    below = []
    model.layers[-1].register_forward_pre_hook(lambda _, inputs: below.append(inputs[0]))
    ids = torch.tensor(texts)
    with torch.no_grad():
        trunk = model.hidden_states([ids, torch.nn.functional.pad(ids[:, 1:], (0, 1))])[0]
        if plain.mtp_hidden == "pre_final_norm":
            trunk = model.layers[-1](
                below[0], torch.arange(24).expand(12, 24), torch.ones(24, 24).bool().tril().expand(12, 24, 24), []
            )
        module, embedded = model.mtp[0], model.embedding(ids)
        rows = torch.cat((module.enorm(embedded[:, 1:]), module.hnorm(trunk[:, :-1])), dim=-1).flatten(0, 1)
        target = below[0][:, 1:].flatten(0, 1)
        scale = target.pow(2).mean(dim=-1, keepdim=True).rsqrt()
        expected = torch.linalg.lstsq(rows * scale, target * scale).solution.T
        left = ((rows * scale) @ expected.T - target * scale).pow(2).sum() / (target * scale).pow(2).sum()
    torch.testing.assert_close(fit.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert fit.unexplained == pytest.approx(float(left), abs=1e-5)


def test_drafts_agree_with_the_model_where_the_input_can_be_explained():
    """If the trunk's last layer reads a function of the token alone, the embedding explains it at every depth."""
    model = grown_model(DENSE)
    with torch.no_grad():
        for layer in model.layers[:-1]:
            layer.attention.o.weight.zero_()
            layer.mlp.down.weight.zero_()
    decoder = decoder_of(model)
    for fit in fit_projections(decoder, documents(20, seed=1), documents(4, seed=2), ridge=1e-9):
        assert fit.unexplained < 1e-2  # the lengths of embeddings, which norms take away
        assert fit.agreement > 0.5  # attention begins k slots later than the trunk's


def test_later_depths_read_what_fitted_ones_make():
    decoder = decoder_of(grown_model(DENSE))
    fits = fit_projections(decoder, documents(12, seed=1), documents(2, seed=2))
    assert len(fits) == 3
    alone = fit_projections(decoder_of(grown_model(replace(DENSE, num_depths=1))), documents(12, seed=1), [])
    torch.testing.assert_close(fits[0].weight, alone[0].weight)
    assert not torch.equal(fits[0].weight, fits[1].weight)


@pytest.mark.parametrize(
    ("plain", "text"),
    [
        (replace(DENSE, num_depths=0), "mtp_num_layers = 0"),
        (replace(DENSE, mtp_variant="parallel"), "mtp_variant = parallel"),
    ],
)
def test_models_without_a_projection_are_refused(plain, text):
    with pytest.raises(UnsupportedError, match=text):
        fit_projections(decoder_of(plain_model(plain)), documents(2, seed=1), [])


def test_a_trained_layer_is_refused():
    with pytest.raises(UnsupportedError, match="MTP layer 1 is not a copy of the last decoder layer"):
        fit_projections(decoder_of(plain_model(DENSE)), documents(2, seed=1), [])
