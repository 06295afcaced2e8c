"""Every measure of a layer, a run or a comparison: title, unit, the direction that is good, and what it is.

Columns of metrics.csv, rows of `interpret.statistics` and scores of a comparison have keys of `MEASURES`, from which
all tables, figures and texts take their titles. A layer has several points: its input `z`, `z_half` between its two
steps, its output `z_next` and its `code`. Measures of weights and of whole layers have none.
"""

from typing import Literal, NamedTuple

from crate_mae.drawing.text import number, percent

Better = Literal["higher", "lower", "neither"]


class Measure(NamedTuple):
    """What is measured.

    Attributes:
        title: a noun phrase, in the notation of `drawing.text`.
        caption: one sentence on what it is, in the same notation.
        unit: of its values; "share" for one between 0 and 1.
        better: the direction that is good.
        point: of the tokens at which a report gives it.
        control: the measure of what it has to beat; "" if there is none.
    """

    title: str
    caption: str
    unit: str = ""
    better: Better = "neither"
    point: str = ""
    control: str = ""

    @property
    def label(self) -> str:
        """The title with its unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def scale(self) -> int:
        """The factor to write values with: shares are written in percent."""
        return 100 if self.unit == "share" else 1

    @property
    def suffix(self) -> str:
        """What follows a value, such as "%" and " dB"."""
        return "%" if self.unit == "share" else f" {self.unit}".rstrip()

    def format(self, value: float) -> str:
        """A value as text: shares in percent, all others in three digits."""
        return percent(value) if self.unit == "share" else number(value)


MEASURES: dict[str, Measure] = {
    "subspace_rate": Measure(
        "R^c of tokens as they are",
        "Number of nats needed to code the tokens of an image within the layer’s subspaces, as in the papers.",
        unit="nats",
        better="lower",
        point="z_half",
    ),
    "subspace_rate_normalised": Measure(
        "R^c of normalised tokens",
        "R^c of the tokens as the layer’s attention sees them, after the normalisation in front of it.",
        unit="nats",
        better="lower",
        point="z_half",
    ),
    "subspace_rate_unit": Measure(
        "R^c of unit-length projections",
        "R^c of normalised tokens, with every projection scaled to length 1 and 0.01 for ε^2.",
        unit="nats",
        better="lower",
        point="z_half",
    ),
    "subspace_rate_official": Measure(
        "R^c as in the official code",
        "R^c of unit-length projections at the input of the layer’s attention, once a layer.",
        unit="nats",
        better="lower",
        point="projections",
    ),
    "value_rate_official": Measure(
        "stand-in for R^c, by value projections",
        "R^c of unit-length projections with the value projections W_v in place of U_k, for other networks.",
        unit="nats",
        point="projections",
    ),
    "coding_rate": Measure(
        "R of tokens as they are", "Nats needed to code all tokens of an image.", unit="nats", point="z_next"
    ),
    "coding_rate_normalised": Measure(
        "R of tokens of equal length",
        "Nats needed to code all tokens of an image, each scaled to length √d.",
        unit="nats",
        better="higher",
        point="z_next",
    ),
    "pooled_rate": Measure("R of all images", "Nats needed to code the tokens of all images together.", unit="nats"),
    "pooled_rate_reduction": Measure(
        "R - R^c of all images",
        "Nats saved by coding each subspace separately, for the tokens of all images together.",
        unit="nats",
        better="higher",
        point="z_next",
    ),
    "lasso_objective": Measure(
        "lasso objective", "Half the squared error of a code’s reconstruction plus λ times its l1 norm.", better="lower"
    ),
    "sparsity_penalty": Measure(
        "λ‖Z‖_0",
        "Number of non-zeros of an image’s tokens times λ, the third part of the objective.",
        better="lower",
        point="z_next",
    ),
    "zero_fraction": Measure(
        "exact zeros", "Share of coordinates that are exactly zero.", unit="share", better="higher", point="z_next"
    ),
    "l1_to_l2": Measure(
        "l1/l2",
        "Ratio of the l1 to the l2 norm of a token: 1 for a single non-zero, √d for equal ones.",
        better="lower",
        point="z_next",
    ),
    "gini": Measure(
        "Gini index",
        "Inequality of the absolute coordinates of a token: 0 for equal ones, near 1 for a single non-zero.",
        better="higher",
        point="z_next",
    ),
    "length_ratio": Measure(
        "length of tokens after the attention step / before",
        "Mean ratio of the lengths of a token after and before the attention step.",
    ),
    "self_attention": Measure(
        "attention on the token itself",
        "Share of its attention that a token gives to itself, mean over tokens and heads.",
        unit="share",
        control="self_attention_uniform",
    ),
    "self_attention_uniform": Measure(
        "uniform attention", "Share that each token gets in uniform attention.", unit="share"
    ),
    "best_subspace_energy": Measure(
        "energy in the best subspace",
        "Share of a token’s energy that lies in the subspace that holds most of it.",
        unit="share",
        point="z_next",
    ),
    "token_diversity": Measure(
        "energy in differences of tokens",
        "Share of the tokens’ energy in which the tokens of one image differ; 0 if they are all alike.",
        unit="share",
        point="z_next",
    ),
    "effective_rank": Measure(
        "effective rank of an image’s tokens",
        "Exponential of the entropy of the singular values of an image’s tokens.",
        point="z_next",
    ),
    "participation_ratio": Measure(
        "participation ratio",
        "Number of directions that an image’s tokens use; weak ones count less than in the effective rank.",
        point="z_next",
    ),
    "feature_rank": Measure(
        "effective rank of images’ features",
        "Effective rank of the mean tokens of all images; near 1, all images have similar features.",
        better="higher",
        point="z_next",
    ),
    "pixel_r2": Measure(
        "pixels explained by tokens (R²)",
        "Share of the variance of a patch’s pixels that a linear map from its own token explains.",
        better="higher",
        point="z_next",
    ),
    "dead_coordinates": Measure(
        "dead coordinates",
        "Share of a code’s coordinates that are zero for every token of every image.",
        unit="share",
        better="lower",
    ),
    "probe_accuracy": Measure(
        "accuracy of a linear probe",
        "Share of images that a linear classifier on the features of the layer gets right.",
        unit="share",
        better="higher",
    ),
    "foreground_iou": Measure(
        "overlap of foregrounds",
        "Intersection over union of the foreground that the layer finds and the drawn one.",
        unit="IoU",
        better="higher",
    ),
    "correct_localisation": Measure(
        "right boxes",
        "Share of images in which the box of the found foreground overlaps a drawn one by more than a half.",
        unit="share",
        better="higher",
    ),
    "orthonormality_error": Measure(
        "orthonormality error", "‖U_k^⊤U_k - I‖ of each head, the spectral norm.", better="lower"
    ),
    "orthonormality_error_scaled": Measure(
        "orthonormality error, scaled",
        "Orthonormality error after U_k is divided by its root-mean-square singular value.",
        better="lower",
    ),
    "head_coherence": Measure(
        "coherence of heads",
        "Cosine of the smallest angle between the subspaces of two heads.",
        unit="cosine",
        better="lower",
    ),
    "head_affinity": Measure(
        "affinity of heads",
        "Mean squared cosine of the principal angles between the subspaces of two heads; p/d for random ones.",
        unit="cos², mean",
        better="lower",
    ),
    "output_cosine": Measure(
        "output projection vs. U_k",
        "Cosine of the free output projection W_k and the best multiple of U_k.",
        unit="cosine",
        better="higher",
    ),
    "output_error": Measure(
        "error of the output projection",
        "Relative error of the best multiple of U_k as the output projection W_k of each head.",
        better="lower",
    ),
    "output_error_common": Measure(
        "error of all output projections",
        "Relative error of the best common multiple of all U_k as the output projections.",
        better="lower",
    ),
    "dictionary_isometry_error": Measure(
        "isometry error of D", "‖D^⊤D - I‖ divided by √m; 0 for orthonormal atoms.", better="lower"
    ),
    "dictionary_isometry_error_scaled": Measure(
        "isometry error of D, scaled", "Isometry error after the best scale of D.", better="lower"
    ),
    "dictionary_coherence": Measure(
        "coherence of D", "Largest cosine between two atoms of the dictionary.", unit="cosine", better="lower"
    ),
    "ista_step": Measure(
        "step size η‖D‖²",
        "Step size of ISTA times ‖D‖^2; where it is at most 1, ISTA does not raise its objective.",
    ),
    "inverse_cosine": Measure(
        "recovered input",
        "Cosine between an encoder layer’s input and its decoder layer’s reconstruction of it.",
        unit="cosine",
        better="higher",
        control="inverse_cosine_identity",
    ),
    "inverse_error": Measure(
        "error of the recovered input",
        "Relative error of the decoder layer’s reconstruction of an encoder layer’s input.",
        better="lower",
        control="inverse_error_identity",
    ),
    "inverse_error_scaled": Measure(
        "error of the recovered input, best scale",
        "Relative error of the recovered input after the best common scale.",
        better="lower",
        control="inverse_error_scaled_identity",
    ),
    "inverse_dictionary_cosine": Measure(
        "dictionaries D and E",
        "Cosine of the encoder’s D and the decoder’s E, as vectors.",
        unit="cosine",
        better="higher",
        control="inverse_dictionary_cosine_control",
    ),
    "inverse_operator_cosine": Measure(
        "W E^⊤ and the identity",
        "Cosine of the identity and W E^⊤, where ISTA is relu(X W - ηλ).",
        unit="cosine",
        better="higher",
        control="inverse_operator_cosine_control",
    ),
    "inverse_subspace_affinity": Measure(
        "subspaces of both layers",
        "Affinity of the subspaces of an encoder layer and its decoder layer, heads matched one to one.",
        unit="affinity",
        better="higher",
        control="inverse_subspace_affinity_control",
    ),
    "loss": Measure("loss", "Mean training loss since the row before.", better="lower"),
    "held_out_loss": Measure(
        "loss on held-out images", "Loss on images held out of the training data.", better="lower"
    ),
    "val_loss": Measure("loss on validation images", "Cross-entropy.", better="lower"),
    "val_accuracy": Measure("accuracy on validation images", "Top-1 accuracy.", unit="share", better="higher"),
    "knn_accuracy": Measure("k-NN accuracy", "Share of held-out images got right.", unit="share", better="higher"),
    "feature_cosine": Measure("mean cosine between images", "Mean cosine of two images’ features.", better="lower"),
    "lr": Measure("learning rate", "Learning rate of the step."),
    "images_per_second": Measure("images per second", "Speed over all processes.", better="higher"),
    "linear": Measure("linear probe, top-1", "Top-1 accuracy of a linear classifier.", unit="share", better="higher"),
    "knn": Measure("k-NN, top-1", "Top-1 accuracy of a vote of neighbours.", unit="share", better="higher"),
    "psnr": Measure(
        "completion: PSNR of hidden patches", "Peak signal-to-noise ratio of completions.", unit="dB", better="higher"
    ),
    "ssim": Measure("completion: SSIM", "Structural similarity to the original, at most 1.", better="higher"),
    "mse": Measure(
        "completion: squared error, normalised pixels", "Mean squared error of hidden pixels.", better="lower"
    ),
}
# Of how well a decoder layer undoes its encoder layer, each with its control.
INVERSES = (
    "inverse_cosine",
    "inverse_error_scaled",
    "inverse_dictionary_cosine",
    "inverse_operator_cosine",
    "inverse_subspace_affinity",
)
