"""How many images of a dense bundle go together: by their bytes and those of their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from calibration.predictor import Predictor
from posthoc.contract import DataError
from service.scoring.formats import images as image_files
from service.scoring.formats.format import Format, Pixels
from service.scoring.fragments import FRAGMENT_ROWS
from service.sizes import Sizes, measure

BATCH_BYTES = 8 << 20  # in one run of the model, which takes several times as much inside
BLOCK_BYTES = 32 << 20  # read and written at once
FRAGMENT_BYTES = 1 << 30  # in one file of the output


@dataclass(frozen=True, slots=True)
class Images:
    """Images and their maps; ``free`` where an image has a size of its own."""

    sizes: Sizes
    free: bool

    @property
    def values(self) -> int:
        """Values of an image, or where sizes are free of one that the bundle was fitted on."""
        return self.sizes.inputs

    def nbytes(self, values: float) -> int:
        """Bytes of an image of so many values and of its maps."""
        own = values * self.sizes.input_bytes / self.sizes.inputs
        return max(1, ceil(own) + self.sizes.answer_bytes(self.sizes.outputs, ceil(values)))

    def in_batch(self, batch_size: int) -> int:
        """Images in one run of the model. Two of free size need not have one shape."""
        if self.free:
            return 1
        return min(batch_size, max(1, BATCH_BYTES // self.nbytes(self.values)))

    def in_block(self, values: float, batch_size: int) -> int:
        """Images of so many values in a block: whole batches, at least one."""
        return batch_size * max(1, BLOCK_BYTES // self.nbytes(values) // batch_size)

    def in_fragment(self) -> int:
        """Images in one file of the output."""
        return min(FRAGMENT_ROWS, max(1, FRAGMENT_BYTES // self.nbytes(self.values)))


def images_of(predictor: Predictor, fields: Sequence[str]) -> Images | None:
    """The images of a dense bundle and the maps ``fields`` of them; None where rows are no images.

    Runs one golden image to see how large they are.
    """
    manifest = predictor.manifest
    if manifest.dense is None:
        return None
    outputs = [spec for spec in manifest.outputs if spec.name in fields]
    free = any(-1 in spec.shape[1:] for spec in manifest.inputs)
    return Images(measure(predictor, outputs), free)


def check_pixels(form: Format, pixels: Pixels, predictor: Predictor) -> None:
    """Raise DataError where files of ``form`` are images that cannot fill the model's input, and
    where ``pixels`` says something of files that are none."""
    if form.files_are_rows:
        any_size = predictor.manifest.dense is not None
        image_files.check(predictor.inputs, pixels, any_size=any_size)
    elif pixels != Pixels():
        raise DataError(
            f"--image-scale, --image-mean, --image-std and --image-resize are for folders of "
            f"images; these are {form.name} files"
        )
