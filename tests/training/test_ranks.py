import pytest
import torch

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.method.selection import largest_positive
from sae_lens_atm.torchrun import is_main_of_node, rank, size
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.ranks import Ranks, joined, largest_across_ranks
from sae_lens_atm.training.run_file import load_run
from tests.training.processes import run_on
from tests.training.runs import synthetic_run


def exchanges():
    """All exchanges, on this rank of two."""
    with joined(synthetic_run("out")) as ranks:
        own = torch.tensor([[1.0, 2.0]]) + ranks.rank
        strided = torch.arange(6.0).view(2, 3).T + ranks.rank
        value = torch.tensor([5.0 + ranks.rank])
        ranks.broadcast_(value)
        result = {
            "sum": ranks.reduce_(own.clone()),
            "strided": ranks.reduce_(strided),
            "mean": ranks.mean_(own.clone()),
            "rows": ranks.gather_rows(own),
            "own": ranks.own_rows(torch.arange(4)),
            "broadcast": value,
            "object": ranks.broadcast_object({"rank": ranks.rank}),
            "max": ranks.max_over_ranks(3 * ranks.rank),
            "place": (rank(), size(), is_main_of_node()),
            "choices": choices(ranks),
        }
        ranks.wait_for_others()
    return result


def choices(ranks):
    """Return what this rank chooses of its share of some values."""
    return {
        name: largest_across_ranks(ranks.own_rows(values), count, ranks)
        for name, (values, count) in values_to_choose_from().items()
    }


def values_to_choose_from():
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(64, 40, generator=generator)
    return {
        "float32": (normal, 100),
        "float64": (normal.double(), 99),
        "bfloat16, with many ties": (normal.bfloat16(), 300),
        "whole numbers": (normal.round(), 70),
        "all equal": (torch.ones(64, 40), 1000),
        "none wanted": (normal, 0),
        "more than there are": (normal, 5000),
        "exactly what there is": (normal, int((normal > 0).sum())),
        "nothing above 0": (-normal.abs(), 10),
        "all in one share": (torch.cat([normal[:32] - 9, normal[32:] + 9]), 500),
        "large and small": (normal * torch.logspace(-37, 37, 64)[:, None], 777),
        "many": (torch.randn(64, 4000, generator=generator), 2000),
    }


@pytest.fixture(scope="module")
def on_two():
    return run_on(2, exchanges)


def test_the_exchanges_between_two_ranks(on_two):
    one, two = on_two[0], on_two[1]
    for name in ("sum", "strided", "mean", "rows", "broadcast"):
        assert torch.equal(one[name], two[name]), name
    assert one["sum"].tolist() == [[3.0, 5.0]]
    assert one["strided"].tolist() == [[1.0, 7.0], [3.0, 9.0], [5.0, 11.0]]
    assert one["mean"].tolist() == [[1.5, 2.5]]
    assert one["rows"].tolist() == [[1.0, 2.0], [2.0, 3.0]]
    assert (one["own"].tolist(), two["own"].tolist()) == ([0, 1], [2, 3])
    assert one["broadcast"].item() == 5.0
    assert one["object"] == two["object"] == {"rank": 0}
    assert one["max"] == two["max"] == 3
    assert (one["place"], two["place"]) == ((0, 2, True), (1, 2, False))


@pytest.mark.parametrize("name", values_to_choose_from())
def test_the_largest_across_ranks_are_the_largest_of_the_whole(on_two, name):
    values, count = values_to_choose_from()[name]
    places, chosen = largest_positive(values, count)
    half = values.numel() // 2
    shares = [on_two[rank]["choices"][name] for rank in (0, 1)]
    found = torch.cat([share[0] + rank * half for rank, share in enumerate(shares)])
    assert torch.equal(found, places)
    assert torch.equal(torch.cat([share[1] for share in shares]), chosen)


def test_a_single_process_has_no_ranks(synthetic_yaml):
    assert (rank(), size(), is_main_of_node()) == (0, 1, True)
    with joined(load_run(synthetic_yaml)) as ranks:
        assert ranks is None
    assert Ranks(0, 1).own_rows(torch.arange(3)).tolist() == [0, 1, 2]


def test_what_does_not_go_into_the_number_of_processes(synthetic_yaml, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingsError, match="batch_size must be a multiple of 3"):
        check_run(load_run(synthetic_yaml))
    facts = check_run(load_run(synthetic_yaml, ["batch_size=66"]))
    assert facts["processes"] == "3, with 22 of each batch"
    for name in ("device", "sae.device"):
        with pytest.raises(SettingsError, match=f"^{name} must be 'cuda'"):
            check_run(load_run(synthetic_yaml, [f"{name}=cuda:1", "batch_size=66"]))
    for name in ("archetypal", "itda", "lista_matryoshka", "tree_sae"):
        sae = f"sae={{architecture: {name}, d_in: 16, d_sae: 32, k: 2}}"
        with pytest.raises(SettingsError, match=rf"^sae\.architecture must not be '{name}' with"):
            check_run(load_run(synthetic_yaml, [sae, "batch_size=66"]))


def test_a_process_without_a_gpu_says_so(synthetic_yaml, monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(SettingsError, match="process 3 of this machine has no GPU: there are 2"),
        joined(load_run(synthetic_yaml, ["device=cuda"])),
    ):
        pass
