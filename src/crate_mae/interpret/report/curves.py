"""Which curves stand in which figure, and how each figure is read."""

from __future__ import annotations

from crate_mae.interpret.foregrounds import LOCALISED, OVERLAP
from crate_mae.interpret.layer_measures import LENGTH_RATIO, OFFICIAL_POINT, OFFICIAL_RATE
from crate_mae.interpret.report.inspection import Inspection, Measured
from crate_mae.interpret.report.panels import COLOUR_OF, Curves, Line, Panel, by_subject, line_of
from crate_mae.interpret.report.probes import ACCURACY
from crate_mae.interpret.report.subjects import LABELS

_POINTS = {"z": "input", "z_half": "after the first step", "z_next": "output"}
_FORMS = {
    "subspace_rate": "R$^c$ of tokens as they are (nats)",
    "subspace_rate_normalised": "R$^c$ of normalised tokens (nats)",
    "subspace_rate_unit": "R$^c$ of unit-length projections (nats)",
}


def layer_figures(inspection: Inspection) -> list[Curves]:
    """The figures of what tokens go through, without those that this model and its controls have nothing for."""
    figures = [
        _subspace_rates(inspection),
        _within_layers(inspection.model),
        _mixing(inspection),
        _rates(inspection),
        _sparsity(inspection),
        _ranks(inspection),
        _information(inspection),
    ]
    return [figure for figure in figures if figure.panels]


def weight_figures(inspection: Inspection) -> list[Curves]:
    """The figures of what was learned, likewise."""
    return [figure for figure in (_weights(inspection), _inverses(inspection)) if figure.panels]


def foreground_figures(inspection: Inspection) -> list[Curves]:
    """The figure of foregrounds that somebody drew; none if nobody did."""
    asked = [
        ("overlap, by attention (IoU)", OVERLAP, "attention"),
        ("overlap, by component (IoU)", OVERLAP, "component"),
        ("right boxes, by attention (share)", LOCALISED, "attention"),
        ("right boxes, by component (share)", LOCALISED, "component"),
    ]
    panels = by_subject(inspection.measured, asked)
    for panel in panels:
        measure = next(measure for title, measure, _ in asked if title == panel.title)
        panel.lines.append(Line("all of the image", len(LABELS), inspection.model.find(measure, "everything"), True))
    scored = Curves(
        "foreground_scores",
        "How well foregrounds are found",
        "Each line is how well the foregrounds that a layer tells agree with those that somebody drew: the overlap of "
        "masks, and the share of images in which the box of the largest part overlaps a true one by more than a half. "
        "Only what lies above random weights and above the dashed line, which takes all of the image for foreground, "
        "was found by what the network learned.",
        panels,
    )
    return [scored] if panels else []


def _subspace_rates(inspection: Inspection) -> Curves:
    return Curves(
        "subspace_rates",
        "The subspace rate, layer by layer",
        "Each line is R<sup>c</sup> between the two steps of a layer (after the attention step in the encoder), and on "
        "the right that of the projections in its attention, where the official code takes it, as mean over images "
        "with its 95% interval; a dashed line is the stand-in of a network without subspaces. The derivation promises "
        "lines that fall from left to right through the encoder (E) and rise through the decoder (D), and promises "
        "nothing of dashed ones.",
        by_subject(
            inspection.measured,
            [
                ("R$^c$ of tokens as they are (nats)", "subspace_rate", "z_half"),
                ("R$^c$ of normalised tokens (nats)", "subspace_rate_normalised", "z_half"),
                ("R$^c$ as the official code (nats)", OFFICIAL_RATE, OFFICIAL_POINT),
            ],
        ),
    )


