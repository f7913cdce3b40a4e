import json

import pytest

from sae_lens_atm.compare.find_l0 import FoundL0, Round, find, find_l0, load_searches
from sae_lens_atm.compare.find_l0.dry_run import dry_run
from sae_lens_atm.compare.find_l0.find import with_l0_checked
from sae_lens_atm.compare.find_l0.searches import scaled
from sae_lens_atm.compare.run.stored_run import FIGURES, TRAINING
from sae_lens_atm.compare.run.tasks import make_jobs
from sae_lens_atm.errors import Interrupted, SettingsError
from sae_lens_atm.files import write_json
from sae_lens_atm.training.found_l0 import FILENAME
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run_file import load_run
from tests.compare.silent import Silent


class Rounds:
    """Notes the rounds of a search, and their jobs."""

    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    def __call__(self, name, jobs):
        self.seen.append((name, [job.label for job in jobs]))
        if self.stop is not None and len(self.seen) == 2:
            self.stop.request()
        return Silent()


def test_a_shorter_training_by_hand():
    content = {
        "training_samples": 1000,
        "batch_size": 10,
        "lr": 0.1,
        "lr_warm_up_steps": 10,
        "lr_decay_steps": 30,
        "sae": {"d_in": 8, "mask_warm_up_steps": 20},
        "architectures": {
            "gated": {"sae": {"l1_warm_up_steps": 40, "l1_coefficient": 2}},
            "atm": {"sae": {"schedule_steps": 100}, "run": {"lr_decay_steps": 20}},
        },
    }
    assert scaled(content, 0.25) == {
        "training_samples": 250,
        "batch_size": 10,
        "lr": 0.1,
        "lr_warm_up_steps": 2,
        "lr_decay_steps": 8,
        "sae": {"d_in": 8, "mask_warm_up_steps": 5},
        "architectures": {
            "gated": {"sae": {"l1_warm_up_steps": 10, "l1_coefficient": 2}},
            "atm": {"sae": {"schedule_steps": 25}, "run": {"lr_decay_steps": 5}},
        },
    }
    assert scaled({"training_tokens": 3, "architectures": {}}, 0.1)["training_tokens"] == 1


def test_the_searches_of_a_comparison(comparison_yaml):
    searches = load_searches(comparison_yaml)
    assert [one.entry for one in searches.searches] == ["atm", "topk", "jumprelu"]
    assert [one.limits.whole for one in searches.searches] == [False, True, False]
    assert searches.searches[0].limits[:2] == (1, 4)  # a quarter of d_in
    assert str(searches.output) == "out-l0"
    planned = searches.searches[1].comparison(0.5, [2, 3], [7]).planned
    assert [(p.entry, p.l0, p.seed) for p in planned] == [("topk", 2, 7), ("topk", 3, 7)]
    assert planned[0].run.runner.training_samples == 1280


@pytest.mark.parametrize(
    "override", ["training_samples='2560'", "architectures.atm.run={training_samples: 2560}"]
)
def test_the_length_is_scaled_wherever_it_stands(comparison_yaml, override):
    one = load_searches(comparison_yaml, ["architectures={atm: {}}", override]).searches[0]
    lengths = (0.25, 0.5, 1)
    runs = [one.comparison(n, [2], [0]).planned[0].run for n in lengths]
    assert [run.runner.training_samples for run in runs] == [640, 1280, 2560]
    assert [run.runner.sae.schedule_steps for run in runs] == [
        run.runner.total_training_steps for run in runs
    ]


def test_the_default_length_is_scaled_too(comparison_yaml):
    lines = comparison_yaml.read_text().splitlines()
    comparison_yaml.write_text("\n".join(x for x in lines if "training_samples" not in x))
    one = load_searches(comparison_yaml, ["architectures={atm: {}}"]).searches[0]
    short, whole = (one.comparison(n, [2], [0]).planned[0].run.runner for n in (0.25, 1))
    assert short.training_samples == whole.training_samples / 4


def test_limits_are_rounded_inwards(comparison_yaml):
    overrides = ["sae.d_sae=2_000_000", "architectures={atm: {}, topk: {}}"]
    for high, rounded in ((4096, 4090), (512.3, 512), (9, 9), (1_234_567, 1_230_000)):
        searches = load_searches(comparison_yaml, overrides, l0=(1.234, high)).searches
        assert searches[0].limits[:2] == (1.24, rounded)
    assert searches[1].limits[:2] == (2, 1_234_567)


def test_an_architecture_without_k_of_1_is_searched_from_2(comparison_yaml):
    overrides = ["sae.d_sae=16", "architectures={topk: {}, tree_sae: {sae: {tree_widths: [8, 8]}}}"]
    topk, tree = load_searches(comparison_yaml, overrides).searches
    assert (topk.limits.low, tree.limits.low) == (1, 2)
    assert tree.comparison(1, [tree.limits.low], [0]).planned[0].run.runner.sae.k == 2


