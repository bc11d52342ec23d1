"""What can go wrong in the toolkit, as one tree.

    QuantError
    ├── RecipeError         a recipe cannot be read, or one of its values is out of bounds
    ├── ConversionError     a recipe does not fit the transformer it is applied to
    ├── CalibrationError    calibration cannot start or saw something it must not average away
    ├── ScalesError         a scales file cannot be read or written
    │   └── ScalesMismatch  a good scales file, made for something else
    └── WeightsError        a file of weights cannot be read or written, or lacks a tensor
        └── PackedMismatch  a good packed checkpoint, made for something else

Each message is one sentence with the value, the bound and the remedy, fit to be printed as it is.
"""


class QuantError(Exception):
    """Anything the toolkit refuses to do."""


class RecipeError(QuantError):
    """A recipe cannot be found or read, or one of its values is out of bounds."""


class ConversionError(QuantError):
    """A recipe does not fit the transformer it is applied to."""


class CalibrationError(QuantError):
    """Calibration cannot start, or saw values no scale can describe."""


class ScalesError(QuantError):
    """A scales file cannot be read or written."""


class ScalesMismatch(ScalesError):
    """A scales file was made for another model, recipe or format version.

    The message ends with the command that makes a fitting one.
    """


class WeightsError(QuantError):
    """A file of weights cannot be read or written, or a tensor in it is not as it should be."""


class PackedMismatch(WeightsError):
    """A packed checkpoint was made for another model, recipe or format version.

    The message ends with the command that makes a fitting one.
    """