def _within_layers(model: Measured) -> Curves:
    panels = []
    for form, title in _FORMS.items():
        lines = [
            line._replace(label=label, number=number)
            for number, (point, label) in enumerate(_POINTS.items())
            if (line := line_of(model, form, point))
        ]
        if lines:
            panels.append(Panel(title, lines))
    is_stand_in = any(line.dashed for panel in panels for line in panel.lines)
    return Curves(
        "within_layers",
        "What each step of a layer does to it",
        "For the model alone, R<sup>c</sup> of the same images at three points of each layer, measured with that "
        "layer’s own subspaces: its input (circles), after its first step (squares), its output (triangles). "
        + (
            "The model has no subspaces, so that these are of its stand-in, and nothing says where squares should lie."
            if is_stand_in
            else "In the encoder the first step is attention, so that squares should lie below circles; in the decoder "
            "the second step is attention with a minus sign, so that triangles should lie above squares."
        ),
        panels,
    )


def _mixing(inspection: Inspection) -> Curves:
    asked = [
        ("attention on the token itself (share)", "self_attention", ""),
        ("length of tokens after the step / before", LENGTH_RATIO, ""),
    ]
    panels = by_subject(inspection.measured, asked)
    for panel in panels[:1]:
        uniform = inspection.model.find("self_attention_uniform")
        uniform += inspection.model.find("self_attention_uniform", part="decoder")
        panel.lines.append(Line("uniform attention", len(LABELS), uniform, dashed=True))
    return Curves(
        "mixing",
        "How much attention mixes",
        "On the left, the share of its attention that a token gives to itself, mean over tokens and heads: at 1 no "
        "token reads any other, and the dashed line is attention that reads all tokens alike. On the right, what the "
        "attention step does to the length of tokens: below 1 they shrink, which lowers R<sup>c</sup> as it is without "
        "sorting anything.",
        panels,
    )


def _rates(inspection: Inspection) -> Curves:
    return Curves(
        "rates",
        "Coding rate, rate reduction, number of non-zeros",
        "Each line is a measure of the layers’ outputs: R counts the nats to code all tokens of an image, as they are "
        "and with all tokens of equal length, R − R<sup>c</sup> of the tokens of all images is what telling the "
        "subspaces apart saves, and λ‖Z‖<sub>0</sub> is the third part of the objective, a price for each non-zero. An "
        "encoder that climbs its objective has a line of R − R<sup>c</sup> that rises and one of λ‖Z‖<sub>0</sub> that "
        "falls from left to right.",
        by_subject(
            inspection.measured,
            [
                ("R of tokens as they are (nats)", "coding_rate", "z_next"),
                ("R of tokens of equal length (nats)", "coding_rate_normalised", "z_next"),
                ("R − R$^c$ of all images (nats)", "pooled_rate_reduction", "z_next"),
                ("λ‖Z‖$_0$", "sparsity_penalty", "z_next"),
            ],
        ),
    )


def _sparsity(inspection: Inspection) -> Curves:
    panels = by_subject(
        inspection.measured,
        [
            ("share of exact zeros", "zero_fraction", "z_next"),
            ("l1/l2 (small is sparse)", "l1_to_l2", "z_next"),
            ("Gini index (large is sparse)", "gini", "z_next"),
        ],
    )
    model = inspection.model
    for panel, measure in zip(panels, ("zero_fraction", "l1_to_l2", "gini"), strict=True):
        codes, tokens = model.find(measure, "code"), model.find(measure, "z_next")
        # Codes are the layer's output, but for a skip connection or a dictionary of their own to read them out.
        if [row.mean for row in codes] != [row.mean for row in tokens] and codes:
            panel.lines.append(Line("the model’s codes", len(LABELS), codes, dashed=True))
    return Curves(
        "sparsity",
        "Sparsity",
        "Each line is how sparse the layers’ outputs are, by three measures of which only the first asks for exact "
        "zeros. If depth makes representations sparser, the left and right panels rise through the encoder and the "
        "middle one falls.",
        panels,
    )


