"""The closed form on value vectors with planted latents (methods/sae.md, section 2.11)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from concept_erasure.errors import EditError, ShapeError
from concept_erasure.sae._pisces_edit import (
    Change,
    Layer,
    change,
    depth_factor,
    gains,
    read_layer,
    select,
    value_weight,
)
from concept_erasure.sae.disentangler import Disentangler
from tests.sae.value_vectors import (
    VECTORS,
    WIDTH,
    noise,
    oblique,
    orthonormal,
    planted,
    planted_rows,
    with_gain,
)

LATENTS = torch.tensor([2, 5])


def read(
    dis: Disentangler, values: Tensor, signs: tuple[int, int] = (1, 1), **options: object
) -> Layer:
    return read_layer(
        dis,
        values,
        LATENTS,
        torch.tensor(signs),
        site="mlp.1",
        down="down",
        **options,  # type: ignore[arg-type]
    )


def after(values: Tensor, layer: Layer, made: Change) -> Tensor:
    new = values.clone()
    new[made.columns] += made.coefficients @ layer.writes
    return new


def brute_force(dis: Disentangler, values: Tensor, layer: Layer, made: Change) -> Tensor:
    """The paper's way: encode all latents, set some, decode, add what the dictionary leaves over."""
    z = dis.encode(values)
    rest = values - dis.decode(z)
    for row, column in enumerate(made.columns.tolist()):
        for place, latent in enumerate(layer.latents.tolist()):
            if made.selected[row, place]:
                z[column, latent] = made.targets[row, place]
    return dis.decode(z) + rest


def test_the_planted_vectors_are_selected_and_fewer_with_a_higher_tau() -> None:
    dis = orthonormal()
    layer = read(dis, planted(dis))
    for place in (0, 1):
        found = select(layer.linear, layer.neurons, 0.5)[:, place].nonzero()[:, 0]
        torch.testing.assert_close(found, planted_rows(place))


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_selection_is_monotone_in_tau(one: float, other: float, seed: int) -> None:
    dis = orthonormal(seed)
    layer = read(dis, noise(VECTORS, WIDTH, seed=seed))
    low, high = sorted((one, other))
    wide, narrow = (select(layer.linear, layer.neurons, tau) for tau in (low, high))
    assert bool((wide | ~narrow).all()) and bool(narrow.any())


@pytest.mark.parametrize("scale", ["layer", "latent"])
def test_the_closed_form_is_encoding_and_decoding_everything(scale: str) -> None:
    dis = oblique()
    values = planted(dis)
    layer = read(dis, values, signs=(1, -1))
    made = change(layer, tau=0.4, mu=3.0, scale=scale)  # type: ignore[arg-type]
    torch.testing.assert_close(after(values, layer, made), brute_force(dis, values, layer, made))


def test_the_target_is_the_opposite_of_the_largest_coefficient() -> None:
    dis = orthonormal()
    layer = read(dis, planted(dis), signs=(1, -1))
    largest = layer.linear.abs().amax(0)
    whole = change(layer, tau=0.5, mu=2.0)
    own = change(layer, tau=0.5, mu=2.0, scale="latent")
    for made, unit in ((whole, largest.max().expand(2)), (own, largest)):
        want = torch.stack((-2 * unit[0], 2 * unit[1]))
        torch.testing.assert_close(made.targets.sum(0) / made.selected.sum(0), want)
    assert not torch.equal(whole.targets, own.targets)


@pytest.mark.parametrize("exact", [False, True])
def test_a_linear_coefficient_becomes_its_target(exact: bool) -> None:
    """Orthonormal latents as they are; any others below a cosine of 0.9 when they are set together."""
    dis = oblique() if exact else orthonormal()
    values = planted(dis)
    layer = read(dis, values)
    made = change(layer, tau=0.3, mu=4.0, coefficient="linear", exact=exact)
    new = read(dis, after(values, layer, made)).linear[made.columns]
    torch.testing.assert_close(
        new[made.selected], made.targets[made.selected], atol=1e-5, rtol=1e-5
    )


def test_oblique_latents_miss_their_targets_when_set_one_by_one() -> None:
    dis = oblique()
    values = planted(dis)
    layer = read(dis, values)
    made = change(layer, tau=0.1, mu=4.0, coefficient="linear")
    new = read(dis, after(values, layer, made)).linear[made.columns]
    assert float((new - made.targets)[made.selected].abs().max()) > 0.5


