"""From a decoded image to the normalised input of a model: augmented at random for training, fixed for use."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2

from crate_mae.data.dataset import global_generators_seeded
from crate_mae.data.decode import size_of, to_8_bits, to_channels, to_tensor, to_unit
from crate_mae.data.numbers import MIN_CROP
from crate_mae.errors import UserError

_MOST_COVERING = 16  # how many times as long as the target a scaled image may be before it is cropped

Resize = Callable[[Image.Image | Tensor], Image.Image | Tensor]


class Preparation:
    """Convert channels, then resize, then normalise: `(x - mean) / std` with x in [0, 1].

    8-bit images are resized as Pillow images, whose resampling is faster than that of tensors and rounds to 8 bits;
    deeper ones as float tensors c hh ww. Mean and std are per channel of the result, in [0, 1].
    """

    def __init__(self, resize: Resize, channels: int, *, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != channels or len(std) != channels:
            raise UserError(f"{channels} channel(s) need as many means and stds, not {len(mean)} and {len(std)}.")
        if not all(value > 0 for value in std):
            raise UserError(f"Every std must be positive, got {tuple(std)}.")
        if not (all(0 <= value <= 1 for value in mean) and all(value <= 1 for value in std)):
            raise UserError(
                f"mean {tuple(mean)} and std {tuple(std)} are not those of pixels in [0, 1].\n"
                "Divide by 255 those of pixels from 0 to 255."
            )
        self.resize = resize
        self.channels = channels
        self.mean = torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1)

    def __call__(self, image: Image.Image | Tensor) -> Float[Tensor, "c hh ww"]:
        """Prepare one image as `ImageSource.read` returns it: `normalise(pixels(image))`.

        Raises:
            UserError: if its channels cannot be converted to the required number.
        """
        return self.normalise(self.pixels(image))

    def pixels(self, image: Image.Image | Tensor) -> UInt8[Tensor, "c hh ww"] | Float[Tensor, "c hh ww"]:
        """Everything but the normalisation: 8 bits, or of deeper images float32 in [0, 1].

        Raises:
            UserError: if the channels of the image cannot be converted to the required number.
        """
        pixels = to_tensor(self.resize(to_channels(image, self.channels)))
        # Out of place: these may be the pixels of a tensor data set itself. Bicubic resampling overshoots at edges;
        # of 8 bits it is clamped already.
        return pixels if pixels.dtype == torch.uint8 else pixels.clamp(0, 1)

    def normalise(
        self, pixels: UInt8[Tensor, "*batch c hh ww"] | Float[Tensor, "*batch c hh ww"]
    ) -> Float[Tensor, "*batch c hh ww"]:
        """Normalise what `pixels` returned, of one or more images, on the device on which it is."""
        if self.mean.device != pixels.device:
            self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return (to_unit(pixels) - self.mean) / self.std


def fit_and_centre(image: Image.Image | Tensor, size: tuple[int, int]) -> Image.Image | Tensor:
    """Scale an image, keeping its aspect, until it covers `size` (height, width); crop the centre."""
    if size_of(image) == size:
        return image
    # Of a thin image only the middle is used: the ends, enlarged, would fill the memory. They are cut off by an even
    # number of pixels, so that the middle stays where it is.
    height, width = size_of(image)
    most = math.ceil(_MOST_COVERING * size[0] * width / size[1]), math.ceil(_MOST_COVERING * size[1] * height / size[0])
    kept = [side - max(0, (side - limit) // 2 * 2) for side, limit in zip((height, width), most, strict=True)]
    if kept != [height, width]:
        image = v2.CenterCrop(kept)(image)
    scale = max(size[0] / kept[0], size[1] / kept[1])
    covering = [max(target, round(side * scale)) for target, side in zip(size, kept, strict=True)]
    covered = v2.Resize(covering, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)(image)
    return v2.CenterCrop(size)(covered)


_POLICY = re.compile(r"rand(-([mn]\d{1,3}|mmax\d{1,3}|inc[01]|(p|mstd)\d{1,3}(\.\d{0,9})?|t\w+))*")


class RandAugment:
    """timm's RandAugment (Cubuk et al. 2020) of grey and RGB images, which works on 8 bits.

    timm draws from the global generators of Python and NumPy. Here they are seeded from PyTorch's default generator
    for each image, and restored, so that all transforms have the same source of randomness.

    Args:
        policy: such as "rand-m9-mstd0.5-inc1": magnitude 9, its deviation, and effects that grow with magnitude.
        image_size: (height, width); translations go up to 45% of the shorter side.
        channels: 1 or 3.
        mean: per channel, in [0, 1]: the colour of pixels from outside the image.

    Raises:
        UserError: for a policy that timm does not understand, or another number of channels.
    """

    def __init__(self, policy: str, image_size: tuple[int, int], *, channels: int, mean: Sequence[float]) -> None:
        if channels not in (1, 3):
            raise UserError(f"RandAugment needs grey or RGB images, not {channels} channels: use --rand-augment ''.")
        fill = tuple(round(255 * value) for value in mean)
        settings = {"translate_const": int(min(image_size) * 0.45), "img_mean": fill if channels == 3 else fill[0]}
        refused = UserError(
            f'--rand-augment "{policy[:99]}" is not understood: use a policy like rand-m9-mstd0.5-inc1, or "" for none.'
        )
        if not _POLICY.fullmatch(policy):  # timm's own check is an assert, which `python -O` leaves out
            raise refused
        try:
            self._augment = rand_augment_transform(policy, settings)
        except (AssertionError, KeyError, ValueError) as error:
            raise refused from error

    def __call__(self, image: Image.Image | Tensor) -> Image.Image:
        """Augment one image; deeper pixels are rounded to 8 bits."""
        if isinstance(image, Tensor):
            image = to_8_bits(image)
        with global_generators_seeded(int(torch.randint(2**32, ()))):
            try:
                return self._augment(image)
            except ValueError as error:
                # timm's strongest posterisation keeps 0 bits, which Pillow may refuse: the image stays unchanged.
                if "bits" not in str(error):
                    raise
                return image


def pretrain_transform(
    image_size: tuple[int, int],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    min_crop: float = MIN_CROP,
    flip: bool = True,
) -> Preparation:
    """Return the augmentation of masked autoencoders: a random resized crop (bicubic) and a horizontal flip.

    The crop's aspect varies from 3/4 to 4/3 times that of the target (He et al. 2022 have square targets only).

    Args:
        image_size: (height, width) of the result.
        channels: of the result; grey and colour are converted into each other.
        mean: per channel, in [0, 1].
        std: per channel, in [0, 1].
        min_crop: smallest share of the image's area that a crop takes; 1 still varies the aspect.
        flip: whether half of the crops are mirrored; wrong for digits and text.
    """
    return Preparation(_crop_and_flip(image_size, min_crop, flip), channels, mean=mean, std=std)


def finetune_transform(
    image_size: tuple[int, int],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    min_crop: float = MIN_CROP,
    flip: bool = True,
    rand_augment: str = "",
) -> Preparation:
    """Return the augmentation for classification: that of `pretrain_transform`, whose arguments it has too.

    With a policy `rand_augment`, `RandAugment` follows.
    """
    resize = _crop_and_flip(image_size, min_crop, flip)
    if rand_augment:
        resize = v2.Compose([resize, RandAugment(rand_augment, image_size, channels=channels, mean=mean)])
    return Preparation(resize, channels, mean=mean, std=std)


def evaluation_transform(
    image_size: tuple[int, int], channels: int, mean: Sequence[float], std: Sequence[float]
) -> Preparation:
    """Return the preparation without randomness: scaled to cover the target, then centre-cropped.

    The arguments are those of `pretrain_transform`.
    """
    return Preparation(partial(fit_and_centre, size=image_size), channels, mean=mean, std=std)


def _crop_and_flip(image_size: tuple[int, int], min_crop: float, flip: bool) -> Resize:
    if not 0 < min_crop <= 1:
        raise UserError(f"The smallest crop must be in (0, 1] of the image, got {min_crop}.")
    aspect = image_size[1] / image_size[0]
    crop = v2.RandomResizedCrop(
        image_size,
        scale=(min_crop, 1.0),
        ratio=(3 / 4 * aspect, 4 / 3 * aspect),
        interpolation=v2.InterpolationMode.BICUBIC,
        antialias=True,
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if flip else crop