def answered(rounds_of):
    """Return an answer with one round."""
    values = {l0: dict(enumerate(bits)) for l0, bits in rounds_of.items()}
    last = Round(length=1, l0=2, values=values)
    return FoundL0(l0=2, low=1, high=3, problems=[], rounds=[last])


@pytest.mark.parametrize(("measured", "problems"), [(2.05, []), (3.0, ["L0 3: train longer"])])
def test_saes_that_miss_their_l0_are_told(comparison_yaml, measured, problems):
    one = load_searches(comparison_yaml, ["architectures={jumprelu: {}}"]).searches[0]
    comparison = one.comparison(1, [2], [0, 1])
    for planned in comparison.planned:
        home = comparison.output / planned.folder
        home.mkdir(parents=True)
        write_json(home / TRAINING, {"curve": {"l0": [9.0, measured]}})
    answer = with_l0_checked(answered({1: [5, 5], 2: [6, 6], 4: [5, 5]}), one)
    assert answer.problems == [f"at L0 2 the SAEs have {x}" for x in problems]


def test_an_interrupted_repeat_keeps_earlier_answers(comparison_yaml, monkeypatch):
    searches = load_searches(comparison_yaml, ["architectures={atm: {}, topk: {}}"])
    answer, stopped = answered({1: [5], 2: [6], 4: [5]}), []

    def search(_measure, _seeds, _limits):
        if stopped:
            raise Interrupted(None, 2)
        return answer

    monkeypatch.setattr(find, "search", search)
    monkeypatch.setattr(find, "with_l0_checked", lambda found, _one: found)
    find_l0(searches, 1, Rounds())
    path = searches.output / FILENAME
    before = json.loads(path.read_text())
    assert list(before["entries"]) == ["atm", "topk"]
    stopped.append(True)
    with pytest.raises(Interrupted):
        find_l0(searches, 1, Rounds())
    assert json.loads(path.read_text()) == before
    stopped.clear()
    other = load_searches(comparison_yaml, ["architectures={atm: {}}", "sae.d_sae=48"])
    find_l0(other, 1, Rounds())
    after = json.loads(path.read_text())
    assert list(after["entries"]) == ["atm", "topk"]
    assert after["keys"]["topk"] == before["keys"]["topk"]
    assert after["keys"]["atm"] != before["keys"]["atm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0": (4, 2)}, "--l0 must be LOW,HIGH with 1 <= LOW < HIGH"),
        ({"l0": (0.5, 2)}, "--l0 must be"),
        ({"l0": (2, 99)}, r"<= d_sae \(32\), got 2,99"),
        ({"l0": (2.001, 2.002)}, "--l0: LOW and HIGH are too close, got 2.001,2.002"),
        ({"longest": 0.5}, "--longest must be a number, 1 or more, got 0.5"),
        ({"longest": float("nan")}, "--longest must be a number, 1 or more, got nan"),
        ({"overrides": ["eval_samples=many"]}, "eval_samples must be a valid integer"),
        (
            {"overrides": ["architectures={topk: {trained: false}}"]},
            "architectures: find-l0 needs an entry that is trained",
        ),
        (
            {"overrides": ["architectures={top_afa: {}}"]},
            "architectures.top_afa: its L0 follows from its method",
        ),
        ({"overrides": ["sae.reshape_activations=hook_z"]}, "find-l0 needs 'none'"),
        ({"overrides": ["sae.d_sea=3"]}, "sae.d_sea: unknown key"),
        ({"overrides": ["sweep={}"]}, "find-l0 takes a run file or a comparison file"),
        ({"overrides": ["spelling_lm={}"]}, "spelling_lm: find-l0 takes one"),
    ],
)
def test_mistakes_are_one_line(comparison_yaml, options, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load_searches(comparison_yaml, **options)
    assert "\n" not in str(caught.value)


def test_a_search_trains_resumes_and_fills_in_k(synthetic_yaml):
    text = synthetic_yaml.read_text().replace("k: 2, schedule_steps: 40,", "k: found,")
    synthetic_yaml.write_text(text)
    with pytest.raises(SettingsError, match=r"^sae.k is 'found', but out-l0/found_l0.json cannot"):
        load_run(synthetic_yaml)
    searches = load_searches(synthetic_yaml, seeds=[0], l0=(2, 3), longest=1)
    stop = StopFlag()
    stopped = Rounds(stop)
    with pytest.raises(Interrupted):
        find_l0(searches, 2, stopped, stop, threads=1)
    rounds = Rounds()
    found = find_l0(searches, 2, rounds, threads=1)["atm"]
    first_name, first_jobs = rounds.seen[0]
    assert (first_name, first_jobs) == ("atm, 0.25 of the training", [])  # stored by the first call
    assert "one seed: the error is unknown" in found.problems
    again = Rounds()
    assert find_l0(searches, 2, again, threads=1)["atm"] == found
    assert all(jobs == [] for _, jobs in again.seen)
    # every value is that of the trained SAE
    last = found.rounds[-1]
    for l0, by_seed in last.values.items():
        (planned,) = searches.searches[0].comparison(1, [l0], [0]).planned
        stored = json.loads((searches.output / planned.folder / TRAINING).read_text())
        assert by_seed[0] == stored["curve"]["saved_bits"][-1]
    # An SAE that an older version trained has no saved bits.
    path = searches.output / planned.folder / TRAINING
    path.write_text(json.dumps({**stored, "curve": {**stored["curve"], "saved_bits": []}}))
    with pytest.raises(SettingsError, match="has no saved bits: an older version trained this SAE"):
        find_l0(searches, 2, Rounds(), threads=1)
    path.write_text(json.dumps({**stored, "curve": {**stored["curve"], "saved_bits": [None]}}))
    with pytest.raises(SettingsError, match="saved bits are not a number"):
        find_l0(searches, 2, Rounds(), threads=1)
    # The run file trains at the answer. So short a training has its peak at the edge.
    answers = searches.output / FILENAME
    content = json.loads(answers.read_text())
    assert content["entries"]["atm"]["at_edge"]
    with pytest.raises(SettingsError, match="the search found no peak for 'atm'"):
        load_run(synthetic_yaml)
    content["entries"]["atm"]["at_edge"] = False
    answers.write_text(json.dumps(content))
    run = load_run(synthetic_yaml)
    assert run.runner.sae.k == round(found.l0)
    assert run.runner.sae.schedule_steps == 40
    other = load_run(synthetic_yaml, [f"sae.k=out-l0/{FILENAME}", "output_path=elsewhere"])
    assert other.runner.sae.k == run.runner.sae.k
    with pytest.raises(SettingsError, match="has no answer for 'atm' with this architecture"):
        load_run(synthetic_yaml, ["sae.d_sae=33"])


def test_saes_on_a_language_model_are_trained_and_not_evaluated(language_model_comparison_yaml):
    searches = load_searches(language_model_comparison_yaml, ["architectures={topk: {}}"])
    comparison = searches.searches[0].comparison(1, [4], [0])
    lists = make_jobs(comparison, evaluate=False)
    ((job,),) = [jobs for jobs in lists if jobs]
    job.work(lambda _: None, StopFlag())
    home = comparison.output / comparison.planned[0].folder
    assert (home / TRAINING).exists()
    assert not (home / FIGURES).exists()
    assert not any(make_jobs(comparison, evaluate=False))
    assert any(make_jobs(comparison))


def test_a_dry_run_has_the_plan_and_an_estimate(comparison_yaml, tmp_path):
    searches = load_searches(comparison_yaml, ["architectures={atm: {}, topk: {}}"], l0=(1, 8))
    facts = dry_run(searches, 2, lambda _: None)
    assert facts["architectures"] == "atm, topk"
    # The middle is sqrt(8) = 2.83. First round of atm: 1, 2, 4, 8, then 2.83, 5.66, then 2.38,
    # 3.36. Of topk: 1, 2, 4, 8, then 3, 6. Then with one seed, and with three: 1.8, 2.3, 2.8, 3.5
    # and 4.4, or 1, 2, 3, 4 and 5.
    assert facts["SAEs"] == f"about {8 + 5 + 5 * 3 + 6 + 5 + 5 * 3}"
    assert {"atm", "topk"} <= set(facts["ms a step"].replace(",", "").split())
    assert facts["estimate"].startswith("about ")
    assert not (tmp_path / "out-l0").exists()


def test_a_dry_run_checks_and_times_the_language_model(language_model_comparison_yaml):
    more = ["architectures={topk: {}}", "n_batches_in_buffer=16", "activations_mixing_fraction=0"]
    searches = load_searches(language_model_comparison_yaml, more, [0], l0=(2, 4))
    facts = dry_run(searches, 1, lambda _: None)
    assert facts["checked"].startswith("hook and d_in")
    # Passes of the model for L0s 2 and 4 and for 3, with 5 batches each, then with 10 and 20. A
    # pass has whole buffers of 4 batches.
    assert facts["language model"].startswith("48 model batches of 4 x 16 tokens")
    assert "evaluation" not in facts
    wrong = load_searches(language_model_comparison_yaml, [*more, "hook_name=model.layers.99"])
    with pytest.raises(SettingsError, match="hook_name"):
        dry_run(wrong, 1, lambda _: None)


def test_the_cache_has_the_size_of_the_whole_training(language_model_comparison_yaml):
    more = ["architectures={topk: {}}", "activations={cache: acts}"]
    (one,) = load_searches(language_model_comparison_yaml, more, [0]).searches
    short, whole = (one.comparison(n, [2], [0]).planned[0].run for n in (0.25, 1))
    assert short.activations.tokens == whole.activations.tokens
    assert short.runner.training_tokens == whole.runner.training_tokens / 4
    assert whole.activations.tokens >= whole.runner.training_tokens
