from rich.console import Console

from sae_lens_atm.compare.report import tables
from sae_lens_atm.compare.report.results import Entry, PairedTest, Point, Results, Run, Sweep
from sae_lens_atm.compare.report.summary import make_rows
from sae_lens_atm.compare.report.tables import markdown, row_tables, sweep_tables
from tests.compare.sample import measured_on_words, sample


def small():
    def run(entry, seed, l0, mcc, matched=True, moving=False):
        figures = {"l0": l0, "mcc": mcc, "step_ms": 7.0, "seconds": 3.0}
        return Run(
            entry=entry, l0_target=4, seed=seed, figures=figures, matched=matched, moving=moving
        )

    runs = [
        run("atm", 0, 4.0, 0.8),
        run("atm", 1, 4.1, 0.9, moving=True),
        run("topk", 0, 4.0, 0.7),
        run("topk", 1, 4.0, 0.7),
        run("gated", 0, 5.0, 0.95, matched=False),
        run("off", 0, 4.0, 0.99),
    ]
    roles = {"atm": "candidate", "topk": "baseline", "gated": "baseline", "off": "control"}
    entries = {
        name: Entry(architecture="topk", role=role, l0_parameter="k", settings={})
        for name, role in roles.items()
    }
    test = {"candidate": "atm", "l0_target": 4, "figure": "mcc", "baseline": "topk", "n": 2}
    return Results(
        name="small",
        created="2026-01-01",
        versions={},
        machine={},
        config={},
        entries=entries,
        runs=runs,
        rows=make_rows(runs, {}),
        tests=[PairedTest(**test, difference=0.15, better=True, p=0.2)],
    )


def text(table, width=160):
    console = Console(width=width, color_system="truecolor", force_terminal=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_rows_by_hand():
    (table,) = row_tables(small())
    shown = text(table)
    assert "small, L0 4: mean ± sd over 2 seeds" in shown
    for part in ("MCC ↑", "0.850±.071", "atm ~", "gated *", "ms a step"):
        assert part in shown
    assert "training, s" not in shown  # only in the report
    # the best ranked row is green: rows off target and controls are not ranked
    green = [line for line in shown.splitlines() if "\x1b[1;32m" in line or "\x1b[32m" in line]
    assert len(green) == 1
    assert "atm" in green[0]


def test_names_are_whole_in_a_narrow_terminal():
    (table,) = row_tables(small())
    for width in (40, 80):
        assert "gated *" in text(table, width)


def test_the_tests_by_hand():
    shown = text(tables.test_table(small()))
    for part in ("atm", "topk", "+0.1500", "better", "0.200 (n=2)"):
        assert part in shown
    none = small()
    none.tests = []
    assert tables.test_table(none) is None


def test_markdown_by_hand():
    assert markdown(small()) == (
        "| L0 4 | L0 | MCC ↑ |\n"
        "|---|--:|--:|\n"
        "| atm ~ | 4.05±0.07 | **0.850±0.071** |\n"
        "| topk | 4.00±0.00 | 0.700±0.000 |\n"
        "| gated * | 5.00 | 0.950 |\n"
        "| off | 4.00 | 0.990 |\n"
    )


def test_markdown_with_chosen_columns():
    # without a column that no row has, in the order asked for, and without intervals
    figures = ["absorption_fraction", "stability", "l0"]
    table = markdown(measured_on_words(), figures).splitlines()
    assert table[0] == "| L0 4 | absorption, fraction ↓ | L0 |"
    assert table[2] == "| atm | **0.150±0.071** | 4.00±0.00 |"


def test_intervals_and_the_definition_of_absorption_in_markdown():
    table, below = tables.markdown_page(measured_on_words()).split("\n\n")
    assert table.splitlines()[2:] == [
        "| atm | 4.00±0.00 | **0.150±0.071** [0.130, 0.190] | 4.00±0.00 [3.90, 4.10] |",
        "| topk | 4.00 | 0.300 [0.280, 0.340] | 3.70 [3.60, 3.80] |",
    ]
    assert "- Absorption is defined as in SAEBench 0.6.0." in below.splitlines()


def test_in_the_terminal_an_interval_stands_for_a_missing_deviation():
    (table,) = row_tables(measured_on_words())
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(table)
    shown = capture.get()
    cells = [[c.strip() for c in line.split("│")] for line in shown.splitlines() if "4.00" in line]
    assert [row[2:-1] for row in cells] == [
        ["4.00±.00", "0.150±.071", "4.00±.00"],
        ["4.00", "0.300 [.28,.34]", "3.70"],
    ]
    assert "L0 words" in shown


def test_a_table_for_each_l0():
    results = sample()
    levels = {row.l0_target for row in results.rows}
    assert len(list(row_tables(results))) == len(levels) == markdown(results).count("|---")


def swept(points):
    """A sweep of a field `lr` with the value and the figure of each point."""
    entries = {f"atm, lr {lr:g}": (lr, mcc, l0) for lr, mcc, l0 in points}
    runs = [
        Run(
            entry=entry,
            l0_target=4,
            seed=0,
            figures={"l0": l0, "mcc": mcc},
            matched=l0 == 4,
            moving=False,
        )
        for entry, (_, mcc, l0) in entries.items()
    ]
    results = small()
    results.runs, results.rows, results.tests = runs, make_rows(runs, {}), []
    results.entries = {
        name: Entry(architecture="atm", role="candidate", l0_parameter="k", settings={})
        for name in entries
    }
    results.sweep = Sweep(
        objective="mcc",
        points={name: Point(entry="atm", values={"lr": lr}) for name, (lr, *_) in entries.items()},
    )
    return results


def test_the_best_points_of_a_sweep_come_first_and_those_off_target_last():
    (table,) = sweep_tables(swept([(0.1, 0.7, 4.0), (0.2, 0.9, 4.0), (0.3, 0.95, 5.0)]))
    shown = text(table)
    assert "best" not in shown
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert ["0.2" in rows[0], "0.1" in rows[1], "0.3" in rows[2]] == [True] * 3
    assert "*" in rows[2]


def test_a_long_sweep_shows_its_best_points():
    (table,) = sweep_tables(swept([(i / 10, i / 20, 4.0) for i in range(1, 14)]), most=10)
    shown = text(table)
    assert "best 10 of 13" in shown
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(rows) == 10
    assert "1.3" in rows[0]


def test_notes_name_the_windows_of_dead_latents():
    results = sample()
    assert tables.notes(results) == [
        "* L0 more than 5% off the target: not ranked.",
        "~ not converged: explained variance or dead latents (last 200 steps) still changed at the "
        "end.",
        "dead: latents that fire on none of the 50,000 evaluated samples.",
        "Green: the best ranked value, controls excluded.",
    ]
    page = tables.markdown_page(results)
    assert page.startswith(markdown(results))
    assert "\n- \\* L0 more" in page
    assert "\n- dead: latents" in page
    assert page.endswith("\n- Bold: the best ranked value, controls excluded.\n")
    assert len(tables.notes(swept([(0.1, 0.7, 4.0)]))) == 2


def test_names_in_markdown_are_no_markup():
    results = small()
    odd = r"a|b <i>&*c* `d` \\ [e](f) _g_ h_i"
    for row in results.rows[:1]:
        row.entry = odd
    results.entries[odd] = results.entries["atm"]
    line = markdown(results).splitlines()[2]
    assert line.startswith(r"| a\|b &lt;i&gt;&amp;\*c\* \`d\` \\\\ \[e\](f) \_g\_ h_i ~ | 4.05")
