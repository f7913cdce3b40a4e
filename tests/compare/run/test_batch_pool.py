from itertools import islice

import torch

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.run.batch_pool import (
    Pool,
    batch_seed,
    draw_batch,
    model_folder,
    synthetic_model,
)
from sae_lens_atm.data.synthetic import HierarchyModelConfig, build_hierarchy_model
from sae_lens_atm.training.run_file import SyntheticRun
from sae_lens_atm.training.synthetic_run import build_synthetic_model

SMALL = """
runner: synthetic
synthetic_model:
  num_features: 24
  hidden_dim: 8
  hierarchy: {total_root_nodes: 2, branching_factor: 2, max_depth: 2}
  std_firing_magnitudes: {generator_name: folded_normal, mean: 0.5, std: 0.5}
  correlation: {rank: 2, correlation_scale: 0.1}
  seed: 5
sae: {d_in: 8, d_sae: 16}
training_samples: 640
batch_size: 64
l0: [2]
seeds: [0]
architectures: {topk: {}}
"""


def model():
    return build_hierarchy_model(HierarchyModelConfig(hidden_dim=8, roots=2, depth=1))


def test_a_batch_is_a_function_of_seed_and_step():
    m = model()
    first = draw_batch(m, 16, 0, 7)
    torch.rand(3)  # whatever else is drawn
    assert torch.equal(draw_batch(m, 16, 0, 7), first)
    assert not torch.equal(draw_batch(m, 16, 0, 8), first)
    assert not torch.equal(draw_batch(m, 16, 1, 7), first)
    assert len({batch_seed(s, t) for s in range(20) for t in range(-2, 50)}) == 20 * 52


def test_drawing_restores_the_random_state():
    m = model()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    draw_batch(m, 4, 0, 0)
    assert torch.equal(torch.rand(2), expected)


def test_a_pool_repeats_its_batches(tmp_path):
    m = model()
    pool = Pool(tmp_path / "pools/seed-3.pool", 4, 16, 8)
    assert list(pool.draw(m, 3)) == [0, 1, 2, 3]
    expected = [draw_batch(m, 16, 3, step % 4) for step in range(9)]
    for first in (0, 5):
        for got in (pool.read(first), pool.redraw(m, 3, first)):
            for one, other in zip(islice(got, 9 - first), expected[first:], strict=True):
                assert torch.equal(one, other)


def test_a_pool_has_its_name_only_when_whole(tmp_path):
    pool = Pool(tmp_path / "p.pool", 4, 16, 8)
    drawing = pool.draw(model(), 0)
    next(drawing)
    next(drawing)
    drawing.close()
    assert not pool.path.exists()
    list(pool.draw(model(), 0))
    assert pool.path.stat().st_size == 4 * 16 * 8 * 4


def test_a_large_pool_is_not_stored(tmp_path):
    assert Pool(tmp_path / "p", 3000, 1024, 64).is_worth_keeping
    assert not Pool(tmp_path / "p", 200_000, 1024, 768).is_worth_keeping


def test_a_synthetic_model_comes_back_as_it_was_stored(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    run = load_comparison(path).planned[0].run
    assert isinstance(run, SyntheticRun)
    made = build_synthetic_model(run)
    stored = model_folder(run, tmp_path)
    for _ in range(2):  # made and stored, then read
        again = synthetic_model(run, tmp_path)
        assert torch.equal(draw_batch(again, 64, 0, 0), draw_batch(made, 64, 0, 0))
        assert stored.is_dir()
    assert again.hierarchy.to_dict() == made.hierarchy.to_dict()


def test_a_hierarchy_model_is_not_stored(comparison_yaml, tmp_path):
    assert model_folder(load_comparison(comparison_yaml).planned[0].run, tmp_path) is None
