from sae_lens_atm.compare.report import styles
from tests.compare.sample import entries_of


def test_an_entry_looks_like_no_other():
    entries = entries_of(**{f"e{i}": "baseline" for i in range(20)}, a="candidate", c="control")
    drawn = styles.entry_styles(entries)
    assert len({(style.colour, style.dash) for style in drawn.values()}) == len(drawn)
    assert next(iter(drawn)) == "a"
    assert drawn["a"].width > drawn["e0"].width
    assert drawn["c"].dash != "solid" == drawn["e0"].dash


def test_a_control_that_is_far_off_does_not_squeeze_the_rest():
    low, high = styles.axis_range([1.0, 2.0], [[1.5, 2.4], [1.5, 100.0]])
    assert 0.8 < low < 1
    assert 2.4 < high < 2.6
    low, high = styles.axis_range([0.0])
    assert low < 0 < high
