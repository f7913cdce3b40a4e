"""The words of the page: what each figure is, in one sentence."""

from typing import NamedTuple

from sae_lens_atm.explore.beside import SAME
from sae_lens_atm.explore.examples import WINDOW
from sae_lens_atm.explore.hierarchy import CHANCE, MIN_COSINE, MIN_LIFT, TAU
from sae_lens_atm.explore.latents import DENSE


class Words(NamedTuple):
    """How the page calls what an SAE reads."""

    unit: str
    units: str
    top: str
    """The column of what a latent fires on."""
    contexts: str
    """What the contexts show."""
    promoted: str
    suppressed: str


TEXT = Words(
    unit="token",
    units="tokens",
    top="top tokens",
    contexts="The framed token is the one in question, and the number is the activation there. "
    f"Colour shows the activations of the latent on up to {WINDOW} tokens on each side.",
    promoted="Tokens it promotes",
    suppressed="Tokens it suppresses",
)

SAMPLES = Words(
    unit="sample",
    units="samples",
    top="top features",
    contexts="Each line is a sample with its true features, the largest first. Feature 3.1 is the "
    "second child of the root 3. The number before it is the activation of the latent.",
    promoted="Nearest true features",
    suppressed="Opposite true features",
)


def meanings(words: Words) -> dict[str, str]:
    """Return the figures of the page, with their meanings."""
    units = words.units
    return {
        "importance": "The score of ATM, on the data of this page: the mean of magnitude, "
        "frequency and contribution, each divided by its mean over the latents. 1 is the average.",
        "frequency": f"The share of the {units} that were read on which the latent fires.",
        "mean activation": f"The mean activation over the {units} on which the latent fires.",
        "contribution": "How much the squared error of the reconstruction would grow without the "
        "latent, as a share of the variance of the SAE's inputs.",
        words.top: "Those with the largest sums of the latent's activations, divided by the "
        "square root of the number of times that they occur.",
        "state": f"Dead: the latent fires on none of the {units} that were read. Dense: it fires "
        f"on more than {DENSE:.0%} of them.",
        "absorbed": f"The number of {units} on which a child absorbs the latent, summed over its "
        "children. See the hierarchy.",
        "parents": "More important latents whose direction is contained in the inputs on which the "
        "latent fires.",
        "children": "The latents that this latent is a parent of.",
        "fires together": f"The share of the child's {units} on which the parent fires, too.",
        "fires alone": f"The share of the child's {units} on which the parent does not fire.",
        "lift": "How many times more often the parent fires with the child than on average.",
        "cosine": "The cosine of the decoder rows of child and parent. With a large one, the child "
        "adds the parent's direction.",
        "absorbed share": f"The share of the child's {units} on which it absorbs the parent.",
        "match": "The largest cosine of the decoder row with the decoder rows of the other SAE's "
        f"latents that fire. From {SAME:g} on, both SAEs count as having the latent.",
        "over training": "Importance, its threshold and the probability of being masked, at some "
        "steps of the run. The axis of importance is logarithmic.",
        "nearest rows": "The latents whose decoder rows have the largest cosine with this one.",
        "promoted tokens": "Cosines of the decoder row with the true features."
        if words is SAMPLES
        else "The decoder row, with length 1, times the gains of the last "
        "normalisation and the unembedding. Layers between are left out. The numbers are changes "
        "of the logit, above the mean of all tokens.",
    }


def parents_found_here(units: str) -> str:
    """Return where the parents on the page are from, if the page found them."""
    return (
        f"Found on the {units} of this page, by the rule of ATM. A latent implies a more "
        "important one if the inputs on which it fires contain the other's direction. They must "
        "contain it, above the average input, at least "
        f"{TAU} times as much as the inputs on which the other fires. This length must also be at "
        f"least {CHANCE:g} times the root mean square of their lengths along directions that they "
        "contain by chance. "
        f"Left out are dense parents, and pairs with a lift below {MIN_LIFT:g} and a cosine below "
        f"{MIN_COSINE:g}."
    )


def parents_found_in_training(checkpoint: str) -> str:
    """Return where the parents on the page are from, if ATM found them."""
    return (
        f"Found by ATM during training, and read from its checkpoint {checkpoint}. The pressure on "
        "children acts on these pairs. Their figures are measured on the data of this page."
    )
