"""Define the errors of the toolkit.

    QuantError
    ├── RecipeError         a recipe cannot be read, or one of its values is out of bounds
    ├── ConversionError     a recipe does not fit the transformer it is applied to
    ├── CalibrationError    calibration cannot start, or met values that no scale can describe
    ├── ScalesError         a scales file cannot be read or written
    │   └── ScalesMismatch  a valid scales file, made for something else
    ├── PreviewMapError     a preview map cannot be fitted, read or written, or is another VAE's
    ├── StudyError          a study cannot start, go on or be written, or met NaN
    └── WeightsError        a file of weights cannot be read or written, or lacks a tensor
        └── PackedMismatch  a valid packed checkpoint, made for something else

Each message is one sentence with the value, the bound and the remedy, and can be shown to users as
it is.
"""


class QuantError(Exception):
    """The base class of all errors that the toolkit raises on purpose."""


class RecipeError(QuantError):
    """A recipe cannot be found or read, or one of its values is out of bounds."""


class ConversionError(QuantError):
    """A recipe does not fit the transformer it is applied to."""


class CalibrationError(QuantError):
    """Calibration cannot start, or met values that no scale can describe."""


class ScalesError(QuantError):
    """A scales file cannot be read or written."""


class ScalesMismatch(ScalesError):
    """A scales file was made for another model, recipe or format version.

    The message ends with the command that makes a matching one.
    """


class PreviewMapError(QuantError):
    """A preview map cannot be fitted, read or written, or it was fitted to another VAE."""


class StudyError(QuantError):
    """A study cannot start, go on or be written, or it met values that are not finite."""


class WeightsError(QuantError):
    """A file of weights cannot be read or written, or a tensor is missing or invalid."""


class PackedMismatch(WeightsError):
    """A packed checkpoint was made for another model, recipe or format version.

    The message ends with the command that makes a matching one.
    """
