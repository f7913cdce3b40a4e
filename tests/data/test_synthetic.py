import pytest
import torch

from sae_lens_atm.data.synthetic import HierarchyModelConfig, build_hierarchy_model, children_of


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("coverage", [0.2, 0.9])
def test_children_fire_as_often_as_asked(coverage, exclusive):
    cfg = HierarchyModelConfig(
        roots=3, branching=4, depth=2, coverage=coverage, mutually_exclusive=exclusive
    )
    model = build_hierarchy_model(cfg)
    _, features = model.sample_with_features(40_000)
    active = features > 0
    children = children_of(model.hierarchy)
    assert len(children) == 3 * (1 + 4)
    for parent, members in children.items():
        on = active[active[:, parent]][:, members]
        if len(on) > 500:
            share = on.any(1).float().mean().item()
            assert share == pytest.approx(coverage, abs=0.08)
        assert not active[~active[:, parent]][:, members].any()
        assert (on.sum(1).max() <= 1) or not exclusive


def test_firing_probabilities_and_numbering():
    cfg = HierarchyModelConfig()
    model = build_hierarchy_model(cfg)
    assert cfg.num_features == model.cfg.num_features == 256
    _, features = model.sample_with_features(40_000)
    rate = (features > 0).float().mean(0)
    roots = [13 * i for i in range(16)]
    assert rate[roots[0]].item() == pytest.approx(0.25, abs=0.02)
    assert rate[roots[-1]].item() == pytest.approx(0.04, abs=0.01)
    assert rate[-48:].mean().item() == pytest.approx(0.02, abs=0.002)
    assert children_of(model.hierarchy)[0] == [1, 5, 9]
    assert (features > 0).sum(1).float().mean().item() == pytest.approx(4.2, abs=0.1)


def test_the_seed_makes_the_directions():
    a, b, c = (
        build_hierarchy_model(HierarchyModelConfig(roots=2, seed=seed)).feature_dict.feature_vectors
        for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("roots", 0),
        ("branching", 1),
        ("coverage", 1.0),
        ("depth", -1),
        ("lone_probability", 0.0),
        ("min_root_probability", 0.5),
        ("mean_magnitude", 0.0),
    ],
)
def test_errors_name_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"^{field} must"):
        HierarchyModelConfig(**{field: value})
