"""The errors of every room that works on models: one line each, with the value and a way out."""


class BitfrontError(Exception):
    """Base of the errors that the command line prints as one line, without a traceback."""


class UnknownNameError(BitfrontError):
    """A format, estimator, target or preset that no registry knows; names the nearest ones."""


class ModelError(BitfrontError):
    """A model that can't be found, read or understood."""


class QuantizationError(BitfrontError):
    """A tensor that a format can't hold (NaN, infinity, out of range)."""


class BankError(BitfrontError):
    """The bank's folder can't be written or read (full disk, permissions, damage)."""


class TextError(BitfrontError):
    """A text that can't be read or is too short for the chunks asked of it."""


class MeasurementError(BitfrontError):
    """A measurement that has no meaning, such as NaN in a model's logits."""


class ExportError(BitfrontError):
    """An export that can't be written, or whose reload doesn't reproduce the candidate."""


class WorkerError(BitfrontError):
    """A task that lost its worker more often than chance explains."""


class WorkerDiedError(WorkerError):
    """A task whose worker died each time that it was tried."""


class EngineError(BitfrontError):
    """An engine that isn't installed, refuses a file, or has no memory for it."""


class KernelError(EngineError):
    """A kernel that an engine doesn't have, today and tomorrow."""