def _ranks(inspection: Inspection) -> Curves:
    return Curves(
        "ranks",
        "Directions in use",
        "Effective rank and participation ratio count the directions that an image’s tokens use (weak ones count less "
        "in the latter), and of the tokens’ energy one share lies in their best subspaces, another in what tokens of "
        "one image differ by. Ranks near 1 and differences near 0 mean that tokens have become alike, which makes "
        "every rate small without any structure.",
        by_subject(
            inspection.measured,
            [
                ("effective rank of an image’s tokens", "effective_rank", "z_next"),
                ("participation ratio", "participation_ratio", "z_next"),
                ("energy in the best subspace", "best_subspace_energy", "z_next"),
                ("energy in differences of tokens", "token_diversity", "z_next"),
            ],
        ),
    )


def _information(inspection: Inspection) -> Curves:
    return Curves(
        "information",
        "What is kept, and what lies idle",
        "How much of its patch each token still tells a linear map (1 is everything), how many directions tell images "
        "apart, which share of coordinates is zero for every token of every image, and how well a linear classifier "
        "does on each layer. High is good in all but the share of dead coordinates.",
        by_subject(
            inspection.measured,
            [
                ("pixels told by tokens (R²)", "pixel_r2", "z_next"),
                ("effective rank of images’ features", "feature_rank", "z_next"),
                ("dead coordinates (share)", "dead_coordinates", ""),
                ("accuracy of a linear probe", ACCURACY, ""),
            ],
        ),
    )


def _weights(inspection: Inspection) -> Curves:
    return Curves(
        "weights",
        "Subspaces, output projections, dictionaries",
        "Each line is a measure of the weights alone, as mean over heads or pairs of heads; the derivation assumes "
        "bases that are orthonormal (error 0), heads that are incoherent (cosine 0), outputs that are the bases again "
        "(cosine 1) and dictionaries near an isometry (error 0). The line of random weights shows what chance gives in "
        "these dimensions: only the difference to it was learned.",
        by_subject(
            _networks(inspection),
            [
                ("orthonormality error, scaled", "orthonormality_error_scaled", ""),
                ("coherence of heads (cosine)", "head_coherence", ""),
                ("affinity of heads (cos², mean)", "head_affinity", ""),
                ("output projection vs. U$_k$ (cosine)", "output_cosine", ""),
                ("isometry error of D, scaled", "dictionary_isometry_error_scaled", ""),
                ("coherence of D (cosine)", "dictionary_coherence", ""),
            ],
        ),
    )


def _inverses(inspection: Inspection) -> Curves:
    pairs = [
        ("input brought back (cosine)", "inverse_cosine", "_identity"),
        ("error of the input, best scale", "inverse_error_scaled", "_identity"),
        ("dictionaries D and E (cosine)", "inverse_dictionary_cosine", "_control"),
        ("W Eᵀ and the identity (cosine)", "inverse_operator_cosine", "_control"),
        ("subspaces of both (affinity)", "inverse_subspace_affinity", "_control"),
    ]
    panels = []
    for title, measure, control in pairs:
        lines = []
        for subject in _networks(inspection):
            number = COLOUR_OF[subject.key]
            lines += [
                Line(subject.label, number, subject.find(measure)),
                Line(f"{subject.label}: its control", number, subject.find(measure + control), dashed=True),
            ]
        panels.append(Panel(title, [line for line in lines if line.rows]))
    return Curves(
        "inverses",
        "Does a decoder layer undo its encoder layer?",
        "By encoder layer: how near the decoder layer that is meant to undo it comes to its input, on tokens (cosine "
        "and error of the input) and by weights (the others). Dashed lines are each network’s own control, which is "
        "doing nothing on tokens and all other decoder layers for weights: only what is better than the dashed line "
        "of its colour is an inverse.",
        [panel for panel in panels if panel.lines],
    )


def _networks(inspection: Inspection) -> list[Measured]:
    return [found for found in inspection.measured if found.has_own_network]