def test_other_columns_and_other_directions_stay() -> None:
    dis = orthonormal()
    values = planted(dis)
    layer = read(dis, values)
    made = change(layer, tau=0.5, mu=5.0)
    new = after(values, layer, made)
    kept = torch.ones(VECTORS, dtype=torch.bool)
    kept[made.columns] = False
    assert torch.equal(new[kept], values[kept]) and int(kept.sum()) == VECTORS - 20
    rows = dis.W_dec[LATENTS]
    outside = torch.eye(WIDTH, dtype=rows.dtype) - rows.T @ rows
    torch.testing.assert_close(new @ outside, values @ outside, atol=1e-6, rtol=0)


def test_with_linear_coefficients_mu_zero_projects_and_twice_is_once() -> None:
    dis = orthonormal()
    values = planted(dis)
    layer = read(dis, values)
    made = change(layer, tau=0.0, mu=0.0, coefficient="linear")
    new = after(values, layer, made)
    out = values - (values @ dis.W_enc[:, LATENTS]) @ dis.W_dec[LATENTS]
    torch.testing.assert_close(new, out, atol=1e-6, rtol=0)
    strong = change(layer, tau=0.5, mu=3.0, coefficient="linear")
    once = after(values, layer, strong)
    # with M and the selection frozen, what is there now is subtracted from the same target
    now = read(dis, once).linear[strong.columns]
    again = (strong.targets - now) * strong.selected
    torch.testing.assert_close(again, torch.zeros_like(again), atol=1e-6, rtol=0)


def test_with_codes_neither_holds() -> None:
    """The published rule: mu = 0 takes only what the threshold lets through; a second time subtracts again."""
    dis = orthonormal()
    values = planted(dis)
    layer = read(dis, values)
    made = change(layer, tau=0.5, mu=0.0, coefficient="code")
    negative = layer.linear[made.columns][made.selected] < 0
    assert torch.equal(made.coefficients[made.selected][negative], torch.zeros(10).double())
    strong = change(layer, tau=0.5, mu=3.0, coefficient="code")
    once = after(values, layer, strong)
    second = change(
        replace(read(dis, once), neurons=layer.neurons), tau=0.5, mu=3.0, coefficient="code"
    )
    assert float(second.coefficients.abs().max()) > 1


def test_signs_of_neurons_turn_the_edit_and_zero_skips() -> None:
    dis = orthonormal()
    values = planted(dis)
    neurons = torch.ones(VECTORS)
    first, skipped = 20, 21
    neurons[skipped] = 0
    plain = change(read(dis, values, neurons=neurons), tau=0.5, mu=3.0)
    neurons[first] = -1
    turned = change(read(dis, values, neurons=neurons), tau=0.5, mu=3.0)
    assert skipped not in plain.columns.tolist() and torch.equal(plain.columns, turned.columns)
    row = plain.columns.tolist().index(first)
    torch.testing.assert_close(turned.targets[row], -plain.targets[row])
    rest = torch.arange(len(plain.columns)) != row
    assert torch.equal(turned.targets[rest], plain.targets[rest])


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_behind_a_norm_the_effect_is_the_wanted_one_within_the_ridge(ridge: float) -> None:
    dis = orthonormal()
    gain = noise(WIDTH, seed=8).exp()
    gain[3] = -gain[3]
    seen = planted(dis)
    values = seen / gain
    behind = with_gain(dis, gain)
    layer = read(behind, values, ridge=ridge)
    torch.testing.assert_close(layer.linear, seen @ dis.W_enc[:, LATENTS])
    made = change(layer, tau=0.5, mu=4.0)
    a = noise(7, VECTORS, seed=9)
    before, new = a @ values, a @ after(values, layer, made)
    effect = ((new - before) * gain) @ dis.W_dec[LATENTS].T
    wanted = a[:, made.columns] @ made.coefficients
    miss = float((effect - wanted).norm() / wanted.norm())
    assert miss < (1e-9 if ridge == 0 else 0.05)
    assert miss < 3 * float((1 - layer.reach).abs().max()) + 1e-9
    # the published rule reads and writes v itself
    old = read(behind, values, post_norm=False)
    published = ((a[:, made.columns] @ made.coefficients @ old.writes) * gain) @ dis.W_dec[
        LATENTS
    ].T
    assert float((published - wanted).norm() / wanted.norm()) > 0.2


