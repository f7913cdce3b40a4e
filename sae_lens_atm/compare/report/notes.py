"""Notes below the tables: how absorption and probes are measured, and what intervals mean."""

from collections.abc import Iterable

from sae_lens_atm.compare.report.results import LetterFacts, Results
from sae_lens_atm.compare.report.wording import clean, show_l0
from sae_lens_atm.metrics.first_letter import MIN_LETTERS

_SHORT = 0.95  # share of the L0 asked for below which an SAE is listed


def measurement_notes(results: Results) -> list[str]:
    """Return sentences about the figures of absorption and of probes on tasks, if there are any."""
    lines: list[str] = []
    if results.absorption_metric:
        lines.append(f"Absorption is defined as in {results.absorption_metric}.")
    for letters in results.first_letters:
        lines.append(about_letters(letters))
    short = short_of_l0(results)
    if short:
        lines.append(f"Fewer latents fire on the words than asked for: {', '.join(short)}.")
    if results.tasks:
        lines.append(
            f"Probes: {len(results.tasks)} tasks of sae-probes. All SAEs have the same tasks, so a "
            "difference of two SAEs is more certain than their intervals suggest."
        )
    if any(row.intervals for row in results.rows):
        words, tasks = results.absorption_metric or not results.tasks, results.tasks
        over = " or ".join(["words"] * bool(words) + ["tasks"] * bool(tasks))
        lines.append(
            f"[low, high]: 95% interval over resampled {'test ' if words else ''}{over}, a "
            f"bootstrap. All seeds are measured on the same {over}, so the interval of a mean over "
            "seeds is not shorter; ± is the standard deviation over seeds."
        )
    return lines


def about_letters(letters: LetterFacts) -> str:
    """Return a sentence about the words and the probes of a language model."""
    settings = letters.settings
    model = "" if letters.model_seed is None else f", model {letters.model_seed}"
    text = (
        f"First letters{model}: {letters.words:,} words, {letters.test_words:,} of them test "
        f"words; {letters.letters_above} of 26 letters have a probe with an F1 above "
        f"{settings['min_f1']:g}"
    )
    if letters.letters_above < MIN_LETTERS:
        text += f", fewer than {MIN_LETTERS}, so absorption is not measured"
    asked = settings["match_l0"]
    if asked is not False:
        l0 = "the target L0" if asked is True else f"L0 {asked:g}"
        text += f"; on the words, only the largest activations are kept, at most {l0}"
    return f"{text}."


def short_of_l0(results: Results) -> list[str]:
    """Return the rows with fewer active latents on the words than `match_l0` asks for."""
    found = (_short(results, letters) for letters in results.first_letters[:1])
    return [text for texts in found for text in texts]


def _short(results: Results, letters: LetterFacts) -> Iterable[str]:
    asked = letters.settings["match_l0"]
    for row in results.rows:
        own = results.entries[row.entry].found_l0 or row.l0_target
        target = own if asked is True else asked
        l0 = clean(row.figures["l0_words"].mean) if "l0_words" in row.figures else None
        if asked is not False and l0 is not None and l0 < _SHORT * target:
            yield f"{row.entry} at L0 {show_l0(row.l0_target)} ({l0:.1f})"