def test_the_norm_shrinks_the_rest_by_the_ratio_of_the_roots() -> None:
    """After the norm: ``y' = (rms(u)/rms(u')) y + a (g dv)/rms(u')``."""
    dis = orthonormal()
    gain = noise(WIDTH, seed=8).exp()
    values = planted(dis) / gain
    layer = read(with_gain(dis, gain), values)
    made = change(layer, tau=0.5, mu=4.0)
    a = noise(1, VECTORS, seed=9)

    def norm(u: Tensor) -> Tensor:
        return u / u.square().mean(-1, keepdim=True).sqrt() * gain

    u, new = a @ values, a @ after(values, layer, made)
    rms = [x.square().mean(-1, keepdim=True).sqrt() for x in (u, new)]
    dv = made.coefficients @ layer.writes
    want = rms[0] / rms[1] * norm(u) + a[:, made.columns] @ (gain * dv) / rms[1]
    torch.testing.assert_close(norm(new), want)


def test_protected_latents_keep_their_coefficients() -> None:
    dis = oblique()
    values = planted(dis)
    guarded = torch.tensor([0, 7])
    for gain in (None, noise(WIDTH, seed=8).exp()):
        used = dis if gain is None else with_gain(dis, gain)
        scale = torch.ones(WIDTH).double() if gain is None else gain
        layer = read(used, values, protect=guarded)
        made = change(layer, tau=0.3, mu=4.0, coefficient="linear", exact=True)
        new = after(values, layer, made)
        before, now = ((x * scale) @ dis.W_enc for x in (values, new))
        torch.testing.assert_close(now[:, guarded], before[:, guarded], atol=1e-9, rtol=0)
        edited = now[made.columns][:, LATENTS][made.selected]
        torch.testing.assert_close(edited, made.targets[made.selected], atol=1e-6, rtol=0)
        free = read(used, values)
        assert bool((layer.reach < free.reach).all())


def test_a_latent_that_is_protected_twice_takes_no_more_than_once() -> None:
    dis = orthonormal()
    values = planted(dis)
    once, twice = (read(dis, values, protect=torch.tensor(rows)) for rows in ([7], [7, 7]))
    torch.testing.assert_close(once.writes, twice.writes)


def test_what_protected_latents_read_whole_cannot_be_edited() -> None:
    dis = orthonormal()
    twin = replace(dis, W_enc=torch.cat((dis.W_enc[:, :11], dis.W_enc[:, 2:3]), 1))
    with pytest.raises(EditError, match="latent 2"):
        read(twin, planted(dis), protect=torch.tensor([11]))


def test_latents_that_write_one_direction_are_refused_together() -> None:
    dis = orthonormal()
    rows = dis.W_dec.clone()
    rows[5] = rows[2]
    twin = replace(dis, W_dec=rows, W_enc=rows.T.contiguous())
    layer = read(twin, planted(dis, (2,)))
    with pytest.raises(EditError, match="same direction"):
        change(layer, tau=0.5, mu=1.0, exact=True)


def test_the_depth_schedule_is_the_published_one() -> None:
    for layer in range(26):
        want = min(1.0, 0.1 + 0.9 * layer / 9)
        assert depth_factor(layer / 25) == pytest.approx(want)
    dis = orthonormal()
    half = change(read(dis, planted(dis), depth=0.5), tau=0.5, mu=4.0)
    torch.testing.assert_close(
        half.targets, change(read(dis, planted(dis)), tau=0.5, mu=2.0).targets
    )


def test_shapes_are_checked() -> None:
    dis = orthonormal()
    with pytest.raises(ShapeError, match="value vectors"):
        read(dis, noise(4, 3))
    with pytest.raises(ShapeError, match="gain"):
        gains(torch.ones(3), 0.1, noise(4, 5))


def test_value_vectors_of_both_layouts() -> None:
    linear = nn.Linear(3, 5)
    assert value_weight(linear).shape == (3, 5)
    assert torch.equal(value_weight(linear)[1], linear.weight[:, 1])


def test_a_layer_moves() -> None:
    dis = orthonormal()
    layer = read(dis, planted(dis)).to("cpu")
    assert layer.site == "mlp.1" and layer.linear.device.type == "cpu"
